//! What became of messages is written down, in a task of its own, so that meanwhile others are claimed and sent.
//!
//! One set of messages at a time: what ends meanwhile is recorded together, which costs hardly more than one. Dropping
//! [`Recording`] drops the task; what it had not recorded is then sent again.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinSet;
use tracing::Instrument;

use super::attempt::Attempt;
use super::{Delivered, TRY_AGAIN};
use crate::clock::Clock;
use crate::store::accounts::ReminderState;
use crate::store::outbox::{ClaimedMessage, Delivery, Record};
use crate::store::planning::Reminded;
use crate::store::{Result, Store};

/// Attempts that are recorded together, and what to record of each.
type Outcomes = Vec<(Attempt, Record)>;

/// The messages that are being recorded, and what came of it.
#[derive(Default)]
pub(super) struct Recording {
    under_way: JoinSet<Result<Delivered>>,
    messages: usize,
    done: Option<Result<Delivered>>,
    /// What became of reminders, since somebody asked.
    reminded: Arc<Mutex<Reminded>>,
}

impl Recording {
    /// Whether messages are being recorded, or have been and nobody has asked yet what came of it.
    pub(super) fn is_busy(&self) -> bool {
        !self.under_way.is_empty() || self.done.is_some()
    }

    /// How many are being recorded.
    pub(super) fn messages(&self) -> usize {
        self.messages
    }

    /// Begins to record. `lost` messages had been lost to another process before.
    pub(super) fn begin<S: Store, C: Clock>(&mut self, store: S, clock: C, together: Vec<Outcomes>, lost: u64) {
        self.messages = together.iter().map(Vec::len).sum();
        let mut did = Delivered { lost, ..Delivered::default() };
        let recorder = Recorder { store, clock, reminded: self.reminded.clone() };
        let record = async move {
            let mut result = Ok(());
            for outcomes in &together {
                // What the store refuses of some must not keep the others from being recorded.
                match recorder.record_all(outcomes).await {
                    Ok(more) => did += more,
                    Err(error) => result = Err(error),
                }
            }
            result.map(|()| did)
        };
        self.under_way.spawn(record.in_current_span());
    }

    /// What became of reminders since this was asked last.
    pub(super) fn take_reminded(&self) -> Reminded {
        std::mem::take(&mut self.reminded.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until the messages are recorded; pending for ever when there are none. Nothing is lost when it is dropped.
    pub(super) async fn done(&mut self) {
        if self.done.is_none() {
            match self.under_way.join_next().await {
                Some(joined) => self.note(joined),
                None => std::future::pending().await,
            }
        }
    }

    /// What came of it, if it is done.
    pub(super) fn take(&mut self) -> Result<Delivered> {
        if let Some(joined) = self.under_way.try_join_next() {
            self.note(joined);
        }
        self.done.take().unwrap_or_else(|| Ok(Delivered::default()))
    }

    /// A panic in the task is a panic here: whoever supervises the process starts it anew.
    fn note(&mut self, joined: std::result::Result<Result<Delivered>, tokio::task::JoinError>) {
        self.messages = 0;
        self.done = Some(joined.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())));
    }
}

struct Recorder<S, C> {
    store: S,
    clock: C,
    reminded: Arc<Mutex<Reminded>>,
}

impl<S: Store, C: Clock> Recorder<S, C> {
    /// Tells the log what became of a message, and counts it and its reminders.
    fn report(&self, message: &ClaimedMessage, record: &Record, recorded: bool) -> Delivered {
        if recorded {
            let mut reminded = self.reminded.lock().unwrap_or_else(PoisonError::into_inner);
            record.settled.iter().for_each(|settled| reminded.add(settled.claimed.lead, settled.state));
            record.escalations.iter().for_each(|escalated| reminded.add(escalated.lead, escalated.state));
        }
        report(message, record, recorded)
    }

    /// Records what became of messages. Where the store does not take all of them at once, each is on its
    /// own: one that cannot be recorded must not make the others be sent again.
    async fn record_all(&self, outcomes: &[(Attempt, Record)]) -> Result<Delivered> {
        let mut did = Delivered::default();
        match self.store_outcomes(outcomes).await {
            Ok(recorded) => {
                for ((attempt, record), recorded) in outcomes.iter().zip(recorded) {
                    did += self.report(&attempt.message, record, recorded);
                }
                Ok(did)
            }
            Err(error) if outcomes.len() == 1 => Err(error),
            Err(_) => {
                let mut result = Ok(());
                for outcome in outcomes.chunks(1) {
                    match self.store_outcomes(outcome).await {
                        Ok(recorded) => {
                            did += self.report(&outcome[0].0.message, &outcome[0].1, recorded.first() == Some(&true));
                        }
                        Err(error) => result = Err(error),
                    }
                }
                result.map(|()| did)
            }
        }
    }

    /// While the store cannot be written it is tried again, for as long as that lasts: a message that was sent and not
    /// recorded would be sent twice. After the end of its lease another process may have taken it over; the lease's epoch
    /// then keeps this record out.
    async fn store_outcomes(&self, outcomes: &[(Attempt, Record)]) -> Result<Vec<bool>> {
        let pairs: Vec<_> = outcomes.iter().map(|(attempt, record)| (&attempt.message, record)).collect();
        loop {
            match self.store.record(&pairs, self.clock.now()).await {
                Err(error) if error.is_of_the_store() => {
                    tracing::warn!(messages = pairs.len(), %error, "cannot record messages yet");
                    tokio::time::sleep(TRY_AGAIN).await;
                }
                answer => return answer,
            }
        }
    }
}

/// Tells the log what became of a message, and counts it.
fn report(message: &ClaimedMessage, record: &Record, recorded: bool) -> Delivered {
    let id = message.id;
    let reminders = record.settled.iter().filter(|settled| settled.state == ReminderState::Sent).count();
    let mut did = Delivered::default();
    if !recorded {
        tracing::warn!(message_id = %id, "another process took this message over: it may arrive twice");
        did.lost = 1;
        return did;
    }
    match &record.delivery {
        Delivery::Sent(_) => {
            tracing::info!(message_id = %id, reminders, attempt = message.attempts + 1, "sent a message");
            did.sent = 1;
        }
        Delivery::Retry { at, counts, unknown, .. } => {
            tracing::info!(message_id = %id, retry_at = %at, counts, unknown, "a message will be tried again");
            did.retried = 1;
            did.unknown = u64::from(*unknown);
        }
        Delivery::Failed(_) => {
            tracing::warn!(message_id = %id, contact = %message.contact.id, "gave a message up");
            did.failed = 1;
        }
        Delivery::PutOff { at } => {
            tracing::info!(message_id = %id, until = %at, "its contact was sent another message just now: it waits");
            did.put_off = 1;
        }
        Delivery::Cancelled => {
            tracing::info!(message_id = %id, "a message had nothing left to say");
            did.cancelled = 1;
        }
    }
    did
}
