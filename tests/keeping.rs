//! Keeping a store: small, copied while it is in use, and moved to PostgreSQL.

use std::os::unix::fs::PermissionsExt;

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::cli::{Place, fact};
use crate::support::postgres::fresh;
use crate::support::world::{World, days};
use chrono::TimeDelta;
use lapsed::change;
use lapsed::jobs::purge::{self, Retention};
use lapsed::store::copy::{Copied, copy};
use lapsed::store::{Accounts, Error, Jobs, Postgres, Store};
use lapsed::token::{IdRef, Token, TokenId};
use sqlx::{Connection, SqliteConnection};
use tokio_util::sync::CancellationToken;

on_every_back_end!(purging_changes_no_mail);

/// Numbers that look random, and are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    fn day(&mut self, least: i64, below: i64) -> i64 {
        least + i64::try_from(self.below((below - least).unsigned_abs())).expect("small")
    }
}

/// Half a year of some owners: what each day's mails say, with whatever is old enough gone each night, or without.
async fn half_a_year<B: Backend>(seed: u64, keep: Option<Retention>) -> (Vec<String>, u64) {
    let (mut dice, mut world) = (Dice(seed), World::<B>::new().await);
    world.fallback("ops@example.org").await;
    let mut tokens: Vec<TokenId> = Vec::new();
    let mut owners = Vec::new();
    for n in 0..5 {
        let own = format!("o{n}@example.org");
        let contacts: &[&str] = &[&own, "team@example.org"];
        owners.push(world.owner(&format!("o{n}"), if n == 0 { &[] } else { contacts }).await);
    }
    let (mut mails, mut purged) = (Vec::new(), 0);
    for day in (0..180).step_by(3) {
        world.on_day(day);
        for _ in 0..dice.below(3) {
            let owner = owners[usize::try_from(dice.below(5)).expect("an index")];
            tokens.push(world.token(owner, dice.day(1, 60)).await);
        }
        if let Some(token) = tokens.get(usize::try_from(dice.below(40)).expect("an index")).copied() {
            let (now, to) = (world.now(), world.now() + days(dice.day(1, 50)));
            let rotates = dice.below(2) == 0;
            // The purged one is long expired: neither can be done to it in the other world either.
            let exists = world.store.find_tokens(&IdRef::Whole(token.uuid())).await.expect("a read");
            let is_active = |token: &Token| token.replaced_by.is_none() && token.expires_at.is_some_and(|at| at > now);
            if exists.first().is_some_and(is_active) {
                if rotates {
                    let change = |token: &_| change::rotate(token, TimeDelta::zero(), None, now);
                    world.store.change_token(token, change).await.ok();
                } else {
                    world.move_deadline(token, to).await;
                }
            }
        }
        world.expire().await;
        world.remind().await;
        let mut courier = world.courier();
        world.deliver(&mut courier.deliverer).await;
        mails.extend(courier.delivered().into_iter().map(|mail| format!("day {day}: {mail}")));
        let Some(keep) = keep else { continue };
        let lease = world.lease(purge::NAME).await;
        loop {
            let outcome = purge::step(&world.store, &lease, keep, world.now()).await.expect("a step");
            purged += outcome.did.reminders + outcome.did.messages + outcome.did.tokens;
            if !outcome.more {
                break;
            }
        }
        world.store.finish(&lease, world.now(), Ok("done")).await.expect("a write");
        world.check().await;
        world.store.maintain().await.expect("maintenance");
    }
    (mails, purged)
}

/// With the shortest retention that the configuration allows beside leads of 30 days, nobody hears more or less.
async fn purging_changes_no_mail<B: Backend>() {
    let keep = Retention { reminders: days(37), messages: days(1), ended_tokens: days(30) };
    let (kept, purged) = (half_a_year::<B>(3, None).await, half_a_year::<B>(3, Some(keep)).await);
    assert!(kept.0.len() > 40 && purged.1 > 100, "{} mails, {} rows purged", kept.0.len(), purged.1);
    assert_eq!(kept.0, purged.0);
}

/// What is left of the write-ahead log, and what the planner knows.
#[tokio::test]
async fn sqlite_looks_after_itself() {
    let world = World::<OnSqlite>::new().await;
    for n in 0..40 {
        world.owner(&format!("o{n}"), &[&format!("o{n}@example.org")]).await;
    }
    let many = "INSERT INTO contacts (bucket, id, address, created_at) \
         WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 1199) \
         SELECT i % 256, randomblob(16), 'c' || i || '@example.org', 0 FROM n";
    world.backend.execute(many).await;
    let log = world.backend.file().with_extension("db-wal");
    let size = || std::fs::metadata(&log).map(|metadata| metadata.len()).unwrap_or_default();
    assert!(size() > 0);
    // Somebody who reads is not waited for, and sees what was there.
    let mut reader = SqliteConnection::connect(&world.backend.url()).await.expect("the store");
    sqlx::raw_sql("BEGIN; SELECT COUNT(*) FROM owners").execute(&mut reader).await.expect("a read");
    world.owner("last", &[]).await;
    world.store.maintain().await.expect("maintenance");
    let (seen,): (i64,) = sqlx::query_as("SELECT COUNT(*) FROM owners").fetch_one(&mut reader).await.expect("a read");
    assert_eq!(seen, 40);
    sqlx::raw_sql("COMMIT").execute(&mut reader).await.expect("an end");
    world.store.maintain().await.expect("maintenance");
    assert_eq!(size(), 0, "all of it is in the file");
    assert!(world.backend.count(&analysed("contacts")).await > 0);
    assert_eq!(
        world.backend.count(&analysed("owners")).await,
        0,
        "it may grow by a thousand times before it is looked at again"
    );

    // Somebody else analysed it.
    world.backend.execute("ANALYZE").await;
    assert!(world.backend.count(&analysed("owners")).await > 0);
    let again = world.backend.open().await;
    assert_eq!(world.backend.count(&analysed("owners")).await, 0);
    assert!(world.backend.count(&analysed("contacts")).await > 0);
    again.close().await;
}

fn analysed(table: &str) -> String {
    format!("SELECT COUNT(*) FROM sqlite_stat1 WHERE tbl = '{table}'")
}

#[tokio::test]
async fn postgresql_is_told_to_vacuum_early() {
    let told = "SELECT COUNT(*) FROM pg_class \
                WHERE relkind = 'r' AND reloptions @> ARRAY['autovacuum_vacuum_scale_factor=0.01'] \
                  AND relname ~ '^(tokens|reminders|messages)'";
    assert_eq!(OnPostgres::make().await.count(told).await, 3);
    assert_eq!(OnPartitions::make().await.count(told).await, 3 * 16);
}

#[tokio::test]
async fn a_backup_is_whole_while_the_store_is_in_use() {
    let place = Place::new();
    place.configure("[mail]\ntransport = \"maildir\"\nfrom = \"a@example.org\"\n[mail.maildir]\npath = \"mail\"\n");
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "CI", "30d");
    let daemon = place.daemon();
    // A transaction that has not ended is not in it, and does not hold it up.
    let mut writer =
        SqliteConnection::connect(&format!("sqlite:{}", place.path("lapsed.db").display())).await.expect("the store");
    sqlx::raw_sql("BEGIN IMMEDIATE; UPDATE tokens SET description = 'changed'")
        .execute(&mut writer)
        .await
        .expect("a write");
    let told = place.line("store backup copy.db").ok();
    assert_eq!(fact(&told, "tokens"), "2");
    sqlx::raw_sql("ROLLBACK").execute(&mut writer).await.expect("an end");
    let again = place.line("store backup copy.db").fails(1);
    assert!(again.contains("copy.db exists already"), "{again}");
    daemon.stop();

    let mode = std::fs::metadata(place.path("copy.db")).expect("the file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut other = Place::with_store(&format!("sqlite:{}", place.path("copy.db").display()));
    assert_eq!(fact(&other.run(["token", "show", &id]).ok(), "description"), "CI");
    assert_eq!(fact(&other.verify(&secret).ok(), "valid"), "yes");
    other.set("LAPSED__STORE__URL", "sqlite:nowhere.db");
    assert!(other.line("store backup x.db").fails(1).contains("there is no store nowhere.db"));
    assert!(!other.path("nowhere.db").exists());
    let gone = place.line("store backup nowhere/copy.db").fails(1);
    assert!(gone.contains("nowhere/copy.db cannot be made"), "{gone}");
    let left = place.files().into_iter().filter(|file| file.to_string_lossy().contains(".lapsed-backup-"));
    assert_eq!(left.count(), 0);

    let database = fresh().await;
    let told = Place::with_store(&database.url).line("store backup x.db").fails(2);
    assert!(told.contains("pg_dump"), "{told}");
}

/// A store with some of everything, at rest.
async fn lively() -> World<OnSqlite> {
    let mut world = World::<OnSqlite>::new().await;
    world.fallback("ops@example.org").await;
    for n in 0..30 {
        let own = format!("o{n}@example.org");
        let contacts: &[&str] = &[&own, "team@example.org"];
        let owner = world.owner(&format!("o{n}"), if n % 7 == 0 { &[] } else { contacts }).await;
        for expires in [1, 8, 20, 90] {
            world.token(owner, expires + n % 3).await;
        }
    }
    world.on_day(2);
    world.expire().await;
    world.remind().await;
    let mut courier = world.courier();
    world.deliver(&mut courier.deliverer).await;
    world.on_day(5);
    world.expire().await;
    world.remind().await;
    world.clock.advance(TimeDelta::minutes(1));
    world
}

/// Copies to this database, interrupted each time after so many steps.
async fn copied(world: &World<OnSqlite>, to: &Postgres, steps: u64) -> (Result<Copied, Error>, u32) {
    for tries in 1..1_000 {
        let (stop, mut left) = (CancellationToken::new(), steps * u64::from(tries));
        let progress = |_: lapsed::store::copy::Progress<'_>| {
            left = left.saturating_sub(1);
            if left == 0 {
                stop.cancel();
            }
        };
        if let Some(done) = stop.run_until_cancelled(copy(&world.store, to, world.now(), progress)).await {
            return (done, tries);
        }
    }
    panic!("a copy does not come to an end");
}

/// What a store holds, as people see it.
async fn contents<B: Backend>(backend: &B) -> Vec<i64> {
    let mut counts = Vec::new();
    for sql in [
        "SELECT COUNT(*) FROM owners",
        "SELECT COUNT(*) FROM contacts",
        "SELECT COUNT(*) FROM owner_contacts",
        "SELECT CAST(SUM(bucket) AS BIGINT) FROM owners",
        "SELECT CAST(SUM(bucket) AS BIGINT) FROM tokens",
        "SELECT COUNT(*) FROM tokens WHERE status = 'expired'",
        "SELECT COUNT(*) FROM tokens WHERE secret_hash IS NOT NULL AND unplanned",
        "SELECT COUNT(*) FROM reminders WHERE state = 'pending'",
        "SELECT COUNT(*) FROM reminders WHERE state = 'sent'",
        "SELECT CAST(SUM(lead) AS BIGINT) FROM reminders",
        "SELECT COUNT(*) FROM messages WHERE state = 'open'",
        "SELECT COUNT(*) FROM messages WHERE state = 'sent'",
        "SELECT COUNT(*) FROM watermarks",
        "SELECT COUNT(*) FROM guard_counts",
        "SELECT COUNT(*) FROM jobs WHERE name <> 'copy'",
    ] {
        counts.push(backend.count(sql).await);
    }
    counts
}

/// Goes on in the new place as it would have in the old one.
async fn a_store_moves<B: Backend<Store = Postgres>>(target: B, steps: u64) {
    let world = lively().await;
    let to = target.open().await;
    let (done, tries) = copied(&world, &to, steps).await;
    let done = done.expect("a copy");
    assert!(steps > 100 || (tries > 1 && done.found > 0), "{tries} tries: {done:?}");
    assert!(done.tables.iter().any(|(table, rows)| table == "tokens" && *rows == 120), "{done:?}");
    assert_eq!(contents(&target).await, contents(&world.backend).await);
    to.close().await;

    let mut moved = World::on(target).await;
    moved.check().await;
    moved.rules.fallback = world.rules.fallback;
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for day in (6..40).step_by(2) {
        world.on_day(day);
        moved.on_day(day);
        world.expire().await;
        moved.expire().await;
        world.remind().await;
        moved.remind().await;
        let (mut old, mut new) = (world.courier(), moved.courier());
        world.deliver(&mut old.deliverer).await;
        moved.deliver(&mut new.deliverer).await;
        here.extend(old.delivered());
        there.extend(new.delivered());
    }
    assert!(here.len() > 50, "{here:?}");
    assert_eq!(here, there);

    // Both have been used since: that is not the same store any more.
    let to = moved.backend.open().await;
    let again = copy(&world.store, &to, world.now() + days(1), |_| ()).await.expect_err("they differ");
    assert!(again.to_string().contains("used since"), "{again}");
}

#[tokio::test]
async fn a_store_moves_to_postgresql_at_once() {
    a_store_moves(OnPostgres::make().await, u64::MAX / 2_000).await;
}

#[tokio::test]
async fn a_store_moves_to_postgresql_in_many_tries() {
    a_store_moves(OnPostgres::make().await, 3).await;
}

#[tokio::test]
async fn a_store_moves_to_a_partitioned_postgresql() {
    a_store_moves(OnPartitions::make().await, 5).await;
}

#[tokio::test]
async fn a_copy_is_refused_where_it_could_lose_something() {
    let world = lively().await;
    let refused =
        async |to: &Postgres, now| copy(&world.store, to, now, |_| ()).await.expect_err("it is refused").to_string();
    // A daemon.
    let empty = OnPostgres::make().await;
    let to = empty.open().await;
    let lease = world.lease("expire").await;
    assert!(refused(&to, world.now()).await.contains("lease of the job expire"));
    world.store.finish(&lease, world.now(), Ok("done")).await.expect("a write");
    let why = refused(&to, world.now()).await;
    assert!(why.contains("the job expire ran less than 10 seconds ago"), "{why}");
    assert_eq!(empty.count("SELECT COUNT(*) FROM jobs").await, 0, "nothing was begun");
    let later = world.now() + TimeDelta::minutes(1);

    // Somebody else's store, and another one's copy.
    let other = World::<OnPostgres>::new().await;
    other.owner("somebody", &[]).await;
    let why = refused(&other.store, later).await;
    assert!(why.contains("not empty: its table owners"), "{why}");
    let second = lively().await;
    copy(&second.store, &to, later, |_| ()).await.expect("a copy");
    let why = refused(&to, later).await;
    assert!(why.contains("copy of another store"), "{why}");
    // One that is whole may be compared again.
    copy(&second.store, &to, later, |_| ()).await.expect("the same");
    // A row that was changed by hand is found.
    empty.execute("UPDATE tokens SET hint = 'x' WHERE id = (SELECT id FROM tokens LIMIT 1)").await;
    let why = copy(&second.store, &to, later, |_| ()).await.expect_err("it differs").to_string();
    assert!(why.contains("table tokens, 120 rows here and 120 there"), "{why}");
}

#[tokio::test]
async fn a_command_moves_a_store() {
    let database = fresh().await;
    let place = Place::new();
    place.configure("[mail]\ntransport = \"maildir\"\nfrom = \"a@example.org\"\n[mail.maildir]\npath = \"mail\"\n");
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "CI", "40d");
    place.line("run --once").ok();
    let early = place.run(["store", "copy", "--to", &database.url]).fails(1);
    assert!(early.contains("stop every daemon"), "{early}");
    // Rather than wait, this lets the run be over for longer.
    let url = format!("sqlite:{}", place.path("lapsed.db").display());
    let mut store = SqliteConnection::connect(&url).await.expect("the store");
    sqlx::query("UPDATE jobs SET started_at = 0, finished_at = 0, lease_until = 0")
        .execute(&mut store)
        .await
        .expect("a write");
    place.write("url", &database.url);
    let told = place.line("store copy --to-file url");
    assert!(told.stderr.contains("Now let store.url name postgres://"), "{told}");
    let (account, _) = database.url.rsplit_once('@').expect("an account");
    let (_, password) = account.rsplit_once(':').expect("a password");
    assert!(!told.stderr.contains(password), "{told}");
    assert_eq!(fact(&told.ok(), "tokens"), "2");

    let moved = Place::with_store(&database.url);
    for list in ["token list --format json", "owner list --format json"] {
        assert_eq!(moved.line(list).ok(), place.line(list).ok());
    }
    assert_eq!(fact(&moved.run(["token", "show", &id]).ok(), "description"), "CI");
    assert_eq!(fact(&moved.verify(&secret).ok(), "valid"), "yes");
    assert!(place.line("store copy --to sqlite:x.db").fails(2).contains("copies go to PostgreSQL"));
    assert!(moved.run(["store", "copy", "--to", &database.url]).fails(2).contains("it is in PostgreSQL already"));
}
