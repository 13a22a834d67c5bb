//! What happens in a history, and how random ones are made.

use std::collections::BTreeSet;

pub const HOUR: i64 = 3_600;
pub const DAY: i64 = 24 * HOUR;

/// How large a history is. Spans are in seconds.
#[derive(Clone, Debug)]
pub struct Shape {
    /// How far the clock moves between two passes.
    pub tick: i64,
    pub ticks: usize,
    pub owners: usize,
    pub contacts: usize,
    /// Tokens that appear one by one.
    pub tokens: usize,
    /// Tokens that a list brings all at once, with one deadline.
    pub listed: usize,
    /// The leads at the beginning, and one that comes later.
    pub leads: [i64; 3],
    pub another_lead: i64,
    /// How many ticks lie between two reconcile passes; 0: there are none.
    pub reconcile_every: usize,
    /// How many tokens a step looks at.
    pub batch: u32,
}

/// Something that happens before the pass of a tick.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub at: usize,
    pub what: What,
}

/// Instants are in seconds after dawn, by the true clock.
#[derive(Clone, Debug, PartialEq)]
pub enum What {
    /// A token whose deadline was set so long before it appears. One that is late was written so long before its commit,
    /// which comes after the pass.
    Issue {
        token: usize,
        owner: usize,
        age: i64,
        expires: Option<i64>,
        late: i64,
    },
    /// A list names the token, with its age where the list knows it; the first time or again.
    Watch {
        token: usize,
        owner: usize,
        age: Option<i64>,
        expires: Option<i64>,
    },
    Edit {
        token: usize,
        expires: Option<i64>,
    },
    Revoke {
        token: usize,
    },
    Rotate {
        token: usize,
        successor: usize,
        grace: i64,
    },
    Link {
        owner: usize,
        contact: usize,
    },
    Unlink {
        owner: usize,
        contact: usize,
    },
    Suppress {
        contact: usize,
    },
    /// Somebody has mended the address.
    Unsuppress {
        contact: usize,
    },
    /// Its description says from now on whether it is one of those that may follow a policy of their own.
    Rename {
        token: usize,
        special: bool,
    },
    /// From now on reminders are sent so long before deadlines.
    Leads(Vec<i64>),
    /// From now on those tokens follow a policy with these leads, or none of their own.
    Special(Option<Vec<i64>>),
    /// No passes before that tick.
    Down {
        until: usize,
    },
    /// The clock is wrong until that tick.
    Leap {
        until: usize,
        by: i64,
    },
}

#[derive(Clone, Debug)]
pub struct History {
    pub shape: Shape,
    pub events: Vec<Event>,
}

impl History {
    /// What the clock says at each tick, in seconds after dawn.
    pub fn clock(&self) -> Vec<i64> {
        let mut clock: Vec<i64> = (0..self.shape.ticks).map(|tick| tick as i64 * self.shape.tick).collect();
        for event in &self.events {
            if let What::Leap { until, by } = event.what {
                clock.iter_mut().take(until).skip(event.at).for_each(|now| *now += by);
            }
        }
        clock
    }

    /// Whether the daemon runs at each tick.
    pub fn up(&self) -> Vec<bool> {
        let mut up = vec![true; self.shape.ticks];
        for event in &self.events {
            if let What::Down { until } = event.what {
                up.iter_mut().take(until).skip(event.at).for_each(|up| *up = false);
            }
        }
        up
    }

    /// What happens at a tick.
    pub fn at(&self, tick: usize) -> &[Event] {
        let from = self.events.partition_point(|event| event.at < tick);
        let until = self.events.partition_point(|event| event.at <= tick);
        &self.events[from..until]
    }

    /// Whether the tick's pass reads all windows again.
    pub fn reconciles(&self, tick: usize) -> bool {
        self.shape.reconcile_every > 0 && tick % self.shape.reconcile_every == self.shape.reconcile_every - 1
    }
}

/// A small generator of numbers (the constants are Knuth's): the same histories in every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: i64) -> i64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        i64::try_from((self.0 >> 33) % bound.unsigned_abs()).expect("small")
    }

    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below(high - low + 1)
    }

    fn index(&mut self, bound: usize) -> usize {
        usize::try_from(self.below(bound as i64)).expect("small")
    }

    fn one_of<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.index(of.len())].clone()
    }

    fn chance(&mut self, one_in: i64) -> bool {
        self.below(one_in) == 0
    }
}

/// Up to five tokens in 70 hours, most of them with one of two deadlines: each rule meets each other within a few.
pub fn dense(random: &mut Random) -> History {
    let shape = Shape {
        tick: HOUR,
        ticks: 70,
        owners: 2,
        contacts: 2,
        tokens: random.between(1, 5) as usize,
        listed: 0,
        leads: [20 * HOUR, 10 * HOUR, 4 * HOUR],
        another_lead: 15 * HOUR,
        reconcile_every: 0,
        batch: random.between(1, 3) as u32,
    };
    Writer::new(shape, random).write()
}

/// A year of hundreds of owners, with a pass every twelve hours.
pub fn year(random: &mut Random, tokens: usize, reconcile_every: usize) -> History {
    let shape = Shape {
        tick: 12 * HOUR,
        ticks: 730,
        owners: 200,
        contacts: 240,
        tokens,
        listed: 2_000,
        leads: [30 * DAY, 7 * DAY, DAY],
        another_lead: 14 * DAY,
        reconcile_every,
        batch: 100,
    };
    Writer::new(shape, random).write()
}

struct Writer<'a> {
    shape: Shape,
    random: &'a mut Random,
    events: Vec<Event>,
    tokens: usize,
}

impl<'a> Writer<'a> {
    fn new(shape: Shape, random: &'a mut Random) -> Self {
        Self { shape, random, events: Vec::new(), tokens: 0 }
    }

    fn write(mut self) -> History {
        self.people();
        // Two instants at which many deadlines fall, as ends of quarters do.
        let (ticks, tick) = (self.shape.ticks as i64, self.shape.tick);
        let common = [ticks * 4 / 7 * tick, ticks * 5 / 7 * tick];
        for _ in 0..self.shape.tokens {
            self.life(&common);
        }
        self.list(common[1]);
        self.leads();
        self.disturbances();
        self.policies();
        self.events.sort_by_key(|event| event.at);
        History { shape: self.shape, events: self.events }
    }

    fn push(&mut self, at: usize, what: What) {
        if at < self.shape.ticks {
            self.events.push(Event { at, what });
        }
    }

    fn tick(&mut self) -> usize {
        self.random.index(self.shape.ticks)
    }

    fn new_token(&mut self) -> usize {
        self.tokens += 1;
        self.tokens - 1
    }

    /// Contacts that come and go. The first owners have none at first, and a contact may speak for several.
    fn people(&mut self) {
        let (owners, contacts) = (self.shape.owners, self.shape.contacts);
        for owner in owners / 10..owners {
            self.push(0, What::Link { owner, contact: owner % contacts });
            if self.random.chance(3) {
                let contact = self.random.index(contacts);
                self.push(0, What::Link { owner, contact });
            }
        }
        for _ in 0..owners {
            let (owner, contact, at) = (self.random.index(owners), self.random.index(contacts), self.tick());
            let what = match self.random.below(4) {
                0 => What::Link { owner, contact },
                1 => What::Unlink { owner, contact: owner % contacts },
                2 => What::Suppress { contact },
                _ => What::Unsuppress { contact },
            };
            if self.random.chance(3) {
                self.push(at, what);
            }
        }
    }

    /// A token, and what becomes of it.
    fn life(&mut self, common: &[i64; 2]) {
        let (tick, ticks) = (self.shape.tick, self.shape.ticks as i64);
        let owner = self.random.index(self.shape.owners);
        let mut at = self.random.between(0, ticks * 3 / 5);
        let age = [0, 0, 0, tick, self.random.between(0, 25) * tick][self.random.index(5)];
        let mut expires =
            [common[0], common[1], (at + self.random.between(2, ticks * 4 / 7)) * tick + self.random.below(tick)]
                [self.random.index(3)]
            .max((at + 2) * tick);
        let token = self.new_token();
        let watched = self.random.chance(3);
        let first = if watched {
            let age = (!self.random.chance(5)).then_some(age);
            What::Watch { token, owner, age, expires: Some(expires) }
        } else {
            let late = if self.random.chance(3) { self.random.between(1, HOUR - 1) } else { 0 };
            What::Issue { token, owner, age, expires: (!self.random.chance(20)).then_some(expires), late }
        };
        self.push(at as usize, first);
        for _ in 0..[0, 0, 1, 2, 4][self.random.index(5)] {
            at += self.random.between(0, ticks / 5);
            // By minutes, by a little more than what counts as the same, back again, earlier, later, soon.
            let moved = [
                expires + 60,
                expires - 59 * 60,
                expires + HOUR + 1,
                expires - HOUR,
                expires + self.random.between(-10, 30) * tick,
                at * tick + self.random.between(1, ticks / 2) * tick,
            ];
            let before = expires;
            expires = self.random.one_of(&moved);
            let to = (!self.random.chance(30)).then_some(expires);
            let change = if watched {
                What::Watch { token, owner, age: None, expires: to }
            } else {
                What::Edit { token, expires: to }
            };
            self.push(at as usize, change);
            if self.random.chance(4) {
                self.push(at as usize + 1, What::Edit { token, expires: Some(before) });
                expires = before;
            }
        }
        at += self.random.between(0, ticks / 5);
        match self.random.below(8) {
            0 => self.push(at as usize, What::Revoke { token }),
            1 => {
                let successor = self.new_token();
                let grace = self.random.one_of(&[0, 2 * tick, 9 * tick]);
                self.push(at as usize, What::Rotate { token, successor, grace });
            }
            _ => {}
        }
    }

    /// A list that is imported again and again, each time with deadlines that have shifted by seconds.
    fn list(&mut self, expires: i64) {
        let first = self.shape.ticks / 5;
        let tokens: Vec<(usize, usize, i64)> = (0..self.shape.listed)
            .map(|_| (self.new_token(), self.random.index(self.shape.owners), self.random.between(0, 60) * DAY))
            .collect();
        for run in 0..2_i64 {
            for &(token, owner, age) in &tokens {
                let expires = Some(expires + run);
                self.push(first + run as usize, What::Watch { token, owner, age: Some(age), expires });
            }
        }
    }

    /// A lead that is gone for a while, or another one that is there from some day on.
    fn leads(&mut self) {
        let (ticks, all) = (self.shape.ticks, self.shape.leads.to_vec());
        let mut now = all.clone();
        if self.random.chance(2) {
            let from = self.random.index(ticks / 2);
            let gone = self.random.one_of(&all);
            now.retain(|lead| *lead != gone);
            self.push(from, What::Leads(now.clone()));
            now = all;
            let until = from + 1 + self.random.index(ticks / 3);
            self.push(until, What::Leads(now.clone()));
        }
        if self.random.chance(2) {
            now.push(self.shape.another_lead);
            let from = ticks * 5 / 6 - self.random.index(ticks / 20 + 1);
            self.push(from, What::Leads(now));
        }
    }

    /// A policy for some tokens, which changes and may go; and tokens that move to it and away.
    fn policies(&mut self) {
        let ticks = self.shape.ticks;
        if !self.random.chance(2) {
            return;
        }
        let [longest, middle, shortest] = self.shape.leads;
        let choices = [vec![middle], vec![self.shape.another_lead, shortest], vec![longest, middle], vec![]];
        let mut from = self.random.index(ticks / 2);
        for _ in 0..self.random.between(1, 3) {
            let leads = (!self.random.chance(4)).then(|| self.random.one_of(&choices));
            self.push(from, What::Special(leads));
            from += 1 + self.random.index(ticks / 3);
        }
        for token in 0..self.tokens {
            if self.random.chance(3) {
                let at = self.tick();
                self.push(at, What::Rename { token, special: true });
                if self.random.chance(2) {
                    let later = at + 1 + self.random.index(ticks / 3);
                    self.push(later, What::Rename { token, special: false });
                }
            }
        }
    }

    /// Downtimes, and clocks that are wrong for a while.
    fn disturbances(&mut self) {
        let ticks = self.shape.ticks;
        let mut down = BTreeSet::new();
        for _ in 0..self.random.below(3) {
            let from = self.random.index(ticks * 4 / 5);
            let until = from + 1 + self.random.index(ticks.min(100) / 3);
            down.extend(from..until);
            self.push(from, What::Down { until });
        }
        for _ in 0..self.random.below(3) {
            let from = self.random.index(ticks / 2);
            let (until, by) = (from + 1 + self.random.index(4), self.random.between(-10, 30));
            // A downtime until true time has passed what a wrong clock said is what the reconcile pass is for.
            let shadow = from.saturating_sub(1)..until + by.unsigned_abs() as usize + 1;
            if by != 0 && !shadow.clone().any(|tick| down.contains(&tick)) {
                down.extend(shadow);
                self.push(from, What::Leap { until, by: by * self.shape.tick });
            }
        }
    }
}
