//! Where something is measured: a database that can be filled, copied, and spoken to by its own client.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use lapsed::store::{Postgres, Sqlite, Store};
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

    /// Opens it as a process does.
    async fn open(&self) -> Self::Store;

    /// Runs SQL in the client; returns how long the client took, start and end included.
    fn client(&self, sql: &str) -> Duration;

    /// Bytes in 32, as a hash has them.
    fn hash(i: &str) -> String;

    /// Brings the database to rest after a fill: analysed, and nothing left to write.
    fn rest(&self);
}

/// PostgreSQL, in the cluster that `benches/run` started.
pub struct OnPg(pub Database);

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

    async fn open(&self) -> Postgres {
        Postgres::open(&self.0.url).await.expect("the store opens")
    }

    fn client(&self, sql: &str) -> Duration {
        timed(Command::new("psql").args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", sql]).arg(&self.0.url))
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

    async fn open(&self) -> Sqlite {
        Sqlite::open(&format!("sqlite:{}", self.path().display())).await.expect("the store opens")
    }

    fn client(&self, sql: &str) -> Duration {
        timed(Command::new("sqlite3").arg("-bail").arg(self.path()).arg(sql))
    }

    fn hash(i: &str) -> String {
        format!("SHA3({i}, 256)")
    }

    fn rest(&self) {
        self.client("ANALYZE; PRAGMA wal_checkpoint(TRUNCATE)");
    }
}

/// Runs a program to its end, and returns how long it took.
pub fn timed(command: &mut Command) -> Duration {
    let started = Instant::now();
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let took = started.elapsed();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    took
}
