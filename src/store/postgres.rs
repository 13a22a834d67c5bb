//! PostgreSQL: for production, with any number of daemons on one database.
//!
//! Relies on READ COMMITTED: a claim is two statements, and the second must see what a planner committed while the
//! first waited for its lock. The session's limits on statements, locks and idle transactions make sure that a peer
//! which dies silently cannot hold anything for ever.

mod bounces;
mod corrections;
mod imports;
mod ledger;
mod lines;
mod outbox;
mod planning;
mod purging;
mod recipients;

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection, Executor, FromRow, PgConnection, Pool, QueryBuilder, Transaction};
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
use lines::Lines;

use crate::change::{Changed, Refused, mark_unplanned};
use crate::clock::{DATABASE_TIME, Timestamp};
use crate::forecast::Ahead;
use crate::policies::Traits;
use crate::policy::Reason;
use crate::token::{
    Address, Bucket, Contact, ContactId, IdRef, MessageId, Owner, OwnerId, SYSTEM_OWNER_KEY, SecretHash, Status, Token,
    TokenId,
};

/// Limits of each session: nothing that we ask takes nearly as long. Beside many tokens PostgreSQL expects that much of plans for
/// any arguments that it would compile them to machine code, for longer than they run, at each execution.
const SESSION: &str = "SET statement_timeout = '60s'; \
     SET jit = off; \
     SET lock_timeout = '15s'; \
     SET idle_in_transaction_session_timeout = '60s'; \
     SET TimeZone = 'UTC'";

/// What a session is told besides where its commits need not wait for the disk.
const RELAX: &str = "SET synchronous_commit = off";

/// What a session is told besides where the plans of its statements do not depend on their arguments: each of these goes by
/// a key, or along one index. Else PostgreSQL makes a plan for each execution, which takes longer than to execute it.
const KEEP_PLANS: &str = "SET plan_cache_mode = force_generic_plan";

/// Likewise, where each also stops at the first row that its index gives: a plan for any arguments expects to find many, and
/// would fetch and sort them all, in several processes.
const FIRST_ROW: &str = "SET plan_cache_mode = force_generic_plan; \
     SET enable_bitmapscan = off; \
     SET enable_seqscan = off; \
     SET max_parallel_workers_per_gather = 0";

/// Connections of one process.
const CONNECTIONS: u32 = 12;

/// Further ones, for what is asked most often: by a key, or for the first row along an index.
const READERS: u32 = 8;

/// Further ones, whose commits do not wait for the disk.
const RELAXED: u32 = 4;

/// How many of these are kept out of their pool at most.
const KEPT: usize = 8;

/// The same of the further ones.
const KEPT_RELAXED: usize = 2;

/// How long a connection may take to be made.
const PATIENT_CONNECT: Duration = Duration::from_secs(10);

/// For how long after its last use a connection is given out without asking whether it is alive.
const TRUSTED: Duration = Duration::from_secs(1);

/// For how long the server may be silent while a job waits for it: each of the few statements of a transaction has its own
/// limit there, and answers, unless the server or the way to it is gone without a word.
const PATIENCE: Duration = Duration::from_secs(90);

/// A store in PostgreSQL.
#[derive(Clone, Debug)]
pub struct Postgres {
    options: PgConnectOptions,
    patience: Duration,
    pools: Arc<RwLock<Pools>>,
    kept: Arc<Keeper<KEPT>>,
    kept_relaxed: Arc<Keeper<KEPT_RELAXED>>,
    lines: Lines,
}

/// The connections to a server, until it falls silent: then there are others.
#[derive(Clone, Debug)]
struct Pools {
    pool: PgPool,
    /// Its statements keep their plans.
    readers: PgPool,
    /// Its commits do not wait for the disk: for what may be lost in a crash of the server. (Leases may: a holder whose
    /// lease was lost with it no longer finds its own row, and writes nothing.)
    relaxed: PgPool,
    /// Counts the pools before these.
    generation: u64,
}

impl Pools {
    /// Connects when it is used.
    fn new(options: &PgConnectOptions, generation: u64) -> Self {
        let pool = |connections: u32, besides: Option<&'static str>| {
            PgPoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(PATIENT_CONNECT)
                // A connection that was used a moment ago is taken to be alive: asking it first doubles the cost of a read.
                .test_before_acquire(false)
                .before_acquire(|connection, meta| {
                    Box::pin(async move {
                        if meta.idle_for >= TRUSTED {
                            connection.ping().await?;
                        }
                        Ok(true)
                    })
                })
                .after_connect(move |connection, _| {
                    Box::pin(async move {
                        connection.execute(SESSION).await?;
                        if let Some(besides) = besides {
                            connection.execute(besides).await?;
                        }
                        Ok(())
                    })
                })
                .connect_lazy_with(options.clone())
        };
        Self {
            pool: pool(CONNECTIONS, None),
            readers: pool(READERS, Some(FIRST_ROW)),
            relaxed: pool(RELAXED, Some(RELAX)),
            generation,
        }
    }
}

/// A connection that is kept out of the pool, and when it was last used.
type Kept = (PoolConnection<sqlx::Postgres>, Instant);

/// Connections that are kept out of the pool for a moment: it asks each that it is given back whether it is alive, which
/// doubles the cost of a read. Only those are kept whose answer was read to its end.
#[derive(Debug, Default)]
struct Keeper<const MOST: usize>(Mutex<Vec<Kept>>);

impl<const MOST: usize> Keeper<MOST> {
    /// The one that was used last, if that was a moment ago.
    fn take(&self) -> Option<PoolConnection<sqlx::Postgres>> {
        let kept = self.all().pop();
        kept.filter(|(_, used)| used.elapsed() < TRUSTED).map(|(connection, _)| connection)
    }

    fn keep(&self, connection: PoolConnection<sqlx::Postgres>) {
        let mut kept = self.all();
        kept.retain(|(_, used)| used.elapsed() < TRUSTED);
        if kept.len() < MOST {
            kept.push((connection, Instant::now()));
        }
    }

    fn clear(&self) {
        self.all().clear();
    }

    fn all(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Postgres {
    /// Connects, and brings the schema up to date.
    ///
    /// # Errors
    /// When the server cannot be reached, or its schema is newer than this program or was changed by hand.
    pub async fn open(url: &str) -> Result<Self> {
        let options: PgConnectOptions =
            url.parse().map_err(|error| Error::Open(format!("the PostgreSQL URL cannot be read: {error}")))?;
        let options = options.application_name("lapsed");
        // Migrations may take long, so they run without the session's limits. sqlx lets one process at a time in.
        let at = format!("{}:{}", options.get_host(), options.get_port());
        let mut connection = PgConnection::connect_with(&options)
            .await
            .map_err(|error| Error::Open(format!("cannot connect to PostgreSQL at {at}: {error}")))?;
        migrations::POSTGRES.run(&mut connection).await.map_err(super::migration_error)?;
        connection.close().await?;
        Ok(Self::by(options))
    }

    /// Connects to a database that is up to date, to look at it: whatever would write to it fails.
    ///
    /// # Errors
    /// When the server cannot be reached, or its schema is not this program's.
    pub async fn look(url: &str) -> Result<Self> {
        let options: PgConnectOptions =
            url.parse().map_err(|error| Error::Open(format!("the PostgreSQL URL cannot be read: {error}")))?;
        let options = options.application_name("lapsed").options([("default_transaction_read_only", "on")]);
        let at = format!("{}:{}", options.get_host(), options.get_port());
        let mut connection = PgConnection::connect_with(&options)
            .await
            .map_err(|error| Error::Open(format!("cannot connect to PostgreSQL at {at}: {error}")))?;
        let applied: Option<(i64,)> =
            sqlx::query_as(super::LAST_MIGRATION).fetch_optional(&mut connection).await.unwrap_or(None);
        connection.close().await?;
        super::up_to_date(&migrations::POSTGRES, applied)?;
        Ok(Self::by(options))
    }

    fn by(options: PgConnectOptions) -> Self {
        let pools = Arc::new(RwLock::new(Pools::new(&options, 0)));
        let lines = Lines::new(options.clone());
        Self { options, patience: PATIENCE, pools, kept: Arc::default(), kept_relaxed: Arc::default(), lines }
    }

    /// The same, with another limit to how long the server may be silent while a job waits for it.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    fn pools(&self) -> Pools {
        self.pools.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn pool(&self) -> PgPool {
        self.pools().pool
    }

    /// Waits for the server's answer, but not for ever: TCP alone never notices that a peer which took a request is gone.
    /// Connections to a silent peer are left to themselves, and others are made.
    async fn within<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        let generation = self.pools().generation;
        match tokio::time::timeout(self.patience, answer).await {
            Ok(Err(error)) if error.is_of_a_standby() => {
                // Each connection would say so for as long as it lives.
                self.renew(generation);
                Err(error)
            }
            Ok(answer) => answer,
            Err(_) => {
                self.renew(generation);
                let problem = format!("no answer for {} seconds", self.patience.as_secs());
                let silent = std::io::Error::new(std::io::ErrorKind::TimedOut, problem);
                Err(Error::Unavailable(sqlx::Error::Io(silent)))
            }
        }
    }

    /// Makes new connections from now on, unless somebody else did since.
    fn renew(&self, generation: u64) {
        let mut pools = self.pools.write().unwrap_or_else(PoisonError::into_inner);
        if pools.generation == generation {
            *pools = Pools::new(&self.options, generation + 1);
            self.kept.clear();
            self.kept_relaxed.clear();
            self.lines.hang_up();
        }
    }

    pub(super) async fn begin(&self) -> Result<Transaction<'static, sqlx::Postgres>> {
        begin(self.pool()).await
    }

    /// For what may be lost in a crash of the server, because it is done again.
    async fn begin_relaxed(&self) -> Result<Transaction<'static, sqlx::Postgres>> {
        begin(self.pools().relaxed).await
    }

    /// For a list of any length: the limit on statements does not hold.
    pub(super) async fn begin_long_read(&self) -> Result<Transaction<'static, sqlx::Postgres>> {
        let mut tx = self.begin().await?;
        tx.execute("SET LOCAL statement_timeout = 0").await?;
        Ok(tx)
    }

    /// A connection that was used a moment ago, or one of the pool, for what is asked most often.
    async fn acquire_reader(&self) -> Result<PoolConnection<sqlx::Postgres>> {
        match self.kept.take() {
            Some(connection) => Ok(connection),
            None => Ok(self.pools().readers.acquire().await?),
        }
    }

    fn keep_reader(&self, connection: PoolConnection<sqlx::Postgres>) {
        self.kept.keep(connection);
    }

    /// The same for what may be lost in a crash of the server.
    async fn acquire_relaxed(&self) -> Result<PoolConnection<sqlx::Postgres>> {
        match self.kept_relaxed.take() {
            Some(connection) => Ok(connection),
            None => Ok(self.relaxed_writer().acquire().await?),
        }
    }

    fn keep_relaxed(&self, connection: PoolConnection<sqlx::Postgres>) {
        self.kept_relaxed.keep(connection);
    }

    fn writer(&self) -> PgPool {
        self.pool()
    }

    fn relaxed_writer(&self) -> PgPool {
        self.pools().relaxed
    }

    pub(super) fn reader(&self) -> PgPool {
        self.pool()
    }
}

/// On a task of its own, which outlives a caller that is dropped: sqlx forgets a BEGIN whose answer nobody waits for,
/// and the pool would get a connection back with its transaction open. Whoever used it next would write without a
/// commit.
async fn begin(pool: PgPool) -> Result<Transaction<'static, sqlx::Postgres>> {
    let begun = tokio::spawn(async move { pool.begin().await });
    Ok(begun.await.map_err(|_| sqlx::Error::WorkerCrashed)??)
}

impl Store for Postgres {
    /// Its rows are locked one by one, and whoever claims messages passes over those that are locked.
    const BATCH: u32 = 5_000;
    /// A server has more than one processor, and what is inserted is indexed several times.
    const PARTS: usize = 2;
    const SPANS_BUCKETS: bool = false;
    const GAP: Duration = Duration::ZERO;

    async fn clock_reading(&self) -> Result<Option<DateTime<Utc>>> {
        self.within(async move {
            let (now,): (DateTime<Utc>,) = sqlx::query_as(DATABASE_TIME).fetch_one(&self.pool()).await?;
            Ok(Some(now))
        })
        .await
    }

    async fn description(&self) -> Result<String> {
        let (version, migration): (String, i64) =
            sqlx::query_as("SELECT current_setting('server_version'), MAX(version) FROM _sqlx_migrations")
                .fetch_one(&self.pool())
                .await?;
        Ok(format!("PostgreSQL {version}, migration {migration}"))
    }

    async fn indexes(&self) -> Result<Indexes> {
        let there: Vec<(String,)> = sqlx::query_as(
            "SELECT c.relname::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
             WHERE i.indisvalid AND i.indisready AND pg_table_is_visible(i.indrelid)",
        )
        .fetch_all(&self.pool())
        .await?;
        let there = there.into_iter().map(|(name,)| name).collect();
        let mut plans = SERVED.map(|_| String::new());
        let mut tx = self.begin().await?;
        // A table of a page is read whole, whatever indexes it has.
        tx.execute("SET LOCAL enable_seqscan = off").await?;
        for (plan, (statement, _)) in plans.iter_mut().zip(SERVED) {
            let explain = AssertSqlSafe(format!("EXPLAIN {statement}"));
            let steps: Vec<(String,)> = sqlx::query_as(explain).fetch_all(&mut *tx).await?;
            plan.extend(steps.into_iter().map(|(step,)| step + "\n"));
        }
        Ok(Indexes::new(&migrations::POSTGRES, &there, &plans))
    }

    /// Autovacuum does it: the migrations tell it how often.
    async fn maintain(&self) -> Result<()> {
        Ok(())
    }

    /// The pages are the server's.
    async fn rest(&self) -> Result<()> {
        Ok(())
    }

    async fn close(&self) {
        self.kept.clear();
        self.kept_relaxed.clear();
        self.lines.hang_up();
        let Pools { pool, readers, relaxed, .. } = self.pools();
        readers.close().await;
        relaxed.close().await;
        pool.close().await;
    }
}

common_rows!(sqlx::Postgres, lock = " FOR UPDATE");
job_operations!(Postgres, sqlx::Postgres);

impl Accounts for Postgres {
    common_owners!(lock = " FOR UPDATE", id_digits = "REPLACE(id::text, '-', '')");
    common_tokens!(sqlx::Postgres, id_digits = "REPLACE(id::text, '-', '')");
}

common_messages!(
    Postgres,
    sqlx::Postgres,
    id_digits = "REPLACE(m.id::text, '-', '')",
    not_yet_due = "deadline > $2 + lead * INTERVAL '1 second'"
);
due_operations!(Postgres, lead = "watermarks.lead * INTERVAL '1 second'");
report_operations!(Postgres, scanning = "SET LOCAL work_mem = '32MB'");
guard_operations!(Postgres);
