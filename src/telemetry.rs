//! Where the log goes: to stderr as text or as JSON, one line an event, or to systemd's journal with a field for each value.
//!
//! Guarantees that a library's debug log is never enabled by a level alone: lettre's holds mail addresses and the
//! credentials of the SMTP conversation, sqlx's holds statements. Only a filter that names the library asks for it.
//! Text is coloured only on a terminal, and has no instant of its own where stderr is the journal, which writes one. Where the
//! journal is asked for and not there, the log goes to stderr. Relies on [`validate`] having seen the level when the
//! configuration was read.

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use crate::config::LogFormat;

/// What the names of our fields begin with in the journal: `journalctl LAPSED_JOB=expire`.
const JOURNAL_PREFIX: &str = "LAPSED";

/// Libraries that stay at warnings unless a filter names them.
const CAPPED: [&str; 3] = ["sqlx", "lettre", "tokio_cron_scheduler"];

/// Replaces the filter of the subscriber that [`init`] installed.
static REPLACE: OnceLock<Box<dyn Fn(Targets) + Send + Sync>> = OnceLock::new();

/// Starts logging at `level`, which is what [`validate`] accepts; anything else logs like `info`.
///
/// Does nothing where a subscriber is already installed.
pub fn init(level: &str, format: LogFormat) {
    let filter = filter(level).unwrap_or_else(|_| targets(LevelFilter::INFO));
    let stderr_is_journal = is_journal(std::io::stderr().as_fd());
    let (layer, missing) = match format {
        LogFormat::Json => (json(std::io::stderr).boxed(), None),
        LogFormat::Journald => journal_or_text(stderr_is_journal),
        LogFormat::Text => (text_to_stderr(stderr_is_journal), None),
    };
    // An error means that somebody else, a test for one, already installed a subscriber: it keeps the events.
    let (filter, handle) = reload::Layer::new(filter);
    if tracing::subscriber::set_global_default(Registry::default().with(layer).with(filter)).is_ok() {
        // Fails only when the subscriber is gone, and with it the log.
        REPLACE.set(Box::new(move |filter| drop(handle.reload(filter)))).ok();
    }
    if let Some(error) = missing {
        tracing::warn!(%error, "systemd's journal cannot be reached: the log goes to stderr");
    }
}

/// Logs at another level from now on: what [`validate`] accepts; anything else changes nothing.
pub fn set_level(level: &str) {
    if let (Some(replace), Ok(filter)) = (REPLACE.get(), filter(level)) {
        replace(filter);
    }
}

/// A layer of whatever kind, right above the registry.
type Chosen = Box<dyn Layer<Registry> + Send + Sync>;

/// The journal; or stderr, and why.
fn journal_or_text(stderr_is_journal: bool) -> (Chosen, Option<std::io::Error>) {
    match tracing_journald::layer() {
        Ok(layer) => {
            // The journal's own words for our levels: `journalctl -p info` shows what `log.level = "info"` does.
            let as_they_are = PriorityMappings {
                info: Priority::Informational,
                debug: Priority::Debug,
                trace: Priority::Debug,
                ..PriorityMappings::new()
            };
            let layer = layer.with_field_prefix(Some(JOURNAL_PREFIX.to_owned())).with_priority_mappings(as_they_are);
            (layer.with_syslog_identifier("lapsed".to_owned()).boxed(), None)
        }
        Err(error) => (text_to_stderr(stderr_is_journal), Some(error)),
    }
}

fn text_to_stderr(stderr_is_journal: bool) -> Chosen {
    let stderr = std::io::stderr;
    let colour = stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if stderr_is_journal { text(colour, (), stderr).boxed() } else { text(colour, SystemTime, stderr).boxed() }
}

/// Whether systemd connected this stream to its journal: `JOURNAL_STREAM` names its device and inode (systemd.exec(5)). A
/// child of a service inherits the variable, and may have its stderr elsewhere.
fn is_journal(stream: BorrowedFd<'_>) -> bool {
    let Some(named) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let metadata = stream.try_clone_to_owned().and_then(|stream| File::from(stream).metadata());
    metadata.is_ok_and(|metadata| *named == *format!("{}:{}", metadata.dev(), metadata.ino()))
}

/// Whether `level` is a level (`error`, `warn`, `info`, `debug`, `trace`) or a tracing filter.
///
/// # Errors
/// A sentence that says what is wrong and what would be right.
pub fn validate(level: &str) -> Result<(), String> {
    filter(level).map(|_| ())
}

fn text<S, T, W>(colour: bool, time: T, writer: W) -> impl Layer<S> + Send + Sync
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    T: FormatTime + Send + Sync + 'static,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    fmt::layer().compact().with_timer(time).with_ansi(colour).with_writer(writer)
}

/// One object a line: `timestamp`, `level`, `target`, `message`, the fields beside them, and under `span` the pass.
fn json<S, W>(writer: W) -> impl Layer<S> + Send + Sync
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    fmt::layer().json().flatten_event(true).with_span_list(false).with_writer(writer)
}

/// What a plain level means: that level for ourselves, and at most warnings for everything else.
fn targets(level: LevelFilter) -> Targets {
    // sqlx warns of each slow statement, in SQL: nothing that a reader of this log could act on.
    let others = Targets::new().with_default(level.min(LevelFilter::WARN)).with_target("sqlx", LevelFilter::ERROR);
    others.with_target("lapsed", level)
}

fn filter(text: &str) -> Result<Targets, String> {
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    if let [only] = parts[..]
        && let Some(level) = plain(only)
    {
        return Ok(targets(level));
    }
    // tracing takes a lone word for the name of a module: a mistyped level would silence the log.
    match parts.iter().find(|part| !part.contains('=') && plain(part).is_none()) {
        Some(word) => {
            return Err(format!(
                "{word:?} is not a level: write error, warn, info, debug or trace, or a filter such as \
                 \"lapsed=debug,info\""
            ));
        }
        None if parts.is_empty() => {
            return Err("write error, warn, info, debug or trace".to_owned());
        }
        None => {}
    }
    let mut directives = parts.join(",");
    for library in CAPPED {
        let named = parts.iter().any(|part| part.starts_with(library));
        if !named {
            directives.push_str(&format!(",{library}=warn"));
        }
    }
    directives.parse().map_err(|error| format!("is not a tracing filter: {error}; write \"lapsed=debug,info\""))
}

/// The level that a word names. Numbers, which tracing would take too, are not for people.
fn plain(word: &str) -> Option<LevelFilter> {
    if word.chars().all(|c| c.is_ascii_alphabetic()) { word.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What is logged at `level` of an event at each level by ourselves and by three libraries.
    fn logged(level: &str) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let layer = text(false, SystemTime, move || writer.clone());
        let subscriber = Registry::default().with(layer).with(filter(level).unwrap());
        tracing::subscriber::with_default(subscriber, || {
            macro_rules! speak {
                ($target:literal) => {
                    tracing::error!(target: $target, concat!($target, " error"));
                    tracing::warn!(target: $target, concat!($target, " warn"));
                    tracing::info!(target: $target, concat!($target, " info"));
                    tracing::debug!(target: $target, concat!($target, " debug"));
                    tracing::trace!(target: $target, concat!($target, " trace"));
                };
            }
            speak!("lapsed::deliver");
            speak!("sqlx::query");
            speak!("lettre::transport");
            speak!("tokio_cron_scheduler");
            speak!("hyper");
        });
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_plain_level_is_for_ourselves_only() {
        for level in ["debug", "DEBUG", " trace ", "trace,"] {
            let log = logged(level);
            assert!(log.contains("lapsed::deliver debug"), "{level}: {log}");
            for library in ["sqlx::query", "lettre::transport", "tokio_cron_scheduler", "hyper"] {
                let warns = log.contains(&format!("{library} warn"));
                assert_eq!(warns, library != "sqlx::query", "{level}: {log}");
                for quiet in ["info", "debug", "trace"] {
                    assert!(!log.contains(&format!("{library} {quiet}")), "{level}: {log}");
                }
            }
        }
    }

    #[test]
    fn the_level_error_silences_warnings_everywhere() {
        let log = logged("error");
        assert!(log.contains("sqlx::query error") && log.contains("lapsed::deliver error"));
        assert!(!log.contains("warn"), "{log}");
    }

    #[test]
    fn a_filter_must_name_a_library_to_hear_its_debug_log() {
        for level in ["debug,hyper=trace", "debug,trace", "lapsed=debug,trace"] {
            let log = logged(level);
            assert!(log.contains("hyper debug"), "{level}: {log}");
            for line in ["sqlx::query info", "lettre::transport debug", "lettre::transport trace"] {
                assert!(!log.contains(line), "{level}: {log}");
            }
        }
        assert!(logged("info,lettre=debug").contains("lettre::transport debug"));
        assert!(!logged("info,lettre=debug").contains("sqlx::query info"));
    }

    #[test]
    fn lines_carry_no_colour_codes_off_a_terminal() {
        assert!(!logged("trace").contains('\u{1b}'));
    }

    #[test]
    fn mistyped_levels_are_refused() {
        for text in ["", " , ", "inof", "3", "lapsed", "lapsed=debug,inof", "lapsed=loud"] {
            assert!(validate(text).is_err(), "{text:?}");
        }
        for text in ["error", "warn", "info", "debug", "trace", "off", "lapsed=debug,info"] {
            assert_eq!(validate(text), Ok(()));
        }
    }

    #[test]
    fn json_has_one_object_a_line_with_fields_and_the_pass() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = Registry::default().with(json(move || writer.clone())).with(filter("info").unwrap());
        tracing::subscriber::with_default(subscriber, || {
            let span = tracing::info_span!("pass", job = "deliver");
            let _inside = span.enter();
            tracing::info!(message_id = %"01\n02", reminders = 3, "sent a \"message\"");
        });
        let bytes = buffer.0.lock().unwrap().clone();
        let line = String::from_utf8(bytes).unwrap();
        assert_eq!(line.lines().count(), 1, "{line}");
        let mut event: serde_json::Value = serde_json::from_str(&line).expect("an object");
        let timestamp = event["timestamp"].take();
        assert!(timestamp.as_str().is_some_and(|at| at.len() == "2027-01-31T09:00:00.000000Z".len()), "{timestamp}");
        let expected = serde_json::json!({
            "timestamp": null, "level": "INFO", "target": "lapsed::telemetry::tests",
            "message": "sent a \"message\"", "message_id": "01\n02", "reminders": 3,
            "span": { "name": "pass", "job": "deliver" },
        });
        assert_eq!(event, expected);
    }
}
