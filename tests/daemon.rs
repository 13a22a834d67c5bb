//! The daemon as a process: started, signalled, killed and started again, with real mail and a real clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::support::cli::{PATIENCE, Place, eventually, fact, finish, instant, scrub};
use crate::support::postgres;
use crate::support::smtp::Sink;
use crate::support::smtp_script::{Action, Phase, Script};
use crate::support::supervisor::Supervisor;
use mail_parser::{Message, MessageParser, MimeHeaders};
use sqlx::{AssertSqlSafe, Connection, SqliteConnection};

/// How long the daemon has from a signal to its end when nothing is in flight.
const STOPS_WITHIN: Duration = Duration::from_secs(5);

/// Every job at every second.
const SCHEDULE: &str = r#"
    [schedule]
    expire = "* * * * * *"
    remind = "* * * * * *"
    deliver = "* * * * * *"
    [log]
    level = "trace"
"#;

/// Leads that pass within half a minute: a new message waits ten seconds for more to say, so they are no shorter.
const MAILDIR: &str = r#"
    [reminders]
    lead_times = ["24s", "12s"]
    [mail]
    transport = "maildir"
    from = "Tokens <tokens@example.org>"
    reply_to = "help@example.org"
    fallback_to = "ops@example.org"
    manage_url = "https://example.org/t/{token_id}"
    [mail.maildir]
    path = "mail"
"#;

/// A place whose mails go to a Maildir.
fn with_maildir(mut place: Place) -> Place {
    place.configure(&format!("{SCHEDULE}{MAILDIR}"));
    place.set("RUST_BACKTRACE", "0");
    place
}

/// A place whose mails go to this port.
fn with_smtp(place: Place, port: u16) -> Place {
    place.configure(&format!(
        r#"{SCHEDULE}
        [mail]
        transport = "smtp"
        from = "Tokens <tokens@example.org>"
        [mail.smtp]
        host = "127.0.0.1"
        port = {port}
        tls = "none"
        "#
    ));
    place
}

/// A port of this host on which nobody listens.
fn closed_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|held| held.local_addr()).expect("a port").port()
}

fn parse(mail: &[u8]) -> Message<'_> {
    MessageParser::default().parse(mail).expect("a mail")
}

/// A token that has just expired.
fn expired_token(place: &Place, owner: &str, description: &str) -> String {
    let (id, secret) = place.token(owner, description, "1s");
    eventually("the deadline", PATIENCE, || (place.verify(&secret).status == Some(1)).then_some(()));
    id
}

/// The states of a token's reminders.
fn states(place: &Place, token: &str) -> Vec<String> {
    let shown = place.run(["token", "show", token]).ok();
    shown.lines().skip_while(|line| !line.starts_with("REMINDER")).skip(1).map(scrub).collect()
}

/// On both back ends at once, because it takes most of a minute.
#[tokio::test]
async fn reminders_and_the_expired_notice_arrive_on_both_back_ends() {
    let database = postgres::fresh().await;
    let (account, _) = database.url.rsplit_once('@').expect("an account");
    let (_, password) = account.rsplit_once(':').expect("a password");
    std::thread::scope(|scope| {
        scope.spawn(|| reminders_and_the_expired_notice_arrive(&with_maildir(Place::new()), None));
        let place = with_maildir(Place::with_store(&database.url));
        reminders_and_the_expired_notice_arrive(&place, Some(password));
    });
}

/// Two leads and the end of a token that two people share, and a token without deadline beside it. What the log says of
/// all that, at its most talkative, gives no address and no secret away.
fn reminders_and_the_expired_notice_arrive(place: &Place, password: Option<&str>) {
    let primary =
        place.run(["owner", "add", "alice", "--email", "alice@example.org", "--email", "team@example.org"]).ok();
    let daemon = place.daemon();
    // Made while the daemon runs: nothing tells it but its own looking.
    let (id, secret) = place.token("alice", "deploy key (CI)", "30s");
    let deadline = instant(&place.run(["token", "show", &id]).ok(), "expires");
    let mails =
        eventually("six mails", Duration::from_secs(90), || Some(place.mails("mail")).filter(|mails| mails.len() >= 6));
    assert_eq!(place.verify(&secret).refused(), "expired");

    let mut subjects: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut ids = Vec::new();
    for mail in &mails {
        let mail = parse(mail);
        let to = mail.to().and_then(|to| to.first()).and_then(|to| to.address()).expect("To").to_owned();
        subjects.entry(to).or_default().push(mail.subject().expect("a subject").to_owned());
        assert_eq!(
            mail.from().and_then(|from| from.first()).and_then(|from| from.address()),
            Some("tokens@example.org")
        );
        assert_eq!(mail.reply_to().and_then(|to| to.first()).and_then(|to| to.address()), Some("help@example.org"));
        assert_eq!(mail.header("Auto-Submitted").and_then(|value| value.as_text()), Some("auto-generated"));
        ids.push(mail.message_id().expect("a Message-ID").to_owned());
        let html = mail.body_html(0).expect("HTML").replace("&#x2f;", "/");
        for body in [mail.body_text(0).expect("text").into_owned(), html] {
            assert!(
                body.contains("deploy key (CI)") && body.contains(&format!("https://example.org/t/{id}")),
                "{body}"
            );
            assert!(body.contains(&deadline.format("%Y-%m-%d %H:%M:%S UTC").to_string()), "{body}");
        }
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 6, "each message has an id of its own");
    assert_eq!(subjects.keys().collect::<Vec<_>>(), ["alice@example.org", "team@example.org"]);
    for told in subjects.values() {
        assert_eq!(told.len(), 3, "{subjects:?}");
        assert!(told[..2].iter().all(|subject| subject.starts_with("\"deploy key (CI)\" expires ")), "{told:?}");
        assert!(told[2].starts_with("\"deploy key (CI)\" expired "), "{told:?}");
    }
    let said = states(place, &id);
    assert_eq!(said.len(), 6);
    assert!(said.iter().all(|line| line.contains("  sent  ")), "{said:?}");
    assert_eq!(fact(&place.run(["token", "show", &id]).ok(), "status"), "expired");

    let log = daemon.stop();
    assert!(log.contains("DEBUG pass: lapsed::"), "the log is talkative:\n{log}");
    assert!(log.contains("sent a message") && log.contains("stopped"), "{log}");
    assert!(!log.contains('\u{1b}'), "no escape codes in a file");
    let secrets = [&fact(&primary, "secret")[4..], &secret[4..]];
    for private in secrets.into_iter().chain(password).chain(["@example.org", "lps_"]) {
        assert!(!log.contains(private), "the log tells {private:?}:\n{log}");
    }
    assert!(!log.contains("ERROR"), "{log}");
}

#[test]
fn sigterm_and_sigint_stop_it_in_good_order() {
    let place = with_maildir(Place::new());
    for signal in ["TERM", "INT"] {
        let mut daemon = place.daemon();
        daemon.signal(signal);
        let status = daemon.ended(STOPS_WITHIN);
        assert_eq!(status.code(), Some(0), "{signal}: {status}\n{}", daemon.log());
        assert!(daemon.log().contains("stopped"), "{}", daemon.log());
    }
}

/// A store with a message that was planned and could not be sent, and the id of its token.
fn with_a_message_waiting(place: Place) -> (Place, String) {
    let place = with_smtp(place, closed_port());
    place.owner("alice", "alice@example.org");
    let id = expired_token(&place, "alice", "CI");
    let once = place.line("run --once");
    assert_eq!(once.status, Some(1), "{once}");
    assert!(once.stderr.contains("no mail could be handed over: messages wait in the store"), "{once}");
    assert_eq!(fact(&once.stdout, "expire"), "tokens expired: 1, reminders: 1");
    (place, id)
}

#[tokio::test]
async fn a_message_in_flight_is_finished_before_the_end() {
    let (place, id) = with_a_message_waiting(Place::new());
    let server = Script::new().once(Phase::Dot, Action::Stall).start().await;
    let place = with_smtp(place, server.port());
    let mut daemon = place.daemon();
    server.reached(Phase::Dot, 1).await;
    daemon.signal("TERM");
    daemon.wait_for_log("stopping");
    server.release();
    let status = tokio::task::spawn_blocking(move || (daemon.ended(STOPS_WITHIN), daemon.log())).await;
    let (status, log) = status.expect("no panic");
    assert_eq!(status.code(), Some(0), "{log}");
    assert_eq!(server.accepted().len(), 1);
    assert!(states(&place, &id)[0].contains("  sent  "));
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let (place, id) = with_a_message_waiting(Place::new());
    let server = Script::new().once(Phase::Dot, Action::Stall).start().await;
    let place = with_smtp(place, server.port());
    let mut daemon = place.daemon();
    server.reached(Phase::Dot, 1).await;
    daemon.signal("INT");
    daemon.wait_for_log("stopping");
    daemon.signal("INT");
    // Alone, the first signal waits ten seconds for the message.
    let status = daemon.ended(STOPS_WITHIN);
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    assert!(states(&place, &id)[0].contains("  pending  "));
}

#[tokio::test]
async fn a_stop_does_not_wait_for_ever_for_a_mail_server() {
    let (place, _) = with_a_message_waiting(Place::new());
    let server = Script::new().once(Phase::Dot, Action::Stall).start().await;
    let place = with_smtp(place, server.port());
    let mut daemon = place.daemon();
    server.reached(Phase::Dot, 1).await;
    daemon.signal("TERM");
    let status = daemon.ended(Duration::from_secs(10) + STOPS_WITHIN);
    assert_eq!(status.code(), Some(0), "{}", daemon.log());
    assert!(daemon.log().contains("a message in flight took too long"), "{}", daemon.log());
}

/// The leases of a dead process end after minutes. Rather than wait, this lets them be over; returns how many messages
/// there were on lease.
async fn leases_are_over(place: &Place) -> u64 {
    let url = format!("sqlite:{}", place.path("lapsed.db").display());
    let mut store = SqliteConnection::connect(&url).await.expect("the store");
    sqlx::query("UPDATE jobs SET lease_until = 0").execute(&mut store).await.expect("an update");
    let messages = sqlx::query("UPDATE messages SET not_before = 0 WHERE state = 'sending'");
    messages.execute(&mut store).await.expect("an update").rows_affected()
}

#[tokio::test]
async fn what_a_killed_daemon_was_sending_is_sent_by_the_next() {
    let (place, id) = with_a_message_waiting(Place::new());
    let server = Script::new().once(Phase::Dot, Action::Stall).start().await;
    let place = with_smtp(place, server.port());
    let daemon = place.daemon();
    server.reached(Phase::Dot, 1).await;
    daemon.kill();
    assert_eq!(leases_are_over(&place).await, 1);

    let daemon = place.daemon();
    server.reached(Phase::Dot, 2).await;
    eventually("the record", PATIENCE, || states(&place, &id)[0].contains("  sent  ").then_some(()));
    daemon.stop();
    assert_eq!(server.accepted().len(), 1);
    let mail = server.accepted().remove(0);
    assert_eq!(mail.rcpt_to, ["alice@example.org"]);
    assert_eq!(parse(&mail.data).subject(), Some("\"CI\" expired today"));
}

#[tokio::test]
async fn a_daemon_that_is_killed_again_and_again_loses_nothing() {
    let place = with_maildir(Place::new());
    let owners: Vec<String> = (0..6).map(|n| format!("owner-{n}")).collect();
    for owner in &owners {
        place.owner(owner, &format!("{owner}@example.org"));
    }
    for (n, owner) in owners.iter().enumerate() {
        place.token(owner, owner, "2s");
        // Killed while it starts, while it plans, and while it waits to send.
        let daemon = if n % 2 == 0 { place.spawn(["run"]) } else { place.daemon() };
        daemon.kill();
    }
    leases_are_over(&place).await;
    let daemon = place.daemon();
    let mails = eventually("a mail to each", Duration::from_secs(60), || {
        Some(place.mails("mail")).filter(|mails| mails.len() >= owners.len())
    });
    daemon.stop();
    let mut told: Vec<String> = mails.iter().map(|mail| parse(mail).subject().expect("a subject").to_owned()).collect();
    told.sort();
    let expected: Vec<String> = owners.iter().map(|owner| format!("\"{owner}\" expired today")).collect();
    assert_eq!(told, expected, "each once");
    assert!(place.line("run --once").ok().contains("nothing was due"));
    assert_eq!(place.mails("mail").len(), owners.len());
}

#[test]
fn a_supervisor_hears_when_it_is_ready_how_it_stands_and_when_it_stops() {
    let mut place = with_maildir(Place::new());
    let supervisor = Supervisor::of(&mut place);
    place.owner("alice", "alice@example.org");
    place.token("alice", "CI", "2999-01-31T09:15:00Z");
    let mut daemon = place.spawn(["run"]);
    supervisor.hear("READY=1");
    assert_eq!(supervisor.hear("STATUS="), "STATUS=no mail due, next deadline 2999-01-31 09:15 UTC");
    daemon.signal("TERM");
    supervisor.hear("STOPPING=1");
    assert_eq!(daemon.ended(STOPS_WITHIN).code(), Some(0));
}

/// A store that somebody else has locked is where a job hangs; a mail server that does not answer is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_hangs_silences_the_watchdog_and_a_mail_server_that_hangs_does_not() {
    let server = Script::new().on(Phase::Rcpt, Action::Stall).start().await;
    let mut place = with_smtp(Place::new(), server.port());
    place.owner("alice", "alice@example.org");
    expired_token(&place, "alice", "CI");
    let supervisor = Supervisor::of(&mut place);
    place.set("WATCHDOG_USEC", "2000000");
    // Or each tick would be a new step.
    place.set("LAPSED__SCHEDULE__DELIVER", "0 0 0 1 1 *");
    place.set("LAPSED__DIGEST__HOLD", "1s");
    let mut daemon = place.spawn(["run"]);
    // The socket holds few datagrams, so somebody must listen.
    eventually("a mail under way", Duration::from_secs(40), || {
        supervisor.hear("WATCHDOG=1");
        (server.times(Phase::Rcpt) > 0).then_some(())
    });
    for _ in 0..8 {
        supervisor.hear("WATCHDOG=1");
    }
    assert!(!daemon.log().contains("the job hangs"), "eight times is twice the interval: {}", daemon.log());

    let url = format!("sqlite:{}", place.path("lapsed.db").display());
    let mut other = SqliteConnection::connect(&url).await.expect("the store");
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.expect("the lock");
    daemon.wait_for_log("the job hangs: the watchdog is not fed any more");
    supervisor.forget();
    sqlx::raw_sql("COMMIT").execute(&mut other).await.expect("the end");
    supervisor.hear("WATCHDOG=1");
    daemon.kill();
}

#[tokio::test]
async fn two_daemons_start_at_once_on_an_empty_store_of_both_kinds() {
    let database = postgres::fresh().await;
    std::thread::scope(|scope| {
        scope.spawn(|| two_daemons_start_at_once(&with_maildir(Place::new())));
        two_daemons_start_at_once(&with_maildir(Place::with_store(&database.url)));
    });
}

/// They work beside each other: what is due is said once.
fn two_daemons_start_at_once(place: &Place) {
    let (mut one, mut two) = (place.spawn(["run"]), place.spawn(["run"]));
    one.wait_for_log("started");
    two.wait_for_log("started");
    place.owner("alice", "alice@example.org");
    let id = expired_token(place, "alice", "CI");
    eventually("the notice", Duration::from_secs(40), || {
        states(place, &id).first().filter(|line| line.contains("  sent  ")).map(|_| ())
    });
    let logs = [one.stop(), two.stop()];
    let sent: usize = logs.iter().map(|log| log.matches("sent a message").count()).sum();
    assert_eq!((sent, place.mails("mail").len()), (1, 1), "{logs:?}");
    for log in &logs {
        assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
    }
}

#[test]
fn running_once_twice_sends_nothing_twice() {
    let sink = Sink::start();
    let place = with_smtp(Place::new(), sink.port());
    place.owner("alice", "alice@example.org");
    expired_token(&place, "alice", "CI");
    let once = place.line("run --once").ok();
    assert_eq!((fact(&once, "expire"), fact(&once, "deliver")), {
        ("tokens expired: 1, reminders: 1".into(), "messages sent: 1".into())
    });
    let again = place.line("run --once").ok();
    for job in ["expire", "remind", "deliver", "purge"] {
        assert_eq!(fact(&again, job), "nothing was due", "{again}");
    }
    assert_eq!(sink.messages().len(), 1);
}

#[test]
fn mail_waits_for_its_server_and_is_sent_once_on_sqlite() {
    mail_waits_for_its_server_and_is_sent_once(Place::new());
}

#[tokio::test]
async fn mail_waits_for_its_server_and_is_sent_once_on_postgresql() {
    let database = postgres::fresh().await;
    mail_waits_for_its_server_and_is_sent_once(Place::with_store(&database.url));
}

fn mail_waits_for_its_server_and_is_sent_once(place: Place) {
    let (place, id) = with_a_message_waiting(place);
    assert!(states(&place, &id)[0].contains("  pending  "));
    // Nobody's attempts move while the server is away.
    let again = place.line("run --once");
    assert_eq!(
        (again.status, fact(&again.stdout, "deliver")),
        (Some(1), "waits: mail could not be handed over".into()),
        "{again}"
    );

    let sink = Sink::start();
    let place = with_smtp(place, sink.port());
    assert_eq!(fact(&place.line("run --once").ok(), "deliver"), "messages sent: 1");
    assert_eq!(fact(&place.line("run --once").ok(), "deliver"), "nothing was due");
    assert!(states(&place, &id)[0].contains("  sent  "));

    let stored = sink.wait_for(1);
    assert_eq!(stored.len(), 1);
    assert_eq!(stored[0].mail_from, "tokens@example.org");
    assert_eq!(stored[0].rcpt_to, ["alice@example.org"]);
    let mail = parse(&stored[0].data);
    assert_eq!(mail.subject(), Some("\"CI\" expired today"));
    assert_eq!(mail.from().and_then(|from| from.first()).and_then(|from| from.name()), Some("Tokens"));
    assert!(mail.message_id().is_some_and(|id| id.ends_with("@example.org")));
    assert!(mail.date().is_some());
    assert_eq!(mail.content_type().map(|kind| kind.subtype()), Some(Some("alternative")));
    assert_eq!((mail.text_body_count(), mail.html_body_count()), (1, 1));
    let text = mail.body_text(0).expect("text");
    let deadline = instant(&place.run(["token", "show", &id]).ok(), "expires");
    assert!(text.contains("CI") && text.contains(&deadline.format("%Y-%m-%d %H:%M:%S UTC").to_string()), "{text}");
}

#[tokio::test]
async fn a_rotation_cancels_what_waits() {
    let place = with_smtp(Place::new(), closed_port());
    place.owner("alice", "alice@example.org");
    let id = expired_token(&place, "alice", "CI");
    assert_eq!(place.line("run --once").status, Some(1));
    place.run(["token", "rotate", &id, "--expires", "30d"]).ok();
    let server = Script::new().start().await;
    let place = with_smtp(place, server.port());
    let once = tokio::task::spawn_blocking(move || (place.line("run --once").ok(), place)).await;
    let (once, place) = once.expect("no panic");
    assert_eq!(fact(&once, "deliver"), "messages had nothing left to say: 1");
    let said = &states(&place, &id)[0];
    assert!(said.contains("  cancelled  ") && said.ends_with("the token was replaced"), "{said}");
    assert!(server.accepted().is_empty());
}

#[tokio::test]
async fn a_dead_address_is_told_in_the_history_and_not_tried_again() {
    let server = Script::new().on_rcpt("gone@example.org", "550 5.1.1 no such user").start().await;
    let place = with_smtp(Place::new(), server.port());
    let (place, first, second) = tokio::task::spawn_blocking(move || {
        place.owner("alice", "gone@example.org");
        let first = expired_token(&place, "alice", "one");
        assert_eq!(fact(&place.line("run --once").ok(), "deliver"), "messages given up: 1");
        let second = expired_token(&place, "alice", "two");
        place.line("run --once").ok();
        (place, first, second)
    })
    .await
    .expect("no panic");
    let said = &states(&place, &first)[0];
    assert!(said.contains("  failed  ") && said.contains("the mail could not be delivered"), "{said}");
    let said = &states(&place, &second)[0];
    assert!(said.contains("  unreachable  ") && said.ends_with("the owner has no contact that takes mail"), "{said}");
    assert_eq!(server.commands().iter().filter(|line| line.starts_with("RCPT")).count(), 1);
}

/// Takes about a minute, beside the other tests.
#[test]
fn a_demo_without_a_mail_server_says_so() {
    let place = Place::new();
    let ran = finish(place.bare(["demo", "--smtp", "127.0.0.1:1"]), "");
    assert_eq!(ran.status, Some(1), "{ran}");
    let last = ran.stderr.lines().last().expect("a line");
    let why = "lapsed: not every mail could be sent: delivery pauses, because no mail can be handed over: ";
    assert!(last.starts_with(why), "{ran}");
    assert!(!ran.stdout.contains("mailed"), "{ran}");
}

/// Takes about a minute, beside the other tests.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_demo_tells_the_truth() {
    let place = Place::new();
    // No configuration, no home, no input: a fresh machine.
    let started = Instant::now();
    let ran = finish(place.bare(["demo"]), "");
    assert!(started.elapsed() < Duration::from_secs(80), "{:?}", started.elapsed());
    let told = ran.ok();
    assert!(!told.contains("lps_"), "{told}");

    // Lines of the story: seconds, what, about what.
    let story: Vec<(&str, &str)> = told
        .lines()
        .filter_map(|line| {
            let (seconds, rest) = line.trim_start().split_once("s  ")?;
            seconds.parse::<u32>().ok()?;
            rest.split_once(' ')
        })
        .collect();
    let first = |what: &str| {
        let found = story.iter().position(|(said, _)| *said == what);
        found.unwrap_or_else(|| panic!("nothing was {what} in:\n{told}"))
    };
    for what in ["seeded", "planned", "mailed", "rotated", "cancelled", "expired", "unreachable"] {
        first(what);
    }
    assert!(first("verified") < first("refused"), "{told}");
    assert!(first("planned") < first("mailed"), "{told}");
    assert!(first("rotated") < first("cancelled"), "{told}");
    assert!(story.iter().any(|(what, text)| *what == "planned" && text.contains("30s reminder to ")), "{told}");
    assert!(story.iter().any(|(what, text)| *what == "planned" && text.contains("10s reminder to ")), "{told}");
    assert!(story.iter().any(|(what, text)| *what == "planned" && text.contains("expired notice to ")), "{told}");
    assert!(story.iter().any(|(what, text)| *what == "mailed" && text.contains(": one mail about ")), "{told}");

    // The store says the same.
    let path = fact(&told, "store");
    let mut store = SqliteConnection::connect(&format!("sqlite:{path}")).await.expect("the store of the demo");
    for (name, table, column) in
        [("tokens", "tokens", "status"), ("reminders", "reminders", "state"), ("messages", "messages", "state")]
    {
        let query = format!("SELECT {column}, COUNT(*) FROM {table} GROUP BY {column} ORDER BY {column}");
        let rows: Vec<(String, i64)> =
            sqlx::query_as(AssertSqlSafe(query)).fetch_all(&mut store).await.expect("the counts");
        let stored: Vec<String> = rows.iter().map(|(state, count)| format!("{count} {state}")).collect();
        let value = fact(&told, name);
        let mut said: Vec<&str> = value.split(", ").collect();
        said.sort_by_key(|text| text.split_once(' ').map(|(_, state)| state));
        assert_eq!(said, stored, "{name}");
    }

    // And README: with its lead times of seconds, nothing is left to chance but how many mails it takes.
    let readme = include_str!("../README.md");
    for name in ["tokens", "reminders"] {
        let line = format!("    {name:<10} {}\n", fact(&told, name));
        assert!(readme.contains(&line), "README does not say {line:?}");
    }

    // So do the mails: one file for each message that was sent, and the one that is shown is among them.
    let maildir = std::path::PathBuf::from(fact(&told, "mails"));
    assert!(maildir.starts_with(place.path("")), "{}", maildir.display());
    let files = std::fs::read_dir(maildir.join("new")).expect("the Maildir").count();
    let sent: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM messages WHERE state = 'sent'")
        .fetch_one(&mut store)
        .await
        .expect("a count");
    assert_eq!(i64::try_from(files), Ok(sent));
    let shown = told.lines().find(|line| line.ends_with(".lapsed")).expect("the path of the mail");
    let mail = std::fs::read(shown).expect("the mail that is shown");
    let mail = parse(&mail);
    let subject = mail.subject().expect("a subject");
    assert!(told.contains(&format!("  Subject: {subject}\n")), "{subject}\n{told}");
    assert!(subject.contains(" tokens "), "{subject}");

    // What to type next works.
    let export = told.lines().find_map(|line| line.trim().strip_prefix("export LAPSED__STORE__URL="));
    let list = finish(
        {
            let mut command = place.bare(["token", "list"]);
            command.env("LAPSED__STORE__URL", export.expect("the URL of the store"));
            command
        },
        "",
    );
    assert!(list.ok().contains("alice"));
}

#[test]
fn a_mail_is_no_wider_than_people_read() {
    let place = with_maildir(Place::new());
    place.owner("alice", "alice@example.org");
    expired_token(&place, "alice", "CI");
    place.line("run --once").ok();
    let mails = place.mails("mail");
    let text = parse(&mails[0]).body_text(0).expect("text").into_owned();
    // RFC 5322, section 2.1.1.
    for line in text.lines() {
        assert!(line.chars().count() <= 78, "{} characters: {line}", line.chars().count());
    }
}

/// Where stderr is the journal, its lines have one instant, the journal's. A child of a service has the variable, too.
#[test]
fn lines_for_the_journal_have_no_instant_of_their_own() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new();
    place.configure("[mail]\ntransport = \"maildir\"\nfrom = \"a@example.org\"\n[mail.maildir]\npath = \"mail\"\n");
    for (shift, begins_with_level) in [(0, true), (1, false)] {
        let log = std::fs::File::create(place.path("log")).expect("a file");
        let metadata = log.metadata().expect("the file");
        let mut command = place.bare(["--config", "lapsed.toml", "run", "--once"]);
        command.env("JOURNAL_STREAM", format!("{}:{}", metadata.dev(), metadata.ino() + shift));
        let status = command.stdout(std::process::Stdio::null()).stderr(log).status().expect("the program");
        assert!(status.success());
        let log = std::fs::read_to_string(place.path("log")).expect("the log");
        let line = log.lines().find(|line| line.contains("the store is open")).expect(&log);
        assert_eq!(line.trim_start().starts_with("INFO "), begins_with_level, "{line}");
        assert_eq!(line.starts_with("20"), !begins_with_level, "{line}");
    }
}
