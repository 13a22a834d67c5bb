//! `lapsed forecast`: what the coming days bring.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::path::PathBuf;

use chrono::{NaiveDate, TimeDelta};
use chrono_tz::Tz;
use clap::Args;

use super::listing::{Fields, FormatArg, Listing};
use super::{Failure, Outcome, output, run};
use crate::clock::{Clock, Timestamp};
use crate::config::{self, Settings};
use crate::forecast::{Ahead, Day, Forecast as Coming, Told};
use crate::policies::Traits;
use crate::policy::{Lead, SAME_DEADLINE};
use crate::store::Store;
use crate::token::ContactId;

/// The columns of the longest bar.
const BAR: u64 = 30;

/// `lapsed forecast`
#[derive(Debug, Args)]
pub struct Forecast {
    /// For how many days, today included
    #[arg(long, default_value_t = 90, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=3_660))]
    days: u16,
    /// Compare with what the reminder settings of this configuration file would bring
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    #[command(flatten)]
    format: FormatArg,
}

/// The names of [`fields`]; with `--compare`, those of the other file follow.
const FIELDS: [&str; 5] = ["day", "expire", "reminders", "mails", "unreachable"];
const WITH_OTHER: [&str; 8] =
    ["day", "expire", "reminders", "mails", "unreachable", "other_reminders", "other_mails", "other_unreachable"];

impl Forecast {
    pub(super) async fn run<S: Store>(self, store: &S, clock: &impl Clock, settings: &Settings) -> Outcome {
        let now = clock.now();
        let zone = settings.schedule.purge.zone();
        let mut coming = vec![self.begin(store, settings, now, zone).await?];
        if let Some(file) = &self.compare {
            let other = config::load(Some(file)).map_err(|error| Failure::Usage(error.to_string()))?;
            coming.push(self.begin(store, &other, now, zone).await?);
        }
        fill(store, now, &mut coming).await?;
        self.print(&coming, zone)
    }

    /// An empty forecast by these settings. Nothing is written for it: a contact that is not there yet is made up.
    async fn begin<S: Store>(
        &self,
        store: &S,
        settings: &Settings,
        now: Timestamp,
        zone: Tz,
    ) -> Result<Coming, Failure> {
        let mut named = HashMap::new();
        for address in settings.reminders.policies.iter().flat_map(|policy| &policy.contacts) {
            let known = store.find_contact(address).await?;
            if known.as_ref().is_none_or(|contact| contact.suppressed.is_none()) {
                let id = known.map_or_else(|| ContactId::new(address.bucket(), now), |contact| contact.id);
                named.entry(address.clone()).or_insert(id);
            }
        }
        let groups = run::groups(settings, |address| named.get(address).copied());
        Ok(Coming::new(run::policy(settings), groups, settings.reminders.skip_unused, now, self.days, zone))
    }

    fn print(&self, coming: &[Coming], zone: Tz) -> Outcome {
        let [this, rest @ ..] = coming else { return Ok(()) };
        let other = rest.first();
        let header: &[&str] = match other {
            Some(_) => &["DAY", "EXPIRE", "REMINDERS", "MAILS", "BY THE OTHER", ""],
            None => &["DAY", "EXPIRE", "REMINDERS", "MAILS", ""],
        };
        let names: &[&str] = if other.is_some() { &WITH_OTHER } else { &FIELDS };
        let mut listing = Listing::new(self.format, header, names)?;
        let most = this.days().map(|(_, day)| day.mails).max().unwrap_or_default().max(1);
        let mut all = (Day::default(), Day::default());
        let others = other.map(|other| other.days().map(|(_, day)| day).collect::<Vec<_>>());
        for (i, (date, day)) in this.days().enumerate() {
            let other = others.as_ref().and_then(|days| days.get(i)).copied();
            sum(&mut all.0, day);
            sum(&mut all.1, other.unwrap_or_default());
            let quiet = day == Day::default() && other.is_none_or(|other| other == Day::default());
            if self.format.is_table() && quiet {
                continue;
            }
            listing.row(|| fields(date, day, other), || cells(date, day, other, this.many(), most))?;
        }
        listing.end("Nothing expires, and nobody is mailed.")?;
        let mut rows = vec![
            ("expire", format!("{} within {} ({zone})", some(all.0.expire, "token"), some(self.days.into(), "day"))),
            ("mails", format!("{} about {}", all.0.mails, reminders(all.0.reminders))),
        ];
        if all.0.unreachable > 0 {
            rows.push((
                "nobody",
                format!("{} of owners without a contact that takes mail", reminders(all.0.unreachable)),
            ));
        }
        if other.is_some() {
            let more = i128::from(all.1.mails) - i128::from(all.0.mails);
            rows.push(("with the other", format!("{} about {}, {more:+}", all.1.mails, reminders(all.1.reminders))));
        }
        output::say(output::facts(&rows).trim_end());
        Ok(())
    }
}

/// Adds every token that a forecast reaches, in the order of deadlines: memory follows what is due within a few weeks, and not
/// the number of tokens.
async fn fill<S: Store>(store: &S, now: Timestamp, coming: &mut [Coming]) -> anyhow::Result<()> {
    let widest = coming.iter().filter_map(Coming::widest).max().map_or(TimeDelta::zero(), Lead::span);
    let until = coming.iter().map(Coming::until).max().unwrap_or(now);
    let suppressed = store.suppressed().await?;
    // What the ledger has already matters where a reminder is due now, and is read for some days at a time.
    let window = (widest / 30).max(TimeDelta::days(1));
    let due_now = now.checked_add_signed(widest).unwrap_or(until).min(until);
    let mut from = now;
    while from < due_now {
        let end = (from + window).min(due_now);
        let mut told = Told::default();
        let read = |row| {
            told.add(&row);
            ControlFlow::Continue(())
        };
        // A deadline may have moved a little since its reminders were written.
        store.each_ledger_row(from - SAME_DEADLINE, end + SAME_DEADLINE, read).await?;
        add(store, (from, end), &told, &suppressed, coming).await?;
        from = end;
    }
    add(store, (from, until), &Told::default(), &suppressed, coming).await
}

/// Adds the tokens whose deadline lies after `from` and not after `until`.
async fn add<S: Store>(
    store: &S,
    (from, until): (Timestamp, Timestamp),
    told: &Told,
    suppressed: &HashSet<ContactId>,
    coming: &mut [Coming],
) -> anyhow::Result<()> {
    let described = coming.iter().any(Coming::has_groups);
    let mut takes_mail = Vec::new();
    let visit = |token: Ahead, traits: Option<Traits>, contacts: &[ContactId]| {
        takes_mail.clear();
        takes_mail.extend(contacts.iter().filter(|contact| !suppressed.contains(contact)));
        for forecast in coming.iter_mut() {
            forecast.reached(token.deadline.expires_at);
            let group = traits.as_ref().and_then(|traits| forecast.group_of(traits));
            forecast.add(&token, group, told, &takes_mail);
        }
    };
    Ok(store.each_ahead(from, until, described, visit).await?)
}

/// "1 token", "2 tokens".
fn some(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn reminders(count: u64) -> String {
    some(count, "reminder")
}

fn sum(all: &mut Day, day: Day) {
    all.expire += day.expire;
    all.reminders += day.reminders;
    all.mails += day.mails;
    all.unreachable += day.unreachable;
}

fn fields(date: NaiveDate, day: Day, other: Option<Day>) -> Fields {
    let mut fields: Fields = vec![
        ("day", date.to_string().into()),
        ("expire", day.expire.into()),
        ("reminders", day.reminders.into()),
        ("mails", day.mails.into()),
        ("unreachable", day.unreachable.into()),
    ];
    if let Some(other) = other {
        fields.push(("other_reminders", other.reminders.into()));
        fields.push(("other_mails", other.mails.into()));
        fields.push(("other_unreachable", other.unreachable.into()));
    }
    fields
}

fn cells(date: NaiveDate, day: Day, other: Option<Day>, many: u64, most: u64) -> Vec<String> {
    let bar = |count: u64| usize::try_from(count * BAR / most).unwrap_or_default().max(usize::from(count > 0));
    let mut chart = "#".repeat(bar(day.mails));
    if day.expire >= many {
        chart.push_str("  many expire at once");
    }
    if day.unreachable > 0 {
        chart.push_str(&format!("  {} for nobody", reminders(day.unreachable)));
    }
    let mut cells = vec![
        date.format("%a %Y-%m-%d").to_string(),
        day.expire.to_string(),
        day.reminders.to_string(),
        day.mails.to_string(),
    ];
    cells.extend(other.map(|other| match i128::from(other.mails) - i128::from(day.mails) {
        0 => other.mails.to_string(),
        more => format!("{} ({more:+})", other.mails),
    }));
    cells.push(chart.trim_start().to_owned());
    cells
}
