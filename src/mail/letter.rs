//! What one message has to say, and to whom: plain data, without words and without a clock.

use crate::clock::Timestamp;
use crate::correction::Overtaken as Why;
use crate::policy::{Lead, Reason};
use crate::token::{Contact, MessageId, Owner, Token};

/// What one message has to say, and to whom.
#[derive(Clone, Debug)]
pub struct Letter {
    /// The message.
    pub message: MessageId,
    /// Who it goes to.
    pub to: Contact,
    /// What it says.
    pub content: Content,
}

/// What a message says.
#[derive(Clone, Debug)]
pub enum Content {
    /// Reminders, in any order.
    Reminders(Vec<Item>),
    /// Something for whoever operates lapsed.
    Alert(Alert),
    /// That mail arrives, with made-up reminders as an example.
    Test(Vec<Item>),
}

/// What somebody who operates lapsed must hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alert {
    /// A guard holds messages back.
    Held {
        /// How many.
        messages: u64,
        /// Since when the first of them.
        since: Timestamp,
        /// The next deadline that they speak of.
        next_deadline: Option<Timestamp>,
        /// Whether it is told of because that deadline is near.
        urgent: bool,
    },
    /// A guard keeps so many tokens from being marked expired.
    Expiry {
        /// How many.
        tokens: u64,
    },
}

/// One reminder.
#[derive(Clone, Debug)]
pub struct Item {
    /// The token as it is now.
    pub token: Token,
    /// Whose it is.
    pub owner: Owner,
    /// At which lead the reminder was owed. The wording follows the deadline and the time, not the lead.
    pub lead: Lead,
    /// Where the fallback is told instead of the owner: why.
    pub escalation: Option<Reason>,
    /// Where the owner is told that somebody else moved the deadline: how.
    pub change: Option<Change>,
    /// Where the reader is told that what they were told before no longer holds: what.
    pub overtaken: Option<Overtaken>,
}

/// A deadline that somebody other than the owner moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The deadline before; `None`: it never expired.
    pub before: Option<Timestamp>,
}

/// A deadline that the reader was told of and that no longer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overtaken {
    /// The deadline.
    pub told: Timestamp,
    /// What happened.
    pub why: Why,
}

/// Which of the mails a letter becomes; each has a directory of templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Tokens that expire soon, perhaps beside others that have expired.
    Reminder,
    /// Tokens that have expired.
    Expired,
    /// Tokens whose deadline somebody else moved.
    Changed,
    /// Tokens of which something was said that no longer holds.
    Correction,
    /// What the fallback is told instead of owners.
    Escalation,
    /// What the fallback is told of the guards.
    Alert,
    /// That mail arrives.
    Test,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Reminder, Self::Expired, Self::Changed, Self::Correction, Self::Escalation, Self::Alert, Self::Test];

    /// The name of its directory among the templates.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reminder => "reminder",
            Self::Expired => "expired",
            Self::Changed => "changed",
            Self::Correction => "correction",
            Self::Escalation => "escalation",
            Self::Alert => "alert",
            Self::Test => "test",
        }
    }

    /// What a letter becomes at this instant. Among reminders, what still lies ahead decides, and then what has expired:
    /// changed deadlines, corrections, and what others were not told of go with them.
    pub fn of(content: &Content, now: Timestamp) -> Self {
        let items = match content {
            Content::Alert(_) => return Self::Alert,
            Content::Test(_) => return Self::Test,
            Content::Reminders(items) => items,
        };
        let mut own = items.iter().filter(|item| item.escalation.is_none()).peekable();
        if own.peek().is_none() {
            return Self::Escalation;
        }
        let mut own = own.filter(|item| item.overtaken.is_none()).peekable();
        if own.peek().is_none() {
            return Self::Correction;
        }
        let expired = |item: &Item| item.token.expires_at.is_some_and(|deadline| deadline <= now);
        if own.clone().all(|item| item.change.is_some()) {
            Self::Changed
        } else if own.all(expired) {
            Self::Expired
        } else {
            Self::Reminder
        }
    }
}
