//! Mail servers to measure against: Postfix's smtp-sink, and a proxy that makes any server a far one.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

/// How long smtp-sink may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// smtp-sink as it measures: it throws away what it gets. Gone when dropped.
pub struct Sink {
    process: Child,
    pub port: u16,
}

impl Sink {
    pub async fn start() -> Self {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.and_then(|free| free.local_addr());
        let port = port.expect("a free port").port();
        let mut command = Command::new(program("smtp-sink"));
        let root = std::fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0);
        if root {
            command.args(["-u", "nobody"]); // it insists on giving up root
        }
        let process = command.args([&format!("127.0.0.1:{port}"), "1000"]).spawn().expect("smtp-sink starts");
        let sink = Self { process, port };
        let started = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_err() {
            assert!(started.elapsed() < PATIENCE, "smtp-sink does not listen");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        sink
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// smtp-source with so many sessions, each kept open, sending this mail so many times to the port.
pub fn source(port: u16, sessions: usize, messages: u64, mail: &Path) -> Command {
    let mut command = Command::new(program("smtp-source"));
    command.args(["-d", "-s", &sessions.to_string(), "-m", &messages.to_string(), "-F"]).arg(mail);
    command.arg(format!("127.0.0.1:{port}")).stdout(Stdio::null());
    command
}

/// smtp-sink and smtp-source lie beside each other.
fn program(name: &str) -> PathBuf {
    let sink = std::env::var("LAPSED_TEST_SMTP_SINK").expect("benches/run provides smtp-sink");
    Path::new(&sink).with_file_name(name)
}

/// A server behind a line on which each byte takes so long; the line is gone when this is dropped.
pub struct Far {
    pub port: u16,
    task: JoinHandle<()>,
}

impl Far {
    /// Puts `one_way` between whoever connects and the server on the port.
    pub async fn from(server: u16, one_way: Duration) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let task = tokio::spawn(async move {
            let mut lines = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect((Ipv4Addr::LOCALHOST, server)).await.expect("the server");
                for socket in [&client, &server] {
                    socket.set_nodelay(true).expect("a socket");
                }
                let ((from, to), (back_from, back_to)) = (client.into_split(), server.into_split());
                lines.spawn(carry(from, back_to, one_way));
                lines.spawn(carry(back_from, to, one_way));
            }
        });
        Self { port, task }
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Writes what is read so much later, in its order, and any amount at once.
async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, one_way: Duration) {
    let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut buffer = vec![0; 65_536];
    let mut open = true;
    while open || !under_way.is_empty() {
        let arrives = under_way.front().map(|(at, _)| *at);
        tokio::select! {
            read = from.read(&mut buffer), if open => match read {
                Ok(n) if n > 0 => under_way.push_back((Instant::now() + one_way, buffer[..n].to_vec())),
                _ => open = false,
            },
            () = sleep_until(arrives.unwrap_or_else(Instant::now)), if arrives.is_some() => {
                let bytes = under_way.pop_front().map(|(_, bytes)| bytes).unwrap_or_default();
                if to.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        }
    }
    let _ = to.shutdown().await;
}
