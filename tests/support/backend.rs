//! The back ends that the conformance suite runs on: each test gets an empty store of its own.

use std::future::Future;
use std::path::PathBuf;

use lapsed::store::{Postgres, Sqlite, Store};
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::SqlitePoolOptions;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, SqlitePool};
use tempfile::TempDir;
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::postgres::{Database, fresh};

/// A database with our tables, which every test's own is a copy of: copying is quicker than making the tables again. It
/// goes with the cluster.
static TABLES: OnceCell<Database> = OnceCell::const_new();

/// The same, partitioned.
static PARTITIONS: OnceCell<Database> = OnceCell::const_new();

/// An empty store, and ways around it that only a test takes.
pub trait Backend: Sized {
    type Store: Store;

    /// What makes the store refuse to suppress a contact, and what undoes it.
    const NO_SUPPRESSION: [&'static str; 2] = [
        "ALTER TABLE contacts ADD CONSTRAINT no_suppression CHECK (suppressed_at IS NULL)",
        "ALTER TABLE contacts DROP CONSTRAINT no_suppression",
    ];

    /// Makes an empty store.
    fn make() -> impl Future<Output = Self>;

    /// Opens the store as another process would.
    fn open(&self) -> impl Future<Output = Self::Store>;

    /// The number that a query answers.
    fn count(&self, sql: &str) -> impl Future<Output = i64>;

    /// The id and state of a message.
    fn message(&self) -> impl Future<Output = (Uuid, String)>;

    /// Changes rows by hand.
    fn execute(&self, sql: &str) -> impl Future<Output = ()>;
}

/// SQLite in a directory of its own.
pub struct OnSqlite {
    directory: TempDir,
    direct: SqlitePool,
}

impl OnSqlite {
    pub fn url(&self) -> String {
        url(&self.directory)
    }

    /// The database's file.
    pub fn file(&self) -> PathBuf {
        self.directory.path().join(FILE)
    }

    /// An empty store.
    pub fn fresh() -> Self {
        Self::within(TempDir::new().expect("a temporary directory"))
    }

    /// The store whose files lie in this directory.
    pub fn within(directory: TempDir) -> Self {
        let direct = SqlitePoolOptions::new().max_connections(1).connect_lazy(&url(&directory)).expect("a URL");
        Self { directory, direct }
    }
}

const FILE: &str = "lapsed.db";

fn url(directory: &TempDir) -> String {
    format!("sqlite:{}", directory.path().join(FILE).display())
}

impl Backend for OnSqlite {
    type Store = Sqlite;

    const NO_SUPPRESSION: [&'static str; 2] = [
        "CREATE TRIGGER no_suppression BEFORE UPDATE OF suppressed_at ON contacts \
         BEGIN SELECT RAISE(ABORT, 'no suppression'); END",
        "DROP TRIGGER no_suppression",
    ];

    async fn make() -> Self {
        Self::fresh()
    }

    async fn open(&self) -> Sqlite {
        Sqlite::open(&self.url()).await.expect("the store opens")
    }

    async fn count(&self, sql: &str) -> i64 {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&self.direct).await.expect(sql)
    }

    async fn message(&self) -> (Uuid, String) {
        sqlx::query_as("SELECT id, state FROM messages LIMIT 1").fetch_one(&self.direct).await.expect("a message")
    }

    async fn execute(&self, sql: &str) {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&self.direct).await.expect(sql);
    }
}

/// PostgreSQL in a database of its own.
pub struct OnPostgres {
    direct: PgPool,
    pub database: Database,
}

impl OnPostgres {
    /// The store in this database, which may be empty.
    pub fn on(database: Database) -> Self {
        let direct = PgPoolOptions::new().max_connections(1).connect_lazy(&database.url).expect("a URL");
        Self { direct, database }
    }
}

impl Backend for OnPostgres {
    type Store = Postgres;

    async fn make() -> Self {
        Self::on(TABLES.get_or_init(with_tables).await.copy().await)
    }

    async fn open(&self) -> Postgres {
        Postgres::open(&self.database.url).await.expect("the store opens")
    }

    async fn count(&self, sql: &str) -> i64 {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&self.direct).await.expect(sql)
    }

    async fn message(&self) -> (Uuid, String) {
        sqlx::query_as("SELECT id, state FROM messages LIMIT 1").fetch_one(&self.direct).await.expect("a message")
    }

    async fn execute(&self, sql: &str) {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&self.direct).await.expect(sql);
    }
}

/// The same schema, hash-partitioned by bucket into 16, as a distributed engine would hold it.
pub struct OnPartitions(pub OnPostgres);

impl Backend for OnPartitions {
    type Store = Postgres;

    async fn make() -> Self {
        Self(OnPostgres::on(PARTITIONS.get_or_init(with_partitions).await.copy().await))
    }

    async fn open(&self) -> Postgres {
        self.0.open().await
    }

    async fn count(&self, sql: &str) -> i64 {
        self.0.count(sql).await
    }

    async fn message(&self) -> (Uuid, String) {
        self.0.message().await
    }

    async fn execute(&self, sql: &str) {
        self.0.execute(sql).await;
    }
}

async fn with_tables() -> Database {
    let database = fresh().await;
    Postgres::open(&database.url).await.expect("the store opens").close().await;
    database
}

async fn with_partitions() -> Database {
    let database = with_tables().await;
    let mut connection = database.connect().await;
    partition(&mut connection).await;
    connection.close().await.expect("a goodbye");
    database
}

/// Turns every table that the migrations made into a partitioned one with the same columns, indexes and constraints.
async fn partition(connection: &mut PgConnection) {
    let tables: Vec<(String,)> = sqlx::query_as(
        "SELECT relname::text FROM pg_class \
         WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname NOT LIKE '\\_sqlx%'",
    )
    .fetch_all(&mut *connection)
    .await
    .expect("the tables");
    assert!(tables.len() >= 8, "the migrations make the tables: {tables:?}");
    let keys: Vec<(String, String)> = sqlx::query_as(
        "SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint \
         WHERE contype = 'f' AND connamespace = 'public'::regnamespace",
    )
    .fetch_all(&mut *connection)
    .await
    .expect("the foreign keys");
    let mut script = String::from("BEGIN;");
    for (table,) in &tables {
        script += &format!("ALTER TABLE {table} RENAME TO old_{table};");
        script += &format!("CREATE TABLE {table} (LIKE old_{table} INCLUDING ALL) PARTITION BY HASH (bucket);");
        for part in 0..16 {
            script += &format!(
                "CREATE TABLE {table}_{part} PARTITION OF {table} FOR VALUES WITH (MODULUS 16, REMAINDER {part});"
            );
        }
    }
    for (table, _) in &keys {
        assert!(tables.iter().any(|(known,)| known == table), "{table}");
    }
    for (table,) in &tables {
        script += &format!("DROP TABLE old_{table} CASCADE;");
    }
    for (table, definition) in &keys {
        script += &format!("ALTER TABLE {table} ADD {definition};");
    }
    script += "COMMIT;";
    sqlx::raw_sql(AssertSqlSafe(script)).execute(&mut *connection).await.expect("partitioning");
    // As it would have been, had the tables been partitioned before.
    sqlx::raw_sql(include_str!("../../migrations/postgres/0006_ops.sql"))
        .execute(connection)
        .await
        .expect("a migration");
}
