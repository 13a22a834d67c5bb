//! A PostgreSQL server of one test's own, which the test may stop and start: nobody else notices.
//!
//! Guarantees: it listens on 127.0.0.1 only, on the same port for all its life, asks for a password, and is gone after the
//! drop with its data. Its parent's process group is its own, so that it also ends with a run that is cut short.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rand::RngExt;
use tempfile::TempDir;

use super::cli::eventually;
use super::postgres::{Database, fresh_in};
use super::smtp::id_of;

/// How long the server may take to start and to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a server ends.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// It cuts its connections and writes what there is to write.
    Fast,
    /// It leaves everything as it is, as after a power cut, and recovers when it starts.
    Immediate,
}

/// A running server.
pub struct Cluster {
    home: TempDir,
    port: u16,
    password: String,
    server: Child,
}

impl Cluster {
    /// Makes an empty one and starts it.
    ///
    /// # Panics
    /// When `tests/run` did not find PostgreSQL's binaries, or they do not do what they should.
    pub fn start() -> Self {
        let home = TempDir::new().expect("a directory");
        let password = super::unique_name("secret");
        std::fs::write(home.path().join("password"), format!("{password}\n")).expect("a file");
        if let Some((user, group)) = unprivileged() {
            for path in [home.path().to_path_buf(), home.path().join("password")] {
                chown(path, Some(user), Some(group)).expect("chown to the server's user");
            }
        }
        let data = home.path().join("data");
        let mut initdb = program("initdb", &home);
        initdb.args(["--username=postgres", "--auth-local=trust", "--auth-host=password", "--encoding=UTF8"]);
        initdb.args(["--locale=C", "--no-sync", "--pwfile=password", "-D"]).arg(&data);
        let made = initdb.output().expect("initdb starts");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        for _ in 0..5 {
            // Below the ephemeral range, so that no client of another test sits on it while the server is away.
            let port = rand::rng().random_range(20_000..32_000);
            if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err() {
                continue;
            }
            if let Some(server) = serve(&home, port) {
                return Self { home, port, password, server };
            }
        }
        panic!("PostgreSQL does not start: {}", log(&home));
    }

    /// An empty database in it.
    pub async fn database(&self) -> Database {
        fresh_in(&format!("postgres://postgres:{}@127.0.0.1:{}/postgres", self.password, self.port)).await
    }

    /// Ends the server and starts it again.
    pub fn restart(&mut self, how: Stop) {
        self.stop(how);
        self.start_again();
    }

    /// Ends the server and starts it again as one that only reads, as a failover to another leaves the old one.
    pub fn demote(&mut self) {
        self.stop(Stop::Fast);
        let signal = self.home.path().join("data/standby.signal");
        std::fs::write(&signal, "").expect("a file");
        if let Some((user, group)) = unprivileged() {
            chown(&signal, Some(user), Some(group)).expect("chown to the server's user");
        }
        self.start_again();
    }

    /// Makes a server that only reads one that writes, while it runs.
    pub async fn promote(&self, database: &Database) {
        let mut admin = database.admin().await;
        let promoted: bool = sqlx::query_scalar("SELECT pg_promote()").fetch_one(&mut admin).await.expect("pg_promote");
        assert!(promoted, "PostgreSQL is not promoted: {}", log(&self.home));
    }

    fn stop(&mut self, how: Stop) {
        let signal = match how {
            Stop::Fast => "INT",
            Stop::Immediate => "QUIT",
        };
        let id = self.server.id().to_string();
        let sent = Command::new("kill").args(["-s", signal, &id]).status().expect("kill");
        assert!(sent.success(), "kill -s {signal} {id}");
        eventually("the end of PostgreSQL", PATIENCE, || self.server.try_wait().expect("a child"));
    }

    fn start_again(&mut self) {
        self.server = serve(&self.home, self.port).unwrap_or_else(|| panic!("PostgreSQL: {}", log(&self.home)));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SIGQUIT lets it end its own processes, which SIGKILL would not.
        let _ = Command::new("kill").args(["-s", "QUIT", &self.server.id().to_string()]).status();
        let _ = self.server.wait();
    }
}

/// A server that takes connections; `None` when it ended before.
fn serve(home: &TempDir, port: u16) -> Option<Child> {
    let state = home.path().join("data/postmaster.pid");
    let log = std::fs::File::options().append(true).create(true).open(home.path().join("log")).expect("a log");
    let mut command = program("postgres", home);
    command.arg("-D").arg(home.path().join("data")).arg("-k").arg(home.path()).args(["-p", &port.to_string()]);
    // The data outlives the server and not the machine, so nothing needs to be on the disk.
    for setting in ["listen_addresses=127.0.0.1", "fsync=off", "shared_buffers=64MB", "timezone=UTC"] {
        command.args(["-c", setting]);
    }
    let mut server = command.stdout(Stdio::null()).stderr(log).spawn().expect("postgres starts");
    eventually("PostgreSQL takes connections", PATIENCE, || {
        if server.try_wait().expect("a child").is_some() {
            return Some(false);
        }
        // The last line of this file is the state of the server; pg_ctl reads it too.
        let state = std::fs::read_to_string(&state).unwrap_or_default();
        state.lines().any(|line| line.starts_with("ready") || line.starts_with("standby")).then_some(true)
    })
    .then_some(server)
}

/// One of PostgreSQL's programs, which refuse to run as root.
fn program(name: &str, home: &TempDir) -> Command {
    let binaries = super::from_environment("LAPSED_TEST_POSTGRES_BIN", "finds PostgreSQL's binaries");
    let mut command = Command::new(PathBuf::from(binaries).join(name));
    command.current_dir(home.path()).env_clear().env("LC_ALL", "C").env("HOME", home.path()).stdin(Stdio::null());
    if let Some((user, group)) = unprivileged() {
        command.uid(user).gid(group);
    }
    command
}

/// As whom the server runs, where this process is root.
fn unprivileged() -> Option<(u32, u32)> {
    let me = Command::new("id").arg("-u").output().expect("the command id");
    (me.stdout == b"0\n").then(|| (id_of("-u", "nobody"), id_of("-g", "nobody")))
}

fn log(home: &TempDir) -> String {
    std::fs::read_to_string(home.path().join("log")).unwrap_or_default()
}
