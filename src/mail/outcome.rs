//! What an attempt at delivery means: one pure function from what happened to what now.
//!
//! Everything that a mail server, a network or a disk can do to a message is a [`Happened`], and [`decide`] is the only
//! place that says what follows. It is total, and knows neither the store nor the wire.

use chrono::TimeDelta;

/// The wait after the first failed attempt; it doubles with each further one.
pub const FIRST_RETRY: TimeDelta = TimeDelta::minutes(1);
/// The longest wait between two attempts.
pub const LONGEST_RETRY: TimeDelta = TimeDelta::hours(4);
/// How long after its first claim a message is retried.
pub const GIVE_UP_AFTER: TimeDelta = TimeDelta::days(2);
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

    /// What is worth keeping of it, in one line: no server can say what the store cannot hold.
    pub fn reply(&self) -> String {
        match self {
            Self::Accepted { reply } => reply.clone(),
            Self::Refused { phase, code, reply, .. } => kept(&format!("{}: {code} {reply}", phase.as_str())),
            Self::Broken { phase, error } => kept(&format!("{}: {error}", phase.as_str())),
            Self::Unknown { error } => kept(&format!("outcome unknown: {error}")),
            Self::LostLease => "the lease was lost".to_owned(),
            Self::Unbuildable { error } => kept(&format!("the message cannot be built: {error}")),
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

/// What follows from what happened.
///
/// | what happened | what now |
/// | --- | --- |
/// | accepted (2xx after the dot) | [`Next::Sent`] |
/// | anything but success at connect, greeting, TLS or AUTH, 421 included | [`Next::Pause`]: no message has been mentioned |
/// | 4xx to MAIL, RCPT, DATA or the dot; 421 among them | [`Next::Retry`] |
/// | reset, timeout or nonsense from MAIL to before the dot | [`Next::Retry`] |
/// | connection lost after the dot | [`Next::Retry`], with the same Message-ID |
/// | 5xx to RCPT that means "no such address" | [`Next::Failed`], and the address is suppressed |
/// | any other 5xx from MAIL on | [`Next::Failed`]: size, content and policy are not the address's fault |
/// | the message cannot be built | [`Next::Failed`] |
/// | the lease was lost | [`Next::Abandon`] |
///
/// A retry waits [`FIRST_RETRY`], doubling with each attempt up to [`LONGEST_RETRY`], of which `jitter` (0 to 1) takes
/// between half and all. Once `since_first_claim` exceeds [`GIVE_UP_AFTER`] it becomes [`Next::Failed`] instead,
/// without suppressing the address. `attempt` is the number of this attempt, from 1.
///
/// "No such address", by RFC 3463: 5.1.1 (bad mailbox), 5.1.2 (bad system), 5.1.3 (bad syntax), 5.1.6 (moved away),
/// 5.1.10 (a domain that takes no mail, RFC 7505), 5.2.1 (mailbox disabled). Every other enhanced code speaks of
/// something else: a full mailbox (5.2.2), the sender (5.1.7, 5.1.8), security and policy (5.7.x). Without an enhanced
/// code, 551 (not local) and 553 (mailbox name not allowed) mean it, and 550 means it only when its text speaks of a missing
/// mailbox and not of a policy, because servers answer 550 to both, and an address that is wrongly held to be dead
/// would hear nothing any more.
pub fn decide(happened: &Happened, attempt: u32, since_first_claim: TimeDelta, jitter: f64) -> Next {
    let reply = happened.reply();
    let retry = |reply: String| {
        // A first attempt may come late because the server was out of reach: that is not the message's fault.
        if since_first_claim > GIVE_UP_AFTER && attempt > 1 {
            Next::Failed { reply: format!("given up; the last attempt ended with {reply}"), suppress: false }
        } else {
            Next::Retry { after: back_off(attempt, jitter), reply }
        }
    };
    match happened {
        Happened::Accepted { .. } => Next::Sent { reply },
        Happened::Refused { phase, .. } | Happened::Broken { phase, .. } if phase.before_any_message() => {
            Next::Pause { reply }
        }
        Happened::Refused { phase, code, enhanced, reply: text } if (500..600).contains(code) => {
            let suppress = *phase == Phase::Rcpt && means_no_such_address(*code, *enhanced, text);
            Next::Failed { reply, suppress }
        }
        Happened::Refused { .. } | Happened::Broken { .. } | Happened::Unknown { .. } => retry(reply),
        Happened::LostLease => Next::Abandon,
        Happened::Unbuildable { .. } => Next::Failed { reply, suppress: false },
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SOON: TimeDelta = TimeDelta::minutes(1);

    fn suppresses(code: u16, text: &str) -> bool {
        match decide(&Happened::refused(Phase::Rcpt, code, text), 1, SOON, 0.5) {
            Next::Failed { suppress, .. } => suppress,
            other => panic!("{code} {text}: {other:?}"),
        }
    }

    #[test]
    fn addresses_that_do_not_exist_are_suppressed() {
        for (code, text) in [
            (550, "5.1.1 <ann@example.org>: Recipient address rejected: User unknown in virtual mailbox table"),
            (550, "5.1.10 example.org does not accept mail (nullMX)"),
            (553, "5.1.3 bad address syntax"),
            (550, "5.2.1 The email account that you tried to reach is disabled"),
            (550, "Requested action not taken: mailbox unavailable"),
            (550, "No such user here"),
            (551, "User not local; please try <ann@example.net>"),
            (553, "Requested action not taken: mailbox name not allowed"),
        ] {
            assert!(suppresses(code, text), "{code} {text}");
        }
    }

    #[test]
    fn what_is_not_the_addresss_fault_does_not_suppress_it() {
        for (code, text) in [
            (550, "5.7.1 Unknown sender: message refused by policy"),
            (550, "5.7.26 Unauthenticated email is not accepted"),
            (552, "5.2.2 The recipient's inbox is out of storage space"),
            (550, "5.1.8 Sender address rejected: Domain not found"),
            (554, "5.7.1 Service unavailable; client host blocked using a list"),
            (550, "Sender verify failed: no such user"),
            (550, "Administrative prohibition"),
            (550, "Invalid HELO from this user"),
            (550, "4.1.1 User unknown"),
            (550, ""),
            (554, "Transaction failed"),
            (500, "5.3.0 Error: command failed"),
            (552, "too much mail data"),
        ] {
            assert!(!suppresses(code, text), "{code} {text}");
        }
        let late = Happened::refused(Phase::Dot, 550, "5.1.1 User unknown");
        assert!(matches!(decide(&late, 1, SOON, 0.5), Next::Failed { suppress: false, .. }));
    }

    #[test]
    fn a_server_that_takes_nobodys_mail_pauses_delivery() {
        for phase in [Phase::Connect, Phase::Hello, Phase::Tls, Phase::Auth] {
            for code in [421, 450, 554] {
                let next = decide(&Happened::refused(phase, code, "go away"), 9, TimeDelta::days(9), 0.5);
                assert!(matches!(next, Next::Pause { .. }), "{phase:?} {code}");
            }
            let broken = Happened::Broken { phase, error: "reset".into() };
            assert!(matches!(decide(&broken, 9, TimeDelta::days(9), 0.5), Next::Pause { .. }), "{phase:?}");
        }
    }

    #[test]
    fn trouble_that_passes_is_retried_and_given_up_after_two_days() {
        let trouble = [
            Happened::refused(Phase::Mail, 421, "4.3.2 shutting down"),
            Happened::refused(Phase::Rcpt, 450, "4.2.0 greylisted"),
            Happened::refused(Phase::Data, 451, ""),
            Happened::refused(Phase::Dot, 452, "4.3.1 disk full"),
            Happened::Broken { phase: Phase::Data, error: "timeout".into() },
            Happened::Unknown { error: "reset".into() },
        ];
        for happened in trouble {
            let Next::Retry { after, .. } = decide(&happened, 3, GIVE_UP_AFTER, 1.0) else { panic!("{happened:?}") };
            assert_eq!(after, TimeDelta::minutes(4));
            let late = decide(&happened, 3, GIVE_UP_AFTER + TimeDelta::seconds(1), 1.0);
            assert!(matches!(late, Next::Failed { suppress: false, .. }), "{late:?}");
        }
    }

    #[test]
    fn success_and_the_lease_are_what_they_are() {
        assert_eq!(
            decide(&Happened::accepted("2.0.0 Ok: queued as 4F2\r\n"), 1, SOON, 0.0),
            Next::Sent { reply: "2.0.0 Ok: queued as 4F2".into() }
        );
        assert_eq!(decide(&Happened::LostLease, 1, SOON, 0.0), Next::Abandon);
        let unbuildable = Happened::Unbuildable { error: "no template".into() };
        assert!(matches!(decide(&unbuildable, 1, SOON, 0.0), Next::Failed { suppress: false, .. }));
    }

    #[test]
    fn enhanced_codes_are_read_strictly() {
        assert_eq!(enhanced_status("5.1.10 null MX"), Some((5, 1, 10)));
        for text in ["", "5.1", "5.1.1.1 x", "3.1.1 x", "5.1.x", "5.1111.1", "192.168.0.1 blocked", "5..1", "+5.1.1"] {
            assert_eq!(enhanced_status(text), None, "{text}");
        }
    }

    fn anything() -> impl Strategy<Value = Happened> {
        let phase = prop::sample::select(vec![
            Phase::Connect,
            Phase::Hello,
            Phase::Tls,
            Phase::Auth,
            Phase::Mail,
            Phase::Rcpt,
            Phase::Data,
            Phase::Dot,
        ]);
        let refused = (phase.clone(), any::<u16>(), ".{0,40}");
        let enhanced = (phase.clone(), 400u16..600, (0u8..9, 0u16..9, 0u16..99));
        prop_oneof![
            ".{0,40}".prop_map(|text| Happened::accepted(&text)),
            refused.prop_map(|(phase, code, text)| Happened::refused(phase, code, &text)),
            enhanced.prop_map(|(phase, code, (a, b, c))| Happened::refused(phase, code, &format!("{a}.{b}.{c} no"))),
            (phase, ".{0,40}").prop_map(|(phase, error)| Happened::Broken { phase, error }),
            ".{0,40}".prop_map(|error| Happened::Unknown { error }),
            Just(Happened::LostLease),
            ".{0,40}".prop_map(|error| Happened::Unbuildable { error }),
        ]
    }

    proptest! {
        #[test]
        fn everything_has_a_next(happened in anything(), attempt: u32, seconds in -9_000_000i64..9_000_000, jitter: f64) {
            let since = TimeDelta::seconds(seconds);
            match decide(&happened, attempt, since, jitter) {
                Next::Sent { reply } => prop_assert_eq!(Happened::Accepted { reply }, happened),
                Next::Abandon => prop_assert_eq!(happened, Happened::LostLease),
                Next::Retry { after, .. } => {
                    prop_assert!(since <= GIVE_UP_AFTER || attempt <= 1);
                    prop_assert!(after >= FIRST_RETRY / 2 && after <= LONGEST_RETRY);
                }
                Next::Failed { suppress: true, .. } => {
                    let is_rcpt = matches!(happened, Happened::Refused { phase: Phase::Rcpt, code: 500..600, .. });
                    prop_assert!(is_rcpt);
                }
                Next::Failed { suppress: false, .. } | Next::Pause { .. } => {}
            }
        }

        #[test]
        fn waits_grow_between_their_bounds(attempt in 1u32..40, jitter in 0.0f64..1.0) {
            let (least, wait, most) = (back_off(attempt, 0.0), back_off(attempt, jitter), back_off(attempt, 1.0));
            prop_assert!(least <= wait && wait <= most);
            prop_assert_eq!(least * 2, most);
            prop_assert!(back_off(attempt + 1, 0.0) >= least && back_off(attempt + 1, 1.0) >= most);
        }
    }
}
