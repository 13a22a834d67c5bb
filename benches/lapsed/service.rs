//! The daemon as a service: until it is ready, until other settings hold, what it costs while there is nothing to do, and what it
//! occupies after a day's work; and what the commands cost that read much of the store.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lapsed::store::outbox::MessageState;
use lapsed::store::{Outbox, Reports, Store};
use tempfile::TempDir;

use crate::Sizes;
use crate::fill::{Shape, at, fill};
use crate::place::Place;
use crate::program::{lapsed, memory};
use crate::table::{Line, median};

/// How long the daemon runs before and while its processor time is read.
const QUIET: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(60));

/// How long a notification may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the daemon is left alone after it.
const REST: Duration = Duration::from_secs(20);

/// How long a day's work may take.
const LONGEST_DAY: Duration = Duration::from_secs(900);

/// Start, reload, idle, forecast and dry run beside a store in which nothing is due; and then a day's work.
pub async fn rows<P: Place>(sizes: &Sizes) -> Vec<Line> {
    let tokens = sizes.of(1_000_000);
    let deadline = "86400 * 35 + CAST(i AS BIGINT) * 7919 % 31536000".into();
    let place: P = fill(&Shape { owners: tokens / 10, tokens, deadline, queued: 0, queued_for: 3_600 }).await;
    let directory = TempDir::new().expect("a temporary directory");
    let config = directory.path().join("lapsed.toml");
    let mails = directory.path().join("mails");
    let written = |hours: u32| {
        let text = format!(
            "[reminders]\nstale_after = \"{hours}h\"\n[digest]\nhold = \"1s\"\n[guard]\nmessages_per_hour = 0\n\
             [mail]\ntransport = \"maildir\"\nfrom = \"a@example.org\"\n[mail.maildir]\npath = {mails:?}\n"
        );
        std::fs::write(&config, text).expect("a file");
    };
    written(48);
    let socket = UnixDatagram::bind(directory.path().join("notify")).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let command = |arguments: &[&str]| {
        let mut command = lapsed(&place, directory.path());
        command.arg("--config").arg(&config).args(arguments).stdout(Stdio::null());
        command
    };
    // The first one writes what only a first one has to: watermarks, the fallback, what the planner knows.
    assert!(command(&["run", "--once"]).status().expect("a run").success());

    let (mut ready, mut reloaded) = (Vec::new(), Vec::new());
    let (mut forecast, mut dry) = (Vec::new(), Vec::new());
    for run in 0..sizes.runs {
        let started = Instant::now();
        let mut daemon =
            command(&["run"]).env("NOTIFY_SOCKET", directory.path().join("notify")).spawn().expect("a start");
        hear(&socket, "READY=1");
        ready.push(started.elapsed().as_secs_f64());
        // Its first passes are over.
        tokio::time::sleep(Duration::from_secs(2)).await;
        written(49 + u32::try_from(run).expect("small"));
        let asked = Instant::now();
        signal(&daemon, "HUP");
        hear(&socket, "RELOADING=1");
        hear(&socket, "READY=1");
        reloaded.push(asked.elapsed().as_secs_f64());
        signal(&daemon, "TERM");
        daemon.wait().expect("an end");
        forecast.push(timed(&mut command(&["forecast", "--format", "csv"])));
        dry.push(timed(&mut command(&["run", "--once", "--dry-run", "--format", "csv"])));
    }
    let idle = idle(&mut command(&["run"])).await;
    let day = day(&place, &mut command(&["run"])).await;
    let of = |what: &str| format!("{what} beside {tokens} tokens, {}", P::NAMES.0);
    let line = |what: &str, got: String, wanted: &'static str| Line {
        what: of(what),
        got,
        against: String::new(),
        ratio: String::new(),
        wanted,
    };
    let millis = |seconds: Vec<f64>| format!("{:.0} ms", 1e3 * median(seconds));
    let with_memory = |runs: &[(f64, f64)]| {
        let (seconds, memory) = (runs.iter().map(|(seconds, _)| *seconds), runs.iter().map(|(_, memory)| *memory));
        format!("{:.2} s, {:.0} MB", median(seconds), median(memory))
    };
    vec![
        line("from the start to READY", millis(ready), if P::NAMES.0 == "SQLite" { "150 ms" } else { "300 ms" }),
        line("from SIGHUP to READY", millis(reloaded), "50 ms"),
        line("the daemon's processor time, idle", idle, "0.2 % of one core"),
        line("the daemon's memory after a day's work", day, "30 MB"),
        line("forecast of 90 days", with_memory(&forecast), "3 s"),
        line("dry run, nothing due", with_memory(&dry), "flat memory"),
    ]
}

fn hear(socket: &UnixDatagram, wanted: &str) {
    let mut buffer = [0; 4096];
    loop {
        let length = socket.recv(&mut buffer).expect(wanted);
        if String::from_utf8_lossy(&buffer[..length]).lines().any(|line| line == wanted) {
            return;
        }
    }
}

fn signal(daemon: &Child, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &daemon.id().to_string()]).status().expect("kill");
    assert!(sent.success());
}

/// Seconds, and the most memory that it occupied of its own, in MB: without the pages of files that it maps.
fn timed(command: &mut Command) -> (f64, f64) {
    let started = Instant::now();
    let mut child = command.spawn().expect("a start");
    let mut peak = 0.0_f64;
    let status = loop {
        peak = peak.max(memory(&child, "RssAnon:").unwrap_or(0.0));
        match child.try_wait().expect("a child") {
            Some(status) => break status,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    assert!(status.success(), "{status}");
    (started.elapsed().as_secs_f64(), peak)
}

/// The share of one core, and what it occupies then.
async fn idle(command: &mut Command) -> String {
    let mut daemon = command.spawn().expect("a start");
    tokio::time::sleep(QUIET.0).await;
    let (before, started) = (ticks(&daemon), Instant::now());
    tokio::time::sleep(QUIET.1).await;
    let used = (ticks(&daemon) - before) as f64 / 100.0 / started.elapsed().as_secs_f64();
    let resident = memory(&daemon, "VmRSS:").expect("it runs");
    daemon.kill().expect("a child");
    daemon.wait().expect("a child");
    format!("{:.2} %, {resident:.1} MB", 100.0 * used)
}

/// What it occupies when it has told of as many tokens as fall due on a day, at three leads and at their deadlines, where each
/// token lives a year, and has rested: all of it at once, which takes no less memory than a day.
async fn day<P: Place>(place: &P, command: &mut Command) -> String {
    let (soon, made) = (at::<P>("80000"), at::<P>("-90 * 86400"));
    let nearest = at::<P>("86400 * 39");
    place
        .fill(&format!(
            "UPDATE tokens SET expires_at = {soon}, deadline_set_at = {made}, generation = generation + 1, unplanned = TRUE \
             WHERE status = 'active' AND expires_at <= {nearest}"
        ))
        .await;
    let store = place.open().await;
    let mut daemon = command.spawn().expect("a start");
    let started = Instant::now();
    let mut sent = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(started.elapsed() < LONGEST_DAY && daemon.try_wait().expect("a child").is_none(), "it does not get on");
        let waiting = store.waiting().await.expect("a read");
        let counts = store.message_counts().await.expect("a read");
        let now = counts.iter().filter(|(state, _)| *state == MessageState::Sent).map(|(_, n)| n).sum::<u64>();
        if now > 0 && now == sent && waiting.open + waiting.retry + waiting.sending == 0 {
            break;
        }
        sent = now;
    }
    tokio::time::sleep(REST).await;
    let (resident, peak) = (memory(&daemon, "VmRSS:").expect("it runs"), memory(&daemon, "VmHWM:").expect("it runs"));
    signal(&daemon, "TERM");
    daemon.wait().expect("an end");
    store.close().await;
    format!("{resident:.1} MB, {peak:.1} MB at most; {sent} mails")
}

/// The processor time of a process, in hundredths of a second (proc(5): utime and stime).
fn ticks(daemon: &Child) -> u64 {
    let path = Path::new("/proc").join(daemon.id().to_string()).join("stat");
    let stat = std::fs::read_to_string(path).expect("it runs");
    let (_, rest) = stat.rsplit_once(") ").expect("the form of proc(5)");
    rest.split(' ').skip(11).take(2).map(|n| n.parse::<u64>().expect("a number")).sum()
}
