//! The part of `remind` that corrects what was said: of marked tokens, it finds who was told of a deadline that no longer holds,
//! and writes that they are to be told so.
//!
//! Such word is in no hurry, and nobody wants a mail for its sake: it joins the next mail to its contact, and goes alone only
//! where the alarm in a calendar would come before one does.

use std::collections::HashMap;

use uuid::Uuid;

use super::{Lease, Outcome, Result, Rules, Store, Timestamp, Written, guard};
use crate::correction::{Correction, correct};
use crate::digest::{Ahead, Waiting};
use crate::policy::Lead;
use crate::store::accounts::ReminderState;
use crate::store::corrections::Corrected;
use crate::store::planning::NewReminder;
use crate::token::{ContactId, Token, TokenId};

/// Deals with a page of marked tokens.
pub(super) async fn step<S: Store>(
    store: &S,
    lease: &Lease,
    rules: &Rules,
    now: Timestamp,
) -> Result<Outcome<Written>> {
    let page = store.uncorrected(Uuid::nil(), rules.batch).await?;
    let reminders = decide(store, rules, now, &page, &[]).await?;
    let may_open = match reminders.len() {
        0 => None,
        wanted => rules.guard.may_open(store, wanted, now).await?,
    };
    let written = store.correct(lease, Corrected { now, looked_at: &page, reminders, may_open }).await?;
    guard::report(&written);
    Ok(Outcome { did: written, more: true })
}

/// What is to be written about marked tokens. `newcomers` take mail, though the store does not have them yet.
pub(in crate::jobs) async fn decide<S: Store>(
    store: &S,
    rules: &Rules,
    now: Timestamp,
    page: &[Token],
    newcomers: &[ContactId],
) -> Result<Vec<NewReminder>> {
    let ids: Vec<TokenId> = page.iter().map(|token| token.id).collect();
    let traits = if rules.groups.is_empty() { HashMap::new() } else { store.traits(&ids).await? };
    let whose: Vec<_> = page.iter().map(|token| (token.owner, token.id)).collect();
    let recipients = rules.recipients(store, &whose, newcomers, now).await?;
    let mut asked = Vec::new();
    for token in page {
        let terms = rules.terms(traits.get(&token.id));
        asked.extend(recipients.of(token.owner, token.id, terms).into_iter().map(|(contact, _)| (contact, token.id)));
    }
    let told = store.told(&asked, now).await?;
    let mut reminders = Vec::new();
    for token in page {
        let terms = rules.terms(traits.get(&token.id));
        let owner_zone = recipients.zones.get(&token.owner).copied();
        for (contact, to) in recipients.of(token.owner, token.id, terms) {
            let known = told.get(&(contact, token.id)).map_or(&[][..], Vec::as_slice);
            let Some(correction) = correct(token, known, None, now) else { continue };
            let Correction { told, until, is_news, .. } = correction;
            let zone = to.time_zone.or(owner_zone).unwrap_or_default();
            let ahead = Some(Ahead { expires_at: told, until });
            let not_before = if is_news {
                terms.digest.goes_at(Waiting { now, ahead, zone, mailed_at: to.mailed_at })
            } else {
                terms.digest.goes_alone_at(now, until, zone)
            };
            reminders.push(row(token, contact, correction, not_before));
        }
    }
    Ok(reminders)
}

fn row(token: &Token, contact: ContactId, correction: Correction, not_before: Timestamp) -> NewReminder {
    let Correction { lead, told, .. } = correction;
    // What stands in the contact's calendar once it is sent; nothing does where the deadline is withdrawn.
    let stands = token.expires_at.filter(|_| lead == Lead::MOVED);
    NewReminder {
        token: token.id,
        generation: token.generation,
        lead,
        contact: Some(contact),
        expires_at: stands.unwrap_or(told),
        state: ReminderState::Pending,
        reason: None,
        escalation: false,
        not_before: Some(not_before),
    }
}
