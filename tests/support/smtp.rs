//! The real smtp-sink of Postfix, for one test: takes every message and stores it.
//!
//! Guarantees: it answers when [`Sink::start`] returns, listens on 127.0.0.1 only, runs without privileges, and is
//! gone after the drop, with its messages. What it cannot show (a reply for one recipient, a cut connection between
//! two commands) is what `smtp_script` is for.

use std::{
    io::Read,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::fs::{MetadataExt, chown},
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use super::Stored;

/// How long starting, and waiting for messages, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at what is waited for.
const POLL: Duration = Duration::from_millis(5);

/// A running smtp-sink.
pub struct Sink {
    process: Child,
    port: u16,
    store: tempfile::TempDir,
}

impl Sink {
    /// Starts one that accepts everything.
    ///
    /// # Panics
    /// When `tests/run` did not provide smtp-sink, or it does not answer within ten seconds.
    pub fn start() -> Sink {
        Sink::start_with(&[])
    }

    /// Starts one with further options, as smtp-sink(1) lists them: `&["-p"]` offers no PIPELINING, `&["-r", "DATA"]`
    /// answers DATA with 450.
    ///
    /// # Panics
    /// As [`Sink::start`].
    pub fn start_with(options: &[&str]) -> Sink {
        let program = super::from_environment("LAPSED_TEST_SMTP_SINK", "provides smtp-sink");
        // A free port is only known to have been free: another process may take it before smtp-sink does.
        for _ in 0..5 {
            if let Some(sink) = try_start(&program, options) {
                return sink;
            }
        }
        panic!("smtp-sink does not start: its port was taken, five times over");
    }

    /// The port of 127.0.0.1 on which it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The stored messages, oldest first. A message is here once the client read the reply to its final dot; of one
    /// that is still being received, nothing shows.
    ///
    /// # Panics
    /// When a stored file is not what smtp-sink(1) describes.
    pub fn messages(&self) -> Vec<Stored> {
        let mut files: Vec<_> = std::fs::read_dir(self.store.path())
            .expect("the directory of the stored messages")
            .filter_map(|entry| {
                let entry = entry.expect("an entry of the directory of the stored messages");
                // A transaction that is given up takes its file with it.
                let metadata = entry.metadata().ok()?;
                Some((metadata.mtime(), metadata.mtime_nsec(), entry.path()))
            })
            .collect();
        files.sort();
        files
            .iter()
            .filter_map(|(_, _, path)| Some((path, std::fs::read(path).ok()?)))
            .filter_map(|(path, content)| parse(path, &content))
            .collect()
    }

    /// Waits until at least `count` messages are stored, for a sender that is another process.
    ///
    /// # Panics
    /// After ten seconds.
    pub fn wait_for(&self, count: usize) -> Vec<Stored> {
        let start = Instant::now();
        loop {
            let messages = self.messages();
            if messages.len() >= count {
                return messages;
            }
            let stored = messages.len();
            assert!(start.elapsed() < PATIENCE, "{stored} of {count} messages within {PATIENCE:?}");
            sleep(POLL);
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts smtp-sink on a free port; `None` when another process took that port first.
fn try_start(program: &str, options: &[&str]) -> Option<Sink> {
    let store = tempfile::tempdir().expect("a directory for the stored messages");
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .expect("a free port of 127.0.0.1")
        .port();
    // Its greeting tells our server from another one on the same port.
    let host = format!("{}.example", super::unique_name("sink-"));
    let mut command = Command::new(program);
    // In the directory, with a relative template: strftime would read a '%' of its path.
    command.current_dir(store.path()).args(["-d", "message.", "-h", &host]);
    let owner = std::fs::metadata(store.path()).expect("the directory of the stored messages").uid();
    if owner == 0 {
        // smtp-sink insists on giving up root; the new user must be able to write.
        chown(store.path(), Some(id_of("-u", "nobody")), None).expect("chown to nobody");
        command.args(["-u", "nobody"]);
    }
    let process = command
        .args(options)
        .arg(format!("127.0.0.1:{port}"))
        .arg("100")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {program}: {error}"));
    // From here on a panic ends the process, too.
    let mut sink = Sink { process, port, store };
    let start = Instant::now();
    loop {
        match greeting(port) {
            Some(line) if line.contains(&host) => return Some(sink),
            Some(_) => return None,
            None => {}
        }
        let ended = sink.process.try_wait().expect("the state of smtp-sink");
        if ended.is_some() {
            return None;
        }
        assert!(start.elapsed() < PATIENCE, "smtp-sink does not answer on port {port} within {PATIENCE:?}");
        sleep(POLL);
    }
}

/// The first bytes that the server on `port` says; `None` when nobody listens there or says nothing.
fn greeting(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut buffer = [0; 512];
    let length = stream.read(&mut buffer).ok().filter(|&length| length > 0)?;
    Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// The number of a user (`-u`), or of its group (`-g`).
pub fn id_of(what: &str, user: &str) -> u32 {
    let output = Command::new("id").args([what, user]).output().expect("the command id");
    String::from_utf8_lossy(&output.stdout).trim().parse().unwrap_or_else(|_| panic!("no user {user} on this machine"))
}

/// Reads one dump file: lines that smtp-sink wrote, the last of them a `Received` of three, then the message, then an
/// empty line. `None` while that is not complete.
fn parse(path: &Path, content: &[u8]) -> Option<Stored> {
    let mut stored = Stored { mail_from: String::new(), rcpt_to: Vec::new(), data: Vec::new() };
    let mut lines = content.strip_suffix(b"\n\n")?.split(|&byte| byte == b'\n');
    loop {
        let line = String::from_utf8_lossy(lines.next()?);
        match line.split_once(": ") {
            Some(("X-Mail-Args", argument)) => stored.mail_from = super::address_of(argument),
            Some(("X-Rcpt-Args", argument)) => stored.rcpt_to.push(super::address_of(argument)),
            Some(("X-Client-Addr" | "X-Client-Proto" | "X-Helo-Args", _)) => {}
            Some(("Received", _)) => break,
            _ => panic!("{}: not a line of smtp-sink's: {line}", path.display()),
        }
    }
    for line in lines.skip(2) {
        stored.data.extend_from_slice(line);
        stored.data.extend_from_slice(b"\r\n");
    }
    Some(stored)
}
