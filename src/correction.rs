//! What a contact must be told because what they were told before no longer holds: the deadline of a token that was replaced or
//! revoked since, or has another one, stands in their calendar, and an alarm about it would be a false one.
//!
//! Pure functions, without I/O and without a clock. Guarantees that only those are told who were told of that deadline (and of a
//! deadline that somebody else than the owner took away: all), and nobody once its alarm has come.

use chrono::TimeDelta;

use crate::clock::Timestamp;
use crate::policy::{Lead, Usage, is_another_deadline};
use crate::token::{MessageId, NEVER, Status, Token, words};

/// Why a deadline that somebody was told of no longer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Overtaken {
    /// The token has a successor, and was not used since.
    Replaced,
    /// The token was revoked.
    Revoked,
    /// The token has no deadline any more.
    Unlimited,
    /// The token has another deadline.
    Moved,
}

words!(Overtaken { Replaced => "replaced", Revoked => "revoked", Unlimited => "unlimited", Moved => "moved" });

/// A reminder that a contact was sent, or that is on its way to them, of a deadline that lies ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// Which of the token's deadlines.
    pub generation: i32,
    /// At which lead.
    pub lead: Lead,
    /// The deadline.
    pub deadline: Timestamp,
    /// When a mail server took it; `None`: it is on its way.
    pub sent_at: Option<Timestamp>,
    /// The message that carries it.
    pub message: Option<MessageId>,
}

/// What must be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Correction {
    /// [`Lead::WITHDRAWN`] or [`Lead::MOVED`].
    pub lead: Lead,
    /// Why.
    pub why: Overtaken,
    /// The deadline that no longer holds.
    pub told: Timestamp,
    /// By when it is of use: before the alarm.
    pub until: Timestamp,
    /// Whether it is news by itself, rather than something that other mail may take along.
    pub is_news: bool,
}

/// How long before a deadline the alarm comes of whoever was told of it then: a day, or an hour where no more than a day was left.
pub fn alarm_before(deadline: Timestamp, told_at: Timestamp) -> TimeDelta {
    if deadline - told_at > TimeDelta::days(1) { TimeDelta::days(1) } else { TimeDelta::hours(1) }
}

/// Why a token has no deadline any more that anybody should note; `None` where it has one, or had one until that passed.
pub fn withdrawn(token: &Token) -> Option<Overtaken> {
    if Usage::of(token).is_left_behind() {
        Some(Overtaken::Replaced)
    } else if token.status == Status::Revoked {
        Some(Overtaken::Revoked)
    } else if token.expires_at.is_none() {
        Some(Overtaken::Unlimited)
    } else {
        None
    }
}

/// What a contact must be told of a token, given what they were told of it before; what is in the message `but` does not count.
///
/// ```
/// # use chrono::{TimeDelta, TimeZone, Utc};
/// use lapsed::correction::{correct, Overtaken, Told};
/// use lapsed::policy::Lead;
/// use lapsed::token::{Bucket, Kind, OwnerId, Status, Token};
/// let now = Utc.with_ymd_and_hms(2027, 1, 1, 9, 0, 0).unwrap();
/// let deadline = now + TimeDelta::days(20);
/// let token = Token::new(OwnerId::new(Bucket::of("ann"), now), Kind::Additional, "deploy key", now);
/// let token = Token { expires_at: Some(deadline), ..token };
/// let (lead, sent_at) = (Lead::new(TimeDelta::days(30)), Some(now - TimeDelta::days(10)));
/// let told = [Told { generation: 0, lead, deadline, sent_at, message: None }];
/// assert_eq!(correct(&token, &told, None, now), None); // it still holds
///
/// let revoked = Token { status: Status::Revoked, ..token };
/// let correction = correct(&revoked, &told, None, now).unwrap();
/// assert_eq!((correction.why, correction.told), (Overtaken::Revoked, deadline));
/// assert_eq!(correction.until, deadline - TimeDelta::days(1)); // the alarm
/// assert_eq!(correct(&revoked, &[], None, now), None); // nobody knew of it
/// ```
pub fn correct(token: &Token, told: &[Told], but: Option<MessageId>, now: Timestamp) -> Option<Correction> {
    let why = withdrawn(token);
    if let (Some(Overtaken::Unlimited), Some(before)) = (why, token.moved_from.filter(|before| *before < NEVER)) {
        let why = Overtaken::Unlimited;
        return Some(Correction { lead: Lead::WITHDRAWN, why, told: before, until: before, is_news: true });
    }
    // What they were told last stands in their calendar.
    let told = told.iter().filter(|told| but.is_none() || told.message != but);
    let last = told.max_by_key(|told| (told.sent_at.unwrap_or(Timestamp::MAX_UTC), told.generation))?;
    let alarm = last.deadline - alarm_before(last.deadline, last.sent_at.unwrap_or(now));
    if last.lead == Lead::WITHDRAWN || alarm <= now {
        return None;
    }
    let correction = |lead, why, until| Correction { lead, why, told: last.deadline, until, is_news: false };
    if let Some(why) = why {
        return Some(correction(Lead::WITHDRAWN, why, alarm));
    }
    let expires_at = token.expires_at.filter(|at| *at > now && token.status == Status::Active)?;
    let moved = last.generation != token.generation && is_another_deadline(Some(last.deadline), Some(expires_at));
    moved.then(|| correction(Lead::MOVED, Overtaken::Moved, alarm.min(expires_at)))
}

/// Where a token's entry in a calendar stands in the course of all that becomes of it (RFC 5545, section 3.8.7.4): it grows with each
/// deadline, and with what happens to it under one deadline: there is one, the token is left behind, it is used all the same, it
/// has ended.
pub fn sequence(token: &Token) -> i32 {
    let stage = match (withdrawn(token), token.status) {
        (None, _) if token.replaced_by.is_none() => 0,
        (Some(Overtaken::Replaced), Status::Active) => 1,
        (None, _) => 2,
        _ => 3,
    };
    token.generation.max(0).saturating_mul(4).saturating_add(stage)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::change::{Edit, edit, revoke, rotate};
    use crate::token::{Bucket, Kind, OwnerId, Secret};

    fn at(hours: i64) -> Timestamp {
        DateTime::from_timestamp(1_800_000_000, 0).expect("in range") + TimeDelta::hours(hours)
    }

    /// Its deadline is 720 hours ahead.
    fn token() -> Token {
        let bucket = Bucket::of("ann");
        let token = Token::new(OwnerId::new(bucket, at(0)), Kind::Additional, "x", at(0));
        Token { expires_at: Some(at(720)), ..token.with_secret(&Secret::generate(bucket)) }
    }

    fn told(token: &Token, sent: i64) -> Told {
        let deadline = token.expires_at.expect("a deadline");
        let lead = Lead::new(TimeDelta::hours(200));
        Told { generation: token.generation, lead, deadline, sent_at: Some(at(sent)), message: None }
    }

    fn moved(token: &Token, to: Option<i64>, by_another: bool, now: i64) -> Token {
        let wanted = Edit { expires_at: Some(to.map(at)), by_another, ..Edit::default() };
        edit(token, &wanted, at(now)).expect("allowed").token
    }

    #[test]
    fn what_ended_is_withdrawn_until_its_alarm() {
        let before = token();
        let revoked = revoke(&before, at(600)).expect("allowed").token;
        let correction = |sent, now| correct(&revoked, &[told(&before, sent)], None, at(now));
        let early = correction(520, 600).expect("a correction");
        assert_eq!((early.lead, early.until, early.is_news), (Lead::WITHDRAWN, at(720 - 24), false));
        assert_eq!(correction(520, 696), None, "it has sounded");
        assert_eq!(correction(700, 701).expect("a correction").until, at(719), "told within the last day");
        let rotated = rotate(&before, TimeDelta::hours(10), None, at(600)).expect("allowed").token;
        let why = correct(&rotated, &[told(&before, 520)], None, at(600)).map(|it| it.why);
        assert_eq!(why, Some(Overtaken::Replaced), "valid for some hours, and left behind");
        let used = Token { last_used_at: Some(at(605)), ..rotated };
        let why = correct(&used, &[told(&before, 520)], None, at(605)).map(|it| it.why);
        assert_eq!(why, Some(Overtaken::Moved), "it ends with its grace");
    }

    #[test]
    fn what_was_said_last_counts() {
        let first = token();
        let later = moved(&first, Some(2_000), false, 600);
        let known = told(&first, 520);
        let correction = correct(&later, &[known], None, at(600)).expect("a correction");
        assert_eq!((correction.lead, correction.told, correction.until), (Lead::MOVED, at(720), at(696)));
        let said = Told { lead: Lead::MOVED, ..told(&later, 610) };
        assert_eq!(correct(&later, &[known, said], None, at(620)), None);
        let gone = moved(&later, None, false, 630);
        assert_eq!(correct(&gone, &[known, said], None, at(630)).expect("a correction").told, at(2_000));
        let withdrawn = Told { lead: Lead::WITHDRAWN, sent_at: Some(at(640)), ..said };
        assert_eq!(correct(&gone, &[known, said, withdrawn], None, at(650)), None);
        let back = moved(&moved(&first, Some(2_000), false, 600), Some(720), false, 601);
        assert_eq!(correct(&back, &[known], None, at(602)), None, "there and back again");
    }

    #[test]
    fn what_is_on_its_way_counts_but_for_what_asks() {
        let before = token();
        let gone = moved(&before, None, false, 600);
        let message = |n: u128| Some(uuid::Uuid::from_u128(n).into());
        let under_way = Told { sent_at: None, message: message(7), ..told(&before, 0) };
        assert!(correct(&gone, &[under_way], None, at(600)).is_some());
        assert!(correct(&gone, &[under_way], message(8), at(600)).is_some());
        assert_eq!(correct(&gone, &[under_way], message(7), at(600)), None);
    }

    #[test]
    fn a_deadline_that_somebody_else_took_away_is_news_to_all() {
        let gone = moved(&token(), None, true, 100);
        let correction = correct(&gone, &[], None, at(100)).expect("a correction");
        assert_eq!((correction.why, correction.told, correction.is_news), (Overtaken::Unlimited, at(720), true));
        assert_eq!(correct(&moved(&token(), None, false, 100), &[], None, at(100)), None);
    }

    #[test]
    fn an_entry_only_ever_goes_on() {
        let first = token();
        let graced = rotate(&first, TimeDelta::hours(100), None, at(600)).expect("allowed").token;
        let used = Token { last_used_at: Some(at(605)), ..graced.clone() };
        let ended = revoke(&used, at(610)).expect("allowed").token;
        let course = [&first, &graced, &used, &ended].map(sequence);
        assert!(course.is_sorted_by(|a, b| a < b), "{course:?}");
        let later = moved(&first, Some(2_000), false, 600);
        let gone = moved(&later, None, false, 610);
        let again = moved(&gone, Some(900), false, 620);
        let course = [&first, &later, &gone, &again, &revoke(&again, at(630)).expect("allowed").token].map(sequence);
        assert!(course.is_sorted_by(|a, b| a < b), "{course:?}");
        let least = sequence(&Token { generation: i32::MIN, ..token() });
        assert!(least >= 0 && sequence(&Token { generation: i32::MAX, ..token() }) > 0);
    }
}
