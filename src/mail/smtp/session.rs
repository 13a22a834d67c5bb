//! A session between two messages, and the delivery of one.

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use lettre::transport::smtp::client::AsyncSmtpConnection;
use lettre::transport::smtp::commands::{Data, Mail, Noop, Rcpt, Rset};
use lettre::transport::smtp::extension::{MailBodyParameter, MailParameter};
use lettre::transport::smtp::response::Response;
use tokio::time::Instant;

use super::establish::Established;
use super::fault::{Fault, broken, no_answer, unexpected, within};
use super::offers::Offers;
use super::stream::Written;
use crate::config::Timeouts;
use crate::mail::compose::Composed;
use crate::mail::outcome::{Happened, Phase};

/// Servers close sessions that say nothing, so one that was idle for longer is asked whether it is still there.
pub(super) const ASK_AFTER: Duration = Duration::from_secs(30);

/// The end of the content: the line end before it belongs to the content (RFC 5321, section 4.1.1.4).
const DOT: &str = ".\r\n";

/// A connection between two messages.
pub(super) struct Session {
    pub(super) connection: AsyncSmtpConnection,
    written: Written,
    offers: Offers,
    /// The server that it is with.
    pub(super) relay: usize,
    /// How many messages were tried on it.
    pub(super) tried: u64,
    pub(super) last_used: Instant,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("relay", &self.relay).field("tried", &self.tried).finish_non_exhaustive()
    }
}

/// What came of a message on one session.
pub(super) enum Delivery {
    Happened(Happened),
    /// The session was dead before the message was mentioned.
    Gone(Happened),
}

/// What a server answers to a command.
type Answer = Result<Response, Fault>;

/// What it answered to MAIL, RCPT and DATA.
struct Envelope {
    mail: Answer,
    /// `None` where it was not asked.
    rcpt: Option<Answer>,
    data: Option<Answer>,
}

impl Session {
    /// A session that has just begun.
    pub(super) fn new(established: Established, relay: usize) -> Self {
        let Established { connection, written, offers } = established;
        Self { connection, written, offers, relay, tried: 0, last_used: Instant::now() }
    }

    /// The session, unless it was idle for long and does not answer.
    pub(super) async fn if_alive(mut self, timeouts: &Timeouts) -> Option<Self> {
        if self.last_used.elapsed() > ASK_AFTER {
            within(timeouts.aside, self.connection.command(Noop)).await.ok()?;
            self.last_used = Instant::now();
        }
        Some(self)
    }

    /// Delivers a message. Gives the session back only where it stands between two messages again.
    pub(super) async fn deliver<Ours: Future<Output = bool>>(
        mut self,
        composed: &Composed,
        timeouts: &Timeouts,
        still_ours: &mut impl FnMut() -> Ours,
    ) -> (Option<Self>, Delivery) {
        let (parameters, content) = match self.parameters(composed).and_then(|those| Ok((those, content(composed)?))) {
            Ok(built) => built,
            Err(error) => return (Some(self), Delivery::Happened(Happened::Unbuildable { error })),
        };
        if !still_ours().await {
            return (Some(self), Delivery::Happened(Happened::LostLease));
        }
        self.tried += 1;
        let mail = Mail::new(Some(composed.from.clone()), parameters);
        let rcpt = Rcpt::new(composed.to.clone(), Vec::new());
        let envelope = if self.offers.pipelining {
            self.all_at_once(mail, rcpt, timeouts).await
        } else {
            self.one_by_one(mail, rcpt, timeouts).await
        };
        let gone = matches!(&envelope.mail, Err(fault) if fault.says_goodbye());
        let (session, happened) = match self.judge(envelope, timeouts).await {
            Err(ended) => ended,
            Ok(session) if still_ours().await => session.send(content, timeouts).await,
            // There is no way back from here but to close: whatever comes next would be read as content.
            Ok(_) => (None, Happened::LostLease),
        };
        (session, if gone { Delivery::Gone(happened) } else { Delivery::Happened(happened) })
    }

    /// Asks whether mail from and to these addresses would be taken, and goes no further. Gives the session back where it
    /// can be used again.
    pub(super) async fn offer(
        mut self,
        from: lettre::Address,
        to: lettre::Address,
        timeouts: &Timeouts,
    ) -> (Option<Self>, Result<(), Happened>) {
        let mail = Mail::new(Some(from), Vec::new());
        if let Err(fault) = done(within(timeouts.mail, self.connection.command(mail)).await) {
            let (session, happened) = self.refused(Phase::Mail, fault, timeouts).await;
            return (session, Err(happened));
        }
        if let Err(fault) = done(within(timeouts.rcpt, self.connection.command(Rcpt::new(to, Vec::new()))).await) {
            let (session, happened) = self.refused(Phase::Rcpt, fault, timeouts).await;
            return (session, Err(happened));
        }
        let forgotten = within(timeouts.aside, self.connection.command(Rset)).await.is_ok();
        (forgotten.then_some(self), Ok(()))
    }

    /// Each command when the one before it is answered.
    async fn one_by_one(&mut self, mail: Mail, rcpt: Rcpt, timeouts: &Timeouts) -> Envelope {
        let mut envelope =
            Envelope { mail: done(within(timeouts.mail, self.connection.command(mail)).await), rcpt: None, data: None };
        if envelope.mail.is_ok() {
            let rcpt = done(within(timeouts.rcpt, self.connection.command(rcpt)).await);
            if rcpt.is_ok() {
                envelope.data = Some(within(timeouts.data, self.connection.command(Data)).await);
            }
            envelope.rcpt = Some(rcpt);
        }
        envelope
    }

    /// All three commands in one write (RFC 2920), then the answers. Each is waited for, whatever those before it say:
    /// what is left unread would pass for the answer to something else.
    async fn all_at_once(&mut self, mail: Mail, rcpt: Rcpt, timeouts: &Timeouts) -> Envelope {
        let mail = done(within(timeouts.mail, self.connection.command(format!("{mail}{rcpt}{Data}"))).await);
        if matches!(&mail, Err(fault) if !fault.leaves_the_session_alive()) {
            return Envelope { mail, rcpt: None, data: None };
        }
        let rcpt = done(within(timeouts.rcpt, self.connection.read_response()).await);
        let data = match &rcpt {
            Err(fault) if !fault.leaves_the_session_alive() => None,
            _ => Some(within(timeouts.data, self.connection.read_response()).await),
        };
        Envelope { mail, rcpt: Some(rcpt), data }
    }

    /// The session, where the server waits for the content; else what came of the message.
    async fn judge(self, envelope: Envelope, timeouts: &Timeouts) -> Result<Self, (Option<Self>, Happened)> {
        let Envelope { mail, rcpt, data } = envelope;
        let refused = match (mail, rcpt) {
            (Err(fault), rcpt) => {
                let in_step = rcpt.is_none_or(|rcpt| rcpt.err().is_none_or(|fault| fault.leaves_the_session_alive()));
                Some((Phase::Mail, fault, in_step))
            }
            (Ok(_), Some(Err(fault))) => Some((Phase::Rcpt, fault, true)),
            (Ok(_), _) => None,
        };
        let Some((phase, fault, in_step)) = refused else {
            return match data {
                // 354: the only code that asks for the content (RFC 5321, section 4.3.2).
                Some(Ok(reply)) if reply.has_code(354) => Ok(self),
                Some(Ok(reply)) => Err((None, broken(Phase::Data, &unexpected(&reply)))),
                Some(Err(fault)) => Err(self.refused(Phase::Data, fault, timeouts).await),
                None => Err((None, broken(Phase::Data, "DATA was not answered"))),
            };
        };
        match data {
            _ if !in_step => Err((None, fault.at(phase))),
            // It waits for the content of a message without a recipient (RFC 2920, section 3.1): there is none.
            Some(Ok(reply)) if reply.has_code(354) => {
                let mut session = self;
                match within(timeouts.dot, session.connection.command(".\r\n")).await {
                    Ok(_) | Err(Fault::Refused { .. }) => Err(session.refused(phase, fault, timeouts).await),
                    Err(_) => Err((None, fault.at(phase))),
                }
            }
            Some(Ok(_)) => Err((None, fault.at(phase))),
            Some(Err(other)) if !other.leaves_the_session_alive() => Err((None, fault.at(phase))),
            Some(Err(_)) | None => Err(self.refused(phase, fault, timeouts).await),
        }
    }

    /// Sends the content with its final dot, in one write: so the last bytes need no packet of their own.
    async fn send(mut self, content: String, timeouts: &Timeouts) -> (Option<Self>, Happened) {
        // From the moment on that any of the line with the dot may be on its way, the message may be delivered.
        let (before, most) = (self.written.bytes(), content.len().saturating_sub(DOT.len()));
        let written = self.written.clone();
        let dot = || written.bytes().wrapping_sub(before) > most;
        let result = {
            let mut sending = pin!(self.connection.command(content));
            match within(timeouts.content, &mut sending).await {
                Err(Fault::TimedOut(_)) if dot() => within(timeouts.dot, sending).await,
                result => result,
            }
        };
        match result {
            Ok(reply) if (200..300).contains(&u16::from(reply.code())) => {
                self.last_used = Instant::now();
                (Some(self), Happened::accepted(&reply.message().collect::<Vec<_>>().join(" ")))
            }
            Ok(reply) => (None, Happened::Unknown { error: unexpected(&reply) }),
            Err(fault @ Fault::Refused { .. }) => {
                self.last_used = Instant::now();
                let session = fault.leaves_the_session_alive().then_some(self);
                (session, fault.at(Phase::Dot))
            }
            Err(fault) if !dot() => (None, fault.at(Phase::Data)),
            Err(Fault::Broken(error)) => (None, Happened::Unknown { error }),
            Err(Fault::TimedOut(limit)) => (None, Happened::Unknown { error: no_answer(limit) }),
        }
    }

    /// Ends a message that went wrong before its content; keeps the session if the server forgets the message.
    async fn refused(mut self, phase: Phase, fault: Fault, timeouts: &Timeouts) -> (Option<Self>, Happened) {
        let forgotten =
            fault.leaves_the_session_alive() && within(timeouts.aside, self.connection.command(Rset)).await.is_ok();
        self.last_used = Instant::now();
        (forgotten.then_some(self), fault.at(phase))
    }

    /// What MAIL must say about this message.
    fn parameters(&self, composed: &Composed) -> Result<Vec<MailParameter>, String> {
        let mut parameters = Vec::new();
        if let Some(limit) = self.offers.are_exceeded_by(composed.bytes.len()) {
            let bytes = composed.bytes.len();
            return Err(format!("the mail has {bytes} bytes, and this mail server takes {limit} at most"));
        }
        if self.offers.size.is_some() {
            parameters.push(MailParameter::Size(composed.bytes.len()));
        }
        let addresses: [&str; 2] = [composed.from.as_ref(), composed.to.as_ref()];
        if !addresses.iter().all(|address| address.is_ascii()) {
            if !self.offers.smtp_utf8 {
                return Err("the address has letters that this mail server does not take (no SMTPUTF8)".to_owned());
            }
            parameters.push(MailParameter::SmtpUtfEight);
        }
        if !composed.bytes.is_ascii() {
            if !self.offers.eight_bit_mime {
                return Err("the mail is not ASCII, and this mail server takes nothing else (no 8BITMIME)".to_owned());
            }
            parameters.push(MailParameter::Body(MailBodyParameter::EightBitMime));
        }
        Ok(parameters)
    }
}

/// The content as it goes out, its final dot included (RFC 5321, sections 4.1.1.4 and 4.5.2).
fn content(composed: &Composed) -> Result<String, String> {
    let text = std::str::from_utf8(&composed.bytes).map_err(|error| format!("the mail is not UTF-8: {error}"))?;
    let mut content = String::with_capacity(text.len() + text.len() / 64 + DOT.len());
    for line in text.split_inclusive('\n') {
        if line.starts_with('.') {
            content.push('.');
        }
        content.push_str(line);
    }
    if !content.ends_with("\r\n") {
        content.push_str("\r\n");
    }
    content.push_str(DOT);
    Ok(content)
}

/// The answer to a command that is done with 2xx. lettre takes 3xx for success as well, which makes sense for DATA alone
/// (RFC 5321, section 4.3.2): elsewhere the server is out of step with us.
fn done(answer: Answer) -> Answer {
    match answer {
        Ok(reply) if !(200..300).contains(&u16::from(reply.code())) => Err(Fault::Broken(unexpected(&reply))),
        answer => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(mail: &str) -> String {
        let address: lettre::Address = "alice@example.org".parse().expect("an address");
        let composed = Composed { from: address.clone(), to: address, subject: String::new(), bytes: mail.into() };
        content(&composed).expect("UTF-8")
    }

    #[test]
    fn no_line_of_the_content_passes_for_its_end() {
        assert_eq!(sent("a: b\r\n\r\nc\r\n"), "a: b\r\n\r\nc\r\n.\r\n");
        assert_eq!(sent("a\r\n.\r\nb\r\n"), "a\r\n..\r\nb\r\n.\r\n");
        assert_eq!(sent(".a\r\n..b\r\n.\r\n"), "..a\r\n...b\r\n..\r\n.\r\n");
        assert_eq!(sent("a.\r\nb .c"), "a.\r\nb .c\r\n.\r\n", "dots elsewhere, and no line end");
        assert_eq!(sent(""), "\r\n.\r\n");
    }

    #[test]
    fn what_is_not_utf_8_is_this_messages_fault() {
        let address: lettre::Address = "alice@example.org".parse().expect("an address");
        let composed = Composed { from: address.clone(), to: address, subject: String::new(), bytes: vec![b'a', 0xff] };
        assert!(content(&composed).is_err_and(|error| error.contains("index 1")));
    }
}
