//! How people name an instant: "in 7 days", "at the end of 31 January 2027", and exactly.
//!
//! [`Moment`] is what a calendar says, without words: the templates of mails put it into those of a language. The rest is
//! English, for the command line. Pure. Days are calendar dates in the reader's zone, never multiples of 24 hours, so that "tomorrow" means
//! what the reader's calendar says, also across a change of daylight-saving time. Every function is total: instants
//! beyond the years that a calendar can hold are taken to its edge.

use std::fmt;

use chrono::{DateTime, Datelike, NaiveDate, TimeDelta, Timelike, Utc};
use chrono_tz::{OffsetName, Tz};

use crate::clock::Timestamp;

/// When less than this is left, the day alone is too coarse, and the hours, minutes or seconds are named too.
const SAY_WHAT_IS_LEFT: TimeDelta = TimeDelta::hours(12);

/// The years 2 to 9999: what a calendar can hold, and the store.
const EARLIEST: i64 = -62_104_060_800;
const LATEST: i64 = 253_402_300_799;

/// A deadline's day as seen from another day. Displays in English.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DayPhrase {
    /// The difference of the calendar dates; negative when the deadline's day is over.
    pub days: i64,
    /// What is left, where that is little.
    pub left: Option<TimeDelta>,
}

/// How far away a deadline is, in the words of a calendar.
///
/// A deadline at local midnight belongs to the day that it ends.
///
/// ```
/// # use chrono::{TimeZone, Utc};
/// use lapsed::mail::when::day_phrase;
/// let zone = chrono_tz::Europe::Berlin;
/// let at = |d, h| zone.with_ymd_and_hms(2027, 1, d, h, 0, 0).unwrap().with_timezone(&Utc);
/// assert_eq!(day_phrase(at(31, 9), at(24, 18), zone).to_string(), "in 7 days");
/// assert_eq!(day_phrase(at(31, 23), at(30, 0), zone).to_string(), "tomorrow");
/// assert_eq!(day_phrase(at(31, 14), at(31, 1), zone).to_string(), "today");
/// assert_eq!(day_phrase(at(31, 14), at(31, 11), zone).to_string(), "today, in 3 hours");
/// assert_eq!(day_phrase(at(30, 23), at(31, 1), zone).to_string(), "yesterday");
/// assert_eq!(day_phrase(at(31, 0), at(30, 9), zone).to_string(), "today"); // at the end of the 30th
/// ```
pub fn day_phrase(deadline: Timestamp, now: Timestamp, zone: Tz) -> DayPhrase {
    let today = local(now, zone).date_naive();
    let days = (last_day(deadline, zone) - today).num_days();
    let left = Some(deadline - now).filter(|left| *left > TimeDelta::zero() && *left < SAY_WHAT_IS_LEFT);
    DayPhrase { days, left }
}

impl fmt::Display for DayPhrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.days {
            0 => f.write_str("today")?,
            1 => f.write_str("tomorrow")?,
            -1 => f.write_str("yesterday")?,
            days if days > 0 => write!(f, "in {days} days")?,
            days => write!(f, "{} days ago", days.unsigned_abs())?,
        }
        match self.left {
            Some(left) => write!(f, ", in {}", span(left)),
            None => Ok(()),
        }
    }
}

/// A span of time in its largest unit that leaves at least two, rounded down.
fn span(span: TimeDelta) -> String {
    let Span { count, unit } = Span::of(span);
    format!("{count} {}", if count == 1 { unit.trim_end_matches('s') } else { unit })
}

/// A short span of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// How many.
    pub count: i64,
    /// `hours`, `minutes` or `seconds`.
    pub unit: &'static str,
}

impl Span {
    /// In the largest unit that leaves at least two, rounded down.
    fn of(span: TimeDelta) -> Self {
        let (count, unit) = match (span.num_hours(), span.num_minutes(), span.num_seconds()) {
            (hours @ 2.., ..) => (hours, "hours"),
            (_, minutes @ 2.., _) => (minutes, "minutes"),
            (.., seconds) => (seconds, "seconds"),
        };
        Self { count, unit }
    }
}

/// An instant as a reader's calendar has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The difference of the calendar dates to now; negative when the day is over.
    pub days: i64,
    /// Whether it lies ahead.
    pub ahead: bool,
    /// How far away it is, where that is little.
    pub span: Option<Span>,
    /// The day of the month, from 1.
    pub day: u32,
    /// The month, from 1.
    pub month: u32,
    /// The year.
    pub year: i32,
    /// The day of the week: 1 is Monday, 7 Sunday.
    pub weekday: u32,
    /// Whether it is the end of that day: the midnight after it.
    pub ends_day: bool,
    /// The time of day, to the minute or, where seconds matter, to the second.
    pub time: String,
}

impl Moment {
    /// A deadline. At local midnight it belongs to the day that it ends.
    pub fn of_deadline(deadline: Timestamp, now: Timestamp, zone: Tz) -> Self {
        Self::of(deadline, last_day(deadline, zone), now, zone)
    }

    /// Something that happened.
    pub fn of_past(at: Timestamp, now: Timestamp, zone: Tz) -> Self {
        Self::of(at, local(at, zone).date_naive(), now, zone)
    }

    fn of(at: Timestamp, date: NaiveDate, now: Timestamp, zone: Tz) -> Self {
        let away = (at - now).abs();
        let moment = local(at, zone);
        Self {
            days: (date - local(now, zone).date_naive()).num_days(),
            ahead: at > now,
            span: (away > TimeDelta::zero() && away < SAY_WHAT_IS_LEFT).then(|| Span::of(away)),
            day: date.day(),
            month: date.month(),
            year: date.year(),
            weekday: date.weekday().number_from_monday(),
            ends_day: date < moment.date_naive(),
            time: time_of_day(moment),
        }
    }
}

/// How many days after today still belong to the same week, which ends on Sunday.
pub fn days_left_in_week(now: Timestamp, zone: Tz) -> i64 {
    7 - i64::from(local(now, zone).weekday().number_from_monday())
}

fn time_of_day(moment: DateTime<Tz>) -> String {
    let (hour, minute) = (moment.hour(), moment.minute());
    match moment.second() {
        0 => format!("{hour:02}:{minute:02}"),
        second => format!("{hour:02}:{minute:02}:{second:02}"),
    }
}

/// The deadline's date and time of day: "on 31 January 2027 at 09:30", or "at the end of 31 January 2027" at midnight.
pub fn date_phrase(deadline: Timestamp, zone: Tz) -> String {
    let day = last_day(deadline, zone);
    let moment = local(deadline, zone);
    if day < moment.date_naive() {
        return format!("at the end of {}", day.format("%-d %B %Y"));
    }
    format!("on {} at {}", day.format("%-d %B %Y"), time_of_day(moment))
}

/// The instant to the second, with the zone's abbreviation where it has one, and its distance from UTC.
///
/// ```
/// # use chrono::{TimeZone, Utc};
/// use lapsed::mail::when::exact;
/// let at = Utc.with_ymd_and_hms(2027, 1, 31, 22, 59, 59).unwrap();
/// assert_eq!(exact(at, chrono_tz::Europe::Berlin), "2027-01-31 23:59:59 CET (UTC+01:00)");
/// assert_eq!(exact(at, chrono_tz::Asia::Kathmandu), "2027-02-01 04:44:59 (UTC+05:45)");
/// assert_eq!(exact(at, chrono_tz::UTC), "2027-01-31 22:59:59 UTC");
/// ```
pub fn exact(instant: Timestamp, zone: Tz) -> String {
    let moment = local(instant, zone);
    let (date, time) = (moment.date_naive(), moment.time());
    let abbreviation = moment.offset().abbreviation().unwrap_or_default();
    if abbreviation == "UTC" {
        return format!("{date} {time} UTC");
    }
    let offset = moment.format("%:z");
    if abbreviation.starts_with(|c: char| c.is_ascii_alphabetic()) {
        format!("{date} {time} {abbreviation} (UTC{offset})")
    } else {
        format!("{date} {time} (UTC{offset})")
    }
}

/// The last day on which the deadline has not passed all day long: where the deadline is a day's first instant, the
/// day before it.
fn last_day(deadline: Timestamp, zone: Tz) -> NaiveDate {
    let before = deadline.checked_sub_signed(TimeDelta::seconds(1)).unwrap_or(deadline);
    local(before, zone).date_naive()
}

fn local(instant: Timestamp, zone: Tz) -> DateTime<Tz> {
    let seconds = instant.timestamp().clamp(EARLIEST, LATEST);
    DateTime::<Utc>::from_timestamp(seconds, 0).unwrap_or_default().with_timezone(&zone)
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone;
    use chrono_tz::{America, Asia, Europe, Pacific, TZ_VARIANTS};
    use proptest::prelude::*;

    use super::*;

    fn at(zone: Tz, text: &str) -> Timestamp {
        let naive = chrono::NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S").expect(text);
        zone.from_local_datetime(&naive).earliest().expect("exists").with_timezone(&Utc)
    }

    fn phrase(zone: Tz, deadline: &str, now: &str) -> String {
        day_phrase(at(zone, deadline), at(zone, now), zone).to_string()
    }

    #[test]
    fn little_time_is_named() {
        let zone = Europe::Berlin;
        assert_eq!(phrase(zone, "2027-01-31 12:00:40", "2027-01-31 12:00:00"), "today, in 40 seconds");
        assert_eq!(phrase(zone, "2027-01-31 12:00:01", "2027-01-31 12:00:00"), "today, in 1 second");
        assert_eq!(phrase(zone, "2027-01-31 13:59:00", "2027-01-31 12:00:00"), "today, in 119 minutes");
        assert_eq!(phrase(zone, "2027-02-01 01:00:00", "2027-01-31 22:30:00"), "tomorrow, in 2 hours");
        assert_eq!(phrase(zone, "2027-02-01 00:00:00", "2027-01-31 22:30:00"), "today, in 90 minutes");
        assert_eq!(phrase(zone, "2027-01-31 12:00:00", "2027-01-31 12:00:00"), "today");
        assert_eq!(phrase(zone, "2027-01-31 11:00:00", "2027-01-31 12:00:00"), "today");
        assert_eq!(phrase(zone, "2027-01-28 11:00:00", "2027-01-31 12:00:00"), "3 days ago");
    }

    #[test]
    fn a_midnight_belongs_to_the_day_that_it_ends() {
        let zone = Europe::Berlin;
        let deadline = at(zone, "2027-02-01 00:00:00");
        assert_eq!(date_phrase(deadline, zone), "at the end of 31 January 2027");
        assert_eq!(exact(deadline, zone), "2027-02-01 00:00:00 CET (UTC+01:00)");
        assert_eq!(date_phrase(deadline, chrono_tz::UTC), "on 31 January 2027 at 23:00");
        assert_eq!(date_phrase(deadline - TimeDelta::seconds(1), zone), "on 31 January 2027 at 23:59:59");
        assert_eq!(phrase(zone, "2027-02-01 00:00:00", "2027-01-31 00:00:00"), "today");
        assert_eq!(phrase(zone, "2027-02-01 00:00:00", "2027-02-01 00:00:00"), "yesterday");
    }

    #[test]
    fn one_instant_is_another_day_elsewhere() {
        let deadline = at(chrono_tz::UTC, "2027-01-31 12:00:00");
        let now = at(chrono_tz::UTC, "2027-01-30 09:00:00");
        assert_eq!(day_phrase(deadline, now, Pacific::Kiritimati).to_string(), "in 2 days");
        assert_eq!(day_phrase(deadline, now, chrono_tz::UTC).to_string(), "tomorrow");
        assert_eq!(exact(deadline, Pacific::Kiritimati), "2027-02-01 02:00:00 (UTC+14:00)");
        assert_eq!(exact(deadline, Asia::Kolkata), "2027-01-31 17:30:00 IST (UTC+05:30)");
    }

    #[test]
    fn days_of_23_and_25_hours_are_days() {
        let zone = Europe::Berlin;
        // Clocks go forward on 28 March and back on 31 October 2027.
        assert_eq!(phrase(zone, "2027-03-28 23:30:00", "2027-03-27 23:45:00"), "tomorrow");
        assert_eq!(phrase(zone, "2027-03-29 12:00:00", "2027-03-27 12:00:00"), "in 2 days");
        assert_eq!(phrase(zone, "2027-10-31 23:30:00", "2027-10-31 00:10:00"), "today");
        assert_eq!(phrase(zone, "2027-11-01 00:00:00", "2027-10-31 00:00:00"), "today");
        let second_half_past_two = at(chrono_tz::UTC, "2027-10-31 01:30:00");
        assert_eq!(exact(second_half_past_two, zone), "2027-10-31 02:30:00 CET (UTC+01:00)");
        assert_eq!(exact(second_half_past_two - TimeDelta::hours(1), zone), "2027-10-31 02:30:00 CEST (UTC+02:00)");
    }

    #[test]
    fn where_midnight_does_not_exist_the_first_instant_ends_the_day_before() {
        // In Santiago the clocks go from 24:00 on 4 September 2027 to 01:00.
        let zone = America::Santiago;
        let first = at(chrono_tz::UTC, "2027-09-05 04:00:00");
        assert_eq!(exact(first, zone), "2027-09-05 01:00:00 (UTC-03:00)");
        assert_eq!(date_phrase(first, zone), "at the end of 4 September 2027");
        assert_eq!(date_phrase(first + TimeDelta::hours(1), zone), "on 5 September 2027 at 02:00");
    }

    proptest! {
        #[test]
        fn every_instant_has_words(deadline: i64, now: i64, zone in 0..TZ_VARIANTS.len()) {
            let zone = TZ_VARIANTS[zone];
            let instant = |seconds: i64| {
                let (first, last) = (Timestamp::MIN_UTC.timestamp(), Timestamp::MAX_UTC.timestamp());
                DateTime::from_timestamp(seconds.clamp(first, last), 0).expect("in range")
            };
            let (deadline, now) = (instant(deadline), instant(now));
            prop_assert!(!day_phrase(deadline, now, zone).to_string().is_empty());
            prop_assert!(!date_phrase(deadline, zone).is_empty());
            prop_assert!(!exact(deadline, zone).is_empty());
        }

        #[test]
        fn what_lies_ahead_is_never_in_the_past_tense(
            now in 1_700_000_000i64..2_000_000_000,
            ahead in 1i64..40_000_000,
            zone in 0..TZ_VARIANTS.len(),
        ) {
            let now = DateTime::from_timestamp(now, 0).expect("in range");
            let phrase = day_phrase(now + TimeDelta::seconds(ahead), now, TZ_VARIANTS[zone]);
            prop_assert!(phrase.days >= 0);
            prop_assert!((phrase.days - ahead / 86_400).abs() <= 2, "{phrase}");
        }
    }
}
