//! A proxy before PostgreSQL that knows where statements begin and end, so that a process can die at any of them.
//!
//! It passes on one request of the extended or simple protocol at a time, and waits until the server is ready for the next.
//! With `statement-cache-capacity=0` in the URL each statement is prepared and executed whichever connection of the pool
//! runs it; what is counted is the execution. A connection is cut on both sides, as by a process that is killed or a network
//! that breaks, and whoever comes back finds nobody until the proxy is armed again.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::deaths::Counter;

/// What happens at the statement that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It waits until the proxy is released, and the test drops the future that waits for its answer; then it is executed.
    Dropped,
    /// It is executed, and all connections are cut before its answer arrives.
    Cut,
}

/// A proxy for one process; ends when dropped.
pub struct Proxy {
    /// The URL to connect to.
    pub url: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    server: String,
    counter: Counter,
    manner: watch::Sender<Manner>,
    cut: watch::Sender<bool>,
    released: Semaphore,
    /// How many connections there were, and how many of the first of them have fallen silent.
    connections: AtomicUsize,
    silent: AtomicUsize,
    rewrite: fn(&str) -> String,
}

impl Proxy {
    /// Starts before the server of this URL (`postgres://USER:PASSWORD@HOST:PORT/NAME`).
    pub async fn start(url: &str) -> Self {
        Self::rewriting(url, str::to_owned).await
    }

    /// The same, and the server gets other statements than the client prepares: the program with another text in it.
    pub async fn rewriting(url: &str, rewrite: fn(&str) -> String) -> Self {
        let (user, rest) = url.rsplit_once('@').expect("a user");
        let (server, name) = rest.split_once('/').expect("a database");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let url = format!("{user}@127.0.0.1:{port}/{name}?sslmode=disable&statement-cache-capacity=0");
        let shared = Arc::new(Shared {
            server: server.to_owned(),
            counter: Counter::default(),
            manner: watch::Sender::new(Manner::Dropped),
            cut: watch::Sender::new(false),
            released: Semaphore::new(0),
            connections: AtomicUsize::new(0),
            silent: AtomicUsize::new(0),
            rewrite,
        });
        let task = tokio::spawn(Arc::clone(&shared).serve(listener));
        Self { url, shared, task }
    }

    /// Lets connections through, counts from now on, and is ready to act at the statement of this number.
    pub fn arm(&self, manner: Manner, stop_at: Option<usize>) {
        self.shared.manner.send_replace(manner);
        self.shared.cut.send_replace(false);
        self.shared.counter.start(stop_at);
    }

    /// The statements since it was armed.
    pub fn disarm(&self) -> Vec<String> {
        self.shared.counter.stop()
    }

    /// Returns when the statement was reached and what happens at it has happened.
    pub async fn reached(&self) {
        self.shared.counter.reached().await;
    }

    /// Passes nothing on any more, on no connection, and hangs none up: as a machine that is gone without a word.
    pub fn fall_silent(&self) {
        self.shared.silent.store(usize::MAX, Ordering::SeqCst);
    }

    /// Serves those who connect from now on. Those who waited wait for ever.
    pub fn speak_again(&self) {
        self.shared.silent.store(self.shared.connections.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    /// Lets the statement that waits go on.
    pub fn release(&self) {
        self.shared.released.add_permits(1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort(); // drops the connections with it
    }
}

impl Shared {
    async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            let (shared, mut cut) = (Arc::clone(&self), self.cut.subscribe());
            if !*cut.borrow_and_update() {
                connections.spawn(async move {
                    // Either end hanging up is the end of it; so is the cut.
                    tokio::select! {
                        _ = shared.pass_on(client) => {}
                        _ = cut.wait_for(|cut| *cut) => {}
                    }
                });
            }
        }
    }

    /// Returns unless this connection has fallen silent.
    async fn unless_silent(&self, number: usize) {
        if number < self.silent.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }

    async fn pass_on(&self, mut client: TcpStream) -> io::Result<()> {
        let number = self.connections.fetch_add(1, Ordering::SeqCst);
        self.unless_silent(number).await;
        let mut server = TcpStream::connect(&self.server).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        log_in(&mut client, &mut server).await?;
        let mut sql = String::new();
        loop {
            let mut request = Vec::new();
            let mut executes = false;
            loop {
                let mut message = read_message(&mut client).await?;
                if message[0] == b'P' {
                    message = self.rewritten(&message);
                }
                let text = |skip: usize| text_of(&message[5..], skip);
                match message[0] {
                    b'X' => return server.write_all(&message).await,
                    b'Q' => (sql, executes) = (text(0), true),
                    b'P' => sql = text(1),
                    b'E' => executes = true,
                    _ => {}
                }
                request.extend_from_slice(&message);
                if matches!(message[0], b'Q' | b'S') {
                    break;
                }
            }
            let stop = executes && self.counter.meet(&sql);
            let manner = *self.manner.borrow();
            if stop && manner == Manner::Dropped {
                self.counter.tell();
                self.released.acquire().await.expect("open").forget();
            }
            self.unless_silent(number).await;
            server.write_all(&request).await?;
            loop {
                let answer = read_message(&mut server).await?;
                self.unless_silent(number).await;
                let ready = answer[0] == b'Z';
                if stop && manner == Manner::Cut {
                    if ready {
                        self.cut.send_replace(true);
                        self.counter.tell();
                        return Ok(());
                    }
                    continue;
                }
                client.write_all(&answer).await?;
                if ready {
                    break;
                }
            }
        }
    }
}

impl Shared {
    /// A Parse message (its name, the statement, the types of its parameters) with another statement.
    fn rewritten(&self, message: &[u8]) -> Vec<u8> {
        let (name, sql) = (text_of(&message[5..], 0), text_of(&message[5..], 1));
        let types = &message[5 + name.len() + 1 + sql.len() + 1..];
        let texts = format!("{name}\0{}\0", (self.rewrite)(&sql));
        let length = u32::try_from(4 + texts.len() + types.len()).expect("small");
        [b"P", &length.to_be_bytes()[..], texts.as_bytes(), types].concat()
    }
}

/// Passes on what is said until the server is ready for the first request.
async fn log_in(client: &mut TcpStream, server: &mut TcpStream) -> io::Result<()> {
    // The first message alone has no type.
    let mut length = [0; 4];
    client.read_exact(&mut length).await?;
    let mut rest = vec![0; usize::try_from(u32::from_be_bytes(length)).expect("small") - 4];
    client.read_exact(&mut rest).await?;
    server.write_all(&[&length[..], &rest].concat()).await?;
    loop {
        let message = read_message(server).await?;
        client.write_all(&message).await?;
        match message[0] {
            b'Z' => return Ok(()),
            // Authentication, and not yet through: the client answers.
            b'R' if message[5..9] != [0; 4] => server.write_all(&read_message(client).await?).await?,
            _ => {}
        }
    }
}

/// One message: its type, its length, its content.
async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; 5];
    stream.read_exact(&mut message).await?;
    let length = u32::from_be_bytes([message[1], message[2], message[3], message[4]]);
    message.resize(1 + usize::try_from(length).expect("small"), 0);
    stream.read_exact(&mut message[5..]).await?;
    Ok(message)
}

/// The text that ends with a zero, after skipping so many such texts.
fn text_of(content: &[u8], skip: usize) -> String {
    let text = content.split(|byte| *byte == 0).nth(skip).unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}
