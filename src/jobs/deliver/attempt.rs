//! One attempt at a message: what it still has to say, and sending that under its lease.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use chrono::TimeDelta;
use tokio::task::JoinHandle;

use super::{LEASE, Said, Terms};
use crate::clock::{Clock, Timestamp};
use crate::correction::{Correction, correct};
use crate::digest::{Ahead, Digest, Waiting};
use crate::escalation::Carried;
use crate::mail::compose::{ComposeError, Composed, Composer};
use crate::mail::letter::{Alert, Change, Content, Item, Letter, Overtaken};
use crate::mail::outcome::Happened;
use crate::mail::transport::Transport;
use crate::policies::{Group, Traits, group_of};
use crate::policy::{Lead, Reason, Verdict, recheck};
use crate::store::Store;
use crate::store::accounts::ReminderState;
use crate::store::outbox::{ClaimedMessage, Delivery, Record, Settled};
use crate::store::planning::NewReminder;
use crate::store::recipients::Facts;
use crate::token::{ContactId, NEVER, Owner, Token, TokenId};

/// With less than this left of its lease, a message is renewed before it is handed over.
pub(super) const RENEW_WITHIN: TimeDelta = TimeDelta::minutes(3);

/// How often a message that is being sent is renewed.
const RENEW_EVERY: Duration = Duration::from_secs(60);

/// How often a message may be claimed by a process that never says what became of it.
const MOST_LOST_CLAIMS: i32 = 10;

/// A claimed message on its way from the claim to the record.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) message: ClaimedMessage,
    /// What it says.
    pub(super) speaking: Vec<Carried>,
    /// What has become of the rest.
    pub(super) settled: Vec<Settled>,
    /// What is told to whoever is the fallback now, in the place of an earlier one.
    pub(super) passed_on: Vec<NewReminder>,
    /// It goes not now, but with what is said from then on.
    pub(super) put_off: Option<Timestamp>,
    /// How long the message is ours.
    pub(super) lease_until: Timestamp,
    /// What came of it; `None` while nothing did, and for a message that had nothing left to say.
    pub(super) happened: Option<Happened>,
}

impl Attempt {
    /// What is to be done about a message that was claimed, by what is true now; with the letter to send, if there is
    /// one. An alert that is no longer true, or whose contact is not the fallback any more, has nothing left to say.
    pub(super) fn new(
        message: ClaimedMessage,
        facts: &Facts,
        said: &Said,
        alert: Option<Alert>,
        terms: &Terms,
        now: Timestamp,
    ) -> (Self, Option<Letter>) {
        let fallback = terms.fallback;
        let corrections = corrections(&message, facts, said, now);
        let Judged { speaking, mut settled, passed_on } = judge(&message, facts, &corrections, &terms.groups, now);
        let passed_on = match fallback.filter(|fallback| *fallback != message.contact.id) {
            Some(fallback) => {
                passed_on.iter().map(|said| said.reminder.escalated(fallback, said.reminder.reason)).collect()
            }
            None => Vec::new(),
        };
        let mut letter = None;
        let mut happened = None;
        if message.contact.suppressed.is_some() {
            let unreachable = |said: &Carried| said.settled(ReminderState::Unreachable, Some(Reason::Suppressed));
            settled.extend(speaking.iter().map(unreachable));
        } else if message.lost_claims > MOST_LOST_CLAIMS {
            happened = Some(Happened::Deserted { claims: message.lost_claims.unsigned_abs() });
        } else {
            let content = match alert.filter(|_| fallback == Some(message.contact.id)) {
                Some(alert) => Some(Content::Alert(alert)),
                None if speaking.is_empty() => None,
                None => Some(Content::Reminders(
                    speaking.iter().filter_map(|said| item(said, facts, &corrections)).collect(),
                )),
            };
            letter = content.map(|content| Letter { message: message.id, to: message.contact.clone(), content });
        }
        let lease_until = message.lease_until;
        (Self { message, speaking, settled, passed_on, put_off: None, lease_until, happened }, letter)
    }

    /// Until when all that the message says may wait, because its contact was sent another mail at `mailed_at`; `None`: something in
    /// it is urgent, or would come too late to be of use.
    pub(super) fn put_off_until(
        &self,
        facts: &Facts,
        terms: &Terms,
        mailed_at: Timestamp,
        now: Timestamp,
    ) -> Option<Timestamp> {
        let goes_at = |said: &Carried| {
            let Some((token, owner)) = facts.tokens.get(&said.reminder.token) else { return now };
            let group = group_of(&terms.groups, &Traits::of(token, &owner.key)).map(|(_, group)| group);
            let (policy, digest) = group.map_or((&terms.policy, &terms.digest), |group| (&group.policy, &group.digest));
            let zone = self.message.contact.time_zone.unwrap_or(owner.time_zone);
            let ahead = Ahead::of(policy, said.reminder.expires_at, said.reminder.claimed.lead, now);
            // It has waited for more to say.
            let digest = Digest { hold: TimeDelta::zero(), ..digest.clone() };
            digest.goes_at(Waiting { now, ahead, zone, mailed_at: Some(mailed_at) })
        };
        self.speaking.iter().map(goes_at).min().filter(|at| *at > now)
    }

    /// Sends the mail, renewing the lease meanwhile.
    pub(super) async fn send<S: Store, C: Clock>(
        &mut self,
        mail: Mail,
        store: &S,
        clock: &C,
        composer: &Composer,
        transport: &mut Transport,
    ) {
        let composed = match mail.composed(composer, clock.now()).await {
            Ok(composed) => composed,
            Err(error) => {
                self.happened = Some(Happened::Unbuildable { error: error.to_string() });
                return;
            }
        };
        let until = AtomicI64::new(self.lease_until.timestamp());
        let hold = Hold { store, clock, message: &self.message, until };
        let over = async {
            loop {
                tokio::time::sleep(RENEW_EVERY).await;
                if !hold.prolong().await && hold.is_over() {
                    return;
                }
            }
        };
        let happened = tokio::select! {
            happened = transport.send(self.message.id, &composed, || hold.still_ours()) => happened,
            // Dropping the send drops its session: nothing more goes out.
            () = over => Happened::LostLease,
        };
        self.lease_until = hold.until();
        self.happened = Some(happened);
    }
}

/// A message that was claimed, and is given back without having been tried.
pub(super) fn untried(message: ClaimedMessage, now: Timestamp, why: &str) -> (Attempt, Record) {
    let reply = format!("not tried: {why}");
    let delivery = Delivery::Retry { at: now, reply, counts: false, unknown: false };
    let lease_until = message.lease_until;
    let (speaking, settled, passed_on) = (Vec::new(), Vec::new(), Vec::new());
    let attempt = Attempt { message, speaking, settled, passed_on, put_off: None, lease_until, happened: None };
    (attempt, Record { delivery, settled: Vec::new(), escalations: Vec::new() })
}

/// What a message says, on its way to be a mail.
#[derive(Debug)]
pub(super) enum Mail {
    /// Not composed yet.
    Letter(Letter),
    /// Being composed in a task of its own, while no session is there for it.
    Composing(JoinHandle<Result<Composed, ComposeError>>),
}

impl Mail {
    /// Begins to compose it, unless that has begun.
    pub(super) fn compose(&mut self, composer: &Arc<Composer>, now: Timestamp) {
        if let Self::Letter(letter) = self {
            let (letter, composer) = (letter.clone(), composer.clone());
            *self = Self::Composing(tokio::spawn(async move { composer.compose(&letter, now) }));
        }
    }

    async fn composed(self, composer: &Composer, now: Timestamp) -> Result<Composed, ComposeError> {
        match self {
            Self::Letter(letter) => composer.compose(&letter, now),
            // A panic there is one here.
            Self::Composing(task) => task.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())),
        }
    }
}

/// What must be told of each token because what was said of it before no longer holds.
type Corrections = HashMap<TokenId, Correction>;

fn corrections(message: &ClaimedMessage, facts: &Facts, said: &Said, now: Timestamp) -> Corrections {
    let corrections = message.reminders.iter().filter(|reminder| reminder.claimed.lead.corrects());
    let correction = |id: TokenId| {
        let (token, _) = facts.tokens.get(&id)?;
        let said = said.get(&(message.contact.id, id)).map_or(&[][..], Vec::as_slice);
        Some((id, correct(token, said, Some(message.id), now)?))
    };
    corrections.filter_map(|reminder| correction(reminder.token)).collect()
}

fn item(said: &Carried, facts: &Facts, corrections: &Corrections) -> Option<Item> {
    let (token, owner) = facts.tokens.get(&said.reminder.token)?.clone();
    let why = said.reminder.reason.unwrap_or(Reason::NoContact);
    let escalation = said.reminder.escalation.then_some(why);
    let lead = said.reminder.claimed.lead;
    let before = token.moved_from.filter(|before| *before < NEVER);
    let change = (lead == Lead::CHANGED).then_some(Change { before });
    let correction = corrections.get(&token.id).filter(|correction| correction.lead == lead);
    let overtaken = correction.map(|correction| Overtaken { told: correction.told, why: correction.why });
    Some(Item { token, owner, lead, escalation, change, overtaken })
}

/// What a message carries, sorted.
struct Judged {
    /// Still true, and for this contact.
    speaking: Vec<Carried>,
    /// What became of the rest.
    settled: Vec<Settled>,
    /// Those of the rest that are still true, and for whoever is the fallback now.
    passed_on: Vec<Carried>,
}

/// Sorts what a message carries into what is still true and what is not.
fn judge(
    message: &ClaimedMessage,
    facts: &Facts,
    corrections: &Corrections,
    groups: &[Group],
    now: Timestamp,
) -> Judged {
    let (mut speaking, mut settled, mut passed_on) = (Vec::new(), Vec::new(), Vec::new());
    for reminder in &message.reminders {
        let known = facts.tokens.get(&reminder.token);
        let owner = known.map(|(token, _)| token.owner);
        let said = Carried { reminder: *reminder, owner };
        if facts.broken.contains(&reminder.token) {
            settled.push(said.settled(ReminderState::Failed, Some(Reason::Unreadable)));
            continue;
        }
        let may_hear = known.is_none_or(|(token, owner)| {
            (reminder.escalation && facts.is_fallback)
                || facts.heard.contains(&token.id)
                || is_told(groups, token, owner, message.contact.id)
        });
        let verdict = recheck(reminder.claimed, known.map(|(token, _)| token), now);
        let lead = reminder.claimed.lead;
        let corrects = corrections.get(&reminder.token).is_some_and(|correction| correction.lead == lead);
        match verdict {
            Verdict::Speak if lead.corrects() && !corrects => {
                settled.push(said.settled(ReminderState::Cancelled, Some(Reason::NothingToCorrect)));
            }
            Verdict::Speak if may_hear => speaking.push(said),
            Verdict::Speak => {
                settled.push(said.settled(ReminderState::Cancelled, Some(Reason::NoLongerContact)));
                passed_on.extend(reminder.escalation.then_some(said));
            }
            Verdict::Superseded(why) => settled.push(said.settled(ReminderState::Superseded, Some(why))),
            Verdict::Cancelled(why) => settled.push(said.settled(ReminderState::Cancelled, Some(why))),
        }
    }
    Judged { speaking, settled, passed_on }
}

/// Whether a contact is told of a token by the policy that the token follows now.
fn is_told(groups: &[Group], token: &Token, owner: &Owner, contact: ContactId) -> bool {
    // Few contacts are named by a policy, and only then there is something to match.
    let named = groups.iter().any(|group| group.contacts.iter().any(|(named, _)| *named == contact));
    let group = named.then(|| group_of(groups, &Traits::of(token, &owner.key))).flatten();
    group.is_some_and(|(_, group)| group.contacts.iter().any(|(named, _)| *named == contact))
}

/// A claimed message's lease while it is being sent.
struct Hold<'a, S, C> {
    store: &'a S,
    clock: &'a C,
    message: &'a ClaimedMessage,
    /// In seconds since 1970.
    until: AtomicI64,
}

impl<S: Store, C: Clock> Hold<'_, S, C> {
    fn until(&self) -> Timestamp {
        Timestamp::from_timestamp(self.until.load(Ordering::Relaxed), 0).unwrap_or_default()
    }

    fn left(&self) -> TimeDelta {
        self.until() - self.clock.now()
    }

    fn is_over(&self) -> bool {
        self.left() <= TimeDelta::zero()
    }

    async fn prolong(&self) -> bool {
        let until = self.clock.now() + LEASE;
        let Ok(renewed) = self.store.renew(self.message, until).await else { return false };
        // Whoever has it now does not wait for what was promised to us.
        let until = if renewed { until } else { Timestamp::UNIX_EPOCH };
        self.until.store(until.timestamp(), Ordering::Relaxed);
        renewed
    }

    async fn still_ours(&self) -> bool {
        self.left() > RENEW_WITHIN || self.prolong().await
    }
}
