//! The harness itself: a test that stands on it may rely on what is shown here.

use std::time::Duration;

use crate::support::{
    Stored, postgres,
    smtp::Sink,
    smtp_script::{Action, Phase, Script, reply},
};
use lettre::{
    Address, AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor, address::Envelope, transport::smtp,
};

fn transport(port: u16) -> AsyncSmtpTransport<Tokio1Executor> {
    AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous("127.0.0.1")
        .port(port)
        .timeout(Some(Duration::from_secs(10)))
        .build()
}

/// A mail with what servers like to spoil: dots at the start of lines, and empty lines at the end.
fn message() -> Message {
    Message::builder()
        .from("lapsed@example.org".parse().unwrap())
        .to("Ann <ann@example.org>".parse().unwrap())
        .subject("your token")
        .date(std::time::UNIX_EPOCH)
        .body("first\r\n.hidden\r\n..\r\n.\r\n\r\nlast\r\n\r\n".to_owned())
        .unwrap()
}

fn sent(rcpt_to: &[&str]) -> Stored {
    Stored {
        mail_from: "lapsed@example.org".to_owned(),
        rcpt_to: rcpt_to.iter().map(|&address| address.to_owned()).collect(),
        // lettre ends every message with one more line end, whether or not it ends with one already.
        data: [message().formatted(), b"\r\n".to_vec()].concat(),
    }
}

async fn send_to(port: u16, rcpt_to: &[&str]) -> Result<smtp::response::Response, smtp::Error> {
    let to = rcpt_to.iter().map(|address| address.parse::<Address>().unwrap()).collect();
    let envelope = Envelope::new(Some("lapsed@example.org".parse().unwrap()), to).unwrap();
    transport(port).send_raw(&envelope, &message().formatted()).await
}

#[tokio::test]
async fn two_databases_at_once_know_nothing_of_each_other() {
    let (one, two) = tokio::join!(postgres::fresh(), postgres::fresh());
    assert_ne!(one.url, two.url);
    for database in [&one, &two] {
        let mut connection = database.connect().await;
        let answer: i32 = sqlx::query_scalar("SELECT 1").fetch_one(&mut connection).await.unwrap();
        assert_eq!(answer, 1);
        sqlx::query("CREATE TABLE only_here (id INTEGER)")
            .execute(&mut connection)
            .await
            .expect("the database is empty");
    }
}

#[tokio::test]
async fn a_database_is_dropped_with_its_connections_also_after_a_panic() {
    let witness = postgres::fresh().await;
    let (tell, told) = tokio::sync::oneshot::channel();
    let test = tokio::spawn(async move {
        let database = postgres::fresh().await;
        let _connected = database.connect().await;
        tell.send(database.name.clone()).unwrap();
        panic!("on purpose");
    });
    assert!(test.await.unwrap_err().is_panic());
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_database WHERE datname = $1")
        .bind(told.await.unwrap())
        .fetch_one(&mut witness.admin().await)
        .await
        .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn connections_can_be_cut() {
    let database = postgres::fresh().await;
    let mut connection = database.connect().await;
    assert_eq!(database.cut_connections().await, 1);
    sqlx::query("SELECT 1").execute(&mut connection).await.expect_err("the session is gone");
    database.connect().await;
}

#[tokio::test]
async fn the_sink_stores_a_message_whole() {
    let sink = Sink::start();
    assert_eq!(sink.messages(), []);
    transport(sink.port()).send(message()).await.unwrap();
    assert_eq!(sink.messages(), [sent(&["ann@example.org"])]);

    let both = ["ann@example.org", "bob@example.org"];
    send_to(sink.port(), &both).await.unwrap();
    assert_eq!(sink.wait_for(2)[1], sent(&both));
}

#[tokio::test]
async fn the_sink_takes_options_and_ends_when_dropped() {
    let sink = Sink::start_with(&["-r", "DATA"]);
    let port = sink.port();
    let error = send_to(port, &["ann@example.org"]).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert_eq!(sink.messages(), []);
    drop(sink);
    let error = tokio::net::TcpStream::connect(("127.0.0.1", port)).await;
    assert!(error.is_err(), "something still listens on port {port}");
}

#[tokio::test]
async fn the_script_takes_a_message_whole() {
    for script in [Script::new(), Script::new().pipelining()] {
        let server = script.start().await;
        transport(server.port()).send(message()).await.unwrap();
        assert_eq!(server.accepted(), [sent(&["ann@example.org"])]);
        assert_eq!(server.times(Phase::Connect), 1);
        assert!(server.commands().contains(&"DATA".to_owned()));
    }
}

#[tokio::test]
async fn the_script_answers_by_phase_address_and_turn() {
    let server = Script::new()
        .on_rcpt("Dead@example.org", "550 5.1.1 no such user")
        .once(Phase::Mail, reply("451 4.3.0 later"))
        .once(Phase::Dot, reply("552 5.3.4 too big"))
        .decide(Phase::Ehlo, |line| line.contains("unwanted").then(|| reply("550 go away")))
        .start()
        .await;
    for expected in ["451", "552"] {
        let error = send_to(server.port(), &["ann@example.org"]).await.unwrap_err();
        let status = error.status().map(|code| code.to_string());
        assert_eq!(status.as_deref(), Some(expected), "{error}");
    }
    assert_eq!(server.accepted(), []);
    send_to(server.port(), &["ann@example.org"]).await.unwrap();
    let error = send_to(server.port(), &["dead@example.org"]).await.unwrap_err();
    assert!(error.is_permanent(), "{error}");
    assert_eq!(server.accepted(), [sent(&["ann@example.org"])]);
}

#[tokio::test]
async fn the_script_cuts_connections_and_can_keep_the_message() {
    let server = Script::new()
        .once(Phase::Connect, Action::Close)
        .once(Phase::Ehlo, Action::ReplyAndClose("421 4.3.2 closing".to_owned()))
        .once(Phase::Dot, Action::Close)
        .once(Phase::Dot, Action::TakeAndClose)
        .start()
        .await;
    for taken in [0, 0, 0, 1] {
        send_to(server.port(), &["ann@example.org"]).await.expect_err("the connection is cut");
        assert_eq!(server.accepted().len(), taken);
    }
    send_to(server.port(), &["ann@example.org"]).await.unwrap();
    assert_eq!(server.accepted().len(), 2);
}

#[tokio::test]
async fn the_script_stalls_until_released() {
    let server = Script::new().once(Phase::Dot, Action::Stall).start().await;
    let port = server.port();
    let sending = tokio::spawn(async move { send_to(port, &["ann@example.org"]).await.is_ok() });
    server.reached(Phase::Dot, 1).await;
    assert_eq!(server.accepted(), []);
    assert!(!sending.is_finished());
    server.release();
    assert!(sending.await.unwrap());
    assert_eq!(server.accepted().len(), 1);
}

#[tokio::test]
async fn the_script_refuses_what_a_client_must_not_do() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    // Everything at once, and the connection's writing half closed after it.
    async fn converse(server: &crate::support::smtp_script::Server, said: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", server.port())).await.unwrap();
        stream.write_all(said.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut heard = String::new();
        stream.read_to_string(&mut heard).await.unwrap();
        heard
    }

    let group = "MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.org>\r\nQUIT\r\n";
    let heard = converse(&Script::new().start().await, group).await;
    assert!(heard.contains("\r\n554 5.5.0 MAIL"), "{heard}");
    let server = Script::new().pipelining().start().await;
    let heard = converse(&server, group).await;
    assert!(heard.ends_with("250 2.1.5 ok\r\n221 2.0.0 bye\r\n"), "{heard}");
    let heard = converse(&server, "RCPT TO:<b@example.org>\r\n").await;
    assert!(heard.contains("\r\n503 5.5.1"), "{heard}");
    let heard = converse(&server, "NOOP\n").await;
    assert!(!heard.contains("250"), "a bare LF ended a line: {heard}");
}

#[tokio::test]
async fn a_dropped_script_closes_its_connections() {
    use tokio::io::AsyncReadExt;

    let server = Script::new().on(Phase::Connect, Action::Stall).start().await;
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", server.port())).await.unwrap();
    server.reached(Phase::Connect, 1).await;
    drop(server);
    let read = stream.read(&mut [0; 1]).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}
