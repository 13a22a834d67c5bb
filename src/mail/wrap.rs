//! Plain text in columns.

use unicode_width::UnicodeWidthStr;

/// How wide a line of a mail's text is, in columns (RFC 5322, section 2.1.1 recommends at most 78; replies indent).
pub const COLUMNS: usize = 72;

/// The text filled into lines of at most [`COLUMNS`] columns. The first line begins with `first`, the others with as many
/// spaces as it is wide.
///
/// A word that is wider than a line is broken, except a link: half a link leads nowhere.
///
/// ```
/// use lapsed::mail::wrap::hanging;
/// let text = hanging("  scopes  ", &"word ".repeat(20));
/// assert_eq!(text.lines().next(), Some("  scopes  word word word word word word word word word word word word"));
/// assert_eq!(text.lines().nth(1), Some("          word word word word word word word word"));
/// ```
pub fn hanging(first: &str, text: &str) -> String {
    let indent = width(first).min(COLUMNS / 2);
    let room = COLUMNS - indent;
    let mut lines = Lines { text: String::with_capacity(first.len() + text.len() + text.len() / 8), indent, used: 0 };
    lines.text.push_str(first);
    let mut put = |word: &str| match width(word) {
        width if width <= room || word.contains("://") => lines.put(word, width),
        _ => lines.put_in_pieces(word),
    };
    if text.is_ascii() {
        text.split_ascii_whitespace().for_each(&mut put);
    } else {
        text.split_whitespace().for_each(&mut put);
    }
    lines.text
}

/// Lines that are being filled.
struct Lines {
    text: String,
    indent: usize,
    /// What the line has behind its indentation, in columns.
    used: usize,
}

impl Lines {
    fn room(&self) -> usize {
        COLUMNS - self.indent
    }

    /// Adds a word of this width.
    fn put(&mut self, word: &str, width: usize) {
        if self.used > 0 && self.used + 1 + width > self.room() {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', self.indent));
            self.used = 0;
        } else if self.used > 0 {
            self.text.push(' ');
            self.used += 1;
        }
        self.text.push_str(word);
        self.used += width;
    }

    /// Adds a word that is wider than a line.
    fn put_in_pieces(&mut self, word: &str) {
        let room = self.room();
        let mut rest = word;
        while rest.width() > room {
            // The width of a text is not the sum of its characters' widths, so ask for each prefix; a word is short.
            let ends = rest.char_indices().map(|(at, c)| at + c.len_utf8());
            let end = ends.take_while(|end| rest[..*end].width() <= room).last();
            let end = end.unwrap_or_else(|| rest.chars().next().map_or(rest.len(), char::len_utf8));
            let (piece, tail) = rest.split_at(end);
            self.put(piece, piece.width());
            rest = tail;
        }
        self.put(rest, rest.width());
    }
}

/// In columns. What is ASCII, as most words are, has one for each byte.
fn width(text: &str) -> usize {
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) { text.len() } else { text.width() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn links_stay_whole() {
        let link = format!("https://tokens.example/{}", "x".repeat(100));
        let text = hanging("  ", &format!("Replace it here: {link}"));
        assert_eq!(text, format!("  Replace it here:\n  {link}"));
    }

    proptest! {
        #[test]
        fn lines_fit_and_nothing_is_lost(text in "(\\PC{0,90} ?){0,6}", indent in 0usize..20) {
            prop_assume!(!text.contains("://"));
            let wrapped = hanging(&" ".repeat(indent), &text);
            for line in wrapped.lines() {
                prop_assert!(line.width() <= COLUMNS, "{line:?}");
            }
            let letters = |text: &str| text.split_whitespace().collect::<String>();
            prop_assert_eq!(letters(&wrapped), letters(&text));
        }
    }
}
