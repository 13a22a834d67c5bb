//! From a message's reminders to the mail that is sent: text, HTML and headers.
//!
//! Guarantees that a message is composed the same way at each attempt, byte for byte, as long as its reminders and the
//! time are the same, and always under the same `Message-ID`, so that a receiver can drop a repetition. Relies on
//! [`super::clean`] to make strangers' texts harmless: nothing that a user typed becomes a header or a link. Templates are
//! read once, when a [`Composer`] is made, and an unknown variable in one is an error. No I/O, and no clock.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use chrono_tz::Tz;
use lettre::message::header::{HeaderName, HeaderValue};
use lettre::message::{Mailbox, MultiPart, MultiPartBuilder, MultiPartKind, SinglePart};
use minijinja::value::Value;
use minijinja::{Environment, UndefinedBehavior, context};

use crate::clock::Timestamp;
use crate::policy::Lead;
use crate::token::{Contact, ContactId, MessageId, Owner, Token, text};

use super::clean::{header_line, one_line, percent_encoded, unlinked};
use super::return_path::ReturnPath;
use super::when::{DayPhrase, date_phrase, day_phrase, exact};
use super::wrap::hanging;

/// How many tokens a mail lists in each of its two parts; the rest is counted.
pub const LISTED: usize = 50;

/// How much of a description a subject quotes, in characters.
const QUOTED: usize = 60;
/// How much of other texts is shown, in characters.
const SHOWN: usize = 200;
/// How many of a token's scopes are shown.
const SCOPES: usize = 20;
/// The longest link that every browser and mail program takes, in bytes.
const MAX_LINK: usize = 2_000;
/// Columns of the labels in the text.
const LABEL: usize = 10;

/// What one message has to say, and to whom.
#[derive(Clone, Debug)]
pub struct Letter {
    /// The message.
    pub message: MessageId,
    /// Who it goes to.
    pub to: Contact,
    /// What it says.
    pub content: Content,
}

/// What a message says.
#[derive(Clone, Debug)]
pub enum Content {
    /// Reminders, in any order.
    Reminders(Vec<Item>),
    /// Something for whoever operates lapsed.
    Alert(Alert),
}

/// What somebody who operates lapsed must hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alert {
    /// A guard holds messages back.
    Held {
        /// How many.
        messages: u64,
        /// Since when the first of them.
        since: Timestamp,
        /// The next deadline that they speak of.
        next_deadline: Option<Timestamp>,
        /// Whether it is told of because that deadline is near.
        urgent: bool,
    },
    /// A guard keeps so many tokens from being marked expired.
    Expiry {
        /// How many.
        tokens: u64,
    },
}

/// One reminder.
#[derive(Clone, Debug)]
pub struct Item {
    /// The token as it is now.
    pub token: Token,
    /// Whose it is.
    pub owner: Owner,
    /// At which lead the reminder was owed. The wording follows the deadline and the time, not the lead.
    pub lead: Lead,
    /// Where the fallback is told instead of the owner: why.
    pub escalation: Option<String>,
}

/// A mail, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Composed {
    /// The envelope's sender: where bounces go.
    pub from: lettre::Address,
    /// The envelope's recipient.
    pub to: lettre::Address,
    /// The subject, as people read it.
    pub subject: String,
    /// The mail (RFC 5322), with lines ending in CR LF. ASCII, unless the address is not.
    pub bytes: Vec<u8>,
}

/// What a mail says, as people read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The subject.
    pub subject: String,
    /// For programs that show plain text.
    pub text: String,
    /// The same for programs that show HTML.
    pub html: String,
}

/// Why a mail cannot be made. Names no address.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// The letter has no token with a deadline.
    #[error("the message has nothing to say")]
    Nothing,
    /// The contact's address, as the store has it, is none.
    #[error("the address of contact {0} is not a mail address")]
    Recipient(ContactId),
    /// The sender's domain cannot be written in ASCII.
    #[error("{0:?} is not a domain name")]
    Domain(String),
    /// The link to where tokens are managed.
    #[error("{url:?} cannot be used as a link: {problem}")]
    ManageUrl {
        /// What was given.
        url: String,
        /// What is wrong, and what would be right.
        problem: &'static str,
    },
    /// A template is wrong.
    #[error("a mail template is wrong: {0}")]
    Template(#[from] minijinja::Error),
    /// The parts do not make a mail.
    #[error("the mail cannot be put together: {0}")]
    Mail(#[from] lettre::error::Error),
    /// The mailbox that bounces are to come to.
    #[error("no return path can be made: {0}")]
    ReturnPath(#[from] lettre::address::AddressError),
}

/// Makes mails; one for the whole process.
#[derive(Debug)]
pub struct Composer {
    from: Mailbox,
    domain: String,
    reply_to: Option<Mailbox>,
    return_path: Option<ReturnPath>,
    manage_url: Option<ManageUrl>,
    templates: Environment<'static>,
}

impl Composer {
    /// A composer with the built-in templates.
    ///
    /// `manage_url` is where owners manage a token, with the placeholders `{token_id}`, `{owner_id}` and
    /// `{external_id}`.
    ///
    /// # Errors
    /// [`ComposeError`] when the link or the sender's domain cannot be used, or a template does not parse.
    pub fn new(from: Mailbox, reply_to: Option<Mailbox>, manage_url: Option<String>) -> Result<Self, ComposeError> {
        let from = clean_mailbox(from)?;
        Ok(Self {
            domain: from.email.domain().to_owned(),
            from,
            reply_to: reply_to.map(clean_mailbox).transpose()?,
            return_path: None,
            manage_url: manage_url.as_deref().map(ManageUrl::parse).transpose()?,
            templates: templates()?,
        })
    }

    /// The same, with a return path of its own for each message; without, bounces go to the sender.
    #[must_use]
    pub fn with_return_path(self, return_path: Option<ReturnPath>) -> Self {
        Self { return_path, ..self }
    }

    /// Makes a letter into a mail.
    ///
    /// # Errors
    /// [`ComposeError`] when this letter cannot be made into one; others may.
    pub fn compose(&self, letter: &Letter, now: Timestamp) -> Result<Composed, ComposeError> {
        let to: lettre::Address =
            letter.to.address.as_str().parse().map_err(|_| ComposeError::Recipient(letter.to.id))?;
        let Written { subject, text, html } = self.write(letter, now)?;
        let bytes = self.put_together(letter, &to, &subject, text, html, now)?;
        let from = match &self.return_path {
            Some(return_path) => return_path.of(letter.message)?,
            None => self.from.email.clone(),
        };
        Ok(Composed { from, to, subject, bytes })
    }

    /// What a letter says, as people read it.
    ///
    /// # Errors
    /// As [`Composer::compose`], but for those that are about addresses.
    pub fn write(&self, letter: &Letter, now: Timestamp) -> Result<Written, ComposeError> {
        match &letter.content {
            Content::Reminders(items) => self.reminders(letter, items, now),
            Content::Alert(alert) => self.alert(letter, *alert, now),
        }
    }

    fn reminders(&self, letter: &Letter, items: &[Item], now: Timestamp) -> Result<Written, ComposeError> {
        let mut entries: Vec<Entry<'_>> = items.iter().filter_map(|item| Entry::new(item, letter, now)).collect();
        if entries.is_empty() {
            return Err(ComposeError::Nothing);
        }
        entries.sort_by(|a, b| {
            (a.deadline, &a.item.token.description, a.item.token.id).cmp(&(
                b.deadline,
                &b.item.token.description,
                b.item.token.id,
            ))
        });
        let (escalated, own): (Vec<_>, Vec<_>) = entries.iter().partition(|entry| entry.item.escalation.is_some());
        let (own, escalated) = (self.part(&own), self.part(&escalated));
        self.render([SUBJECT, TEXT, HTML], &context! { own, escalated })
    }

    fn alert(&self, letter: &Letter, alert: Alert, now: Timestamp) -> Result<Written, ComposeError> {
        let zone = letter.to.time_zone.unwrap_or(Tz::UTC);
        let (kind, count, since, deadline) = match alert {
            Alert::Held { messages, since, next_deadline, urgent } => {
                (if urgent { "held_urgent" } else { "held" }, messages, Some(since), next_deadline)
            }
            Alert::Expiry { tokens } => ("expiry", tokens, None, None),
        };
        let deadline = deadline.filter(|deadline| *deadline > now);
        let instant = |at: Option<Timestamp>| at.map(|at| exact(at, zone));
        let context = context! { kind, count, since => instant(since), deadline => instant(deadline) };
        self.render([ALERT_SUBJECT, ALERT_TEXT, ALERT_HTML], &context)
    }

    /// The subject first: the other two repeat it.
    fn render(&self, [subject, text, html]: [&str; 3], context: &Value) -> Result<Written, ComposeError> {
        let subject = header_line(&self.templates.get_template(subject)?.render(context)?, SHOWN);
        let context = context! { subject => unlinked(&subject), ..context.clone() };
        let text = self.templates.get_template(text)?.render(&context)?;
        let html = self.templates.get_template(html)?.render(&context)?;
        Ok(Written { subject, text, html })
    }

    fn put_together(
        &self,
        letter: &Letter,
        to: &lettre::Address,
        subject: &str,
        text: String,
        html: String,
        now: Timestamp,
    ) -> Result<Vec<u8>, ComposeError> {
        let mut mail = lettre::Message::builder()
            .from(self.from.clone())
            .to(Mailbox::new(None, to.clone()))
            .subject(subject)
            .date(date(now))
            .message_id(Some(format!("<{}@{}>", letter.message, self.domain)))
            .raw_header(header("Auto-Submitted", "auto-generated"))
            .raw_header(header("X-Auto-Response-Suppress", "All"));
        if let Some(reply_to) = &self.reply_to {
            mail = mail.reply_to(reply_to.clone());
        }
        if let Some(thread) = self.thread(letter) {
            mail = mail.references(thread);
        }
        let parts = MultiPartBuilder::new()
            .kind(MultiPartKind::Alternative)
            .boundary(format!("lapsed-{}", letter.message))
            .singlepart(SinglePart::plain(text))
            .singlepart(SinglePart::html(html));
        let parts: MultiPart = parts;
        Ok(mail.multipart(parts)?.formatted())
    }

    /// What the reminders of one owner have in common, so that a mail program shows them together: the id of a mail
    /// that was never sent.
    fn thread(&self, letter: &Letter) -> Option<String> {
        let Content::Reminders(items) = &letter.content else { return None };
        let first = items.first()?.owner.id;
        let one_owner = items.iter().all(|item| item.owner.id == first);
        one_owner.then(|| format!("<owner-{first}@{}>", self.domain))
    }

    /// What the templates know of one part of the letter: the owner's own tokens, or those of owners that were not told.
    fn part(&self, entries: &[&Entry<'_>]) -> Value {
        let expired = entries.iter().filter(|entry| entry.expired).count();
        let owners: HashSet<_> = entries.iter().map(|entry| entry.item.owner.id).collect();
        let listed: Vec<Value> = entries.iter().take(LISTED).map(|entry| self.view(entry)).collect();
        let day = entries.first().map(|first| DayPhrase { left: None, ..first.day });
        let day = day.filter(|day| entries.iter().all(|entry| entry.day.days == day.days));
        context! {
            count => entries.len(),
            expired,
            owners => owners.len(),
            unlisted => entries.len() - listed.len(),
            day => day.map(|day| day.to_string()),
            first => listed.first().cloned(),
            listed,
        }
    }

    /// What the templates know of one token.
    fn view(&self, entry: &Entry<'_>) -> Value {
        let Item { token, owner, escalation, .. } = entry.item;
        let shown = |text: &str| unlinked(&one_line(text, SHOWN));
        let scopes = token.scopes.iter().take(SCOPES).map(|scope| shown(scope)).collect::<Vec<_>>().join(", ");
        let more = token.scopes.len().saturating_sub(SCOPES);
        context! {
            id => token.id.to_string(),
            short_id => token.id.short(),
            title => one_line(&token.description, QUOTED),
            description => unlinked(&one_line(&token.description, text::MAX_DESCRIPTION)),
            owner => shown(&owner.name),
            owner_key => shown(&owner.key),
            kind => token.kind.as_str(),
            hint => token.hint.as_deref().map(shown),
            issued => token.issued,
            external_id => token.external_id.as_deref().map(shown),
            scopes => if more > 0 { format!("{scopes} and {more} more") } else { scopes },
            expired => entry.expired,
            day => entry.day.to_string(),
            date => date_phrase(entry.deadline, entry.zone),
            exact => exact(entry.deadline, entry.zone),
            utc => exact(entry.deadline, Tz::UTC),
            link => self.manage_url.as_ref().and_then(|url| url.of(token)),
            why => escalation.as_deref().map(shown),
        }
    }
}

/// An item with what is computed from it once.
struct Entry<'a> {
    item: &'a Item,
    zone: Tz,
    deadline: Timestamp,
    day: DayPhrase,
    expired: bool,
}

impl<'a> Entry<'a> {
    /// `None` where the token has no deadline: there is nothing to say about it.
    fn new(item: &'a Item, letter: &Letter, now: Timestamp) -> Option<Self> {
        let deadline = item.token.expires_at?;
        let zone = letter.to.time_zone.unwrap_or(item.owner.time_zone);
        Some(Self { item, zone, deadline, day: day_phrase(deadline, now, zone), expired: deadline <= now })
    }
}

const SUBJECT: &str = "reminder/subject.txt";
const TEXT: &str = "reminder/body.txt";
const HTML: &str = "reminder/body.html";
const ALERT_SUBJECT: &str = "alert/subject.txt";
const ALERT_TEXT: &str = "alert/body.txt";
const ALERT_HTML: &str = "alert/body.html";

fn templates() -> Result<Environment<'static>, minijinja::Error> {
    let mut templates = Environment::new();
    templates.set_undefined_behavior(UndefinedBehavior::Strict);
    let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    templates.set_syntax(syntax);
    templates.add_filter("wrap", |text: String, first: Option<String>| hanging(&first.unwrap_or_default(), &text));
    templates.add_filter("field", |text: String, label: String| hanging(&format!("  {label:LABEL$}"), &text));
    templates.add_template(SUBJECT, include_str!("../../config/templates/reminder/subject.txt"))?;
    templates.add_template(TEXT, include_str!("../../config/templates/reminder/body.txt"))?;
    templates.add_template(HTML, include_str!("../../config/templates/reminder/body.html"))?;
    templates.add_template(ALERT_SUBJECT, include_str!("../../config/templates/alert/subject.txt"))?;
    templates.add_template(ALERT_TEXT, include_str!("../../config/templates/alert/body.txt"))?;
    templates.add_template(ALERT_HTML, include_str!("../../config/templates/alert/body.html"))?;
    Ok(templates)
}

/// A link with placeholders.
#[derive(Clone, Debug)]
struct ManageUrl(Vec<Part>);

#[derive(Clone, Debug)]
enum Part {
    Text(String),
    TokenId,
    OwnerId,
    ExternalId,
}

impl ManageUrl {
    fn parse(url: &str) -> Result<Self, ComposeError> {
        let bad = |problem| ComposeError::ManageUrl { url: one_line(url, SHOWN), problem };
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
    fn of(&self, token: &Token) -> Option<String> {
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

/// A mailbox whose name is one plain line (lettre panics at a line break in it) and whose domain is ASCII.
fn clean_mailbox(mailbox: Mailbox) -> Result<Mailbox, ComposeError> {
    let name = mailbox.name.map(|name| header_line(&name, SHOWN)).filter(|name| !name.is_empty());
    let domain = mailbox.email.domain();
    if domain.is_ascii() {
        return Ok(Mailbox::new(name, mailbox.email));
    }
    let bad = || ComposeError::Domain(domain.to_owned());
    let ascii = idna::domain_to_ascii(domain).map_err(|_| bad())?;
    let email = lettre::Address::new(mailbox.email.user(), ascii).map_err(|_| bad())?;
    Ok(Mailbox::new(name, email))
}

fn header(name: &'static str, value: &str) -> HeaderValue {
    HeaderValue::new(HeaderName::new_from_ascii_str(name), value.to_owned())
}

/// The instant as lettre wants it, within the years 1970 to 9999, which are all that it can write.
fn date(now: Timestamp) -> SystemTime {
    let seconds = u64::try_from(now.timestamp()).unwrap_or(0).min(253_402_300_799);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

#[cfg(test)]
mod tests;
