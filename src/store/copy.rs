//! Moves everything from a SQLite store to PostgreSQL.
//!
//! Guarantees that nothing is written to the SQLite file, and that nobody else writes to it meanwhile; that a copy which was
//! interrupted goes on where it was when it is repeated; and that a copy which ends well holds each row of each table, as
//! counts and checksums by bucket have shown. Rows keep their ids and buckets. Relies on both schemas having the same tables
//! and columns: what they are is read from the databases, so that a migration needs no change here.
//!
//! Rows travel as texts, column by column, in one form for both databases. They are written in the order of the primary key, a
//! transaction at a time, so that the last key in the target tells how far a copy had come. A row of `jobs` says whose copy the
//! target is.

mod tables;

use std::ops::AddAssign;

use chrono::TimeDelta;
use futures_util::TryStreamExt;
use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, ColumnIndex, Database, Decode, Row, Sqlite as Lite, Transaction, Type};
use twox_hash::XxHash3_64;
use uuid::Uuid;

use super::row::At;
use super::{Error, Postgres, Result, Sqlite};
use crate::clock::Timestamp;
use tables::Table;

/// How many rows a transaction writes.
const BATCH: usize = 2_000;

/// The row of `jobs` that says whose copy this is.
const JOB: &str = "copy";

/// A job that ran so short a time ago was likely started by a daemon, which will start it again.
const RECENT: TimeDelta = TimeDelta::seconds(10);

/// How far a copy has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// What is done: `"copying"` or `"comparing"`.
    pub what: &'static str,
    /// With which table.
    pub table: &'a str,
    /// Rows of all tables that this has been done with.
    pub done: u64,
    /// Rows of all tables.
    pub all: u64,
}

/// What a copy did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Rows of each table.
    pub tables: Vec<(String, u64)>,
    /// Rows that were there already, from a copy that was interrupted.
    pub found: u64,
}

/// Copies everything, and compares.
///
/// # Errors
/// When a daemon is at work on the source; when the target holds something that is not a part of this copy; when what was
/// copied differs from the source; and when a database fails. Repeat it then: it goes on.
pub async fn copy(
    from: &Sqlite,
    to: &Postgres,
    now: Timestamp,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<Copied> {
    // Held to the end: nobody else writes.
    let mut source = from.begin().await?;
    refuse_beside_a_daemon(&mut source, now).await?;
    let tables = tables::read(&mut source, to).await?;
    let identity = identity(&mut source).await?;
    let finished = claim(to, &tables, identity, now).await?;

    let mut counts = Vec::new();
    for table in &tables {
        counts.push(table.count(&mut source).await?);
    }
    let all = counts.iter().sum();
    let mut copied = Copied::default();
    let mut done = 0;
    for (table, count) in tables.iter().zip(&counts).filter(|_| finished.is_none()) {
        let before = done;
        let tell = |rows| progress(Progress { what: "copying", table: &table.name, done: before + rows, all });
        copied.found += copy_table(&mut source, to, table, tell).await?;
        done += count;
    }
    let mut done = 0;
    for (table, count) in tables.iter().zip(counts) {
        progress(Progress { what: "comparing", table: &table.name, done, all });
        compare(&mut source, to, table, finished).await?;
        done += count;
        copied.tables.push((table.name.clone(), count));
    }
    if finished.is_none() {
        finish(to, &tables, now).await?;
    }
    Ok(copied)
}

async fn refuse_beside_a_daemon(source: &mut Transaction<'static, Lite>, now: Timestamp) -> Result<()> {
    let leased: Option<(String,)> = sqlx::query_as("SELECT name FROM jobs WHERE lease_until > $1 LIMIT 1")
        .bind(At(now))
        .fetch_optional(&mut **source)
        .await?;
    let sending: Option<(i64,)> =
        sqlx::query_as("SELECT 1 FROM messages WHERE state = 'sending' AND not_before > $1 LIMIT 1")
            .bind(At(now))
            .fetch_optional(&mut **source)
            .await?;
    let why = match (leased, sending) {
        (Some((job,)), _) => format!("a daemon has the lease of the job {job}"),
        (None, Some(_)) => "a daemon is sending a message".to_owned(),
        (None, None) => {
            let recent: Option<(String,)> =
                sqlx::query_as("SELECT name FROM jobs WHERE COALESCE(finished_at, started_at) > $1 LIMIT 1")
                    .bind(At(now - RECENT))
                    .fetch_optional(&mut **source)
                    .await?;
            let Some((job,)) = recent else { return Ok(()) };
            format!("the job {job} ran less than {} seconds ago", RECENT.num_seconds())
        }
    };
    Err(Error::Open(format!(
        "{why}: stop every daemon on this store, and repeat this in a moment (leases of one that was killed end after 5 \
         minutes)"
    )))
}

/// What tells this store from any other.
async fn identity(source: &mut Transaction<'static, Lite>) -> Result<Uuid> {
    let (made,): (String,) =
        sqlx::query_as("SELECT CAST(installed_on AS TEXT) FROM _sqlx_migrations ORDER BY version LIMIT 1")
            .fetch_one(&mut **source)
            .await?;
    let (first,): (Option<String>,) =
        sqlx::query_as("SELECT MIN(HEX(id)) FROM owners").fetch_one(&mut **source).await?;
    let digest = Sha256::digest(format!("{made} {}", first.unwrap_or_default()));
    let bytes: [u8; 16] = std::array::from_fn(|i| digest[i]);
    Ok(Uuid::from_bytes(bytes))
}

/// Makes the target ours, if it is empty or was before; when a copy was finished, if one was.
async fn claim(to: &Postgres, tables: &[Table], identity: Uuid, now: Timestamp) -> Result<Option<Timestamp>> {
    let mut tx = to.begin().await?;
    let known: Option<(Uuid, Option<At>)> =
        sqlx::query_as("SELECT holder, finished_at FROM jobs WHERE bucket = 0 AND name = $1")
            .bind(JOB)
            .fetch_optional(&mut *tx)
            .await?;
    match known {
        Some((holder, finished)) if holder == identity => return Ok(finished.map(|at| at.0)),
        Some(_) => {
            return Err(Error::Open("the target holds a copy of another store: give it an empty database".to_owned()));
        }
        None => {}
    }
    for table in tables {
        let sql = format!("SELECT EXISTS (SELECT 1 FROM {})", table.name);
        let (any,): (bool,) = sqlx::query_as(AssertSqlSafe(sql)).fetch_one(&mut *tx).await?;
        if any {
            return Err(Error::Open(format!(
                "the target is not empty: its table {} holds rows that this store did not put there; give it an empty database",
                table.name
            )));
        }
    }
    sqlx::query(
        "INSERT INTO jobs (bucket, name, holder, epoch, lease_until, started_at, report) \
         VALUES (0, $1, $2, 0, $3, $3, 'copying, or interrupted: repeat it')",
    )
    .bind(JOB)
    .bind(identity)
    .bind(At(now))
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(None)
}

/// Returns how many rows had been there before.
async fn copy_table(
    source: &mut Transaction<'static, Lite>,
    to: &Postgres,
    table: &Table,
    mut tell: impl FnMut(u64),
) -> Result<u64> {
    let insert = table.insert();
    let mut last = table.last_in_target(to).await?;
    let found = match &last {
        Some(_) => table.count_in_target(to).await?,
        None => 0,
    };
    let mut done = found;
    tell(done);
    loop {
        let sql = table.page(last.is_some(), BATCH);
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for part in last.iter().flatten() {
            query = query.bind(part.clone());
        }
        let rows = query.fetch_all(&mut **source).await?;
        let mut columns: Vec<Vec<Option<String>>> = vec![Vec::with_capacity(rows.len()); table.columns.len()];
        for row in &rows {
            for (i, column) in columns.iter_mut().enumerate() {
                column.push(row.try_get(i)?);
            }
        }
        let Some(end) = rows.len().checked_sub(1) else { return Ok(found) };
        let key = table.key.iter().map(|at| columns.get(*at).and_then(|column| column.get(end)).cloned().flatten());
        last = key.collect();
        let mut tx = to.begin().await?;
        let mut query = sqlx::query(AssertSqlSafe(insert.clone()));
        for column in columns {
            query = query.bind(column);
        }
        query.execute(&mut *tx).await?;
        tx.commit().await?;
        done += rows.len() as u64;
        tell(done);
    }
}

/// How many rows a bucket has, and the sum of their hashes, whose order means nothing.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Sum {
    rows: u64,
    hashes: u64,
}

impl AddAssign<u64> for Sum {
    fn add_assign(&mut self, hash: u64) {
        self.rows += 1;
        self.hashes = self.hashes.wrapping_add(hash);
    }
}

/// The sums of a table, by bucket.
async fn sums<R>(
    rows: impl futures_util::Stream<Item = sqlx::Result<R>>,
    columns: usize,
    bucket: usize,
) -> Result<Vec<Sum>>
where
    R: Row,
    usize: ColumnIndex<R>,
    for<'d> Option<String>: Decode<'d, R::Database> + Type<R::Database>,
    R::Database: Database,
{
    let mut sums = vec![Sum::default(); 256];
    let mut bytes = Vec::new();
    let mut rows = std::pin::pin!(rows);
    while let Some(row) = rows.try_next().await? {
        bytes.clear();
        let mut place = 0;
        for i in 0..columns {
            let value: Option<String> = row.try_get(i)?;
            match &value {
                Some(text) => {
                    bytes.push(1);
                    bytes.extend(text.len().to_le_bytes());
                    bytes.extend(text.as_bytes());
                }
                None => bytes.push(0),
            }
            if i == bucket {
                place = value.and_then(|text| text.parse().ok()).unwrap_or(0);
            }
        }
        if let Some(sum) = sums.get_mut(place) {
            *sum += XxHash3_64::oneshot(&bytes);
        }
    }
    Ok(sums)
}

async fn compare(
    source: &mut Transaction<'static, Lite>,
    to: &Postgres,
    table: &Table,
    finished: Option<Timestamp>,
) -> Result<()> {
    let (columns, bucket) = (table.columns.len(), table.bucket);
    let here = sqlx::query(AssertSqlSafe(table.all_here())).fetch(&mut **source);
    let here = sums(here, columns, bucket).await?;
    let mut tx = to.begin_long_read().await?;
    let there = sums(sqlx::query(AssertSqlSafe(table.all_there())).fetch(&mut *tx), columns, bucket).await?;
    let Some(differs) = here.iter().zip(&there).position(|(here, there)| here != there) else { return Ok(()) };
    let rows = |sums: &[Sum]| sums.iter().map(|sum| sum.rows).sum::<u64>();
    let why = match finished {
        Some(at) => {
            format!("the copy was finished at {}, and one of the stores has been used since", at.format("%FT%TZ"))
        }
        None => {
            "the store was used while the copy was interrupted, or the target by somebody else: begin again with an \
                 empty database"
                .to_owned()
        }
    };
    Err(Error::Open(format!(
        "the copy differs from the store: table {}, {} rows here and {} there, first in bucket {differs}; {why}",
        table.name,
        rows(&here),
        rows(&there)
    )))
}

async fn finish(to: &Postgres, tables: &[Table], now: Timestamp) -> Result<()> {
    let mut tx = to.begin_long_read().await?;
    for table in tables {
        // What the planner goes by; autovacuum would take a while.
        sqlx::raw_sql(AssertSqlSafe(format!("ANALYZE {}", table.name))).execute(&mut *tx).await?;
    }
    sqlx::query("UPDATE jobs SET finished_at = $2, report = 'copied and compared' WHERE bucket = 0 AND name = $1")
        .bind(JOB)
        .bind(At(now))
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(())
}
