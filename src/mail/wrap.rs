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
    let indent = first.width().min(COLUMNS / 2);
    let room = COLUMNS - indent;
    let mut result = first.to_owned();
    let mut used = 0;
    for word in text.split_whitespace().flat_map(|word| pieces(word, room)) {
        let width = word.width();
        if used > 0 && used + 1 + width > room {
            result.push('\n');
            result.extend(std::iter::repeat_n(' ', indent));
            used = 0;
        } else if used > 0 {
            result.push(' ');
            used += 1;
        }
        result.push_str(word);
        used += width;
    }
    result
}

/// A word in pieces that fit into a line.
fn pieces(word: &str, room: usize) -> Vec<&str> {
    if word.contains("://") {
        return vec![word];
    }
    let mut pieces = Vec::new();
    let mut rest = word;
    while rest.width() > room {
        // The width of a text is not the sum of its characters' widths, so ask for each prefix; a word is short.
        let ends = rest.char_indices().map(|(at, c)| at + c.len_utf8());
        let end = ends.take_while(|end| rest[..*end].width() <= room).last();
        let end = end.unwrap_or_else(|| rest.chars().next().map_or(rest.len(), char::len_utf8));
        let (piece, tail) = rest.split_at(end);
        pieces.push(piece);
        rest = tail;
    }
    pieces.push(rest);
    pieces
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
