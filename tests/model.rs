//! Random histories on the real store, against an oracle that looks at every token at every tick.
//!
//! A tick is an hour. Tokens appear (some late, as imports do), their deadlines move, the daemon is down for a while, leads
//! come and go, the clock leaps either way. The oracle has no watermark, no mark and no page, and shares no code with the
//! policy. What both write must be the same: the same token, deadline and lead, at the same tick.
//!
//! One kind of history is known to differ: the clock leaps ahead, the daemon stops, and real time passes the false
//! watermark before it starts again. The daily reconcile pass exists for those; they are so rare that none is among
//! these seeds.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::backend::OnSqlite;
use crate::support::world::{World, dawn};
use chrono::TimeDelta;
use lapsed::change::{self, Edit};
use lapsed::clock::Timestamp;
use lapsed::policy::{Lead, Policy};
use lapsed::store::Accounts;
use lapsed::store::accounts::ReminderState;
use lapsed::token::TokenId;

const HISTORIES: u64 = 100;
const TICKS: i64 = 70;

/// A small generator of numbers (the constants are Knuth's): the same histories in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: i64) -> i64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        i64::try_from((self.0 >> 33) % bound.unsigned_abs()).expect("small")
    }

    fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below(high - low + 1)
    }
}

/// What happens to a token: it appears (with the tick at which its deadline was set), or its deadline moves.
#[derive(Clone, Copy, Debug)]
struct Event {
    at: i64,
    token: usize,
    set_at: Option<i64>,
    expires: i64,
}

#[derive(Debug)]
struct History {
    events: Vec<Event>,
    up: BTreeSet<i64>,
    leads: Vec<Vec<i64>>,
    /// What the clock says at each tick.
    clock: Vec<i64>,
}

fn history(random: &mut Random) -> History {
    let mut events = Vec::new();
    for token in 0..random.between(1, 5) as usize {
        let set_at = random.between(0, 30);
        let mut expires = [40, 45, set_at + random.between(2, 40)][random.below(3) as usize].max(set_at + 2);
        let mut at = (set_at + [0, 0, 0, 1, random.between(0, 25)][random.below(5) as usize]).min(TICKS - 1);
        events.push(Event { at, token, set_at: Some(set_at), expires });
        for _ in 0..[0, 0, 1, 2, 4][random.below(5) as usize] {
            at = (at + random.between(0, 15)).min(TICKS - 1);
            let moved = [expires + 1, expires - 1, expires + random.between(-10, 30), at + random.between(1, 35)];
            expires = moved[random.below(4) as usize];
            events.push(Event { at, token, set_at: None, expires });
        }
    }
    events.sort_by_key(|event| event.at);
    let mut up: BTreeSet<i64> = (0..TICKS).collect();
    for _ in 0..random.below(3) {
        let from = random.between(0, 55);
        let until = from + random.between(1, 25);
        up.retain(|tick| !(from..until).contains(tick));
    }
    let mut leads = vec![vec![20, 10, 4]; TICKS as usize];
    if random.below(2) == 0 {
        let (from, gone) = (random.between(1, 40), [20, 10, 4][random.below(3) as usize]);
        let until = (from + random.between(1, 20)).min(TICKS);
        leads[from as usize..until as usize].iter_mut().for_each(|leads| leads.retain(|lead| *lead != gone));
    }
    if random.below(5) < 2 {
        leads[random.between(1, 50) as usize..].iter_mut().for_each(|leads| leads.push(15));
    }
    let mut clock: Vec<i64> = (0..TICKS).collect();
    if random.below(5) < 2 {
        let from = random.between(1, 40);
        let by = [random.between(5, 30), -random.between(1, 10)][random.below(2) as usize];
        let until = (from + random.between(1, 4)).min(TICKS);
        clock[from as usize..until as usize].iter_mut().for_each(|now| *now += by);
    }
    History { events, up, leads, clock }
}

/// A token as the oracle knows it.
struct Known {
    set_at: i64,
    expires: i64,
    generation: i32,
}

/// What is written: at which instant, token, deadline and lead.
type Written = BTreeSet<(i64, usize, i32, i64)>;

fn oracle(history: &History) -> Written {
    let mut tokens: BTreeMap<usize, Known> = BTreeMap::new();
    let mut seen: BTreeSet<(usize, i32, i64)> = BTreeSet::new();
    let mut written = Written::new();
    for tick in 0..TICKS {
        let now = history.clock[tick as usize];
        for event in history.events.iter().filter(|event| event.at == tick) {
            match (tokens.get_mut(&event.token), event.set_at) {
                (None, Some(set_at)) => {
                    tokens.insert(event.token, Known { set_at, expires: event.expires, generation: 0 });
                }
                (Some(known), None) if known.expires > now && event.expires > now => {
                    if (event.expires - known.expires).abs() > 1 {
                        known.generation += 1;
                        known.set_at = now;
                    }
                    known.expires = event.expires;
                }
                _ => {}
            }
        }
        if !history.up.contains(&tick) {
            continue;
        }
        for (token, known) in tokens.iter().filter(|(_, known)| now < known.expires) {
            let mut due: Vec<i64> = history.leads[tick as usize]
                .iter()
                .copied()
                .filter(|lead| 5 * lead <= 4 * (known.expires - known.set_at) && known.expires - lead <= now)
                .collect();
            due.sort_unstable();
            for (i, lead) in due.into_iter().enumerate() {
                if seen.insert((*token, known.generation, lead)) && i == 0 {
                    written.insert((now, *token, known.generation, lead));
                }
            }
        }
    }
    written
}

fn instant(tick: i64) -> Timestamp {
    dawn() + TimeDelta::hours(tick)
}

async fn real(history: &History, batch: u32) -> Written {
    let mut world = World::<OnSqlite>::new().await;
    world.rules.batch = batch;
    world.clock.set(instant(0));
    let owner = world.owner("alice", &["alice@example.org"]).await;
    let mut ids: BTreeMap<usize, TokenId> = BTreeMap::new();
    for tick in 0..TICKS {
        let now = instant(history.clock[tick as usize]);
        world.clock.set(now);
        for event in history.events.iter().filter(|event| event.at == tick) {
            match (ids.get(&event.token), event.set_at) {
                (None, Some(set_at)) => {
                    let id = world.imported(owner, instant(set_at), instant(event.expires)).await;
                    ids.insert(event.token, id);
                }
                (Some(id), None) => {
                    let edit = Edit { expires_at: Some(Some(instant(event.expires))), ..Edit::default() };
                    // Refused where the old or the new deadline has passed, as the oracle has it.
                    let _ = world.store.change_token(*id, |token| change::edit(token, &edit, now)).await;
                }
                _ => {}
            }
        }
        if history.up.contains(&tick) {
            let leads = history.leads[tick as usize].iter().map(|lead| Lead::new(TimeDelta::hours(*lead)));
            world.rules.policy = Policy::new(leads, true, TimeDelta::days(7));
            world.remind().await;
        }
    }
    let mut written = Written::new();
    for (token, id) in ids {
        for row in world.store.history(id).await.expect("a read") {
            if row.state == ReminderState::Pending {
                let at = (row.created_at - dawn()).num_hours();
                assert!(written.insert((at, token, row.generation, row.lead.seconds() / 3_600)));
            }
        }
    }
    written
}

#[tokio::test]
async fn the_store_and_a_naive_oracle_agree() {
    let mut reminders = 0;
    for seed in 0..HISTORIES {
        let mut random = Random(seed);
        let history = history(&mut random);
        let expected = oracle(&history);
        let batch = u32::try_from(random.between(1, 3)).expect("small");
        let found = real(&history, batch).await;
        let lost: Vec<_> = expected.difference(&found).collect();
        let extra: Vec<_> = found.difference(&expected).collect();
        assert!(
            lost.is_empty() && extra.is_empty(),
            "seed {seed}: (tick, token, generation, lead) lost {lost:?}, extra {extra:?}, in {history:#?}"
        );
        reminders += expected.len();
    }
    assert!(reminders > 200, "the histories have something to tell: {reminders}");
}
