//! The link to where a token is managed: `mail.manage_url` with its placeholders filled in.
//!
//! Guarantees that a link is `http` or `https`, and that what was typed somewhere else (an external id) is percent-encoded
//! in it and cannot change where it leads. Pure.

use crate::token::Token;

use super::clean::{one_line, percent_encoded};

/// The longest link that every browser and mail program takes, in bytes.
const MAX_LINK: usize = 2_000;

/// How much of a link an error shows, in characters.
const SHOWN: usize = 200;

/// A link with placeholders.
#[derive(Clone, Debug)]
pub struct ManageUrl(Vec<Part>);

#[derive(Clone, Debug)]
enum Part {
    Text(String),
    TokenId,
    OwnerId,
    ExternalId,
}

/// A link that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} cannot be used as a link: {problem}")]
pub struct BadUrl {
    /// What was given.
    pub url: String,
    /// What is wrong, and what would be right.
    pub problem: &'static str,
}

impl ManageUrl {
    /// Reads a link with the placeholders `{token_id}`, `{owner_id}` and `{external_id}`.
    ///
    /// # Errors
    /// When it is not `http` or `https`, or has another placeholder, or a character that a link cannot have.
    pub fn parse(url: &str) -> Result<Self, BadUrl> {
        let bad = |problem| BadUrl { url: one_line(url, SHOWN), problem };
        if !["https://", "http://"].iter().any(|scheme| url.len() > scheme.len() && url.starts_with(scheme)) {
            return Err(bad("it begins with https:// or http://"));
        }
        if url.chars().any(|c| c.is_whitespace() || c.is_control() || "<>\"".contains(c)) {
            return Err(bad("it has a character that a link cannot have"));
        }
        let mut parts = Vec::new();
        let mut rest = url;
        while let Some((before, from)) = rest.split_once('{') {
            let (name, after) = from.split_once('}').ok_or_else(|| bad("a { is not closed"))?;
            parts.push(Part::Text(before.to_owned()));
            parts.push(match name {
                "token_id" => Part::TokenId,
                "owner_id" => Part::OwnerId,
                "external_id" => Part::ExternalId,
                _ => return Err(bad("the placeholders are {token_id}, {owner_id} and {external_id}")),
            });
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        Ok(Self(parts))
    }

    /// The link for a token; `None` where an external id makes it longer than programs take.
    pub fn of(&self, token: &Token) -> Option<String> {
        let fill = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::TokenId => token.id.to_string(),
            Part::OwnerId => token.owner.to_string(),
            Part::ExternalId => percent_encoded(token.external_id.as_deref().unwrap_or_default()),
        };
        let link: String = self.0.iter().map(fill).collect();
        (link.len() <= MAX_LINK).then_some(link)
    }
}
