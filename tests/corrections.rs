//! What was said of a deadline no longer holds, as a story on each back end: whoever was told is told so, with the next mail, or
//! alone before an alarm in their calendar would be a false one.

use calcard::icalendar::{ICalendar, ICalendarComponentType, ICalendarProperty, ICalendarValue};
use chrono::TimeDelta;
use lapsed::change::{self, Edit};
use lapsed::clock::Timestamp;
use lapsed::mail::outcome::{Happened, Phase};
use lapsed::store::{Accounts, Corrections, Outbox};
use lapsed::token::TokenId;
use mail_parser::{MessageParser, MimeHeaders};
use uuid::Uuid;

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::{Courier, World, days};

on_every_back_end!(
    a_rotation_takes_the_entry_out_of_the_calendar,
    it_joins_the_next_mail,
    a_renewal_moves_the_entry,
    who_was_not_told_hears_nothing,
    a_token_that_is_used_all_the_same_is_not_withdrawn,
    a_deadline_that_somebody_took_away_is_told_to_all,
    what_changes_again_is_told_as_it_is,
    what_is_being_sent_when_it_changes_is_corrected,
    what_may_have_arrived_is_corrected,
    what_was_refused_is_not,
    a_change_in_between_keeps_its_mark,
    after_the_alarm_nothing_is_said,
    a_dead_address_is_no_reason_to_tell_the_fallback,
);

/// An entry of a calendar file, as a program reads it that is not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Noted {
    method: String,
    uid: String,
    sequence: i64,
    at: Timestamp,
    cancelled: bool,
}

/// The entries of the calendar files of the mail that was delivered last.
fn noted<B: Backend>(courier: &Courier<B>) -> Vec<Noted> {
    let (_, mail) = courier.memory.delivered().into_iter().next_back().expect("a mail");
    let parsed = MessageParser::default().parse(mail.bytes.as_slice()).expect("a mail");
    let mut noted = Vec::new();
    for part in parsed.attachments() {
        let kind = part.content_type().expect("a type");
        let file = part.text_contents().expect("a text");
        let calendar = ICalendar::parse(file).unwrap_or_else(|entry| panic!("{entry:?} in {file}"));
        let method = file.lines().find_map(|line| line.strip_prefix("METHOD:")).expect("a method").to_owned();
        assert_eq!(kind.attribute("method"), Some(method.as_str()), "the part says the same");
        let events = calendar.components.iter().filter(|it| it.component_type == ICalendarComponentType::VEvent);
        for event in events {
            let value = |property| event.property(&property).and_then(|entry| entry.values.first());
            let at = value(ICalendarProperty::Dtstart).and_then(ICalendarValue::as_partial_date_time);
            let at = at.and_then(|at| at.to_timestamp()).expect("an instant");
            noted.push(Noted {
                method: method.clone(),
                uid: event.uid().expect("a UID").to_owned(),
                sequence: value(ICalendarProperty::Sequence).and_then(ICalendarValue::as_integer).expect("a number"),
                at: Timestamp::from_timestamp(at, 0).expect("an instant"),
                cancelled: file.contains("STATUS:CANCELLED"),
            });
            assert!(event.has_property(&ICalendarProperty::Organizer));
        }
    }
    noted
}

/// A world in which alice was told on day 10 of a token's deadline on day 40.
async fn told<B: Backend>() -> (World<B>, TokenId, Courier<B>, Noted) {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 40).await;
    world.on_day(10);
    assert_eq!(world.remind().await.pending, 1);
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    let [noted] = noted(&courier).try_into().expect("one entry");
    assert_eq!((noted.method.as_str(), noted.cancelled), ("PUBLISH", false));
    (world, token, courier, noted)
}

async fn rotate<B: Backend>(world: &World<B>, token: TokenId, grace: TimeDelta) -> TokenId {
    let now = world.now();
    let changed = world.store.change_token(token, |token| change::rotate(token, grace, Some(None), now)).await;
    world.check().await;
    changed.expect("a rotation").successor.expect("a successor").0.id
}

async fn edit<B: Backend>(world: &World<B>, token: TokenId, to: Option<Timestamp>, by_another: bool) {
    let now = world.now();
    let edit = Edit { expires_at: Some(to), by_another, ..Edit::default() };
    world.store.change_token(token, |token| change::edit(token, &edit, now)).await.expect("an edit");
}

async fn a_rotation_takes_the_entry_out_of_the_calendar<B: Backend>() {
    let (world, token, mut courier, before) = told::<B>().await;
    world.on_day(19);
    rotate(&world, token, TimeDelta::zero()).await;
    assert_eq!(world.remind().await.pending, 1);
    assert_eq!(world.remind().await.pending, 0, "once");
    assert!(!world.get(token).await.uncorrected);
    // 20 days are left until the alarm: it goes alone when 10 of them are over.
    world.on_day(28);
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 0);
    world.on_day(29);
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
    assert_eq!(
        courier.delivered(),
        [
            "alice@example.org: \"deploy key (CI)\" expires in 30 days",
            "alice@example.org: \"deploy key (CI)\" was replaced"
        ]
    );
    let [after] = noted(&courier).try_into().expect("one entry");
    assert_eq!((after.method.as_str(), after.cancelled), ("CANCEL", true));
    assert_eq!((&after.uid, after.at), (&before.uid, before.at));
    assert!(after.sequence > before.sequence, "{before:?} {after:?}");
    let expected = ["0: withdrawn sent to alice@example.org", "0: 30d sent to alice@example.org"];
    assert_eq!(world.ledger(token).await, expected);
}

async fn it_joins_the_next_mail<B: Backend>() {
    let (world, token, mut courier, before) = told::<B>().await;
    let alice = world.get(token).await.owner;
    world.on_day(12);
    let now = world.now();
    world.store.change_token(token, |token| change::revoke(token, now)).await.expect("a revocation");
    world.remind().await;
    world.imported(alice, world.now() - days(60), world.now() + days(8)).await;
    world.on_day(13);
    assert_eq!(world.remind().await.pending, 1, "7 days before the deadline of another token");
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
    assert_eq!(courier.delivered().len(), 2);
    let (_, mail) = courier.memory.delivered().into_iter().next_back().expect("a mail");
    assert_eq!(mail.subject, "\"deploy key (CI)\" expires in 7 days");
    let parsed = MessageParser::default().parse(mail.bytes.as_slice()).expect("a mail");
    let text = parsed.body_text(0).expect("a text").replace("\r\n", "\n");
    assert!(text.contains("NO LONGER DUE\n\n* deploy key (CI)\n  now       revoked\n"), "{text}");
    let methods: Vec<(String, bool)> =
        noted(&courier).into_iter().map(|it| (it.method, it.uid == before.uid)).collect();
    assert_eq!(methods, [("PUBLISH".to_owned(), false), ("CANCEL".to_owned(), true)]);
    world.on_day(60);
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 0, "nothing is left of it");
}

async fn a_renewal_moves_the_entry<B: Backend>() {
    let (world, token, mut courier, before) = told::<B>().await;
    world.on_day(11);
    let later = world.now() + days(200);
    edit(&world, token, Some(later), false).await;
    assert_eq!(world.remind().await.pending, 1);
    world.on_day(38);
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1, "before the alarm on day 39");
    assert_eq!(courier.delivered()[1], "alice@example.org: \"deploy key (CI)\" now expires in 173 days");
    let [after] = noted(&courier).try_into().expect("one entry");
    assert_eq!((after.method.as_str(), &after.uid, after.at), ("PUBLISH", &before.uid, later));
    assert!(after.sequence > before.sequence);
    // Revoked later, that entry is taken away, too.
    world.on_day(50);
    let now = world.now();
    world.store.change_token(token, |token| change::revoke(token, now)).await.expect("a revocation");
    // No reminder of it was due: but alice was told.
    assert_eq!(world.remind().await.pending, 1);
    world.on_day(209);
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
    let [last] = noted(&courier).try_into().expect("one entry");
    assert_eq!((last.method.as_str(), &last.uid, last.at), ("CANCEL", &before.uid, later));
    assert!(last.sequence > after.sequence);
}

async fn who_was_not_told_hears_nothing<B: Backend>() {
    let (world, token, mut courier, _) = told::<B>().await;
    let alice = world.get(token).await.owner;
    let bob = crate::support::world::at("bob@example.org").into();
    world.store.link_contact(alice, &bob, world.now()).await.expect("a write");
    // A token that nobody was told of yet.
    let fresh = world.token(alice, 300).await;
    rotate(&world, fresh, TimeDelta::zero()).await;
    assert!(!world.get(fresh).await.uncorrected, "no reminder can have been due");
    rotate(&world, token, TimeDelta::zero()).await;
    assert_eq!(world.remind().await.pending, 1, "alice");
    // Who no longer speaks for the owner is not told either.
    let contacts = world.store.contacts_of(alice).await.expect("a read");
    let leaves = contacts.iter().find(|contact| contact.address.as_str() == "alice@example.org").expect("alice");
    world.store.unlink_contact(alice, leaves.id).await.expect("a write");
    world.on_day(38);
    let delivered = world.deliver(&mut courier.deliverer).await;
    assert_eq!((delivered.sent, delivered.cancelled), (0, 1));
}

async fn a_token_that_is_used_all_the_same_is_not_withdrawn<B: Backend>() {
    let (world, token, mut courier, before) = told::<B>().await;
    world.on_day(11);
    rotate(&world, token, days(20)).await;
    assert_eq!(world.remind().await.pending, 1, "it ends on day 31, and seems to be left behind");
    world.on_day(12);
    world.store.record_use(token, world.now(), world.now(), true).await.expect("a write");
    world.remind().await;
    world.on_day(24);
    assert_eq!(world.remind().await.pending, 1, "7 days before the end of its grace");
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
    let [moved] = noted(&courier).try_into().expect("one entry");
    assert_eq!((moved.method.as_str(), &moved.uid), ("PUBLISH", &before.uid));
    assert!(moved.sequence > before.sequence);
    assert!(world.ledger(token).await.contains(&"1: withdrawn cancelled to alice@example.org".to_owned()));
}

async fn a_deadline_that_somebody_took_away_is_told_to_all<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org", "team@example.org"]).await;
    let token = world.token(alice, 200).await;
    let kept_quiet = world.token(alice, 200).await;
    world.on_day(10);
    edit(&world, token, None, true).await;
    edit(&world, kept_quiet, None, false).await;
    assert_eq!(world.remind().await.pending, 2);
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    let says = |to| format!("{to}@example.org: \"deploy key (CI)\" does not expire any more");
    assert_eq!(courier.delivered(), [says("alice"), says("team")]);
    let [noted] = noted(&courier).try_into().expect("one entry");
    assert_eq!(noted.method, "CANCEL");
    assert_eq!(world.remind().await.pending, 0, "once");
}

async fn what_changes_again_is_told_as_it_is<B: Backend>() {
    let (world, token, mut courier, before) = told::<B>().await;
    world.on_day(11);
    let at = world.get(token).await.expires_at;
    edit(&world, token, None, false).await;
    assert_eq!(world.remind().await.pending, 1);
    // The deadline comes back: nothing was said yet that would be wrong.
    edit(&world, token, at, false).await;
    assert_eq!(world.remind().await.pending, 0);
    world.on_day(33);
    assert_eq!(world.remind().await.pending, 1, "7 days");
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
    let last = noted(&courier);
    assert_eq!(last.iter().map(|it| it.method.as_str()).collect::<Vec<_>>(), ["PUBLISH"]);
    assert!(last[0].sequence > before.sequence);
    let ledger = world.ledger(token).await;
    assert!(ledger.contains(&"1: withdrawn cancelled to alice@example.org".to_owned()), "{ledger:?}");
}

async fn what_is_being_sent_when_it_changes_is_corrected<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 40).await;
    let now = world.on_day(10);
    world.remind().await;
    let bucket = crate::support::world::at("alice@example.org").bucket();
    let claimed =
        world.store.claim(&[bucket], world.process, now, now + TimeDelta::minutes(5), 1).await.expect("a claim");
    // The mail is on its way while the token is rotated, and a pass looks.
    rotate(&world, token, TimeDelta::zero()).await;
    assert_eq!(world.remind().await.pending, 1);
    let sent = crate::support::world::sent(&claimed[0]);
    world.store.record(&[(&claimed[0], &sent)], now).await.expect("a record");
    let mut courier = world.courier();
    world.on_day(38);
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
    assert_eq!(courier.delivered(), ["alice@example.org: \"deploy key (CI)\" was replaced"]);
}

/// A mail that the courier of a world in which a reminder is due does not know the fate of, or knows to be refused for now.
async fn tried<B: Backend>(outcome: Happened) -> (World<B>, TokenId, Courier<B>) {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 40).await;
    world.on_day(10);
    world.remind().await;
    let mut courier = world.courier();
    courier.memory.answer(outcome);
    assert_eq!(world.deliver(&mut courier.deliverer).await.retried, 1);
    rotate(&world, token, TimeDelta::zero()).await;
    (world, token, courier)
}

async fn what_may_have_arrived_is_corrected<B: Backend>() {
    let lost = Happened::Unknown { error: "the connection was lost".into() };
    let (world, token, mut courier) = tried::<B>(lost).await;
    assert_eq!(world.remind().await.pending, 1);
    // The retry has nothing left to say; what corrects it has.
    world.on_day(11);
    let delivered = world.deliver(&mut courier.deliverer).await;
    assert_eq!((delivered.sent, delivered.cancelled), (0, 1));
    world.on_day(38);
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 1);
    let expected = ["0: withdrawn sent to alice@example.org", "0: 30d cancelled to alice@example.org"];
    assert_eq!(world.ledger(token).await, expected);
}

async fn what_was_refused_is_not<B: Backend>() {
    let greylisted = Happened::refused(Phase::Rcpt, 450, "4.2.0 greylisted");
    let (world, token, mut courier) = tried::<B>(greylisted).await;
    assert_eq!(world.remind().await.pending, 0);
    world.on_day(38);
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 0);
    assert_eq!(world.ledger(token).await, ["0: 30d cancelled to alice@example.org"]);
}

async fn a_change_in_between_keeps_its_mark<B: Backend>() {
    let (world, token, _, _) = told::<B>().await;
    rotate(&world, token, days(5)).await;
    let page = world.store.uncorrected(Uuid::nil(), 10).await.expect("a page");
    assert_eq!(page.len(), 1);
    world.store.record_use(token, world.now(), world.now() + days(1), false).await.expect("a write");
    let lease = world.lease("remind").await;
    let decided = lapsed::store::corrections::Corrected {
        now: world.now(),
        looked_at: &page,
        reminders: Vec::new(),
        may_open: None,
    };
    assert_eq!(world.store.correct(&lease, decided).await.expect("a write").tokens, 0);
    assert!(world.get(token).await.uncorrected);
}

async fn after_the_alarm_nothing_is_said<B: Backend>() {
    let (world, token, mut courier, _) = told::<B>().await;
    // The reminders of 7 days and a day were not sent: the daemon was down.
    world.clock.set(world.now() + days(29) + TimeDelta::hours(1));
    rotate(&world, token, TimeDelta::zero()).await;
    assert_eq!(world.remind().await.pending, 0, "the alarm came an hour ago");
    assert!(!world.get(token).await.uncorrected);
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 0);
}

async fn a_dead_address_is_no_reason_to_tell_the_fallback<B: Backend>() {
    let (mut world, token, _, _) = told::<B>().await;
    world.fallback("ops@example.org").await;
    rotate(&world, token, TimeDelta::zero()).await;
    world.remind().await;
    world.backend.execute("UPDATE contacts SET suppressed_at = created_at WHERE address = 'alice@example.org'").await;
    let mut courier = world.courier();
    world.on_day(38);
    assert_eq!(world.deliver(&mut courier.deliverer).await.sent, 0);
    assert!(world.ledger(token).await.contains(&"0: withdrawn unreachable to alice@example.org".to_owned()));
    assert!(world.ledger(token).await.iter().all(|line| !line.contains("ops@")), "what is withdrawn is no news to ops");
}
