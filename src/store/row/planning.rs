//! Rows that reminders are decided by: tokens with a deadline, and whom to tell of them.

use std::collections::HashMap;
use std::hash::Hash;

use uuid::Uuid;

use super::{At, OwnedRow, word};
use crate::clock::Timestamp;
use crate::forecast::Ahead;
use crate::policies::Traits;
use crate::policy::{Deadline, Usage};
use crate::store::planning::Candidate;
use crate::store::recipients::{Addressee, Facts};
use crate::store::{Error, Result};
use crate::token::{ContactId, Owner, Token, TokenId};

row! {
    /// A token that a contact is to be told of.
    pub(in crate::store) struct FactRow {
        ..owned: OwnedRow,
        contact_id: Uuid,
        speaks_for: bool,
        watches: bool,
        fallback: Option<Uuid>,
    }
}

/// Puts together what is true of tokens. One that cannot be read (its owner's zone is unknown, say) must not hold up the
/// others that a message speaks of.
pub(in crate::store) fn facts(rows: Vec<FactRow>) -> HashMap<ContactId, Facts> {
    let mut all: HashMap<ContactId, Facts> = HashMap::new();
    for row in rows {
        let facts = all.entry(row.contact_id.into()).or_default();
        facts.is_fallback = row.fallback == Some(row.contact_id);
        let id = TokenId::from(row.owned.token.id);
        if row.speaks_for || row.watches {
            facts.heard.insert(id);
        }
        match <(Token, Owner)>::try_from(row.owned) {
            Ok(found) => {
                facts.tokens.insert(id, found);
            }
            Err(error) => {
                tracing::error!(token = %id, %error, "cannot speak of a token that cannot be read");
                facts.broken.insert(id);
            }
        }
    }
    all
}

/// What planning knows of contacts that take mail: id, zone, and when they were last sent reminders. A zone that cannot
/// be read is told of when a message is claimed.
pub(in crate::store) fn addressees(rows: Vec<(Uuid, Option<String>, Option<At>)>) -> HashMap<ContactId, Addressee> {
    let addressee = |(id, zone, mailed_at): (Uuid, Option<String>, Option<At>)| {
        let time_zone = zone.and_then(|zone| zone.parse().ok());
        (id.into(), Addressee { time_zone, mailed_at: mailed_at.map(|at| at.0) })
    };
    rows.into_iter().map(addressee).collect()
}

/// Of contacts and when they were last sent reminders: those that were within a span of time, and the others. One that lies in the
/// future was sent by a wrong clock, and counts for nothing.
pub(in crate::store) fn mailed_since(
    rows: Vec<(Uuid, Option<At>)>,
    since: Timestamp,
    now: Timestamp,
) -> (HashMap<ContactId, Timestamp>, Vec<Uuid>) {
    let (mut before, mut free) = (HashMap::new(), Vec::new());
    for (id, mailed_at) in rows {
        match mailed_at.filter(|at| at.0 > since && at.0 <= now) {
            Some(at) => _ = before.insert(id.into(), at.0),
            None => free.push(id),
        }
    }
    (before, free)
}

/// Rows of two ids as lists.
pub(in crate::store) fn grouped<A: From<Uuid> + Eq + Hash>(rows: Vec<(Uuid, Uuid)>) -> HashMap<A, Vec<ContactId>> {
    let mut grouped: HashMap<A, Vec<ContactId>> = HashMap::new();
    for (of, contact) in rows {
        grouped.entry(of.into()).or_default().push(contact.into());
    }
    grouped
}

row! {
    pub(in crate::store) struct CandidateRow {
        id: Uuid,
        owner_id: Uuid,
        expires_at: At,
        moved_from: Option<At>,
        deadline_set_at: At,
        generation: i32,
        issued: bool,
        last_used_at: Option<At>,
        replaced_by: Option<Uuid>,
    }
}

/// The columns of a [`CandidateRow`].
macro_rules! candidate_columns {
    () => {
        "id, owner_id, expires_at, moved_from, deadline_set_at, generation, secret_hash IS NOT NULL AS issued, last_used_at, \
         replaced_by"
    };
}
pub(in crate::store) use candidate_columns;

impl TryFrom<CandidateRow> for Candidate {
    type Error = Error;

    fn try_from(row: CandidateRow) -> Result<Self> {
        Ok(Self {
            id: row.id.into(),
            owner: row.owner_id.into(),
            deadline: Deadline { expires_at: row.expires_at.0, set_at: row.deadline_set_at.0 },
            generation: row.generation,
            usage: Usage::new(row.issued, row.last_used_at.map(|at| at.0), row.replaced_by.map(Into::into)),
            moved_from: row.moved_from.map(|at| at.0),
            traits: None,
        })
    }
}

row! {
    /// A token and a contact that is told of it.
    pub(in crate::store) struct AheadRow {
        pub(in crate::store) id: Uuid,
        expires_at: At,
        deadline_set_at: At,
        generation: i32,
        issued: bool,
        last_used_at: Option<At>,
        replaced_by: Option<Uuid>,
        pub(in crate::store) speaker: Option<Uuid>,
        pub(in crate::store) watcher: Option<Uuid>,
    }
}

impl From<&AheadRow> for Ahead {
    fn from(row: &AheadRow) -> Self {
        Self {
            token: row.id.into(),
            generation: row.generation,
            deadline: Deadline { expires_at: row.expires_at.0, set_at: row.deadline_set_at.0 },
            usage: Usage::new(row.issued, row.last_used_at.map(|at| at.0), row.replaced_by.map(Into::into)),
        }
    }
}

row! {
    /// What policies match a token by.
    pub(in crate::store) struct TraitsRow {
        id: Uuid,
        kind: String,
        scopes: String,
        description: String,
        owner_key: String,
    }
}

impl TryFrom<TraitsRow> for (TokenId, Traits) {
    type Error = Error;

    fn try_from(row: TraitsRow) -> Result<Self> {
        let traits = Traits {
            kind: word("tokens", "kind", row.id, &row.kind)?,
            scopes: row.scopes.split_whitespace().map(str::to_owned).collect(),
            owner_key: row.owner_key,
            description: row.description,
        };
        Ok((row.id.into(), traits))
    }
}
