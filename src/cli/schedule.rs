//! `lapsed schedule`: when each job looks for work next, from the code by which the daemon does.

use chrono::{DateTime, NaiveDate, TimeDelta};
use chrono_tz::Tz;
use clap::Args;

use super::listing::{Fields, FormatArg, Listing, instant};
use super::{Outcome, output};
use crate::clock::{Clock, SystemClock, Timestamp, whole_seconds};
use crate::config::Settings;
use crate::expires::Expires;
use crate::schedule::Cron;

/// `lapsed schedule`
#[derive(Debug, Args)]
pub struct Schedule {
    /// How many runs of each job
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1_000))]
    next: u16,
    /// From when on: a date (its start, in the schedule's zone) or an instant, in the place of now
    #[arg(long, value_name = "TIME", value_parser = From::parse)]
    from: Option<From>,
    #[command(flatten)]
    format: FormatArg,
}

/// The names of a run's fields.
const FIELDS: [&str; 5] = ["job", "expression", "time_zone", "at", "local"];

impl Schedule {
    pub(super) fn run(self, settings: &Settings) -> Outcome {
        let schedule = &settings.schedule;
        let jobs = [
            ("expire", &schedule.expire),
            ("remind", &schedule.remind),
            ("deliver", &schedule.deliver),
            ("purge", &schedule.purge),
            ("reconcile", &schedule.reconcile),
        ];
        let now = SystemClock::default().now();
        let header = &["JOB", "IN ITS ZONE", "IN UTC"];
        let mut listing = Listing::new(self.format, header, &FIELDS)?;
        let mut words = Vec::new();
        for (job, cron) in jobs {
            words.push((job, format!("{} ({}, {})", cron.in_words(), cron.as_str(), cron.zone())));
            let mut at = self.from.and_then(|from| from.instant(cron.zone())).unwrap_or(now);
            for _ in 0..self.next {
                let Some(next) = cron.next_after(at) else { break };
                listing.row(|| fields(job, cron, next), || cells(job, cron, next))?;
                at = next;
            }
        }
        if self.format.is_table() {
            output::print(&format!("{}\n", output::facts(&words)))?;
        }
        listing.end("")?;
        Ok(())
    }
}

/// From when on.
#[derive(Clone, Copy, Debug)]
enum From {
    /// From the start of this day.
    Day(NaiveDate),
    /// From this instant.
    At(Timestamp),
}

impl From {
    fn parse(text: &str) -> Result<Self, String> {
        match (NaiveDate::parse_from_str(text, "%Y-%m-%d"), DateTime::parse_from_rfc3339(text)) {
            (Ok(day), _) => Ok(Self::Day(day)),
            (_, Ok(at)) => Ok(Self::At(whole_seconds(at.to_utc()))),
            _ => Err("write a date (2027-03-28) or an instant (2027-03-28T00:00:00Z)".to_owned()),
        }
    }

    /// A second before, so that a firing at that very instant is among those that come.
    fn instant(self, zone: Tz) -> Option<Timestamp> {
        let at = match self {
            Self::At(at) => at,
            Self::Day(day) => Expires::EndOf(day.pred_opt()?).instant(Timestamp::UNIX_EPOCH, zone).ok()??,
        };
        Some(at - TimeDelta::seconds(1))
    }
}

fn local(cron: &Cron, at: Timestamp) -> String {
    at.with_timezone(&cron.zone()).format("%a %Y-%m-%d %H:%M:%S %Z").to_string()
}

fn fields(job: &str, cron: &Cron, at: Timestamp) -> Fields {
    vec![
        ("job", job.into()),
        ("expression", cron.as_str().into()),
        ("time_zone", cron.zone().name().into()),
        ("at", instant(Some(at))),
        ("local", at.with_timezone(&cron.zone()).to_rfc3339().into()),
    ]
}

fn cells(job: &str, cron: &Cron, at: Timestamp) -> Vec<String> {
    vec![job.to_owned(), local(cron, at), at.format("%Y-%m-%d %H:%M:%S UTC").to_string()]
}
