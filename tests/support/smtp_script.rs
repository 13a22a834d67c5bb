//! An SMTP server that misbehaves as a test tells it to.
//!
//! Without a rule it accepts everything. Rules give another reply, cut the connection, or stall at a phase; the first
//! rule that applies decides. The server is strict where a client's mistakes would pass unnoticed elsewhere: only CRLF
//! ends a line, commands out of order are refused, and what comes ahead of a reply without a right to (RFC 2920) is
//! refused, too. Everything ends with the [`Server`].
//!
//! ```ignore
//! let server = Script::new()
//!     .pipelining()
//!     .on_rcpt("dead@example.org", "550 5.1.1 no such user")
//!     .once(Phase::Dot, Action::Close)
//!     .start()
//!     .await;
//! ```

use std::{
    collections::HashMap,
    io,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::{JoinHandle, JoinSet},
};

use super::{Stored, address_of};

/// Between two pieces of a slow reply.
const PAUSE: Duration = Duration::from_millis(20);

/// How long [`Server::reached`] waits.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where in a conversation a rule applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// A client connected; the reply is the greeting.
    Connect,
    /// EHLO or HELO.
    Ehlo,
    /// MAIL FROM.
    Mail,
    /// RCPT TO.
    Rcpt,
    /// The command DATA; the reply is "354".
    Data,
    /// The final dot was read; the reply decides about the message.
    Dot,
    /// Any other command: RSET, NOOP, QUIT, AUTH, STARTTLS.
    Other,
}

/// What the server does instead of accepting.
#[derive(Debug, Clone)]
pub enum Action {
    /// Sends this reply; lines of a longer one are separated by CRLF, the last end is added.
    Reply(String),
    /// Sends this reply, then closes the connection.
    ReplyAndClose(String),
    /// Closes the connection without a word. At [`Phase::Dot`] the message is not taken.
    Close,
    /// Takes the message, then closes without a word: the client cannot know. Elsewhere than at [`Phase::Dot`] it is `Close`.
    TakeAndClose,
    /// Takes the message, then says this and closes. For [`Phase::Dot`].
    TakeAndSay(String),
    /// Sends this reply in small pieces, with pauses between them.
    Slowly(String),
    /// Waits so long, then goes on as if there were no rule. At [`Phase::Dot`] the message is taken first.
    After(Duration),
    /// Says nothing until [`Server::release`], or for ever; then goes on as if there were no rule.
    Stall,
}

/// A reply, for brevity.
pub fn reply(text: &str) -> Action {
    Action::Reply(text.to_owned())
}

/// Decides from the command line (at [`Phase::Dot`] from the message); `None` leaves it to the next rule.
type Decide = Box<dyn FnMut(&str) -> Option<Action> + Send>;

/// A server to be: collects rules, then starts.
#[derive(Default)]
pub struct Script {
    extensions: Vec<String>,
    rules: Vec<(Phase, Decide)>,
    asks_anyway: bool,
}

impl Script {
    /// A server that accepts everything and offers no extension.
    pub fn new() -> Script {
        Script::default()
    }

    /// Offers PIPELINING.
    pub fn pipelining(self) -> Script {
        self.extension("PIPELINING")
    }

    /// Offers an extension, as EHLO lists it: `8BITMIME`, `SIZE 1000`.
    pub fn extension(mut self, line: &str) -> Script {
        self.extensions.push(line.to_owned());
        self
    }

    /// Answers DATA with 354 also where no recipient was accepted (RFC 2920, section 3.1 speaks of such servers), and
    /// refuses what comes then.
    pub fn asks_for_content_anyway(mut self) -> Script {
        self.asks_anyway = true;
        self
    }

    /// Acts so each time the phase is reached.
    pub fn on(self, phase: Phase, action: Action) -> Script {
        self.decide(phase, move |_| Some(action.clone()))
    }

    /// Acts so the next time the phase is reached, once. Several are used up in their order.
    pub fn once(self, phase: Phase, action: Action) -> Script {
        let mut action = Some(action);
        self.decide(phase, move |_| action.take())
    }

    /// Answers RCPT TO for this address (in any case) so.
    pub fn on_rcpt(self, address: &str, text: &str) -> Script {
        let (address, action) = (address.to_owned(), reply(text));
        self.decide(Phase::Rcpt, move |line| address_of(line).eq_ignore_ascii_case(&address).then(|| action.clone()))
    }

    /// Lets a closure decide. It sees the whole command line, at [`Phase::Dot`] the message, at [`Phase::Connect`] nothing.
    pub fn decide(mut self, phase: Phase, decide: impl FnMut(&str) -> Option<Action> + Send + 'static) -> Script {
        self.rules.push((phase, Box::new(decide)));
        self
    }

    /// Starts listening on a free port of 127.0.0.1.
    ///
    /// # Panics
    /// When no port can be had.
    pub async fn start(self) -> Server {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port of 127.0.0.1");
        let port = listener.local_addr().expect("the port just bound").port();
        let shared = Arc::new(Shared {
            extensions: self.extensions,
            rules: Mutex::new(self.rules),
            asks_anyway: self.asks_anyway,
            ahead: AtomicUsize::new(0),
            accepted: Mutex::default(),
            commands: Mutex::default(),
            reached: watch::Sender::default(),
            released: Semaphore::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Server { port, shared, accepting }
    }
}

/// A running server; it and its connections end when this is dropped.
pub struct Server {
    port: u16,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Server {
    /// The port of 127.0.0.1 on which it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The messages whose final dot was answered with 2xx, or taken by [`Action::TakeAndClose`]; in that order.
    pub fn accepted(&self) -> Vec<Stored> {
        lock(&self.shared.accepted).clone()
    }

    /// Every command line of every connection, without line ends, in the order of arrival.
    pub fn commands(&self) -> Vec<String> {
        lock(&self.shared.commands).clone()
    }

    /// How many commands were there before the reply to the command ahead of them was sent.
    pub fn ahead(&self) -> usize {
        self.shared.ahead.load(Ordering::SeqCst)
    }

    /// How often a phase was reached so far; for [`Phase::Connect`], the number of connections.
    pub fn times(&self, phase: Phase) -> usize {
        self.shared.reached.borrow().get(&phase).copied().unwrap_or(0)
    }

    /// Waits until a phase was reached `times` times, counted from the start.
    ///
    /// # Panics
    /// After a minute.
    pub async fn reached(&self, phase: Phase, times: usize) {
        let mut reached = self.shared.reached.subscribe();
        let wait = reached.wait_for(|counts| counts.get(&phase).is_some_and(|&count| count >= times));
        let reached = tokio::time::timeout(PATIENCE, wait).await.is_ok();
        assert!(reached, "{phase:?} reached {} times within {PATIENCE:?}, not {times}", self.times(phase));
    }

    /// Lets one conversation that stalls, or the next that would, go on.
    pub fn release(&self) {
        self.shared.released.add_permits(1);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The connections are tasks of a set inside this one.
        self.accepting.abort();
    }
}

/// What the conversations and the test's handle share.
struct Shared {
    extensions: Vec<String>,
    rules: Mutex<Vec<(Phase, Decide)>>,
    asks_anyway: bool,
    ahead: AtomicUsize,
    accepted: Mutex<Vec<Stored>>,
    commands: Mutex<Vec<String>>,
    reached: watch::Sender<HashMap<Phase, usize>>,
    released: Semaphore,
}

/// A closure of the test may have panicked while it held the lock; what it guards is whole all the same.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut conversations = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        while conversations.try_join_next().is_some() {}
        // Else a reply may wait for the client to acknowledge the one before it.
        stream.set_nodelay(true).expect("a TCP connection");
        let mut conversation =
            Conversation { stream: BufReader::new(stream), shared: Arc::clone(&shared), envelope: None };
        conversations.spawn(async move {
            // A client that goes away mid-sentence is what many tests are about.
            let _ = conversation.run().await;
            let _ = conversation.close().await;
        });
    }
}

/// How a conversation goes on after a phase.
enum Next {
    /// Accepted: the reply was positive.
    Accepted,
    /// Refused: the reply was negative.
    Refused,
    /// The connection is to be closed.
    Close,
}

struct Conversation {
    stream: BufReader<TcpStream>,
    shared: Arc<Shared>,
    /// From MAIL on.
    envelope: Option<Stored>,
}

impl Conversation {
    async fn run(&mut self) -> io::Result<()> {
        let greeting = "220 script.example ESMTP";
        if let Next::Close = self.answer(Phase::Connect, "", greeting).await? {
            return Ok(());
        }
        while let Some(line) = self.read_line().await? {
            let line = String::from_utf8_lossy(&line).into_owned();
            lock(&self.shared.commands).push(line.clone());
            let verb = line.split([' ', ':']).next().unwrap_or("");
            let verb = verb.to_ascii_uppercase();
            if !self.stream.buffer().is_empty() {
                self.shared.ahead.fetch_add(1, Ordering::SeqCst);
            }
            if !self.stream.buffer().is_empty() && !self.may_be_followed(&verb) {
                let text = format!("554 5.5.0 {verb} must be the last of its group");
                return self.say(&text).await;
            }
            let next = match verb.as_str() {
                "EHLO" => {
                    self.envelope = None;
                    let accept = self.ehlo_reply();
                    self.answer(Phase::Ehlo, &line, &accept).await?
                }
                "HELO" => {
                    self.envelope = None;
                    self.answer(Phase::Ehlo, &line, "250 script.example").await?
                }
                "MAIL" => self.mail(&line).await?,
                "RCPT" => self.rcpt(&line).await?,
                "DATA" => self.data(&line).await?,
                "RSET" => {
                    self.envelope = None;
                    self.answer(Phase::Other, &line, "250 2.0.0 ok").await?
                }
                "NOOP" => self.answer(Phase::Other, &line, "250 2.0.0 ok").await?,
                "QUIT" => {
                    self.answer(Phase::Other, &line, "221 2.0.0 bye").await?;
                    Next::Close
                }
                _ => {
                    let unknown = "502 5.5.1 not implemented";
                    self.answer(Phase::Other, &line, unknown).await?
                }
            };
            if let Next::Close = next {
                break;
            }
        }
        Ok(())
    }

    /// Closes our half, and reads on until the client closes its own: with unread bytes left, the kernel would send a
    /// reset that can overtake the last reply.
    async fn close(&mut self) -> io::Result<()> {
        self.stream.shutdown().await?;
        tokio::io::copy(&mut self.stream, &mut tokio::io::sink()).await?;
        Ok(())
    }

    async fn mail(&mut self, line: &str) -> io::Result<Next> {
        if self.envelope.is_some() {
            return self.refuse("503 5.5.1 nested MAIL").await;
        }
        let next = self.answer(Phase::Mail, line, "250 2.1.0 ok").await?;
        if let Next::Accepted = next {
            self.envelope = Some(Stored { mail_from: address_of(line), rcpt_to: Vec::new(), data: Vec::new() });
        }
        Ok(next)
    }

    async fn rcpt(&mut self, line: &str) -> io::Result<Next> {
        if self.envelope.is_none() {
            return self.refuse("503 5.5.1 RCPT without MAIL").await;
        }
        let next = self.answer(Phase::Rcpt, line, "250 2.1.5 ok").await?;
        if let (Next::Accepted, Some(envelope)) = (&next, &mut self.envelope) {
            envelope.rcpt_to.push(address_of(line));
        }
        Ok(next)
    }

    /// DATA, and what follows up to the final dot.
    async fn data(&mut self, line: &str) -> io::Result<Next> {
        match &self.envelope {
            None if self.shared.asks_anyway => return self.data_for_nobody().await,
            Some(envelope) if self.shared.asks_anyway && envelope.rcpt_to.is_empty() => {
                return self.data_for_nobody().await;
            }
            None => return self.refuse("503 5.5.1 DATA without MAIL").await,
            Some(envelope) if envelope.rcpt_to.is_empty() => {
                return self.refuse("554 5.5.1 no valid recipients").await;
            }
            Some(_) => {}
        }
        let next = self.answer(Phase::Data, line, "354 go ahead").await?;
        let (Next::Accepted, Some(mut message)) = (&next, self.envelope.take()) else {
            return Ok(next);
        };
        loop {
            let Some(line) = self.read_line().await? else {
                return Ok(Next::Close);
            };
            match line.strip_prefix(b".") {
                Some(b"") => break,
                Some(unstuffed) => message.data.extend_from_slice(unstuffed),
                None => message.data.extend_from_slice(&line),
            }
            message.data.extend_from_slice(b"\r\n");
        }
        let content = String::from_utf8_lossy(&message.data).into_owned();
        let action = self.decide(Phase::Dot, &content).await;
        // Recorded before the reply: who has read the reply finds the message.
        let taken = match &action {
            None | Some(Action::TakeAndClose | Action::TakeAndSay(_) | Action::After(_)) => true,
            Some(Action::Reply(text) | Action::ReplyAndClose(text) | Action::Slowly(text)) => text.starts_with('2'),
            Some(Action::Close | Action::Stall) => false,
        };
        if taken {
            lock(&self.shared.accepted).push(message);
        }
        self.perform(action, "250 2.0.0 taken").await
    }

    /// Asks for the content of a message that has no recipient, and refuses it.
    async fn data_for_nobody(&mut self) -> io::Result<Next> {
        self.say("354 go ahead").await?;
        let mut lines = 0;
        while let Some(line) = self.read_line().await? {
            if line == b"." {
                let text = format!("554 5.5.1 no valid recipients for {lines} lines");
                return self.refuse(&text).await;
            }
            lines += 1;
        }
        Ok(Next::Close)
    }

    /// Asks the rules, and does what they say, or sends `accept`.
    async fn answer(&mut self, phase: Phase, line: &str, accept: &str) -> io::Result<Next> {
        let action = self.decide(phase, line).await;
        self.perform(action, accept).await
    }

    /// What the rules say, after any stalling; `None`: accept.
    async fn decide(&self, phase: Phase, line: &str) -> Option<Action> {
        let action =
            lock(&self.shared.rules).iter_mut().filter(|(of, _)| *of == phase).find_map(|(_, decide)| decide(line));
        self.shared.reached.send_modify(|counts| *counts.entry(phase).or_default() += 1);
        if let Some(Action::Stall) = action {
            let permit = self.shared.released.acquire().await;
            permit.expect("never closed").forget();
            return None;
        }
        action
    }

    async fn perform(&mut self, action: Option<Action>, accept: &str) -> io::Result<Next> {
        let (text, close) = match action {
            None | Some(Action::Stall) => (accept.to_owned(), false),
            Some(Action::After(pause)) => {
                tokio::time::sleep(pause).await;
                (accept.to_owned(), false)
            }
            Some(Action::Reply(text)) => (text, false),
            Some(Action::ReplyAndClose(text) | Action::TakeAndSay(text)) => (text, true),
            Some(Action::Slowly(text)) => {
                let (first, rest) = text.split_at(text.len() / 2);
                for piece in [first, rest] {
                    self.stream.write_all(piece.as_bytes()).await?;
                    tokio::time::sleep(PAUSE).await;
                }
                let accepted = text.starts_with(['2', '3']);
                self.say("").await?;
                return Ok(if accepted { Next::Accepted } else { Next::Refused });
            }
            Some(Action::Close | Action::TakeAndClose) => return Ok(Next::Close),
        };
        self.say(&text).await?;
        Ok(if close {
            Next::Close
        } else if text.starts_with(['2', '3']) {
            Next::Accepted
        } else {
            Next::Refused
        })
    }

    /// A reply that no rule can change: the client broke the protocol.
    async fn refuse(&mut self, text: &str) -> io::Result<Next> {
        self.say(text).await?;
        Ok(Next::Refused)
    }

    async fn say(&mut self, text: &str) -> io::Result<()> {
        self.stream.write_all(format!("{text}\r\n").as_bytes()).await
    }

    fn ehlo_reply(&self) -> String {
        let mut lines = vec!["script.example".to_owned()];
        lines.extend(self.shared.extensions.iter().cloned());
        let last = lines.len() - 1;
        lines
            .iter()
            .enumerate()
            .map(|(at, line)| format!("250{}{line}", if at < last { "-" } else { " " }))
            .collect::<Vec<_>>()
            .join("\r\n")
    }

    /// Whether the next command may come before the reply to this one (RFC 2920, section 3.1).
    fn may_be_followed(&self, verb: &str) -> bool {
        let offered = self.shared.extensions.iter().any(|line| line.eq_ignore_ascii_case("PIPELINING"));
        offered && matches!(verb, "MAIL" | "RCPT" | "RSET")
    }

    /// A line without its CRLF; `None` at the end of the connection. A bare LF or CR does not end it (RFC 5321,
    /// section 2.3.8).
    async fn read_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        while self.stream.read_until(b'\n', &mut line).await? > 0 {
            if line.ends_with(b"\r\n") {
                line.truncate(line.len() - 2);
                return Ok(Some(line));
            }
        }
        Ok(None)
    }
}
