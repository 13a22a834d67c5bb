use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::session::ASK_AFTER;
use super::*;
use crate::config::{Login, Proof, Timeouts, Tls};

mod replies;
mod tls;

/// One thing that the scripted server does.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Sends these bytes.
    Say(&'static str),
    /// Reads a line that begins like this.
    Hear(&'static str),
    /// Reads the content up to the lone dot.
    HearContent,
    /// Says nothing more, but keeps the connection.
    Stall,
}
use Step::{Hear, HearContent, Say, Stall};

/// Said in answer to EHLO, which is asked twice.
const OFFERS: &str = "250-mx.example.org\r\n250 8BITMIME\r\n";
const GREETING: [Step; 5] =
    [Say("220 mx.example.org ESMTP\r\n"), Hear("EHLO "), Say(OFFERS), Hear("EHLO "), Say(OFFERS)];
const MAIL: [Step; 2] = [Hear("MAIL FROM:<lapsed@example.org>\r\n"), Say("250 2.1.0 Ok\r\n")];
const RCPT: [Step; 2] = [Hear("RCPT TO:<ann@example.org>\r\n"), Say("250 2.1.5 Ok\r\n")];
const DATA: [Step; 3] = [Hear("DATA\r\n"), Say("354 go\r\n"), HearContent];
const ACCEPT: [Step; 1] = [Say("250 2.0.0 Ok: queued as 4F2\r\n")];
const RSET: [Step; 2] = [Hear("RSET\r\n"), Say("250 2.0.0 Ok\r\n")];
const QUIT: [Step; 2] = [Hear("QUIT\r\n"), Say("221 2.0.0 Bye\r\n")];

/// A server that follows one script per connection, and then closes it.
struct Server {
    port: u16,
    /// The contents that it received whole.
    received: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(scripts: Vec<Vec<Step>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let received = Arc::new(Mutex::new(Vec::new()));
        let contents = Arc::clone(&received);
        let task = tokio::spawn(async move {
            for script in scripts {
                let (socket, _) = listener.accept().await.expect("a connection");
                follow(socket, &script, &contents).await;
            }
        });
        Self { port, received, task }
    }

    fn smtp(&self) -> Smtp {
        self.smtp_with(Tls::None, Timeouts::default())
    }

    fn smtp_with(&self, tls: Tls, timeouts: Timeouts) -> Smtp {
        Smtp::new(config::Smtp { tls, timeouts, ..config::Smtp::plain("127.0.0.1", self.port) })
    }

    fn received(&self) -> Vec<String> {
        self.received.lock().expect("not poisoned").clone()
    }

    /// Waits until every script is done; fails if the client did not keep to one.
    async fn finish(self) -> Vec<String> {
        let received = Arc::clone(&self.received);
        self.task.await.expect("the client kept to the script");
        received.lock().expect("not poisoned").clone()
    }
}

async fn follow(socket: TcpStream, script: &[Step], contents: &Mutex<Vec<String>>) {
    let mut socket = BufReader::new(socket);
    for step in script {
        match *step {
            Say(text) => socket.write_all(text.as_bytes()).await.expect("said"),
            Hear(start) => {
                let mut line = String::new();
                socket.read_line(&mut line).await.expect("heard");
                assert!(line.starts_with(start), "heard {line:?}, expected {start:?}");
            }
            HearContent => {
                let mut content = String::new();
                while !content.ends_with("\r\n.\r\n") {
                    if socket.read_line(&mut content).await.expect("heard") == 0 {
                        return;
                    }
                }
                contents.lock().expect("not poisoned").push(content);
            }
            Stall => {
                // Until the client gives up.
                let mut rest = String::new();
                while socket.read_line(&mut rest).await.is_ok_and(|read| read > 0) {}
            }
        }
    }
}

fn script(parts: &[&[Step]]) -> Vec<Step> {
    parts.concat()
}

fn mail() -> Composed {
    Composed {
        from: "lapsed@example.org".parse().expect("an address"),
        to: "ann@example.org".parse().expect("an address"),
        subject: "x".into(),
        bytes: b"Subject: x\r\n\r\none\r\n.two\r\n".to_vec(),
    }
}

fn short() -> Timeouts {
    let short = Duration::from_secs(1);
    Timeouts { hello: short, mail: short, content: short, dot: short, ..Timeouts::default() }
}

fn phase_of(happened: &Happened) -> Phase {
    match happened {
        Happened::Refused { phase, .. } | Happened::Broken { phase, .. } => *phase,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn several_messages_go_over_one_session() {
    let server =
        Server::start(vec![script(&[&GREETING, &MAIL, &RCPT, &DATA, &ACCEPT, &MAIL, &RCPT, &DATA, &ACCEPT, &QUIT])])
            .await;
    let mut smtp = server.smtp();
    smtp.ready().await.expect("ready");
    for _ in 0..2 {
        let happened = smtp.send(&mail(), || async { true }).await;
        assert_eq!(happened, Happened::Accepted { reply: "2.0.0 Ok: queued as 4F2".into() });
    }
    smtp.close().await;
    let sent = "Subject: x\r\n\r\none\r\n..two\r\n.\r\n";
    assert_eq!(server.finish().await, [sent, sent], "a line that begins with a dot has another; no line is added");
}

#[tokio::test]
async fn after_a_refusal_the_session_goes_on() {
    let refusals = script(&[
        &GREETING,
        &MAIL,
        &[Hear("RCPT"), Say("550-5.1.1 <ann@example.org>:\r\n550 5.1.1 User unknown\r\n")],
        &RSET,
        &[Hear("MAIL"), Say("451 4.3.0 try later\r\n")],
        &RSET,
        &MAIL,
        &RCPT,
        &[Hear("DATA"), Say("452 disk full\r\n")],
        &RSET,
        &MAIL,
        &RCPT,
        &DATA,
        &[Say("554 5.7.1 looks like spam\r\n")],
        &MAIL,
        &RCPT,
        &DATA,
        &ACCEPT,
    ]);
    let server = Server::start(vec![refusals]).await;
    let mut smtp = server.smtp();
    let mut send = async || smtp.send(&mail(), || async { true }).await;
    assert_eq!(
        send().await,
        Happened::Refused {
            phase: Phase::Rcpt,
            code: 550,
            enhanced: Some((5, 1, 1)),
            reply: "5.1.1 <ann@example.org>: User unknown".into()
        }
    );
    assert_eq!(send().await, Happened::refused(Phase::Mail, 451, "4.3.0 try later"));
    assert_eq!(send().await, Happened::refused(Phase::Data, 452, "disk full"));
    assert_eq!(send().await, Happened::refused(Phase::Dot, 554, "5.7.1 looks like spam"));
    assert!(matches!(send().await, Happened::Accepted { .. }));
    assert_eq!(server.finish().await.len(), 2);
}

#[tokio::test]
async fn a_loss_before_the_dot_is_told_from_one_after_it() {
    let before = script(&[&GREETING, &MAIL, &[Hear("RCPT")]]);
    let after = script(&[&GREETING, &MAIL, &RCPT, &DATA]);
    let nonsense = script(&[&GREETING, &MAIL, &RCPT, &DATA, &[Say("whatever\r\n"), Stall]]);
    let not_asked = script(&[&GREETING, &MAIL, &RCPT, &[Hear("DATA"), Say("250 ok?\r\n"), Stall]]);
    let fine = script(&[&GREETING, &MAIL, &RCPT, &DATA, &ACCEPT]);
    let server = Server::start(vec![before, after, nonsense, not_asked, fine]).await;
    let mut smtp = server.smtp();
    let mut send = async || smtp.send(&mail(), || async { true }).await;
    assert_eq!(phase_of(&send().await), Phase::Rcpt);
    assert!(matches!(send().await, Happened::Unknown { .. }));
    assert!(matches!(send().await, Happened::Unknown { .. }));
    assert_eq!(phase_of(&send().await), Phase::Data);
    assert!(matches!(send().await, Happened::Accepted { .. }));
    server.finish().await;
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up_in_each_phase() {
    let scripts = vec![
        vec![Stall],
        script(&[&GREETING, &[Hear("MAIL"), Stall]]),
        script(&[&GREETING, &MAIL, &RCPT, &DATA, &[Stall]]),
    ];
    let server = Server::start(scripts).await;
    let mut smtp = server.smtp_with(Tls::None, short());
    let mut send = async || smtp.send(&mail(), || async { true }).await;
    assert_eq!(send().await, Happened::Broken { phase: Phase::Hello, error: "no answer within 1s".into() });
    assert_eq!(send().await, Happened::Broken { phase: Phase::Mail, error: "no answer within 1s".into() });
    assert_eq!(send().await, Happened::Unknown { error: "no answer within 1s".into() });
    drop(smtp);
    server.finish().await;
}

#[tokio::test]
async fn a_lost_lease_sends_nothing() {
    let early = script(&[&GREETING]);
    let late = script(&[&MAIL, &RCPT, &[Hear("DATA"), Say("354 go\r\n"), HearContent]]);
    let server = Server::start(vec![script(&[&early, &late])]).await;
    let mut smtp = server.smtp();
    assert_eq!(smtp.send(&mail(), || async { false }).await, Happened::LostLease);
    let mut asked = 0;
    let until_the_content = || {
        asked += 1;
        std::future::ready(asked < 2)
    };
    assert_eq!(smtp.send(&mail(), until_the_content).await, Happened::LostLease);
    assert!(smtp.session.is_none(), "the connection is dropped instead of the dot being sent");
    assert_eq!(server.finish().await, Vec::<String>::new());
    assert_eq!(asked, 2);
}

#[tokio::test]
async fn a_dropped_send_takes_its_session_with_it() {
    let server = Server::start(vec![
        script(&[&GREETING, &MAIL, &[Hear("RCPT"), Stall]]),
        script(&[&GREETING, &MAIL, &RCPT, &DATA, &ACCEPT]),
    ])
    .await;
    let mut smtp = server.smtp();
    smtp.ready().await.expect("ready");
    let dropped = timeout(Duration::from_millis(50), smtp.send(&mail(), || async { true })).await;
    assert!(dropped.is_err());
    assert!(smtp.session.is_none());
    assert!(matches!(smtp.send(&mail(), || async { true }).await, Happened::Accepted { .. }));
    assert_eq!(server.finish().await.len(), 1);
}

#[tokio::test]
async fn a_session_that_the_server_closed_meanwhile_is_replaced() {
    let one = script(&[&GREETING, &MAIL, &RCPT, &DATA, &ACCEPT]);
    let closing = script(&[&one, &[Hear("MAIL"), Say("421 4.4.2 idle for too long\r\n")]]);
    let server = Server::start(vec![one.clone(), closing, one]).await;
    let mut smtp = server.smtp();
    for _ in 0..3 {
        assert!(matches!(smtp.send(&mail(), || async { true }).await, Happened::Accepted { .. }));
    }
    assert_eq!(server.finish().await.len(), 3);
}

#[tokio::test]
async fn a_session_that_was_idle_for_long_is_asked_first() {
    let server = Server::start(vec![
        script(&[&GREETING, &[Hear("NOOP"), Say("250 2.0.0 Ok\r\n"), Hear("NOOP")]]),
        script(&[&GREETING]),
    ])
    .await;
    let mut smtp = server.smtp();
    smtp.ready().await.expect("ready");
    smtp.ready().await.expect("ready, and not asked so soon");
    for _ in 0..2 {
        smtp.session.as_mut().expect("a session").last_used -= ASK_AFTER + Duration::from_secs(1);
        smtp.ready().await.expect("ready");
    }
    server.finish().await;
}

#[tokio::test]
async fn a_server_that_takes_nobodys_mail_is_found_out_before_a_message_is_touched() {
    let server = Server::start(vec![
        vec![Say("554 5.7.1 no\r\n")],
        vec![Say("220 mx\r\n"), Hear("EHLO"), Say("250-mx\r\n250-   \r\n250 8BITMIME\r\n")],
        vec![Say("220 mx\r\n"), Hear("EHLO"), Say("no idea\r\n"), Stall],
    ])
    .await;
    let mut smtp = server.smtp_with(Tls::None, short());
    for _ in 0..3 {
        let happened = smtp.ready().await.expect_err("not ready");
        assert_eq!(phase_of(&happened), Phase::Hello, "{happened:?}");
    }
    server.finish().await;

    let nobody = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = nobody.local_addr().expect("an address").port();
    drop(nobody);
    let happened = Smtp::new(config::Smtp::plain("127.0.0.1", port)).ready().await.expect_err("nobody there");
    assert_eq!(phase_of(&happened), Phase::Connect);
}

#[tokio::test]
async fn mail_is_never_sent_in_the_clear_where_tls_is_required() {
    let offers = script(&[&[Say("220 mx\r\n"), Hear("EHLO"), Say("250-mx\r\n250 STARTTLS\r\n"), Hear("STARTTLS")]]);
    let injects = script(&[&offers, &[Say("220 go\r\n250-mx\r\n250 8BITMIME\r\n"), Stall]]);
    let refuses = script(&[&offers, &[Say("454 4.7.0 not now\r\n"), Hear("QUIT")]]);
    let server = Server::start(vec![GREETING[..3].to_vec(), refuses, injects]).await;
    let mut smtp = server.smtp_with(Tls::StartTls, Timeouts::default());
    for _ in 0..2 {
        assert_eq!(phase_of(&smtp.ready().await.expect_err("not ready")), Phase::Tls);
    }
    // Replies that were put behind the answer to STARTTLS meet the handshake, and do not pass for the server's.
    let happened = smtp.ready().await.expect_err("not ready");
    let Happened::Broken { phase: Phase::Tls, error } = happened else { panic!("{happened:?}") };
    assert!(error.contains("corrupt message"), "{error}");
    server.finish().await;
}

#[tokio::test]
async fn the_password_is_read_at_each_connect() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("password");
    let login = |answer: &'static str, reply: &'static str| {
        let hello = "250-mx\r\n250 AUTH PLAIN LOGIN\r\n";
        vec![Say("220 mx\r\n"), Hear("EHLO"), Say(hello), Hear(answer), Say(reply)]
    };
    // base64 of NUL, ann, NUL and the password.
    let wrong = login("AUTH PLAIN AGFubgBvbGQ=\r\n", "535 5.7.8 no\r\n");
    let right =
        script(&[&login("AUTH PLAIN AGFubgBuZXc=\r\n", "235 2.7.0 yes\r\n"), &[Hear("EHLO"), Say("250 mx\r\n")]]);
    let offers_none = vec![Say("220 mx\r\n"), Hear("EHLO"), Say("250 mx\r\n")];
    let server = Server::start(vec![script(&[&offers_none, &[Stall]]), offers_none, wrong, right]).await;
    let login = Some(Login { username: "ann".into(), proof: Proof::PasswordFile(file.clone()) });
    let plain = config::Smtp::plain("127.0.0.1", server.port);
    let refused = Smtp::new(config::Smtp { login: login.clone(), ..plain.clone() }).ready().await;
    assert_eq!(phase_of(&refused.expect_err("in the clear")), Phase::Auth);
    let mut smtp = Smtp::new(config::Smtp { login, allow_plain_auth: true, ..plain });

    std::fs::write(&file, "old\n").expect("written");
    let happened = smtp.ready().await.expect_err("AUTH is not offered");
    assert_eq!(phase_of(&happened), Phase::Auth);
    assert_eq!(smtp.ready().await.expect_err("wrong"), Happened::refused(Phase::Auth, 535, "5.7.8 no"));
    std::fs::write(&file, "new\n").expect("written");
    smtp.ready().await.expect("right");
    drop(smtp);
    server.finish().await;
}

#[tokio::test]
async fn letters_that_the_server_does_not_take_are_this_messages_fault() {
    let offers = Say("250-mx\r\n250-SMTPUTF8\r\n250 8BITMIME\r\n");
    let utf8 = [Say("220 mx\r\n"), Hear("EHLO"), offers, Hear("EHLO"), offers];
    let server = Server::start(vec![
        script(&[&GREETING, &[Stall]]),
        script(&[
            &utf8,
            &[Hear("MAIL FROM:<lapsed@example.org> SMTPUTF8 BODY=8BITMIME\r\n"), Say("250 ok\r\n")],
            &[Hear("RCPT TO:<jürgen@example.org>\r\n"), Say("250 ok\r\n")],
            &DATA,
            &ACCEPT,
        ]),
    ])
    .await;
    let mut smtp = server.smtp();
    let mut other = mail();
    other.to = "jürgen@example.org".parse().expect("an address");
    other.bytes = "To: jürgen@example.org\r\n\r\nx\r\n".into();
    assert!(matches!(smtp.send(&other, || async { true }).await, Happened::Unbuildable { .. }));
    assert!(smtp.session.is_some(), "nothing was said, so the session goes on");
    smtp.session = None;
    assert!(matches!(smtp.send(&other, || async { true }).await, Happened::Accepted { .. }));
    assert_eq!(server.received().len(), 1);
    server.finish().await;
}

/// The daemon delivers in spawned tasks.
#[tokio::test]
async fn a_session_can_be_spawned() {
    let server = Server::start(vec![script(&[&GREETING, &MAIL, &RCPT, &DATA, &ACCEPT])]).await;
    let mut smtp = server.smtp();
    let lease = Arc::new(tokio::sync::Mutex::new(0));
    let renewed = Arc::clone(&lease);
    let task = tokio::spawn(async move {
        let ours = || async {
            *lease.lock().await += 1;
            true
        };
        smtp.send(&mail(), ours).await
    });
    assert!(matches!(task.await.expect("no panic"), Happened::Accepted { .. }));
    assert_eq!(*renewed.lock().await, 2);
    server.finish().await;
}
