//! Daemons that are killed while they send: every message arrives, and what arrives twice is no more than what was in
//! flight at each kill.
//!
//! Three daemons on a PostgreSQL of their own, and one on SQLite, work off one queue into a server that writes down each
//! Message-ID at the final dot and answers a little later. At random points of the queue one of them dies by SIGKILL and
//! another is started; PostgreSQL itself is stopped and started meanwhile. What a dead daemon had claimed is leased for five
//! more minutes. Rather than wait, the test ends these leases, and no others: nothing else in the store is touched by hand.
//!
//! With LAPSED_TEST_LONG=1 there are 5,000 messages and twenty kills, and PostgreSQL restarts twice. The figures are
//! printed: `tests/run --test suite kills:: -- --nocapture`.

use std::time::{Duration, Instant};

use rand::RngExt;

use crate::support::backend::{OnPostgres, OnSqlite};
use crate::support::cli::{Daemon, Place};
use crate::support::cluster::{Cluster, Stop};
use crate::support::many::Bulk;
use crate::support::queue::{CONNECTIONS, UNRECORDED, arrived, configure, plan};
use crate::support::smtp_script::{Action, Phase, Script, Server};

/// How many messages a daemon claims at most beyond one for each session.
const AHEAD: usize = 64;

/// How long the server takes to answer the end of a message.
const DELAY: Duration = Duration::from_millis(20);

/// How long nothing may move in the queue.
const PATIENCE: Duration = Duration::from_secs(60);

/// After so long without a message the queue is looked at: what is leased then is leased to nobody who sends.
const QUIET: Duration = Duration::from_secs(5);

struct Size {
    messages: usize,
    kills: usize,
    restarts: usize,
}

fn size() -> Size {
    if std::env::var("LAPSED_TEST_LONG").is_ok_and(|value| value == "1") {
        Size { messages: 5_000, kills: 20, restarts: 2 }
    } else {
        Size { messages: 400, kills: 4, restarts: 1 }
    }
}

/// What differs between the back ends.
trait Killed: Bulk {
    /// A daemon's id as SQL.
    fn holder(id: &str) -> String;
}

impl Killed for OnPostgres {
    fn holder(id: &str) -> String {
        format!("'{id}'")
    }
}

impl Killed for OnSqlite {
    fn holder(id: &str) -> String {
        format!("X'{}'", id.replace('-', ""))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_daemons_on_postgresql() {
    let mut cluster = Cluster::start();
    let backend = OnPostgres::on(cluster.database().await);
    let place = Place::with_store(&backend.database.url);
    kill_again_and_again(&backend, place, 3, Some(&mut cluster)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_daemon_on_sqlite() {
    let backend = OnSqlite::fresh();
    let place = Place::with_store(&backend.url());
    kill_again_and_again(&backend, place, 1, None).await;
}

/// What happens at a point of the queue.
#[derive(Clone, Copy)]
enum Blow {
    Kill,
    Restart(Stop),
}

async fn kill_again_and_again<B: Killed>(backend: &B, place: Place, daemons: usize, mut cluster: Option<&mut Cluster>) {
    let size = size();
    plan(&place, size.messages);
    let server = Script::new().pipelining().on(Phase::Dot, Action::After(DELAY)).start().await;
    configure(&place, server.port());
    let mut running: Vec<Daemon> = (0..daemons).map(|_| place.daemon()).collect();
    let mut killed = Vec::new();
    for (at, blow) in blows(&size, cluster.is_some()) {
        wait_for(&server, at).await;
        match (blow, cluster.as_deref_mut()) {
            (Blow::Restart(how), Some(cluster)) => cluster.restart(how),
            (Blow::Restart(_), None) => {}
            (Blow::Kill, _) => {
                let victim = running.swap_remove(rand::rng().random_range(0..running.len()));
                let holder = victim.holder();
                victim.kill();
                killed.push(InFlight { messages: end_leases(backend, &holder).await, holder });
                running.push(place.daemon());
            }
        }
    }
    let left_behind = drain(backend, &server, &mut killed).await;
    for daemon in running {
        daemon.stop();
    }

    let arrived = arrived(&server);
    let in_flight: Vec<usize> = killed.iter().map(|killed| killed.messages).collect();
    let lost = size.messages - arrived.len();
    let repeated: usize = arrived.values().map(|times| times - 1).sum();
    println!(
        "{} messages, {daemons} daemons: {} killed, {lost} lost, {repeated} repeated; in flight at the kills: \
         {in_flight:?}, claimed for nothing when the store went away: {left_behind}",
        size.messages,
        killed.len()
    );
    assert_eq!(lost, 0, "every Message-ID arrived");
    assert_eq!(killed.len(), size.kills);
    assert!(in_flight.iter().all(|claimed| *claimed <= CONNECTIONS + AHEAD), "claimed in vain: {in_flight:?}");
    assert!(repeated <= in_flight.iter().map(|claimed| *claimed.min(&UNRECORDED)).sum(), "{repeated} of {in_flight:?}");
    let unsent = backend.count("SELECT COUNT(*) FROM messages WHERE state <> 'sent'").await;
    let unsaid = backend.count("SELECT COUNT(*) FROM reminders WHERE state <> 'sent'").await;
    let all = backend.count("SELECT COUNT(*) FROM messages").await;
    assert_eq!((all, unsent, unsaid), (i64::try_from(size.messages).expect("few"), 0, 0));
}

/// What happens after how many messages: each blow at a random point of its share of the queue.
fn blows(size: &Size, restarts: bool) -> Vec<(usize, Blow)> {
    let restarts = if restarts { size.restarts } else { 0 };
    let mut blows = vec![Blow::Kill; size.kills];
    for (n, how) in [Stop::Fast, Stop::Immediate].into_iter().take(restarts).enumerate() {
        blows.insert((n + 1) * blows.len() / (restarts + 1), Blow::Restart(how));
    }
    // The last share belongs to nobody: a blow must not come when everything is done.
    let share = size.messages / (blows.len() + 1);
    let random = |n: usize| n * share + rand::rng().random_range(0..share);
    blows.into_iter().enumerate().map(|(n, blow)| (random(n), blow)).collect()
}

/// What a daemon had claimed and not recorded when it died.
struct InFlight {
    holder: String,
    messages: usize,
}

/// Waits until the server has seen the ends of so many messages.
async fn wait_for(server: &Server, messages: usize) {
    let (mut seen, mut since) = (server.times(Phase::Dot), Instant::now());
    while seen < messages {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let now = server.times(Phase::Dot);
        if now > seen {
            (seen, since) = (now, Instant::now());
        }
        assert!(since.elapsed() < PATIENCE, "no message in {PATIENCE:?} after {seen}");
    }
}

/// Waits until the queue is empty, ending the leases that nobody keeps. Returns how many messages a daemon that lives had
/// claimed and does not send: the store went away before it could read them.
async fn drain<B: Killed>(backend: &B, server: &Server, killed: &mut [InFlight]) -> usize {
    let (mut left_behind, mut seen, mut since) = (0, 0, Instant::now());
    loop {
        let waiting = "SELECT COUNT(*) FROM messages WHERE state IN ('open', 'retry', 'sending')";
        let waiting = backend.count(waiting).await;
        if waiting == 0 {
            return left_behind;
        }
        // A claim that was on its way to the store when its daemon died is committed after that.
        for dead in killed.iter_mut() {
            dead.messages += end_leases(backend, &dead.holder).await;
        }
        let now = server.times(Phase::Dot);
        if now > seen {
            (seen, since) = (now, Instant::now());
        } else if since.elapsed() > QUIET && left_behind == 0 {
            left_behind = end(backend, "TRUE").await;
        }
        assert!(since.elapsed() < PATIENCE, "{waiting} messages wait, and none is sent");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Ends the leases of this daemon; returns how many there were.
async fn end_leases<B: Killed>(backend: &B, holder: &str) -> usize {
    end(backend, &format!("lease_holder = {}", B::holder(holder))).await
}

async fn end<B: Killed>(backend: &B, which: &str) -> usize {
    let over = B::instant("0");
    let leased = format!("state = 'sending' AND not_before > {over} AND {which}");
    let found = backend.count(&format!("SELECT COUNT(*) FROM messages WHERE {leased}")).await;
    backend.execute(&format!("UPDATE messages SET not_before = {over} WHERE {leased}")).await;
    usize::try_from(found).expect("a count")
}
