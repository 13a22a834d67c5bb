//! Sessions with a mail server (RFC 5321): each connects, delivers one message after the other, and says what happened.
//!
//! They stand on lettre's connection, which speaks the protocol, and add what delivery needs: no delay on the socket,
//! several commands in one packet where the server takes them, a limit on each phase instead of on the connecting alone,
//! and a session that is never used again once its state is not known for certain. That last point is structural: while a
//! message is under way, the session is owned by the future that sends it, and only a session between two messages goes
//! back. A future that is dropped, a limit that is passed, a reply that makes no sense: each takes the connection with it.
//!
//! Every failure is reported as a [`Happened`] with its phase. Passwords and tokens are read from their file at each connect,
//! and are sent over an unprotected connection only where the operator allowed it. After a crash the server holds at most
//! one message of each session without our knowledge.

mod establish;
mod fault;
mod offers;
mod relays;
mod session;
mod stream;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use lettre::transport::smtp::extension::ClientId;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::config;
use crate::mail::clean::without_addresses;

use super::compose::Composed;
use super::outcome::{Happened, Phase};
use establish::establish;
use fault::broken;
use relays::Relays;
use session::{Delivery, Session};

/// How long a server may take to say goodbye: nothing depends on it.
const GOODBYE: Duration = Duration::from_secs(5);

/// Delivers by SMTP over one connection at a time.
#[derive(Debug)]
pub struct Smtp {
    options: Arc<config::Smtp>,
    relays: Arc<Relays>,
    hello: ClientId,
    /// The session between two messages; `None` while one is under way.
    session: Option<Session>,
}

impl Smtp {
    /// As many transports as there may be connections, none of them connected yet. They tell each other which server can
    /// be reached.
    pub fn sessions(options: config::Smtp) -> Vec<Self> {
        let (options, relays) = (Arc::new(options.clone()), Arc::new(Relays::new(options.relays)));
        let hello = ClientId::default();
        let one = || Self { options: options.clone(), relays: relays.clone(), hello: hello.clone(), session: None };
        std::iter::repeat_with(one).take(options.connections).collect()
    }

    /// One transport that has not connected yet.
    pub fn new(options: config::Smtp) -> Self {
        let relays = Arc::new(Relays::new(options.relays.clone()));
        Self { options: Arc::new(options), relays, hello: ClientId::default(), session: None }
    }

    /// Connects, greets and authenticates, unless a session is open and answers.
    ///
    /// # Errors
    /// What went wrong, in a phase before any message was mentioned.
    pub async fn ready(&mut self) -> Result<(), Happened> {
        if let Some(session) = self.session.take() {
            self.session = session.if_alive(&self.options.timeouts).await;
        }
        self.renew().await;
        if self.session.is_none() {
            self.session = Some(self.connect().await?);
        }
        Ok(())
    }

    /// Whether a session is open that can take another message.
    pub fn is_open(&self) -> bool {
        self.session.as_ref().is_some_and(|session| !self.is_spent(session))
    }

    /// Delivers one message. `still_ours` is asked before MAIL and before the content; when it says no, nothing of the
    /// message has been delivered, and nothing will be.
    pub async fn send<F, Ours>(&mut self, composed: &Composed, mut still_ours: F) -> Happened
    where
        F: FnMut() -> Ours,
        Ours: Future<Output = bool>,
    {
        if !self.is_open()
            && let Err(happened) = self.ready().await
        {
            return happened;
        }
        loop {
            let Some(session) = self.session.take() else {
                return broken(Phase::Connect, "there is no session");
            };
            let had_been_idle = session.tried > 0;
            let (session, delivery) = session.deliver(composed, &self.options.timeouts, &mut still_ours).await;
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

    /// Connects, and asks whether mail from and to these addresses would be taken; sends none. Returns which server it was.
    ///
    /// # Errors
    /// What went wrong, and where.
    pub async fn probe(&mut self, from: lettre::Address, to: lettre::Address) -> Result<String, Happened> {
        self.ready().await?;
        let Some(session) = self.session.take() else {
            return Err(broken(Phase::Connect, "there is no session"));
        };
        let server = self.relays.get(session.relay).map_or_else(String::new, ToString::to_string);
        let (session, result) = session.offer(from, to, &self.options.timeouts).await;
        self.session = session;
        result.map(|()| server)
    }

    /// Says goodbye. The next message opens another session.
    pub async fn close(&mut self) {
        if let Some(mut session) = self.session.take() {
            // Whatever the server answers, if anything, changes nothing.
            let _ = timeout(GOODBYE, session.connection.quit()).await;
        }
    }

    /// Ends a session that has done its share, and one with a server in whose place a better one can be reached again.
    async fn renew(&mut self) {
        let Some(session) = &self.session else { return };
        if self.is_spent(session) {
            self.close().await;
        } else if let Some(better) = self.relays.better_than(session.relay, Instant::now())
            && let Ok(session) = self.connect_to(better).await
        {
            self.close().await;
            self.session = Some(session);
        }
    }

    fn is_spent(&self, session: &Session) -> bool {
        let most = self.options.max_messages_per_connection;
        most > 0 && session.tried >= most
    }

    /// A session with the first server that lets us in.
    async fn connect(&self) -> Result<Session, Happened> {
        let mut last = broken(Phase::Connect, "there is no server");
        for relay in self.relays.order(Instant::now()) {
            match self.connect_to(relay).await {
                Ok(session) => return Ok(session),
                Err(happened) => last = happened,
            }
        }
        Err(last)
    }

    /// Connects in a task of its own, so that a panic on a malformed EHLO reply (lettre 0.11 has one for a line of blanks)
    /// is a failed connect and not our end. Dropping the future aborts the task.
    async fn connect_to(&self, at: usize) -> Result<Session, Happened> {
        let Some(relay) = self.relays.get(at).cloned() else {
            return Err(broken(Phase::Connect, "there is no such server"));
        };
        let mut task = JoinSet::new();
        task.spawn(establish(self.options.clone(), relay.clone(), self.hello.clone()));
        let result = match task.join_next().await {
            Some(Ok(result)) => result,
            _ => Err(broken(Phase::Hello, "the server's answer to EHLO could not be read")),
        };
        self.relays.tried(at, result.is_ok(), Instant::now());
        if let (Err(happened), true) = (&result, self.options.relays.len() > 1) {
            tracing::warn!(%relay, reply = without_addresses(&happened.reply()), "a mail server is out of reach");
        }
        Ok(Session::new(result?, at))
    }
}

#[cfg(panic = "abort")]
compile_error!(
    "a mail server can make lettre panic, which must be a connection that failed: build with panic = \"unwind\""
);

#[cfg(test)]
mod tests;
