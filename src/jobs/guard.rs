//! Guards: how much may happen in an hour before somebody should look at it first.
//!
//! A wrong import must not mail a company, and a wrong clock must not expire everybody. What would be opened beyond the
//! limit is held, until an operator releases or cancels it; tokens beyond theirs are marked expired an hour's share at a
//! time (they are refused at their deadline all the same). What happened is counted in the store, by the minute, so that
//! passes, processes and restarts make no difference. The jobs `expire` and `remind` may each be at it at the same moment,
//! so that one step more than the limit may be opened.

use std::sync::{Arc, Mutex, PoisonError};

use chrono::TimeDelta;

use super::Rules;
use crate::clock::Timestamp;
use crate::config::Limit;
use crate::store::outbox::MessageKind;
use crate::store::planning::Written;
use crate::store::{Result, Store};

/// The span over which a guard counts.
pub const SPAN: TimeDelta = TimeDelta::hours(1);

/// Where no number is configured: this many, or a tenth of what there is, whichever is more.
pub const LEAST: u64 = 10_000;

/// For how long the number of contacts and tokens is taken to be what it was.
const COUNTED_FOR: TimeDelta = TimeDelta::hours(1);

/// A held message that comes so near its token's deadline is told of again.
pub(super) const URGENT: TimeDelta = TimeDelta::days(1);

/// The least time between two mails about what a guard holds, while there is more and more of it.
pub(super) const TOLD_EVERY: TimeDelta = TimeDelta::hours(1);

/// Both guards. Clones share what was counted.
#[derive(Clone, Debug)]
pub struct Guard {
    messages: Limit,
    expired: Limit,
    contacts: Total,
    tokens: Total,
}

/// How many there were, and when that was counted.
type Total = Arc<Mutex<Option<(Timestamp, u64)>>>;

impl Guard {
    /// A guard with these limits.
    pub fn new(messages: Limit, expired: Limit) -> Self {
        Self { messages, expired, contacts: Total::default(), tokens: Total::default() }
    }

    /// How many messages may be opened now; `None`: any number.
    pub(super) async fn may_open<S: Store>(&self, store: &S, wanted: usize, now: Timestamp) -> Result<Option<u64>> {
        let used = match self.messages {
            Limit::None => return Ok(None),
            Limit::PerHour(_) | Limit::Auto => store.counted(now - SPAN, now).await?.messages,
        };
        let count = store.contact_count();
        left(self.messages, used, wanted, &self.contacts, now, count).await.map(Some)
    }

    /// How many tokens may be marked expired now; `None`: any number.
    pub(super) async fn may_expire<S: Store>(&self, store: &S, wanted: usize, now: Timestamp) -> Result<Option<u64>> {
        let used = match self.expired {
            Limit::None => return Ok(None),
            Limit::PerHour(_) | Limit::Auto => store.counted(now - SPAN, now).await?.expired,
        };
        let count = async {
            let counts = store.token_counts(now).await?;
            // A tenth of what there was before the hour began.
            Ok(counts.active + counts.past_deadline + used)
        };
        left(self.expired, used, wanted, &self.tokens, now, count).await.map(Some)
    }
}

/// What is left of a limit. A tenth of what there is is only counted where it matters.
async fn left(
    limit: Limit,
    used: u64,
    wanted: usize,
    total: &Total,
    now: Timestamp,
    count: impl Future<Output = Result<u64>>,
) -> Result<u64> {
    let least = match limit {
        Limit::None => return Ok(u64::MAX),
        Limit::PerHour(most) => return Ok(most.saturating_sub(used)),
        Limit::Auto => LEAST.saturating_sub(used),
    };
    if least >= wanted as u64 {
        return Ok(least);
    }
    let known = *total.lock().unwrap_or_else(PoisonError::into_inner);
    let all = match known.filter(|(at, _)| *at <= now && now - *at < COUNTED_FOR) {
        Some((_, all)) => all,
        None => {
            let all = count.await?;
            *total.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, all));
            all
        }
    };
    Ok(LEAST.max(all / 10).saturating_sub(used))
}

/// Tells the fallback of what is held: when something is, again where more has come, once an hour at most, and when it comes
/// near a deadline. Where nothing is held this is one probe of an index. Returns whether something is held.
///
/// # Errors
/// When the store fails.
pub async fn watch<S: Store>(store: &S, rules: &Rules, now: Timestamp) -> Result<bool> {
    let Some(held) = store.held(now).await? else { return Ok(false) };
    let urgent = held.next_deadline.is_some_and(|deadline| deadline - now <= URGENT);
    if let Some(fallback) = rules.fallback {
        if store.alert(fallback, MessageKind::Held, held.since.max(held.latest - TOLD_EVERY), now).await? {
            tracing::error!(
                messages = held.messages,
                "a guard holds messages back: see `lapsed outbox list --state held`"
            );
        }
        if urgent && store.alert(fallback, MessageKind::HeldUrgent, now - URGENT, now).await? {
            tracing::error!(messages = held.messages, "messages that a guard holds back come near a deadline");
        }
    } else if urgent {
        tracing::error!(
            messages = held.messages,
            "messages that a guard holds back come near a deadline, and mail.fallback_to is not set"
        );
    }
    Ok(true)
}

/// Tells the fallback that tokens past their deadline wait to be marked, once a day.
///
/// # Errors
/// When the store fails.
pub async fn expiry_waits<S: Store>(store: &S, rules: &Rules, now: Timestamp) -> Result<()> {
    if let Some(fallback) = rules.fallback {
        store.alert(fallback, MessageKind::Expiry, now - TimeDelta::days(1), now).await?;
    }
    Ok(())
}

/// Tells the log what a step kept back.
pub(super) fn report(written: &Written) {
    if written.held > 0 {
        tracing::warn!(messages = written.held, "more messages than the guard allows in an hour: they are held");
    }
}
