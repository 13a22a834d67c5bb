//! The store: what is remembered, and the only code that speaks SQL.
//!
//! Methods are whole operations: each is one transaction, or a plain read, and no transaction type leaks upward.
//! A method that writes repeats the conditions that its caller decided on, so an edit in between wins. What several
//! processes do at once names one bucket; what one leased process does may read across buckets, and writes only while
//! it holds its lease ([`jobs::Lease`]).
//!
//! Guaranteed at every commit: a `pending` reminder has an `open` or `held` message of its contact, or belongs to one
//! that is `sending` or in `retry`. A process that dies at any point leaves a state from which any other goes on.
//!
//! There are two back ends, [`Sqlite`] and [`Postgres`], with one conformance suite for both.

pub mod accounts;
mod backup;
pub mod bounces;
mod common_messages;
mod common_owners;
mod common_planning;
mod common_rows;
mod common_tokens;
pub mod copy;
pub mod corrections;
pub mod due;
mod error;
pub mod foresight;
pub mod guards;
mod indexes;
pub mod imports;
pub mod jobs;
pub mod messages;
mod migrations;
pub(crate) mod needed;
pub mod outbox;
pub mod planning;
mod postgres;
pub mod purging;
pub mod recipients;
pub mod reports;
mod row;
mod sqlite;

use std::future::Future;
use std::time::Duration;

use chrono::{DateTime, Utc};

pub use accounts::Accounts;
pub use backup::Backup;
pub use bounces::Bounces;
pub use corrections::Corrections;
pub use due::Due;
pub use error::Error;
pub use foresight::Foresight;
pub use guards::Guards;
pub use imports::Imports;
pub use indexes::Indexes;
pub use jobs::Jobs;
pub use messages::Messages;
pub use outbox::Outbox;
pub use planning::Planning;
pub use postgres::Postgres;
pub use purging::Purging;
pub use recipients::Recipients;
pub use reports::Reports;
pub use sqlite::Sqlite;

/// What every method answers.
pub type Result<T> = std::result::Result<T, Error>;

/// A store of tokens, reminders and messages. Cheap to clone; clones share their connections.
pub trait Store:
    Accounts
    + Imports
    + Due
    + Planning
    + Guards
    + Recipients
    + Purging
    + Corrections
    + Outbox
    + Bounces
    + Messages
    + Reports
    + Foresight
    + Jobs
    + Clone
    + Send
    + Sync
    + 'static
{
    /// How many tokens a planning step looks at, and how many rows of a list are imported at once. Larger batches are faster, and lock what they write for longer.
    const BATCH: u32;

    /// In how many parts, each of other buckets, a batch of an import is written at once.
    const PARTS: usize;

    /// Whether a claim or a record may be about several buckets: it is one transaction, which must be one shard's where there
    /// are shards.
    const SPANS_BUCKETS: bool;

    /// How long a pass leaves the store alone after each step.
    const GAP: Duration;

    /// What the store's own clock says; `None` where it is the host's.
    ///
    /// # Errors
    /// When the store cannot be asked.
    fn clock_reading(&self) -> impl Future<Output = Result<Option<DateTime<Utc>>>> + Send;

    /// Which database it is, in which version, and up to which migration its schema has been brought.
    ///
    /// # Errors
    /// When the store cannot be asked.
    fn description(&self) -> impl Future<Output = Result<String>> + Send;

    /// Whether the indexes are there that the jobs rely on, and are used.
    ///
    /// # Errors
    /// When the store cannot be asked.
    fn indexes(&self) -> impl Future<Output = Result<Indexes>> + Send;

    /// Keeps the store small and its planner informed, as far as it does not do so by itself. Waits for nobody: what cannot
    /// be done now is done another time.
    ///
    /// # Errors
    /// When the store fails.
    fn maintain(&self) -> impl Future<Output = Result<()>> + Send;

    /// Gives back what working took in memory.
    ///
    /// # Errors
    /// When the store fails: nothing is lost.
    fn rest(&self) -> impl Future<Output = Result<()>> + Send;

    /// Closes all connections.
    fn close(&self) -> impl Future<Output = ()> + Send;
}

/// The last migration that a database has had.
const LAST_MIGRATION: &str = "SELECT version FROM _sqlx_migrations WHERE success ORDER BY version DESC LIMIT 1";

/// Whether a database that was asked for [`LAST_MIGRATION`] can be used as it is.
fn up_to_date(migrations: &sqlx::migrate::Migrator, applied: Option<(i64,)>) -> Result<()> {
    let ours = migrations.iter().map(|migration| migration.version).max().unwrap_or_default();
    match applied {
        Some((applied,)) if applied == ours => Ok(()),
        Some((applied,)) if applied > ours => {
            Err(migration_error(sqlx::migrate::MigrateError::VersionMissing(applied)))
        }
        Some((applied,)) => Err(Error::Open(format!(
            "the store has migration {applied}, and this version of lapsed needs {ours}: the next command that writes brings \
             it up to date"
        ))),
        None => Err(Error::Open("the store is empty: the next command that writes makes its tables".to_owned())),
    }
}

fn migration_error(error: sqlx::migrate::MigrateError) -> Error {
    use sqlx::migrate::MigrateError as M;
    match error {
        M::Execute(error) => error.into(),
        M::VersionMissing(version) => Error::Open(format!(
            "the database has migration {version}, which this version of lapsed does not know: it was last used by a \
             newer one; install that, or restore a backup made before it"
        )),
        M::VersionMismatch(version) => Error::Open(format!(
            "migration {version} of the database is not the one in this program: the schema was changed by another build"
        )),
        M::Dirty(version) => {
            Error::Open(format!("migration {version} of the database stopped half-way; restore a backup and try again"))
        }
        other => Error::Open(format!("the database cannot be brought up to date: {other}")),
    }
}
