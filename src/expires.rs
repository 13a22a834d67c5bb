//! How people write deadlines: in `--expires`, and in the lists that they import.

use std::str::FromStr;

use chrono::{DateTime, Days, Duration, NaiveDate, NaiveTime, TimeDelta, TimeZone, Utc};
use chrono_tz::Tz;

use crate::clock::{Timestamp, whole_seconds};
use crate::config::parse_duration;

/// The last instant that the store keeps.
const LATEST: &str = "9999-12-31T23:59:59Z";

/// A deadline as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expires {
    /// `never`
    Never,
    /// `90d`: so long from now.
    In(TimeDelta),
    /// `2027-01-31`: at the end of that day, in the owner's zone.
    EndOf(NaiveDate),
    /// `2027-01-31T09:00:00Z`
    At(Timestamp),
}

impl FromStr for Expires {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("never") {
            return Ok(Self::Never);
        }
        if let Ok(date) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
            return Ok(Self::EndOf(date));
        }
        if let Ok(instant) = DateTime::parse_from_rfc3339(text) {
            return Ok(Self::At(whole_seconds(instant.with_timezone(&Utc))));
        }
        let looks_like_a_date = text.len() > 4 && text.as_bytes().get(4) == Some(&b'-');
        if looks_like_a_date {
            return Err(impossible(text));
        }
        match parse_duration(text) {
            Ok(span) if span > TimeDelta::zero() => Ok(Self::In(span)),
            Ok(_) => Err("a token that expires at once is of no use; to end one now, revoke it".into()),
            Err(problem) => Err(format!("{problem}; or write a date (2027-01-31), an instant, or `never`")),
        }
    }
}

/// What is wrong with a text that begins like a date, and is neither a day nor an instant.
fn impossible(text: &str) -> String {
    let (day, time) = text.split_once(['T', 't', ' ']).map_or((text, None), |(day, time)| (day, Some(time)));
    if NaiveDate::parse_from_str(day, "%Y-%m-%d").is_err() {
        return "there is no such day; write a date as 2027-01-31".into();
    }
    let time = time.unwrap_or_default().split(['Z', 'z', '+', '-']).next().unwrap_or_default();
    if ["%H:%M:%S%.f", "%H:%M"].iter().any(|form| NaiveTime::parse_from_str(time, form).is_ok()) {
        return "write an instant with its offset, such as 2027-01-31T09:00:00Z or 2027-01-31T09:00:00+01:00".into();
    }
    format!(
        "{time:?} is no time of day: write 00:00:00 to 23:59:59; the end of a day is 00:00:00 of the next one, or the day \
         alone, such as 2027-01-31"
    )
}

impl Expires {
    /// The instant that is meant, for an owner in this zone; it lies ahead.
    ///
    /// # Errors
    /// When it lies in the past or beyond the year 9999.
    pub fn resolve(&self, now: Timestamp, zone: Tz) -> Result<Option<Timestamp>, String> {
        match self.instant(now, zone)? {
            Some(deadline) if deadline <= now => {
                Err(format!("the deadline {} has passed", deadline.format("%Y-%m-%dT%H:%M:%SZ")))
            }
            deadline => Ok(deadline),
        }
    }

    /// The instant that is meant, for an owner in this zone; it may lie in the past, as that of an imported token may.
    ///
    /// # Errors
    /// When it lies before the year 1970 or beyond the year 9999.
    pub fn instant(&self, now: Timestamp, zone: Tz) -> Result<Option<Timestamp>, String> {
        let too_far = || format!("the deadline lies beyond {LATEST}; use `never`");
        let deadline = match self {
            Self::Never => return Ok(None),
            Self::In(span) => now.checked_add_signed(*span).ok_or_else(too_far)?,
            Self::EndOf(date) => end_of(*date, zone).ok_or_else(too_far)?,
            Self::At(instant) => *instant,
        };
        if deadline < Timestamp::UNIX_EPOCH {
            return Err("the deadline lies before the year 1970".into());
        }
        let latest: Timestamp = LATEST.parse().map_err(|_| too_far())?;
        if deadline > latest { Err(too_far()) } else { Ok(Some(deadline)) }
    }
}

/// The end of a day: the first instant that no longer belongs to it. Where a clock change skips midnight, that is the
/// instant at which the clocks go forward.
fn end_of(date: NaiveDate, zone: Tz) -> Option<Timestamp> {
    let midnight = date.checked_add_days(Days::new(1))?.and_time(NaiveTime::MIN);
    // No zone has ever skipped more than a day.
    (0..=24 * 60)
        .find_map(|minute| zone.from_local_datetime(&(midnight + Duration::minutes(minute))).earliest())
        .map(|instant| instant.with_timezone(&Utc))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2027-01-01T00:00:00Z".parse().expect("an instant")
    }

    fn resolved(text: &str, zone: Tz) -> Option<String> {
        let deadline = text.parse::<Expires>().expect(text).resolve(now(), zone).expect(text);
        deadline.map(|deadline| deadline.to_rfc3339())
    }

    #[test]
    fn a_date_is_the_end_of_that_day_in_the_owners_zone() {
        let berlin = chrono_tz::Europe::Berlin;
        assert_eq!(resolved("2027-01-31", berlin).as_deref(), Some("2027-01-31T23:00:00+00:00"));
        assert_eq!(resolved("2027-01-31", chrono_tz::UTC).as_deref(), Some("2027-02-01T00:00:00+00:00"));
        assert_eq!(resolved("2027-07-31", berlin).as_deref(), Some("2027-07-31T22:00:00+00:00"));
    }

    #[test]
    fn a_day_that_ends_in_a_skipped_midnight_ends_when_the_clocks_go_forward() {
        // America/Santiago goes from 24:00 to 01:00 on the first Sunday of September (5 September 2027).
        assert_eq!(resolved("2027-09-04", chrono_tz::America::Santiago).as_deref(), Some("2027-09-05T04:00:00+00:00"));
    }

    #[test]
    fn all_ways_to_write_a_deadline() {
        assert_eq!(resolved("90d", chrono_tz::UTC).as_deref(), Some("2027-04-01T00:00:00+00:00"));
        assert_eq!(resolved("2027-01-31T09:00:00+01:00", chrono_tz::UTC).as_deref(), Some("2027-01-31T08:00:00+00:00"));
        assert_eq!(resolved("never", chrono_tz::UTC), None);
    }

    #[test]
    fn what_cannot_be_says_why() {
        for (text, why) in [
            ("90", "unit"),
            ("soon", "never"),
            ("2027-02-30", "no such day"),
            ("2027-02-30T09:00:00Z", "no such day"),
            ("2027-01-31T09:00", "offset"),
            ("2027-01-31T09:00:00", "offset"),
            ("2027-01-31T09:00:00+25:00", "offset"),
            ("2027-01-31T24:00:00Z", "\"24:00:00\" is no time of day"),
            ("2027-01-31 23:60:00Z", "\"23:60:00\" is no time of day"),
            ("2027-01-31T", "no time of day"),
            ("0d", "at once"),
        ] {
            let error = text.parse::<Expires>().expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
        let past = "2026-12-31T00:00:00Z".parse::<Expires>().expect("an instant");
        assert!(past.resolve(now(), chrono_tz::UTC).is_err_and(|error| error.contains("has passed")));
        let far = "9999-12-31".parse::<Expires>().expect("a date");
        assert!(far.resolve(now(), chrono_tz::UTC).is_err_and(|error| error.contains("9999")));
    }
}
