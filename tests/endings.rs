//! How a process ends that is told to stop, or that finds the clock wrong.

use std::time::Duration;

use crate::support::cli::{Place, eventually, fact};
use crate::support::postgres;
use crate::support::proxy::{Manner, Proxy};
use crate::support::smtp_script::{Action, Phase, Script};
use sqlx::SqlitePool;

/// How long an end may take that waits for nothing but the ten seconds of what is in flight.
const SOON: Duration = Duration::from_secs(60);

fn to_server(place: &Place, port: u16) {
    place.configure(&format!(
        "[mail]\ntransport = \"smtp\"\nfrom = \"Tokens <tokens@example.org>\"\n\
         [mail.smtp]\nhost = \"127.0.0.1\"\nport = {port}\ntls = \"none\"\n"
    ));
}

fn expired_token(place: &Place) -> String {
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "short lived", "1s");
    eventually("its deadline", SOON, || (place.verify(&secret).status == Some(1)).then_some(()));
    id
}

/// Told to stop while a mail is on its way, `run --once` waits for the mail server's word and writes it down.
#[tokio::test(flavor = "multi_thread")]
async fn once_finishes_what_is_in_flight() {
    let server = Script::new().on(Phase::Dot, Action::Stall).start().await;
    let place = Place::new();
    to_server(&place, server.port());
    let id = expired_token(&place);
    let mut once = place.spawn(["run", "--once"]);
    server.reached(Phase::Dot, 1).await;
    once.signal("TERM");
    once.wait_for_log("stopping");
    server.release();
    assert_eq!(once.ended(SOON).code(), Some(1), "{}", once.log());
    assert!(once.log().contains("what is left is done by the next run"), "{}", once.log());
    assert_eq!(server.accepted().len(), 1);
    assert!(place.run(["token", "show", &id]).ok().contains("  sent  "), "nobody is told twice");
    assert_eq!(fact(&place.line("run --once").ok(), "deliver"), "nothing was due");
}

/// A clock that went back since the last run is not believed by the next one, and by the one after it.
#[tokio::test]
async fn once_does_not_believe_a_clock_that_went_back() {
    let place = Place::new();
    place.configure(
        "[mail]\ntransport = \"maildir\"\nfrom = \"Tokens <tokens@example.org>\"\n[mail.maildir]\npath = \"mails\"\n",
    );
    let id = expired_token(&place);
    place.line("run --once").ok();
    let store = SqlitePool::connect(&format!("sqlite:{}", place.path("lapsed.db").display())).await.expect("the store");
    let ahead = sqlx::query("UPDATE jobs SET finished_at = finished_at + 36000 WHERE name = 'expire'");
    assert_eq!(ahead.execute(&store).await.expect("a write").rows_affected(), 1);
    store.close().await;
    let refused = place.line("run --once");
    assert_eq!(refused.status, Some(1), "{refused}");
    assert_eq!(fact(&refused.stdout, "expire"), "waits: the clock cannot be believed");
    let said = &refused.stderr;
    assert!(said.contains("the clock went back by") && said.contains("the next run goes on"), "{said}");
    assert_eq!(fact(&place.line("run --once").ok(), "expire"), "nothing was due");
    assert!(place.run(["token", "show", &id]).ok().contains("  sent  "));
}

/// A database that has fallen silent keeps no daemon from ending.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_ends_while_the_database_is_silent() {
    let database = postgres::fresh().await;
    let proxy = Proxy::start(&database.url).await;
    proxy.arm(Manner::Cut, None);
    let place = Place::with_store(&proxy.url);
    let server = Script::new().start().await;
    to_server(&place, server.port());
    let mut daemon = place.daemon();
    daemon.wait_for_log("started");
    proxy.fall_silent();
    daemon.signal("TERM");
    let ended = daemon.ended(SOON * 3);
    let log = daemon.log();
    assert!(!log.contains("panicked"), "{log}");
    assert_eq!(ended.code(), Some(0), "{log}");
}
