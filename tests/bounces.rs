//! Mails that come back after a server took them: what the store says then, and what a mail system is told.

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::cli::{Place, Ran, eventually, fact};
use crate::support::smtp::Sink;
use crate::support::world::{Courier, World};
use chrono::TimeDelta;
use lapsed::bounce::{Done, take};
use lapsed::change;
use lapsed::jobs::deliver::LEASE;
use lapsed::mail::dsn;
use lapsed::mail::outcome::Happened;
use lapsed::store::{Accounts, Outbox};
use lapsed::token::{Bucket, MessageId, OwnerId, TokenId};
use uuid::Uuid;

on_every_back_end!(
    a_dead_address_is_suppressed_and_the_fallback_is_told,
    another_contact_is_enough_until_it_is_dead_too,
    a_full_mailbox_is_told_to_the_fallback_and_suppresses_nobody,
    a_delay_changes_nothing,
    what_is_being_sent_is_asked_for_again,
    what_is_to_be_tried_again_finds_the_address_dead,
    a_message_that_is_gone_is_unknown,
    a_fallback_that_bounces_is_told_to_nobody,
    what_is_no_longer_true_is_told_to_nobody,
);

const DEAD: &str = include_str!("bounces/exchange-not-found.eml");
const FULL: &str = include_str!("bounces/exchange-mailbox-full.eml");
const DELAYED: &str = include_str!("bounces/postfix-delayed.eml");

fn filled(sample: &str, to: &str, return_path: &str, message_id: &str) -> String {
    sample.replace("{{to}}", to).replace("{{return_path}}", return_path).replace("{{message_id}}", message_id)
}

/// An owner with a token whose first reminder was sent.
async fn mailed<B: Backend>(addresses: &[&str]) -> (World<B>, Courier<B>, OwnerId, TokenId) {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let owner = world.owner("ann", addresses).await;
    let token = world.token(owner, 90).await;
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, addresses.len() as u64);
    (world, courier, owner, token)
}

/// The message to an address, of those that were delivered.
fn message<B: Backend>(courier: &Courier<B>, to: &str) -> MessageId {
    let delivered = courier.memory.delivered();
    delivered.iter().find(|(_, mail)| mail.to.to_string() == to).expect(to).0
}

/// Gives a sample to whoever takes bounces.
async fn bounce<B: Backend>(world: &World<B>, sample: &str, to: &str, id: MessageId) -> Done {
    let text = filled(sample, to, "tokens@example.org", &format!("{id}@example.org"));
    let notification = dsn::read(text.as_bytes()).expect("a notification");
    let done = take(&world.store, id, &notification, &world.rules.groups, world.now()).await.expect("a store");
    world.check().await;
    done
}

async fn suppressed<B: Backend>(world: &World<B>, owner: OwnerId) -> Vec<(String, Option<String>)> {
    let contacts = world.store.contacts_of(owner).await.expect("contacts");
    contacts.into_iter().map(|c| (c.address.to_string(), c.suppressed.map(|suppressed| suppressed.why))).collect()
}

async fn failed_messages<B: Backend>(world: &World<B>, reply: &str) -> i64 {
    let count = format!("SELECT COUNT(*) FROM messages WHERE state = 'failed' AND last_reply LIKE '{reply}%'");
    world.backend.count(&count).await
}

async fn a_dead_address_is_suppressed_and_the_fallback_is_told<B: Backend>() {
    let (world, mut courier, owner, token) = mailed::<B>(&["ann@example.org"]).await;
    let id = message(&courier, "ann@example.org");
    let done = bounce(&world, DEAD, "ann@example.org", id).await;
    assert_eq!(done, Done::Failed { suppressed: true, reminders: 1, escalated: 1 });
    let why = &suppressed(&world, owner).await[0].1;
    assert!(why.as_ref().is_some_and(|why| why.starts_with("bounced: 550 5.1.10 RESOLVER")), "{why:?}");
    assert_eq!(failed_messages(&world, "bounced: 550 5.1.10").await, 1);
    let ledger = ["0: 30d failed to ann@example.org", "0: 30d pending to ops@example.org escalated"];
    assert_eq!(world.ledger(token).await, ledger);

    // Twice is once.
    assert_eq!(bounce(&world, DEAD, "ann@example.org", id).await, Done::Known { suppressed: true });
    assert_eq!(world.ledger(token).await, ledger);
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered().len(), 2);
    assert_eq!(world.ledger(token).await[1], "0: 30d sent to ops@example.org escalated");

    // What falls due later goes to the fallback by the way of those who have no contact.
    world.on_day(83);
    world.remind().await;
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered().iter().filter(|line| line.starts_with("ann@")).count(), 1);
}

async fn another_contact_is_enough_until_it_is_dead_too<B: Backend>() {
    let (world, courier, owner, token) = mailed::<B>(&["ann@example.org", "bob@example.org"]).await;
    let done = bounce(&world, DEAD, "ann@example.org", message(&courier, "ann@example.org")).await;
    assert_eq!(done, Done::Failed { suppressed: true, reminders: 1, escalated: 0 });
    let dead: Vec<_> = suppressed(&world, owner).await.into_iter().map(|(_, why)| why.is_some()).collect();
    assert_eq!(dead, [true, false]);
    assert_eq!(
        world.ledger(token).await,
        ["0: 30d failed to ann@example.org", "0: 30d sent to bob@example.org"],
        "Bob was told"
    );
    let done = bounce(&world, DEAD, "bob@example.org", message(&courier, "bob@example.org")).await;
    assert_eq!(done, Done::Failed { suppressed: true, reminders: 1, escalated: 1 });
}

async fn a_full_mailbox_is_told_to_the_fallback_and_suppresses_nobody<B: Backend>() {
    let (world, courier, owner, token) = mailed::<B>(&["ann@example.org", "bob@example.org"]).await;
    let done = bounce(&world, FULL, "ann@example.org", message(&courier, "ann@example.org")).await;
    assert_eq!(done, Done::Failed { suppressed: false, reminders: 1, escalated: 1 });
    assert!(suppressed(&world, owner).await.iter().all(|(_, why)| why.is_none()));
    assert_eq!(failed_messages(&world, "bounced: 554 5.2.2 mailbox full").await, 1);
    assert_eq!(
        world.ledger(token).await,
        [
            "0: 30d failed to ann@example.org",
            "0: 30d sent to bob@example.org",
            "0: 30d pending to ops@example.org escalated"
        ]
    );
}

async fn a_delay_changes_nothing<B: Backend>() {
    let (world, courier, owner, token) = mailed::<B>(&["ann@example.org"]).await;
    let done = bounce(&world, DELAYED, "ann@example.org", message(&courier, "ann@example.org")).await;
    assert_eq!(done, Done::Nothing);
    assert_eq!(suppressed(&world, owner).await, [("ann@example.org".to_owned(), None)]);
    assert_eq!(world.ledger(token).await, ["0: 30d sent to ann@example.org"]);
    assert_eq!(world.backend.message().await.1, "sent");
}

async fn what_is_being_sent_is_asked_for_again<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let owner = world.owner("ann", &["ann@example.org"]).await;
    let token = world.token(owner, 90).await;
    world.on_day(60);
    world.remind().await;
    let now = world.now();
    let bucket = world.store.queue(now).await.expect("a queue").due[0];
    let claimed = world.store.claim(&[bucket], Uuid::new_v4(), now, now + LEASE, 1).await.expect("a claim");
    // A mail system may write sooner than we do.
    assert_eq!(bounce(&world, DEAD, "ann@example.org", claimed[0].id).await, Done::TooEarly);
    assert_eq!(suppressed(&world, owner).await, [("ann@example.org".to_owned(), None)], "all of it comes later");
    let record = crate::support::world::sent(&claimed[0]);
    assert_eq!(world.store.record(&[(&claimed[0], &record)], now).await.expect("a record"), [true]);
    let done = bounce(&world, DEAD, "ann@example.org", claimed[0].id).await;
    assert_eq!(done, Done::Failed { suppressed: true, reminders: 1, escalated: 1 });
    assert_eq!(world.ledger(token).await[0], "0: 30d failed to ann@example.org");
}

async fn what_is_to_be_tried_again_finds_the_address_dead<B: Backend>() {
    let mut world = World::<B>::new().await;
    world.fallback("ops@example.org").await;
    let owner = world.owner("ann", &["ann@example.org"]).await;
    let token = world.token(owner, 90).await;
    world.on_day(60);
    world.remind().await;
    let mut courier = world.courier();
    courier.memory.answer(Happened::Unknown { error: "reset".into() });
    assert_eq!(world.deliver(&mut courier.deliverer).await.unknown, 1);
    let done = bounce(&world, DEAD, "ann@example.org", message(&courier, "ann@example.org")).await;
    assert_eq!(done, Done::Known { suppressed: true });
    world.clock.advance(TimeDelta::minutes(6));
    world.deliver(&mut courier.deliverer).await;
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(
        world.ledger(token).await,
        ["0: 30d unreachable to ann@example.org", "0: 30d sent to ops@example.org escalated"]
    );
}

async fn a_message_that_is_gone_is_unknown<B: Backend>() {
    let (world, courier, ..) = mailed::<B>(&["ann@example.org"]).await;
    let id = message(&courier, "ann@example.org");
    let other = MessageId::new(Bucket::from_number(id.bucket().number()), world.now());
    assert_eq!(bounce(&world, DEAD, "ann@example.org", other).await, Done::Unknown);
    world.backend.execute("DELETE FROM messages").await;
    assert_eq!(bounce(&world, DEAD, "ann@example.org", id).await, Done::Unknown);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM contacts WHERE suppressed_at IS NOT NULL").await, 0);
}

async fn a_fallback_that_bounces_is_told_to_nobody<B: Backend>() {
    let (world, mut courier, _, token) = mailed::<B>(&["ann@example.org"]).await;
    bounce(&world, DEAD, "ann@example.org", message(&courier, "ann@example.org")).await;
    world.deliver(&mut courier.deliverer).await;
    let done = bounce(&world, FULL, "ops@example.org", message(&courier, "ops@example.org")).await;
    assert_eq!(done, Done::Failed { suppressed: false, reminders: 1, escalated: 0 });
    assert_eq!(world.ledger(token).await[1], "0: 30d failed to ops@example.org escalated");
}

async fn what_is_no_longer_true_is_told_to_nobody<B: Backend>() {
    let (world, mut courier, _, token) = mailed::<B>(&["ann@example.org"]).await;
    let now = world.now();
    world.store.change_token(token, |token| change::revoke(token, now)).await.expect("allowed");
    let done = bounce(&world, DEAD, "ann@example.org", message(&courier, "ann@example.org")).await;
    assert_eq!(done, Done::Failed { suppressed: true, reminders: 1, escalated: 1 });
    world.deliver(&mut courier.deliverer).await;
    assert_eq!(courier.delivered().len(), 1, "no mail to the fallback: the token is revoked");
    assert_eq!(world.ledger(token).await[1], "0: 30d cancelled to ops@example.org escalated");
}

/// A place whose daemon signs return paths, and sends to this port.
fn signing(place: Place, port: u16) -> Place {
    place.write("key", "0123456789abcdef0123456789abcdef\n");
    place.configure(&format!(
        r#"
        [mail]
        transport = "smtp"
        from = "Tokens <tokens@example.org>"
        fallback_to = "ops@example.org"
        [mail.smtp]
        host = "127.0.0.1"
        port = {port}
        tls = "none"
        [mail.bounce]
        address = "bounces@Example.org"
        key_file = "key"
        "#
    ));
    place
}

/// One mail about a token that has expired; the return path and the `Message-ID` that it left with.
fn one_mail(place: &Place, sink: &Sink) -> (String, String, String) {
    place.owner("ann", "ann@example.org");
    let (token, secret) = place.token("ann", "CI", "1s");
    eventually("the deadline", crate::support::cli::PATIENCE, || {
        (place.verify(&secret).status == Some(1)).then_some(())
    });
    place.line("run --once").ok();
    let mail = sink.wait_for(1).remove(0);
    let parsed = mail_parser::MessageParser::new().parse(&mail.data).expect("a mail");
    (token, mail.mail_from.clone(), parsed.message_id().expect("a Message-ID").to_owned())
}

#[track_caller]
fn ends(ran: Ran, status: i32, words: &str) {
    assert_eq!(ran.status, Some(status), "{ran}");
    assert!(ran.stdout.contains(words) || ran.stderr.contains(words), "{words:?} is not in: {ran}");
    assert!(!ran.stderr.contains("ann@example.org"), "an address in the log: {ran}");
}

#[test]
fn a_mail_system_pipes_what_came_back_on_sqlite() {
    a_mail_system_pipes_what_came_back(Place::new());
}

#[tokio::test]
async fn a_mail_system_pipes_what_came_back_on_postgresql() {
    let database = crate::support::postgres::fresh().await;
    a_mail_system_pipes_what_came_back(Place::with_store(&database.url));
}

fn a_mail_system_pipes_what_came_back(place: Place) {
    let sink = Sink::start();
    let place = signing(place, sink.port());
    let (token, return_path, message_id) = one_mail(&place, &sink);
    let (id, _) = message_id.split_once('@').expect("an id");
    let digits = id.replace('-', "");
    assert!(return_path.starts_with(&format!("bounces+{digits}.")) && return_path.ends_with("@example.org"));
    let piped =
        |sample: &str, to: &str| place.run_with(["bounce"], &filled(sample, "ann@example.org", to, &message_id));

    // Nothing of this changes anything.
    ends(piped(DELAYED, &return_path), 0, "still being tried");
    ends(piped(include_str!("bounces/out-of-office.eml"), &return_path), 0, "automatic answer");
    ends(piped(include_str!("bounces/a-person-answers.eml"), &return_path), 65, "not a delivery status notification");
    ends(place.run_with(["bounce"], ""), 65, "not a mail");
    let (before, signature) = return_path.split_at(return_path.find('.').expect("a dot") + 1);
    let forged = format!("{before}0000000000000000{}", &signature[16..]);
    ends(piped(DEAD, &forged), 77, "not signed");
    ends(piped(DEAD, "tokens@example.org"), 77, "does not name a message");
    assert!(place.run(["token", "show", &token]).ok().contains("  sent  "));

    // The variable of the mail system is enough, whatever the header says; so is the header alone; in any case of letters.
    let text = filled(DEAD, "ann@example.org", "somebody@example.org", &message_id);
    let with_variable = {
        let mut command = place.bare(["--config", "lapsed.toml", "bounce"]);
        command.env("ORIGINAL_RECIPIENT", return_path.to_uppercase());
        crate::support::cli::finish(command, &text)
    };
    ends(with_variable, 0, "failed");
    ends(piped(DEAD, &return_path), 0, "as it was");
    ends(place.run_with(["bounce", "--recipient", &return_path], &text), 0, "as it was");
    let shown = place.run(["token", "show", &token]).ok();
    assert!(shown.contains("  failed  ") && shown.contains("  pending  "), "{shown}");
    let contacts = place.line("owner contact list ann --format json").ok();
    assert!(contacts.contains("\"suppressed_why\":\"bounced: 550 5.1.10"), "{contacts}");
    let once = place.line("run --once").ok();
    assert_eq!(fact(&once, "deliver"), "messages sent: 1", "the fallback is told");
    let told = sink.wait_for(2);
    assert_eq!(told[1].rcpt_to, ["ops@example.org"]);
}

#[test]
fn what_cannot_be_taken_now_is_kept_by_the_mail_system() {
    let sink = Sink::start();
    let place = signing(Place::new(), sink.port());
    let (_, return_path, message_id) = one_mail(&place, &sink);
    let text = filled(DEAD, "ann@example.org", &return_path, &message_id);
    let piped = || place.run_with(["bounce"], &text);

    place.write("key", "short\n");
    ends(piped(), 75, "16 characters or more");
    place.write("key", "another key, that is long enough\n");
    ends(piped(), 77, "not signed with the key");
    place.write("key", "0123456789abcdef0123456789abcdef\n");

    let config = std::fs::read_to_string(place.path("lapsed.toml")).expect("the configuration");
    place.configure(&format!("{config}\nnonsense = 1\n"));
    ends(piped(), 75, "nonsense");
    place.configure(&config);

    std::fs::rename(place.path("lapsed.db"), place.path("elsewhere.db")).expect("a move");
    ends(piped(), 75, "there is no store lapsed.db");
    std::fs::create_dir(place.path("lapsed.db")).expect("in the way");
    ends(piped(), 75, "cannot be opened");
    std::fs::remove_dir(place.path("lapsed.db")).expect("out of the way");
    std::fs::rename(place.path("elsewhere.db"), place.path("lapsed.db")).expect("back");
    ends(piped(), 0, "failed");
}

#[test]
fn without_signatures_the_message_id_counts() {
    let sink = Sink::start();
    let place = signing(Place::new(), sink.port());
    let config = std::fs::read_to_string(place.path("lapsed.toml")).expect("the configuration");
    place.configure(config.split("[mail.bounce]").next().expect("the rest"));
    let (_, return_path, message_id) = one_mail(&place, &sink);
    assert_eq!(return_path, "tokens@example.org", "the envelope's sender is the sender");
    let piped = |id: &str| place.run_with(["bounce"], &filled(DEAD, "ann@example.org", "tokens@example.org", id));
    ends(piped("somebody-elses@example.org"), 65, "nobody knows which message");
    ends(piped(&format!("{}@example.org", Uuid::nil())), 67, "there is no message");
    ends(piped(&message_id), 0, "suppressed");
}
