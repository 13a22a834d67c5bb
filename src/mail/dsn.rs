//! Reads delivery status notifications (RFC 3464): what a mail system says of a mail that it took and could not deliver.
//!
//! Guarantees that any bytes are read to an end: what is not a notification is an error, never a panic. Says what is
//! written there and no more: what it means is [`super::outcome`]'s, and whether to believe it is for whoever calls, as
//! anybody can write one.

use mail_parser::{Message, MessageParser, MimeHeaders, PartType};
use uuid::Uuid;

use crate::token::{Address, MessageId, words};

/// How much of a mail is read, in bytes: a notification says what it has to say before the mail that it returns.
pub const MAX_READ: u64 = 256 * 1024;

/// How many recipients are read: our messages have one, which may stand for a list.
const MAX_RECIPIENTS: usize = 100;

/// The headers that tell to which address a mail came: Postfix's, Exim's, and everybody's.
const CAME_TO: [&str; 4] = ["X-Original-To", "Delivered-To", "Envelope-To", "To"];

/// A notification.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notification {
    /// Our message, if the `Message-ID` of the returned mail is one of ours.
    pub about: Option<MessageId>,
    /// What may be the address that the notification was sent to.
    pub came_to: Vec<String>,
    /// What it says of each recipient; at least one.
    pub recipients: Vec<Recipient>,
}

/// What a notification says of one recipient (RFC 3464, section 2.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipient {
    /// The final recipient. Not the original one, of whose mail this may be a copy among others.
    pub address: Option<Address>,
    /// What became of the mail.
    pub action: Action,
    /// The status, `5.1.1` with whatever follows it.
    pub status: String,
    /// What the next server said, after its kind: `smtp; 550 5.1.1 no such user`. Empty where there was none.
    pub diagnostic: String,
}

/// What became of a mail (RFC 3464, section 2.3.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It was given up.
    Failed,
    /// It is still being tried.
    Delayed,
    /// It was delivered.
    Delivered,
    /// It was handed to a system that sends no notifications.
    Relayed,
    /// It was delivered to an address that stands for several.
    Expanded,
}

words!(Action {
    Failed => "failed",
    Delayed => "delayed",
    Delivered => "delivered",
    Relayed => "relayed",
    Expanded => "expanded",
});

/// Why a mail is no notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// There is no header.
    #[error("this is not a mail")]
    NotAMail,
    /// Somebody's machine answers: an absence, a ticket (RFC 3834).
    #[error("this is an automatic answer, and no delivery status notification")]
    AutomaticAnswer,
    /// No part of it is `message/delivery-status`.
    #[error("this is not a delivery status notification (RFC 3464)")]
    NotANotification,
    /// The parser of mails gave up on it.
    #[error("the parts of this mail cannot be told apart")]
    Damaged,
    /// No recipient, or none with an action that exists.
    #[error("this delivery status notification says of no recipient what became of the mail")]
    NoRecipient,
}

/// Reads a mail.
///
/// # Errors
/// [`Unreadable`].
pub fn read(mail: &[u8]) -> Result<Notification, Unreadable> {
    // Fuzzing finds parts nested so wrongly that mail-parser 0.11 fails an assertion of its debug builds.
    std::panic::catch_unwind(|| read_parts(mail)).unwrap_or(Err(Unreadable::Damaged))
}

fn read_parts(mail: &[u8]) -> Result<Notification, Unreadable> {
    let mail = MessageParser::new().parse(mail).ok_or(Unreadable::NotAMail)?;
    let is = |part: &mail_parser::MessagePart<'_>, kind, subtypes: &[&str]| {
        part.content_type().is_some_and(|found| {
            let subtype = found.subtype().unwrap_or_default();
            found.ctype().eq_ignore_ascii_case(kind) && subtypes.iter().any(|one| subtype.eq_ignore_ascii_case(one))
        })
    };
    let status = mail.parts.iter().find(|part| is(part, "message", &["delivery-status", "global-delivery-status"]));
    let Some(status) = status else {
        return Err(if answers_by_itself(&mail) { Unreadable::AutomaticAnswer } else { Unreadable::NotANotification });
    };
    let recipients = recipients(&String::from_utf8_lossy(status.contents()));
    if recipients.is_empty() {
        return Err(Unreadable::NoRecipient);
    }
    let about = mail.parts.iter().find_map(|part| match &part.body {
        PartType::Message(returned) => returned.message_id().and_then(our_id),
        _ if is(part, "text", &["rfc822-headers"]) || is(part, "message", &["rfc822-headers", "global-headers"]) => {
            let returned = MessageParser::new().parse_headers(part.contents())?;
            returned.message_id().and_then(our_id)
        }
        _ => None,
    });
    Ok(Notification { about, came_to: came_to(&mail), recipients })
}

/// What [`super::compose`] makes a `Message-ID` from.
fn our_id(id: &str) -> Option<MessageId> {
    let (id, _) = id.split_once('@')?;
    Uuid::try_parse(id).ok().filter(|_| id.len() == 36).map(MessageId::from)
}

/// RFC 3834, section 5: whatever the value, but `no`.
fn answers_by_itself(mail: &Message<'_>) -> bool {
    mail.header_raw("Auto-Submitted").is_some_and(|value| !value.trim().eq_ignore_ascii_case("no"))
}

fn came_to(mail: &Message<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for name in CAME_TO {
        for (_, value) in mail.headers_raw().filter(|(known, _)| known.eq_ignore_ascii_case(name)) {
            let words = value.split(|c: char| c.is_whitespace() || "<>,;\"()".contains(c));
            found.extend(words.filter(|word| word.contains('@')).map(str::to_owned));
        }
    }
    found
}

/// The groups of fields that speak of a recipient: those with an action that exists.
fn recipients(text: &str) -> Vec<Recipient> {
    let mut found = Vec::new();
    for fields in groups(text) {
        let field = |name| fields.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value.as_str());
        let word = field("action").split_whitespace().next().unwrap_or_default().to_ascii_lowercase();
        let Ok(action) = word.parse() else { continue };
        found.push(Recipient {
            address: address(field("final-recipient")),
            action,
            status: field("status").to_owned(),
            diagnostic: field("diagnostic-code").to_owned(),
        });
        if found.len() == MAX_RECIPIENTS {
            break;
        }
    }
    found
}

/// `rfc822; ann@example.org`, as an address.
fn address(field: &str) -> Option<Address> {
    let (_, address) = field.split_once(';')?;
    Address::parse(address.trim().trim_start_matches('<').trim_end_matches('>')).ok()
}

/// Names in lower case, values on one line; groups are parted by empty lines.
fn groups(text: &str) -> Vec<Vec<(String, String)>> {
    let mut groups = vec![Vec::new()];
    for line in text.lines() {
        let Some(group) = groups.last_mut() else { break };
        if line.trim().is_empty() {
            if !group.is_empty() {
                groups.push(Vec::new());
            }
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = group.last_mut() {
                let value: &mut String = value;
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            group.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    groups
}

#[cfg(test)]
mod tests;
