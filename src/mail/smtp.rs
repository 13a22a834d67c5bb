//! A session with a mail server (RFC 5321): connects, delivers one message after the other, and says what happened.
//!
//! It stands on lettre's connection, which speaks the protocol, and adds what delivery needs: no delay on the socket,
//! a limit on each phase instead of on the connecting alone, and a session that is never used again once its state is
//! not known for certain. That last point is structural: while a message is under way, the session is owned by the
//! future that sends it, and only a session between two messages goes back. A future that is dropped, a limit that is
//! passed, a reply that makes no sense: each takes the connection with it.
//!
//! Every failure is reported as a [`Happened`] with its phase. Passwords are read from their file at each connect, and
//! are sent in the clear to this machine only. After a crash the server holds at most one message without our knowledge.

mod stream;

use std::error::Error as _;
use std::future::Future;
use std::iter;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lettre::transport::smtp::authentication::{Credentials, Mechanism};
use lettre::transport::smtp::client::{AsyncSmtpConnection, AsyncTokioStream, TlsParameters};
use lettre::transport::smtp::commands::{Data, Mail, Noop, Rcpt, Rset};
use lettre::transport::smtp::extension::{ClientId, Extension, MailBodyParameter, MailParameter};
use lettre::transport::smtp::response::Response;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::config::{self, Tls};

use super::compose::Composed;
use super::outcome::{Happened, Phase};

/// Servers close sessions that say nothing, so one that was idle for longer is asked whether it is still there.
const ASK_AFTER: Duration = Duration::from_secs(30);
/// How long a server may take to say goodbye: nothing depends on it.
const GOODBYE: Duration = Duration::from_secs(5);

/// How long each phase may take. The defaults are the least that RFC 5321, section 4.5.3.2 asks for, where it asks.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// To find and reach the server, for each of its addresses. Not in the RFC: TCP's own limit is some two minutes.
    pub connect: Duration,
    /// To greet us and answer EHLO (section 4.5.3.2.1: 5 minutes).
    pub hello: Duration,
    /// To agree on TLS. Not in the RFC.
    pub tls: Duration,
    /// To answer AUTH (RFC 4954 names no limit).
    pub auth: Duration,
    /// To answer MAIL (4.5.3.2.2: 5 minutes).
    pub mail: Duration,
    /// To answer RCPT (4.5.3.2.3: 5 minutes).
    pub rcpt: Duration,
    /// To answer DATA (4.5.3.2.4: 2 minutes).
    pub data: Duration,
    /// To take the content (4.5.3.2.5: 3 minutes).
    pub content: Duration,
    /// To answer the final dot (4.5.3.2.6: 10 minutes).
    pub dot: Duration,
    /// To answer RSET and NOOP. Not in the RFC.
    pub aside: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        const MINUTE: u64 = 60;
        Self {
            connect: Duration::from_secs(30),
            hello: Duration::from_secs(5 * MINUTE),
            tls: Duration::from_secs(MINUTE),
            auth: Duration::from_secs(2 * MINUTE),
            mail: Duration::from_secs(5 * MINUTE),
            rcpt: Duration::from_secs(5 * MINUTE),
            data: Duration::from_secs(2 * MINUTE),
            content: Duration::from_secs(3 * MINUTE),
            dot: Duration::from_secs(10 * MINUTE),
            aside: Duration::from_secs(30),
        }
    }
}

/// Delivers by SMTP over one connection at a time.
#[derive(Debug)]
pub struct Smtp {
    options: config::Smtp,
    timeouts: Timeouts,
    hello: ClientId,
    /// The session between two messages; `None` while one is under way.
    session: Option<Session>,
}

impl Smtp {
    /// A transport that has not connected yet.
    pub fn new(options: config::Smtp) -> Self {
        Self::with_timeouts(options, Timeouts::default())
    }

    /// The same with other limits.
    pub fn with_timeouts(options: config::Smtp, timeouts: Timeouts) -> Self {
        Self { options, timeouts, hello: ClientId::default(), session: None }
    }

    /// Connects, greets and authenticates, unless a session is open and answers.
    ///
    /// # Errors
    /// What went wrong, in a phase before any message was mentioned.
    pub async fn ready(&mut self) -> Result<(), Happened> {
        if let Some(session) = self.session.take() {
            self.session = session.if_alive(&self.timeouts).await;
        }
        if self.session.is_none() {
            self.session = Some(self.connect().await?);
        }
        Ok(())
    }

    /// Delivers one message. `still_ours` is asked before MAIL and before the content; when it says no, nothing of the
    /// message has been delivered, and nothing will be.
    pub async fn send<F, Ours>(&mut self, composed: &Composed, mut still_ours: F) -> Happened
    where
        F: FnMut() -> Ours,
        Ours: Future<Output = bool>,
    {
        if let Err(happened) = self.ready().await {
            return happened;
        }
        loop {
            let Some(session) = self.session.take() else {
                return broken(Phase::Connect, "there is no session");
            };
            let had_been_idle = session.delivered > 0;
            let (session, delivery) = session.deliver(composed, &self.timeouts, &mut still_ours).await;
            self.session = session;
            match delivery {
                Delivery::Happened(happened) => return happened,
                // The server had closed the session before this message: it says nothing about the message.
                Delivery::Gone(_) if had_been_idle => match self.connect().await {
                    Ok(session) => self.session = Some(session),
                    Err(happened) => return happened,
                },
                Delivery::Gone(happened) => return happened,
            }
        }
    }

    /// Says goodbye. The next message opens another session.
    pub async fn close(&mut self) {
        if let Some(mut session) = self.session.take() {
            // Whatever the server answers, if anything, changes nothing.
            let _ = timeout(GOODBYE, session.connection.quit()).await;
        }
    }

    /// Connects in a task of its own, so that a panic on a malformed EHLO reply (lettre 0.11 has one for a line of blanks)
    /// is a failed connect and not our end. Dropping the future aborts the task.
    async fn connect(&self) -> Result<Session, Happened> {
        let mut task = JoinSet::new();
        task.spawn(establish(self.options.clone(), self.timeouts, self.hello.clone()));
        match task.join_next().await {
            Some(Ok(session)) => session,
            _ => Err(broken(Phase::Hello, "the server's answer to EHLO could not be read")),
        }
    }
}

/// A connection between two messages.
struct Session {
    connection: AsyncSmtpConnection,
    delivered: u64,
    last_used: Instant,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("delivered", &self.delivered).finish_non_exhaustive()
    }
}

/// What came of a message on one session.
enum Delivery {
    Happened(Happened),
    /// The session was dead before the message was mentioned.
    Gone(Happened),
}

/// Why an exchange with the server did not succeed.
enum Fault {
    /// It answered 4xx or 5xx.
    Refused { code: u16, text: String },
    /// It is gone, or says what makes no sense.
    Broken(String),
    /// It says nothing.
    TimedOut(Duration),
}

impl Fault {
    fn at(self, phase: Phase) -> Happened {
        match self {
            Self::Refused { code, text } => Happened::refused(phase, code, &text),
            Self::Broken(error) => broken(phase, &error),
            Self::TimedOut(limit) => broken(phase, &no_answer(limit)),
        }
    }

    /// Whether the server is still there and in step with us. 421 says that it is about to close (RFC 5321, section
    /// 3.8).
    fn leaves_the_session_alive(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if *code != 421)
    }

    /// Whether this is how a session ends that the server closed while it was idle.
    fn says_goodbye(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Refused { code: 421, .. })
    }
}

impl From<lettre::transport::smtp::Error> for Fault {
    fn from(error: lettre::transport::smtp::Error) -> Self {
        match error.status() {
            Some(code) => {
                Self::Refused { code: code.into(), text: error.source().map(ToString::to_string).unwrap_or_default() }
            }
            None => Self::Broken(error.to_string()),
        }
    }
}

fn broken(phase: Phase, error: &str) -> Happened {
    Happened::Broken { phase, error: error.to_owned() }
}

fn no_answer(limit: Duration) -> String {
    format!("no answer within {limit:?}")
}

/// Waits for an answer, but not for ever.
async fn within<T, E: Into<Fault>>(limit: Duration, answer: impl Future<Output = Result<T, E>>) -> Result<T, Fault> {
    match timeout(limit, answer).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(_) => Err(Fault::TimedOut(limit)),
    }
}

/// Everything from the name of the server to a session that can deliver.
async fn establish(options: config::Smtp, timeouts: Timeouts, hello: ClientId) -> Result<Session, Happened> {
    let config::Smtp { host, port, tls, username, password_file } = &options;
    let io_fault = |error: std::io::Error| Fault::Broken(error.to_string());
    let (socket, peer) = stream::connect(host, *port, timeouts.connect)
        .await
        .map_err(|error| broken(Phase::Connect, &format!("{host}:{port}: {error}")))?;
    let stream: Box<dyn AsyncTokioStream> = match tls {
        Tls::Implicit => {
            let protected = async { stream::protect(socket, host).await.map_err(io_fault) };
            let protected = within(timeouts.tls, protected).await.map_err(|fault| fault.at(Phase::Tls))?;
            Box::new(stream::LineByLine::new(protected, peer))
        }
        Tls::StartTls | Tls::None => Box::new(stream::LineByLine::new(socket, peer)),
    };
    let connection = AsyncSmtpConnection::connect_with_transport(stream, &hello);
    let mut connection = within(timeouts.hello, connection).await.map_err(|fault| fault.at(Phase::Hello))?;
    if *tls == Tls::StartTls {
        if !connection.can_starttls() {
            return Err(broken(Phase::Tls, "the server does not offer STARTTLS, and tls = \"starttls\" requires it"));
        }
        let parameters = TlsParameters::new(host.clone()).map_err(|error| Fault::from(error).at(Phase::Tls))?;
        let protected = connection.starttls(parameters, &hello);
        within(timeouts.tls, protected).await.map_err(|fault| fault.at(Phase::Tls))?;
    }
    if let Some(username) = username {
        if *tls == Tls::None && !peer.ip().is_loopback() {
            return Err(broken(
                Phase::Auth,
                "a password is not sent to another machine over an unprotected connection",
            ));
        }
        let password = password(password_file.as_deref()).await.map_err(|error| broken(Phase::Auth, &error))?;
        let credentials = Credentials::new(username.clone(), password);
        let welcome = connection.auth(&[Mechanism::Plain, Mechanism::Login], &credentials);
        within(timeouts.auth, welcome).await.map_err(|fault| fault.at(Phase::Auth))?;
    }
    Ok(Session { connection, delivered: 0, last_used: Instant::now() })
}

async fn password(file: Option<&Path>) -> Result<String, String> {
    let file = file.ok_or("mail.smtp.username is set, but password_file is not")?;
    let text = tokio::fs::read_to_string(file).await;
    let text = text.map_err(|error| format!("cannot read the password from {}: {error}", file.display()))?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

impl Session {
    /// The session, unless it was idle for long and does not answer.
    async fn if_alive(mut self, timeouts: &Timeouts) -> Option<Self> {
        if self.last_used.elapsed() > ASK_AFTER {
            within(timeouts.aside, self.connection.command(Noop)).await.ok()?;
            self.last_used = Instant::now();
        }
        Some(self)
    }

    /// Delivers a message. Gives the session back only where it stands between two messages again.
    async fn deliver<Ours: Future<Output = bool>>(
        mut self,
        composed: &Composed,
        timeouts: &Timeouts,
        still_ours: &mut impl FnMut() -> Ours,
    ) -> (Option<Self>, Delivery) {
        let parameters = match self.parameters(composed) {
            Ok(parameters) => parameters,
            Err(error) => return (Some(self), Delivery::Happened(Happened::Unbuildable { error })),
        };
        if !still_ours().await {
            return (Some(self), Delivery::Happened(Happened::LostLease));
        }

        let mail = self.connection.command(Mail::new(Some(composed.from.clone()), parameters));
        if let Err(fault) = within(timeouts.mail, mail).await {
            let gone = fault.says_goodbye();
            let (session, happened) = self.refused(Phase::Mail, fault, timeouts).await;
            return (session, if gone { Delivery::Gone(happened) } else { Delivery::Happened(happened) });
        }
        let (session, happened) = self.deliver_to_recipient(composed, timeouts, still_ours).await;
        (session, Delivery::Happened(happened))
    }

    /// From RCPT on.
    async fn deliver_to_recipient<Ours: Future<Output = bool>>(
        mut self,
        composed: &Composed,
        timeouts: &Timeouts,
        still_ours: &mut impl FnMut() -> Ours,
    ) -> (Option<Self>, Happened) {
        let rcpt = self.connection.command(Rcpt::new(composed.to.clone(), Vec::new()));
        if let Err(fault) = within(timeouts.rcpt, rcpt).await {
            return self.refused(Phase::Rcpt, fault, timeouts).await;
        }
        match within(timeouts.data, self.connection.command(Data)).await {
            // 354: the only code that asks for the content (RFC 5321, section 4.3.2).
            Ok(reply) if reply.has_code(354) => {}
            Ok(reply) => return (None, broken(Phase::Data, &unexpected(&reply))),
            Err(fault) => return self.refused(Phase::Data, fault, timeouts).await,
        }
        if !still_ours().await {
            // There is no way back from here but to close: whatever comes next would be read as content.
            return (None, Happened::LostLease);
        }
        self.content(&composed.bytes, timeouts).await
    }

    /// Sends the content and the final dot.
    async fn content(mut self, bytes: &[u8], timeouts: &Timeouts) -> (Option<Self>, Happened) {
        // The line end before the dot belongs to the content (RFC 5321, section 4.1.1.4), and lettre writes it.
        let content = bytes.strip_suffix(b"\r\n").unwrap_or(bytes);
        // lettre asks for the next part when it has written one, and writes the dot when there is none: from that
        // moment on the message may be delivered.
        let dot = AtomicBool::new(false);
        let parts = iter::once(content).chain(iter::from_fn(|| {
            dot.store(true, Ordering::Relaxed);
            None
        }));
        let result = {
            let mut sending = pin!(self.connection.message_iter(parts));
            match within(timeouts.content, &mut sending).await {
                Err(Fault::TimedOut(_)) if dot.load(Ordering::Relaxed) => within(timeouts.dot, sending).await,
                result => result,
            }
        };
        match result {
            Ok(reply) if (200..300).contains(&u16::from(reply.code())) => {
                self.delivered += 1;
                self.last_used = Instant::now();
                (Some(self), Happened::accepted(&reply.message().collect::<Vec<_>>().join(" ")))
            }
            Ok(reply) => (None, Happened::Unknown { error: unexpected(&reply) }),
            Err(fault @ Fault::Refused { .. }) => {
                self.last_used = Instant::now();
                let session = fault.leaves_the_session_alive().then_some(self);
                (session, fault.at(Phase::Dot))
            }
            Err(fault) if !dot.load(Ordering::Relaxed) => (None, fault.at(Phase::Data)),
            Err(Fault::Broken(error)) => (None, Happened::Unknown { error }),
            Err(Fault::TimedOut(limit)) => (None, Happened::Unknown { error: no_answer(limit) }),
        }
    }

    /// Ends a message that went wrong before its content; keeps the session if the server forgets the message.
    async fn refused(mut self, phase: Phase, fault: Fault, timeouts: &Timeouts) -> (Option<Self>, Happened) {
        let forgotten =
            fault.leaves_the_session_alive() && within(timeouts.aside, self.connection.command(Rset)).await.is_ok();
        self.last_used = Instant::now();
        (forgotten.then_some(self), fault.at(phase))
    }

    /// What MAIL must say about a message that is not all ASCII.
    fn parameters(&self, composed: &Composed) -> Result<Vec<MailParameter>, String> {
        let server = self.connection.server_info();
        let mut parameters = Vec::new();
        let addresses: [&str; 2] = [composed.from.as_ref(), composed.to.as_ref()];
        if !addresses.iter().all(|address| address.is_ascii()) {
            if !server.supports_feature(Extension::SmtpUtfEight) {
                return Err("the address has letters that this mail server does not take (no SMTPUTF8)".to_owned());
            }
            parameters.push(MailParameter::SmtpUtfEight);
        }
        if !composed.bytes.is_ascii() {
            if !server.supports_feature(Extension::EightBitMime) {
                return Err("the mail is not ASCII, and this mail server takes nothing else (no 8BITMIME)".to_owned());
            }
            parameters.push(MailParameter::Body(MailBodyParameter::EightBitMime));
        }
        Ok(parameters)
    }
}

fn unexpected(reply: &Response) -> String {
    format!("unexpected reply {} {}", reply.code(), reply.first_line().unwrap_or_default())
}

#[cfg(test)]
mod tests;
