//! What would become of a message, were it claimed now and taken by the mail server.

use super::attempt::Attempt;
use super::{Said, Terms};
use crate::clock::Timestamp;
use crate::escalation::escalations;
use crate::mail::letter::{Alert, Content};
use crate::policy::Reason;
use crate::store::outbox::{ClaimedMessage, MessageKind};
use crate::store::planning::NewReminder;
use crate::store::recipients::Facts;
use crate::store::{Result, Store};

/// What would become of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::jobs) enum Fate {
    /// It would be sent, with so many reminders.
    Goes(u64),
    /// It would be left to a later one.
    PutOff,
    /// It has nothing left to say.
    SaysNothing,
    /// It would be given up.
    GivenUp,
}

/// What is true of what a message says.
#[derive(Clone, Copy)]
pub(in crate::jobs) struct Known<'a> {
    /// Of its tokens.
    pub(in crate::jobs) facts: &'a Facts,
    /// What was said before of what it corrects.
    pub(in crate::jobs) said: &'a Said,
    /// When its contact was sent reminders, where that was so lately that others wait.
    pub(in crate::jobs) mailed_at: Option<Timestamp>,
}

/// What would become of a message, by the code that sends it, and what the fallback would be told of it.
pub(in crate::jobs) async fn foresee<S: Store>(
    store: &S,
    message: ClaimedMessage,
    known: Known<'_>,
    alert: Option<Alert>,
    terms: &Terms,
    now: Timestamp,
) -> Result<(Fate, Vec<NewReminder>)> {
    let (attempt, letter) = Attempt::new(message, known.facts, known.said, alert, terms, now);
    let may_wait = letter.is_some() && attempt.message.kind == MessageKind::Reminders && attempt.message.epoch == 1;
    if let Some(mailed_at) = known.mailed_at.filter(|_| may_wait)
        && attempt.put_off_until(known.facts, terms, mailed_at, now).is_some()
    {
        return Ok((Fate::PutOff, attempt.passed_on));
    }
    let Attempt { message, speaking, passed_on: mut told, happened, .. } = attempt;
    let (fate, unsaid) = match (letter.map(|letter| letter.content), happened) {
        (Some(Content::Reminders(items)), _) => (Fate::Goes(items.len() as u64), None),
        (Some(_), _) => (Fate::Goes(0), None),
        (None, Some(_)) => (Fate::GivenUp, Some((Reason::Undeliverable, false))),
        (None, None) => (Fate::SaysNothing, Some((Reason::Suppressed, true))),
    };
    if let (Some((why, address_at_fault)), Some(fallback)) = (unsaid, terms.fallback) {
        let contact = message.contact.id;
        told.extend(escalations(store, &terms.groups, fallback, contact, &speaking, why, address_at_fault).await?);
    }
    Ok((fate, told))
}
