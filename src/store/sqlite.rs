//! SQLite: the embedded default, one file beside the program.
//!
//! Writes go through one connection and begin with `BEGIN IMMEDIATE`, because a transaction that starts by reading and
//! then writes fails at once when another process wrote in between, whatever the busy timeout. `synchronous = FULL`
//! makes a commit survive a power cut. The file is made readable by its owner alone.

mod bounces;
mod corrections;
mod imports;
mod json;
mod ledger;
mod outbox;
mod planning;
mod purging;
mod recipients;

use std::collections::HashSet;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use sqlx::pool::PoolConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, FromRow, Pool, QueryBuilder, SqliteConnection, Transaction};
use uuid::Uuid;

use super::accounts::{
    Accounts, NewContact, OwnerRef, OwnerSummary, ReminderRecord, TokenCounts, TokenFilter, TokenOrder,
};
use super::common_messages::{common_messages, message_query};
use super::common_owners::common_owners;
use super::common_rows::common_rows;
use super::common_tokens::common_tokens;
use super::due::{Due, ToExpire, ToExpireRow, ToRemind, ToRemindRow, due_operations};
use super::guards::{ALERT, COUNTED, Counted, Guards, HELD, Held, HeldRow, guard_operations};
use super::indexes::SERVED;
use super::jobs::{JobRecord, Jobs, LEASE, Lease, RECONCILE, job_operations};
use super::messages::{CarriedRecord, MessageFilter, MessageRecord, Messages, Which};
use super::outbox::{MessageKind, MessageState, WAITING, Waiting};
use super::purging::Cutoffs;
use super::reports::{LedgerRow, Reports, ahead, report_operations};
use super::row::{
    self, AheadRow, At, ContactRow, ContentRow, CountsRow, HistoryRow, JobRow, ListedRow, MessageRow, OwnerRow,
    ReportRow, SummaryRow, TokenRow, TraitsRow, token_columns,
};
use super::{Error, Indexes, Result, Store, migrations};
use crate::change::{Changed, Refused, mark_unplanned};
use crate::clock::Timestamp;
use crate::forecast::Ahead;
use crate::policies::Traits;
use crate::policy::Reason;
use crate::token::{
    Address, Bucket, Contact, ContactId, IdRef, MessageId, Owner, OwnerId, SYSTEM_OWNER_KEY, SecretHash, Status, Token,
    TokenId,
};

/// How long a statement waits for another process's write.
const BUSY: Duration = Duration::from_secs(15);

/// The pages that the writing connection keeps in memory, as SQLite wants it: in KiB below zero. A batch touches each table
/// and index in nearly every bucket; with SQLite's own 2 MiB, its pages are written out and read again before it ends.
const WRITER_CACHE: &str = "-32768";

/// After how many pages of the write-ahead log they go to the file (64 MiB). Consecutive batches touch mostly the same pages,
/// which then go there once, and not after each batch.
const CHECKPOINT: &str = "16384";

/// What is left of a write-ahead log that grew while somebody read for long, once it could be written to the file, in bytes.
const LARGEST_LOG: &str = "134217728";

/// What a statement would have to undo if it failed halfway stays in memory, and goes into no file of its own.
const UNDO: &str = "memory";

/// Gives back the memory of pages that were read and written; what needs them reads them again.
const SHRINK: &str = "PRAGMA shrink_memory";

/// Looks at all tables, whether or not this connection has used them, and reads no more of each than tells how it is filled
/// (SQLite's documentation of the pragma).
const OPTIMIZE: &str = "PRAGMA optimize = 0x10012";

/// Tables that had few rows when they were analysed. As such a table grows, SQLite would still read all of it for each row that is
/// bound to a statement, where it can look each up; it does that by itself where it knows nothing.
const FORGET_TABLES: &str = "DELETE FROM sqlite_stat1 WHERE tbl IN ( \
         SELECT tbl FROM sqlite_stat1 GROUP BY tbl HAVING MAX(CAST(stat AS INTEGER)) < 1000 \
     )";

/// Likewise the indexes of what waits, which had few entries at night. Each is taken to have a thousand from the first column on
/// ("1000 1 1"): SQLite does not read all of that for each row, and still prefers it to the index of all rows.
const ENLARGE_INDEXES: &str = "UPDATE sqlite_stat1 \
     SET stat = '1000' || SUBSTR(REPLACE(stat, ' 0', ' 1'), INSTR(stat, ' ')) \
     WHERE idx IS NOT NULL AND CAST(stat AS INTEGER) < 1000";

/// Whether there is anything for these two to do.
const SMALL: &str = "SELECT COUNT(*) FROM sqlite_stat1 WHERE CAST(stat AS INTEGER) < 1000";

/// Waits for somebody else's write, as [`BUSY`] says.
const PATIENT: &str = "PRAGMA busy_timeout = 15000";

/// Waits for nobody.
const IMPATIENT: &str = "PRAGMA busy_timeout = 0";

/// How many rows of an answer may wait to be taken: the thread that reads them sleeps less often than with sqlx's own 50.
const ROWS: usize = 1_000;

/// Connections that read.
const READERS: u32 = 4;

/// A store in a SQLite file.
#[derive(Clone, Debug)]
pub struct Sqlite {
    options: SqliteConnectOptions,
    writer: SqlitePool,
    readers: SqlitePool,
}

impl Sqlite {
    /// Opens the file, making it where it does not exist, and brings the schema up to date.
    ///
    /// # Errors
    /// When the file cannot be made, read or written, is no SQLite database, or its schema is newer than this program.
    pub async fn open(url: &str) -> Result<Self> {
        let path = path(url)?;
        let open = |what: &str, error: &dyn std::fmt::Display| {
            Error::Open(format!("the store {} cannot be {what}: {error}", path.display()))
        };
        match File::options().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(open("made", &error)),
        }
        refuse_foreign(&path).await?;
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .busy_timeout(BUSY)
            .foreign_keys(true)
            .row_buffer_size(ROWS)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full);
        {
            // Two processes that start at once: sqlx's own lock does nothing on SQLite, so take one on the directory.
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let lock = File::open(directory).map_err(|error| open("opened", &error))?;
            // On a thread that may wait: whoever has the lock may need this one to go on.
            let locked = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock)).await;
            let _lock = locked.map_err(std::io::Error::other).flatten().map_err(|error| open("locked", &error))?;
            let mut connection = options.clone().connect().await.map_err(|error| opening(error, &path))?;
            migrations::SQLITE.run(&mut connection).await.map_err(|error| match error {
                sqlx::migrate::MigrateError::Execute(error) => opening(error, &path),
                other => super::migration_error(other),
            })?;
            // Others wait to open the store meanwhile.
            run(&mut connection, IMPATIENT).await?;
            doubt_small(&mut connection).await?;
            connection.close().await?;
        }
        let writer = pool(1)
            .connect_with(
                options
                    .clone()
                    .pragma("temp_store", UNDO)
                    .pragma("cache_size", WRITER_CACHE)
                    .pragma("wal_autocheckpoint", CHECKPOINT)
                    .pragma("journal_size_limit", LARGEST_LOG),
            )
            .await
            .map_err(|error| opening(error, &path))?;
        let readers = pool(READERS).connect_lazy_with(options.clone().read_only(true));
        Ok(Self { options, writer, readers })
    }

    /// The file that a URL names, where there is none.
    ///
    /// # Errors
    /// When the URL names no file, or nobody can tell.
    pub fn missing(url: &str) -> Result<Option<PathBuf>> {
        let path = path(url)?;
        match path.try_exists() {
            Ok(is_there) => Ok((!is_there).then_some(path)),
            Err(error) => Err(Error::Open(format!("the store {} cannot be found: {error}", path.display()))),
        }
    }

    /// Opens a file that is there and up to date, to look at it: whatever would write to it fails.
    ///
    /// # Errors
    /// When there is no such file, it cannot be read, or its schema is not this program's.
    pub async fn look(url: &str) -> Result<Self> {
        let path = path(url)?;
        if let Some(path) = Self::missing(url)? {
            return Err(Error::Open(format!("there is no store {} yet", path.display())));
        }
        let options = SqliteConnectOptions::new().filename(&path).busy_timeout(BUSY).row_buffer_size(ROWS);
        let options = options.pragma("query_only", "ON");
        let writer = pool(1).connect_with(options.clone()).await.map_err(|error| opening(error, &path))?;
        let readers = pool(READERS).connect_lazy_with(options.clone());
        let applied: Option<(i64,)> =
            sqlx::query_as(super::LAST_MIGRATION).fetch_optional(&readers).await.unwrap_or(None);
        super::up_to_date(&migrations::SQLITE, applied)?;
        Ok(Self { options, writer, readers })
    }

    pub(super) async fn begin(&self) -> Result<Transaction<'static, sqlx::Sqlite>> {
        Ok(self.writer.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// A connection of its own, which ends with what it is for.
    pub(super) async fn connect(&self) -> Result<SqliteConnection> {
        Ok(self.options.connect().await?)
    }

    /// For a list of any length.
    pub(super) async fn begin_long_read(&self) -> Result<Transaction<'static, sqlx::Sqlite>> {
        Ok(self.readers.begin().await?)
    }

    async fn acquire_reader(&self) -> Result<PoolConnection<sqlx::Sqlite>> {
        Ok(self.readers.acquire().await?)
    }

    /// Giving it back costs no round trip here.
    fn keep_reader(&self, connection: PoolConnection<sqlx::Sqlite>) {
        drop(connection);
    }

    async fn acquire_relaxed(&self) -> Result<PoolConnection<sqlx::Sqlite>> {
        Ok(self.writer.acquire().await?)
    }

    fn keep_relaxed(&self, connection: PoolConnection<sqlx::Sqlite>) {
        drop(connection);
    }

    fn writer(&self) -> SqlitePool {
        self.writer.clone()
    }

    /// Every commit waits for the disk.
    fn relaxed_writer(&self) -> SqlitePool {
        self.writer()
    }

    pub(super) fn reader(&self) -> SqlitePool {
        self.readers.clone()
    }

    /// A file answers or fails: nothing needs an end set to it.
    async fn within<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        answer.await
    }
}

/// So many connections at most, each of which is outside of any transaction when it is given out. Where a write or a read of the
/// file fails, SQLite itself ends the transaction; sqlx, which tries to end it once more, then takes it to be open for ever.
fn pool(most: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(most)
        .acquire_timeout(BUSY)
        .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }))
}

/// Lets nobody go by what was small when it was analysed; another time, where somebody else is writing, or nobody can.
async fn doubt_small(connection: &mut SqliteConnection) -> Result<()> {
    // There is no such table before the first analysis.
    const ANALYSED: &str = "SELECT COUNT(*) FROM sqlite_schema WHERE name = 'sqlite_stat1'";
    for count in [ANALYSED, SMALL] {
        let (count,): (i64,) = sqlx::query_as(count).fetch_one(&mut *connection).await?;
        if count == 0 {
            return Ok(());
        }
    }
    for statement in [FORGET_TABLES, ENLARGE_INDEXES] {
        match run(connection, statement).await {
            Err(error) if !error.is_of_the_store() => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

async fn run(connection: &mut SqliteConnection, sql: &'static str) -> Result<()> {
    sqlx::raw_sql(sql).execute(connection).await?;
    Ok(())
}

/// The file that a URL names: `sqlite:lapsed.db`, `sqlite:///var/lib/lapsed/lapsed.db`.
fn path(url: &str) -> Result<PathBuf> {
    let rest = url.strip_prefix("sqlite:").unwrap_or(url);
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    if rest.is_empty() || rest.starts_with(":memory:") || rest.contains('?') {
        return Err(Error::Open(format!(
            "the store URL {url:?} names no file: write sqlite:FILE, such as sqlite:/var/lib/lapsed/lapsed.db"
        )));
    }
    Ok(PathBuf::from(rest))
}

/// Leaves a database of another program as it is. What cannot be asked is met by who opens it.
async fn refuse_foreign(path: &Path) -> Result<()> {
    const FOREIGN: &str =
        "SELECT COUNT(*) > 0 AND SUM(name = '_sqlx_migrations') = 0 FROM sqlite_schema WHERE type = 'table'";
    let Ok(mut connection) = SqliteConnectOptions::new().filename(path).read_only(true).connect().await else {
        return Ok(());
    };
    let foreign: sqlx::Result<(bool,)> = sqlx::query_as(FOREIGN).fetch_one(&mut connection).await;
    connection.close().await?;
    match foreign {
        Ok((true,)) => Err(Error::Open(format!(
            "{} is a SQLite database of another program, and is left as it is; name another file in store.url",
            path.display()
        ))),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn opening(error: sqlx::Error, path: &Path) -> Error {
    match error.as_database_error().and_then(|db| db.code()).as_deref() {
        Some("26") => Error::Open(format!("{} is not a SQLite database", path.display())),
        Some("14") => {
            // SQLite does not say why.
            let why = match File::options().read(true).write(true).open(path) {
                Err(error) => error.to_string(),
                Ok(_) => "files cannot be made beside it".to_owned(),
            };
            Error::Open(format!("the store {} cannot be opened: {why}", path.display()))
        }
        _ => error.into(),
    }
}

impl Store for Sqlite {
    /// All writers wait meanwhile, a third of a second on the machine of benches/README.md. Smaller ones write most pages of the
    /// tables and indexes anew each time.
    const BATCH: u32 = 4_000;
    /// One writes at a time.
    const PARTS: usize = 1;
    /// One file: what is committed together waits for the disk once.
    const SPANS_BUCKETS: bool = true;
    /// The locks are not fair: without a gap, other processes would hardly get to write while a long pass goes on.
    const GAP: Duration = Duration::from_millis(5);

    async fn clock_reading(&self) -> Result<Option<DateTime<Utc>>> {
        Ok(None)
    }

    async fn description(&self) -> Result<String> {
        let (version, migration): (String, i64) =
            sqlx::query_as("SELECT sqlite_version(), MAX(version) FROM _sqlx_migrations")
                .fetch_one(&self.readers)
                .await?;
        Ok(format!("SQLite {version}, migration {migration}"))
    }

    async fn indexes(&self) -> Result<Indexes> {
        let there: Vec<(String,)> =
            sqlx::query_as("SELECT name FROM sqlite_schema WHERE type = 'index'").fetch_all(&self.readers).await?;
        let there = there.into_iter().map(|(name,)| name).collect();
        let mut plans = SERVED.map(|_| String::new());
        for (plan, (statement, _)) in plans.iter_mut().zip(SERVED) {
            let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
            let steps: Vec<(i64, i64, i64, String)> = sqlx::query_as(explain).fetch_all(&self.readers).await?;
            plan.extend(steps.into_iter().map(|(.., step)| step + "\n"));
        }
        Ok(Indexes::new(&migrations::SQLITE, &there, &plans))
    }

    async fn maintain(&self) -> Result<()> {
        let mut connection = self.options.clone().busy_timeout(Duration::ZERO).connect().await?;
        let unless_busy = |statement: &str, done: Result<()>| match done {
            Err(Error::Busy(_)) => {
                tracing::debug!(statement, "somebody else is writing: another time");
                Ok(())
            }
            done => done,
        };
        unless_busy(OPTIMIZE, run(&mut connection, OPTIMIZE).await)?;
        // Whatever became of that: some of it may have been analysed.
        run(&mut connection, PATIENT).await?;
        doubt_small(&mut connection).await?;
        run(&mut connection, IMPATIENT).await?;
        for checkpoint in ["PRAGMA wal_checkpoint(PASSIVE)", "PRAGMA wal_checkpoint(TRUNCATE)"] {
            unless_busy(checkpoint, run(&mut connection, checkpoint).await)?;
        }
        connection.close().await?;
        Ok(())
    }

    async fn rest(&self) -> Result<()> {
        // Those that are in use work.
        let idle: Vec<_> = [&self.readers, &self.writer]
            .into_iter()
            .flat_map(|pool| std::iter::from_fn(|| pool.try_acquire()))
            .collect();
        for mut connection in idle {
            sqlx::query(SHRINK).execute(&mut *connection).await?;
        }
        Ok(())
    }

    async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

common_rows!(sqlx::Sqlite, lock = "");
job_operations!(Sqlite, sqlx::Sqlite);

impl Accounts for Sqlite {
    common_owners!(lock = "", id_digits = "LOWER(HEX(id))");
    common_tokens!(sqlx::Sqlite, id_digits = "LOWER(HEX(id))");
}

common_messages!(Sqlite, sqlx::Sqlite, id_digits = "LOWER(HEX(m.id))", not_yet_due = "deadline > $2 + lead");
due_operations!(Sqlite, lead = "watermarks.lead");
// Tokens stand in the file in no order of their deadlines: nearly each is read from a page somewhere, which costs a call of the
// system where the file is not mapped. Mapped pages are the system's own, which drops them when it needs the room.
report_operations!(Sqlite, scanning = "PRAGMA cache_size = -16384; PRAGMA mmap_size = 2147418112");
guard_operations!(Sqlite);
