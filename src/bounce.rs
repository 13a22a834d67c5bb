//! What is done about a mail that came back after a mail server had taken it.
//!
//! Guarantees that a notification changes nothing unless it is about a message of this store, and, where return paths are
//! signed, came to the one that the message left with. What it says then counts as a refusal would have: the address may be
//! dead, the message failed, and whoever must hear of it does, by the rules of delivery. Safe to repeat: a crash half-way
//! leaves a suppressed address, and the same notification once more does the rest.

use std::collections::HashMap;

use crate::clock::Timestamp;
use crate::escalation::{Carried, escalations};
use crate::mail::dsn::Notification;
use crate::mail::outcome::{Later, decide_later};
use crate::mail::return_path::{Read, ReturnPath};
use crate::policies::Group;
use crate::policy::Reason;
use crate::store::bounces::Posted;
use crate::store::outbox::MessageState;
use crate::store::planning::NewReminder;
use crate::store::recipients::Facts;
use crate::store::{Result, Store};
use crate::token::{ContactId, MessageId};

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// It was delivered, or is still being tried: nothing.
    Nothing,
    /// The message failed; so did this many reminders, and the fallback is told of so many.
    Failed {
        /// Whether the address takes no mail from now on.
        suppressed: bool,
        /// Reminders that the message carried.
        reminders: usize,
        /// How many of them the fallback hears of.
        escalated: usize,
    },
    /// The message had been given up already, or was never sent, or is to be tried again.
    Known {
        /// Whether the address takes no mail from now on.
        suppressed: bool,
    },
    /// It is being sent at this moment, and what became of that is not written yet: ask again.
    TooEarly,
    /// The store has no such message (any more).
    Unknown,
}

/// Which message a notification is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// This one.
    Message(MessageId),
    /// It came to a return path that we did not sign, or to none although they are signed.
    Forged,
    /// It does not say.
    Nothing,
}

/// Finds the message that a notification is about. `came_to` is the address that it was sent to, as far as the mail
/// system says so.
///
/// Where return paths are signed, nothing else counts; else the `Message-ID` of the returned mail does.
pub fn about(notification: &Notification, came_to: &[String], return_path: Option<&ReturnPath>) -> About {
    let Some(return_path) = return_path else { return notification.about.map_or(About::Nothing, About::Message) };
    let read = came_to.iter().chain(&notification.came_to).map(|address| return_path.read(address));
    let message = read.into_iter().find_map(|read| if let Read::Of(message) = read { Some(message) } else { None });
    message.map_or(About::Forged, About::Message)
}

/// Does what follows from a notification about a message. `groups` are the policies of groups of tokens, for whom else they tell.
///
/// # Errors
/// When the store fails: the same notification may be given again.
pub async fn take<S: Store>(
    store: &S,
    message: MessageId,
    notification: &Notification,
    groups: &[Group],
    now: Timestamp,
) -> Result<Done> {
    let Some(posted) = store.posted(message).await? else { return Ok(Done::Unknown) };
    let Later::Failed { reply, suppress } = decide_later(notification, &posted.contact.address) else {
        return Ok(Done::Nothing);
    };
    if posted.state == MessageState::Sending {
        return Ok(Done::TooEarly);
    }
    if suppress {
        // Before asking who else can be told, as delivery does: of two contacts of one owner whose mail comes back at the
        // same moment, one is then seen to be the last.
        store.suppress_contact(posted.contact.id, &reply, now).await?;
        tracing::warn!(contact = %posted.contact.id, message_id = %message, "an address is dead, says a bounce: it gets no mail any more");
    }
    if posted.state != MessageState::Sent {
        return Ok(Done::Known { suppressed: suppress });
    }
    let escalations = escalated(store, groups, &posted, suppress).await?;
    if !store.came_back(message, &reply, &escalations, now).await? {
        return Ok(Done::Known { suppressed: suppress });
    }
    let (reminders, escalated) = (posted.sent.len(), escalations.len());
    tracing::warn!(message_id = %message, reminders, escalated, "a message that was sent came back");
    Ok(Done::Failed { suppressed: suppress, reminders, escalated })
}

/// What the fallback is told, by the rule of delivery.
async fn escalated<S: Store>(
    store: &S,
    groups: &[Group],
    posted: &Posted,
    address_at_fault: bool,
) -> Result<Vec<NewReminder>> {
    let contact = posted.contact.id;
    let Some(fallback) = store.fallback().await? else { return Ok(Vec::new()) };
    let asked: Vec<_> = posted.sent.iter().map(|reminder| (contact, reminder.token)).collect();
    let facts: HashMap<ContactId, Facts> = store.facts(&asked).await?;
    let tokens = facts.into_values().flat_map(|facts| facts.tokens);
    let owners: HashMap<_, _> = tokens.map(|(id, (token, _))| (id, token.owner)).collect();
    // Of a token that is gone nobody needs to hear.
    let unsaid: Vec<Carried> = posted
        .sent
        .iter()
        .filter_map(|reminder| Some(Carried { reminder: *reminder, owner: Some(*owners.get(&reminder.token)?) }))
        .collect();
    escalations(store, groups, fallback, contact, &unsaid, Reason::Undeliverable, address_at_fault).await
}
