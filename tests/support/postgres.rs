//! A PostgreSQL database for one test, in the cluster that `tests/run` started.
//!
//! Guarantees: nobody else uses the database; it is gone after the drop, with whatever is still connected to it.
//! A process that is killed leaves its databases behind, until `tests/run` throws the whole cluster away.

use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};

/// An empty database, dropped with this value.
pub struct Database {
    /// `postgres://USER:PASSWORD@HOST:PORT/NAME`, as the configuration takes it.
    pub url: String,
    /// Random, and safe to stand in SQL unquoted.
    pub name: String,
    admin_url: String,
}

/// Creates an empty database.
///
/// # Panics
/// When `tests/run` did not start PostgreSQL, or it refuses.
pub async fn fresh() -> Database {
    fresh_in(&super::from_environment("LAPSED_TEST_POSTGRES", "starts PostgreSQL")).await
}

/// The same in another cluster, whose superuser this URL is for.
pub async fn fresh_in(admin_url: &str) -> Database {
    // Nobody can connect to template0, so creating never finds its template in use, any number at once.
    create(admin_url, "template0").await
}

async fn create(admin_url: &str, template: &str) -> Database {
    let name = super::unique_name("lapsed_");
    let mut admin = connect(admin_url).await;
    let create = format!("CREATE DATABASE {name} TEMPLATE {template}");
    sqlx::query(AssertSqlSafe(create))
        .execute(&mut admin)
        .await
        .unwrap_or_else(|error| panic!("CREATE DATABASE {name}: {error}"));
    // Waiting for the goodbye keeps the number of connections bounded.
    let _ = admin.close().await;
    Database { url: with_database(admin_url, &name), name, admin_url: admin_url.to_owned() }
}

impl Database {
    /// A database with the same contents, to which nobody is connected.
    pub async fn copy(&self) -> Database {
        create(&self.admin_url, &self.name).await
    }

    /// The same for one of gigabytes: copying files is then faster than writing all of it to the log.
    pub async fn copy_files(&self) -> Database {
        create(&self.admin_url, &format!("{} STRATEGY FILE_COPY", self.name)).await
    }

    /// A plain connection, beside whatever the code under test opens.
    pub async fn connect(&self) -> PgConnection {
        connect(&self.url).await
    }

    /// A connection of the superuser to another database of the same cluster: it sees `pg_stat_activity`, can end
    /// sessions, and survives what happens to this database.
    pub async fn admin(&self) -> PgConnection {
        connect(&self.admin_url).await
    }

    /// Ends every session of this database, as a server that restarts does; returns how many there were.
    pub async fn cut_connections(&self) -> usize {
        sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1")
            .bind(&self.name)
            .fetch_all(&mut self.admin().await)
            .await
            .expect("pg_terminate_backend")
            .len()
    }
}

impl Drop for Database {
    /// Works in any runtime, in none, and while a panic unwinds: on a thread and a runtime of its own. A failure is
    /// told and not raised, for a second panic would abort the whole test binary.
    fn drop(&mut self) {
        let (admin_url, name) = (self.admin_url.clone(), self.name.clone());
        let dropped = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| error.to_string())?
                .block_on(async {
                    let mut admin = try_connect(&admin_url).await?;
                    let drop = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
                    sqlx::query(AssertSqlSafe(drop)).execute(&mut admin).await?;
                    admin.close().await
                })
                .map_err(|error: sqlx::Error| error.to_string())
        })
        .join();
        match dropped {
            Ok(Ok(())) => {}
            Ok(Err(error)) => eprintln!("database {} stays: {error}", self.name),
            Err(_) => eprintln!("database {} stays: dropping it panicked", self.name),
        }
    }
}

async fn connect(url: &str) -> PgConnection {
    // The URL holds the password: the message must not show it.
    try_connect(url).await.unwrap_or_else(|error| panic!("cannot connect to the PostgreSQL of the tests: {error}"))
}

async fn try_connect(url: &str) -> Result<PgConnection, sqlx::Error> {
    url.parse::<PgConnectOptions>()?.disable_statement_logging().connect().await
}

/// The same URL with another database; parameters stay.
fn with_database(url: &str, name: &str) -> String {
    let (base, parameters) = match url.split_once('?') {
        Some((base, parameters)) => (base, format!("?{parameters}")),
        None => (url, String::new()),
    };
    let (server, _) = base
        .rsplit_once('/')
        .filter(|(server, _)| !server.ends_with('/'))
        .expect("LAPSED_TEST_POSTGRES ends with /DATABASE");
    format!("{server}/{name}{parameters}")
}
