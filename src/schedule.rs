//! When a job looks for work: cron expressions, in a time zone.
//!
//! Guarantees that an expression which got through [`Cron::parse`] fires again and again for ever: one that matches no
//! date, or only dates of some years, is refused with the reason. Firings are instants, computed here and nowhere else, so
//! that what is printed beforehand is what happens. Holds no state, so a crash means nothing to it.
//!
//! Where clocks change, an expression that names its hours fires once on each day that it names: at its wall-clock time; at
//! the first of the two where that time comes twice; and when the hour has passed where it does not come at all. One that
//! fires in every hour goes on firing in each, as time passes.

use std::fmt;

use chrono::{DateTime, LocalResult, NaiveDateTime, Offset, TimeDelta, TimeZone, Utc};
use chrono_tz::Tz;
use croner::errors::CronError;
use croner::parser::{CronParser, Seconds};

/// The instant from which [`Cron::parse`] looks for a first firing: 2025-01-01T00:00:00Z, in Unix seconds. Without a
/// year field the calendar repeats every 400 years, so any instant gives the same answer.
const REFERENCE: i64 = 1_735_689_600;

/// What may stand before an expression, to give it a zone of its own.
const ZONE: &str = "CRON_TZ=";

/// A cron expression of five or six fields (second, minute, hour, day of the month, month, day of the week; without the
/// first one, at second 0), and the zone in which it is read.
///
/// Where both a day of the month and a day of the week are given, both must match.
///
/// ```
/// use lapsed::schedule::Cron;
///
/// let nightly = Cron::parse("17 3 * * *", chrono_tz::Europe::Berlin)?;
/// let noon = "2026-05-01T12:00:00Z".parse().map_err(|_| "not an instant")?;
/// let next = nightly.next_after(noon).ok_or("it fires every night")?;
/// assert_eq!(next.to_rfc3339(), "2026-05-02T01:17:00+00:00");
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, PartialEq)]
pub struct Cron {
    text: String,
    inner: croner::Cron,
    zone: Tz,
    /// It fires in every hour.
    hourly: bool,
}

impl fmt::Debug for Cron {
    /// The parser's own form has thousands of numbers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cron({:?}, {})", self.text, self.zone)
    }
}

impl Cron {
    /// Reads an expression, or one of `@yearly`, `@monthly`, `@weekly`, `@daily`, `@hourly`; in this zone, unless
    /// `CRON_TZ=ZONE` stands before it.
    ///
    /// # Errors
    /// A sentence that says what is wrong: an unknown zone, not five or six fields, a field that is out of range, or an
    /// expression that never fires.
    pub fn parse(text: &str, zone: Tz) -> Result<Self, String> {
        let whole = text.trim();
        let (expression, zone) = match whole.strip_prefix(ZONE) {
            Some(rest) => {
                let (name, expression) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
                let zone = name.parse().map_err(|_| {
                    format!("has an unknown time zone: {name:?} is not in the tz database, as \"Europe/Berlin\" is")
                })?;
                (expression.trim(), zone)
            }
            None => (whole, zone),
        };
        let fields: Vec<&str> = expression.split_whitespace().collect();
        let nickname = expression.starts_with('@');
        let expression = match fields.len() {
            _ if nickname => expression.to_owned(),
            5 => format!("0 {expression}"),
            6 => expression.to_owned(),
            7 => return Err("has seven fields: leave out the year, a job would stop when it is over".to_owned()),
            n => {
                return Err(format!(
                    "has {n} fields where five or six belong: second (or none), minute, hour, day of the month, month, \
                     day of the week"
                ));
            }
        };
        let inner = CronParser::builder()
            .seconds(Seconds::Required)
            .dom_and_dow(true)
            .build()
            .parse(&expression)
            .map_err(|error| format!("is not a cron expression: {}", reason(&error)))?;
        let hour = expression.split_whitespace().nth(2).unwrap_or("0");
        let hourly = expression == "@hourly" || (!nickname && matches!(hour, "*" | "*/1" | "0-23" | "0-23/1"));
        let cron = Self { text: whole.to_owned(), inner, zone, hourly };
        let reference = DateTime::from_timestamp(REFERENCE, 0).unwrap_or_default();
        if cron.next_after(reference).is_none() {
            return Err("never fires: no date has this day of the month, month and day of the week at once".to_owned());
        }
        Ok(cron)
    }

    /// The first firing after `t`, in whole seconds; never `t` itself. `None` only at the end of the calendar.
    pub fn next_after(&self, t: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let t = t - TimeDelta::nanoseconds(i64::from(t.timestamp_subsec_nanos()));
        if self.hourly { self.next_as_time_passes(t) } else { self.next_by_the_clock(t) }
    }

    /// Each time on the clock is one instant: the first of two, or the end of the gap that it falls into. So instants are in
    /// the order of times.
    fn next_by_the_clock(&self, t: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let mut local = t.with_timezone(&self.zone).naive_local();
        loop {
            local = self.next_local(local)?;
            let at = match self.zone.from_local_datetime(&local) {
                LocalResult::Single(at) | LocalResult::Ambiguous(at, _) => at.with_timezone(&Utc),
                LocalResult::None => self.end_of_gap(local)?,
            };
            if at > t {
                return Some(at);
            }
        }
    }

    /// Each instant whose time on the clock matches. Between two changes of the clocks, that time is as regular as any.
    fn next_as_time_passes(&self, t: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let (mut from, mut offset) = (t, self.offset(t));
        loop {
            let local = self.next_local(from.naive_utc().checked_add_signed(offset)?)?;
            let at = local.checked_sub_signed(offset)?.and_utc();
            if self.offset(at) == offset {
                return Some(at);
            }
            let change = self.change(from.max(t), at);
            // From a second before, so that a firing at the change itself is found.
            (from, offset) = (change.checked_sub_signed(TimeDelta::seconds(1))?, self.offset(change));
        }
    }

    /// The zone in which it is read.
    pub fn zone(&self) -> Tz {
        self.zone
    }

    /// What it says, in English.
    pub fn in_words(&self) -> String {
        self.inner.describe()
    }

    /// The expression as it was written, without the spaces around it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// By how much the zone's clocks are ahead of UTC.
    fn offset(&self, at: DateTime<Utc>) -> TimeDelta {
        let seconds = self.zone.offset_from_utc_datetime(&at.naive_utc()).fix().local_minus_utc();
        TimeDelta::seconds(i64::from(seconds))
    }

    /// The next time on a clock that never changes.
    fn next_local(&self, after: NaiveDateTime) -> Option<NaiveDateTime> {
        let next = self.inner.find_next_occurrence(&after.and_utc(), false).ok()?.naive_utc();
        (next > after).then_some(next)
    }

    /// When the clocks jumped over this time.
    fn end_of_gap(&self, local: NaiveDateTime) -> Option<DateTime<Utc>> {
        let around = |span: TimeDelta| Some(local.checked_add_signed(span)?.and_utc());
        // Offsets are less than a day, and changes weeks apart.
        Some(self.change(around(TimeDelta::days(-2))?, around(TimeDelta::days(2))?))
    }

    /// The first instant after `from` with another offset, where there is one up to `until`.
    fn change(&self, from: DateTime<Utc>, until: DateTime<Utc>) -> DateTime<Utc> {
        let offset = self.offset(from);
        let (mut before, mut after) = (from, until);
        // Changes are weeks apart: steps of a day find the first one.
        while after - before > TimeDelta::days(1) {
            let middle = before + TimeDelta::days(1);
            if self.offset(middle) == offset {
                before = middle;
            } else {
                after = middle;
            }
        }
        while after - before > TimeDelta::seconds(1) {
            let middle = before + TimeDelta::seconds((after - before).num_seconds() / 2);
            if self.offset(middle) == offset {
                before = middle;
            } else {
                after = middle;
            }
        }
        after
    }
}

/// What the parser objects to, without the parser's own prefix.
fn reason(error: &CronError) -> String {
    match error {
        CronError::InvalidPattern(text) | CronError::IllegalCharacters(text) | CronError::ComponentError(text) => {
            text.trim_end_matches('.').to_owned()
        }
        other => other.to_string().trim_end_matches('.').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    fn next(cron: &str, after: &str) -> String {
        let next = Cron::parse(cron, Tz::UTC).unwrap().next_after(at(after)).unwrap();
        next.format("%FT%T%.f").to_string()
    }

    #[test]
    fn the_next_firing_is_strictly_later_and_a_whole_second() {
        assert_eq!(next("*/5 * * * * *", "2026-01-01T00:00:00Z"), "2026-01-01T00:00:05");
        assert_eq!(next("* * * * * *", "2026-01-01T00:00:00.999Z"), "2026-01-01T00:00:01");
        assert_eq!(next("0 47 2 * * *", "2026-12-31T02:47:00Z"), "2027-01-01T02:47:00");
    }

    #[test]
    fn names_and_nicknames_work() {
        assert_eq!(next("0 0 9 * jan MON", "2026-01-01T00:00:00Z"), "2026-01-05T09:00:00");
        assert_eq!(next("@daily", "2026-01-01T00:00:00Z"), "2026-01-02T00:00:00");
    }

    #[test]
    fn both_days_must_match() {
        // Friday the 13th: the first of 2026 is in February.
        assert_eq!(next("0 0 0 13 * FRI", "2026-01-01T00:00:00Z"), "2026-02-13T00:00:00");
    }

    #[test]
    fn a_rare_date_is_found() {
        // The next 29 February that is a Monday.
        assert_eq!(next("0 0 0 29 2 MON", "2025-01-01T00:00:00Z"), "2044-02-29T00:00:00");
    }

    #[test]
    fn five_fields_are_at_second_0() {
        assert_eq!(next("17 3 * * *", "2026-01-01T00:00:00Z"), "2026-01-01T03:17:00");
    }

    #[test]
    fn an_expression_may_bring_its_zone() {
        assert_eq!(next("CRON_TZ=Asia/Kolkata 0 9 * * *", "2026-01-01T00:00:00Z"), "2026-01-01T03:30:00");
        let error = Cron::parse("CRON_TZ=Mars/Olympus 0 9 * * *", Tz::UTC).unwrap_err();
        assert!(error.contains("Mars/Olympus") && error.contains("Europe/Berlin"), "{error}");
    }

    /// The firings of some hours around a change of the clocks, in UTC.
    fn around(cron: &str, zone: Tz, from: &str, count: usize) -> Vec<String> {
        let cron = Cron::parse(cron, zone).unwrap();
        let mut firings = Vec::new();
        let mut t = at(from);
        for _ in 0..count {
            t = cron.next_after(t).unwrap();
            firings.push(t.format("%dT%H:%M").to_string());
        }
        firings
    }

    #[test]
    fn a_nightly_run_in_the_gap_is_at_its_end() {
        // On 29 March 2026 at 02:00 the clocks of Berlin go to 03:00.
        let nightly = around("30 2 * * *", Tz::Europe__Berlin, "2026-03-28T00:00:00Z", 4);
        assert_eq!(nightly, ["28T01:30", "29T01:00", "30T00:30", "31T00:30"]);
        let often = around("*/20 2-3 * * *", Tz::Europe__Berlin, "2026-03-29T00:00:00Z", 4);
        assert_eq!(often, ["29T01:00", "29T01:20", "29T01:40", "30T00:00"]);
    }

    #[test]
    fn a_nightly_run_in_the_repeated_hour_is_once() {
        // On 25 October 2026 at 03:00 the clocks of Berlin go back to 02:00.
        let nightly = around("30 2 * * *", Tz::Europe__Berlin, "2026-10-24T00:00:00Z", 3);
        assert_eq!(nightly, ["24T00:30", "25T00:30", "26T01:30"]);
        let from_within = around("30 2 * * *", Tz::Europe__Berlin, "2026-10-25T01:10:00Z", 1);
        assert_eq!(from_within, ["26T01:30"]);
    }

    #[test]
    fn what_runs_in_every_hour_runs_in_each() {
        let autumn = around("0 * * * *", Tz::Europe__Berlin, "2026-10-24T23:30:00Z", 4);
        assert_eq!(autumn, ["25T00:00", "25T01:00", "25T02:00", "25T03:00"]);
        let spring = around("30 * * * *", Tz::Europe__Berlin, "2026-03-28T23:45:00Z", 3);
        assert_eq!(spring, ["29T00:30", "29T01:30", "29T02:30"]);
        // Lord Howe's clocks change by half an hour.
        let half = around("15 * * * *", Tz::Australia__Lord_Howe, "2026-04-04T13:00:00Z", 4);
        assert_eq!(half, ["04T13:15", "04T14:15", "04T15:45", "04T16:45"]);
    }

    #[test]
    fn a_day_that_does_not_exist_fires_at_its_end() {
        // Samoa had no 30 December 2011.
        let samoa = around("0 12 * * *", Tz::Pacific__Apia, "2011-12-29T00:00:00Z", 3);
        assert_eq!(samoa, ["29T22:00", "30T10:00", "30T22:00"]);
    }

    #[test]
    fn other_counts_of_fields_are_refused() {
        for (text, word) in [("", "0 fields"), ("* * *", "3 fields"), ("0 0 0 1 1 * 2030", "year")] {
            let error = Cron::parse(text, Tz::UTC).unwrap_err();
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }

    #[test]
    fn expressions_that_never_fire_are_refused() {
        for text in ["0 0 0 31 2 *", "0 0 0 30 2 *", "0 0 0 1 * MON#3"] {
            let error = Cron::parse(text, Tz::UTC).unwrap_err();
            assert!(error.contains("never fires"), "{text:?}: {error}");
        }
    }

    #[test]
    fn fields_out_of_range_are_refused() {
        for text in ["60 * * * * *", "* * 24 * * *", "* * * * 13 *", "a * * * * *", "@sometimes"] {
            let error = Cron::parse(text, Tz::UTC).unwrap_err();
            assert!(error.contains("is not a cron expression"), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn firings_move_forward(start in 0_i64..4_000_000_000, nanos in 0_u32..1_000_000_000) {
            let t = DateTime::from_timestamp(start, nanos).unwrap();
            let cron = Cron::parse("7 */13 1-5 * * 2,4", Tz::UTC).unwrap();
            let first = cron.next_after(t).unwrap();
            prop_assert!(first > t);
            prop_assert!(cron.next_after(first).unwrap() > first);
        }
    }
}
