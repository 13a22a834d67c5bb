//! Where something is measured: a database that can be filled, copied, and spoken to by its own client.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lapsed::store::{Postgres, Sqlite, Store};
use sqlx::{AssertSqlSafe, Connection, SqliteConnection};
use tempfile::TempDir;

use crate::support::backend::{OnPostgres, OnSqlite};
use crate::support::many::Bulk;
use crate::support::postgres::{Database, fresh};

/// A database of its own, gone when it is dropped.
pub trait Place: Sized {
    /// How the back end says what a bulk insert needs.
    type Sql: Bulk;
    type Store: Store;
    /// The back end, and its client.
    const NAMES: (&'static str, &'static str);

    /// An empty database.
    async fn make() -> Self;

    /// A database with the same contents. Nobody may be connected to this one.
    async fn copy(&self) -> Self;

    /// The URL by which the program opens it.
    fn url(&self) -> String;

    /// Opens it as a process does.
    async fn open(&self) -> Self::Store;

    /// Runs SQL in the client; returns how long the client took, start and end included.
    fn client(&self, sql: &str) -> Duration;

    /// Runs SQL that fills the tables.
    async fn fill(&self, sql: &str);

    /// SQL for the hash of the secret of the token `i`: 32 bytes that tell nothing of their order.
    fn hash(i: &str) -> String;

    /// Brings the database to rest after a fill: analysed, and nothing left to write.
    fn rest(&self);
}

/// PostgreSQL, in the cluster that `benches/run` started.
pub struct OnPg(pub Database);

impl OnPg {
    /// A client of PostgreSQL. The password stays out of the list of processes.
    pub fn command(&self, program: &str) -> Command {
        let parts = self.0.url.strip_prefix("postgres://").and_then(|rest| {
            let (login, place) = rest.split_once('@')?;
            let (host, name) = place.split_once('/')?;
            Some((login.split_once(':')?, host.split_once(':')?, name))
        });
        let ((user, password), (host, port), name) = parts.expect("a URL as the tests make it");
        let mut command = Command::new(program);
        command.env("PGUSER", user).env("PGPASSWORD", password).env("PGHOST", host).env("PGPORT", port);
        command.env("PGDATABASE", name);
        command
    }
}

impl Place for OnPg {
    type Sql = OnPostgres;
    type Store = Postgres;
    const NAMES: (&'static str, &'static str) = ("PostgreSQL", "psql");

    async fn make() -> Self {
        Self(fresh().await)
    }

    async fn copy(&self) -> Self {
        Self(self.0.copy_files().await)
    }

    fn url(&self) -> String {
        self.0.url.clone()
    }

    async fn open(&self) -> Postgres {
        Postgres::open(&self.url()).await.expect("the store opens")
    }

    fn client(&self, sql: &str) -> Duration {
        timed(self.command("psql").args(["-X", "-q", "-v", "ON_ERROR_STOP=1"]), sql)
    }

    async fn fill(&self, sql: &str) {
        self.client(sql);
    }

    fn hash(i: &str) -> String {
        format!("SHA256(({i})::text::bytea)")
    }

    fn rest(&self) {
        self.client("VACUUM ANALYZE");
        self.client("CHECKPOINT");
    }
}

/// SQLite, in a directory of its own.
pub struct OnFile(TempDir);

impl OnFile {
    fn path(&self) -> PathBuf {
        self.0.path().join("lapsed.db")
    }
}

impl Place for OnFile {
    type Sql = OnSqlite;
    type Store = Sqlite;
    const NAMES: (&'static str, &'static str) = ("SQLite", "sqlite3");

    async fn make() -> Self {
        Self(TempDir::new().expect("a temporary directory"))
    }

    async fn copy(&self) -> Self {
        let copy = Self::make().await;
        // Through the client, which also reads what still stands in the log.
        self.client("PRAGMA wal_checkpoint(TRUNCATE)");
        std::fs::copy(self.path(), copy.path()).expect("a copy");
        copy
    }

    fn url(&self) -> String {
        format!("sqlite:{}", self.path().display())
    }

    async fn open(&self) -> Sqlite {
        Sqlite::open(&self.url()).await.expect("the store opens")
    }

    fn client(&self, sql: &str) -> Duration {
        timed(Command::new("sqlite3").arg("-bail").arg(self.path()), sql)
    }

    /// Not in the client: its SQLite may be older than ours, and know no `UNHEX`.
    async fn fill(&self, sql: &str) {
        let mut connection = SqliteConnection::connect(&self.url()).await.expect("a connection");
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.expect("the rows");
        connection.close().await.expect("a goodbye");
    }

    fn hash(_: &str) -> String {
        "RANDOMBLOB(32)".into()
    }

    fn rest(&self) {
        self.client("ANALYZE; PRAGMA wal_checkpoint(TRUNCATE)");
    }
}

/// Runs a program to its end on this input, and returns how long it took.
pub fn timed(command: &mut Command, input: &str) -> Duration {
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    let started = Instant::now();
    let mut child = command.spawn().expect("the program starts");
    let fed = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    let status = child.wait().expect("a child");
    assert!(fed.is_ok() && status.success(), "{status}: {}", input.chars().take(200).collect::<String>());
    started.elapsed()
}
