//! What became of messages: decided, and told to the fallback where it must be.

use std::collections::{HashMap, VecDeque};

use super::attempt::Attempt;
use super::pause::Refused;
use super::{Deliverer, Earlier, NAME};
use crate::clock::Clock;
use crate::escalation::{Carried, escalations};
use crate::mail::clean::without_addresses;
use crate::mail::outcome::{Next, Tried, decide};
use crate::policy::Reason;
use crate::store::accounts::ReminderState;
use crate::store::outbox::{ClaimedMessage, Delivery, Record};
use crate::store::planning::NewReminder;
use crate::store::{Result, Store};
use crate::token::Bucket;

impl<S: Store, C: Clock + Clone> Deliverer<S, C> {
    /// Begins to record all that has ended, unless something is being recorded: then it goes with the next. What cannot be
    /// decided because the store fails keeps nothing else from being recorded, and is tried again until its lease ends.
    pub(super) async fn record_ended(&mut self) -> Result<()> {
        if self.recording.is_busy() || self.unrecorded() == 0 {
            return Ok(());
        }
        let mut lost = 0;
        let mut result = Ok(());
        self.judge_refusals();
        let mut undecided = VecDeque::new();
        while let Some((attempt, another_refused)) = self.judged.pop_front() {
            match self.outcome(&attempt, another_refused).await {
                Ok(Some(record)) => self.decided.push((attempt, record)),
                Ok(None) => {
                    tracing::warn!(message_id = %attempt.message.id, "lost the lease on a message before it was handed over");
                    lost += 1;
                }
                // Whoever has it now decides, and not for ever: claims that come to nothing are counted.
                Err(error) if attempt.lease_until <= self.clock.now() => {
                    tracing::error!(message_id = %attempt.message.id, %error, "a message could not be decided before its lease ended");
                    lost += 1;
                    result = Err(error);
                }
                Err(error) => {
                    undecided.push_back((attempt, another_refused));
                    result = Err(error);
                }
            }
        }
        self.judged = undecided;
        // `None` for all of them, where they may go together.
        let mut together: HashMap<Option<Bucket>, Vec<(Attempt, Record)>> = HashMap::new();
        for (attempt, record) in self.decided.drain(..) {
            let bucket = (!S::SPANS_BUCKETS).then(|| attempt.message.id.bucket());
            together.entry(bucket).or_default().push((attempt, record));
        }
        if !together.is_empty() || lost > 0 {
            self.recording.begin(self.store.clone(), self.clock.clone(), together.into_values().collect(), lost);
        }
        result
    }

    /// Says of each that has ended whether it was refused at MAIL as another one was before it. A message that is the first
    /// to be refused there waits for the next one.
    fn judge_refusals(&mut self) {
        let judged = &mut self.judged;
        for attempt in std::mem::take(&mut self.ended) {
            let Some(happened) = &attempt.happened else {
                judged.push_back((attempt, false));
                continue;
            };
            if happened.got_past_mail() {
                self.pause.got_past_mail();
                self.refused = None;
                judged.extend(self.suspect.take().map(|suspect| (suspect, false)));
                judged.push_back((attempt, false));
            } else if happened.refused_at_mail() {
                let id = attempt.message.id;
                match self.refused.replace(id) {
                    // While the server is known to refuse everybody, the same message shows nothing new.
                    Some(before) if before != id || self.pause.is_on() => {
                        judged.extend(self.suspect.take().map(|suspect| (suspect, true)));
                        judged.push_back((attempt, true));
                    }
                    Some(_) => judged.push_back((attempt, false)),
                    None => self.suspect = Some(attempt),
                }
            } else {
                judged.push_back((attempt, false));
            }
        }
    }

    /// Nothing more comes that could show whether the server refuses everybody: it is taken for this message's fault.
    pub(super) fn release_suspect(&mut self) {
        self.ended.extend(self.suspect.take());
    }

    /// What to record of an attempt; `None`: nothing, the lease was lost.
    async fn outcome(&mut self, attempt: &Attempt, another_refused: bool) -> Result<Option<Record>> {
        let Attempt { message, speaking, settled, passed_on, put_off, happened, .. } = attempt;
        let (mut settled, mut escalations) = (settled.clone(), passed_on.clone());
        if let Some(at) = put_off {
            return Ok(Some(Record { delivery: Delivery::PutOff { at: *at }, settled, escalations }));
        }
        let Some(happened) = happened else {
            escalations.extend(self.escalations(message, speaking, Reason::Suppressed, true).await?);
            return Ok(Some(Record { delivery: Delivery::Cancelled, settled, escalations }));
        };
        let now = self.clock.now();
        let tried = Tried {
            attempt: u32::try_from(message.attempts).unwrap_or_default().saturating_add(1),
            since_first_claim: now - message.first_claimed_at,
            give_up_after: self.terms.give_up_after,
            another_refused,
            jitter: rand::random(),
        };
        let delivery = match decide(happened, &tried) {
            Next::Abandon => return Ok(None),
            Next::Sent { reply } => {
                settled.extend(speaking.iter().map(|said| said.settled(ReminderState::Sent, None)));
                Delivery::Sent(reply)
            }
            Next::Retry { after, reply, unknown } => Delivery::Retry { at: now + after, reply, counts: true, unknown },
            Next::Pause { reply } => {
                let refused = if happened.refused_at_mail() { Refused::AtMail } else { Refused::BeforeMail };
                self.refused_everybody(&reply, refused);
                let at = self.pause.until().unwrap_or(now).max(now);
                Delivery::Retry { at, reply, counts: false, unknown: false }
            }
            Next::Failed { reply, suppress } => {
                if suppress {
                    // Before asking who else can be told: of two contacts of one owner that are refused at the same
                    // moment, in two processes, one is then seen to be the last. A crash in between is no loss: the
                    // next claim finds the contact suppressed.
                    self.store.suppress(message, &reply, now).await?;
                }
                let why = Reason::Undeliverable;
                settled.extend(speaking.iter().map(|said| said.settled(ReminderState::Failed, Some(why))));
                escalations.extend(self.escalations(message, speaking, why, suppress).await?);
                Delivery::Failed(reply)
            }
        };
        Ok(Some(Record { delivery, settled, escalations }))
    }

    /// What the fallback is told of what this message could not say.
    async fn escalations(
        &self,
        message: &ClaimedMessage,
        unsaid: &[Carried],
        why: Reason,
        address_at_fault: bool,
    ) -> Result<Vec<NewReminder>> {
        match self.terms.fallback {
            Some(fallback) => {
                let contact = message.contact.id;
                escalations(&self.store, &self.terms.groups, fallback, contact, unsaid, why, address_at_fault).await
            }
            None => Ok(Vec::new()),
        }
    }

    /// Keeps in the store whether delivery pauses, for whoever asks how it goes. Of several processes the last one counts.
    pub(super) async fn tell_status(&mut self) -> Result<()> {
        let why = self.pause.why();
        if why == self.told.as_deref() {
            return Ok(());
        }
        self.tell(why).await?;
        self.told = why.map(str::to_owned);
        Ok(())
    }

    /// What an earlier process told of a pause holds no longer when the mail server has let us in.
    pub(super) async fn correct_status(&mut self) -> Result<()> {
        if self.earlier != Earlier::WasWrong {
            return Ok(());
        }
        let records = self.store.job_records().await?;
        if records.iter().any(|record| record.name == NAME && record.error.is_some()) {
            self.tell(None).await?;
        }
        self.earlier = Earlier::Forgotten;
        Ok(())
    }

    async fn tell(&self, why: Option<&str>) -> Result<()> {
        let now = self.clock.now();
        // Another process that tells its own at this moment is as good.
        if let Some(lease) = self.store.lease(NAME, self.holder, now).await? {
            let outcome = why.map_or(Ok("the mail server takes mail again"), Err);
            self.store.finish(&lease, now, outcome).await?;
        }
        Ok(())
    }

    /// The server refuses everybody; or one session more, where it has let others in.
    pub(super) fn refused_everybody(&mut self, reply: &str, refused: Refused) {
        let now = self.clock.now();
        let reply = &without_addresses(reply);
        if refused == Refused::BeforeMail && self.sessions.any_open() {
            if let Some(until) = self.pause.refused_one_more(now) {
                tracing::warn!(reply, retry_at = %until, "the mail server takes no further session");
            }
        } else if let Some(until) = self.pause.refused(refused, now, reply) {
            tracing::warn!(reply, retry_at = %until, "no mail can be handed over: delivery pauses");
        }
    }
}
