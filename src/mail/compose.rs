//! From a letter to the mail that is sent: text, HTML, calendar file and headers.
//!
//! Guarantees that a message is composed the same way at each attempt, byte for byte, as long as its reminders and the
//! time are the same, and always under the same `Message-ID`, so that a receiver can drop a repetition. Relies on
//! [`super::view`] to make strangers' texts harmless: nothing that a user typed becomes a header or a link. Templates are
//! read and compiled before, as [`Templates`]. No I/O, and no clock.

use std::time::{Duration, SystemTime};

use lettre::address::Envelope;
use lettre::message::header::{ContentTransferEncoding, ContentType, HeaderName, HeaderValue};
use lettre::message::{Attachment, Body, Mailbox, MultiPart, SinglePart};
use memchr::{memchr, memchr2};
use minijinja::value::Value;

use crate::clock::Timestamp;
use crate::token::ContactId;

use super::calendar::{self, Method};
use super::clean::header_line;
use super::letter::{Content, Item, Kind, Letter};
use super::manage_url::{BadUrl, ManageUrl};
use super::return_path::ReturnPath;
use super::templates::{BadTemplates, Language, Templates, Written};
use super::view::{self, Entry, LISTED, SHOWN};

/// What the calendar files are called: of deadlines that hold, and of those that no longer do.
const PUBLISHED: &str = "deadlines.ics";
const CANCELLED: &str = "withdrawn.ics";

/// A calendar file that goes with a mail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calendar {
    /// What it is called.
    pub name: &'static str,
    /// What it holds (RFC 5545).
    pub text: String,
    method: Method,
}

/// How long a line of a mail may be, in bytes without its end (RFC 5322, section 2.1.1).
const LONGEST_LINE: usize = 998;

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
    #[error(transparent)]
    ManageUrl(#[from] BadUrl),
    /// Templates cannot be used.
    #[error(transparent)]
    Templates(#[from] BadTemplates),
    /// A template fails on this letter.
    #[error("a mail template is wrong: {0}")]
    Template(#[from] minijinja::Error),
    /// A part of the mail cannot be described.
    #[error("a part of the mail has no type: {0}")]
    Part(#[from] lettre::message::header::ContentTypeErr),
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
    templates: Templates,
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
            templates: Templates::built_in()?,
        })
    }

    /// The same, with a return path of its own for each message; without, bounces go to the sender.
    #[must_use]
    pub fn with_return_path(self, return_path: Option<ReturnPath>) -> Self {
        Self { return_path, ..self }
    }

    /// The same with these templates.
    #[must_use]
    pub fn with_templates(self, templates: Templates) -> Self {
        Self { templates, ..self }
    }

    /// The templates.
    pub fn templates(&self) -> &Templates {
        &self.templates
    }

    /// Makes a letter into a mail.
    ///
    /// # Errors
    /// [`ComposeError`] when this letter cannot be made into one; others may.
    pub fn compose(&self, letter: &Letter, now: Timestamp) -> Result<Composed, ComposeError> {
        let to: lettre::Address =
            letter.to.address.as_str().parse().map_err(|_| ComposeError::Recipient(letter.to.id))?;
        let (written, calendars) = self.written(letter, now)?;
        let subject = written.subject.clone();
        let bytes = self.put_together(letter, &to, written, calendars, now)?;
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
        self.written(letter, now).map(|(written, _)| written)
    }

    /// The calendar files of a letter; none where no deadline of the reader's own tokens lies ahead, and nothing is corrected.
    ///
    /// # Errors
    /// As [`Composer::write`].
    pub fn calendars(&self, letter: &Letter, now: Timestamp) -> Result<Vec<Calendar>, ComposeError> {
        self.written(letter, now).map(|(_, calendars)| calendars)
    }

    fn written(&self, letter: &Letter, now: Timestamp) -> Result<(Written, Vec<Calendar>), ComposeError> {
        let kind = Kind::of(&letter.content, now);
        let of_contact = letter.to.locale.as_deref();
        match &letter.content {
            Content::Alert(alert) => {
                let language = self.templates.language(of_contact.unwrap_or_default());
                Ok((language.write(kind, &view::alert(*alert, &letter.to, now))?, Vec::new()))
            }
            Content::Reminders(items) | Content::Test(items) => {
                let entries = view::entries(items, &letter.to, now);
                let first = entries.first().ok_or(ComposeError::Nothing)?;
                let language = self.templates.language(of_contact.unwrap_or(&first.item.owner.locale));
                let link = self.manage_url.as_ref();
                let reminders = view::reminders(&entries, link, now, &|token| language.words(token))?;
                let written = language.write(kind, &reminders.known)?;
                let is_test = matches!(letter.content, Content::Test(_));
                let calendars =
                    if is_test { Vec::new() } else { self.calendars_of(&entries, &reminders.own, language, now)? };
                Ok((written, calendars))
            }
        }
    }

    /// The deadlines that a mail lists of the reader's own tokens and that lie ahead; and those that it says do not hold any more.
    fn calendars_of(
        &self,
        entries: &[Entry<'_>],
        tokens: &[Value],
        language: &Language,
        now: Timestamp,
    ) -> Result<Vec<Calendar>, ComposeError> {
        let own = || entries.iter().filter(|entry| entry.item.escalation.is_none());
        let (mut published, mut cancelled) = (Vec::new(), Vec::new());
        for (entry, token) in own().filter(|entry| entry.item.overtaken.is_none()).zip(tokens) {
            if !entry.expired {
                published.push(self.event(entry, token, language)?);
            }
        }
        for entry in own().filter(|entry| entry.item.overtaken.is_some()).take(LISTED) {
            let stands = entry.stands(now);
            let events = if stands.is_some() { &mut published } else { &mut cancelled };
            let entry = stands.as_ref().unwrap_or(entry);
            if !entry.expired {
                let token = view::in_words(entry, self.manage_url.as_ref(), now, &|token| language.words(token))?;
                events.push(self.event(entry, &token, language)?);
            }
        }
        let files = [(Method::Publish, PUBLISHED, published), (Method::Cancel, CANCELLED, cancelled)].into_iter();
        let files = files.filter(|(.., events)| !events.is_empty());
        let file = |method, events: &[_]| calendar::file(method, events, &self.from.email, now);
        Ok(files.map(|(method, name, events)| Calendar { name, text: file(method, &events), method }).collect())
    }

    fn event<'a>(
        &self,
        entry: &Entry<'a>,
        token: &Value,
        language: &Language,
    ) -> Result<calendar::Entry<'a>, minijinja::Error> {
        let (title, text) = language.event(token)?;
        let link = self.manage_url.as_ref().and_then(|url| url.of(&entry.item.token));
        Ok(calendar::Entry { token: &entry.item.token, deadline: entry.deadline, title, text, link })
    }

    fn put_together(
        &self,
        letter: &Letter,
        to: &lettre::Address,
        written: Written,
        calendars: Vec<Calendar>,
        now: Timestamp,
    ) -> Result<Vec<u8>, ComposeError> {
        let mut mail = lettre::Message::builder()
            .from(self.from.clone())
            .to(Mailbox::new(None, to.clone()))
            // Otherwise lettre reads it back from the headers.
            .envelope(Envelope::new(Some(self.from.email.clone()), vec![to.clone()])?)
            .subject(written.subject)
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
        let multipart = |kind: &str, mark: &str| {
            let kind = format!("multipart/{kind}; boundary=\"lapsed-{mark}-{}\"", letter.message);
            Ok::<_, ComposeError>(MultiPart::builder().header(ContentType::parse(&kind)?))
        };
        let words = multipart("alternative", "words")?
            .singlepart(SinglePart::builder().header(ContentType::TEXT_PLAIN).body(body(written.text)))
            .singlepart(SinglePart::builder().header(ContentType::TEXT_HTML).body(body(written.html)));
        let parts = if calendars.is_empty() { words } else { multipart("mixed", "parts")?.multipart(words) };
        let parts = calendars.into_iter().try_fold(parts, |parts, Calendar { name, text, method }| {
            let kind = ContentType::parse(&format!("text/calendar; charset=utf-8; method={}", method.as_str()))?;
            // Its lines end as those of a mail do, and none is too long.
            let body = if text.is_ascii() { as_it_is(text.into_bytes()) } else { Body::new(text) };
            Ok::<_, ComposeError>(parts.singlepart(Attachment::new(name.to_owned()).body(body, kind)))
        })?;
        Ok(mail.multipart(parts)?.formatted())
    }

    /// What all mails about one token alone have in common, so that a mail program shows the later ones below the first: the
    /// id of a mail that was never sent. A mail about several tokens begins a thread of its own.
    fn thread(&self, letter: &Letter) -> Option<String> {
        let Content::Reminders(items) = &letter.content else { return None };
        let first = items.first()?.token.id;
        let one_token = items.iter().all(|item: &Item| item.token.id == first);
        one_token.then(|| format!("<token-{first}@{}>", self.domain))
    }
}

/// A text that goes as it is where every mail server takes it so: ASCII, and no line too long. lettre would encode lines of
/// more than 76 characters, of which HTML has many.
fn body(text: String) -> Body {
    match with_line_ends(&text) {
        Some(bytes) => as_it_is(bytes),
        None => Body::new(text),
    }
}

fn as_it_is(bytes: Vec<u8>) -> Body {
    Body::dangerous_pre_encoded(bytes, ContentTransferEncoding::SevenBit)
}

/// The text with the line ends of a mail; `None` where it must be encoded.
fn with_line_ends(text: &str) -> Option<Vec<u8>> {
    let text = text.as_bytes();
    if !text.is_ascii() || memchr2(b'\0', b'\r', text).is_some() {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() + text.len() / 16);
    let mut rest = text;
    loop {
        let (line, after) = match memchr(b'\n', rest) {
            Some(end) => (&rest[..end], Some(&rest[end + 1..])),
            None => (rest, None),
        };
        if line.len() > LONGEST_LINE {
            return None;
        }
        bytes.extend_from_slice(line);
        match after {
            Some(after) => {
                bytes.extend_from_slice(b"\r\n");
                rest = after;
            }
            None => return Some(bytes),
        }
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
