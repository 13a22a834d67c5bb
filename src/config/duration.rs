//! Durations as people write them: `"30d"`, `"90s"`, `"1h 30m"`.
//!
//! Guarantees whole, non-negative seconds of at most [`LONGEST`], so that adding one to an instant of our time cannot
//! leave the calendar, and that [`parse_duration`] reads back exactly what [`format_duration`] writes.

use chrono::TimeDelta;

/// The units, the largest first, with their length in seconds.
const UNITS: [(&str, i64); 5] = [("w", 604_800), ("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)];

/// The longest duration that is accepted: 365,000 days, about a thousand years, in seconds.
const LONGEST: i64 = 365_000 * 86_400;

/// Reads a duration: whole numbers with the units `s`, `m`, `h`, `d`, `w`, the largest first, each once at most.
///
/// Zero (`"0s"`) is a duration; whether it makes sense is for the caller to say.
///
/// ```
/// use chrono::TimeDelta;
/// use lapsed::config::parse_duration;
///
/// assert_eq!(parse_duration("1h 30m"), Ok(TimeDelta::minutes(90)));
/// assert!(parse_duration("30").is_err_and(|error| error.contains("no unit")));
/// ```
///
/// # Errors
/// A sentence that repeats the text and says what would be right.
pub fn parse_duration(text: &str) -> Result<TimeDelta, String> {
    let mut rest = text.trim();
    let mut total: i64 = 0;
    let mut smallest = i64::MAX;
    if rest.is_empty() {
        return Err(not_a_duration(text));
    }
    while !rest.is_empty() {
        let (number, tail) = split(rest, |c| c.is_ascii_digit());
        let (unit, after) = split(tail, char::is_alphabetic);
        if number.is_empty() {
            return Err(not_a_duration(text));
        }
        if unit.is_empty() {
            let (word, _) = split(tail.trim_start(), char::is_alphabetic);
            return Err(if !tail.is_empty() && !tail.starts_with(char::is_whitespace) {
                not_a_duration(text)
            } else if let Some(unit) = meant(word) {
                format!("{text:?} is not a duration: write the unit right after {number}, as in \"{number}{unit}\"")
            } else if word.is_empty() {
                format!("{text:?} has no unit: write one right after {number}, such as \"{number}d\" (s, m, h, d or w)")
            } else {
                no_unit(text, word)
            });
        }
        let Some(&(_, seconds)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(no_unit(text, unit));
        };
        if seconds >= smallest {
            return Err(format!("{text:?}: write the largest unit first, and each once"));
        }
        smallest = seconds;
        total = number
            .parse::<i64>()
            .ok()
            .and_then(|count| count.checked_mul(seconds))
            .and_then(|part| part.checked_add(total))
            .filter(|sum| *sum <= LONGEST)
            .ok_or_else(|| format!("{text:?} is too long: at most 365000d"))?;
        rest = after.trim_start();
    }
    TimeDelta::try_seconds(total).ok_or_else(|| not_a_duration(text))
}

/// Writes a duration in days, hours, minutes and seconds, without the zero ones: `30d`, `1m 30s`, `0s`.
///
/// Fractions of a second are dropped; a negative duration gets a `-` in front, which [`parse_duration`] refuses.
pub fn format_duration(duration: TimeDelta) -> String {
    let seconds = duration.num_seconds();
    let mut left = seconds.unsigned_abs();
    let mut parts = Vec::new();
    // Days are what deadlines are counted in: 30d, rather than 4w 2d.
    for (name, length) in UNITS.iter().skip(1) {
        let length = length.unsigned_abs();
        if left >= length {
            parts.push(format!("{}{name}", left / length));
            left %= length;
        }
    }
    if parts.is_empty() {
        return "0s".to_owned();
    }
    let sign = if seconds < 0 { "-" } else { "" };
    format!("{sign}{}", parts.join(" "))
}

/// The longest prefix whose characters all satisfy `wanted`, and what follows it.
fn split(text: &str, wanted: impl Fn(char) -> bool) -> (&str, &str) {
    let end = text.find(|c| !wanted(c)).unwrap_or(text.len());
    text.split_at(end)
}

/// The unit that stands for a word.
fn meant(word: &str) -> Option<&'static str> {
    let word = word.strip_suffix('s').filter(|rest| !rest.is_empty()).unwrap_or(word);
    Some(match word {
        "w" | "week" => "w",
        "d" | "day" => "d",
        "h" | "hour" => "h",
        "m" | "min" | "minute" => "m",
        "s" | "sec" | "second" => "s",
        _ => return None,
    })
}

fn no_unit(text: &str, unit: &str) -> String {
    format!("{text:?}: there is no unit {unit:?}; the units are s, m, h, d and w")
}

fn not_a_duration(text: &str) -> String {
    format!("{text:?} is not a duration: write whole numbers with units, such as \"30d\", \"90s\" or \"1h 30m\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_read() {
        for (text, seconds) in [
            ("0s", 0),
            ("90s", 90),
            ("30d", 30 * 86_400),
            ("2w", 14 * 86_400),
            ("1h 30m", 5_400),
            ("1h30m", 5_400),
            (" 1w 1d 1h 1m 1s ", 694_861),
            ("365000d", LONGEST),
        ] {
            assert_eq!(parse_duration(text), Ok(TimeDelta::seconds(seconds)), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_duration_says_why() {
        for (text, reason) in [
            ("", "is not a duration"),
            ("  ", "is not a duration"),
            ("d", "is not a duration"),
            ("-1d", "is not a duration"),
            ("1.5h", "is not a duration"),
            ("1d, 2h", "is not a duration"),
            ("30", "write one right after 30, such as \"30d\""),
            ("30 d", "right after 30, as in \"30d\""),
            ("10 minutes", "right after 10, as in \"10m\""),
            ("3 months", "no unit \"months\""),
            ("1h 30", "has no unit"),
            ("30days", "no unit \"days\""),
            ("30D", "no unit \"D\""),
            ("5ms", "no unit \"ms\""),
            ("1m 1h", "largest unit first"),
            ("1h 1h", "largest unit first"),
            ("365001d", "too long"),
            ("9223372036854775807w", "too long"),
            ("99999999999999999999s", "too long"),
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }

    #[test]
    fn durations_are_written_for_people() {
        for (seconds, text) in [(0, "0s"), (90, "1m 30s"), (30 * 86_400, "30d"), (36 * 3_600, "1d 12h"), (-60, "-1m")] {
            assert_eq!(format_duration(TimeDelta::seconds(seconds)), text);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(seconds in 0..=LONGEST) {
            let duration = TimeDelta::seconds(seconds);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }

        #[test]
        fn no_text_breaks_the_parser(text in ".*") {
            let _ = parse_duration(&text);
        }

        #[test]
        fn nearly_right_text_breaks_nothing(text in "([0-9]{0,25}[smhdwx ]?){0,6}") {
            if let Ok(duration) = parse_duration(&text) {
                prop_assert!(duration >= TimeDelta::zero() && duration.num_seconds() <= LONGEST);
            }
        }
    }
}
