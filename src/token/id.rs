//! Identifiers and the buckets that they carry.
//!
//! Every row belongs to one of 256 buckets, and an identifier ends in its bucket: whoever knows an id knows the one
//! shard that it lives on. Ids of one process ascend. Relies on
//! nothing but randomness for the rest; two processes never agree on an id by accident.

use std::fmt;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use chrono::{DateTime, Utc};
use twox_hash::XxHash3_64;
use uuid::Uuid;

/// How many hexadecimal digits of an id lists print, taken from its random end.
pub const SHORT_ID_DIGITS: usize = 10;

/// One of 256 places that rows are spread over: xxh3-64 with seed 0, modulo 256.
///
/// Owners and tokens live in the bucket of the owner's key; contacts, reminders and messages in that of the address.
/// The function is part of the stored format and never changes.
///
/// ```
/// use lapsed::token::Bucket;
/// assert_eq!(Bucket::of("").number(), 0xc2);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bucket(u8);

impl Bucket {
    /// How many buckets there are.
    pub const COUNT: u16 = 256;

    /// The bucket of an owner's key or a contact's normalised address.
    pub fn of(name: &str) -> Self {
        Self(XxHash3_64::oneshot(name.as_bytes()).to_le_bytes()[0])
    }

    /// The bucket with this number.
    pub const fn from_number(number: u8) -> Self {
        Self(number)
    }

    /// 0 to 255.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The number as the store's `SMALLINT`.
    pub fn column(self) -> i16 {
        i16::from(self.0)
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Counts the ids that this process makes, from a random start: at the same instant, the later id is the greater. Instants
/// are whole seconds, so the rows of an import would otherwise be scattered over each of its tables and indexes.
static ORDER: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(rand::random()));

/// A UUID version 7 (RFC 9562, sections 5.7 and 6.2) of the instant: 42 bits that count, 24 random ones, and the bucket.
fn new_uuid(bucket: Bucket, now: DateTime<Utc>) -> Uuid {
    let count = u128::from(ORDER.fetch_add(1, Ordering::Relaxed));
    // Around the two bits of the variant.
    let (high, low) = (count >> 30 & 0xfff, count & 0x3fff_ffff);
    let random = u128::from(rand::random::<u32>() >> 8);
    let tail = high << 64 | low << 32 | random << 8 | u128::from(bucket.number());
    let [_, _, _, _, _, _, tail @ ..] = tail.to_be_bytes();
    let millis = u64::try_from(now.timestamp_millis()).unwrap_or(0);
    uuid::Builder::from_unix_timestamp_millis(millis, &tail).into_uuid()
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
        pub struct $name(Uuid);

        impl $name {
            /// A new id in this bucket.
            pub fn new(bucket: Bucket, now: DateTime<Utc>) -> Self {
                Self(new_uuid(bucket, now))
            }

            /// When the id was made; `None` where another program made it.
            pub fn made_at(self) -> Option<DateTime<Utc>> {
                let (seconds, nanos) = self.0.get_timestamp()?.to_unix();
                DateTime::from_timestamp(i64::try_from(seconds).ok()?, nanos)
            }

            /// The bucket that the id ends in.
            pub fn bucket(self) -> Bucket {
                Bucket::from_number(self.0.as_bytes()[15])
            }

            /// The id as a UUID, as the store keeps it.
            pub fn uuid(self) -> Uuid {
                self.0
            }

            /// The last [`SHORT_ID_DIGITS`] hexadecimal digits, as lists print them.
            pub fn short(self) -> String {
                let digits = self.0.simple().to_string();
                digits[digits.len() - SHORT_ID_DIGITS..].to_owned()
            }
        }

        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// Names an owner.
    OwnerId
);
id!(
    /// Names a contact.
    ContactId
);
id!(
    /// Names a token.
    TokenId
);
id!(
    /// Names a message; its `Message-ID` is made from it.
    MessageId
);

/// What somebody typed to name a row by its id: all of it, or its last digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdRef {
    /// A whole id.
    Whole(Uuid),
    /// The last digits of one: lower-case hexadecimal, without hyphens, 4 to 31 of them.
    Short(String),
}

impl IdRef {
    /// Reads an id or its short form; `None` when the text can be neither.
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(uuid) = Uuid::try_parse(text) {
            return Some(Self::Whole(uuid));
        }
        let digits: String = text.chars().filter(|c| *c != '-').map(|c| c.to_ascii_lowercase()).collect();
        let plausible = (4..32).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
        plausible.then_some(Self::Short(digits))
    }

    /// The bucket that the id ends in.
    pub fn bucket(&self) -> Bucket {
        match self {
            Self::Whole(uuid) => Bucket::from_number(uuid.as_bytes()[15]),
            Self::Short(digits) => {
                let last = digits.get(digits.len() - 2..).unwrap_or_default();
                Bucket::from_number(u8::from_str_radix(last, 16).unwrap_or_default())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instant() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).expect("in range")
    }

    #[test]
    fn an_id_carries_its_bucket_and_its_time() {
        for number in 0..=255 {
            let id = TokenId::new(Bucket::from_number(number), instant());
            assert_eq!(id.bucket().number(), number);
            assert_eq!(id.uuid().get_version_num(), 7);
            assert_eq!(id.uuid().get_timestamp().expect("a time").to_unix().0, 1_800_000_000);
        }
    }

    #[test]
    fn ids_of_one_instant_ascend_and_differ_in_their_short_forms() {
        let bucket = Bucket::from_number(7);
        // Where the count wraps, its order does: once in a lifetime, so one break is allowed for.
        let ids: Vec<TokenId> = (0..100).map(|_| TokenId::new(bucket, instant())).collect();
        assert!(ids.is_sorted() || ids.windows(2).filter(|pair| pair[0] > pair[1]).count() == 1);
        let short: std::collections::HashSet<String> = ids.iter().map(|id| id.short()).collect();
        assert_eq!(short.len(), ids.len());
        assert!(ids.iter().all(|id| id.uuid().get_variant() == uuid::Variant::RFC4122));
    }

    #[test]
    fn the_hash_is_frozen() {
        let buckets = ["", "alice", "platform-team", "ci@example.org"].map(|name| Bucket::of(name).number());
        assert_eq!(buckets, [0xc2, 0xb0, 0x09, 0x6f], "computed with the reference implementation of xxHash");
    }

    #[test]
    fn short_ids_are_read_back_with_their_bucket() {
        let id = TokenId::new(Bucket::from_number(0x5e), instant());
        let short = IdRef::parse(&id.short()).expect("a short id");
        assert_eq!(short, IdRef::Short(id.short()));
        assert_eq!(short.bucket().number(), 0x5e);
        assert_eq!(IdRef::parse(&id.to_string()), Some(IdRef::Whole(id.uuid())));
        assert_eq!(IdRef::parse("abc"), None);
        assert_eq!(IdRef::parse("alice"), None);
        assert_eq!(IdRef::parse("0189-ZZZZ"), None);
    }
}
