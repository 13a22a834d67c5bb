//! Planning, as a story on each back end: what is owed is written once, whatever happens in between.

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::{World, dawn, days, lead, new_token};
use chrono::TimeDelta;
use lapsed::change;
use lapsed::clock::Timestamp;
use lapsed::config::Limit;
use lapsed::jobs::guard::Guard;
use lapsed::jobs::{Outcome, expire, purge, remind};
use lapsed::policy::{Lead, Policy};
use lapsed::store::planning::{Decided, Progress, Watermark};
use lapsed::store::{Accounts, Due, Error, Jobs, Planning};
use lapsed::token::{Status, Token};
use uuid::Uuid;

on_every_back_end!(
    each_lead_is_written_once,
    a_late_daemon_sends_only_the_tightest,
    thousands_share_one_deadline,
    an_import_is_planned_at_once,
    a_moved_deadline_re_arms,
    a_lead_that_is_new_and_one_that_goes,
    a_clock_that_goes_back,
    reconcile_heals_what_watermarks_cannot_see,
    expired_tokens_are_marked_and_noticed,
    expire_goes_on_where_it_was,
    an_old_table_mails_nobody,
    a_wrong_clock_is_undone,
    nobody_to_tell,
    suppressed_contacts_are_passed_over,
    a_step_goes_through_several_pages,
    a_lost_lease_writes_nothing,
    a_lease_from_a_wrong_clock_holds_nobody_up,
    what_is_due_is_known_before_a_pass,
    a_pass_over_respects_the_lease,
    an_edit_in_between_wins,
    purge_keeps_what_is_needed,
    no_instant_is_kept_that_cannot_be_read_back,
);

async fn each_lead_is_written_once<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    let mut written = 0;
    for day in 0..95 {
        world.on_day(day);
        written += world.remind().await.pending + world.expire().await.pending;
        written += world.remind().await.pending + world.expire().await.pending;
    }
    assert_eq!(written, 4);
    let expected = ["30d", "7d", "1d", "expired"].map(|lead| format!("0: {lead} pending to alice@example.org"));
    assert_eq!(world.ledger(token).await, expected);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM messages WHERE state = 'open'").await, 1, "one digest");
}

async fn a_late_daemon_sends_only_the_tightest<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org", "team@example.org"]).await;
    let token = world.token(alice, 90).await;
    world.on_day(85);
    assert_eq!(world.remind().await.pending, 2);
    let expected = [
        "0: 30d superseded to alice@example.org",
        "0: 30d superseded to team@example.org",
        "0: 7d pending to alice@example.org",
        "0: 7d pending to team@example.org",
    ];
    assert_eq!(world.ledger(token).await, expected);
}

async fn thousands_share_one_deadline<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    for _ in 0..20 {
        world.token(alice, 90).await;
    }
    world.on_day(60);
    // Pages of three tokens: every page but the last ends inside the shared instant.
    assert_eq!(world.remind().await.pending, 20);
    assert_eq!(world.remind().await.pending, 0);
    world.on_day(90);
    assert_eq!(world.expire().await.tokens, 20);
}

async fn an_import_is_planned_at_once<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.token(alice, 200).await;
    world.on_day(100);
    world.remind().await;
    // Its 30-day reminder fell due 15 days ago, behind the watermark.
    let token = world.imported(alice, dawn(), world.now() + days(15)).await;
    assert!(world.get(token).await.unplanned);
    assert_eq!(world.remind().await.pending, 1);
    assert!(!world.get(token).await.unplanned);
    assert_eq!(world.ledger(token).await, ["0: 30d pending to alice@example.org"]);
}

async fn a_moved_deadline_re_arms<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    world.on_day(61);
    world.remind().await;
    world.move_deadline(token, dawn() + days(90) + TimeDelta::minutes(30)).await;
    assert_eq!(world.remind().await.pending, 0, "half an hour is the same deadline");
    world.move_deadline(token, world.now() + days(100)).await;
    world.on_day(131);
    assert_eq!(world.remind().await.pending, 1);
    assert_eq!(
        world.ledger(token).await,
        ["0: 30d pending to alice@example.org", "1: 30d pending to alice@example.org"]
    );
}

async fn a_lead_that_is_new_and_one_that_goes<B: Backend>() {
    let mut world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    world.on_day(70);
    assert_eq!(world.remind().await.pending, 1);
    world.rules.policy = Policy::new([lead(30), lead(25)], true, days(7));
    assert_eq!(world.remind().await.pending, 1, "the new lead finds what stands in its window");
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM watermarks").await, 2);
    world.rules.policy = Policy::new([lead(30)], true, days(7));
    world.remind().await;
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM watermarks").await, 1);
    assert_eq!(
        world.ledger(token).await,
        ["0: 30d pending to alice@example.org", "0: 25d pending to alice@example.org"]
    );
}

async fn a_clock_that_goes_back<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.on_day(20);
    world.remind().await;
    world.on_day(0);
    let token = world.token(alice, 40).await;
    world.on_day(12);
    assert_eq!(world.remind().await.pending, 1, "the watermark of day 20 is not believed on day 12");
    assert_eq!(world.ledger(token).await, ["0: 30d pending to alice@example.org"]);
}

async fn reconcile_heals_what_watermarks_cannot_see<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.on_day(100);
    world.remind().await;
    let token = world.imported(alice, dawn(), world.now() + days(10)).await;
    // A row that somebody wrote by hand carries no mark.
    world.backend.execute("UPDATE tokens SET unplanned = (1 = 0)").await;
    assert_eq!(world.remind().await.pending, 0);
    assert_eq!(world.reconcile().await.pending, 1);
    assert_eq!(world.reconcile().await.pending, 0, "the ledger prevents repeats");
    assert_eq!(world.ledger(token).await, ["0: 30d pending to alice@example.org"]);
}

async fn expired_tokens_are_marked_and_noticed<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 1).await;
    let replaced = world.token(alice, 1).await;
    let later = world.token(alice, 2).await;
    let now = world.now();
    world.store.change_token(replaced, |token| change::rotate(token, days(1), None, now)).await.expect("a rotation");
    world.clock.set(dawn() + days(1) - TimeDelta::seconds(1));
    assert_eq!(world.expire().await.tokens, 0);
    world.on_day(1);
    let written = world.expire().await;
    assert_eq!((written.tokens, written.pending), (3, 2), "the replaced one owes nothing");
    let expired = world.get(token).await;
    assert_eq!((expired.status, expired.ended_at), (Status::Expired, Some(dawn() + days(1))));
    assert_eq!(world.get(later).await.status, Status::Active);
    assert!(world.ledger(replaced).await.is_empty());
}

async fn expire_goes_on_where_it_was<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    for _ in 0..7 {
        world.token(alice, 90).await;
    }
    let other = world.token(alice, 200).await;
    world.on_day(91);
    assert_eq!(world.expire().await.tokens, 7);

    // Behind the watermark: marked by whoever writes it, and `remind`, which has nothing to say of it, leaves the mark.
    let imported = world.imported(alice, dawn(), dawn() + days(89)).await;
    assert_eq!(world.remind().await.pending, 0);
    assert_eq!(world.expire().await.tokens, 1);
    let token = world.get(imported).await;
    assert_eq!((token.status, token.unplanned), (Status::Expired, false));

    // Written by hand and not marked: found by the daily pass alone.
    let behind = "UPDATE tokens SET expires_at = (SELECT MIN(ended_at) FROM tokens) WHERE status = 'active'";
    world.backend.execute(behind).await;
    assert_eq!(world.expire().await.tokens, 0, "what lies behind the watermark is not read again");
    world.reconcile().await;
    assert_eq!(world.expire().await.tokens, 1);
    assert_eq!(world.get(other).await.status, Status::Expired);
}

async fn an_old_table_mails_nobody<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.imported(alice, dawn() - days(400), dawn() - days(300)).await;
    assert_eq!(world.expire().await.pending, 0);
    assert_eq!(world.remind().await.pending, 0);
    assert_eq!(world.ledger(token).await, ["0: expired stale to alice@example.org"]);
}

async fn a_wrong_clock_is_undone<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 90).await;
    world.on_day(91);
    assert_eq!(world.expire().await.tokens, 1);
    world.on_day(62);
    world.expire().await;
    let revived = world.get(token).await;
    assert_eq!((revived.status, revived.ended_at, revived.generation), (Status::Active, None, 1));
    assert_eq!(world.remind().await.pending, 1, "what is true now is said");
    world.on_day(90);
    assert_eq!(world.expire().await.pending, 1, "and so is the real end");
}

async fn nobody_to_tell<B: Backend>() {
    let mut world = World::<B>::new().await;
    let bot = world.owner("bot", &[]).await;
    let token = world.token(bot, 90).await;
    world.on_day(60);
    assert_eq!(world.remind().await.pending, 0);
    assert_eq!(world.ledger(token).await, ["0: 30d unreachable to nobody"]);
    world.fallback("ops@example.org").await;
    world.on_day(83);
    assert_eq!(world.remind().await.pending, 1);
    world.on_day(90);
    assert_eq!(world.expire().await.pending, 1);
    let expected = [
        "0: 30d unreachable to nobody",
        "0: 7d pending to ops@example.org escalated",
        "0: 7d unreachable to nobody",
        "0: expired pending to ops@example.org escalated",
        "0: expired unreachable to nobody",
    ];
    let mut ledger = world.ledger(token).await;
    ledger.sort();
    assert_eq!(ledger, expected);
}

async fn suppressed_contacts_are_passed_over<B: Backend>() {
    let world = World::<B>::new().await;
    let team = world.owner("team", &["left@example.org", "here@example.org"]).await;
    let token = world.token(team, 90).await;
    world.backend.execute("UPDATE contacts SET suppressed_at = created_at WHERE address = 'left@example.org'").await;
    world.on_day(60);
    world.remind().await;
    assert_eq!(world.ledger(token).await, ["0: 30d pending to here@example.org"]);
}

async fn a_step_goes_through_several_pages<B: Backend>() {
    let mut world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    for _ in 0..14 {
        world.token(alice, 1).await;
    }
    world.on_day(1);
    let lease = world.lease(expire::NAME).await;
    // What the guard allows is counted when a page is written, though the page was read while another one was.
    world.rules.guard = Guard::new(Limit::None, Limit::PerHour(5));
    let Outcome { did, more } = expire::step(&world.store, &lease, &world.rules, world.now()).await.expect("a step");
    assert_eq!((did.tokens, did.pending, did.waits, more), (5, 5, true, false), "a page of 3, and 2 of the next");
    assert_eq!(did.lags.len(), 5);
    world.rules.guard = Guard::new(Limit::None, Limit::None);
    world.rules.batch = 2;
    let Outcome { did, more } = expire::step(&world.store, &lease, &world.rules, world.now()).await.expect("a step");
    assert_eq!((did.tokens, did.pending, did.waits, more), (8, 8, false, true), "four pages");
    let Outcome { did, more } = expire::step(&world.store, &lease, &world.rules, world.now()).await.expect("a step");
    assert_eq!((did.tokens, did.pending, did.waits, more), (1, 1, false, false), "the last one");
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM tokens WHERE status = 'active'").await, 0);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM reminders WHERE state = 'pending'").await, 14);
}

async fn a_lost_lease_writes_nothing<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 1).await;
    let other = world.backend.open().await;
    world.on_day(1);
    let stalled = world.lease(expire::NAME).await;
    let refused = other.lease(expire::NAME, Uuid::from_u128(2), world.now()).await.expect("a read");
    assert!(refused.is_none(), "the lease is taken");
    // The first process stalls past its lease, and another takes over.
    let later = world.clock.advance(TimeDelta::minutes(3));
    let taken = other.lease(expire::NAME, Uuid::from_u128(2), later).await.expect("a read").expect("it has ended");
    assert!(taken.epoch > stalled.epoch);
    let lost = expire::step(&world.store, &stalled, &world.rules, later).await;
    assert!(matches!(lost, Err(Error::LostLease("expire"))), "{lost:?}");
    assert_eq!(world.get(token).await.status, Status::Active);
    assert!(world.ledger(token).await.is_empty());
    let did = expire::step(&other, &taken, &world.rules, later).await.expect("a step").did;
    assert_eq!(did.tokens, 1);

    let stalled = world.lease(remind::NAME).await;
    let later = world.clock.advance(TimeDelta::minutes(3));
    other.lease(remind::NAME, Uuid::from_u128(2), later).await.expect("a read").expect("it has ended");
    let lost = remind::step(&world.store, &stalled, &world.rules, later).await;
    assert!(matches!(lost, Err(Error::LostLease("remind"))), "{lost:?}");
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM watermarks WHERE lead > 0").await, 0);
}

async fn a_lease_from_a_wrong_clock_holds_nobody_up<B: Backend>() {
    let world = World::<B>::new().await;
    let other = world.backend.open().await;
    // On a clock that runs a year ahead, one process finishes a pass and one dies in the middle of another.
    world.on_day(365);
    world.expire().await;
    let stalled = world.lease(remind::NAME).await;
    world.on_day(0);
    for job in [expire::NAME, remind::NAME] {
        let taken = other.lease(job, Uuid::from_u128(2), world.now()).await.expect("a read");
        assert!(taken.is_some(), "{job} does not wait for a year");
    }
    let lost = remind::step(&world.store, &stalled, &world.rules, world.now()).await;
    assert!(matches!(lost, Err(Error::LostLease("remind"))), "{lost:?}");
}

async fn what_is_due_is_known_before_a_pass<B: Backend>() {
    let world = World::<B>::new().await;
    let leads = world.rules.policy.leads().to_vec();
    let to_expire = async || world.store.to_expire(world.now()).await.expect("a read");
    let to_remind = async || world.store.to_remind(world.now()).await.expect("a read");
    assert!(!to_expire().await.is_nothing(world.now()), "there is no watermark yet");
    assert!(!to_remind().await.is_nothing(&leads, world.now()), "the leads are new");
    world.expire().await;
    world.remind().await;
    assert!(to_expire().await.is_nothing(world.now()), "though there is not a single token");
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let token = world.token(alice, 40).await;
    for (day, lead_days) in [(9, None), (10, Some(30)), (11, None), (33, Some(7)), (38, None), (39, Some(1))] {
        world.on_day(day);
        let due = to_remind().await;
        assert_eq!(due.crossed, lead_days.map(lead).into_iter().collect(), "day {day}");
        assert_eq!(due.is_nothing(&leads, world.now()), lead_days.is_none(), "day {day}");
        assert_eq!(world.remind().await.pending, u64::from(lead_days.is_some()), "day {day}");
    }
    assert!(to_remind().await.has_others(&[lead(30), lead(7)]), "a lead that was dropped");
    assert!(!to_remind().await.is_nothing(&[lead(60), lead(30), lead(7), lead(1)], world.now()), "one that is new");

    world.on_day(40);
    assert!(to_expire().await.crossed);
    assert_eq!(world.expire().await.tokens, 1);
    assert!(to_expire().await.is_nothing(world.now()));
    // What comes in late lies behind the watermark, and is marked.
    world.imported(alice, dawn() - days(10), dawn() + days(1)).await;
    world.imported(alice, dawn() - days(10), dawn() + days(41)).await;
    let (expire, remind) = (to_expire().await, to_remind().await);
    assert!(expire.marked && !expire.crossed && remind.marked, "{expire:?} {remind:?}");
    world.expire().await;
    world.remind().await;

    let keep = purge::Retention { reminders: days(100), messages: days(100), ended_tokens: days(100) };
    for (day, due) in [(100, false), (141, true)] {
        let cutoffs = keep.cutoffs(world.on_day(day));
        world.backend.execute("DELETE FROM guard_counts").await;
        assert_eq!(world.store.to_purge(cutoffs).await.expect("a read"), due, "day {day}");
    }
    // A clock that goes back: tokens that ended too early, and watermarks that lie ahead.
    world.on_day(20);
    let (expire, remind) = (to_expire().await, to_remind().await);
    assert!(expire.too_early && expire.is_ahead(world.now()), "{expire:?}");
    assert!(!remind.is_nothing(&leads, world.now()) && remind.known(lead(7), world.now()).is_none(), "{remind:?}");
    world.expire().await;
    assert_eq!(world.get(token).await.status, Status::Active);
    world.remind().await;
}

async fn a_pass_over_respects_the_lease<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    world.token(alice, 1).await;
    let other = world.backend.open().await;
    let (job, second) = (expire::NAME, Uuid::from_u128(2));
    let pass_over = async |holder| other.pass_over(job, holder, world.now(), "nothing").await.expect("a write");
    assert!(pass_over(second).await, "nobody was ever at it");
    let now = world.on_day(1);
    let stalled = world.lease(job).await;
    assert!(!pass_over(second).await, "another process is at it");
    world.clock.advance(TimeDelta::minutes(3));
    assert!(pass_over(second).await, "its lease has ended");
    let records = other.job_records().await.expect("a read");
    let record = records.iter().find(|record| record.name == job).expect("a record");
    assert_eq!((record.started_at, record.finished_at), (world.now(), Some(world.now())));
    assert_eq!((record.report.as_deref(), record.error.as_deref()), (Some("nothing"), None));
    let lost = expire::step(&world.store, &stalled, &world.rules, now).await;
    assert!(matches!(lost, Err(Error::LostLease("expire"))), "{lost:?}");
    assert!(world.store.lease(job, world.process, world.now()).await.expect("a read").is_some(), "it was given back");
}

async fn an_edit_in_between_wins<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let prolonged = world.token(alice, 1).await;
    let marked = world.imported(alice, dawn() - days(100), dawn() + days(20)).await;
    let other = world.backend.open().await;

    // `remind` reads the marked token, then somebody moves its deadline, then `remind` writes.
    let lease = world.lease(remind::NAME).await;
    let page = world.store.unplanned(world.now(), 10).await.expect("a page");
    assert_eq!(page.iter().map(|token| token.id).collect::<Vec<_>>(), [marked]);
    let now = world.now();
    let edit = change::Edit { expires_at: Some(Some(dawn() + days(10))), ..Default::default() };
    other.change_token(marked, |token| change::edit(token, &edit, now)).await.expect("an edit");
    world.backend.execute("UPDATE tokens SET unplanned = (1 = 1) WHERE generation = 1").await;
    let decided = Decided { now, looked_at: &page, reminders: Vec::new(), may_open: None };
    world.store.plan(&lease, decided, Progress::Planned).await.expect("a write");
    assert!(world.get(marked).await.unplanned, "the mark of the new deadline stays");

    // `expire` reads the other, then its deadline is moved, then `expire` writes.
    let now = world.on_day(1);
    let lease = world.lease(expire::NAME).await;
    let page = world.store.crossing(Lead::EXPIRED, Watermark::after(dawn()), now, 10).await.expect("a page");
    assert_eq!(page.iter().map(|token| token.id).collect::<Vec<_>>(), [prolonged]);
    let before = now - TimeDelta::seconds(1);
    let edit = change::Edit { expires_at: Some(Some(now + days(30))), ..Default::default() };
    other.change_token(prolonged, |token| change::edit(token, &edit, before)).await.expect("an edit");
    let decided = Decided { now, looked_at: &page, reminders: Vec::new(), may_open: None };
    assert_eq!(world.store.expire(&lease, decided, None).await.expect("a write").tokens, 0);
    assert_eq!(world.get(prolonged).await.status, Status::Active);
}

async fn purge_keeps_what_is_needed<B: Backend>() {
    use lapsed::jobs::purge::{Retention, step};
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let gone = world.imported(alice, dawn() - days(400), dawn() - days(300)).await;
    let kept = world.token(alice, 30).await;
    world.expire().await;
    world.on_day(30);
    world.expire().await;
    let keep = Retention { reminders: days(100), messages: days(100), ended_tokens: days(100) };
    let lease = world.lease("purge").await;
    let purged = step(&world.store, &lease, keep, world.now()).await.expect("a step").did;
    assert_eq!((purged.reminders, purged.tokens), (1, 1));
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM tokens").await, 1);
    assert_eq!(world.ledger(kept).await, ["0: expired pending to alice@example.org"]);
    assert!(world.ledger(gone).await.is_empty());
    world.check().await;
}

async fn no_instant_is_kept_that_cannot_be_read_back<B: Backend>() {
    let world = World::<B>::new().await;
    let alice = world.owner("alice", &["alice@example.org"]).await;
    let far = Timestamp::MAX_UTC;
    let spoil: [fn(&mut Token, Timestamp); 5] = [
        |token, far| token.created_at = far,
        |token, far| token.expires_at = Some(far),
        |token, far| token.deadline_set_at = far,
        |token, far| token.last_used_at = Some(far),
        |token, far| token.ended_at = Some(far),
    ];
    for (n, spoil) in spoil.into_iter().enumerate() {
        let (mut token, secret) = new_token(alice, dawn(), None, dawn());
        spoil(&mut token, far);
        let refused = world.store.add_token(&token, Some(&secret.hash())).await;
        assert!(matches!(refused, Err(Error::Database(_))), "{n}: {refused:?}");
    }
}

/// A watermark is a pair: thousands of tokens may share its instant.
#[test]
fn watermarks_are_ordered_by_instant_and_token() {
    let first = Watermark { instant: dawn(), token: Uuid::from_u128(1) };
    assert!(first < Watermark { instant: dawn(), token: Uuid::from_u128(2) });
    assert!(first < Watermark::after(dawn()));
    assert!(Watermark::after(dawn()) < Watermark { instant: dawn() + TimeDelta::seconds(1), token: Uuid::nil() });
}
