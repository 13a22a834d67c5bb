//! What may be done to a token, and what becomes of it: edit, rotate, revoke.
//!
//! Pure functions from the token as it is to the token as it will be. The store locks the row, calls one of these, and
//! writes the result in the same transaction, so a change never acts on a row that somebody else has just changed.

use chrono::TimeDelta;

use crate::clock::Timestamp;
use crate::policy::{Deadline, is_another_deadline, must_be_planned};
use crate::token::{Kind, NEVER, Owner, Secret, Status, Token, TokenId};

/// What a change makes of a token.
#[derive(Clone, Debug)]
pub struct Changed {
    /// The token as it will be.
    pub token: Token,
    /// Its successor, where it was rotated.
    pub successor: Option<(Token, Secret)>,
}

/// Why a change is refused, with what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The token has expired.
    #[error("token {id} expired at {}; an ended token is not revived: rotate it to get a successor", .at.format("%Y-%m-%d %H:%M:%SZ"))]
    Expired {
        /// Which token.
        id: TokenId,
        /// Its deadline.
        at: Timestamp,
    },
    /// The token was revoked.
    #[error("token {0} was revoked; create a new one instead")]
    Revoked(TokenId),
    /// The token has a successor already.
    #[error("token {id} was replaced by {by}; use that one")]
    Replaced {
        /// Which token.
        id: TokenId,
        /// Its successor.
        by: TokenId,
    },
    /// A primary token is only ever replaced.
    #[error("token {0} is the owner's primary token, which is ended only by rotating it")]
    Primary(TokenId),
    /// A deadline that is not ahead.
    #[error("the deadline {} has passed; to end the token now, revoke it", .0.format("%Y-%m-%d %H:%M:%SZ"))]
    DeadlinePassed(Timestamp),
    /// An imported token has no secret to replace.
    #[error("token {0} was imported and is only watched: rotate it where it was issued")]
    Imported(TokenId),
}

/// What an edit changes; `None` leaves a value as it is.
#[derive(Clone, Debug, Default)]
pub struct Edit {
    /// The new description.
    pub description: Option<String>,
    /// The new deadline; `Some(None)`: never.
    pub expires_at: Option<Option<Timestamp>>,
    /// Whether somebody else than the owner moves it, and the owner is to be told.
    pub by_another: bool,
}

/// Changes the description or the deadline.
///
/// # Errors
/// [`Refused`] when the token has ended or was replaced, or the deadline is not ahead.
pub fn edit(token: &Token, edit: &Edit, now: Timestamp) -> Result<Changed, Refused> {
    still_active(token, now)?;
    let before = token;
    let mut token = token.clone();
    if let Some(description) = &edit.description {
        describe(&mut token, description, now);
    }
    if let Some(expires_at) = edit.expires_at {
        ahead(expires_at, now)?;
        set_deadline(&mut token, expires_at, now);
        if edit.by_another {
            note_move(&mut token, before.expires_at);
        }
    }
    mark_uncorrected(&mut token, before, now);
    Ok(Changed { token, successor: None })
}

/// Replaces a token by a successor of the same kind, description and scopes.
///
/// Without `expires_at` the successor gets the same lifetime again. The old token ends at once, or stays valid for the
/// grace, but never past its own deadline.
///
/// # Errors
/// [`Refused`] when the token was revoked, replaced or imported, or the deadline is not ahead.
pub fn rotate(
    token: &Token,
    grace: TimeDelta,
    expires_at: Option<Option<Timestamp>>,
    now: Timestamp,
) -> Result<Changed, Refused> {
    not_replaced(token)?;
    if token.status == Status::Revoked {
        return Err(Refused::Revoked(token.id));
    }
    if !token.issued {
        return Err(Refused::Imported(token.id));
    }
    let expires_at = expires_at.unwrap_or_else(|| {
        let lifetime = token.expires_at.map(|expires_at| expires_at - token.deadline_set_at);
        lifetime.and_then(|lifetime| now.checked_add_signed(lifetime))
    });
    ahead(expires_at, now)?;
    let secret = Secret::generate(token.id.bucket());
    let mut successor = Token {
        scopes: token.scopes.clone(),
        expires_at,
        ..Token::new(token.owner, token.kind, &token.description, now).with_secret(&secret)
    };
    mark_unplanned(&mut successor, now);

    let mut old = token.clone();
    old.replaced_by = Some(successor.id);
    old.unplanned = false;
    // Valid, and perhaps marked expired by a wrong clock all the same: nobody must rely on that mark.
    if old.validity(now).is_ok() {
        if grace > TimeDelta::zero() {
            old.status = Status::Active;
            old.ended_at = None;
            // What was written of it before is no longer true: a use from now on makes everything owed anew.
            old.generation = old.generation.saturating_add(1);
            old.moved_from = None;
            let end = now.checked_add_signed(grace).unwrap_or(Timestamp::MAX_UTC);
            old.expires_at = Some(old.expires_at.map_or(end, |expires_at| expires_at.min(end)));
            mark_unplanned(&mut old, now);
        } else {
            old.status = Status::Revoked;
            old.ended_at = Some(now);
        }
    }
    mark_uncorrected(&mut old, token, now);
    Ok(Changed { token: old, successor: Some((successor, secret)) })
}

/// Ends a token now.
///
/// # Errors
/// [`Refused`] when it is a primary token, or has ended already.
pub fn revoke(token: &Token, now: Timestamp) -> Result<Changed, Refused> {
    if token.kind == Kind::Primary && token.replaced_by.is_none() {
        return Err(Refused::Primary(token.id));
    }
    // What verification honours can be revoked, even where a wrong clock marked it expired.
    if token.validity(now).is_err() {
        not_ended(token, now)?;
    }
    // During the grace after a rotation its contacts may have been told twice of what holds no longer.
    let generation = token.generation.saturating_add(i32::from(token.replaced_by.is_some()));
    let mut revoked =
        Token { status: Status::Revoked, ended_at: Some(now), unplanned: false, generation, ..token.clone() };
    mark_uncorrected(&mut revoked, token, now);
    Ok(Changed { token: revoked, successor: None })
}

/// What a list says of a token that lives elsewhere.
#[derive(Clone, Debug)]
pub struct Watched {
    /// What it is for.
    pub description: String,
    /// When it was made, where that is known.
    pub created_at: Option<Timestamp>,
    /// Its deadline, which may lie in the past.
    pub expires_at: Option<Timestamp>,
    /// When it was last used.
    pub last_used_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}

/// A token that is seen in a list for the first time.
pub fn import_new(owner: &Owner, source: &str, external_id: &str, watched: &Watched, now: Timestamp) -> Token {
    let created_at = watched.created_at.unwrap_or(now).min(now);
    let mut token = Token {
        external_id: Some(external_id.to_owned()),
        source: Some(source.to_owned()),
        created_at,
        expires_at: watched.expires_at,
        // A list that does not say when a token was made does not say that it was made just now, either: every reminder
        // that is due is owed.
        deadline_set_at: watched.created_at.map_or(Timestamp::UNIX_EPOCH, |_| created_at),
        last_used_at: watched.last_used_at,
        status: if watched.revoked_at.is_some() { Status::Revoked } else { Status::Active },
        ended_at: watched.revoked_at,
        ..Token::new(owner.id, Kind::Additional, &watched.description, now)
    };
    if token.status == Status::Active {
        mark_unplanned(&mut token, now);
    }
    token
}

/// A token that is seen in a list again. One that was renewed elsewhere is active again; the list is right.
pub fn import_again(before: &Token, watched: &Watched, now: Timestamp) -> Token {
    let mut token = seen_again(before, watched, now);
    mark_uncorrected(&mut token, before, now);
    token
}

fn seen_again(token: &Token, watched: &Watched, now: Timestamp) -> Token {
    let mut token = token.clone();
    describe(&mut token, &watched.description, now);
    token.last_used_at = token.last_used_at.max(watched.last_used_at);
    if let Some(revoked_at) = watched.revoked_at {
        if token.status != Status::Revoked {
            token.status = Status::Revoked;
            token.ended_at = Some(revoked_at);
            token.unplanned = false;
        }
        return token;
    }
    let ahead = watched.expires_at.is_none_or(|expires_at| expires_at > now);
    if token.status != Status::Active && ahead {
        // What was said of its end is no longer true, so this counts as another deadline, however near the old one.
        token.status = Status::Active;
        token.ended_at = None;
        token.generation = token.generation.saturating_add(1);
        token.deadline_set_at = now;
        token.expires_at = watched.expires_at;
        token.moved_from = None;
        mark_unplanned(&mut token, now);
    } else if token.status == Status::Active && token.expires_at != watched.expires_at {
        let before = token.expires_at;
        set_deadline(&mut token, watched.expires_at, now);
        // A list does not say who moved it. Who renews a token is its owner, mostly, and knows; one that ends earlier than it did was
        // cut short by somebody else.
        if before.unwrap_or(NEVER) > watched.expires_at.unwrap_or(NEVER) {
            note_move(&mut token, before);
        }
    }
    token
}

/// Changes what a token is for. It may follow another policy by that, which may owe a reminder that is due already.
fn describe(token: &mut Token, description: &str, now: Timestamp) {
    if token.description != description {
        description.clone_into(&mut token.description);
        if token.status == Status::Active {
            mark_unplanned(token, now);
        }
    }
}

/// Sets a token's deadline: counts a new generation where it is another deadline, and marks what must be planned.
pub fn set_deadline(token: &mut Token, expires_at: Option<Timestamp>, now: Timestamp) {
    if is_another_deadline(token.expires_at, expires_at) {
        token.generation = token.generation.saturating_add(1);
        token.deadline_set_at = now;
        token.moved_from = None;
    }
    token.expires_at = expires_at;
    mark_unplanned(token, now);
}

/// Remembers from where somebody else than the owner moved a deadline, or took it away, and marks the token: its owner is to be
/// told now.
fn note_move(token: &mut Token, before: Option<Timestamp>) {
    if is_another_deadline(before, token.expires_at) {
        token.moved_from = Some(before.unwrap_or(NEVER));
        if token.expires_at.is_some() {
            token.unplanned = true;
        } else {
            token.uncorrected = true;
        }
    }
}

/// Marks a token whose contacts may have been told of a deadline ahead that no longer holds: some reminder of it may have been
/// due, or word of an earlier deadline may have been corrected. Never takes a mark away: only the planner does.
fn mark_uncorrected(token: &mut Token, before: &Token, now: Timestamp) {
    let holds = token.status == before.status
        && token.generation == before.generation
        && token.replaced_by == before.replaced_by;
    let ahead = Deadline::of(before).filter(|deadline| !holds && deadline.expires_at > now);
    let told = |deadline| before.generation > 0 || must_be_planned(deadline, now);
    token.uncorrected |= ahead.is_some_and(told);
}

/// Marks a token whose reminders may be due already. Never takes a mark away: only the planner does.
pub fn mark_unplanned(token: &mut Token, now: Timestamp) {
    token.unplanned |= Deadline::of(token).is_some_and(|deadline| must_be_planned(deadline, now));
}

fn ahead(expires_at: Option<Timestamp>, now: Timestamp) -> Result<(), Refused> {
    match expires_at {
        Some(expires_at) if expires_at <= now => Err(Refused::DeadlinePassed(expires_at)),
        _ => Ok(()),
    }
}

fn still_active(token: &Token, now: Timestamp) -> Result<(), Refused> {
    not_replaced(token)?;
    not_ended(token, now)
}

fn not_replaced(token: &Token) -> Result<(), Refused> {
    match token.replaced_by {
        Some(by) => Err(Refused::Replaced { id: token.id, by }),
        None => Ok(()),
    }
}

fn not_ended(token: &Token, now: Timestamp) -> Result<(), Refused> {
    match (token.status, token.expires_at) {
        (Status::Revoked, _) => Err(Refused::Revoked(token.id)),
        (_, Some(at)) if at <= now => Err(Refused::Expired { id: token.id, at }),
        (Status::Expired, at) => Err(Refused::Expired { id: token.id, at: at.unwrap_or(now) }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::token::{Bucket, NotValid, OwnerId};

    fn at(days: i64) -> Timestamp {
        DateTime::from_timestamp(1_800_000_000 + days * 86_400, 0).expect("in range")
    }

    fn token(kind: Kind, expires_at: Option<Timestamp>) -> Token {
        let bucket = Bucket::of("alice");
        Token {
            scopes: vec!["repo:read".into()],
            expires_at,
            ..Token::new(OwnerId::new(bucket, at(0)), kind, "deploy key (CI)", at(0))
                .with_secret(&Secret::generate(bucket))
        }
    }

    #[test]
    fn moving_a_deadline_counts_a_generation_and_a_nudge_does_not() {
        let before = token(Kind::Additional, Some(at(90)));
        let nudge = Edit { expires_at: Some(Some(at(90) + TimeDelta::seconds(1))), ..Edit::default() };
        let nudged = edit(&before, &nudge, at(10)).expect("allowed").token;
        assert_eq!((nudged.generation, nudged.deadline_set_at), (0, at(0)));

        let moved =
            edit(&before, &Edit { expires_at: Some(Some(at(60))), ..Edit::default() }, at(10)).expect("allowed");
        assert_eq!((moved.token.generation, moved.token.deadline_set_at), (1, at(10)));
        assert!(!moved.token.unplanned, "50 days are left of 50: nothing is due within the hour");
    }

    #[test]
    fn a_nudge_into_the_past_of_a_watermark_is_marked() {
        let before = token(Kind::Additional, Some(at(90)));
        let nudge = Edit { expires_at: Some(Some(at(90) - TimeDelta::minutes(59))), ..Edit::default() };
        assert!(edit(&before, &nudge, at(60)).expect("allowed").token.unplanned);
    }

    #[test]
    fn rotating_gives_the_same_lifetime_again() {
        let old = token(Kind::Primary, Some(at(90)));
        let changed = rotate(&old, TimeDelta::zero(), None, at(80)).expect("allowed");
        let (successor, secret) = changed.successor.expect("a successor");
        assert_eq!(successor.expires_at, Some(at(170)));
        assert_eq!((successor.kind, &successor.description), (Kind::Primary, &old.description));
        assert_eq!(successor.hint, Some(secret.hint()));
        assert_eq!(successor.id.bucket(), old.id.bucket());
        assert_eq!(changed.token.status, Status::Revoked);
        assert_eq!(changed.token.replaced_by, Some(successor.id));
    }

    #[test]
    fn grace_never_outlasts_the_deadline() {
        let old = token(Kind::Additional, Some(at(90)));
        let early = rotate(&old, TimeDelta::days(2), None, at(80)).expect("allowed").token;
        assert_eq!((early.status, early.expires_at, early.generation), (Status::Active, Some(at(82)), 1));
        let late = rotate(&old, TimeDelta::days(2), None, at(89)).expect("allowed").token;
        assert_eq!(late.expires_at, Some(at(90)));
    }

    #[test]
    fn an_expired_token_is_rotated_but_neither_edited_nor_revoked() {
        let old = token(Kind::Additional, Some(at(90)));
        assert!(matches!(edit(&old, &Edit::default(), at(90)), Err(Refused::Expired { .. })));
        assert!(matches!(revoke(&old, at(90)), Err(Refused::Expired { .. })));
        let changed = rotate(&old, TimeDelta::days(2), None, at(91)).expect("allowed");
        assert_eq!(changed.token.expires_at, Some(at(90)));
    }

    #[test]
    fn what_a_wrong_clock_marked_expired_can_still_be_ended() {
        let marked = Token { status: Status::Expired, ended_at: Some(at(90)), ..token(Kind::Additional, Some(at(90))) };
        assert!(marked.validity(at(10)).is_ok(), "it is honoured");
        assert_eq!(revoke(&marked, at(10)).expect("allowed").token.validity(at(10)), Err(NotValid::Revoked));
        let rotated = rotate(&marked, TimeDelta::zero(), None, at(10)).expect("allowed").token;
        assert_eq!(rotated.validity(at(10)), Err(NotValid::Revoked));
        let graced = rotate(&marked, TimeDelta::days(2), None, at(10)).expect("allowed").token;
        assert_eq!((graced.status, graced.ended_at, graced.expires_at), (Status::Active, None, Some(at(12))));
    }

    #[test]
    fn what_has_a_successor_or_was_revoked_stays_so() {
        let old = token(Kind::Additional, Some(at(90)));
        let revoked = revoke(&old, at(1)).expect("allowed").token;
        assert_eq!(rotate(&revoked, TimeDelta::zero(), None, at(2)).expect_err("refused"), Refused::Revoked(old.id));
        let replaced = rotate(&old, TimeDelta::days(9), None, at(1)).expect("allowed").token;
        assert!(matches!(rotate(&replaced, TimeDelta::zero(), None, at(2)), Err(Refused::Replaced { .. })));
        assert!(matches!(edit(&replaced, &Edit::default(), at(2)), Err(Refused::Replaced { .. })));
    }

    #[test]
    fn the_primary_is_ended_only_by_rotating() {
        let primary = token(Kind::Primary, None);
        assert_eq!(revoke(&primary, at(1)).expect_err("refused"), Refused::Primary(primary.id));
        let old = rotate(&primary, TimeDelta::days(2), None, at(1)).expect("allowed").token;
        assert_eq!(old.expires_at, Some(at(3)));
        assert!(revoke(&old, at(2)).is_ok(), "the old one may be ended during its grace");
    }

    #[test]
    fn a_deadline_must_lie_ahead() {
        let old = token(Kind::Additional, None);
        let past = Edit { expires_at: Some(Some(at(1))), ..Edit::default() };
        assert_eq!(edit(&old, &past, at(1)).expect_err("refused"), Refused::DeadlinePassed(at(1)));
    }
}
