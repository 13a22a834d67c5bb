//! What one mail costs: from a letter to the bytes that are sent, and once for each process, the templates.

use std::hint::black_box;
use std::time::Instant;

use lapsed::mail::letter::{Content, Item, Kind, Letter};
use lapsed::mail::{Composer, sample};
use lapsed::token::Address;

use crate::Sizes;
use crate::fill::now;
use crate::table::{Line, median};

pub fn rows(sizes: &Sizes) -> Vec<Line> {
    let from = || "Token watch <tokens@example.org>".parse().expect("a mailbox");
    let new = || Composer::new(from(), None, Some("https://example.org/t/{token_id}".into())).expect("templates");
    let began = Instant::now();
    let composer = new();
    let first = began.elapsed();
    let began = Instant::now();
    black_box(new());
    let again = began.elapsed();
    let Content::Reminders(items) = sample::content(Kind::Reminder, now()) else { panic!("reminders") };
    let to = sample::contact(Address::parse("ann@example.org").expect("an address"));
    let mut lines = Vec::new();
    for (tokens, wanted) in [(1, "150 us"), (10, ""), (50, "")] {
        let items: Vec<Item> = items.iter().cycle().take(tokens).cloned().collect();
        let letter =
            Letter { message: uuid::Uuid::from_u128(1).into(), to: to.clone(), content: Content::Reminders(items) };
        let times = u32::try_from(sizes.of(20_000)).expect("small") / u32::try_from(tokens).expect("small");
        let each = (0..sizes.runs).map(|_| {
            let began = Instant::now();
            for _ in 0..times {
                black_box(composer.compose(black_box(&letter), now()).expect("composed"));
            }
            began.elapsed().as_secs_f64() * 1e6 / f64::from(times)
        });
        let bytes = composer.compose(&letter, now()).expect("composed").bytes.len();
        lines.push(Line {
            what: format!("render: a mail about {tokens} token{}", if tokens == 1 { "" } else { "s" }),
            got: format!("{:.0} us, {bytes} bytes", median(each)),
            against: format!(
                "the templates, once: {:.1} ms, and {:.1} ms again",
                first.as_secs_f64() * 1e3,
                again.as_secs_f64() * 1e3
            ),
            ratio: String::new(),
            wanted,
        });
    }
    lines
}
