//! Schedules against a calendar that is not ours: Python's `zoneinfo`, over a year of each, in zones that change their clocks
//! in every way there is. With LAPSED_TEST_LONG=1 expressions that fire every few seconds are among them.

use std::io::Write;
use std::process::{Command, Stdio};

use chrono::{DateTime, NaiveDate, Offset, TimeDelta, TimeZone, Utc};
use chrono_tz::Tz;
use lapsed::config;
use lapsed::schedule::Cron;

/// A year that is over, with a leap day: every edition of the tz database since knows it.
const YEAR: &str = "2024-01-01";
const DAYS: i64 = 366;

/// By an hour, by half an hour, at midnight, backwards in summer, off the full hour, and never.
const ZONES: [&str; 8] = [
    "Europe/Berlin",
    "Europe/Dublin",
    "America/New_York",
    "America/Havana",
    "America/Santiago",
    "Australia/Lord_Howe",
    "Pacific/Chatham",
    "Asia/Kolkata",
];

/// What is compared over the whole year: each fires once a day at most, or every hour.
const RARELY: [&str; 8] = [
    "0 17 3 * * *",
    "0 47 2 * * *",
    "0 30 2 * * *",
    "0 0 0 * * *",
    "0 15 0 * * SUN",
    "0 0 12 1 */3 *",
    "0 30 1,2,3 * * *",
    "0 5 * * * *",
];

/// What is compared over the days around each change of the clocks.
const OFTEN: [&str; 3] = ["*/20 * * * * *", "0 */10 * * * *", "0 */20 1-3 * * *"];

/// The same, with so many firings that comparing them takes a minute.
const ALL_THE_TIME: [&str; 2] = ["*/5 * * * * *", "30 * * * * *"];

/// What to compare: a zone, from which day on, for how many days, and which expression.
struct Question {
    zone: Tz,
    first: NaiveDate,
    days: i64,
    cron: String,
}

impl Question {
    fn line(&self) -> String {
        format!("{}\t{}\t{}\t{}\n", self.zone.name(), self.first, self.days, self.cron)
    }

    fn start(&self) -> DateTime<Utc> {
        self.first.and_hms_opt(0, 0, 0).expect("a time").and_utc()
    }

    /// The zone's offset at noon of each day.
    fn offsets(&self) -> Vec<i64> {
        let at = |n| self.start() + TimeDelta::days(n) + TimeDelta::hours(12);
        let offset = |n| self.zone.offset_from_utc_datetime(&at(n).naive_utc()).fix().local_minus_utc();
        (0..self.days).map(|n| i64::from(offset(n))).collect()
    }

    /// What we say.
    fn firings(&self) -> Vec<i64> {
        let cron = Cron::parse(&self.cron, self.zone).expect("an expression");
        let end = self.start() + TimeDelta::days(self.days);
        let mut firings = Vec::new();
        let mut at = self.start();
        while let Some(next) = cron.next_after(at).filter(|next| *next <= end) {
            firings.push(next.timestamp());
            at = next;
        }
        firings
    }
}

/// The days after whose noon a zone's clocks change, before the noon of the next.
fn changes(zone: Tz) -> Vec<NaiveDate> {
    let year = Question { zone, first: YEAR.parse().expect("a date"), days: DAYS, cron: String::new() };
    let offsets = year.offsets();
    let days = year.first.iter_days().zip(offsets.windows(2));
    days.filter(|(_, pair)| pair[0] != pair[1]).map(|(day, _)| day).collect()
}

/// What Python says: offsets and firings.
fn answers(questions: &[Question]) -> Vec<(Vec<i64>, Vec<i64>)> {
    let mut python = Command::new("python3")
        .args(["-I", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/firings.py")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3, which tests/run provides");
    let input: String = questions.iter().map(Question::line).collect();
    let mut stdin = python.stdin.take().expect("a pipe");
    let writing = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = python.wait_with_output().expect("an answer");
    writing.join().expect("no panic").expect("all is read");
    assert!(output.status.success(), "{}", output.status);
    let numbers = |text: &str| -> Vec<i64> {
        text.split(',').filter(|n| !n.is_empty()).map(|n| n.parse().expect("a number")).collect()
    };
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(|line| line.split_once('\t').expect("two lists")).map(|(a, b)| (numbers(a), numbers(b))).collect()
}

#[test]
fn a_year_in_eight_zones_agrees_with_another_calendar() {
    let long = std::env::var("LAPSED_TEST_LONG").is_ok_and(|value| value == "1");
    let often = OFTEN.iter().chain(if long { &ALL_THE_TIME[..] } else { &[] });
    let mut questions = Vec::new();
    let defaults = config::load(None).expect("the defaults").schedule;
    for name in ZONES {
        let zone: Tz = name.parse().expect("a zone");
        let nightly = [&defaults.purge, &defaults.reconcile].map(|cron| cron.as_str().to_owned());
        let year = RARELY.iter().map(ToString::to_string).chain(nightly);
        questions.extend(year.map(|cron| Question { zone, first: YEAR.parse().expect("a date"), days: DAYS, cron }));
        let changes = changes(zone);
        assert_eq!(changes.len(), if name == "Asia/Kolkata" { 0 } else { 2 }, "{name}");
        for day in changes {
            let around = |cron: &&str| Question { zone, first: day, days: 2, cron: (*cron).to_owned() };
            questions.extend(often.clone().map(around));
        }
    }
    let answers = answers(&questions);
    assert_eq!(answers.len(), questions.len());
    let mut compared = 0;
    for (question, (offsets, firings)) in questions.iter().zip(answers) {
        let named = || format!("{} in {} from {}", question.cron, question.zone, question.first);
        assert_eq!(offsets, question.offsets(), "two tz databases differ: update the system's. {}", named());
        let ours = question.firings();
        let differs = ours.iter().zip(&firings).find(|(ours, theirs)| ours != theirs);
        assert_eq!((differs, ours.len()), (None, firings.len()), "{}", named());
        compared += ours.len();
    }
    assert!(compared > if long { 700_000 } else { 200_000 }, "{compared}");
}

/// Whatever the clocks do, the night's work is done on each day, once.
#[test]
fn a_nightly_job_runs_once_on_each_day() {
    for name in ZONES {
        let zone: Tz = name.parse().expect("a zone");
        for cron in ["0 17 3 * * *", "0 30 2 * * *", "0 0 0 * * *", "0 30 0 * * *", "0 59 23 * * *"] {
            let year = Question { zone, first: YEAR.parse().expect("a date"), days: DAYS, cron: cron.to_owned() };
            let at = |seconds: &i64| DateTime::from_timestamp(*seconds, 0).expect("in range").with_timezone(&zone);
            let days: Vec<NaiveDate> = year.firings().iter().map(|seconds| at(seconds).date_naive()).collect();
            assert!(days.windows(2).all(|pair| pair[0].succ_opt() == Some(pair[1])), "{cron} in {name}");
            assert!(days.len() >= 365, "{cron} in {name}: {}", days.len());
        }
    }
}
