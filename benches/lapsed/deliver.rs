//! `deliver`: the program works off a queue, against smtp-source with mails of the same size.

use std::path::Path;
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::Sizes;
use crate::fill::{Shape, fill};
use crate::place::{OnPg, Place, timed};
use crate::program::{lapsed, memory};
use crate::relay::{Far, Sink, source};
use crate::support::smtp_script::{Action, Phase, Script};
use crate::table::{Line, median, ratio};

/// Sessions of one process, where nothing else is said.
const SESSIONS: usize = 16;

/// From the client to the far server, and back.
const ONE_WAY: Duration = Duration::from_millis(10);

/// How long the server takes for a message that stalls, which is one in [`STALLS_EVERY`].
const STALL: Duration = Duration::from_secs(5);
const STALLS_EVERY: u64 = 100;

/// How long each message takes the server, where processes are compared.
const EACH: Duration = Duration::from_millis(20);

/// A queue of messages that are due, each to a contact of its own about one token.
async fn queue<P: Place>(messages: u64) -> P {
    // Out of reach of every lead: nothing else is to be done.
    let deadline = "86400 * 35 + i".into();
    fill(&Shape { owners: messages, tokens: messages, deadline, queued: messages, queued_for: -1 }).await
}

/// What one or several processes did together.
struct Ran {
    seconds: f64,
    /// Of all processors, user and system.
    cpu_seconds: f64,
    /// The most that the largest process occupied, in MB.
    memory: f64,
}

impl Ran {
    fn rate(&self, messages: u64) -> f64 {
        messages as f64 / self.seconds
    }
}

/// Works off a copy of the queue with so many processes of so many sessions; start and end of the programs included.
async fn deliver<P: Place>(queue: &P, messages: u64, port: u16, processes: usize, sessions: usize) -> Ran {
    let place = queue.copy().await;
    let directory = TempDir::new().expect("a directory");
    let config = directory.path().join("lapsed.toml");
    let text = format!(
        "[mail]\ntransport = \"smtp\"\nfrom = \"Tokens <tokens@example.org>\"\n\
         manage_url = \"https://example.org/tokens/{{token_id}}\"\n\n\
         [mail.smtp]\nhost = \"127.0.0.1\"\nport = {port}\ntls = \"none\"\nconnections = {sessions}\n"
    );
    std::fs::write(&config, text).expect("a file");
    let before = cpu_of_children();
    let started = Instant::now();
    let start = || {
        let mut command = lapsed(&place, directory.path());
        command.arg("--config").arg(&config).args(["run", "--once"]).stdout(Stdio::piped());
        command.spawn().expect("lapsed starts")
    };
    let mut running: Vec<_> = (0..processes).map(|_| start()).collect();
    let mut largest = 0.0_f64;
    while running.iter_mut().any(|child| child.try_wait().expect("a child").is_none()) {
        largest = running.iter().filter_map(|child| memory(child, "VmHWM:")).fold(largest, f64::max);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let seconds = started.elapsed().as_secs_f64();
    let mut sent = 0;
    for child in running {
        let output = child.wait_with_output().expect("a child");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}");
        let count = text.lines().find_map(|line| line.strip_prefix("deliver")?.trim().strip_prefix("messages sent: "));
        sent += count.map_or(0, |count| count.parse::<u64>().expect("a number"));
    }
    assert_eq!(sent, messages, "each once, and nothing else");
    Ran { seconds, cpu_seconds: cpu_of_children() - before, memory: largest }
}

/// The processor time of the children of this process that have been waited for.
fn cpu_of_children() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    // The name of the program may hold spaces; the fields behind it are counted from 3 (proc(5)).
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks: f64 = [16, 17].iter().map(|field| fields[field - 3].parse::<f64>().expect("a number")).sum();
    ticks / 100.0 // USER_HZ on every architecture that Linux runs on today
}

/// One of our mails, as smtp-source reads it.
async fn sample(directory: &Path) -> (std::path::PathBuf, usize) {
    let server = Script::new().start().await;
    deliver(&queue::<OnPg>(1).await, 1, server.port(), 1, 1).await;
    let mail = server.accepted().remove(0).data;
    let path = directory.join("mail");
    let bytes = mail.len();
    std::fs::write(&path, String::from_utf8(mail).expect("ASCII").replace("\r\n", "\n")).expect("a file");
    (path, bytes)
}

/// Ours and smtp-source in turn, on the same server.
struct Pairs {
    bytes: usize,
    ours: Vec<Ran>,
    /// Messages in a second.
    source: Vec<f64>,
}

async fn pairs<P: Place>(sizes: &Sizes, messages: u64, port: u16, sessions: usize) -> Pairs {
    let directory = TempDir::new().expect("a directory");
    let (mail, bytes) = sample(directory.path()).await;
    let queue: P = queue(messages).await;
    let mut pairs = Pairs { bytes, ours: Vec::new(), source: Vec::new() };
    for _ in 0..sizes.runs {
        let mut command = source(port, sessions, messages, &mail);
        // Elsewhere: the proxy before the server runs here.
        let took = tokio::task::spawn_blocking(move || timed(&mut command, "")).await.expect("no panic");
        pairs.source.push(messages as f64 / took.as_secs_f64());
        pairs.ours.push(deliver(&queue, messages, port, 1, sessions).await);
    }
    pairs
}

fn line(what: String, messages: u64, pairs: &Pairs, against: &str, wanted: &'static str) -> Line {
    let rates: Vec<f64> = pairs.ours.iter().map(|ran| ran.rate(messages)).collect();
    let ratios = rates.iter().zip(&pairs.source).map(|(ours, source)| ours / source);
    Line {
        what: format!("{what}, {messages} messages of {} bytes", pairs.bytes),
        ratio: ratio(median(ratios)),
        got: format!("{:.0}/s", median(rates.iter().copied())),
        against: format!("{against}: {:.0}/s", median(pairs.source.iter().copied())),
        wanted,
    }
}

/// smtp-sink on this machine; what a message costs us, and what memory we take.
pub async fn near<P: Place>(sizes: &Sizes) -> Vec<Line> {
    let messages = if sizes.quick { 5_000 } else { 20_000 };
    let sink = Sink::start().await;
    let pairs = pairs::<P>(sizes, messages, sink.port, SESSIONS).await;
    let store = P::NAMES.0;
    let cpu = median(pairs.ours.iter().map(|ran| 1e3 * ran.cpu_seconds / messages as f64));
    let memory = median(pairs.ours.iter().map(|ran| ran.memory));
    let reported = |what: &str, got: String, wanted| Line {
        what: format!("{what}, in the same runs, {store}"),
        got,
        against: String::new(),
        ratio: String::new(),
        wanted,
    };
    let what = format!("deliver: loopback, {SESSIONS} sessions, {store}");
    vec![
        line(what, messages, &pairs, "smtp-source -d -s 16", "0.5, aim 0.7"),
        reported("our own CPU for a message", format!("{cpu:.2} ms"), "under 0.3 ms"),
        reported("memory while delivering, at most", format!("{memory:.1} MB"), "60 MB"),
    ]
}

/// The same server far away.
pub async fn far(sizes: &Sizes) -> Line {
    let messages = sizes.of(20_000);
    let sink = Sink::start().await;
    let far = Far::from(sink.port, ONE_WAY).await;
    let pairs = pairs::<OnPg>(sizes, messages, far.port, SESSIONS).await;
    let what = format!("deliver: {SESSIONS} sessions, 20 ms round trip, PostgreSQL");
    line(what, messages, &pairs, "smtp-source -d -s 16", "1.5, aim 1.8")
}

/// One session.
pub async fn one(sizes: &Sizes) -> Line {
    let messages = if sizes.quick { 5_000 } else { 20_000 };
    let sink = Sink::start().await;
    let pairs = pairs::<OnPg>(sizes, messages, sink.port, 1).await;
    line("deliver: loopback, one session, PostgreSQL".into(), messages, &pairs, "smtp-source -d -s 1", "0.5")
}

/// A server that stalls now and then, against itself when it does not.
pub async fn slow(sizes: &Sizes) -> Line {
    let messages = if sizes.quick { 5_000 } else { 20_000 };
    let queue: OnPg = queue(messages).await;
    let (mut even, mut stalling, mut stalled) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..sizes.runs {
        let server = Script::new().pipelining().start().await;
        even.push(deliver(&queue, messages, server.port(), 1, SESSIONS).await.rate(messages));
        drop(server);
        let count = Mutex::new(0_u64);
        let server = Script::new().pipelining().decide(Phase::Dot, move |_| {
            let mut count = count.lock().expect("no panic");
            *count += 1;
            count.is_multiple_of(STALLS_EVERY).then_some(Action::After(STALL))
        });
        let server = server.start().await;
        let ran = deliver(&queue, messages, server.port(), 1, SESSIONS).await;
        stalled.push((messages / STALLS_EVERY) as f64 * STALL.as_secs_f64() / ran.seconds);
        stalling.push(ran.rate(messages - messages / STALLS_EVERY));
    }
    let ratios = stalling.iter().zip(&even).map(|(stalling, even)| stalling / even);
    let left = 1.0 - median(stalled.iter().copied()) / SESSIONS as f64;
    Line {
        what: format!("deliver: 1 in 100 of {messages} messages stalls for 5 s, {SESSIONS} sessions, PostgreSQL"),
        ratio: ratio(median(ratios)),
        got: format!("the others {:.0}/s, with {:.1} sessions stalled", median(stalling), median(stalled)),
        against: format!("none stalls: {:.0}/s; the share of the sessions that do not: {left:.2}", median(even)),
        wanted: "more than that share",
    }
}

/// Several processes on one PostgreSQL.
pub async fn scaling(sizes: &Sizes) -> Line {
    let messages = if sizes.quick { 2_000 } else { 10_000 };
    let queue: OnPg = queue(messages).await;
    let mut rates = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..sizes.runs {
        for (n, rates) in rates.iter_mut().enumerate() {
            let server = Script::new().pipelining().on(Phase::Dot, Action::After(EACH)).start().await;
            rates.push(deliver(&queue, messages, server.port(), n + 1, 4).await.rate(messages));
        }
    }
    let ratios = rates[2].iter().zip(&rates[0]).map(|(three, one)| three / one);
    let [one, two, three] = rates.clone().map(median);
    Line {
        what: format!("deliver: 3 processes with 4 sessions each, 20 ms a message, {messages} messages, PostgreSQL"),
        ratio: ratio(median(ratios)),
        got: format!("{three:.0}/s"),
        against: format!("one process: {one:.0}/s, two: {two:.0}/s"),
        wanted: "2.7",
    }
}
