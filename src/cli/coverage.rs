//! `lapsed coverage`: did owners know in time?

use chrono::TimeDelta;
use clap::Args;

use super::listing::{Fields, FormatArg, Listing, instant};
use super::{Outcome, output, run};
use crate::clock::{Clock, Timestamp};
use crate::config::{Settings, parse_duration};
use crate::coverage::{self, Verdict};
use crate::store::Store;
use crate::token::Token;

/// `lapsed coverage`
#[derive(Debug, Args)]
pub struct Coverage {
    /// Over the tokens that expired within this time
    #[arg(long, value_name = "SPAN", default_value = "30d", value_parser = parse_duration)]
    since: TimeDelta,
    #[command(flatten)]
    format: FormatArg,
}

/// How much is read together: memory grows with it, and not with the time that is asked for.
const WINDOW: TimeDelta = TimeDelta::hours(12);

/// The names of [`fields`].
const FIELDS: [&str; 5] = ["id", "owner", "description", "expired_at", "why"];

impl Coverage {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock, settings: &Settings) -> Outcome {
        let now = clock.now();
        let since = now.checked_sub_signed(self.since).unwrap_or(Timestamp::UNIX_EPOCH);
        let terms = run::coverage(settings);
        let (mut covered, mut not_owed, mut silent) = (0_u64, 0_u64, 0_u64);
        let mut listing =
            Listing::new(self.format, &["TOKEN", "OWNER", "DESCRIPTION", "EXPIRED (UTC)", "WHY"], &FIELDS)?;
        let mut from = since;
        while from < now {
            let end = (from + WINDOW).min(now);
            let mut died = Vec::new();
            let visit = |token: Token, owner: String, verdict| match verdict {
                Verdict::Covered => covered += 1,
                Verdict::NotOwed => not_owed += 1,
                Verdict::Silent(why) => died.push((token, owner, why)),
            };
            coverage::within(store, &terms, from, end, visit).await?;
            died.sort_unstable_by(|(a, a_owner, _), (b, b_owner, _)| {
                (a.expires_at, a_owner, a.id).cmp(&(b.expires_at, b_owner, b.id))
            });
            silent += died.len() as u64;
            for (token, owner, why) in &died {
                listing.row(|| fields(token, owner, why), || cells(token, owner, why))?;
            }
            from = end;
        }
        let owed = covered + silent;
        let share = if owed == 0 { "no reminder was owed".to_owned() } else { percent(covered, owed) };
        let facts = output::facts(&[
            ("expired", format!("{} tokens", owed + not_owed)),
            ("told in time", format!("{covered} of {owed} that were owed a reminder: {share}")),
            ("not owed", format!("{not_owed} that lived too briefly for the shortest lead time")),
        ]);
        if self.format.is_table() {
            output::print(&facts)?;
            if silent > 0 {
                output::print("\n")?;
            }
        } else {
            output::say(facts.trim_end());
        }
        if silent > 0 || !self.format.is_table() {
            listing.end("")?;
        }
        Ok(())
    }
}

/// A share, rounded down: 100 % means all.
fn percent(part: u64, whole: u64) -> String {
    let tenths = u128::from(part) * 1_000 / u128::from(whole.max(1));
    format!("{}.{} %", tenths / 10, tenths % 10)
}

fn fields(token: &Token, owner: &str, why: &str) -> Fields {
    vec![
        ("id", token.id.to_string().into()),
        ("owner", owner.into()),
        ("description", token.description.clone().into()),
        ("expired_at", instant(token.expires_at)),
        ("why", why.into()),
    ]
}

fn cells(token: &Token, owner: &str, why: &str) -> Vec<String> {
    let expired = token.expires_at.map(|at| at.format("%Y-%m-%d %H:%M").to_string()).unwrap_or_default();
    vec![token.id.short(), owner.to_owned(), token.description.clone(), expired, why.to_owned()]
}
