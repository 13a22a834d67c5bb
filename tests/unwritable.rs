//! A store that can be read and not written, while messages are on their way: the daemon says so, waits, and goes on by
//! itself. Everything arrives, and nothing twice.
//!
//! Four messages stand at the final dot, and are taken while the store cannot be written. What follows is one story, on a
//! disk that is full, a file that may not grow, a PostgreSQL whose disk is full, one that is set to only read, and one that was
//! demoted.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::backend::{Backend, OnPostgres, OnSqlite};
use crate::support::cli::{Daemon, Place};
use crate::support::cluster::Cluster;
use crate::support::queue::{CONNECTIONS, UNRECORDED, arrived, configure, plan};
use crate::support::smtp_script::{Action, Phase, Script, Server};

const MESSAGES: usize = 100;

/// How long the daemon may take to send them all when it can write again.
const PATIENCE: Duration = Duration::from_secs(60);

/// A queue, a daemon that works it off, and a mail server that holds the first message of each session.
struct Story<B> {
    place: Place,
    /// `None` where nobody but the daemon gets at the store.
    backend: Option<B>,
    server: Server,
    daemon: Daemon,
}

impl<B: Backend> Story<B> {
    /// Begins, and returns when each session has a message at its end, and nothing is recorded.
    async fn begin(place: Place, daemon: impl FnOnce(&Place) -> Daemon, backend: Option<B>) -> Self {
        plan(&place, MESSAGES);
        let mut held = 0..CONNECTIONS;
        let server = Script::new().pipelining().decide(Phase::Dot, move |_| held.next().map(|_| Action::Stall));
        let server = server.start().await;
        configure(&place, server.port());
        let daemon = daemon(&place);
        server.reached(Phase::Dot, CONNECTIONS).await;
        Self { place, backend, server, daemon }
    }

    /// The store cannot be written from now on, and the server takes what it held; the daemon's log says these words then.
    async fn goes_wrong(&mut self, says: &str) {
        self.goes_wrong_after(0, says).await;
    }

    /// The same, where so many messages at most may still be recorded before.
    async fn goes_wrong_after(&mut self, most: usize, says: &str) {
        (0..CONNECTIONS).for_each(|_| self.server.release());
        self.daemon.wait_for_log("cannot record messages yet");
        self.daemon.wait_for_log(says);
        let recorded = self.sent().await;
        assert!(recorded <= most, "the store cannot be written: {recorded}");
        let taken = self.server.accepted().len();
        assert!(taken >= CONNECTIONS, "what it held: {taken}");
        assert!((1..=UNRECORDED).contains(&(taken - recorded)), "handed over and not recorded: {taken} - {recorded}");
    }

    /// The store can be written again: the same process goes on.
    async fn ends_well(self) {
        let started = Instant::now();
        while self.sent().await < MESSAGES {
            assert!(
                started.elapsed() < PATIENCE,
                "{} of {MESSAGES} are sent:\n{}",
                self.sent().await,
                self.daemon.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let arrived = arrived(&self.server);
        let repeated = arrived.values().filter(|times| **times > 1).count();
        assert_eq!((arrived.len(), repeated), (MESSAGES, 0), "every Message-ID arrived, once");
        let log = self.daemon.stop();
        drop(self.place);
        assert!(!log.contains("took this message over"), "{log}");
    }

    fn backend(&self) -> &B {
        self.backend.as_ref().expect("a store that a test gets at")
    }

    async fn sent(&self) -> usize {
        let Some(backend) = &self.backend else {
            // Said when it is recorded.
            return self.daemon.log().matches("sent a message").count();
        };
        let sent = backend.count("SELECT COUNT(*) FROM messages WHERE state = 'sent'").await;
        sent.try_into().expect("a count")
    }
}

impl Story<OnPostgres> {
    async fn on_postgres(backend: OnPostgres) -> Self {
        let place = Place::with_store(&backend.database.url);
        Self::begin(place, Place::daemon, Some(backend)).await
    }
}

/// Sets how large the files may grow that a process writes.
fn limit_files(daemon: &Daemon, most: &str) {
    let arguments = [format!("--pid={}", daemon.id()), format!("--fsize={most}:unlimited")];
    let set = Command::new("prlimit").args(&arguments).status().expect("prlimit");
    assert!(set.success(), "prlimit {arguments:?}");
}

/// A file system of its own, which goes away with the daemon, and is filled from outside.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full() {
    let place = Place::new();
    std::fs::create_dir(place.path("small")).expect("a directory");
    let mount = "mount -t tmpfs -o size=16m lapsed-full small";
    let mut probe = Command::new("unshare");
    probe.args(["--mount", "bash", "-c", mount]).current_dir(place.path("")).stderr(Stdio::null());
    if !probe.status().is_ok_and(|status| status.success()) {
        eprintln!("skipped: a file system of its own needs root");
        return;
    }
    let moved =
        format!("{mount} && cp lapsed.db small && LAPSED__STORE__URL=sqlite:small/lapsed.db exec \"$0\" \"$@\"");
    let filler = place.path("small/filler");
    let script = format!("exec unshare --mount bash -c '{moved}' \"$0\" \"$@\"");
    let mut story = Story::begin(place, |place| place.daemon_after(&script), None::<OnSqlite>).await;
    let filler = format!("/proc/{}/root{}", story.daemon.id(), filler.display());
    let mut file = std::fs::File::create(&filler).expect("a file");
    while file.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
    // A record or two may still find room that something else gives back.
    story.goes_wrong_after(UNRECORDED, "the store cannot be written: the disk is full").await;
    std::fs::remove_file(filler).expect("it goes");
    drop(file);
    story.ends_well().await;
}

/// As with a quota: the write fails, and the signal that would come with it is ignored.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_may_not_grow() {
    let backend = OnSqlite::fresh();
    let place = Place::with_store(&backend.url());
    let mut story = Story::begin(place, |place| place.daemon_after("trap '' XFSZ"), Some(backend)).await;
    let log = story.backend().file().with_extension("db-wal");
    let log = || std::fs::metadata(&log).expect("the write-ahead log").len();
    // No file may grow beyond that, and the daemon's own log stays shorter. How much has been written since the last checkpoint is
    // the daemon's affair.
    for _ in 0..100 {
        if log() > 1 << 17 {
            break;
        }
        story.backend().execute("UPDATE contacts SET created_at = created_at + 1").await;
    }
    let log = log();
    assert!(log > 1 << 17, "{log}");
    limit_files(&story.daemon, &log.to_string());
    story.goes_wrong("the store cannot be written: a write failed").await;
    limit_files(&story.daemon, "unlimited");
    story.ends_well().await;
}

/// Every write fails as on a full disk, while a table says that it is full.
const FULL_DISK: &str = "
    CREATE TABLE disk (is_full BOOLEAN NOT NULL);
    INSERT INTO disk VALUES (TRUE);
    CREATE FUNCTION write_to_disk() RETURNS TRIGGER LANGUAGE plpgsql AS $$
        BEGIN
            IF (SELECT is_full FROM disk) THEN
                RAISE disk_full USING MESSAGE = 'could not extend file: No space left on device';
            END IF;
            RETURN NULL;
        END
    $$;
    CREATE TRIGGER disk BEFORE INSERT OR UPDATE OR DELETE ON messages EXECUTE FUNCTION write_to_disk();
    CREATE TRIGGER disk BEFORE INSERT OR UPDATE OR DELETE ON reminders EXECUTE FUNCTION write_to_disk();
    CREATE TRIGGER disk BEFORE INSERT OR UPDATE OR DELETE ON jobs EXECUTE FUNCTION write_to_disk();";

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_whose_disk_is_full() {
    let mut story = Story::on_postgres(OnPostgres::make().await).await;
    story.backend().execute(FULL_DISK).await;
    story.goes_wrong("the store cannot be written: the disk is full").await;
    story.backend().execute("UPDATE disk SET is_full = FALSE").await;
    story.ends_well().await;
}

/// Connections that were made meanwhile only read for as long as they live: the daemon makes others.
#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_that_is_set_to_only_read() {
    let mut story = Story::on_postgres(OnPostgres::make().await).await;
    let only_read = |on: &str| {
        let name = &story.backend().database.name;
        sqlx::AssertSqlSafe(format!("ALTER DATABASE {name} SET default_transaction_read_only = {on}"))
    };
    let (on, off) = (only_read("on"), only_read("off"));
    let mut admin = story.backend().database.admin().await;
    sqlx::query(on).execute(&mut admin).await.expect("a setting");
    story.backend().database.cut_connections().await;
    story.goes_wrong("read-only transaction").await;
    sqlx::query(off).execute(&mut admin).await.expect("a setting");
    story.ends_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgresql_that_was_demoted() {
    let mut cluster = Cluster::start();
    let mut story = Story::on_postgres(OnPostgres::on(cluster.database().await)).await;
    cluster.demote();
    story.goes_wrong("read-only transaction").await;
    cluster.promote(&story.backend().database).await;
    story.ends_well().await;
}
