//! The sessions of one process: how many are open, and what each of them is doing.
//!
//! A session is a [`Transport`] that is closed, open and idle, or owned by the task that opens it or sends through it.
//! Dropping [`Sessions`] drops the tasks, and with them whatever is under way.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::attempt::Attempt;
use crate::mail::outcome::Happened;
use crate::mail::transport::Transport;

/// An open session that was idle for longer is made sure of before a message is claimed for it.
const MAKE_SURE_AFTER: Duration = Duration::from_secs(30);

/// What a task ended with.
pub(super) enum Ended {
    /// The session can take a message, or cannot.
    Opened(Transport, Result<(), Happened>),
    /// A message was tried.
    Attempted(Transport, Box<Attempt>),
    /// The session was idle for long enough, and said goodbye.
    Closed(Transport),
}

/// What the caller is told of a task that ended.
pub(super) enum Told {
    /// A session was opened, or could not be.
    Opened(Result<(), Happened>),
    /// A message was tried.
    Attempted(Box<Attempt>),
}

/// All sessions of a process.
pub(super) struct Sessions {
    closed: Vec<Transport>,
    /// Idle, with the instant since when; the one that was used last comes last.
    open: VecDeque<(Transport, Instant)>,
    /// Each with the generation of its session.
    under_way: JoinSet<(u64, Ended)>,
    opening: usize,
    sending: usize,
    closing: usize,
    /// Counts how often the sessions were replaced.
    generation: u64,
}

impl Sessions {
    pub(super) fn new(transports: Vec<Transport>) -> Self {
        Self {
            closed: transports,
            open: VecDeque::new(),
            under_way: JoinSet::new(),
            opening: 0,
            sending: 0,
            closing: 0,
            generation: 0,
        }
    }

    /// Uses these from now on. Those that are idle say goodbye, those that are not do so when they are.
    pub(super) fn replace(&mut self, transports: Vec<Transport>) {
        self.generation += 1;
        self.closed = transports;
        for (transport, _) in std::mem::take(&mut self.open) {
            self.retire(transport);
        }
    }

    /// Ends a session that was replaced.
    fn retire(&mut self, mut transport: Transport) {
        self.closing += 1;
        // Of no generation that is used again.
        self.under_way.spawn(async move {
            transport.close().await;
            (u64::MAX, Ended::Closed(transport))
        });
    }

    /// How many there may be.
    pub(super) fn all(&self) -> usize {
        self.closed.len() + self.open.len() + self.opening + self.sending + self.closing
    }

    /// How many could take a message now.
    pub(super) fn idle(&self) -> usize {
        self.open.len()
    }

    /// How many are taking one.
    pub(super) fn sending(&self) -> usize {
        self.sending
    }

    /// Whether a session is being opened, or a message tried.
    pub(super) fn are_busy(&self) -> bool {
        self.opening + self.sending > 0
    }

    /// Whether the mail server has let us in and has not thrown us out since.
    pub(super) fn any_open(&self) -> bool {
        !self.open.is_empty() || self.sending > 0
    }

    /// How many are open, or about to be.
    pub(super) fn opened(&self) -> usize {
        self.open.len() + self.opening + self.sending
    }

    /// How many will take a message next: idle, or about to be.
    pub(super) fn coming(&self) -> usize {
        self.open.len() + self.opening
    }

    /// Those that were idle for long must be opened again, which shows whether they still are.
    pub(super) fn doubt_stale(&mut self) {
        while self.open.front().is_some_and(|(_, since)| since.elapsed() > MAKE_SURE_AFTER) {
            self.closed.extend(self.open.pop_front().map(|(transport, _)| transport));
        }
    }

    /// Opens one more, if there is one that is closed.
    pub(super) fn open_one(&mut self) -> bool {
        let Some(mut transport) = self.closed.pop() else { return false };
        self.opening += 1;
        let generation = self.generation;
        self.under_way.spawn(async move {
            let ready = transport.ready().await;
            (generation, Ended::Opened(transport, ready))
        });
        true
    }

    /// Takes an idle session out, for [`Sessions::spawn`] to give back.
    pub(super) fn take(&mut self) -> Option<Transport> {
        self.open.pop_back().map(|(transport, _)| transport)
    }

    /// Lets a session that was taken out try a message.
    pub(super) fn spawn(&mut self, attempt: impl Future<Output = Ended> + Send + 'static) {
        self.sending += 1;
        let generation = self.generation;
        self.under_way.spawn(async move { (generation, attempt.await) });
    }

    /// Waits until a task has ended; pending for ever when there is none. Nothing is lost when it is dropped.
    pub(super) async fn ended(&mut self) -> Option<Told> {
        match self.under_way.join_next().await {
            Some(ended) => self.put_back(whole(ended)),
            None => std::future::pending().await,
        }
    }

    /// What a task that has ended tells; `None` when none has.
    pub(super) fn try_ended(&mut self) -> Option<Told> {
        loop {
            let ended = self.under_way.try_join_next()?;
            if let Some(told) = self.put_back(whole(ended)) {
                return Some(told);
            }
        }
    }

    fn put_back(&mut self, (generation, ended): (u64, Ended)) -> Option<Told> {
        let (transport, ready, told) = match ended {
            Ended::Opened(transport, ready) => {
                self.opening -= 1;
                (transport, ready.is_ok(), Some(Told::Opened(ready)))
            }
            Ended::Attempted(transport, attempt) => {
                self.sending -= 1;
                let ready = transport.is_open();
                (transport, ready, Some(Told::Attempted(attempt)))
            }
            Ended::Closed(transport) => {
                self.closing -= 1;
                (transport, false, None)
            }
        };
        if generation != self.generation {
            // What its server says of itself concerns nobody any more.
            if ready {
                self.retire(transport);
            }
            return told.filter(|told| matches!(told, Told::Attempted(_)));
        }
        if ready {
            self.open.push_back((transport, Instant::now()));
        } else {
            self.closed.push(transport);
        }
        told
    }

    /// When the first open session will have been idle for this long.
    pub(super) fn idle_until(&self, limit: Duration) -> Option<Instant> {
        self.open.front().and_then(|(_, since)| since.checked_add(limit))
    }

    /// Closes the sessions that have been idle for at least this long.
    pub(super) fn close_idle(&mut self, limit: Duration) {
        while self.open.front().is_some_and(|(_, since)| since.elapsed() >= limit) {
            let Some((mut transport, _)) = self.open.pop_front() else { return };
            self.closing += 1;
            let generation = self.generation;
            self.under_way.spawn(async move {
                transport.close().await;
                (generation, Ended::Closed(transport))
            });
        }
    }
}

impl Sessions {
    /// Says goodbye in all sessions that are idle.
    pub(super) async fn close(&mut self) {
        self.close_idle(Duration::ZERO);
        while self.closing > 0 && self.ended_or_none().await {}
    }

    async fn ended_or_none(&mut self) -> bool {
        match self.under_way.join_next().await {
            Some(ended) => {
                self.put_back(whole(ended));
                true
            }
            None => false,
        }
    }
}

/// A panic in a task is a panic here: whoever supervises the process starts it anew.
fn whole<T>(joined: Result<T, tokio::task::JoinError>) -> T {
    match joined {
        Ok(ended) => ended,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
