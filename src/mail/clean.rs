//! Texts from strangers, made harmless before they enter a mail.
//!
//! Descriptions, names and keys come from people and from imports. What leaves here is one line of bounded length,
//! without control characters, without anything that reorders or hides text, and, where a reader's program would make
//! a link of it, without that: the only links in our mails are ours.

/// Stands where a text was cut off.
const CUT: char = '…';

/// Invisible, and stops programs from seeing an address in a text. Lines may break there.
const NO_LINK: char = '\u{200b}';

/// One line of at most `max` characters: controls, direction overrides and invisible characters go, any white space
/// becomes one space, and what is too long ends in an ellipsis.
///
/// ```
/// use lapsed::mail::clean::one_line;
/// assert_eq!(one_line("  deploy\r\nBcc: all \u{202e}key", 40), "deploy Bcc: all key");
/// assert_eq!(one_line("abcdef", 4), "abc…");
/// ```
pub fn one_line(text: &str, max: usize) -> String {
    if text.len() <= max && is_plain_line(text) {
        return text.to_owned();
    }
    let mut line = String::with_capacity(text.len().min(4 * max));
    let mut count = 0;
    let mut space = false;
    for c in text.chars() {
        if c.is_whitespace() || (c.is_control() && matches!(c, '\0'..='\u{1f}')) {
            space = count > 0;
            continue;
        }
        if is_invisible(c) {
            continue;
        }
        let needed = 1 + usize::from(space);
        if count + needed > max {
            // Make room for the ellipsis within the limit.
            while count >= max && line.pop().is_some() {
                count -= 1;
            }
            line.truncate(line.trim_end().len());
            if max > 0 {
                line.push(CUT);
            }
            return line;
        }
        if space {
            line.push(' ');
        }
        line.push(c);
        count += needed;
        space = false;
    }
    line
}

/// Whether a text is ASCII that shows, in words with one space between them, as most texts are.
fn is_plain_line(text: &str) -> bool {
    let mut last = b' ';
    text.bytes().all(|byte| {
        let before = std::mem::replace(&mut last, byte);
        matches!(byte, b'!'..=b'~') || (byte == b' ' && before != b' ')
    }) && (last != b' ' || text.is_empty())
}

/// A mail server's words for the log, which holds no addresses: what has an `@` within is left out.
///
/// ```
/// use lapsed::mail::clean::without_addresses;
/// assert_eq!(without_addresses("5.1.8 <ops@example.org>: sender rejected"), "5.1.8 [address] sender rejected");
/// ```
pub fn without_addresses(text: &str) -> String {
    let words: Vec<&str> = text.split(' ').map(|word| if word.contains('@') { "[address]" } else { word }).collect();
    words.join(" ")
}

/// [`one_line`] for a header, where `=?utf-8?q?=0D=0A?=` would be read as the characters that it encodes (RFC 2047): the
/// start of such a word is broken.
///
/// ```
/// use lapsed::mail::clean::header_line;
/// assert_eq!(header_line("a =?utf-8?q?=0D=0A?= b", 40), "a = ?utf-8?q?=0D=0A?= b");
/// ```
pub fn header_line(text: &str, max: usize) -> String {
    one_line(&one_line(text, max).replace("=?", "= ?"), max)
}

/// The text with an invisible break wherever a mail program could see the start of a web or mail address.
///
/// ```
/// use lapsed::mail::clean::unlinked;
/// assert_eq!(unlinked("v1.2 of https://evil.example"), "v1.2 of https:\u{200b}//evil.\u{200b}example");
/// assert_eq!(unlinked("deploy key (CI)."), "deploy key (CI).");
/// ```
pub fn unlinked(text: &str) -> String {
    if !text.bytes().any(|byte| matches!(byte, b'.' | b'@' | b':')) {
        return text.to_owned();
    }
    let mut result = String::with_capacity(text.len() + 8);
    let mut rest = text.chars().peekable();
    let mut before = ' ';
    while let Some(c) = rest.next() {
        result.push(c);
        let next = rest.peek().copied().unwrap_or(' ');
        let starts_one = match c {
            '.' | '@' => !before.is_whitespace() && next.is_alphabetic(),
            ':' => before.is_alphanumeric() && matches!(next, '/' | '\\') || is_scheme(&result),
            _ => false,
        };
        if starts_one {
            result.push(NO_LINK);
        }
        before = c;
    }
    result
}

/// Whether the text ends in a scheme that programs recognise without slashes.
fn is_scheme(text: &str) -> bool {
    let tail: String = text.chars().rev().take(11).collect::<Vec<_>>().into_iter().rev().collect();
    let tail = tail.to_ascii_lowercase();
    ["mailto:", "tel:", "sms:", "javascript:", "data:"].iter().any(|scheme| tail.ends_with(scheme))
}

/// The text percent-encoded for use as one part of an address: everything but the unreserved characters of RFC 3986,
/// section 2.3.
pub fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Whether a character shows nothing by itself and can make the text around it look like another: controls, direction
/// marks and overrides, zero-width spaces, line separators, tags. The joiners of scripts and emoji stay.
pub(crate) fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_hides_or_turns_round() {
        assert_eq!(one_line("a\u{202e}b\u{2066}c\0d\u{7f}e\u{200b}f\u{feff}", 99), "abc defgh".replace("gh", ""));
        assert_eq!(one_line("\r\n\t x \u{2028} y \r\n", 99), "x y");
        assert_eq!(one_line("👩\u{200d}💻 می\u{200c}خواهم", 99), "👩\u{200d}💻 می\u{200c}خواهم");
    }

    #[test]
    fn what_is_too_long_is_cut() {
        assert_eq!(one_line(&"ü".repeat(200), 200), "ü".repeat(200));
        assert_eq!(one_line(&"ü".repeat(201), 200), "ü".repeat(199) + "…");
        assert_eq!(one_line("ab cd", 4), "ab…");
        assert_eq!(one_line("abc", 0), "");
    }

    #[test]
    fn addresses_are_defused() {
        for text in ["www.evil.example", "http://a", "ftp:\\\\a", "ann@example.org", "mailto:ann", "JavaScript:x"] {
            let defused = unlinked(text);
            assert_ne!(defused, text);
            assert_eq!(defused.replace(NO_LINK, ""), text);
        }
        for text in ["repo:read", "e.g. this", "3.14", "a . b", "key: value"] {
            assert_eq!(unlinked(text), text.replace("e.g", "e.\u{200b}g"));
        }
    }

    #[test]
    fn percent_encoding_leaves_only_unreserved_characters() {
        assert_eq!(percent_encoded("a/b?c=d&ü \r\n#-._~"), "a%2Fb%3Fc%3Dd%26%C3%BC%20%0D%0A%23-._~");
    }

    proptest! {
        #[test]
        fn a_line_is_bounded_and_plain(text: String, max in 0usize..40) {
            let line = one_line(&text, max);
            prop_assert!(line.chars().count() <= max);
            prop_assert!(!line.chars().any(|c| c.is_control() || is_invisible(c)));
            prop_assert_eq!(line.trim(), &line);
            prop_assert_eq!(one_line(&line, max), line);
        }

        #[test]
        fn no_scheme_survives(text in "[a-z:/.@\\\\ ]{0,30}") {
            let defused = unlinked(&text);
            let mut schemes = defused.match_indices("://");
            prop_assert!(schemes.all(|(at, _)| !defused[..at].ends_with(|c: char| c.is_alphanumeric())));
            prop_assert!(!defused.contains("www.e"));
        }
    }
}
