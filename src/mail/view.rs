//! What templates know of a letter: strangers' texts made harmless, instants as a reader's calendar has them.
//!
//! Guarantees that no text in it has a control character, a line break or a direction override, that none is longer than
//! what a mail has room for, and that none looks like a link but `link`, which is ours. No words of any language: those
//! are the templates'. Pure.

use std::collections::HashSet;
use std::sync::Arc;

use chrono::TimeDelta;
use chrono_tz::Tz;
use minijinja::value::{Enumerator, Object, Value};
use minijinja::{Error, context};

use crate::clock::Timestamp;
use crate::correction::Overtaken as Why;
use crate::policy::Reason;
use crate::token::{Contact, text};

use super::clean::{one_line, unlinked};
use super::letter::{Alert, Item, Overtaken};
use super::manage_url::ManageUrl;
use super::when::{Moment, days_left_in_week, exact};

/// How many tokens a mail lists in each of its two parts; the rest is counted.
pub const LISTED: usize = 50;

/// How much of a description a subject quotes, in characters.
const QUOTED: usize = 60;
/// How much of other texts is shown, in characters.
pub(super) const SHOWN: usize = 200;
/// How many of a token's scopes are shown.
const SCOPES: usize = 20;

/// A token that was not used for so long may not be needed any more.
const UNUSED_AFTER: TimeDelta = TimeDelta::days(90);
/// A token that was never used has had time to be put to use.
const NEVER_USED_AFTER: TimeDelta = TimeDelta::days(30);

/// An item with what is computed from it once.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    /// What it is about.
    pub item: &'a Item,
    /// The reader's zone.
    pub zone: Tz,
    /// The token's deadline.
    pub deadline: Timestamp,
    /// The same in the reader's calendar.
    pub moment: Moment,
    /// Whether it has passed.
    pub expired: bool,
}

impl<'a> Entry<'a> {
    fn of(item: &'a Item, deadline: Timestamp, zone: Tz, now: Timestamp) -> Self {
        let moment = Moment::of_deadline(deadline, now, zone);
        Self { item, zone, deadline, moment, expired: deadline <= now }
    }

    /// What stands in the reader's calendar: where what they were told no longer holds, the deadline that does, if there is one.
    pub fn stands(&self, now: Timestamp) -> Option<Self> {
        match self.item.overtaken {
            None => Some(self.clone()),
            Some(Overtaken { why: Why::Moved, .. }) => {
                Some(Self::of(self.item, self.item.token.expires_at?, self.zone, now))
            }
            Some(_) => None,
        }
    }

    /// `None` where the token has no deadline: there is nothing to say about it.
    fn new(item: &'a Item, to: &Contact, now: Timestamp) -> Option<Self> {
        let deadline = item.overtaken.map_or(item.token.expires_at, |overtaken| Some(overtaken.told))?;
        Some(Self::of(item, deadline, to.time_zone.unwrap_or(item.owner.time_zone), now))
    }
}

/// The items that have something to say, the most urgent first.
pub fn entries<'a>(items: &'a [Item], to: &Contact, now: Timestamp) -> Vec<Entry<'a>> {
    let mut entries: Vec<Entry<'a>> = items.iter().filter_map(|item| Entry::new(item, to, now)).collect();
    entries.sort_by(|a, b| {
        let key = |entry: &Entry<'a>| (entry.deadline, &entry.item.token.description, entry.item.token.id);
        key(a).cmp(&key(b))
    });
    entries
}

/// What templates know of reminders: `own`, the tokens of the reader's owners, `corrected`, those of them of which something was
/// said that no longer holds, and `escalated`, those of owners that could not be told.
///
/// # Errors
/// When `words` fails, which puts a token into words.
pub fn reminders(
    entries: &[Entry<'_>],
    link: Option<&ManageUrl>,
    now: Timestamp,
    words: &impl Fn(&Value) -> Result<Value, Error>,
) -> Result<Reminders, Error> {
    let (escalated, own): (Vec<&Entry<'_>>, Vec<&Entry<'_>>) =
        entries.iter().partition(|entry| entry.item.escalation.is_some());
    let (corrected, own): (Vec<&Entry<'_>>, Vec<&Entry<'_>>) =
        own.into_iter().partition(|entry| entry.item.overtaken.is_some());
    let listed = |entries: &[&Entry<'_>]| -> Result<Vec<Value>, Error> {
        entries.iter().take(LISTED).map(|entry| in_words(entry, link, now, words)).collect()
    };
    let (own_listed, corrected_listed, escalated_listed) = (listed(&own)?, listed(&corrected)?, listed(&escalated)?);
    let known = context! {
        own => part(&own, &own_listed, now),
        corrected => part(&corrected, &corrected_listed, now),
        escalated => part(&escalated, &escalated_listed, now),
    };
    Ok(Reminders { known, own: own_listed })
}

/// What templates know of one token.
///
/// # Errors
/// When `words` fails.
pub fn in_words(
    entry: &Entry<'_>,
    link: Option<&ManageUrl>,
    now: Timestamp,
    words: &impl Fn(&Value) -> Result<Value, Error>,
) -> Result<Value, Error> {
    let token = token(entry, link, now);
    let words = words(&token)?;
    Ok(Value::from_object(Worded { token, words }))
}

/// What templates know of a token, and its words besides: found more quickly than in what `context!` puts together.
#[derive(Debug)]
struct Worded {
    token: Value,
    words: Value,
}

impl Object for Worded {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        if key == "words" {
            return Some(self.words.clone());
        }
        self.token.get_attr(key).ok().filter(|value| !value.is_undefined())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let known = self.token.try_iter().into_iter().flatten();
        Enumerator::Values(known.chain([Value::from("words")]).collect())
    }
}

/// What templates know of reminders.
#[derive(Clone, Debug)]
pub struct Reminders {
    /// All of it.
    pub known: Value,
    /// Each of the reader's own tokens that the mail lists and speaks of, in the order of its entry.
    pub own: Vec<Value>,
}

/// What templates know of an alert.
pub fn alert(alert: Alert, to: &Contact, now: Timestamp) -> Value {
    let zone = to.time_zone.unwrap_or(Tz::UTC);
    let (kind, count, since, deadline) = match alert {
        Alert::Held { messages, since, next_deadline, urgent } => {
            (if urgent { "held_urgent" } else { "held" }, messages, Some(since), next_deadline)
        }
        Alert::Expiry { tokens } => ("expiry", tokens, None, None),
    };
    let deadline = deadline.filter(|deadline| *deadline > now);
    let instant = |at: Option<Timestamp>| at.map(|at| exact(at, zone));
    context! { kind, count, since => instant(since), deadline => instant(deadline) }
}

fn part(entries: &[&Entry<'_>], listed: &[Value], now: Timestamp) -> Value {
    let expired = entries.iter().filter(|entry| entry.expired).count();
    let owners: HashSet<_> = entries.iter().map(|entry| entry.item.owner.id).collect();
    let day = entries.first().map(|first| first.moment.days);
    let this_week = match (entries.first(), entries.last()) {
        (Some(first), Some(last)) => !first.expired && last.moment.days <= days_left_in_week(now, first.zone),
        _ => false,
    };
    context! {
        count => entries.len(),
        expired,
        owners => owners.len(),
        unlisted => entries.len() - listed.len(),
        same_day => entries.iter().all(|entry| Some(entry.moment.days) == day),
        this_week,
        first => listed.first().cloned(),
        listed,
    }
}

/// What templates know of one token, but for its words.
fn token(entry: &Entry<'_>, link: Option<&ManageUrl>, now: Timestamp) -> Value {
    let Item { token, owner, escalation, change, overtaken, .. } = entry.item;
    let zone = entry.zone;
    let unused = match token.last_used_at {
        Some(at) => now - at >= UNUSED_AFTER,
        None => token.issued && now - token.created_at >= NEVER_USED_AFTER,
    };
    context! {
        id => token.id.to_string(),
        short_id => token.id.short(),
        // As short as a subject wants it.
        title => one_line(&token.description, QUOTED),
        description => unlinked(&one_line(&token.description, text::MAX_DESCRIPTION)),
        owner => shown(&owner.name),
        owner_key => shown(&owner.key),
        kind => token.kind.as_str(),
        hint => token.hint.as_deref().map(shown),
        issued => token.issued,
        external_id => token.external_id.as_deref().map(shown),
        scopes => token.scopes.iter().take(SCOPES).map(|scope| shown(scope)).collect::<Vec<_>>(),
        more_scopes => token.scopes.len().saturating_sub(SCOPES),
        expired => entry.expired,
        deadline => moment(&entry.moment),
        exact => exact(entry.deadline, zone),
        utc => exact(entry.deadline, Tz::UTC),
        created => moment(&Moment::of_past(token.created_at, now, zone)),
        // A list that it was imported from may not say whether it is used.
        use_known => token.issued || token.last_used_at.is_some(),
        last_used => token.last_used_at.map(|at| moment(&Moment::of_past(at, now, zone))),
        unused,
        replaced => token.replaced_by.is_some(),
        change => change.as_ref().map(|change| context! {
            before => change.before.map(|before| moment(&Moment::of_deadline(before, now, zone))),
        }),
        overtaken => overtaken.map(|overtaken| context! {
            by => overtaken.why.as_str(),
            deadline => token.expires_at.map(|at| moment(&Moment::of_deadline(at, now, zone))),
        }),
        why => escalation.map(why),
        link => link.and_then(|url| url.of(token)),
    }
}

/// What templates know of an instant.
pub(super) fn moment(at: &Moment) -> Value {
    context! {
        days => at.days,
        ahead => at.ahead,
        span => at.span.map(|span| context! { count => span.count, unit => span.unit }),
        day => at.day,
        month => at.month,
        year => at.year,
        weekday => at.weekday,
        ends_day => at.ends_day,
        time => at.time.as_str(),
    }
}

fn shown(text: &str) -> String {
    unlinked(&one_line(text, SHOWN))
}

/// A word for templates to choose by; they know how to say it.
fn why(reason: Reason) -> &'static str {
    match reason {
        Reason::NoContact => "no_contact",
        Reason::Suppressed => "suppressed",
        Reason::Undeliverable => "undeliverable",
        Reason::Unreadable => "unreadable",
        _ => "not_sent",
    }
}
