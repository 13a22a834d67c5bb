//! Writes a style sheet into the elements of a template, as mail programs want it.
//!
//! The template's own code is hidden in comments meanwhile, which may stand anywhere in HTML but within a tag. That it is
//! all there again afterwards is checked. Done once, when templates are read.

use std::borrow::Cow;

use css_inline::{CSSInliner, InlineError};

/// The HTML of a template with the style sheet's declarations in the elements that they are for. Existing `style` elements
/// stay as they are.
///
/// # Errors
/// What is wrong with the template or the style sheet.
pub(super) fn inline(source: &str, css: &str) -> Result<String, String> {
    let (hidden, code) = hide(source);
    let wrong = |error: InlineError| format!("style.css cannot be written into it: {error}");
    let inliner = CSSInliner::options().inline_style_tags(false).keep_style_tags(true).load_remote_stylesheets(false);
    let styled = if hidden.contains("<html") {
        inliner.inline_style_tags(false).extra_css(Some(Cow::Borrowed(css))).build().inline(&hidden)
    } else {
        inliner.build().inline_fragment(&hidden, css)
    };
    let mut styled = styled.map_err(wrong)?;
    for (number, code) in code.iter().enumerate() {
        let place = place(number);
        // Within a title the mark is a text, and is escaped like one.
        let escaped = place.replace('<', "&lt;").replace('>', "&gt;");
        let found = [place, escaped].into_iter().find(|place| styled.matches(place.as_str()).count() == 1);
        match found {
            Some(place) => styled = styled.replace(&place, code),
            None => {
                return Err(format!(
                    "{code} stands where code cannot stand: within a tag, it must be in the value of an attribute"
                ));
            }
        }
    }
    Ok(styled)
}

fn place(number: usize) -> String {
    format!("<!--lapsed:{number}-->")
}

/// The template with a comment in the place of each piece of code, and these pieces.
fn hide(source: &str) -> (String, Vec<&str>) {
    let (mut hidden, mut code, mut rest) = (String::with_capacity(source.len()), Vec::new(), source);
    while let Some((at, end)) = next_code(rest) {
        let (before, from) = rest.split_at(at);
        let (piece, after) = from.split_at(end - at);
        hidden.push_str(before);
        hidden.push_str(&place(code.len()));
        code.push(piece);
        rest = after;
    }
    hidden.push_str(rest);
    (hidden, code)
}

/// Where the next piece of code begins and ends, in bytes.
pub(super) fn next_code(source: &str) -> Option<(usize, usize)> {
    let pairs = [("{{", "}}"), ("{%", "%}"), ("{#", "#}")];
    let (at, close) = pairs.iter().filter_map(|(open, close)| Some((source.find(open)?, *close))).min()?;
    let mut end = at + 2;
    let mut quote = None;
    while let Some(rest) = source.get(end..) {
        let Some(c) = rest.chars().next() else { return Some((at, source.len())) };
        match quote {
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if rest.starts_with(close) => return Some((at, end + close.len())),
            // Comments may have apostrophes.
            None if close != "#}" && (c == '"' || c == '\'') => quote = Some(c),
            None => {}
        }
        end += c.len_utf8();
    }
    Some((at, source.len()))
}
