//! The gate: whether a secret is honoured now.
//!
//! It compares with the clock at every call, whether or not a daemon runs. The answer needs one read of one bucket; that a
//! token was used is recorded at most once a minute, and a store that cannot record it does not hold up the answer.

use std::time::Duration;

use chrono::TimeDelta;

use crate::clock::{Clock, Timestamp};
use crate::policy::{Deadline, Usage};
use crate::store::{Result, Store};
use crate::token::{NotValid, Secret, Token};

/// A use is recorded at most this often.
const RECORD_EVERY: TimeDelta = TimeDelta::minutes(1);

/// How long recording a use may hold up the answer.
const RECORD_WITHIN: Duration = Duration::from_millis(250);

/// What a secret is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verified {
    /// The token is valid at this instant.
    Valid(Token, Timestamp),
    /// The token has ended, and why.
    Ended(Token, NotValid),
    /// No token has this secret.
    Unknown,
}

/// Whether a token with this secret is valid now.
///
/// # Errors
/// When the store cannot be read.
pub async fn verify<S: Store>(store: &S, clock: &impl Clock, secret: &Secret) -> Result<Verified> {
    let Some(token) = store.token_by_secret(secret.bucket(), &secret.hash()).await? else {
        return Ok(Verified::Unknown);
    };
    let now = clock.now();
    if let Err(why) = token.validity(now) {
        return Ok(Verified::Ended(token, why));
    }
    let recently = now - RECORD_EVERY;
    if token.last_used_at.is_none_or(|used| used < recently) {
        let wakes = Usage::of(&token).wakes(Deadline::of(&token), now);
        // The use stands all the same when it cannot be recorded.
        match tokio::time::timeout(RECORD_WITHIN, store.record_use(token.id, now, recently, wakes)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(token = %token.id, %error, "the use was not recorded"),
            Err(_) => tracing::debug!(token = %token.id, "the use was not recorded: the store is busy"),
        }
    }
    Ok(Verified::Valid(token, now))
}
