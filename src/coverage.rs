//! Whether owners knew in time: of each token that expired, whether somebody was told early enough, and if not, why.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use chrono::TimeDelta;

use crate::clock::Timestamp;
use crate::digest::Digest;
use crate::policies::{Group, Traits, group_of};
use crate::policy::{Deadline, Lead, Policy, SAME_DEADLINE};
use crate::store::accounts::ReminderState;
use crate::store::reports::LedgerRow;
use crate::store::{Result, Store};
use crate::token::{Token, TokenId};

/// How it went with one token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A mail server took a reminder for its owner at least the shortest lead before the deadline.
    Covered,
    /// It lived so briefly that no reminder was owed.
    NotOwed,
    /// Its owner did not know in time; why.
    Silent(String),
}

/// By when owners must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InTime {
    /// The shortest lead.
    pub shortest: Lead,
    /// How long a mail about it waits at most.
    pub wait: TimeDelta,
}

impl InTime {
    fn by(policy: &Policy, digest: &Digest) -> Self {
        let shortest = policy.leads().last().copied().unwrap_or(Lead::EXPIRED);
        Self { shortest, wait: digest.longest_wait(shortest) }
    }
}

/// By when the owner of each token must know: by the policy that the token follows.
#[derive(Clone, Debug)]
pub struct Terms {
    all: InTime,
    groups: Arc<[Group]>,
}

impl Terms {
    /// By the policy for all tokens, and those for some.
    pub fn new(policy: &Policy, digest: &Digest, groups: Arc<[Group]>) -> Self {
        Self { all: InTime::by(policy, digest), groups }
    }

    fn of(&self, token: &Token, owner_key: &str) -> InTime {
        if self.groups.is_empty() {
            return self.all;
        }
        let group = group_of(&self.groups, &Traits::of(token, owner_key));
        group.map_or(self.all, |(_, group)| InTime::by(&group.policy, &group.digest))
    }
}

/// Hands each token whose deadline lies after `from` and not after `end`, and has passed, to `visit`, in no order, with the key of
/// its owner and how it went. Memory grows with what the ledger has of deadlines within that time, so let it be short.
///
/// # Errors
/// When the store fails.
pub async fn within<S: Store>(
    store: &S,
    terms: &Terms,
    from: Timestamp,
    end: Timestamp,
    mut visit: impl FnMut(Token, String, Verdict) + Send,
) -> Result<()> {
    let mut ledger = Ledger::default();
    let read = |row| {
        ledger.add(row);
        ControlFlow::Continue(())
    };
    // A deadline may have moved a little since its reminders were written.
    store.each_ledger_row(from - SAME_DEADLINE, end + SAME_DEADLINE, read).await?;
    let visit = |token: Token, owner_key: String| {
        let verdict = ledger.verdict(&token, terms.of(&token, &owner_key));
        visit(token, owner_key, verdict);
    };
    store.each_expired(from, end, visit).await
}

/// What the ledger says of deadlines, by token and generation.
#[derive(Debug, Default)]
pub struct Ledger(HashMap<(TokenId, i32), Vec<LedgerRow>>);

impl Ledger {
    /// Takes a row. Expired notices and word of a change say nothing about who knew in time, and neither does what the fallback was told.
    pub fn add(&mut self, row: LedgerRow) {
        if row.lead.is_time() && !row.escalation {
            self.0.entry((row.token, row.generation)).or_default().push(row);
        }
    }

    /// How it went with a token whose deadline has passed.
    pub fn verdict(&self, token: &Token, InTime { shortest, wait }: InTime) -> Verdict {
        let Some(deadline) = Deadline::of(token) else { return Verdict::NotOwed };
        let rows = self.0.get(&(token.id, token.generation)).map_or(&[][..], Vec::as_slice);
        let told = || rows.iter().filter(|row| row.state == ReminderState::Sent).filter_map(|row| row.settled_at);
        let in_time = shortest.due_at(deadline.expires_at);
        // A reminder leaves when it is due, and a moment later it is told: that is in time.
        let latest = in_time + wait + TimeDelta::minutes(5);
        if told().any(|at| at <= latest) {
            return Verdict::Covered;
        }
        if !deadline.owes(shortest) {
            return Verdict::NotOwed;
        }
        let why = |state: ReminderState| rows.iter().find(|row| row.state == state);
        Verdict::Silent(if let Some(at) = told().min() {
            let minutes = (deadline.expires_at - at).num_minutes();
            match minutes {
                m if m >= 120 => format!("a mail server took the first reminder {} h before the deadline", m / 60),
                m if m >= 0 => format!("a mail server took the first reminder {m} min before the deadline"),
                _ => "a mail server took the first reminder after the deadline".to_owned(),
            }
        } else if let Some(row) = why(ReminderState::Unreachable).or_else(|| why(ReminderState::Failed)) {
            row.reason.clone().unwrap_or_else(|| "nobody could be told".to_owned())
        } else if why(ReminderState::Pending).is_some() {
            "its mail was not sent in time, and still waits".to_owned()
        } else if let Some(row) = rows.first() {
            row.reason.clone().unwrap_or_else(|| format!("its reminder was {}", row.state))
        } else {
            "no reminder was written in time: was the daemon down, or the token new to it?".to_owned()
        })
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::*;
    use crate::clock::Timestamp;
    use crate::token::{Bucket, Kind, OwnerId};

    fn at(hours: i64) -> Timestamp {
        DateTime::from_timestamp(1_800_000_000, 0).expect("in range") + TimeDelta::hours(hours)
    }

    /// Its deadline is 100 days after it was made, at hour 0.
    fn token(lifetime: i64) -> Token {
        let owner = OwnerId::new(Bucket::from_number(1), at(0));
        let mut token = Token::new(owner, Kind::Additional, "x", at(-lifetime));
        token.expires_at = Some(at(0));
        token
    }

    fn row(token: &Token, lead_hours: i64, state: ReminderState, settled: i64) -> LedgerRow {
        LedgerRow {
            token: token.id,
            generation: token.generation,
            lead: Lead::new(TimeDelta::hours(lead_hours)),
            state,
            reason: None,
            escalation: false,
            settled_at: Some(at(settled)),
        }
    }

    #[test]
    fn somebody_knew_in_time_or_there_is_a_reason() {
        use ReminderState::{Failed, Pending, Sent};
        let token = token(2_400);
        let day = Lead::new(TimeDelta::hours(24));
        let verdict = |rows: Vec<LedgerRow>| {
            let mut ledger = Ledger::default();
            rows.into_iter().for_each(|row| ledger.add(row));
            ledger.verdict(&token, InTime { shortest: day, wait: TimeDelta::minutes(10) })
        };
        let silent = |why: &str| Verdict::Silent(why.to_owned());
        assert_eq!(verdict(vec![row(&token, 168, Sent, -167)]), Verdict::Covered);
        assert_eq!(verdict(vec![row(&token, 24, Sent, -24)]), Verdict::Covered);
        let late = "a mail server took the first reminder 23 h before the deadline";
        assert_eq!(verdict(vec![row(&token, 24, Sent, -23)]), silent(late));
        let refused = LedgerRow { reason: Some("the contact is suppressed".into()), ..row(&token, 24, Failed, -24) };
        assert_eq!(verdict(vec![refused.clone()]), silent("the contact is suppressed"));
        assert_eq!(
            verdict(vec![row(&token, 24, Pending, 0)]),
            silent("its mail was not sent in time, and still waits")
        );
        // What the fallback was told, and the expired notice, are not what the owner knew.
        let escalated = LedgerRow { escalation: true, ..row(&token, 24, Sent, -24) };
        assert_eq!(verdict(vec![escalated, refused]), silent("the contact is suppressed"));
        let notice = LedgerRow { lead: Lead::EXPIRED, ..row(&token, 24, Sent, -24) };
        assert!(matches!(verdict(vec![notice]), Verdict::Silent(why) if why.starts_with("no reminder was written")));
        let other = LedgerRow { generation: 7, ..row(&token, 24, Sent, -24) };
        assert!(matches!(verdict(vec![other]), Verdict::Silent(_)), "another deadline's");
    }

    #[test]
    fn a_brief_life_owes_nothing() {
        let ledger = Ledger::default();
        let in_time = InTime { shortest: Lead::new(TimeDelta::hours(24)), wait: TimeDelta::zero() };
        assert_eq!(ledger.verdict(&token(29), in_time), Verdict::NotOwed);
        assert!(matches!(ledger.verdict(&token(30), in_time), Verdict::Silent(_)));
    }
}
