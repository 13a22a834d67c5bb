//! Tokens, their owners, and the contacts that speak for them.
//!
//! Plain data without I/O. What may be done to a token, and what becomes of it, is in [`crate::change`]; texts that
//! people type pass through [`text`] before they get here.

pub mod address;
pub mod id;
pub mod secret;
pub mod text;

use chrono_tz::Tz;

pub use address::{Address, BadAddress};
pub use id::{Bucket, ContactId, IdRef, MessageId, OwnerId, TokenId};
pub use secret::{NotASecret, Secret, SecretHash};

use crate::clock::Timestamp;

/// The key of the owner that stands for whoever runs `lapsed`; its contact is the fallback address. No key that
/// somebody types can begin with a colon.
pub const SYSTEM_OWNER_KEY: &str = ":system";

/// The last instant that the store keeps, in the place of no deadline where there must be one.
pub const NEVER: Timestamp = match Timestamp::from_timestamp(253_402_300_799, 0) {
    Some(at) => at,
    None => Timestamp::MAX_UTC,
};

/// Who a token belongs to: a person, a team, a bot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Names the owner.
    pub id: OwnerId,
    /// A login or slug; unique, and never changes.
    pub key: String,
    /// What the owner is called in mails.
    pub name: String,
    /// The zone in which days begin and end for the owner.
    pub time_zone: Tz,
    /// The language of mails, as a BCP 47 tag.
    pub locale: String,
}

/// A mail address that speaks for any number of owners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contact {
    /// Names the contact.
    pub id: ContactId,
    /// Where its mail goes.
    pub address: Address,
    /// Overrides the owner's zone.
    pub time_zone: Option<Tz>,
    /// Overrides the owner's locale.
    pub locale: Option<String>,
    /// Since when no mail goes there any more, and the mail server's reply that says why.
    pub suppressed: Option<Suppressed>,
}

/// Why and since when a contact gets no mail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suppressed {
    /// Since when.
    pub at: Timestamp,
    /// The mail server's reply.
    pub why: String,
}

/// An owner has one primary token and any number of additional ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Exactly one of an owner's primary tokens has no successor.
    Primary,
    /// Any other.
    Additional,
}

/// What a token is. Bookkeeping: whether it is honoured is decided by the clock at each verification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Not ended.
    Active,
    /// Its deadline passed.
    Expired,
    /// Somebody ended it, or replaced it.
    Revoked,
}

macro_rules! words {
    ($name:ident { $($variant:ident => $word:literal),+ $(,)? }) => {
        impl $name {
            /// The word for it in the store, in output and in mails.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl std::str::FromStr for $name {
            type Err = ();

            fn from_str(word: &str) -> std::result::Result<Self, ()> {
                match word { $($word => Ok(Self::$variant),)+ _ => Err(()) }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}
pub(crate) use words;

words!(Kind { Primary => "primary", Additional => "additional" });
words!(Status { Active => "active", Expired => "expired", Revoked => "revoked" });

/// An API credential of an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Names the token; ends in the owner's bucket.
    pub id: TokenId,
    /// Who it belongs to.
    pub owner: OwnerId,
    /// Primary or additional.
    pub kind: Kind,
    /// What it is for, in the owner's words.
    pub description: String,
    /// What it may be used for, in the form of RFC 6749, section 3.3.
    pub scopes: Vec<String>,
    /// Whether it was issued here and has a secret, rather than imported and only watched.
    pub issued: bool,
    /// Its name where it was imported from.
    pub external_id: Option<String>,
    /// Which list it was imported from.
    pub source: Option<String>,
    /// The last four characters of its secret.
    pub hint: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// The deadline: the instant from which it is no longer valid. `None`: never.
    pub expires_at: Option<Timestamp>,
    /// The deadline before somebody else than the owner moved it, as long as it has this one; [`NEVER`], where it had none.
    pub moved_from: Option<Timestamp>,
    /// When the deadline was set: at creation, or when it last moved by more than an hour.
    pub deadline_set_at: Timestamp,
    /// Counts the deadlines; part of the ledger's key.
    pub generation: i32,
    /// Whether reminders about it may be due that no watermark will come across.
    pub unplanned: bool,
    /// Whether contacts may have been told of a deadline that no longer holds.
    pub uncorrected: bool,
    /// When its secret was last verified, to the minute.
    pub last_used_at: Option<Timestamp>,
    /// Bookkeeping.
    pub status: Status,
    /// When it ended: its deadline, or when it was revoked.
    pub ended_at: Option<Timestamp>,
    /// Its successor.
    pub replaced_by: Option<TokenId>,
}

impl Token {
    /// An active token of an owner that is made now, without a secret and without a deadline.
    pub fn new(owner: OwnerId, kind: Kind, description: &str, now: Timestamp) -> Self {
        Self {
            id: TokenId::new(owner.bucket(), now),
            owner,
            kind,
            description: description.to_owned(),
            scopes: Vec::new(),
            issued: false,
            external_id: None,
            source: None,
            hint: None,
            created_at: now,
            expires_at: None,
            moved_from: None,
            deadline_set_at: now,
            generation: 0,
            unplanned: false,
            uncorrected: false,
            last_used_at: None,
            status: Status::Active,
            ended_at: None,
            replaced_by: None,
        }
    }

    /// The same with a secret, which whoever stores the token stores with it.
    #[must_use]
    pub fn with_secret(self, secret: &Secret) -> Self {
        Self { issued: true, hint: Some(secret.hint()), ..self }
    }

    /// Whether the token is honoured at this instant, and if not, why.
    ///
    /// # Errors
    /// [`NotValid::Revoked`] or [`NotValid::Expired`]. A token that is marked expired but whose deadline lies ahead was
    /// marked by a wrong clock, and is honoured.
    pub fn validity(&self, now: Timestamp) -> Result<(), NotValid> {
        match (self.status, self.expires_at) {
            (Status::Revoked, _) => Err(NotValid::Revoked),
            (_, Some(deadline)) if deadline <= now => Err(NotValid::Expired),
            _ => Ok(()),
        }
    }
}

/// Why a secret is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotValid {
    /// No token has it.
    Unknown,
    /// Its deadline has passed.
    Expired,
    /// Its token was revoked or replaced.
    Revoked,
}

words!(NotValid { Unknown => "unknown", Expired => "expired", Revoked => "revoked" });
