//! What an attempt at delivery means: one pure function from what happened to what now.
//!
//! Everything that a mail server, a network or a disk can do to a message is a [`Happened`], and [`decide`] is the only
//! place that says what follows. It is total, and knows neither the store nor the wire.

use chrono::TimeDelta;

use super::dsn::{Action, Notification, Recipient};
use crate::token::Address;

/// The wait after the first failed attempt; it doubles with each further one.
pub const FIRST_RETRY: TimeDelta = TimeDelta::minutes(1);
/// The longest wait between two attempts.
pub const LONGEST_RETRY: TimeDelta = TimeDelta::hours(4);
/// How much of a server's reply is kept, in characters.
const KEPT_REPLY: usize = 500;

/// How far a conversation with a mail server had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Finding and reaching the server; for a Maildir, reaching the directory.
    Connect,
    /// The greeting and EHLO.
    Hello,
    /// STARTTLS and the handshake.
    Tls,
    /// AUTH.
    Auth,
    /// MAIL: the sender and the parameters.
    Mail,
    /// RCPT: the recipient.
    Rcpt,
    /// DATA, and the content up to the final dot.
    Data,
    /// The answer to the final dot.
    Dot,
}

impl Phase {
    /// Whether no message has been mentioned yet, so that none can be at fault.
    pub fn before_any_message(self) -> bool {
        self < Self::Mail
    }

    /// The phase in a log or an error.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Hello => "greeting",
            Self::Tls => "TLS",
            Self::Auth => "AUTH",
            Self::Mail => "MAIL",
            Self::Rcpt => "RCPT",
            Self::Data => "DATA",
            Self::Dot => "end of data",
        }
    }
}

/// What came of an attempt to deliver one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happened {
    /// The server took the message.
    Accepted {
        /// What it said.
        reply: String,
    },
    /// The server answered with a refusal.
    Refused {
        /// To what.
        phase: Phase,
        /// The reply code: 4xx or 5xx.
        code: u16,
        /// The enhanced status code (RFC 3463), where the reply has one.
        enhanced: Option<(u8, u16, u16)>,
        /// What it said, without the code.
        reply: String,
    },
    /// No answer, or none that can be understood, before the final dot was sent: the message was not delivered.
    Broken {
        /// How far it had come.
        phase: Phase,
        /// What broke.
        error: String,
    },
    /// The connection was lost after the final dot: nobody knows whether the message was delivered.
    Unknown {
        /// What broke.
        error: String,
    },
    /// The message belongs to somebody else by now; nothing was sent.
    LostLease,
    /// The message cannot be made, or not be sent to this server in any form.
    Unbuildable {
        /// Why.
        error: String,
    },
    /// Whoever claimed it never said what became of it, again and again: it may be what they died of.
    Deserted {
        /// How often.
        claims: u32,
    },
}

impl Happened {
    /// A refusal with this code and text; reads the enhanced status code off the text.
    pub fn refused(phase: Phase, code: u16, text: &str) -> Self {
        let reply = kept(text);
        Self::Refused { phase, code, enhanced: enhanced_status(&reply), reply }
    }

    /// An acceptance with this text.
    pub fn accepted(text: &str) -> Self {
        Self::Accepted { reply: kept(text) }
    }

    /// Whether the server refused, for good, to begin with this message: the message's fault, unless it is not alone.
    pub fn refused_at_mail(&self) -> bool {
        matches!(self, Self::Refused { phase: Phase::Mail, code: 500..600, .. })
    }

    /// Whether the server let us begin with this message: then it does not refuse everybody.
    pub fn got_past_mail(&self) -> bool {
        match self {
            Self::Accepted { .. } | Self::Unknown { .. } => true,
            Self::Refused { phase, .. } | Self::Broken { phase, .. } => *phase > Phase::Mail,
            Self::LostLease | Self::Unbuildable { .. } | Self::Deserted { .. } => false,
        }
    }

    /// What is worth keeping of it, in one line: no server can say what the store cannot hold.
    pub fn reply(&self) -> String {
        match self {
            Self::Accepted { reply } => reply.clone(),
            Self::Refused { phase, code, reply, .. } => kept(&format!("{}: {code} {reply}", phase.as_str())),
            Self::Broken { phase, error } => kept(&format!("{}: {error}", phase.as_str())),
            Self::Unknown { error } => kept(&format!("outcome unknown: {error}")),
            Self::LostLease => "the lease was lost".to_owned(),
            Self::Unbuildable { error } => kept(&format!("the message cannot be built: {error}")),
            Self::Deserted { claims } => {
                format!("claimed {claims} times by a process that never said what became of it")
            }
        }
    }
}

/// What becomes of the message, and of the delivery as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Done.
    Sent {
        /// The server's reply.
        reply: String,
    },
    /// Try again later.
    Retry {
        /// How much later.
        after: TimeDelta,
        /// What happened.
        reply: String,
        /// Whether the message may have been delivered all the same.
        unknown: bool,
    },
    /// Never again; escalate.
    Failed {
        /// What happened.
        reply: String,
        /// Whether the address is dead, and nothing is to be sent to it any more.
        suppress: bool,
    },
    /// The server takes nobody's mail: no message's attempts move, and delivery waits and probes.
    Pause {
        /// What happened.
        reply: String,
    },
    /// The lease is lost: whoever holds it writes what happens; write nothing.
    Abandon,
}

/// What is known of a message besides what just happened to it.
#[derive(Clone, Copy, Debug)]
pub struct Tried {
    /// The number of this attempt, from 1.
    pub attempt: u32,
    /// How long ago the message was first claimed.
    pub since_first_claim: TimeDelta,
    /// How long after its first claim a message is retried.
    pub give_up_after: TimeDelta,
    /// Whether the message before it, another one, was refused for good at MAIL as well, with none let past in between.
    pub another_refused: bool,
    /// From 0 to 1: spreads retries, so that what failed together does not come back together.
    pub jitter: f64,
}

/// What follows from what happened.
///
/// | what happened | what now |
/// | --- | --- |
/// | accepted (2xx after the dot) | [`Next::Sent`] |
/// | anything but success at connect, greeting, TLS or AUTH, 421 included | [`Next::Pause`]: no message has been mentioned |
/// | 4xx to MAIL, RCPT, DATA or the dot; 421 among them | [`Next::Retry`] |
/// | reset, timeout or nonsense from MAIL to before the dot | [`Next::Retry`] |
/// | connection lost or timeout after the dot | [`Next::Retry`], `unknown`, with the same Message-ID |
/// | 5xx to MAIL for two different messages in a row | [`Next::Pause`] for both: the server refuses everybody |
/// | 5xx to RCPT that means "no such address" | [`Next::Failed`], and the address is suppressed |
/// | any other 5xx from MAIL on | [`Next::Failed`]: size, content and policy are not the address's fault |
/// | the message cannot be built | [`Next::Failed`] |
/// | whoever claimed it died, time and again | [`Next::Failed`] |
/// | the lease was lost | [`Next::Abandon`] |
///
/// A retry waits [`FIRST_RETRY`], doubling with each attempt up to [`LONGEST_RETRY`], of which the jitter takes between
/// half and all. Once the first claim is longer ago than `give_up_after` it becomes [`Next::Failed`] instead, without
/// suppressing the address.
///
/// "No such address", by RFC 3463: 5.1.1 (bad mailbox), 5.1.2 (bad system), 5.1.3 (bad syntax), 5.1.6 (moved away),
/// 5.1.10 (a domain that takes no mail, RFC 7505), 5.2.1 (mailbox disabled). Every other enhanced code speaks of
/// something else: a full mailbox (5.2.2), the sender (5.1.7, 5.1.8), security and policy (5.7.x). Without an enhanced
/// code, 551 (not local) and 553 (mailbox name not allowed) mean it, and 550 means it only when its text speaks of a missing
/// mailbox and not of a policy, because servers answer 550 to both, and an address that is wrongly held to be dead
/// would hear nothing any more.
pub fn decide(happened: &Happened, tried: &Tried) -> Next {
    let reply = happened.reply();
    let retry = |reply: String, unknown| {
        // A first attempt may come late because the server was out of reach: that is not the message's fault.
        if tried.since_first_claim > tried.give_up_after && tried.attempt > 1 {
            Next::Failed { reply: format!("given up; the last attempt ended with {reply}"), suppress: false }
        } else {
            Next::Retry { after: back_off(tried.attempt, tried.jitter), reply, unknown }
        }
    };
    match happened {
        Happened::Accepted { .. } => Next::Sent { reply },
        Happened::Refused { phase, .. } | Happened::Broken { phase, .. } if phase.before_any_message() => {
            Next::Pause { reply }
        }
        refused if refused.refused_at_mail() && tried.another_refused => Next::Pause { reply },
        Happened::Refused { phase, code, enhanced, reply: text } if (500..600).contains(code) => {
            let suppress = *phase == Phase::Rcpt && means_no_such_address(*code, *enhanced, text);
            Next::Failed { reply, suppress }
        }
        Happened::Refused { .. } | Happened::Broken { .. } => retry(reply, false),
        Happened::Unknown { .. } => retry(reply, true),
        Happened::LostLease => Next::Abandon,
        Happened::Unbuildable { .. } | Happened::Deserted { .. } => Next::Failed { reply, suppress: false },
    }
}

/// What a notification means that comes after a server had taken the message for good (RFC 3464).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Later {
    /// It was delivered, or is still being tried.
    Nothing,
    /// It was given up; what [`Next::Failed`] means.
    Failed {
        /// What was said.
        reply: String,
        /// Whether the address is dead.
        suppress: bool,
    },
}

/// What follows from a notification about a message to this address, by the table of [`decide`].
///
/// | what it says | what now |
/// | --- | --- |
/// | `failed`, with a status that means "no such address", of the address itself | [`Later::Failed`], and the address is suppressed |
/// | `failed` with any other status: 4.x.x where a server gave up, 5.x.x | [`Later::Failed`] |
/// | `delayed`, `delivered`, `relayed`, `expanded` | [`Later::Nothing`] |
///
/// What counts is the status, and where that is a mere 5.0.0, the reply that is quoted as the diagnostic. Of an address that
/// a message was passed on to (the address was an alias, or forwards) nothing can be learnt about the address that we know:
/// its mail may have reached others.
pub fn decide_later(notification: &Notification, address: &Address) -> Later {
    let about_it = |recipient: &&Recipient| recipient.address.as_ref() == Some(address);
    let failed = || notification.recipients.iter().filter(|recipient| recipient.action == Action::Failed);
    let (recipient, is_it) = match failed().find(about_it) {
        Some(recipient) => (recipient, true),
        // The mail reached it, or is under way, whatever became of others.
        None if notification.recipients.iter().any(|recipient| about_it(&recipient)) => return Later::Nothing,
        None => match failed().next() {
            Some(recipient) => (recipient, false),
            None => return Later::Nothing,
        },
    };
    let status = enhanced_status(&recipient.status);
    let quoted = recipient.diagnostic.split_once(';').map_or("", |(_, text)| text.trim_start());
    let (code, text) = match quoted.get(..3).map(str::parse) {
        Some(Ok(code)) => (code, quoted[3..].trim_start_matches('-').trim_start()),
        _ => (0, quoted),
    };
    let enhanced = status.filter(|status| !matches!(status, (_, 0, 0))).or_else(|| enhanced_status(text));
    let of_good = status.map_or((500..600).contains(&code), |(class, ..)| class == 5);
    let what = if quoted.is_empty() { &recipient.status } else { quoted };
    Later::Failed {
        reply: kept(&format!("bounced: {what}")),
        suppress: is_it && of_good && means_no_such_address(code, enhanced, text),
    }
}

/// How long to wait after this attempt (from 1): between half and all of the doubled wait, as `jitter` (0 to 1) says.
pub fn back_off(attempt: u32, jitter: f64) -> TimeDelta {
    let doubled = FIRST_RETRY.num_seconds().saturating_mul(1 << attempt.saturating_sub(1).min(20));
    let whole = doubled.min(LONGEST_RETRY.num_seconds());
    let jitter = if jitter.is_nan() { 1.0 } else { jitter.clamp(0.0, 1.0) };
    let half = whole / 2;
    // At most four hours: the product is far below where a float loses whole seconds.
    #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "small and not negative")]
    let more = ((whole - half) as f64 * jitter) as i64;
    TimeDelta::seconds(half + more)
}

/// The enhanced status code that a reply begins with (RFC 2034, section 4): `5.1.1`.
pub fn enhanced_status(reply: &str) -> Option<(u8, u16, u16)> {
    let word = reply.split_whitespace().next()?;
    let mut parts = word.split('.');
    let mut part = |digits: usize| {
        let part = parts.next().filter(|part| (1..=digits).contains(&part.len()))?;
        part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse::<u16>().ok())?
    };
    let (class, subject, detail) = (part(1)?, part(3)?, part(3)?);
    if parts.next().is_some() || !matches!(class, 2 | 4 | 5) {
        return None;
    }
    Some((u8::try_from(class).ok()?, subject, detail))
}

fn means_no_such_address(code: u16, enhanced: Option<(u8, u16, u16)>, text: &str) -> bool {
    match (code, enhanced) {
        (_, Some((5, 1, 1 | 2 | 3 | 6 | 10) | (5, 2, 1))) => true,
        (_, Some(_)) => false,
        (551 | 553, None) => !speaks_of_policy(text),
        (550, None) => speaks_of_a_missing_mailbox(text) && !speaks_of_policy(text),
        _ => false,
    }
}

fn speaks_of_a_missing_mailbox(text: &str) -> bool {
    const WHAT: &[&str] = &["user", "mailbox", "recipient", "address", "account"];
    const IS_MISSING: &[&str] = &[
        "unknown",
        "no such",
        "not exist",
        "doesn't exist",
        "not found",
        "not known",
        "no mailbox",
        "unavailable",
        "invalid",
        "not valid",
        "not a valid",
        "undeliverable",
        "no longer",
        "disabled",
        "inactive",
        "deactivated",
    ];
    contains_any(text, WHAT) && contains_any(text, IS_MISSING)
}

fn speaks_of_policy(text: &str) -> bool {
    const SIGNS: &[&str] = &[
        "polic",
        "spam",
        "block",
        "blacklist",
        "denied",
        "relay",
        "sender",
        "reputation",
        "authenticat",
        "prohibit",
        "dns",
        "rbl",
        "spf",
        "helo",
        "too many",
        "quota",
    ];
    contains_any(text, SIGNS)
}

fn contains_any(text: &str, signs: &[&str]) -> bool {
    let text = text.to_lowercase();
    signs.iter().any(|sign| text.contains(sign))
}

/// What a stranger sent, on one line and not endless.
fn kept(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(KEPT_REPLY).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests;
