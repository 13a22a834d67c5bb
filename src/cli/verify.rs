//! `lapsed token verify`

use std::io::IsTerminal;

use tokio::io::AsyncReadExt;

use super::{Failure, Outcome, lookup, output};
use crate::clock::Clock;
use crate::store::Store;
use crate::token::{NotValid, Secret};
use crate::verify::{Verified, verify};

/// More than any secret has.
const MAX_INPUT: u64 = 4096;

pub(super) async fn run<S: Store>(store: &S, clock: &impl Clock) -> Outcome {
    if std::io::stdin().is_terminal() {
        output::say("Type or paste the secret, then Enter and Ctrl-D:");
    }
    let mut input = Vec::new();
    tokio::io::stdin().take(MAX_INPUT).read_to_end(&mut input).await?;
    let input = String::from_utf8_lossy(&input);
    if input.trim().is_empty() {
        return refused(NotValid::Unknown, "nothing came on standard input, where the secret belongs");
    }
    let Ok(secret) = Secret::parse(input.trim()) else {
        return refused(NotValid::Unknown, "no token has this secret; it is mistyped or not a secret of lapsed");
    };
    // What is printed holds for the instant of the answer: the deadline may pass before the line is out.
    let (token, at) = match verify(store, clock, &secret).await? {
        Verified::Valid(token, at) => (token, at),
        Verified::Ended(token, why) => {
            let owner = lookup::owner_of(store, &token).await?;
            let at = match why {
                NotValid::Expired => token.expires_at,
                _ => token.ended_at,
            };
            let since = at.map(|at| output::instant(at, owner.time_zone)).unwrap_or_default();
            return refused(why, &format!("token {} of {}, since {since}", token.id, owner.key));
        }
        Verified::Unknown => return refused(NotValid::Unknown, "no token has this secret"),
    };
    let owner = lookup::owner_of(store, &token).await?;
    let mut rows = vec![("valid", "yes".to_owned())];
    rows.extend(output::token(&token, &owner, at));
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
