//! The rules in the plainest words: every token is looked at at every tick. Shares no code with the program.

use std::collections::{BTreeMap, BTreeSet};

use super::history::{Event, HOUR, History, What};

/// A line of the ledger that speaks, or that would have if there were somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line {
    /// When it was written, in seconds after dawn.
    pub now: i64,
    pub token: usize,
    pub generation: i32,
    /// In seconds; 0 is the expired notice.
    pub lead: i64,
    /// The contact; `None` where there is nobody.
    pub to: Option<usize>,
    /// It comes too late to be sent.
    pub stale: bool,
}

/// What the ledger must hold, and what it may hold besides: a contact that came when the others had been told hears of it
/// whenever the token is looked at again.
#[derive(Default)]
pub struct Expected {
    pub must: BTreeSet<Line>,
    pub may: BTreeSet<Line>,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Active,
    Expired,
    Revoked,
}

struct Token {
    owner: usize,
    set_at: i64,
    expires: Option<i64>,
    generation: i32,
    state: State,
    replaced: bool,
    watched: bool,
    /// Whether its description says that it may follow a policy of its own.
    special: bool,
}

impl Token {
    fn new(owner: usize, set_at: i64, expires: Option<i64>, watched: bool) -> Self {
        Self { owner, set_at, expires, generation: 0, state: State::Active, replaced: false, watched, special: false }
    }

    /// A list has the description that it always had.
    fn listed(&mut self) -> &mut Self {
        self.special = false;
        self
    }

    fn set_deadline(&mut self, expires: Option<i64>, now: i64) {
        let another = match (self.expires, expires) {
            (None, None) => false,
            (Some(old), Some(new)) => (old - new).abs() > HOUR,
            _ => true,
        };
        if another {
            self.generation += 1;
            self.set_at = now;
        }
        self.expires = expires;
    }
}

/// No deadline, or one that is ahead.
fn ahead(expires: Option<i64>, now: i64) -> bool {
    expires.is_none_or(|expires| expires > now)
}

/// The instant that stands for "long ago", in seconds after dawn.
const LONG_AGO: i64 = i64::MIN / 100;

#[derive(Default)]
struct Model {
    tokens: BTreeMap<usize, Token>,
    links: BTreeSet<(usize, usize)>,
    suppressed: BTreeSet<usize>,
    leads: Vec<i64>,
    /// Those of the policy for special tokens.
    special: Option<Vec<i64>>,
    decided: BTreeSet<(usize, i32, i64)>,
    told: BTreeSet<(usize, i32, i64, Option<usize>)>,
    expected: Expected,
}

/// What becomes of a history, with expired notices that are stale after so many seconds.
pub fn play(history: &History, stale_after: i64) -> Expected {
    let mut model = Model { leads: history.shape.leads.to_vec(), ..Model::default() };
    let (clock, up) = (history.clock(), history.up());
    for tick in 0..history.shape.ticks {
        let now = clock[tick];
        let (late, before): (Vec<&Event>, Vec<&Event>) =
            history.at(tick).iter().partition(|event| matches!(event.what, What::Issue { late: 1.., .. }));
        before.iter().for_each(|event| model.happens(&event.what, now));
        if up[tick] {
            model.look_at_all(now, stale_after);
        }
        late.iter().for_each(|event| model.happens(&event.what, now));
    }
    model.expected
}

impl Model {
    fn happens(&mut self, what: &What, now: i64) {
        match *what {
            What::Issue { token, owner, age, expires, late } => {
                self.tokens.insert(token, Token::new(owner, now - late - age, expires, false));
            }
            What::Watch { token, owner, age, expires } => match self.tokens.get_mut(&token).map(Token::listed) {
                None => {
                    let set_at = age.map_or(LONG_AGO, |age| now - age);
                    self.tokens.insert(token, Token::new(owner, set_at, expires, true));
                }
                Some(known) if known.state == State::Active => known.set_deadline(expires, now),
                Some(known) if ahead(expires, now) => {
                    known.state = State::Active;
                    known.generation += 1;
                    known.set_at = now;
                    known.expires = expires;
                }
                Some(_) => {}
            },
            What::Edit { token, expires } => {
                let Some(known) = self.tokens.get_mut(&token) else { return };
                let editable = known.state == State::Active && !known.replaced && ahead(known.expires, now);
                if editable && ahead(expires, now) {
                    known.set_deadline(expires, now);
                }
            }
            What::Rename { token, special } => {
                let Some(known) = self.tokens.get_mut(&token) else { return };
                if known.state == State::Active && !known.replaced && ahead(known.expires, now) {
                    known.special = special;
                }
            }
            What::Revoke { token } => {
                let Some(known) = self.tokens.get_mut(&token) else { return };
                if known.state != State::Revoked && ahead(known.expires, now) {
                    known.state = State::Revoked;
                }
            }
            What::Rotate { token, successor, grace } => {
                let Some(known) = self.tokens.get_mut(&token) else { return };
                let expires = known.expires.map(|expires| now + expires - known.set_at);
                if known.replaced || known.watched || known.state == State::Revoked || !ahead(expires, now) {
                    return;
                }
                known.replaced = true;
                if ahead(known.expires, now) && grace > 0 {
                    known.state = State::Active;
                    known.expires = Some(known.expires.map_or(now + grace, |expires| expires.min(now + grace)));
                } else if ahead(known.expires, now) {
                    known.state = State::Revoked;
                }
                let successor_token = Token { special: known.special, ..Token::new(known.owner, now, expires, false) };
                self.tokens.insert(successor, successor_token);
            }
            What::Link { owner, contact } => {
                self.links.insert((owner, contact));
            }
            What::Unlink { owner, contact } => {
                self.links.remove(&(owner, contact));
            }
            What::Suppress { contact } => {
                self.suppressed.insert(contact);
            }
            What::Unsuppress { contact } => {
                self.suppressed.remove(&contact);
            }
            What::Leads(ref leads) => self.leads.clone_from(leads),
            What::Special(ref leads) => self.special.clone_from(leads),
            What::Down { .. } | What::Leap { .. } => {}
        }
    }

    fn look_at_all(&mut self, now: i64, stale_after: i64) {
        let mut spoken = Vec::new();
        for (id, token) in &mut self.tokens {
            let Some(expires) = token.expires else { continue };
            if token.state == State::Expired && now < expires {
                // A wrong clock had marked it.
                token.state = State::Active;
                token.generation += 1;
            }
            if token.state != State::Active {
                continue;
            }
            if now >= expires {
                token.state = State::Expired;
                if !token.replaced {
                    spoken.push((*id, token.owner, token.generation, 0, now - expires > stale_after));
                }
                continue;
            }
            let owed = |lead: &i64| lead * 5 <= (expires - token.set_at) * 4 && expires - lead <= now;
            let leads = self.special.as_ref().filter(|_| token.special).unwrap_or(&self.leads);
            let mut due: Vec<i64> = leads.iter().copied().filter(owed).collect();
            due.sort_unstable();
            if !token.replaced && !due.is_empty() {
                spoken.push((*id, token.owner, token.generation, due[0], false));
                let wider = due[1..].iter().map(|lead| (*id, token.generation, *lead));
                self.decided.extend(wider);
            }
        }
        for (token, owner, generation, lead, stale) in spoken {
            let first = self.decided.insert((token, generation, lead));
            let mut to: Vec<Option<usize>> = self
                .links
                .range((owner, 0)..=(owner, usize::MAX))
                .map(|(_, contact)| *contact)
                .filter(|contact| !self.suppressed.contains(contact))
                .map(Some)
                .collect();
            if to.is_empty() {
                to.push(None);
            }
            for to in to {
                let line = Line { now, token, generation, lead, to, stale };
                if first {
                    self.expected.must.insert(line);
                    self.told.insert((token, generation, lead, to));
                } else if !self.told.contains(&(token, generation, lead, to)) {
                    self.expected.may.insert(line);
                }
            }
        }
    }
}
