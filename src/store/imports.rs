//! Imports: tokens that live elsewhere and are only watched here.
//!
//! A list is imported in batches, each one transaction of a handful of statements. Importing a row again changes nothing,
//! so a run that was interrupted is simply repeated. Every row that a run has seen bears the run's id: that is how a row
//! that stands twice in a list is found, and what a complete list no longer has, without remembering the list.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::future::Future;

use chrono::{NaiveTime, TimeDelta};
use chrono_tz::Tz;
use uuid::Uuid;

use super::Result;
use crate::change::{Watched, import_again, import_new};
use crate::clock::Timestamp;
use crate::expires::Expires;
use crate::token::{Address, Bucket, Owner, OwnerId, Token, TokenId};

/// By how much the clock of whoever wrote a list may be ahead of this one, or its time zone.
const AHEAD: TimeDelta = TimeDelta::days(1);

/// A row of a list.
#[derive(Clone, Debug)]
pub struct ImportRow {
    /// The owner's key; the owner is made where it does not exist.
    pub owner_key: String,
    /// The zone of an owner that is new.
    pub time_zone: Option<Tz>,
    /// Who speaks for the owner, besides those who do already.
    pub addresses: Vec<Address>,
    /// Who watches the token, besides those who do already.
    pub watchers: Vec<Address>,
    /// The token's name where it lives.
    pub external_id: String,
    /// What it is for.
    pub description: String,
    /// When it was made.
    pub created_at: Option<Timestamp>,
    /// Its deadline; a bare date ends in the owner's zone.
    pub expires: Expires,
    /// When it was last used.
    pub last_used_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}

/// One run of an import.
#[derive(Clone, Debug)]
pub struct ImportRun {
    /// Names the run.
    pub id: Uuid,
    /// Where the list comes from.
    pub source: String,
    /// When it runs.
    pub now: Timestamp,
    /// A token that ended before this is not added: `purge` would remove it again.
    pub ended_before: Timestamp,
}

/// What became of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowOutcome {
    /// The token is new.
    Added,
    /// The token was there, and something about it has changed.
    Updated,
    /// The token was there just so.
    Unchanged,
    /// The token is not here, and ended too long ago to be kept.
    LongEnded,
    /// The row was left out; why, for people.
    Refused(String),
}

/// How many active tokens of a source there are, and how many of them a run did not see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unseen {
    /// Active tokens of the source.
    pub active: u64,
    /// Those that the run did not see.
    pub unseen: u64,
}

/// Where a whole list comes from, batch by batch.
pub trait Feed: Send {
    /// The next rows; `None` at the end of the list.
    fn next(&mut self) -> impl Future<Output = Option<Vec<ImportRow>>> + Send;

    /// What became of the rows that were given last.
    fn answer(&mut self, outcomes: Vec<RowOutcome>);

    /// Whether every row so far was good.
    fn is_clean(&self) -> bool;
}

/// Importing lists.
pub trait Imports {
    /// Imports a batch in one transaction. The answers stand in the order of the rows.
    ///
    /// # Errors
    /// When the store fails, with nothing of the batch written.
    fn import(&self, run: &ImportRun, rows: &[ImportRow]) -> impl Future<Output = Result<Vec<RowOutcome>>> + Send;

    /// Imports a whole list in one transaction: all of it, or, where a row is bad, nothing. Returns whether it was
    /// imported.
    ///
    /// # Errors
    /// When the store fails, with nothing written.
    fn import_strictly(&self, run: &ImportRun, feed: &mut impl Feed) -> impl Future<Output = Result<bool>> + Send;

    /// How many owners that a run saw active tokens of have no contact. Looks at every owner: not for the hot path.
    ///
    /// # Errors
    /// When the store fails.
    fn owners_without_contact(&self, run: &ImportRun) -> impl Future<Output = Result<u64>> + Send;

    /// What a run that has come to its end did not see.
    ///
    /// # Errors
    /// When the store fails.
    fn unseen(&self, run: &ImportRun) -> impl Future<Output = Result<Unseen>> + Send;

    /// Ends the active tokens of a bucket that a run did not see, and returns how many. Those whose deadline has passed
    /// are left to `expire`, which tells their owners.
    ///
    /// # Errors
    /// When the store fails, with nothing of the bucket changed.
    fn end_unseen(&self, run: &ImportRun, bucket: Bucket) -> impl Future<Output = Result<u64>> + Send;
}

/// A token as the store has it, and what imports remember of it.
pub(super) struct Known {
    pub(super) token: Token,
    pub(super) run: Option<Uuid>,
}

/// What a batch writes.
#[derive(Default)]
pub(super) struct Merged {
    /// Tokens to insert.
    pub(super) new: Vec<Token>,
    /// Tokens to update: as they were read, and as they will be.
    pub(super) seen: Vec<(Token, Token)>,
    /// What became of each row.
    pub(super) outcomes: Vec<RowOutcome>,
    /// Which row each updated token comes from.
    pub(super) rows_of_seen: Vec<usize>,
}

/// Of a row that names a token which ended too long ago to be kept, unless it is here: its bucket, owner's key and
/// external id.
pub(super) fn long_ended<'a>(run: &ImportRun, row: &'a ImportRow) -> Option<(i16, &'a str, &'a str)> {
    let ended_at = row.revoked_at.or(match row.expires {
        Expires::At(deadline) => Some(deadline),
        // The day ends later than it begins in UTC, in every zone: what is left out today is not added tomorrow.
        Expires::EndOf(date) => Some(date.and_time(NaiveTime::MIN).and_utc()),
        Expires::Never | Expires::In(_) => None,
    });
    let (key, id) = (row.owner_key.as_str(), row.external_id.as_str());
    // Before 1970 nothing ended: that is a mistake, which is told as one.
    let long_ago = (Timestamp::UNIX_EPOCH..run.ended_before).contains(&ended_at?);
    long_ago.then(|| (Bucket::of(key).column(), key, id))
}

/// Parts a batch into the rows to import and, for each row, whether it is one of them. Nothing comes of a row whose token
/// ended too long ago and is not among `here` (owner's key and external id): neither an owner nor a contact.
pub(super) fn part<'a>(
    run: &ImportRun,
    rows: &'a [ImportRow],
    here: &HashSet<(String, String)>,
) -> (Vec<&'a ImportRow>, Vec<bool>) {
    let taken = |row: &ImportRow| match long_ended(run, row) {
        Some((_, key, id)) => here.contains(&(key.to_owned(), id.to_owned())),
        None => true,
    };
    let taken: Vec<bool> = rows.iter().map(taken).collect();
    (rows.iter().zip(&taken).filter(|(_, taken)| **taken).map(|(row, _)| row).collect(), taken)
}

/// The owners that a batch names, each once and in the order of the store.
pub(super) fn owners_of(rows: &[&ImportRow], now: Timestamp) -> Vec<Owner> {
    let mut zones: BTreeMap<&str, Option<Tz>> = BTreeMap::new();
    for row in rows {
        let zone = zones.entry(&row.owner_key).or_default();
        *zone = zone.or(row.time_zone);
    }
    let owner = |(key, zone): (&str, Option<Tz>)| Owner {
        id: OwnerId::new(Bucket::of(key), now),
        key: key.to_owned(),
        name: key.to_owned(),
        time_zone: zone.unwrap_or(Tz::UTC),
        locale: "en".to_owned(),
    };
    let mut owners: Vec<Owner> = zones.into_iter().map(owner).collect();
    owners.sort_by(|a, b| (a.id.bucket(), &a.key).cmp(&(b.id.bucket(), &b.key)));
    owners
}

/// The addresses that a batch names, each once and in the order of the store.
pub(super) fn addresses_of<'a>(rows: &[&'a ImportRow]) -> Vec<&'a Address> {
    let unique: BTreeSet<(Bucket, &Address)> = rows
        .iter()
        .flat_map(|row| row.addresses.iter().chain(&row.watchers))
        .map(|address| (address.bucket(), address))
        .collect();
    unique.into_iter().map(|(_, address)| address).collect()
}

/// The rows of a batch that name somebody who watches their token, but for those that are refused.
pub(super) fn with_watchers<'a>(rows: &[&'a ImportRow], outcomes: &[RowOutcome]) -> Vec<&'a ImportRow> {
    let refused = |outcome: &RowOutcome| matches!(outcome, RowOutcome::Refused(_));
    let rows = rows.iter().zip(outcomes).filter(|(row, outcome)| !row.watchers.is_empty() && !refused(outcome));
    rows.map(|(row, _)| *row).collect()
}

/// Who watches each token of these rows: its id, and the address.
pub(super) fn watching<'a>(
    rows: &[&'a ImportRow],
    owners: &HashMap<String, Owner>,
    known: &HashMap<(OwnerId, String), Known>,
) -> BTreeSet<(TokenId, &'a Address)> {
    let token = |row: &ImportRow| {
        let owner = owners.get(&row.owner_key)?;
        known.get(&(owner.id, row.external_id.clone())).map(|known| known.token.id)
    };
    let of_row = |row: &'a ImportRow| token(row).map(|token| row.watchers.iter().map(move |address| (token, address)));
    rows.iter().filter_map(|row| of_row(row)).flatten().collect()
}

/// Decides what becomes of each row of a batch.
pub(super) fn merge(
    run: &ImportRun,
    rows: &[&ImportRow],
    owners: &HashMap<String, Owner>,
    known: &HashMap<(OwnerId, String), Known>,
) -> Merged {
    let mut merged = Merged::default();
    let mut in_batch: BTreeSet<(&str, &str)> = BTreeSet::new();
    for (i, row) in rows.iter().enumerate() {
        let outcome = match owners.get(&row.owner_key) {
            None => RowOutcome::Refused(format!("owner {:?} could not be made", row.owner_key)),
            Some(_) if !in_batch.insert((&row.owner_key, &row.external_id)) => twice(row),
            Some(owner) => match watched(row, owner, run.now) {
                Err(problem) => RowOutcome::Refused(problem),
                Ok(watched) => {
                    let known = known.get(&(owner.id, row.external_id.clone()));
                    merge_one(run, row, owner, &watched, known, i, &mut merged)
                }
            },
        };
        merged.outcomes.push(outcome);
    }
    merged
}

fn merge_one(
    run: &ImportRun,
    row: &ImportRow,
    owner: &Owner,
    watched: &Watched,
    known: Option<&Known>,
    at: usize,
    merged: &mut Merged,
) -> RowOutcome {
    let Some(known) = known else {
        merged.new.push(import_new(owner, &run.source, &row.external_id, watched, run.now));
        return RowOutcome::Added;
    };
    if known.run == Some(run.id) {
        return twice(row);
    }
    if let Some(other) = known.token.source.as_deref().filter(|source| *source != run.source) {
        return RowOutcome::Refused(format!(
            "external id {:?} of owner {:?} is watched already, from the source {other:?}",
            row.external_id, row.owner_key
        ));
    }
    let token = import_again(&known.token, watched, run.now);
    let outcome = if token == known.token { RowOutcome::Unchanged } else { RowOutcome::Updated };
    merged.seen.push((known.token.clone(), token));
    merged.rows_of_seen.push(at);
    outcome
}

fn twice(row: &ImportRow) -> RowOutcome {
    RowOutcome::Refused(format!(
        "external id {:?} of owner {:?} stands in the list twice; the first row counts",
        row.external_id, row.owner_key
    ))
}

fn watched(row: &ImportRow, owner: &Owner, now: Timestamp) -> std::result::Result<Watched, String> {
    let expires_at = row.expires.instant(now, owner.time_zone).map_err(|problem| format!("expires_at: {problem}"))?;
    let past = |column: &str, instant: Option<Timestamp>| match instant {
        Some(instant) if instant > now + AHEAD => Err(format!("{column}: {} lies in the future", instant.date_naive())),
        instant => Ok(instant),
    };
    let created_at = past("created_at", row.created_at)?;
    Ok(Watched {
        description: row.description.clone(),
        // Nothing is made after its end: then nobody knows when it was.
        created_at: created_at.filter(|created_at| expires_at.is_none_or(|expires_at| *created_at < expires_at)),
        expires_at,
        last_used_at: past("last_used_at", row.last_used_at)?,
        revoked_at: past("revoked_at", row.revoked_at)?,
    })
}

impl Merged {
    /// What became of each row of a batch, given which of them were `taken`. What was read may have changed before it could
    /// be written: says so of the rows whose tokens are not among `written`.
    pub(super) fn outcomes(mut self, written: &BTreeSet<Uuid>, taken: &[bool]) -> Vec<RowOutcome> {
        for (at, (token, _)) in self.rows_of_seen.iter().zip(&self.seen) {
            if !written.contains(&token.id.uuid())
                && let Some(outcome) = self.outcomes.get_mut(*at)
            {
                let problem = "somebody changed the token at the same moment; import the list again";
                *outcome = RowOutcome::Refused(problem.to_owned());
            }
        }
        let mut outcomes = self.outcomes.into_iter();
        taken.iter().filter_map(|taken| if *taken { outcomes.next() } else { Some(RowOutcome::LongEnded) }).collect()
    }
}
