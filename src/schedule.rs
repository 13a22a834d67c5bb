//! When a job looks for work: cron expressions, in UTC.
//!
//! Guarantees that an expression which got through [`Cron::parse`] means the same here as in the scheduler that
//! fires it, and that it fires again and again for ever: one that matches no date, or only dates of some years, is
//! refused with the reason. Relies on the parser settings being those of tokio-cron-scheduler 0.15, which drops an
//! expression that never fires without a word. Holds no state, so a crash means nothing to it.

use chrono::{DateTime, TimeDelta, Utc};
use croner::errors::CronError;
use croner::parser::{CronParser, Seconds};

/// The instant from which [`Cron::parse`] looks for a first firing: 2025-01-01T00:00:00Z, in Unix seconds. Without a
/// year field the calendar repeats every 400 years, so any instant gives the same answer.
const REFERENCE: i64 = 1_735_689_600;

/// A cron expression of six fields (second, minute, hour, day of the month, month, day of the week), in UTC.
///
/// Where both a day of the month and a day of the week are given, both must match.
///
/// ```
/// use lapsed::schedule::Cron;
///
/// let nightly = Cron::parse("0 17 3 * * *")?;
/// let noon = "2026-05-01T12:00:00Z".parse().map_err(|_| "not an instant")?;
/// let next = nightly.next_after(noon).ok_or("it fires every night")?;
/// assert_eq!(next.to_rfc3339(), "2026-05-02T03:17:00+00:00");
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Cron {
    text: String,
    inner: croner::Cron,
}

impl Cron {
    /// Reads an expression, or one of `@yearly`, `@monthly`, `@weekly`, `@daily`, `@hourly`.
    ///
    /// # Errors
    /// A sentence that says what is wrong: not six fields, a field that is out of range, or an expression that never
    /// fires.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let fields = text.split_whitespace().count();
        if !text.starts_with('@') {
            match fields {
                6 => {}
                5 => {
                    return Err(format!("has five fields: put one for the seconds in front, \"0 {text}\""));
                }
                7 => {
                    return Err("has seven fields: leave out the year, a job would stop when it is over".to_owned());
                }
                _ => {
                    return Err(format!(
                        "has {fields} fields where six belong: second, minute, hour, day of the month, month, \
                         day of the week"
                    ));
                }
            }
        }
        // As `Job::new_async` and `JobStoredData::schedule` of tokio-cron-scheduler build theirs.
        let inner = CronParser::builder()
            .seconds(Seconds::Required)
            .dom_and_dow(true)
            .build()
            .parse(text)
            .map_err(|error| format!("is not a cron expression: {}", reason(&error)))?;
        let cron = Self { text: text.to_owned(), inner };
        let reference = DateTime::from_timestamp(REFERENCE, 0).unwrap_or_default();
        if cron.next_after(reference).is_none() {
            return Err("never fires: no date has this day of the month, month and day of the week at once".to_owned());
        }
        Ok(cron)
    }

    /// The first firing after `t`, in whole seconds; never `t` itself. `None` only at the end of the calendar.
    pub fn next_after(&self, t: DateTime<Utc>) -> Option<DateTime<Utc>> {
        // croner carries a fraction of a second along: cut it off, so that firings are whole seconds.
        let whole = t - TimeDelta::nanoseconds(i64::from(t.timestamp_subsec_nanos()));
        let next = self.inner.find_next_occurrence(&whole, false).ok()?;
        (next > t).then_some(next)
    }

    /// The expression as it was written, without the spaces around it; what the scheduler is given.
    pub fn as_str(&self) -> &str {
        &self.text
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
        let next = Cron::parse(cron).unwrap().next_after(at(after)).unwrap();
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
    fn five_fields_get_the_corrected_expression() {
        let error = Cron::parse("17 3 * * *").unwrap_err();
        assert!(error.contains("\"0 17 3 * * *\""), "{error}");
    }

    #[test]
    fn other_counts_of_fields_are_refused() {
        for (text, word) in [("", "0 fields"), ("* * *", "3 fields"), ("0 0 0 1 1 * 2030", "year")] {
            let error = Cron::parse(text).unwrap_err();
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }

    #[test]
    fn expressions_that_never_fire_are_refused() {
        for text in ["0 0 0 31 2 *", "0 0 0 30 2 *", "0 0 0 1 * MON#3"] {
            let error = Cron::parse(text).unwrap_err();
            assert!(error.contains("never fires"), "{text:?}: {error}");
        }
    }

    #[test]
    fn fields_out_of_range_are_refused() {
        for text in ["60 * * * * *", "* * 24 * * *", "* * * * 13 *", "a * * * * *", "@sometimes"] {
            let error = Cron::parse(text).unwrap_err();
            assert!(error.contains("is not a cron expression"), "{text:?}: {error}");
        }
    }

    #[test]
    fn the_scheduler_reads_every_default_as_we_do() {
        for text in ["*/5 * * * * *", "30 * * * * *", "0 17 3 * * *", "@hourly"] {
            let cron = Cron::parse(text).unwrap();
            tokio_cron_scheduler::Job::new_async(cron.as_str(), |_, _| Box::pin(async {})).unwrap();
        }
    }

    proptest! {
        #[test]
        fn firings_move_forward(start in 0_i64..4_000_000_000, nanos in 0_u32..1_000_000_000) {
            let t = DateTime::from_timestamp(start, nanos).unwrap();
            let cron = Cron::parse("7 */13 1-5 * * 2,4").unwrap();
            let first = cron.next_after(t).unwrap();
            prop_assert!(first > t);
            prop_assert!(cron.next_after(first).unwrap() > first);
        }
    }
}
