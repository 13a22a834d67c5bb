//! The program itself: how fast it imports, what it occupies while idle, and how long it takes to build.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::Sizes;
use crate::place::{OnPg, Place, timed};
use crate::table::{Line, median, rate};

/// Tokens of each owner in an imported list.
const PER_OWNER: u64 = 10;

/// How long the daemon runs before its memory is read.
const SETTLED: Duration = Duration::from_secs(20);

/// Imports a list into an empty store, and a list of a tenth into another.
pub async fn import(sizes: &Sizes) -> Line {
    let rows = sizes.of(1_000_000);
    let (mut took, mut peaks, mut tenths) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..sizes.runs {
        tenths.push(import_once(rows / 10).await.1);
        let (seconds, peak) = import_once(rows).await;
        took.push(seconds);
        peaks.push(peak);
    }
    Line {
        what: format!("import: {rows} rows of CSV, {PER_OWNER} tokens an owner, PostgreSQL"),
        got: format!("{}, {:.0} MB", rate(rows, median(took)), median(peaks)),
        against: format!("{} rows: {:.0} MB", rows / 10, median(tenths)),
        ratio: String::new(),
        wanted: "30,000 rows/s, memory flat",
    }
}

/// Seconds, and the most memory that it occupied, in MB.
async fn import_once(rows: u64) -> (f64, f64) {
    let place = OnPg::make().await;
    let directory = TempDir::new().expect("a temporary directory");
    let list = directory.path().join("tokens.csv");
    write_list(&list, rows);
    place.client("CHECKPOINT");
    let mut command = lapsed(&place, directory.path());
    command.args(["token", "import"]).arg(&list).stdout(Stdio::null());
    let started = Instant::now();
    let mut child = command.spawn().expect("lapsed starts");
    let mut peak = 0.0;
    let status = loop {
        peak = memory(&child, "VmHWM:").unwrap_or(peak);
        match child.try_wait().expect("a child") {
            Some(status) => break status,
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    assert!(status.success(), "{status}");
    (started.elapsed().as_secs_f64(), peak)
}

fn write_list(path: &Path, rows: u64) {
    let mut list = std::io::BufWriter::new(std::fs::File::create(path).expect("a file"));
    writeln!(list, "owner,emails,description,expires_at,external_id,created_at").expect("a write");
    for i in 0..rows {
        let (owner, day) = (i / PER_OWNER, 1 + i % 28);
        writeln!(
            list,
            "owner-{owner},owner-{owner}@example.org,deploy key {i},2099-{:02}-{day:02},key-{i},2026-01-{day:02}",
            1 + i % 12
        )
        .expect("a write");
    }
    list.flush().expect("a write");
}

/// What the daemon occupies beside a store in which nothing is due.
pub async fn daemon(place: &OnPg, tokens: u64) -> Line {
    let directory = TempDir::new().expect("a temporary directory");
    let config = directory.path().join("lapsed.toml");
    let mails = directory.path().join("mails");
    std::fs::write(
        &config,
        format!(
            "[mail]\ntransport = \"maildir\"\nfrom = \"Tokens <tokens@example.org>\"\n\n[mail.maildir]\npath = {mails:?}\n"
        ),
    )
    .expect("a file");
    let mut child = lapsed(place, directory.path()).arg("--config").arg(&config).arg("run").spawn().expect("it starts");
    tokio::time::sleep(SETTLED).await;
    let (now, peak) = (memory(&child, "VmRSS:"), memory(&child, "VmHWM:"));
    child.kill().expect("a child");
    child.wait().expect("a child");
    Line {
        what: format!("memory of the daemon, idle beside {tokens} tokens, PostgreSQL"),
        got: format!("{:.1} MB", now.expect("it runs")),
        against: format!("at most, since its start: {:.1} MB", peak.expect("it runs")),
        ratio: String::new(),
        wanted: "25 MB",
    }
}

/// The program on a store, with its log thrown away.
pub fn lapsed<P: Place>(place: &P, directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lapsed"));
    command.env("LAPSED__STORE__URL", place.url()).current_dir(directory).stdin(Stdio::null()).stderr(Stdio::null());
    command
}

/// A number of `/proc/PID/status`, in MB; `None` when the process has ended.
pub fn memory(child: &Child, name: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
    let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib / 1024.0)
}

/// Builds the release from nothing, and weighs it.
pub fn build() -> Line {
    let directory = TempDir::new().expect("a temporary directory");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--release", "--locked", "--target-dir"]).arg(directory.path());
    let took = timed(&mut cargo, "").as_secs();
    let binary: PathBuf = directory.path().join("release/lapsed");
    let size = std::fs::metadata(binary).expect("a binary").len() as f64 / 1e6;
    Line {
        what: "cold release build, and the stripped binary".into(),
        got: format!("{} min {} s, {size:.1} MB", took / 60, took % 60),
        against: String::new(),
        ratio: String::new(),
        wanted: "6 min, 15 MB",
    }
}
