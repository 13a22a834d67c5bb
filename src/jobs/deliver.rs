//! `deliver`: sends messages, each to one contact, and records what became of them.
//!
//! Messages are claimed in a short transaction, sent in none, and recorded in a short transaction. Between the mail
//! server's acceptance and the record a crash repeats a message, with the same `Message-ID` and the same reminders or
//! fewer; nothing else can repeat one, 32 or two for each session at most. A process claims a message for each session, and
//! as many ahead as its sessions begin in a moment: a fast mail server never waits for the store, and for a slow
//! one nothing is claimed that could not begin at once. Nothing is claimed before the mail server answers, so
//! that a server that is out of reach touches no message. What is said is checked against the tokens as they are when it
//! is claimed; what waits when delivery pauses or ends is given back.
//!
//! One [`Deliverer`] claims, checks and records for all sessions of its process, and feeds them while it waits for the
//! store; each message is sent in a task of its own, so that a session that stalls holds up its own message and no other.
//! What a record or a claim costs hardly depends on how many messages it is about: so a record waits a moment for half of
//! the sessions, and takes whatever has ended meanwhile.

mod ahead;
mod attempt;
mod claiming;
pub(in crate::jobs) mod foresee;
mod pace;
mod pause;
mod record;
mod recording;
mod sessions;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use tokio::time::Instant;
use tracing::Instrument;
use uuid::Uuid;

use super::Outcome;
use crate::clock::{Clock, Timestamp};
use crate::correction;
use crate::digest::Digest;
use crate::mail::compose::Composer;
use crate::mail::outcome::Happened;
use crate::mail::transport::Transport;
use crate::policies::Group;
use crate::policy::Policy;
use crate::store::outbox::{ClaimedMessage, Record};
use crate::store::planning::Reminded;
use crate::store::{Result, Store};
use crate::token::{Bucket, ContactId, MessageId, TokenId};
use ahead::Ahead;
use attempt::{Attempt, Mail, RENEW_WITHIN, untried};
use claiming::{Claimed, Claiming};
use pace::Pace;
use pause::{Pause, Refused};
use recording::Recording;
use sessions::{Ended, Sessions, Told};

/// The job's name in logs.
pub const NAME: &str = "deliver";

/// How long a claim lasts without renewal.
pub const LEASE: TimeDelta = TimeDelta::minutes(5);

/// How long to wait for a store that is not available.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// How long the first message that has ended waits for others, to be recorded with them.
const GATHER: Duration = Duration::from_millis(3);

/// How many messages may have been handed over, or be so at the moment, without being recorded; or two for each session,
/// where that is more. A process that is killed repeats at most so many.
const UNRECORDED: usize = 32;

/// How long what was claimed ahead may wait for a session: then what it says is no longer sure to be true.
const FRESH: Duration = Duration::from_secs(5);

/// What a step did, in messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Taken by the mail server.
    pub sent: u64,
    /// To be tried again.
    pub retried: u64,
    /// Of these, how many may have been delivered all the same.
    pub unknown: u64,
    /// Given up.
    pub failed: u64,
    /// Left to a later one, because their contact was sent another just now.
    pub put_off: u64,
    /// Had nothing left to say.
    pub cancelled: u64,
    /// Lost to another process before they were handed over or recorded.
    pub lost: u64,
}

impl fmt::Display for Delivered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (self.sent, "sent"),
            (self.retried, "to be tried again"),
            (self.unknown, "of unknown outcome"),
            (self.failed, "given up"),
            (self.put_off, "left to a later one"),
            (self.cancelled, "had nothing left to say"),
            (self.lost, "lost to another process"),
        ];
        let words: Vec<String> =
            counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{what}: {n}")).collect();
        f.write_str(if words.is_empty() { "nothing was due" } else { "messages " })?;
        f.write_str(&words.join(", "))
    }
}

impl std::ops::AddAssign for Delivered {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.retried += other.retried;
        self.unknown += other.unknown;
        self.failed += other.failed;
        self.put_off += other.put_off;
        self.cancelled += other.cancelled;
        self.lost += other.lost;
    }
}

/// What else a step did, for those who count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// What became of reminders.
    pub reminded: Reminded,
    /// What mail servers answered, by class.
    pub replies: Replies,
}

/// Answers of mail servers that decided about a message, or about letting us in. (A Maildir that takes a message counts
/// as one that accepts it.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replies {
    /// 2xx: a message was taken.
    pub accepted: u64,
    /// 4xx: not now.
    pub temporary: u64,
    /// 5xx: no.
    pub permanent: u64,
    /// No answer, or none that can be understood.
    pub none: u64,
}

impl Replies {
    fn add(&mut self, happened: &Happened) {
        match happened {
            Happened::Accepted { .. } => self.accepted += 1,
            Happened::Refused { code: 500.., .. } => self.permanent += 1,
            Happened::Refused { .. } => self.temporary += 1,
            Happened::Broken { .. } | Happened::Unknown { .. } => self.none += 1,
            // Nobody was asked.
            Happened::LostLease | Happened::Unbuildable { .. } | Happened::Deserted { .. } => {}
        }
    }
}

/// What contacts were told of tokens before.
pub(super) type Said = HashMap<(ContactId, TokenId), Vec<correction::Told>>;

/// What was said before of what these messages correct.
pub(super) async fn said<S: Store>(store: &S, messages: &[ClaimedMessage], now: Timestamp) -> Result<Said> {
    let corrected = messages.iter().flat_map(|message| {
        let corrections = message.reminders.iter().filter(|reminder| reminder.claimed.lead.corrects());
        corrections.map(|reminder| (message.contact.id, reminder.token))
    });
    match corrected.collect::<Vec<_>>().as_slice() {
        [] => Ok(Said::new()),
        corrected => store.told(corrected, now).await,
    }
}

/// By what delivery goes.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Who hears of what could not be delivered.
    pub fallback: Option<ContactId>,
    /// How long after its first claim a message is retried.
    pub give_up_after: TimeDelta,
    /// The least time between the starts of two messages; zero: none.
    pub every: Duration,
    /// How long a session that has nothing to do stays open.
    pub idle: Duration,
    /// The policies of groups of tokens: who is told of these besides others.
    pub groups: Arc<[Group]>,
    /// Which reminders are owed where no policy of a group says anything else.
    pub policy: Policy,
    /// When messages go, likewise. With `min_interval`, it is remembered when contacts were sent reminders.
    pub digest: Digest,
}

/// What the store may have of a pause that an earlier process told of, and never took back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Earlier {
    /// It may be true.
    MayPause,
    /// It is not: the mail server has let us in.
    WasWrong,
    /// The store has nothing of it.
    Forgotten,
}

/// Claimed and checked.
struct Ready {
    attempt: Attempt,
    mail: Mail,
    since: Instant,
}

/// Sends messages from a store, through several sessions at once.
pub struct Deliverer<S, C> {
    store: S,
    clock: C,
    composer: Arc<Composer>,
    terms: Terms,
    holder: Uuid,
    sessions: Sessions,
    pace: Pace,
    ahead: Ahead,
    /// Claimed and checked, for the next sessions that are idle.
    ready: VecDeque<Ready>,
    /// Buckets that have messages to claim, as far as is known.
    due: VecDeque<Bucket>,
    /// The store was asked, and nothing more is due.
    nothing_due: bool,
    /// The last claim brought as much as was asked for.
    plenty: bool,
    pause: Pause,
    /// Tried, and to be judged.
    ended: Vec<Attempt>,
    /// Judged, and to be decided; of each whether it was refused at MAIL as another one was before it.
    judged: VecDeque<(Attempt, bool)>,
    /// What was recorded since somebody was told.
    did: Delivered,
    /// Decided, and to be recorded.
    decided: Vec<(Attempt, Record)>,
    /// Until when what has ended waits for more.
    gathers_until: Instant,
    recording: Recording,
    /// Refused at MAIL: what that means is seen from the message that comes next.
    suspect: Option<Attempt>,
    /// What the store was last told that delivery waits for.
    told: Option<String>,
    earlier: Earlier,
    /// The message that was refused at MAIL last, while none has got past it since.
    refused: Option<MessageId>,
    /// What mail servers answered since somebody asked.
    replies: Replies,
}

impl<S: Store, C: Clock + Clone> Deliverer<S, C> {
    /// A deliverer with as many sessions as there are transports, which claims in the name of this process.
    pub fn new(store: S, clock: C, composer: Composer, transports: Vec<Transport>, terms: Terms, holder: Uuid) -> Self {
        Self {
            store,
            clock,
            composer: Arc::new(composer),
            holder,
            sessions: Sessions::new(transports),
            pace: Pace::new(terms.every),
            ahead: Ahead::new(Instant::now()),
            ready: VecDeque::new(),
            due: VecDeque::new(),
            nothing_due: false,
            plenty: false,
            pause: Pause::default(),
            ended: Vec::new(),
            judged: VecDeque::new(),
            did: Delivered::default(),
            decided: Vec::new(),
            gathers_until: Instant::now(),
            recording: Recording::default(),
            suspect: None,
            told: None,
            earlier: Earlier::MayPause,
            refused: None,
            replies: Replies::default(),
            terms,
        }
    }

    /// Whether the mail server refuses everybody, so that messages wait without being tried.
    pub fn is_paused(&self) -> bool {
        self.pause.is_on()
    }

    /// What else has happened since this was asked last.
    pub fn details(&mut self) -> Details {
        Details { reminded: self.recording.take_reminded(), replies: std::mem::take(&mut self.replies) }
    }

    /// Records what has ended, and begins with as many messages as there are sessions for them. Waits for the store, and
    /// for no mail server: [`Deliverer::wait`] does.
    ///
    /// # Errors
    /// When the store fails. Claimed messages are then claimed again when their lease ends.
    pub async fn step(&mut self) -> Result<Outcome<Delivered>> {
        while let Some(told) = self.sessions.try_ended() {
            self.note(told);
        }
        self.did += self.recording.take()?;
        let corrected = self.correct_status().await;
        let recorded = if self.gathers() { Ok(()) } else { self.record_ended().await };
        // What cannot be decided holds up nothing else.
        self.begin().await?;
        self.tell_status().await?;
        corrected.and(recorded)?;
        let may_record = self.unrecorded() > 0 && !self.recording.is_busy() && !self.gathers();
        let may_begin = !self.nothing_due && self.is_worth_a_claim(self.room(self.clock.now()));
        Ok(Outcome { did: std::mem::take(&mut self.did), more: may_record || may_begin })
    }

    /// Waits until there is something for another step to do: a message was tried or recorded, a session was opened, what has
    /// ended has waited for long enough, or the rate allows one more. `false` at once, when nothing of that is under way.
    /// Nothing is lost when it is dropped.
    pub async fn wait(&mut self) -> bool {
        let any = !self.nothing_due || !self.ready.is_empty();
        let may_begin = any && self.sessions.idle() > 0 && !self.pause.waits(self.clock.now());
        let allowed = self.pace.wait(Instant::now()).filter(|_| may_begin);
        if !self.sessions.are_busy() && !self.recording.is_busy() && allowed.is_none() {
            return false;
        }
        let until_allowed = at_or_never(allowed);
        let until_stale = at_or_never(self.stale_at());
        tokio::select! {
            told = self.sessions.ended() => if let Some(told) = told { self.note(told) },
            () = self.recording.done() => {}
            () = until_allowed => {}
            () = until_stale => {}
            () = tokio::time::sleep_until(self.gathers_until), if self.gathers() => {}
        }
        true
    }

    /// Claims nothing more, waits for what is under way, and records it, for as long as the store takes to be there: whoever
    /// calls sets the limit.
    ///
    /// # Errors
    /// When the store refuses a record.
    pub async fn finish(&mut self) -> Result<Delivered> {
        let mut did = std::mem::take(&mut self.did);
        self.pause.stop();
        self.give_back("the service stops");
        loop {
            did += self.recording.take()?;
            if self.sessions.sending() == 0 {
                self.release_suspect();
            }
            if let Err(error) = self.record_ended().await {
                tracing::warn!(%error, "cannot decide about messages yet");
                tokio::time::sleep(TRY_AGAIN).await;
                continue;
            }
            if self.recording.is_busy() {
                self.recording.done().await;
            } else if self.sessions.sending() > 0 {
                if let Some(told) = self.sessions.ended().await {
                    self.note(told);
                }
            } else if self.suspect.is_none() && self.unrecorded() == 0 {
                return Ok(did);
            }
        }
    }

    /// When the next step would find something to do, as far as is known now; `None`: not before something new is due,
    /// or [`Deliverer::wait`] says so.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn next_due(&self) -> Result<Option<Timestamp>> {
        if self.unrecorded() > 0 {
            return Ok(Some(self.clock.now()));
        }
        if let Some(until) = self.pause.until() {
            return Ok(Some(until));
        }
        if !self.nothing_due {
            return Ok(None);
        }
        let now = self.clock.now();
        let queue = self.store.queue(now).await?;
        Ok(if queue.due.is_empty() { queue.next } else { Some(now) })
    }

    /// Goes by these from now on. With other transports, the sessions that there are take nothing more, and close; what they
    /// are sending is finished. For so long there may be more of them than there are transports.
    pub fn adopt(&mut self, composer: Composer, terms: Terms, transports: Option<Vec<Transport>>) {
        self.composer = Arc::new(composer);
        if terms.every != self.terms.every {
            self.pace = Pace::new(terms.every);
        }
        self.terms = terms;
        if let Some(transports) = transports {
            self.sessions.replace(transports);
            // What another server said is no reason to wait for this one.
            self.pause = Pause::default();
            self.refused = None;
        }
    }

    /// When the first session will have been idle for too long.
    pub fn idle_until(&self) -> Option<Instant> {
        self.sessions.idle_until(self.terms.idle)
    }

    /// Closes the sessions that have been idle for too long.
    pub fn close_idle(&mut self) {
        self.sessions.close_idle(self.terms.idle);
    }

    /// Ends all sessions with the mail server.
    pub async fn close(&mut self) {
        self.sessions.close().await;
    }

    fn note(&mut self, told: Told) {
        match told {
            Told::Opened(Ok(())) => {
                if self.earlier == Earlier::MayPause {
                    self.earlier = Earlier::WasWrong;
                }
                self.pause.opened();
            }
            Told::Opened(Err(happened)) => {
                self.replies.add(&happened);
                self.refused_everybody(&happened.reply(), Refused::BeforeMail);
            }
            Told::Attempted(attempt) => {
                if let Some(happened) = &attempt.happened {
                    self.replies.add(happened);
                }
                if self.ended.is_empty() {
                    self.gathers_until = Instant::now() + GATHER;
                }
                self.ended.push(*attempt);
                self.feed();
            }
        }
    }

    /// How many messages were tried that nobody has begun to record.
    fn unrecorded(&self) -> usize {
        self.ended.len() + self.judged.len() + self.decided.len()
    }

    /// Whether what has ended waits for more: for as many as are still being sent, and not for long.
    fn gathers(&self) -> bool {
        let ended = self.ended.len();
        ended > 0 && ended < self.sessions.sending() && Instant::now() < self.gathers_until
    }

    /// How many messages may be claimed now.
    fn room(&self, now: Timestamp) -> usize {
        if self.pause.waits(now) {
            return 0;
        }
        // One message shows whether the server still refuses everybody.
        let most = if self.pause.is_on() { usize::from(self.sessions.sending() == 0) } else { usize::MAX };
        // Without those that are judged: what cannot be decided yet keeps no other from being claimed.
        let tried = self.ended.len() + self.decided.len() + self.recording.messages();
        let in_hand = self.ready.len() + self.sessions.sending() + tried;
        self.pace.room(Instant::now(), self.window().saturating_sub(in_hand).min(most))
    }

    /// How many messages this process may have that are not recorded yet.
    fn window(&self) -> usize {
        let one_each = self.sessions.idle() + self.sessions.sending();
        // Without a session nobody knows whether the server answers; a limit of the rate makes the sessions wait, and not the store.
        let may_claim_ahead = one_each > 0 && !self.pause.is_on() && !self.pace.is_limited();
        one_each + if may_claim_ahead { self.ahead.messages() } else { 0 }
    }

    /// Whether to claim so few: a claim costs as much for one as for many.
    fn is_worth_a_claim(&self, room: usize) -> bool {
        room > 0 && (room >= self.window() / 4 || (self.ready.is_empty() && self.sessions.idle() > 0))
    }

    async fn begin(&mut self) -> Result<()> {
        self.sessions.doubt_stale();
        if self.pause.waits(self.clock.now()) {
            self.give_back("no mail can be handed over");
        } else {
            self.feed();
            let mut has_looked = false;
            loop {
                self.ahead.look(Instant::now());
                let now = self.clock.now();
                let room = self.room(now);
                // Without a session there is no room, and without anything that is due no need for one.
                let wants_session = self.sessions.opened() == 0 && !self.recording.is_busy();
                if self.due.is_empty() && !has_looked && (wants_session || self.is_worth_a_claim(room)) {
                    self.look().await?;
                    has_looked = true;
                }
                // Each time: one may have been lost while the store was waited for.
                self.open_sessions();
                let asked = if S::SPANS_BUCKETS { self.due.len() } else { self.due.len().min(1) };
                if asked == 0 || !self.is_worth_a_claim(room) {
                    break;
                }
                let buckets: Vec<Bucket> = self.due.iter().take(asked).copied().collect();
                let claiming = Claiming::new(&self.store, &self.clock, &self.terms, self.holder);
                let (claimed, meanwhile) = self.meanwhile(claiming.claim(&buckets, room, now)).await;
                let claimed = claimed?;
                self.plenty = claimed.messages == room;
                // The next claim goes on behind this one, full or not, until all that was due has had its turn: or what is tried
                // again and again would be claimed before what waits behind it.
                let behind = claimed.last.filter(|_| self.plenty && S::SPANS_BUCKETS);
                let passed = behind.map_or(asked, |last| self.due.partition_point(|bucket| *bucket <= last));
                self.due.drain(..passed);
                self.take_in(claimed)?;
                meanwhile?;
            }
        }
        let nothing_comes =
            self.sessions.sending() == 0 && self.ready.is_empty() && (self.nothing_due || self.pause.is_on());
        let now = self.clock.now();
        if nothing_comes || self.suspect.as_ref().is_some_and(|suspect| suspect.lease_until - now < RENEW_WITHIN) {
            self.release_suspect();
        }
        Ok(())
    }

    /// Waits for the store, and meanwhile feeds the sessions and records what they have done; with what went wrong with that.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> (T, Result<()>) {
        let mut work = pin!(work);
        let mut result = Ok(());
        loop {
            tokio::select! {
                biased;
                done = &mut work => return (done, result),
                told = self.sessions.ended() => if let Some(told) = told { self.note(told) },
                () = self.recording.done() => match self.recording.take() {
                    Ok(did) => {
                        self.did += did;
                        // What was recorded makes room for others to be handed over.
                        self.feed();
                    }
                    Err(error) => result = Err(error),
                },
                () = tokio::time::sleep_until(self.gathers_until), if self.gathers() => {}
            }
            if self.gathers() {
                continue;
            }
            // Both go on: the work may hold what this waits for, such as SQLite's one connection that writes.
            let (recorded, done) = {
                let mut recorded = pin!(self.record_ended());
                tokio::select! {
                    recorded = &mut recorded => (recorded, None),
                    done = &mut work => (recorded.await, Some(done)),
                }
            };
            if let Err(error) = recorded {
                result = Err(error);
            }
            if let Some(done) = done {
                return (done, result);
            }
        }
    }

    /// Finds the buckets that have messages to claim.
    async fn look(&mut self) -> Result<()> {
        let mut due = self.store.queue(self.clock.now()).await?.due;
        due.sort_unstable();
        self.nothing_due = due.is_empty();
        if !S::SPANS_BUCKETS {
            // From a random start, so that several processes begin in different places.
            let start = usize::from(rand::random::<u8>()) % due.len().max(1);
            due.rotate_left(start);
        }
        self.due = due.into();
        Ok(())
    }

    /// Opens as many sessions as there seem to be messages for.
    fn open_sessions(&mut self) {
        if self.nothing_due && self.ready.is_empty() {
            return;
        }
        let now = self.clock.now();
        let (coming, opened) = (self.sessions.coming(), self.sessions.opened());
        let more = if self.pause.is_on() {
            1_usize.saturating_sub(coming)
        } else if self.pause.takes_no_more(now) {
            1_usize.saturating_sub(opened)
        } else {
            let wanted = if self.plenty { self.sessions.all() } else { self.due.len().max(1) };
            wanted.saturating_sub(if self.plenty { opened } else { coming })
        };
        for _ in 0..more {
            if !self.sessions.open_one() {
                break;
            }
        }
    }

    /// Sends what was claimed and is still true, as far as there are sessions for it. The rest is composed meanwhile.
    fn take_in(&mut self, claimed: Claimed) -> Result<()> {
        self.decided.extend(claimed.untried);
        let since = Instant::now();
        for (attempt, letter) in claimed.checked {
            match letter {
                Some(letter) => self.ready.push_back(Ready { attempt, mail: Mail::Letter(letter), since }),
                None => self.ended.push(attempt),
            }
        }
        self.feed();
        for Ready { mail, .. } in &mut self.ready {
            mail.compose(&self.composer, self.clock.now());
        }
        claimed.failed.map_or(Ok(()), Err)
    }

    /// Hands what is ready to the sessions that are idle.
    fn feed(&mut self) {
        if self.stale_at().is_some_and(|at| at <= Instant::now()) {
            self.give_back("no session was free for it");
        }
        let most = UNRECORDED.max(2 * self.sessions.all());
        while self.sessions.idle() > 0
            && self.sessions.sending() + self.unrecorded() + self.recording.messages() < most
            && !self.pause.waits(self.clock.now())
            && self.pace.room(Instant::now(), 1) > 0
            && let Some(ready) = self.ready.pop_front()
        {
            self.send(ready);
        }
    }

    /// When what waits for a session will have waited for too long.
    fn stale_at(&self) -> Option<Instant> {
        self.ready.front().and_then(|ready| ready.since.checked_add(FRESH))
    }

    /// Lets others have what is ready, and was not tried.
    fn give_back(&mut self, why: &str) {
        let now = self.clock.now();
        self.decided.extend(self.ready.drain(..).map(|Ready { attempt, .. }| untried(attempt.message, now, why)));
    }

    fn send(&mut self, ready: Ready) {
        let Some(mut transport) = self.sessions.take() else { return self.ready.push_front(ready) };
        let Ready { mut attempt, mail, .. } = ready;
        let now = Instant::now();
        self.pace.spend(now);
        self.ahead.begins(now);
        let (store, clock, composer) = (self.store.clone(), self.clock.clone(), self.composer.clone());
        let attempted = async move {
            attempt.send(mail, &store, &clock, &composer, &mut transport).await;
            Ended::Attempted(transport, Box::new(attempt))
        };
        self.sessions.spawn(attempted.in_current_span());
    }
}

/// Waits until then.
async fn at_or_never(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
