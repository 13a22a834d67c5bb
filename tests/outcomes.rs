//! What delivery does about each thing that a mail server can do, as a table: every row at each phase where it can
//! happen, with PIPELINING offered and not, seen from the store and from what the server received.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, OnPostgres, OnSqlite};
use crate::support::smtp_script::{Action, Phase, Script, Server, reply};
use crate::support::world::{World, at, days};
use chrono::TimeDelta;
use lapsed::change;
use lapsed::clock::Timestamp;
use lapsed::config::{self, Timeouts};
use lapsed::jobs::deliver::{Delivered, LEASE};
use lapsed::mail::smtp::Smtp;
use lapsed::mail::transport::Transport;
use lapsed::store::messages::{MessageFilter, MessageRecord};
use lapsed::store::{Accounts, Messages, Outbox};
use lapsed::token::Address;
use uuid::Uuid;

/// Short where a server says nothing, so that a test does not wait for minutes.
fn options(server: &Server, connections: usize) -> config::Smtp {
    let short = Duration::from_secs(2);
    let timeouts = Timeouts {
        hello: short,
        mail: short,
        rcpt: short,
        data: short,
        content: short,
        dot: short,
        ..Timeouts::default()
    };
    config::Smtp { connections, timeouts, ..config::Smtp::plain("127.0.0.1", server.port()) }
}

fn sessions(options: config::Smtp) -> Vec<Transport> {
    Smtp::sessions(options).into_iter().map(|session| Transport::Smtp(Box::new(session))).collect()
}

/// One owner for each address, with one reminder due, and a fallback.
async fn due<B: Backend>(addresses: &[&str]) -> World<B> {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    for address in addresses {
        let owner = world.owner(address.split('@').next().expect("a name"), &[address]).await;
        world.token(owner, 90).await;
    }
    world.on_day(60);
    world.remind().await;
    world
}

/// What became of the message to an address: its state, its attempts, how many of them of unknown outcome.
async fn became<B: Backend>(world: &World<B>, address: &str) -> String {
    let states = ["open", "sending", "retry", "sent", "failed", "cancelled"];
    let number = |at: usize| format!("WHEN '{}' THEN {at}", states[at]);
    let whens: Vec<String> = (0..states.len()).map(number).collect();
    let found = format!(
        "SELECT CAST(CASE m.state {} END * 100 + m.attempts * 10 + m.unknown_outcomes AS BIGINT) \
         FROM messages m JOIN contacts c ON c.bucket = m.bucket AND c.id = m.contact_id WHERE c.address = '{address}'",
        whens.join(" ")
    );
    let found = world.backend.count(&found).await;
    let state = states[usize::try_from(found / 100).expect("a state")];
    format!("{state}, attempts {}, unknown {}", found / 10 % 10, found % 10)
}

async fn suppressed<B: Backend>(world: &World<B>, address: &str) -> bool {
    let found = format!("SELECT COUNT(*) FROM contacts WHERE address = '{address}' AND suppressed_at IS NOT NULL");
    world.backend.count(&found).await == 1
}

/// The addresses of what the server took, in its order.
fn taken(server: &Server) -> Vec<String> {
    server.accepted().into_iter().flat_map(|message| message.rcpt_to).collect()
}

/// A row of the table: what the server does the first time, and what is to come of it.
struct Row {
    phase: Phase,
    action: Action,
    /// Of the message, after the first pass.
    becomes: &'static str,
    suppressed: bool,
    /// Whether the server took it nevertheless.
    taken: bool,
    /// Whether the fallback is told.
    escalated: bool,
    paused: bool,
}

const RETRY: &str = "retry, attempts 1, unknown 0";
const UNKNOWN: &str = "retry, attempts 1, unknown 1";
const FAILED: &str = "failed, attempts 1, unknown 0";
const UNTOUCHED: &str = "open, attempts 0, unknown 0";

fn row(phase: Phase, action: Action, becomes: &'static str) -> Row {
    let (failed, taken) = (becomes == FAILED, matches!(action, Action::TakeAndClose | Action::TakeAndSay(_)));
    Row { phase, action, becomes, suppressed: false, taken, escalated: failed, paused: becomes == UNTOUCHED }
}

fn table() -> Vec<Row> {
    let mut rows = Vec::new();
    // Refusals for now, and connections that are lost or fall silent, before the end of the message.
    for phase in [Phase::Mail, Phase::Rcpt, Phase::Data] {
        rows.push(row(phase, reply("451 4.3.0 try later"), RETRY));
        rows.push(row(phase, Action::ReplyAndClose("421 4.3.2 shutting down".into()), RETRY));
        rows.push(row(phase, Action::Close, RETRY));
        rows.push(row(phase, Action::Stall, RETRY));
        rows.push(row(phase, Action::ReplyAndClose("what?".into()), RETRY));
        rows.push(row(phase, Action::ReplyAndClose("250".into()), RETRY));
        rows.push(row(phase, Action::ReplyAndClose(format!("451-{}\r\n451 end", "x".repeat(1 << 20))), RETRY));
        rows.push(row(phase, Action::ReplyAndClose("451-one\r\n450 two".into()), RETRY));
        rows.push(row(phase, Action::Slowly("451-4.7.1 grey\r\n451 4.7.1 listed".into()), RETRY));
    }
    rows.push(row(Phase::Dot, reply("452 4.3.1 disk full"), RETRY));
    rows.push(row(Phase::Dot, Action::ReplyAndClose("421 4.3.2 shutting down".into()), RETRY));
    // Nobody knows.
    rows.push(row(Phase::Dot, Action::Close, UNKNOWN));
    rows.push(row(Phase::Dot, Action::TakeAndClose, UNKNOWN));
    rows.push(row(Phase::Dot, Action::Stall, UNKNOWN));
    rows.push(row(Phase::Dot, Action::TakeAndSay("what?".into()), UNKNOWN));
    rows.push(row(Phase::Dot, Action::TakeAndSay("250-never ends".into()), UNKNOWN));
    rows.push(row(Phase::Dot, Action::TakeAndSay("x".repeat(1 << 20)), UNKNOWN));
    // Refusals for good.
    for phase in [Phase::Mail, Phase::Rcpt, Phase::Data, Phase::Dot] {
        rows.push(row(phase, reply("554 5.7.1 against our policy"), FAILED));
        rows.push(row(phase, Action::ReplyAndClose("552 5.3.4 too big".into()), FAILED));
    }
    for text in ["550 5.1.1 no such user", "550-5.1.1 no such user\r\n550 5.1.1 gone", "553 mailbox name not allowed"] {
        rows.push(Row { suppressed: true, ..row(Phase::Rcpt, reply(text), FAILED) });
    }
    rows.push(Row { suppressed: true, ..row(Phase::Rcpt, Action::Slowly("550 5.1.1 no such user".into()), FAILED) });
    // Nobody is let in.
    for phase in [Phase::Connect, Phase::Ehlo] {
        for action in [reply("554 5.7.1 go away"), reply("421 4.7.0 too many"), Action::Close, Action::Stall] {
            rows.push(row(phase, action, UNTOUCHED));
        }
        rows.push(row(phase, Action::ReplyAndClose("what?".into()), UNTOUCHED));
        rows.push(row(phase, Action::ReplyAndClose("x".repeat(1 << 20)), UNTOUCHED));
    }
    rows
}

async fn every_row<B: Backend>(pipelining: bool) {
    // One after the other in one store: each leaves nothing behind.
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    for (n, row) in table().into_iter().enumerate() {
        one_row(&world, &format!("ann-{n}@example.org"), row, pipelining).await;
        world.clock.advance(TimeDelta::days(2));
    }
}

async fn one_row<B: Backend>(world: &World<B>, address: &str, row: Row, pipelining: bool) {
    let Row { phase, action, becomes, suppressed: is_suppressed, taken: is_taken, escalated, paused } = row;
    let told: String = format!("{phase:?} {action:?}, pipelining {pipelining}").chars().take(120).collect();
    let owner = world.owner(address.split('@').next().expect("a name"), &[address]).await;
    let token = world.imported(owner, world.now() - days(100), world.now() + days(20)).await;
    world.remind().await;
    let script = Script::new().extension("8BITMIME").extension("SIZE 1000000");
    let script = if pipelining { script.pipelining() } else { script };
    let server = script.once(phase, action).start().await;
    let mut deliverer = world.deliverer(sessions(options(&server, 1)));

    // Without what escalations bring with them: the fallback's message comes in the same pass.
    let did = world.deliver(&mut deliverer).await;
    assert_eq!(became(world, address).await, becomes, "{told}");
    assert_eq!(suppressed(world, address).await, is_suppressed, "{told}");
    assert_eq!(deliverer.is_paused(), paused, "{told}");
    let mut expected = Vec::new();
    expected.extend(is_taken.then_some(address));
    expected.extend(escalated.then_some("ops@example.org"));
    assert_eq!(taken(&server), expected, "{told}");
    assert_eq!((did.failed, did.unknown), (u64::from(becomes == FAILED), u64::from(becomes == UNKNOWN)), "{told}");

    // Later, when the server is well again: what was to be tried again arrives, under the same Message-ID.
    world.clock.advance(TimeDelta::minutes(6));
    let again = world.deliver(&mut deliverer).await;
    assert_eq!(again.sent, u64::from(becomes != FAILED), "{told}: {again:?}");
    assert!(!deliverer.is_paused(), "{told}");
    expected.extend((becomes != FAILED).then_some(address));
    assert_eq!(taken(&server), expected, "{told}");
    if becomes == UNKNOWN && is_taken {
        let ids: Vec<_> = server.accepted().iter().map(|message| line(&message.data, "Message-ID: ")).collect();
        assert_eq!(ids[0], ids[1], "{told}");
    }
    let left = "SELECT COUNT(*) FROM messages WHERE state NOT IN ('sent', 'failed')";
    assert_eq!(world.backend.count(left).await, 0, "{told}");
    // Its next reminder is not to come in the way of what follows.
    let now = world.now();
    world.store.change_token(token, |token| change::revoke(token, now)).await.expect("allowed");
    // And neither is word that it was revoked.
    world.backend.execute("UPDATE tokens SET uncorrected = (1 = 0)").await;
}

/// A line of the header that begins like this.
fn line(data: &[u8], start: &str) -> String {
    let text = String::from_utf8_lossy(data);
    text.lines().find(|line| line.starts_with(start)).expect(start).to_owned()
}

#[tokio::test]
async fn every_row_one_command_after_the_other() {
    every_row::<OnSqlite>(false).await;
}

#[tokio::test]
async fn every_row_with_pipelining() {
    every_row::<OnPostgres>(true).await;
}

/// What goes out, command by command.
async fn commands_of(script: Script) -> Vec<String> {
    let world = due::<OnSqlite>(&["ann@example.org"]).await;
    let server = script.start().await;
    let mut deliverer = world.deliverer(sessions(options(&server, 1)));
    world.deliver(&mut deliverer).await;
    deliverer.close().await;
    let commands = server.commands();
    commands.iter().map(|command| command.split([' ', ':']).next().expect("a verb").to_owned()).collect()
}

#[tokio::test]
async fn pipelined_commands_come_in_one_write_and_others_do_not() {
    // The scripted server refuses what comes ahead of a reply without a right to; here it counts what did come ahead.
    for (pipelining, ahead) in [(true, 2), (false, 0)] {
        let script = Script::new().extension("8BITMIME");
        let script = if pipelining { script.pipelining() } else { script };
        let world = due::<OnSqlite>(&["ann@example.org"]).await;
        let server = script.start().await;
        let mut deliverer = world.deliverer(sessions(options(&server, 1)));
        assert_eq!(world.deliver(&mut deliverer).await.sent, 1);
        assert_eq!(server.ahead(), ahead, "pipelining {pipelining}");
    }
}

#[tokio::test]
async fn a_session_goes_on_after_a_refusal_and_ends_politely() {
    for pipelining in [true, false] {
        let script = || if pipelining { Script::new().pipelining() } else { Script::new() };
        let dead = script().on_rcpt("ann@example.org", "550 5.1.1 no such user");
        let mut expected = vec!["EHLO", "EHLO", "MAIL", "RCPT", "RSET", "MAIL", "RCPT", "DATA", "QUIT"];
        if pipelining {
            expected.insert(4, "DATA");
        }
        assert_eq!(commands_of(dead).await, expected, "one session for both mails: pipelining {pipelining}");
    }
    // One that asks for the content of a message that has no recipient gets a lone dot, and nothing is delivered.
    let odd = Script::new().pipelining().asks_for_content_anyway().on_rcpt("ann@example.org", "550 5.1.1 no such user");
    let expected = ["EHLO", "EHLO", "MAIL", "RCPT", "DATA", "RSET", "MAIL", "RCPT", "DATA", "QUIT"];
    assert_eq!(commands_of(odd).await, expected);
}

#[tokio::test]
async fn a_message_tells_its_size_and_a_server_that_takes_less_is_not_asked() {
    let world = due::<OnSqlite>(&["ann@example.org"]).await;
    let server = Script::new().extension("SIZE 100000").start().await;
    let mut deliverer = world.deliverer(sessions(options(&server, 1)));
    assert_eq!(world.deliver(&mut deliverer).await.sent, 1);
    let size = server.accepted()[0].data.len();
    let mail = server.commands().into_iter().find(|command| command.starts_with("MAIL")).expect("MAIL");
    assert_eq!(mail, format!("MAIL FROM:<tokens@example.org> SIZE={size}"));

    let world = due::<OnSqlite>(&["ann@example.org"]).await;
    let small = Script::new().extension("SIZE 100").start().await;
    let mut deliverer = world.deliverer(sessions(options(&small, 1)));
    assert_eq!(world.deliver(&mut deliverer).await.failed, 2, "and so does what the fallback is told");
    assert!(small.commands().iter().all(|command| command.starts_with("EHLO")), "{:?}", small.commands());
    assert!(!suppressed(&world, "ann@example.org").await);
}

#[tokio::test]
async fn a_session_is_renewed_after_so_many_messages() {
    let addresses: Vec<String> = (0..7).map(|n| format!("owner-{n}@example.org")).collect();
    let world = due::<OnSqlite>(&addresses.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let server = Script::new().start().await;
    let options = config::Smtp { max_messages_per_connection: 3, ..options(&server, 1) };
    let mut deliverer = world.deliverer(sessions(options));
    assert_eq!(world.deliver(&mut deliverer).await.sent, 7);
    deliverer.close().await;
    assert_eq!(server.times(Phase::Connect), 3);
    assert_eq!(server.commands().iter().filter(|command| *command == "QUIT").count(), 3);
}

async fn a_session_that_stalls_holds_up_no_other<B: Backend>() {
    let addresses: Vec<String> = (0..12).map(|n| format!("owner-{n}@example.org")).collect();
    let world = due::<B>(&addresses.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let stalls = Script::new().decide(Phase::Rcpt, |line| line.contains("owner-5@").then_some(Action::Stall));
    let server = stalls.start().await;
    let long = Duration::from_secs(600);
    let timeouts = Timeouts { rcpt: long, ..Timeouts::default() };
    let mut deliverer = world.deliverer(sessions(config::Smtp { timeouts, ..options(&server, 4) }));
    let mut did = Delivered::default();
    while did.sent < 11 {
        did += deliverer.step().await.expect("a step").did;
        if did.sent < 11 {
            tokio::time::timeout(Duration::from_secs(20), deliverer.wait()).await.expect("the others go on");
        }
    }
    assert_eq!(became(&world, "owner-5@example.org").await, "sending, attempts 0, unknown 0");
    assert!((2..=4).contains(&server.times(Phase::Connect)), "{}", server.times(Phase::Connect));
    server.release();
    assert_eq!(deliverer.finish().await.expect("a record").sent, 1, "what is under way is finished");
    let mut expected = addresses;
    expected.sort();
    let mut arrived = taken(&server);
    arrived.sort();
    assert_eq!(arrived, expected, "each once");
    world.check().await;
}

#[tokio::test]
async fn a_session_that_stalls_holds_up_no_other_on_sqlite() {
    a_session_that_stalls_holds_up_no_other::<OnSqlite>().await;
}

#[tokio::test]
async fn a_session_that_stalls_holds_up_no_other_on_postgres() {
    a_session_that_stalls_holds_up_no_other::<OnPostgres>().await;
}

/// Of two messages that are being sent for long, one is taken over by a process for which its lease had ended. A process asks for
/// more time a minute after it began to send, which is how long this takes.
async fn a_lease_is_prolonged_while_its_message_is_sent<B: Backend>() {
    let (ann, bob) = (at("ann@example.org"), at("bob@example.org"));
    let world = due::<B>(&[ann.as_str(), bob.as_str()]).await;
    let stalls = Script::new().on(Phase::Dot, Action::Stall);
    let server = stalls.decide(Phase::Rcpt, |line| line.contains("bob@").then_some(Action::Stall)).start().await;
    let long = Duration::from_secs(600);
    let timeouts = Timeouts { rcpt: long, dot: long, ..Timeouts::default() };
    let mut deliverer = world.deliverer(sessions(config::Smtp { timeouts, ..options(&server, 2) }));
    let mut did = Delivered::default();
    let since = Instant::now();
    while server.times(Phase::Dot) == 0 || server.times(Phase::Rcpt) < 2 {
        assert!(since.elapsed() < Duration::from_secs(30), "both are being sent");
        did += deliverer.step().await.expect("a step").did;
        let _ = tokio::time::timeout(Duration::from_millis(100), deliverer.wait()).await;
    }
    let ends = world.now() + LEASE;
    world.clock.advance(LEASE - TimeDelta::minutes(1));
    let later = ends + TimeDelta::minutes(1);
    let other = Uuid::from_u128(7);
    let claimed = world.store.claim(&[bob.bucket()], other, later, later + LEASE, 1).await.expect("a claim");
    assert_eq!(claimed.len(), 1, "it was bob's no longer");

    let since = Instant::now();
    while did.lost == 0 || leased_until(&world, &ann).await <= ends {
        assert!(since.elapsed() < Duration::from_secs(180), "{did:?}");
        let _ = tokio::time::timeout(Duration::from_secs(1), deliverer.wait()).await;
        did += deliverer.step().await.expect("a step").did;
    }
    let claimed = world.store.claim(&[ann.bucket()], other, later, later + LEASE, 1).await.expect("a claim");
    assert!(claimed.is_empty(), "ann's still is");
    // Whoever stalls goes on: ann's server answers, and bob's finds nobody there.
    server.release();
    server.release();
    did += deliverer.finish().await.expect("a record");
    assert_eq!(did, Delivered { sent: 1, lost: 1, ..Delivered::default() });
    assert_eq!(taken(&server), [ann.as_str()]);
    assert_eq!(server.times(Phase::Data), 1, "nothing more of bob's went out");
}

/// Until when the message to an address is leased.
async fn leased_until<B: Backend>(world: &World<B>, address: &Address) -> Timestamp {
    let mut until = None;
    let visit = |message: MessageRecord| {
        if message.address.as_ref() == Some(address) {
            until = Some(message.not_before);
        }
        ControlFlow::Continue(())
    };
    world.store.each_message(&MessageFilter::default(), visit).await.expect("a read");
    until.expect("a message")
}

#[tokio::test]
async fn a_lease_is_prolonged_while_its_message_is_sent_on_sqlite() {
    a_lease_is_prolonged_while_its_message_is_sent::<OnSqlite>().await;
}

#[tokio::test]
async fn a_lease_is_prolonged_while_its_message_is_sent_on_postgres() {
    a_lease_is_prolonged_while_its_message_is_sent::<OnPostgres>().await;
}

/// One message alone that is refused at MAIL is at fault; two different ones in a row are not.
#[tokio::test]
async fn a_server_that_refuses_everybody_at_mail_touches_no_message() {
    let addresses = ["ann@example.org", "bob@example.org", "cat@example.org"];
    for connections in [1, 4] {
        let world = due::<OnSqlite>(&addresses).await;
        let refuses = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let still = refuses.clone();
        let server = Script::new()
            .decide(Phase::Mail, move |_| {
                still.load(std::sync::atomic::Ordering::Relaxed).then(|| reply("550 5.7.1 you are not welcome"))
            })
            .start()
            .await;
        let mut deliverer = world.deliverer(sessions(options(&server, connections)));
        for _ in 0..4 {
            assert_eq!(world.deliver(&mut deliverer).await.failed, 0);
            assert!(deliverer.is_paused(), "{connections}");
            let job = "SELECT COUNT(*) FROM jobs WHERE name = 'deliver' AND error LIKE '%you are not welcome%'";
            assert_eq!(world.backend.count(job).await, 1, "status tells");
            world.clock.advance(TimeDelta::minutes(6));
        }
        let moved = "SELECT COUNT(*) FROM messages WHERE attempts > 0 OR state NOT IN ('open', 'retry')";
        assert_eq!(world.backend.count(moved).await, 0);
        refuses.store(false, std::sync::atomic::Ordering::Relaxed);
        let mut sent = 0;
        for _ in 0..3 {
            sent += world.deliver(&mut deliverer).await.sent;
            world.clock.advance(TimeDelta::minutes(6));
        }
        assert_eq!(sent, 3, "none was given up, and the fallback is told of none");
        assert!(!deliverer.is_paused());
        let job = "SELECT COUNT(*) FROM jobs WHERE name = 'deliver' AND error IS NULL";
        assert_eq!(world.backend.count(job).await, 1, "status tells");
    }
}

/// The next server is used while the first cannot be reached, and no message is lost or counted as tried.
#[tokio::test]
async fn the_next_relay_is_used_while_the_first_is_out_of_reach() {
    let world = due::<OnSqlite>(&["ann@example.org", "bob@example.org"]).await;
    let first = Script::new().on(Phase::Connect, reply("421 4.3.2 not now")).start().await;
    let second = Script::new().start().await;
    let mut options = options(&first, 1);
    options.relays.push(config::Relay { host: "127.0.0.1".into(), port: second.port() });
    let mut deliverer = world.deliverer(sessions(options));
    assert_eq!(world.deliver(&mut deliverer).await.sent, 2);
    assert_eq!((taken(&first).len(), taken(&second).len()), (0, 2));
    assert_eq!((first.times(Phase::Connect), second.times(Phase::Connect)), (1, 1));
}

/// A server that takes two sessions of four is not one that refuses everybody.
#[tokio::test]
async fn a_server_that_takes_few_sessions_gets_all_messages_over_them() {
    let addresses: Vec<String> = (0..12).map(|n| format!("owner-{n}@example.org")).collect();
    let world = due::<OnSqlite>(&addresses.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut connections = 0;
    let server = Script::new()
        .decide(Phase::Connect, move |_| {
            connections += 1;
            (connections > 2).then(|| Action::ReplyAndClose("421 4.7.0 too many connections".into()))
        })
        .start()
        .await;
    let mut deliverer = world.deliverer(sessions(options(&server, 4)));
    assert_eq!(world.deliver(&mut deliverer).await.sent, 12);
    assert!(!deliverer.is_paused());
}

/// A message that its sender always dies of is given up in the end, and told of.
#[tokio::test]
async fn a_message_whose_sender_always_dies_is_given_up() {
    let world = due::<OnSqlite>(&["ann@example.org"]).await;
    let server = Script::new().start().await;
    for _ in 0..11 {
        claimed_and_dropped(&world).await;
        world.clock.advance(TimeDelta::minutes(6));
    }
    let mut deliverer = world.deliverer(sessions(options(&server, 1)));
    let did = world.deliver(&mut deliverer).await;
    assert_eq!((did.failed, did.sent), (1, 1));
    assert_eq!(taken(&server), ["ops@example.org"]);
    assert!(!suppressed(&world, "ann@example.org").await);
}

async fn claimed_and_dropped<B: Backend>(world: &World<B>) {
    use lapsed::store::Outbox;
    let bucket = crate::support::world::at("ann@example.org").bucket();
    let until = world.now() + TimeDelta::minutes(5);
    let claimed = world.store.claim(&[bucket], uuid::Uuid::new_v4(), world.now(), until, 1).await.expect("a claim");
    assert_eq!(claimed.len(), 1);
}
