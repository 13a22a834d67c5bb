//! Secrets: what the bearer of a token presents.
//!
//! A secret is shown once, when its token is made. The store keeps only its SHA-256, which needs no salt or slow hash
//! because 32 random bytes cannot be guessed. `Debug` never prints one.

use std::fmt;

use sha2::{Digest, Sha256};

use super::Bucket;

const PREFIX: &str = "lps_";
const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// Digits after the prefix: enough for 37 bytes, since 62^50 > 2^296.
const ENCODED_LEN: usize = 50;
/// Bucket (1), random (32), CRC-32 of those 33 (4, big-endian).
const RAW_LEN: usize = 37;
const CHECKED_LEN: usize = 33;
/// So many digits are read or written at once: a tenth of the steps that one after another would take.
const GROUP: usize = 5;
/// How many values a group of digits has: fewer than 2^30.
const GROUP_VALUES: u64 = 62_u64.pow(5);
/// Words of 32 bits, the highest first, that hold the bytes of a secret; any 50 digits fit as well, since 62^50 < 2^320.
const LIMBS: usize = 10;

/// A secret in the clear: `lps_` and 50 base62 digits (0-9A-Za-z, big-endian, padded with `0` on the left).
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    raw: [u8; RAW_LEN],
}

/// What the store keeps of a secret: SHA-256 of its whole text.
pub type SecretHash = [u8; 32];

/// The text is not a secret of ours: mistyped, cut off, or something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a lapsed secret: expected `lps_` and 50 letters and digits with a matching checksum")]
pub struct NotASecret;

impl Secret {
    /// A new secret for a token in this bucket.
    pub fn generate(bucket: Bucket) -> Self {
        Self::from_random(bucket, rand::random())
    }

    fn from_random(bucket: Bucket, random: [u8; 32]) -> Self {
        let mut raw = [0; RAW_LEN];
        raw[0] = bucket.number();
        raw[1..CHECKED_LEN].copy_from_slice(&random);
        let checksum = crc32fast::hash(&raw[..CHECKED_LEN]);
        raw[CHECKED_LEN..].copy_from_slice(&checksum.to_be_bytes());
        Self { raw }
    }

    /// Reads a secret and checks it, so that a mistyped one costs no query.
    ///
    /// # Errors
    /// [`NotASecret`] when the prefix, the length, a digit or the checksum is wrong.
    pub fn parse(text: &str) -> Result<Self, NotASecret> {
        let digits = text.strip_prefix(PREFIX).ok_or(NotASecret)?.as_bytes();
        if digits.len() != ENCODED_LEN {
            return Err(NotASecret);
        }
        let mut limbs = [0u32; LIMBS];
        for group in digits.chunks_exact(GROUP) {
            let mut carry = 0;
            for digit in group {
                carry = carry * 62 + value(*digit).ok_or(NotASecret)?;
            }
            for limb in limbs.iter_mut().rev() {
                carry += u64::from(*limb) * GROUP_VALUES;
                *limb = low(carry);
                carry >>= 32;
            }
        }
        let raw = from_limbs(limbs)?;
        let (checked, checksum) = raw.split_at(CHECKED_LEN);
        if crc32fast::hash(checked).to_be_bytes() != checksum {
            return Err(NotASecret);
        }
        Ok(Self { raw })
    }

    /// The secret in the clear, to be shown once.
    pub fn expose(&self) -> String {
        let mut limbs = to_limbs(&self.raw);
        let mut digits = [0u8; ENCODED_LEN];
        for group in digits.chunks_exact_mut(GROUP).rev() {
            let mut rest = 0;
            for limb in &mut limbs {
                let value = rest << 32 | u64::from(*limb);
                *limb = low(value / GROUP_VALUES);
                rest = value % GROUP_VALUES;
            }
            for digit in group.iter_mut().rev() {
                *digit = DIGITS[(rest % 62) as usize];
                rest /= 62;
            }
        }
        digits.iter().fold(PREFIX.to_owned(), |mut text, digit| {
            text.push(char::from(*digit));
            text
        })
    }

    /// What the store keeps and looks up.
    pub fn hash(&self) -> SecretHash {
        Sha256::digest(self.expose().as_bytes()).into()
    }

    /// The bucket that the token lives in.
    pub fn bucket(&self) -> Bucket {
        Bucket::from_number(self.raw[0])
    }

    /// The last four characters: enough to recognise a token by, too few to guess it.
    pub fn hint(&self) -> String {
        let text = self.expose();
        text[text.len() - 4..].to_owned()
    }
}

/// The value of a digit.
fn value(digit: u8) -> Option<u64> {
    let value = match digit {
        b'0'..=b'9' => digit - b'0',
        b'A'..=b'Z' => digit - b'A' + 10,
        b'a'..=b'z' => digit - b'a' + 36,
        _ => return None,
    };
    Some(u64::from(value))
}

/// The lower half.
fn low(number: u64) -> u32 {
    (number & u64::from(u32::MAX)) as u32
}

fn to_limbs(raw: &[u8; RAW_LEN]) -> [u32; LIMBS] {
    let mut padded = [0; 4 * LIMBS];
    padded[4 * LIMBS - RAW_LEN..].copy_from_slice(raw);
    let mut limbs = [0; LIMBS];
    for (limb, bytes) in limbs.iter_mut().zip(padded.chunks_exact(4)) {
        *limb = bytes.iter().fold(0, |limb, byte| limb << 8 | u32::from(*byte));
    }
    limbs
}

/// A number that has more than the bytes of a secret is none.
fn from_limbs(limbs: [u32; LIMBS]) -> Result<[u8; RAW_LEN], NotASecret> {
    let mut padded = [0; 4 * LIMBS];
    for (bytes, limb) in padded.chunks_exact_mut(4).zip(limbs) {
        bytes.copy_from_slice(&limb.to_be_bytes());
    }
    let (more, bytes) = padded.split_at(4 * LIMBS - RAW_LEN);
    let mut raw = [0; RAW_LEN];
    raw.copy_from_slice(bytes);
    if more.iter().all(|byte| *byte == 0) { Ok(raw) } else { Err(NotASecret) }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_generated_is_read_back(bucket: u8, random: [u8; 32]) {
            let secret = Secret::from_random(Bucket::from_number(bucket), random);
            let text = secret.expose();
            prop_assert_eq!(text.len(), 54);
            prop_assert_eq!(Secret::parse(&text), Ok(secret.clone()));
            prop_assert_eq!(secret.bucket().number(), bucket);
            prop_assert!(text.ends_with(&secret.hint()));
        }

        #[test]
        fn one_wrong_character_is_noticed(random: [u8; 32], at in 4usize..54, digit in 0usize..62) {
            let text = Secret::from_random(Bucket::from_number(7), random).expose();
            let mut wrong = text.clone().into_bytes();
            wrong[at] = DIGITS[digit];
            let wrong = String::from_utf8(wrong).expect("ASCII");
            prop_assert_eq!(Secret::parse(&wrong).is_ok(), wrong == text);
        }

        #[test]
        fn arbitrary_text_never_panics(text: String) {
            let _ = Secret::parse(&text);
        }
    }

    /// Computed with Python: int.from_bytes, divmod by 62, zlib.crc32, hashlib.sha256.
    #[test]
    fn the_format_is_frozen() {
        let secret = Secret::from_random(Bucket::from_number(0), [0; 32]);
        assert_eq!(secret.expose(), "lps_000000000000000000000000000000000000000000002F4PRF");
        let secret = Secret::from_random(Bucket::from_number(255), [255; 32]);
        assert_eq!(secret.expose(), "lps_Ix6fSlzBOnTLmMfTN0lVdtAvsf3Mr8Nj5Fzc3bz5nm5WfnvW8B");
        let hash: String = secret.hash().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hash, "08eebbebdff4e45feb8cffd2a3f670ddb269c317bf53d1df08b44b1ed996d5d6");
    }

    #[test]
    fn a_number_with_more_bytes_is_no_secret() {
        let mut limbs = to_limbs(&Secret::from_random(Bucket::from_number(255), [255; 32]).raw);
        assert!(from_limbs(limbs).is_ok());
        limbs[0] += 1 << 8;
        assert_eq!(from_limbs(limbs), Err(NotASecret), "the bytes alone are a good secret's");
    }

    #[test]
    fn debug_shows_nothing() {
        let secret = Secret::generate(Bucket::from_number(1));
        assert_eq!(format!("{secret:?}"), "Secret(..)");
    }
}
