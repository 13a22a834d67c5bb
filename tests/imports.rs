//! Importing lists of tokens that live elsewhere, on each back end: again and again, and with every kind of change.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::world::{World, at, dawn, days, tokens};
use chrono::TimeDelta;
use lapsed::expires::Expires;
use lapsed::jobs::purge::{self, Retention};
use lapsed::store::Imports;
use lapsed::store::imports::{ImportRow, ImportRun, RowOutcome, Unseen};
use lapsed::token::{Bucket, Status};
use uuid::Uuid;

on_every_back_end!(
    a_second_import_changes_nothing,
    what_is_due_is_reminded_of_at_once,
    a_token_renewed_elsewhere_is_active_again,
    what_a_complete_list_no_longer_has_is_ended,
    another_source_is_not_overwritten,
    what_ended_too_long_ago_is_left_out,
    what_cannot_have_been_yet_is_refused,
    who_was_made_after_its_end_is_told_of_everything,
    owners_without_a_contact_are_counted,
    strictly_is_all_or_nothing,
);

fn row(owner: &str, external_id: &str, expires_in: i64) -> ImportRow {
    ImportRow {
        owner_key: owner.into(),
        time_zone: None,
        addresses: vec![at(&format!("{owner}@example.org"))],
        watchers: Vec::new(),
        external_id: external_id.into(),
        description: format!("token {external_id}"),
        created_at: Some(dawn() - days(300)),
        expires: Expires::At(dawn() + days(expires_in)),
        last_used_at: None,
        revoked_at: None,
    }
}

fn run_of<B: Backend>(world: &World<B>, source: &str) -> ImportRun {
    let (now, ended_before) = (world.now(), world.now() - days(400));
    ImportRun { id: Uuid::new_v4(), source: source.into(), now, ended_before }
}

async fn import<B: Backend>(world: &World<B>, rows: &[ImportRow]) -> (ImportRun, Vec<RowOutcome>) {
    let run = run_of(world, "forge");
    let outcomes = world.store.import(&run, rows).await.expect("an import");
    world.check().await;
    (run, outcomes)
}

/// Status, generation and whole days after dawn of the deadline, by external id.
async fn watched<B: Backend>(world: &World<B>) -> BTreeMap<String, (Status, i32, i64)> {
    let tokens = tokens(&world.store, None).await;
    tokens
        .into_iter()
        .map(|token| {
            assert!(!token.issued && token.hint.is_none());
            let deadline = token.expires_at.map_or(-1, |at| (at - dawn()).num_days());
            (token.external_id.expect("imported"), (token.status, token.generation, deadline))
        })
        .collect()
}

async fn a_second_import_changes_nothing<B: Backend>() {
    use RowOutcome::{Added, Refused, Unchanged, Updated};
    let world = World::<B>::new().await;
    let mut rows = vec![row("alice", "1", 90), row("alice", "2", 90), row("bob", "1", 90), row("alice", "1", 50)];
    let (_, outcomes) = import(&world, &rows).await;
    assert_eq!(outcomes[..3], [Added, Added, Added]);
    assert!(matches!(&outcomes[3], Refused(problem) if problem.contains("twice")), "{outcomes:?}");
    rows.pop();
    let before = watched(&world).await;
    assert_eq!(import(&world, &rows).await.1, [Unchanged, Unchanged, Unchanged]);
    assert_eq!(watched(&world).await, before);
    rows[1].description = "another".into();
    rows[2].expires = Expires::At(dawn() + days(120));
    assert_eq!(import(&world, &rows).await.1, [Unchanged, Updated, Updated]);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM owners").await, 2);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM contacts").await, 2);
    // The same row in two batches of one run.
    let run = run_of(&world, "forge");
    assert_eq!(world.store.import(&run, &rows[..1]).await.expect("an import"), [Unchanged]);
    let again = world.store.import(&run, &rows[..1]).await.expect("an import");
    assert!(matches!(&again[0], Refused(problem) if problem.contains("twice")), "{again:?}");
}

async fn what_is_due_is_reminded_of_at_once<B: Backend>() {
    let world = World::<B>::new().await;
    world.remind().await;
    let rows = [row("alice", "far", 90), row("alice", "near", 5), row("alice", "past", -1), row("alice", "old", -90)];
    import(&world, &rows).await;
    world.remind().await;
    world.expire().await;
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    let mails = courier.memory.delivered();
    assert_eq!(mails.len(), 1, "one digest");
    let text = String::from_utf8_lossy(&mails[0].1.bytes).into_owned();
    assert!(text.contains("token near") && text.contains("token past"), "{text}");
    assert!(!text.contains("token far") && !text.contains("token old"), "{text}");
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM reminders WHERE state = 'sent'").await, 2);
}

async fn a_token_renewed_elsewhere_is_active_again<B: Backend>() {
    let world = World::<B>::new().await;
    let mut rows = [row("alice", "1", 10), row("alice", "2", 95)];
    rows[1].revoked_at = Some(dawn() - days(1));
    import(&world, &rows).await;
    world.on_day(11);
    world.expire().await;
    assert_eq!(watched(&world).await["1"], (Status::Expired, 0, 10));
    assert_eq!(watched(&world).await["2"].0, Status::Revoked);
    rows[0].expires = Expires::At(dawn() + days(100));
    rows[1].revoked_at = None;
    assert_eq!(import(&world, &rows).await.1, [RowOutcome::Updated, RowOutcome::Updated]);
    assert_eq!(watched(&world).await["1"], (Status::Active, 1, 100));
    assert_eq!(watched(&world).await["2"], (Status::Active, 1, 95));
    world.on_day(100);
    assert_eq!(world.expire().await.pending, 2, "both ends are told");
}

async fn what_cannot_have_been_yet_is_refused<B: Backend>() {
    let world = World::<B>::new().await;
    for (hours, refused) in [(23, false), (25, true)] {
        let ahead = Some(dawn() + TimeDelta::hours(hours));
        let rows = [
            ImportRow { created_at: ahead, ..row("alice", &format!("created {hours}"), 90) },
            ImportRow { last_used_at: ahead, ..row("alice", &format!("used {hours}"), 90) },
            ImportRow { revoked_at: ahead, ..row("alice", &format!("revoked {hours}"), 90) },
        ];
        let (_, outcomes) = import(&world, &rows).await;
        for (outcome, column) in outcomes.iter().zip(["created_at", "last_used_at", "revoked_at"]) {
            match outcome {
                RowOutcome::Refused(problem) => {
                    assert!(
                        refused && problem.starts_with(column) && problem.contains("lies in the future"),
                        "{problem}"
                    );
                }
                other => assert!(!refused && *other == RowOutcome::Added, "{column}: {other:?}"),
            }
        }
    }
    assert_eq!(watched(&world).await.len(), 3);
}

/// Its list is wrong about when it was made, so nobody knows its lifetime.
async fn who_was_made_after_its_end_is_told_of_everything<B: Backend>() {
    let world = World::<B>::new().await;
    let (made, ends) = (dawn() + TimeDelta::hours(18), dawn() + TimeDelta::hours(12));
    let wrong = ImportRow { created_at: Some(made), expires: Expires::At(ends), ..row("alice", "wrong", 0) };
    let short = ImportRow { created_at: Some(dawn()), expires: Expires::At(ends), ..row("bob", "short", 0) };
    assert_eq!(import(&world, &[wrong, short]).await.1, [RowOutcome::Added, RowOutcome::Added]);
    assert_eq!(world.remind().await.opened, 1, "bob's lives for less than the lead time");
    let told = "SELECT COUNT(*) FROM messages m JOIN contacts c ON c.bucket = m.bucket AND c.id = m.contact_id \
                WHERE c.address = 'alice@example.org'";
    assert_eq!(world.backend.count(told).await, 1);
}

async fn what_a_complete_list_no_longer_has_is_ended<B: Backend>() {
    let world = World::<B>::new().await;
    let rows: Vec<ImportRow> = (0..20).map(|n| row("alice", &n.to_string(), 90)).collect();
    import(&world, &rows).await;
    let (run, _) = import(&world, &rows[1..]).await;
    assert_eq!(world.store.unseen(&run).await.expect("a read"), Unseen { active: 20, unseen: 1 });
    let mut ended = 0;
    for bucket in 0..=u8::MAX {
        ended += world.store.end_unseen(&run, Bucket::from_number(bucket)).await.expect("a write");
    }
    assert_eq!(ended, 1);
    assert_eq!(watched(&world).await["0"].0, Status::Revoked);
    assert_eq!(watched(&world).await["1"].0, Status::Active);
    import(&world, &rows).await;
    assert_eq!(watched(&world).await["0"].0, Status::Active, "it is back on the list");
}

async fn another_source_is_not_overwritten<B: Backend>() {
    let world = World::<B>::new().await;
    import(&world, &[row("alice", "1", 90)]).await;
    let run = run_of(&world, "cloud");
    let outcomes = world.store.import(&run, &[row("alice", "1", 10)]).await.expect("an import");
    assert!(matches!(&outcomes[0], RowOutcome::Refused(problem) if problem.contains("\"forge\"")), "{outcomes:?}");
    assert_eq!(watched(&world).await["1"], (Status::Active, 0, 90));
}

async fn what_ended_too_long_ago_is_left_out<B: Backend>() {
    use RowOutcome::{Added, LongEnded, Unchanged, Updated};
    let world = World::<B>::new().await;
    let mut rows = vec![row("old", "1", -401), row("alice", "2", -399), row("old", "3", 90), row("old", "4", 0)];
    rows[2].revoked_at = Some(dawn() - days(401));
    rows[3].expires = Expires::EndOf((dawn() - days(401)).date_naive());
    assert_eq!(import(&world, &rows).await.1, [LongEnded, Added, LongEnded, LongEnded]);
    // What is left out leaves nothing behind.
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM owners").await, 1);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM contacts").await, 1);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM tokens").await, 1);
    world.expire().await;
    // While a token is here, the list goes on to speak of it; once it was purged, it does not come back.
    world.on_day(2);
    let rows = &mut rows[1..2];
    assert_eq!(import(&world, rows).await.1, [Unchanged]);
    rows[0].description = "told once more".into();
    assert_eq!(import(&world, rows).await.1, [Updated]);
    let keep = Retention { reminders: days(400), messages: days(400), ended_tokens: days(400) };
    let lease = world.lease(purge::NAME).await;
    let purged = purge::step(&world.store, &lease, keep, world.now()).await.expect("a step").did;
    assert_eq!(purged.tokens, 1);
    assert_eq!(import(&world, rows).await.1, [LongEnded]);
    rows[0].expires = Expires::At(dawn() + days(90));
    assert_eq!(import(&world, rows).await.1, [Added], "it was renewed");
}

async fn owners_without_a_contact_are_counted<B: Backend>() {
    let world = World::<B>::new().await;
    let mut rows = [row("alice", "1", 90), row("bob", "1", 90), row("bob", "2", 90), row("carol", "1", 90)];
    for row in &mut rows[1..] {
        row.addresses.clear();
    }
    rows[3].revoked_at = Some(dawn());
    let (run, _) = import(&world, &rows).await;
    let count = async |run: &ImportRun| world.store.owners_without_contact(run).await.expect("a count");
    assert_eq!(count(&run).await, 1, "bob; and nobody need be told of carol's");
    let (run, _) = import(&world, &rows[..1]).await;
    assert_eq!(count(&run).await, 0, "bob is not in this list");
    rows[1].addresses = vec![at("bob@example.org")];
    let (run, _) = import(&world, &rows).await;
    assert_eq!(count(&run).await, 0);
}

/// Two batches, the second with a row that stands there twice.
struct Batches {
    left: Vec<Vec<ImportRow>>,
    clean: bool,
}

impl lapsed::store::imports::Feed for Batches {
    async fn next(&mut self) -> Option<Vec<ImportRow>> {
        self.left.pop()
    }

    fn answer(&mut self, outcomes: Vec<RowOutcome>) {
        self.clean &= !outcomes.iter().any(|outcome| matches!(outcome, RowOutcome::Refused(_)));
    }

    fn is_clean(&self) -> bool {
        self.clean
    }
}

async fn strictly_is_all_or_nothing<B: Backend>() {
    let world = World::<B>::new().await;
    let run = run_of(&world, "forge");
    let mut bad = Batches { left: vec![vec![row("alice", "1", 90)], vec![row("alice", "1", 90)]], clean: true };
    assert!(!world.store.import_strictly(&run, &mut bad).await.expect("an answer"));
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM tokens").await, 0);
    assert_eq!(world.backend.count("SELECT COUNT(*) FROM owners").await, 0);
    let mut good = Batches { left: vec![vec![row("alice", "1", 90)], vec![row("alice", "2", 90)]], clean: true };
    assert!(world.store.import_strictly(&run, &mut good).await.expect("an answer"));
    assert_eq!(watched(&world).await.len(), 2);
}

/// 100,000 rows with random mistakes, twice, against a naive account of what must be there.
#[test]
fn a_large_list_with_mistakes_agrees_with_a_model() {
    const ROWS: u32 = 100_000;
    let mut seed = 42_u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let mut model: BTreeSet<(u64, u64)> = BTreeSet::new();
    let mut text = String::from("owner,emails,description,expires_at,external_id\n");
    let mut mistakes = Vec::new();
    for n in 0..ROWS {
        let (owner, id, day) = (random(5_000), random(2_000), 1 + random(28));
        let (mut email, mut date) = (format!("o{owner}@example.org"), format!("2099-02-{day:02}"));
        let mut good = true;
        match random(200) {
            0 => (date, good) = ("2099-02-31".into(), false),
            1 => (email, good) = ("nobody".into(), false),
            _ => {}
        }
        // Of two rows for one token the first counts.
        good = good && model.insert((owner, id));
        if !good {
            mistakes.push(n + 2);
        }
        text += &format!("o{owner},{email},token {n},{date},{id}\n");
    }
    let bad = mistakes.len();
    let place = tempfile::TempDir::new().expect("a temporary directory");
    std::fs::write(place.path().join("list.csv"), &text).expect("a file");
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lapsed"));
        let output = command.args(arguments).current_dir(&place).output().expect("the program runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    for round in 0..2 {
        let (status, stdout, stderr) = run(&["token", "import", "list.csv"]);
        assert_eq!(status, Some(1), "{}", stderr.lines().last().unwrap_or_default());
        let (added, unchanged) = if round == 0 { (model.len(), 0) } else { (0, model.len()) };
        let expected =
            format!("rows       {ROWS}\nadded      {added}\nupdated    0\nunchanged  {unchanged}\nbad        {bad}\n");
        assert_eq!(stdout, expected);
        // The first hundred in the order of the list, whoever refused them, and how many more there are.
        let told: Vec<&str> = stderr.lines().collect();
        let line = |told: &&str| told.strip_prefix("line ")?.split_once(':')?.0.parse::<u32>().ok();
        let lines: Vec<u32> = told.iter().map_while(line).collect();
        assert_eq!(lines, mistakes[..100]);
        let more = format!("... and {} more; put these right, and import the list again to see the next", bad - 100);
        assert_eq!(told[100..], [more, format!("lapsed: {bad} bad rows in list.csv")]);
    }
    let (_, list, _) = run(&["token", "list"]);
    assert_eq!(list.lines().count(), model.len() + 1);
}
