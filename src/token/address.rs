//! Mail addresses, normalised: the one form in which an address is stored, compared and hashed into its bucket.

use std::fmt;

use super::Bucket;

/// The longest address that a mail server must take (RFC 5321, section 4.5.3.1.3, less the angle brackets).
const MAX_LEN: usize = 254;

/// A mail address in its normal form: no surrounding space, the domain in ASCII (IDNA), all of it in lower case.
///
/// RFC 5321 (section 2.4) lets a server tell `Ann` from `ann` before the `@`; none that people use does, while lists of
/// people hold both spellings. One person is one contact, so the case goes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(String);

/// Why a text is not a mail address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a mail address: {problem}")]
pub struct BadAddress {
    text: String,
    problem: &'static str,
}

impl Address {
    /// Reads and normalises an address.
    ///
    /// # Errors
    /// [`BadAddress`], which says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, BadAddress> {
        let bad = |problem| BadAddress { text: text.chars().take(80).collect(), problem };
        let (local, domain) = text.trim().rsplit_once('@').ok_or_else(|| bad("it has no @"))?;
        if local.is_empty() {
            return Err(bad("nothing stands before the @"));
        }
        if local.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(bad("it has a space or a control character"));
        }
        if domain.is_empty() {
            return Err(bad("nothing stands after the @"));
        }
        let domain =
            idna::domain_to_ascii_strict(domain).map_err(|_| bad("the part after the @ is not a domain name"))?;
        let address = lettre::Address::new(local.to_lowercase(), domain)
            .map_err(|_| bad("it has a character that an address cannot have"))?
            .to_string();
        if address.len() > MAX_LEN {
            return Err(bad("it is longer than 254 characters"));
        }
        Ok(Self(address))
    }

    /// Takes an address that the store holds, which was normalised when it was written.
    pub fn from_store(text: String) -> Self {
        Self(text)
    }

    /// The normal form.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The bucket of the contact with this address.
    pub fn bucket(&self) -> Bucket {
        Bucket::of(&self.0)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Prints no address: what is debugged is often logged.
impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Address(..)")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_person_is_one_address() {
        for text in ["ann@example.org", " Ann@Example.ORG ", "ANN@EXAMPLE.org"] {
            assert_eq!(Address::parse(text).expect(text).as_str(), "ann@example.org");
        }
        assert_eq!(Address::parse("jo@bücher.example").expect("IDN").as_str(), "jo@xn--bcher-kva.example");
    }

    #[test]
    fn what_is_no_address_says_why() {
        for (text, why) in [
            ("ann", "it has no @"),
            ("@example.org", "nothing stands before the @"),
            ("ann@", "nothing stands after the @"),
            ("a b@example.org", "it has a space or a control character"),
            ("a\r\nb@example.org", "it has a space or a control character"),
            ("ann@exa mple.org", "the part after the @ is not a domain name"),
        ] {
            let error = Address::parse(text).expect_err(text).to_string();
            assert!(error.ends_with(why), "{error}");
        }
    }

    proptest! {
        #[test]
        fn normalising_twice_changes_nothing(text in "[^@]{1,20}@[a-zA-Z0-9äß.-]{1,20}") {
            if let Ok(address) = Address::parse(&text) {
                let again = Address::parse(address.as_str());
                prop_assert_eq!(again, Ok(address));
            }
        }
    }
}
