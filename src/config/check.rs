//! From merged values to settings: what each key means, and what is impossible.
//!
//! Guarantees that every key is read, whatever is wrong with the others, and that settings which come out fit
//! together. Reads the file that `store.url_file` names, and no other; nothing is connected to.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use chrono::TimeDelta;
use chrono_tz::Tz;
use lettre::Address;
use lettre::message::Mailbox;

use super::reader::{Reader, Reported};
use super::{
    Bounce, Guard, Http, Limit, Log, LogFormat, Mail, PolicyFor, Reminders, Retention, Schedule, Settings, Store,
    StoreUrl, Transport, parse_duration, smtp,
};
use crate::digest::Digest;
use crate::policies::{Match, Pattern};
use crate::schedule::Cron;
use crate::telemetry;
use crate::token::{self, text};

/// What `mail.manage_url` may hold between braces.
const PLACEHOLDERS: [&str; 3] = ["token_id", "owner_id", "external_id"];

/// Where systemd finds the credentials of our units, and where root finds them, too.
const CREDENTIAL_STORE: &str = "/etc/credstore";

/// The values of `mail.transport`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Maildir,
    Smtp,
}

/// Reads everything. The settings are good only if the reader has no problem at the end.
pub(super) fn settings(r: &mut Reader) -> Result<Settings, Reported> {
    let store = store(r);
    let schedule = schedule(r);
    let reminders = reminders(r);
    let digest = digest(r);
    let mail = mail(r);
    let guard = guard(r);
    let retention = retention(r);
    let http = http(r);
    let log = log(r);
    Ok(Settings {
        store: store?,
        schedule: schedule?,
        reminders: reminders?,
        digest: digest?,
        mail: mail?,
        guard: guard?,
        retention: retention?,
        http: http?,
        log: log?,
    })
}

fn store(r: &mut Reader) -> Result<Store, Reported> {
    let url = match r.optional("store.url_file", path)? {
        Some(file) => std::fs::read_to_string(&file)
            .map_err(|error| format!("cannot be read: {error}"))
            .and_then(|text| StoreUrl::parse(&text).map_err(|why| format!("the URL in this file {why}")))
            .map_err(|why| r.report("store.url_file", why))?,
        None => r.required("store.url", StoreUrl::parse)?,
    };
    Ok(Store { url })
}

fn schedule(r: &mut Reader) -> Result<Schedule, Reported> {
    let zone = r.required("schedule.time_zone", text::time_zone);
    // Where the zone is wrong, the expressions are read all the same: all mistakes are reported at once.
    let in_zone = *zone.as_ref().unwrap_or(&Tz::UTC);
    let cron = |text: &str| Cron::parse(text, in_zone);
    let expire = r.required("schedule.expire", cron);
    let remind = r.required("schedule.remind", cron);
    let deliver = r.required("schedule.deliver", cron);
    let purge = r.required("schedule.purge", cron);
    let reconcile = r.required("schedule.reconcile", cron);
    zone?;
    Ok(Schedule { expire: expire?, remind: remind?, deliver: deliver?, purge: purge?, reconcile: reconcile? })
}

fn reminders(r: &mut Reader) -> Result<Reminders, Reported> {
    let lead_times = r.list("reminders.lead_times", lead_time);
    let expired_notice = r.flag("reminders.expired_notice");
    let stale_after = r.required("reminders.stale_after", parse_duration);
    let skip_unused = r.required("reminders.unused", |text| match text {
        "mention" => Ok(false),
        "skip" => Ok(true),
        _ => Err("must be \"mention\" or \"skip\"".to_owned()),
    });

    let policies: Vec<_> = (1..=r.sections("reminders.policy")).map(|number| policy(r, number)).collect();

    let lead_times = longest_first(lead_times?);
    Ok(Reminders {
        lead_times,
        expired_notice: expired_notice?,
        stale_after: stale_after?,
        skip_unused: skip_unused?,
        policies: policies.into_iter().collect::<Result<_, _>>()?,
    })
}

/// The policy of this number, counted from 1.
fn policy(r: &mut Reader, number: usize) -> Result<PolicyFor, Reported> {
    let key = |name: &str| format!("reminders.policy[{number}].{name}");
    let kind = r.optional(&key("match.kind"), |text| {
        text.parse().map_err(|()| "must be \"primary\" or \"additional\"".to_owned())
    });
    let scope = r.optional(&key("match.scope"), |text| Pattern::parse(text, false));
    let owner = r.optional(&key("match.owner"), |text| Pattern::parse(text, false));
    let description = r.optional(&key("match.description"), |text| Pattern::parse(text, true));
    let mut list = None;
    if r.has(&key("lead_times")) {
        list = Some(r.list(&key("lead_times"), lead_time));
    }
    let window = r.optional(&key("window"), str::parse);
    let contacts = if r.has(&key("contacts")) {
        r.list(&key("contacts"), |text| token::Address::parse(text).map_err(|problem| problem.to_string()))
    } else {
        Ok(Vec::new())
    };
    let matches = Match { kind: kind?, scope: scope?, owner: owner?, description: description? };
    if matches == Match::default() {
        let missing = "says for which tokens it is: write at least one of kind, scope, owner and description";
        return Err(r.report(&key("match"), missing));
    }
    Ok(PolicyFor { matches, lead_times: list.transpose()?.map(longest_first), window: window?, contacts: contacts? })
}

fn longest_first(mut lead_times: Vec<TimeDelta>) -> Vec<TimeDelta> {
    lead_times.sort_unstable_by(|a, b| b.cmp(a));
    lead_times
}

fn digest(r: &mut Reader) -> Result<Digest, Reported> {
    let hold = r.required("digest.hold", parse_duration);
    let window = r.optional("digest.window", str::parse);
    let min_interval = r.optional("digest.min_interval", positive);
    let urgent_within = r.required("digest.urgent_within", parse_duration);
    Ok(Digest { hold: hold?, window: window?, min_interval: min_interval?, urgent_within: urgent_within? })
}

fn mail(r: &mut Reader) -> Result<Mail, Reported> {
    let way = r.optional("mail.transport", |text| match text {
        "maildir" => Ok(Way::Maildir),
        "smtp" => Ok(Way::Smtp),
        _ => Err("must be \"maildir\" or \"smtp\"".to_owned()),
    });
    let from = r.optional("mail.from", mailbox);
    let reply_to = r.optional("mail.reply_to", mailbox);
    let fallback_to = r.optional("mail.fallback_to", address);
    let give_up_after = r.required("mail.give_up_after", positive);
    let manage_url = r.optional("mail.manage_url", manage_url);
    let templates = r.optional("mail.templates", directory);
    // Read whether or not it is the chosen way: a mistake should not wait until somebody switches.
    let smtp = smtp::smtp(r);
    let maildir = r.optional("mail.maildir.path", path);
    let bounce = bounce(r);

    let transport = match way? {
        None => None,
        Some(Way::Smtp) => Some(Transport::Smtp(Box::new(smtp?))),
        Some(Way::Maildir) => match maildir? {
            Some(path) => Some(Transport::Maildir { path }),
            None => {
                return Err(r.report("mail.maildir.path", "must name a directory when mail.transport is \"maildir\""));
            }
        },
    };
    Ok(Mail {
        transport,
        from: from?,
        reply_to: reply_to?,
        fallback_to: fallback_to?,
        give_up_after: give_up_after?,
        manage_url: manage_url?,
        templates: templates?,
        bounce: bounce?,
    })
}

fn guard(r: &mut Reader) -> Result<Guard, Reported> {
    let messages_per_hour = r.required("guard.messages_per_hour", limit);
    let expired_per_hour = r.required("guard.expired_per_hour", limit);
    Ok(Guard { messages_per_hour: messages_per_hour?, expired_per_hour: expired_per_hour? })
}

fn limit(text: &str) -> Result<Limit, String> {
    match (text, text.parse::<u64>()) {
        ("auto", _) => Ok(Limit::Auto),
        (_, Ok(0)) => Ok(Limit::None),
        (_, Ok(most)) => Ok(Limit::PerHour(most)),
        _ => Err("must be \"auto\" or a whole number; 0 is for no limit".to_owned()),
    }
}

fn bounce(r: &mut Reader) -> Result<Option<Bounce>, Reported> {
    let mailbox = r.optional("mail.bounce.address", bounce_mailbox);
    let key_file = r.optional("mail.bounce.key_file", path);
    match (mailbox?, key_file?) {
        (Some(mailbox), Some(key_file)) => Ok(Some(Bounce { mailbox, key_file })),
        (None, None) => Ok(None),
        (Some(_), None) => Err(r.report("mail.bounce.address", "needs mail.bounce.key_file beside it")),
        (None, Some(_)) => Err(r.report("mail.bounce.key_file", "needs mail.bounce.address beside it")),
    }
}

/// An address that leaves room for what comes between its local part and the `@`; its domain in ASCII.
fn bounce_mailbox(text: &str) -> Result<Address, String> {
    let address = address(text)?;
    if address.user().contains('+') || address.user().len() > Bounce::LONGEST {
        return Err(format!(
            "must have {} characters at most before the @, and no +: a + and what names the message are added",
            Bounce::LONGEST
        ));
    }
    let domain = idna::domain_to_ascii(address.domain()).map_err(|_| "must end in a domain name".to_owned())?;
    Address::new(address.user(), domain).map_err(|error| error.to_string())
}

/// How long tokens that have ended are kept at least: word of it waits for some weeks for other mail.
const LEAST_KEPT: TimeDelta = TimeDelta::days(30);

fn retention(r: &mut Reader) -> Result<Retention, Reported> {
    let reminders = r.required("retention.reminders", positive);
    let messages = r.required("retention.messages", positive);
    let ended_tokens = r.required("retention.ended_tokens", |text| match positive(text)? {
        span if span < LEAST_KEPT => Err(format!(
            "{text:?} is less than 30d: whoever was told of a token's deadline may have to be told that it ended"
        )),
        span => Ok(span),
    });
    Ok(Retention { reminders: reminders?, messages: messages?, ended_tokens: ended_tokens? })
}

fn http(r: &mut Reader) -> Result<Http, Reported> {
    let listen = r.optional("http.listen", |text| {
        let wrong = "must be an address and a port, such as \"127.0.0.1:9464\" or \"[::1]:9464\"";
        text.parse().map_err(|_| wrong.to_owned())
    });
    Ok(Http { listen: listen? })
}

fn log(r: &mut Reader) -> Result<Log, Reported> {
    let level = r.required("log.level", |text| telemetry::validate(text).map(|()| text.to_owned()));
    let format = r.required("log.format", |text| match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        "journald" => Ok(LogFormat::Journald),
        _ => Err("must be \"text\", \"json\" or \"journald\"".to_owned()),
    });
    Ok(Log { level: level?, format: format? })
}

fn lead_time(text: &str) -> Result<TimeDelta, String> {
    let lead = parse_duration(text)?;
    if lead > TimeDelta::zero() {
        Ok(lead)
    } else {
        Err(format!("{text:?} is not before the deadline; the notice at the deadline is reminders.expired_notice"))
    }
}

pub(super) fn positive(text: &str) -> Result<TimeDelta, String> {
    let duration = parse_duration(text)?;
    if duration > TimeDelta::zero() { Ok(duration) } else { Err("must be longer than zero".to_owned()) }
}

pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    Ok(credential(text, std::env::var_os("CREDENTIALS_DIRECTORY").as_deref()))
}

fn directory(text: &str) -> Result<PathBuf, String> {
    let path = path(text)?;
    match std::fs::metadata(&path) {
        Ok(found) if found.is_dir() => Ok(path),
        Ok(_) => {
            Err("is not a directory: it must name one that holds templates, such as reminder/subject.txt".to_owned())
        }
        Err(error) => Err(format!("cannot be read ({error}): it must name a directory that holds templates")),
    }
}

/// A path, where `$CREDENTIALS_DIRECTORY/` at its beginning is the directory of the credentials that systemd hands to a service
/// (systemd.exec(5)); for a command outside of one, the directory that it takes them from.
fn credential(text: &str, directory: Option<&OsStr>) -> PathBuf {
    match text.strip_prefix("$CREDENTIALS_DIRECTORY/") {
        Some(name) => Path::new(directory.unwrap_or(OsStr::new(CREDENTIAL_STORE))).join(name),
        None => PathBuf::from(text),
    }
}

fn address(text: &str) -> Result<Address, String> {
    text.parse().map_err(|_| "must be a mail address alone, such as \"ops@example.org\"".to_owned())
}

/// `address`, or `name <address>` with the name in quotes or not. lettre's own reader ignores what follows the
/// address, and its writer panics on line breaks in a name.
fn mailbox(text: &str) -> Result<Mailbox, String> {
    let wrong =
        || "must be a mail address, such as \"tokens@example.org\" or \"Tokens <tokens@example.org>\"".to_owned();
    if text.contains(char::is_control) {
        return Err("must not hold line breaks or other control characters".to_owned());
    }
    let Some((name, address)) = text.strip_suffix('>').and_then(|text| text.rsplit_once('<')) else {
        return text.parse().map(|address| Mailbox::new(None, address)).map_err(|_| wrong());
    };
    let address: Address = address.trim().parse().map_err(|_| wrong())?;
    let name = name.trim();
    let name = name.strip_prefix('"').and_then(|name| name.strip_suffix('"')).unwrap_or(name);
    if name.contains(['"', '<', '>', '\\']) {
        return Err(wrong());
    }
    let name = (!name.is_empty()).then(|| name.to_owned());
    Ok(Mailbox::new(name, address))
}

fn manage_url(text: &str) -> Result<String, String> {
    let known = PLACEHOLDERS.map(|name| format!("{{{name}}}")).join(", ");
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        let name = rest.get(at..).and_then(|rest| rest.strip_prefix('{')).and_then(|rest| rest.split_once('}'));
        match name {
            Some((name, after)) if PLACEHOLDERS.contains(&name) => rest = after,
            Some((name, _)) => {
                return Err(format!("there is no placeholder {{{name}}}, only {known}"));
            }
            None => {
                return Err(format!("has a brace without its partner; the placeholders are {known}"));
            }
        }
    }
    let host = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"))
        .and_then(|rest| rest.split(['/', '?', '#']).next());
    let plain = text.is_ascii() && !text.contains(|c: char| c.is_whitespace() || "\"<>\\^`|".contains(c));
    match host {
        Some(host) if !host.is_empty() && plain => Ok(text.to_owned()),
        _ => Err("must be a URL, such as \"https://example.org/tokens/{token_id}\"".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_looked_for_where_systemd_keeps_them() {
        let found = |text, directory: Option<&str>| credential(text, directory.map(OsStr::new));
        let once = Some("/run/credentials/lapsed-once.service");
        let key = "$CREDENTIALS_DIRECTORY/key";
        assert_eq!(found(key, once), Path::new("/run/credentials/lapsed-once.service/key"));
        assert_eq!(found(key, None), Path::new("/etc/credstore/key"));
        assert_eq!(found("/etc/key", once), Path::new("/etc/key"));
        assert_eq!(found("x$CREDENTIALS_DIRECTORY/key", once), Path::new("x$CREDENTIALS_DIRECTORY/key"));
    }
}
