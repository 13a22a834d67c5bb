//! `lapsed token verify`: the gate itself. It compares with the clock at every call, whether or not a daemon runs.

use std::io::IsTerminal;
use std::time::Duration;

use chrono::TimeDelta;
use tokio::io::AsyncReadExt;

use super::{Failure, Outcome, lookup, output};
use crate::clock::Clock;
use crate::store::Store;
use crate::token::{NotValid, Secret};

/// A use is recorded at most this often.
const RECORD_EVERY: TimeDelta = TimeDelta::minutes(1);

/// How long recording a use may hold up the answer.
const RECORD_WITHIN: Duration = Duration::from_millis(250);

/// More than any secret has.
const MAX_INPUT: u64 = 4096;

pub(super) async fn run<S: Store>(store: &S, clock: &impl Clock) -> Outcome {
    if std::io::stdin().is_terminal() {
        output::say("Type or paste the secret, then Enter and Ctrl-D:");
    }
    let mut input = Vec::new();
    tokio::io::stdin().take(MAX_INPUT).read_to_end(&mut input).await?;
    let input = String::from_utf8_lossy(&input);
    let Ok(secret) = Secret::parse(input.trim()) else {
        return refused(NotValid::Unknown, "no token has this secret; it is mistyped or not a secret of lapsed");
    };
    let Some(token) = store.token_by_secret(secret.bucket(), &secret.hash()).await? else {
        return refused(NotValid::Unknown, "no token has this secret");
    };
    let now = clock.now();
    let owner = lookup::owner_of(store, &token).await?;
    if let Err(why) = token.validity(now) {
        let at = match why {
            NotValid::Expired => token.expires_at,
            _ => token.ended_at,
        };
        let since = at.map(|at| output::instant(at, owner.time_zone)).unwrap_or_default();
        return refused(why, &format!("token {} of {}, since {since}", token.id, owner.key));
    }
    let recently = now - RECORD_EVERY;
    if token.last_used_at.is_none_or(|used| used < recently) {
        // The use stands all the same when it cannot be recorded.
        match tokio::time::timeout(RECORD_WITHIN, store.record_use(token.id, now, recently)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(token = %token.id, %error, "the use was not recorded"),
            Err(_) => tracing::debug!(token = %token.id, "the use was not recorded: the store is busy"),
        }
    }
    let mut rows = vec![("valid", "yes".to_owned())];
    rows.extend(output::token(&token, &owner, now));
    output::print(&output::facts(&rows))?;
    Ok(())
}

fn refused(why: NotValid, detail: &str) -> Outcome {
    output::print(&output::facts(&[
        ("valid", "no".to_owned()),
        ("reason", why.to_string()),
        ("detail", detail.into()),
    ]))?;
    Err(Failure::NotValid)
}
