//! What delivery does while the mail server refuses everybody: it waits, and asks again now and then.

use chrono::TimeDelta;

use crate::clock::Timestamp;

/// The first wait, and the longest: it doubles with each answer that is no better.
const WAIT: (TimeDelta, TimeDelta) = (TimeDelta::seconds(5), TimeDelta::minutes(5));

/// Where the server refuses everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It is out of reach, or lets nobody in.
    BeforeMail,
    /// It lets us in, and refuses each message at MAIL.
    AtMail,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    until: Timestamp,
    next: TimeDelta,
    refused: Refused,
}

impl Wait {
    /// A wait that ends later than any can is left from a wrong clock.
    fn lasts(&self, now: Timestamp) -> bool {
        now < self.until && self.until <= now + WAIT.1
    }
}

/// Whether delivery waits, and for what.
#[derive(Debug, Default)]
pub(super) struct Pause {
    everybody: Option<Wait>,
    /// The server takes the sessions that there are, and no more of them.
    further: Option<Wait>,
    stopped: bool,
    /// In words, while everybody is refused.
    why: Option<String>,
}

impl Pause {
    /// Whether the server refuses everybody, as far as is known.
    pub(super) fn is_on(&self) -> bool {
        self.everybody.is_some()
    }

    /// Whether nothing is to be begun now.
    pub(super) fn waits(&self, now: Timestamp) -> bool {
        self.stopped || self.everybody.is_some_and(|wait| wait.lasts(now))
    }

    /// Whether no further session is to be opened now.
    pub(super) fn takes_no_more(&self, now: Timestamp) -> bool {
        self.further.is_some_and(|wait| wait.lasts(now))
    }

    /// Why delivery pauses.
    pub(super) fn why(&self) -> Option<&str> {
        self.why.as_deref()
    }

    /// When the server is asked again whether it still refuses everybody.
    pub(super) fn until(&self) -> Option<Timestamp> {
        self.everybody.map(|wait| wait.until)
    }

    /// Begins nothing any more.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
    }

    /// The server refuses everybody. Returns until when to wait, unless it is waited already: several sessions may find
    /// out at once.
    pub(super) fn refused(&mut self, refused: Refused, now: Timestamp, reply: &str) -> Option<Timestamp> {
        self.why = Some(format!("delivery pauses, because no mail can be handed over: {reply}"));
        wait(&mut self.everybody, refused, now)
    }

    /// The server refuses one more session. Returns as [`Pause::refused`].
    pub(super) fn refused_one_more(&mut self, now: Timestamp) -> Option<Timestamp> {
        wait(&mut self.further, Refused::BeforeMail, now)
    }

    /// A session was opened.
    pub(super) fn opened(&mut self) {
        if self.everybody.is_some_and(|wait| wait.refused == Refused::BeforeMail) {
            self.lift();
        }
    }

    /// A message got past MAIL.
    pub(super) fn got_past_mail(&mut self) {
        if self.everybody.is_some() {
            self.lift();
        }
    }

    fn lift(&mut self) {
        self.everybody = None;
        self.why = None;
        tracing::info!("the mail server answers again: delivery goes on");
    }
}

fn wait(slot: &mut Option<Wait>, refused: Refused, now: Timestamp) -> Option<Timestamp> {
    if slot.is_some_and(|wait| wait.lasts(now)) {
        return None;
    }
    let span = slot.map_or(WAIT.0, |wait| wait.next);
    let until = now + span;
    *slot = Some(Wait { until, next: (span * 2).min(WAIT.1), refused });
    Some(until)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    #[test]
    fn it_doubles_up_to_its_longest_and_survives_a_wrong_clock() {
        let mut pause = Pause::default();
        let mut now = DateTime::from_timestamp(1_800_000_000, 0).expect("in range");
        let mut waits = Vec::new();
        for _ in 0..9 {
            let until = pause.refused(Refused::BeforeMail, now, "421 no").expect("a new wait");
            assert_eq!(pause.refused(Refused::BeforeMail, now, "421 no"), None, "known already");
            assert!(pause.waits(now) && !pause.waits(until));
            waits.push((until - now).num_seconds());
            now = until;
        }
        assert_eq!(waits, [5, 10, 20, 40, 80, 160, 300, 300, 300]);
        assert!(!pause.waits(now - TimeDelta::days(1)), "the clock went back");
        assert!(pause.why().is_some_and(|why| why.contains("421 no")));
        pause.opened();
        assert!(!pause.is_on() && pause.why().is_none());
    }

    #[test]
    fn a_server_that_refuses_at_mail_must_take_a_message() {
        let mut pause = Pause::default();
        let now = DateTime::from_timestamp(1_800_000_000, 0).expect("in range");
        pause.refused(Refused::AtMail, now, "550 no");
        pause.opened();
        assert!(pause.is_on());
        pause.got_past_mail();
        assert!(!pause.is_on());
    }

    #[test]
    fn one_session_too_many_is_no_outage() {
        let mut pause = Pause::default();
        let now = DateTime::from_timestamp(1_800_000_000, 0).expect("in range");
        let until = pause.refused_one_more(now).expect("a wait");
        assert!(pause.takes_no_more(now) && !pause.takes_no_more(until));
        assert!(!pause.is_on() && !pause.waits(now));
    }
}
