//! What the fallback is told of reminders that their contact was not.
//!
//! Where the address was at fault, it is enough that another contact of the owner, somebody who watches the token, or one whom the
//! token's policy names, is told of the same; where the message was, whoever operates lapsed must hear of it. Whether it is still true is checked when it is sent.

use std::collections::HashMap;

use crate::policies::{Group, group_of};
use crate::policy::Reason;
use crate::store::accounts::ReminderState;
use crate::store::outbox::{ClaimedReminder, Settled};
use crate::store::planning::NewReminder;
use crate::store::{Result, Store};
use crate::token::{ContactId, OwnerId, TokenId};

/// A reminder that a message carries.
#[derive(Clone, Copy, Debug)]
pub struct Carried {
    /// The reminder.
    pub reminder: ClaimedReminder,
    /// Whose token it is about; `None` where that is gone.
    pub owner: Option<OwnerId>,
}

impl Carried {
    /// What has become of it.
    pub fn settled(&self, state: ReminderState, reason: Option<Reason>) -> Settled {
        Settled { token: self.reminder.token, claimed: self.reminder.claimed, state, reason }
    }
}

/// What the fallback is told of what this contact was not.
///
/// # Errors
/// When the store fails.
pub async fn escalations<S: Store>(
    store: &S,
    groups: &[Group],
    fallback: ContactId,
    contact: ContactId,
    unsaid: &[Carried],
    why: Reason,
    address_at_fault: bool,
) -> Result<Vec<NewReminder>> {
    let mut escalated = Vec::new();
    if fallback == contact {
        if !unsaid.is_empty() {
            tracing::error!(%contact, "the fallback itself could not be told");
        }
        return Ok(escalated);
    }
    let mut owners: Vec<OwnerId> = unsaid.iter().filter_map(|unsaid| unsaid.owner).collect();
    owners.sort_unstable();
    owners.dedup();
    let (mut reachable, mut watchers, mut traits) = (HashMap::new(), HashMap::new(), HashMap::new());
    if address_at_fault {
        let tokens: Vec<TokenId> = unsaid.iter().map(|unsaid| unsaid.reminder.token).collect();
        reachable = store.reachable(&owners).await?;
        watchers = store.watchers(&tokens).await?;
        if groups.iter().any(|group| !group.contacts.is_empty()) {
            traits = store.traits(&tokens).await?;
        }
    }
    // What was to correct something said to this contact says nothing to anybody else.
    for unsaid in unsaid.iter().filter(|unsaid| !unsaid.reminder.claimed.lead.corrects()) {
        let speakers = unsaid.owner.and_then(|owner| reachable.get(&owner)).into_iter().flatten();
        let watching = watchers.get(&unsaid.reminder.token).into_iter().flatten();
        let group = traits.get(&unsaid.reminder.token).and_then(|traits| group_of(groups, traits));
        let named = group.into_iter().flat_map(|(_, group)| group.contacts.iter().map(|(contact, _)| contact));
        let contacts = speakers.chain(watching).chain(named);
        let others: Vec<ContactId> = contacts.copied().filter(|other| *other != contact).collect();
        if others.is_empty() || !store.is_told(&unsaid.reminder, &others).await? {
            escalated.push(unsaid.reminder.escalated(fallback, Some(why)));
        }
    }
    Ok(escalated)
}
