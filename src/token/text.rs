//! Checks of the texts that people type. Each says what is wrong and what would be right.

use chrono_tz::Tz;

/// The longest description, in characters.
pub const MAX_DESCRIPTION: usize = 200;
const MAX_NAME: usize = 200;
const MAX_KEY: usize = 200;
const MAX_SCOPE: usize = 200;

/// An owner's key: a login, a slug or a path. No spaces, and it does not begin with a colon.
///
/// # Errors
/// What is wrong, for people.
pub fn key(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("a key cannot be empty".into());
    }
    if text.chars().count() > MAX_KEY {
        return Err(format!("a key has at most {MAX_KEY} characters"));
    }
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err("a key has no spaces and no control characters".into());
    }
    if text.starts_with([':', '-']) {
        return Err("a key does not begin with a colon or a hyphen".into());
    }
    Ok(text.to_owned())
}

/// An owner's display name.
///
/// # Errors
/// What is wrong, for people.
pub fn name(text: &str) -> Result<String, String> {
    one_line("a name", text, MAX_NAME)
}

/// What a token is for.
///
/// # Errors
/// What is wrong, for people.
pub fn description(text: &str) -> Result<String, String> {
    one_line("a description", text, MAX_DESCRIPTION)
}

fn one_line(what: &str, text: &str, max: usize) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err(format!("{what} cannot be empty"));
    }
    if text.chars().any(char::is_control) {
        return Err(format!("{what} is one line, without control characters"));
    }
    let count = text.chars().count();
    if count > max {
        return Err(format!("{what} has at most {max} characters, and this one has {count}"));
    }
    Ok(text.to_owned())
}

/// A scope token as in RFC 6749, section 3.3: visible ASCII without space, `"` and `\`.
///
/// # Errors
/// What is wrong, for people.
pub fn scope(text: &str) -> Result<String, String> {
    let fits = |c: char| matches!(c, '\x21' | '\x23'..='\x5b' | '\x5d'..='\x7e');
    if text.is_empty() || text.len() > MAX_SCOPE || !text.chars().all(fits) {
        return Err(format!(
            "a scope is 1 to {MAX_SCOPE} visible ASCII characters without spaces, \" and \\ (RFC 6749, section 3.3); \
             give several as several --scope"
        ));
    }
    Ok(text.to_owned())
}

/// A time zone by its IANA name.
///
/// # Errors
/// Says so, with the nearest name that exists.
pub fn time_zone(text: &str) -> Result<Tz, String> {
    text.parse().map_err(|_| {
        let wanted = text.to_lowercase();
        let near = chrono_tz::TZ_VARIANTS
            .iter()
            .map(|zone| {
                let name = zone.name().to_lowercase();
                let city = name.rsplit('/').next().unwrap_or_default();
                let score = strsim::jaro_winkler(&wanted, &name).max(strsim::jaro_winkler(&wanted, city));
                (score, zone)
            })
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .filter(|(score, _)| *score > 0.8);
        match near {
            Some((_, zone)) => format!("no time zone is called {text:?}; did you mean {}?", zone.name()),
            None => format!("no time zone is called {text:?}; use an IANA name such as Europe/Berlin"),
        }
    })
}

/// A language tag (BCP 47): letters, digits and hyphens, such as `en` or `de-AT`.
///
/// # Errors
/// What is wrong, for people.
pub fn locale(text: &str) -> Result<String, String> {
    let mut parts = text.split('-');
    let language = parts.next().unwrap_or_default();
    let fits = (2..=3).contains(&language.len())
        && language.bytes().all(|b| b.is_ascii_alphabetic())
        && parts.all(|part| (1..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric()))
        && text.len() <= 35;
    if fits { Ok(text.to_owned()) } else { Err(format!("{text:?} is not a language tag such as en or de-AT")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_one_line_and_bounded() {
        assert_eq!(description("  deploy key (CI) "), Ok("deploy key (CI)".to_owned()));
        assert!(description("").is_err());
        assert!(description("a\r\nBcc: all").is_err());
        assert!(description(&"ü".repeat(200)).is_ok());
        assert_eq!(
            description(&"ü".repeat(201)),
            Err("a description has at most 200 characters, and this one has 201".to_owned())
        );
        assert!(name("Platform\0Team").is_err());
    }

    #[test]
    fn keys_leave_room_for_the_system() {
        assert!(key("platform/ci@example.org").is_ok());
        for bad in ["", ":system", "-x", "two words", "tab\t"] {
            assert!(key(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn zones_are_suggested() {
        assert_eq!(time_zone("Europe/Berlin"), Ok(chrono_tz::Europe::Berlin));
        assert_eq!(time_zone("berlin"), Err("no time zone is called \"berlin\"; did you mean Europe/Berlin?".into()));
        assert!(time_zone("xqzv").is_err_and(|e| e.contains("use an IANA name")));
    }

    #[test]
    fn scopes_and_locales() {
        assert!(scope("repo:read").is_ok());
        assert!(scope("a b").is_err() && scope("").is_err() && scope("\"").is_err());
        assert!(locale("en").is_ok() && locale("de-AT").is_ok());
        assert!(locale("").is_err() && locale("german").is_err() && locale("de_AT").is_err());
    }
}
