//! The hours in which mail may go, on the clock of whoever reads it.
//!
//! Guarantees that where the clocks change, a window opens at the first instant that its hour names or, where that hour is
//! skipped, when the clocks go forward; and that one whose hours are all skipped is not there on that day.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Datelike, Days, NaiveDate, NaiveTime, TimeDelta, TimeZone, Utc, Weekday};
use chrono_tz::Tz;

use crate::clock::Timestamp;

/// Minutes of a day.
const DAY: u32 = 24 * 60;

/// The names of the days, Monday first.
const NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// Days of the week, and the hours of these days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Monday first.
    days: [bool; 7],
    /// In minutes after midnight.
    from: u32,
    /// Half-open, up to 24:00.
    until: u32,
}

impl Window {
    /// The first opening that has not ended at this instant: when it opens, and when it closes. `None` beyond the years
    /// that a calendar can hold.
    pub fn next(&self, at: Timestamp, zone: Tz) -> Option<(Timestamp, Timestamp)> {
        if !(1..=9_999).contains(&at.year()) {
            return None;
        }
        let today = at.with_timezone(&zone).date_naive();
        // A week, and a day on each side: a zone may skip a day, and clocks that go back may make yesterday longer.
        let days = (0..=9).filter_map(|n| today.pred_opt()?.checked_add_days(Days::new(n)));
        days.filter(|day| self.has(day)).find_map(|day| {
            let opens = local(day, self.from, zone)?.0;
            let closes = local(day, self.until, zone)?.1;
            (opens < closes && at < closes).then_some((opens, closes))
        })
    }

    fn has(&self, day: &NaiveDate) -> bool {
        let number = day.weekday().num_days_from_monday();
        usize::try_from(number).ok().and_then(|number| self.days.get(number)).copied().unwrap_or_default()
    }
}

/// The instants that a zone's clock shows this time at: the first and the last of them. Where the clocks skip it, that at
/// which they go forward.
fn local(day: NaiveDate, minute: u32, zone: Tz) -> Option<(Timestamp, Timestamp)> {
    let time = day.and_time(NaiveTime::MIN).checked_add_signed(TimeDelta::minutes(i64::from(minute)))?;
    // No zone has ever skipped more than a day.
    let shown = (0..=i64::from(DAY)).find_map(|skipped| {
        let shown = zone.from_local_datetime(&time.checked_add_signed(TimeDelta::minutes(skipped))?);
        Some((shown.earliest()?, shown.latest()?))
    });
    let utc = |at: DateTime<Tz>| at.with_timezone(&Utc);
    shown.map(|(first, last)| (utc(first), utc(last)))
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "write days and hours, such as \"mon-fri 08:00-18:00\" or \"mon,wed,fri 09:30-12:00\"";
        let (days, hours) = text.trim().split_once(char::is_whitespace).ok_or_else(|| example.to_owned())?;
        let (from, until) = hours.trim().split_once('-').ok_or_else(|| example.to_owned())?;
        let (from, until) = (minute(from)?, minute(until)?);
        if from >= until {
            return Err(format!(
                "its hours end before they begin, or have no length: a window lies within one day, 24:00 at the latest; {example}"
            ));
        }
        let mut window = Self { days: [false; 7], from, until };
        for part in days.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (day(first)?, day(last)?);
            if first > last {
                return Err(format!("{part:?}: the days go from mon to sun; {example}"));
            }
            window.days.iter_mut().take(last + 1).skip(first).for_each(|day| *day = true);
        }
        Ok(window)
    }
}

/// The number of a day of the week.
fn day(name: &str) -> Result<usize, String> {
    let known = name.trim().parse::<Weekday>().ok().filter(|_| NAMES.contains(&name.trim().to_lowercase().as_str()));
    let number = known.and_then(|day| usize::try_from(day.num_days_from_monday()).ok());
    number.ok_or_else(|| format!("there is no day {name:?}: the days are {}", NAMES.join(", ")))
}

/// A time of day in minutes.
fn minute(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is no time of day: write 00:00 to 24:00");
    let (hour, minute) = text.trim().split_once(':').ok_or_else(wrong)?;
    let two_digits = |text: &str| text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
    if !two_digits(hour) || !two_digits(minute) {
        return Err(wrong());
    }
    let (hour, minute): (u32, u32) = (hour.parse().map_err(|_| wrong())?, minute.parse().map_err(|_| wrong())?);
    let all = hour * 60 + minute;
    if minute < 60 && all <= DAY { Ok(all) } else { Err(wrong()) }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<String> = Vec::new();
        let mut first: Option<usize> = None;
        for n in 0..=NAMES.len() {
            let open = self.days.get(n).copied().unwrap_or_default();
            match (first, open) {
                (None, true) => first = Some(n),
                (Some(from), false) => {
                    let name = |n: usize| NAMES.get(n).copied().unwrap_or_default();
                    let last = n.saturating_sub(1);
                    parts.push(if from == last {
                        name(from).to_owned()
                    } else {
                        format!("{}-{}", name(from), name(last))
                    });
                    first = None;
                }
                _ => {}
            }
        }
        let clock = |minute: u32| format!("{:02}:{:02}", minute / 60, minute % 60);
        write!(f, "{} {}-{}", parts.join(","), clock(self.from), clock(self.until))
    }
}

#[cfg(test)]
mod tests {
    use chrono_tz::{America, Asia, Europe, Pacific, TZ_VARIANTS};
    use proptest::prelude::*;

    use super::*;

    fn window(text: &str) -> Window {
        text.parse().expect(text)
    }

    fn utc(text: &str) -> Timestamp {
        format!("{text}:00Z").parse().expect(text)
    }

    fn next(text: &str, at: &str, zone: Tz) -> [String; 2] {
        let (opens, closes) = window(text).next(utc(at), zone).expect("an opening");
        [opens, closes].map(|at| at.format("%Y-%m-%dT%H:%M").to_string())
    }

    #[test]
    fn windows_are_read_and_written() {
        for (text, written) in [
            ("mon-fri 08:00-18:00", "mon-fri 08:00-18:00"),
            ("  MON,Wed , 09:30-12:00", ""),
            ("fri,mon,tue 00:00-24:00", "mon-tue,fri 00:00-24:00"),
            ("sun 23:59-24:00", "sun 23:59-24:00"),
            ("Mon-Sun  07:00-07:01", "mon-sun 07:00-07:01"),
        ] {
            match text.parse::<Window>() {
                Ok(window) => {
                    assert_eq!(window.to_string(), written);
                    assert_eq!(written.parse(), Ok(window));
                }
                Err(_) => assert_eq!(written, "", "{text}"),
            }
        }
    }

    #[test]
    fn what_is_no_window_says_why() {
        for (text, why) in [
            ("08:00-18:00", "write days and hours"),
            ("mon-fri", "write days and hours"),
            ("mon-fri 8-18", "no time of day"),
            ("mon-fri 08:00-24:01", "no time of day"),
            ("mon-fri 08:60-18:00", "no time of day"),
            ("mon-fri 08:00", "write days and hours"),
            ("mon-fri 18:00-08:00", "end before they begin"),
            ("mon-fri 08:00-08:00", "have no length"),
            ("mo-fr 08:00-18:00", "there is no day \"mo\""),
            ("monday 08:00-18:00", "there is no day \"monday\""),
            ("sat-mon 08:00-18:00", "the days go from mon to sun"),
        ] {
            let error = text.parse::<Window>().expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_window_is_on_the_readers_clock() {
        let weekdays = "mon-fri 08:00-18:00";
        // 8 January 2027 is a Friday.
        let berlin = ["2027-01-08T07:00", "2027-01-08T17:00"];
        assert_eq!(next(weekdays, "2027-01-08T03:00", Europe::Berlin), berlin);
        assert_eq!(next(weekdays, "2027-01-08T16:59", Europe::Berlin), berlin);
        assert_eq!(next(weekdays, "2027-01-08T17:00", Europe::Berlin), ["2027-01-11T07:00", "2027-01-11T17:00"]);
        assert_eq!(next(weekdays, "2027-01-08T03:00", Asia::Kolkata), ["2027-01-08T02:30", "2027-01-08T12:30"]);
        // It is Saturday on Kiritimati when it is Friday noon in London.
        assert_eq!(next(weekdays, "2027-01-08T12:00", Pacific::Kiritimati), ["2027-01-10T18:00", "2027-01-11T04:00"]);
    }

    #[test]
    fn a_window_follows_the_clocks_through_both_changes() {
        // In Berlin they go forward at 02:00 on Sunday 28 March 2027, and back at 03:00 on 31 October.
        let eight = "mon-sun 08:00-18:00";
        assert_eq!(next(eight, "2027-03-27T18:00", Europe::Berlin), ["2027-03-28T06:00", "2027-03-28T16:00"]);
        assert_eq!(next(eight, "2027-10-30T18:00", Europe::Berlin), ["2027-10-31T07:00", "2027-10-31T17:00"]);
        let skipped = "mon-sun 02:15-02:45";
        assert_eq!(next(skipped, "2027-03-27T18:00", Europe::Berlin), ["2027-03-29T00:15", "2027-03-29T00:45"]);
        let half_skipped = "mon-sun 02:30-03:30";
        assert_eq!(next(half_skipped, "2027-03-27T18:00", Europe::Berlin), ["2027-03-28T01:00", "2027-03-28T01:30"]);
        let repeated = "mon-sun 02:15-02:45";
        assert_eq!(next(repeated, "2027-10-30T18:00", Europe::Berlin), ["2027-10-31T00:15", "2027-10-31T01:45"]);
        // In Santiago they go from 24:00 on 4 September 2027 to 01:00.
        let night = "mon-sun 00:00-06:00";
        assert_eq!(next(night, "2027-09-04T20:00", America::Santiago), ["2027-09-05T04:00", "2027-09-05T09:00"]);
    }

    proptest! {
        #[test]
        fn every_instant_has_an_opening_within_days(
            days in prop::array::uniform7(any::<bool>()), from in 0..DAY, length in 1..DAY,
            at in 1_500_000_000i64..2_500_000_000, zone in 0..TZ_VARIANTS.len(),
        ) {
            prop_assume!(days.contains(&true));
            let window = Window { days, from, until: (from + length).min(DAY) };
            let (at, zone) = (DateTime::from_timestamp(at, 0).expect("in range"), TZ_VARIANTS[zone]);
            // One that is skipped by the clocks opens a week later.
            let (opens, closes) = window.next(at, zone).or_else(|| window.next(at + TimeDelta::days(7), zone)).expect("one");
            prop_assert!(opens < closes && at < closes);
            prop_assert!(opens - at <= TimeDelta::days(15));
            let shown = opens.with_timezone(&zone);
            prop_assert!(window.has(&shown.date_naive()));
            // Where the clocks go back over midnight, yesterday's may not have ended.
            prop_assert!(window.next(opens, zone).is_some_and(|(first, last)| first <= opens && opens < last));
        }

        #[test]
        fn no_text_breaks_the_reader(text in "[a-z, 0-9:-]{0,24}") {
            if let Ok(window) = text.parse::<Window>() {
                prop_assert_eq!(window.to_string().parse(), Ok(window));
            }
        }
    }
}
