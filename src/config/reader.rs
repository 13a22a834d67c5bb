//! Reads merged values as types, and collects everything that is wrong with them.
//!
//! Guarantees that a [`Reported`] is only ever returned after the problem was written down, so that reading can go on
//! and tell everything at once; and that no password of a URL stands in a problem.

use std::collections::BTreeMap;
use std::fmt;

use config::{Value, ValueKind};

use super::store_url::masked_url;

/// Everything that is wrong with a configuration, one line each: the key, its value, where it came from, and what
/// would be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// The problems, in the order in which they were found.
    pub problems: Vec<String>,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration is not valid:")?;
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Invalid {}

/// The problem has been written down; go on with the next key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reported;

/// A value in the form of the configuration file, with a password masked.
pub(super) fn in_force(key: &str, value: &Value) -> String {
    if key == "store.url" { format!("{:?}", masked_url(&value.kind.to_string())) } else { shown(value) }
}

/// A value for programs, of the type that its default has, with a password masked: in the environment all is text.
pub(super) fn as_json(key: &str, value: &Value, default: &Value) -> serde_json::Value {
    use serde_json::Value as Json;
    match (&default.kind, &value.kind) {
        (ValueKind::Array(_), ValueKind::Array(items)) => items.iter().map(|item| text(key, item)).collect(),
        (ValueKind::Array(_), ValueKind::String(items)) => {
            items.split(',').map(str::trim).filter(|item| !item.is_empty()).map(Json::from).collect()
        }
        (ValueKind::I64(_), kind) => {
            kind.to_string().trim().parse::<i64>().map_or_else(|_| text(key, value), Json::from)
        }
        (ValueKind::Boolean(_), kind) => {
            kind.to_string().trim().parse::<bool>().map_or_else(|_| text(key, value), Json::from)
        }
        _ => text(key, value),
    }
}

fn text(key: &str, value: &Value) -> serde_json::Value {
    let text = value.kind.to_string();
    let masked = key == "store.url" || text.contains("//");
    if masked { masked_url(&text).into() } else { text.into() }
}

/// The merged values, and the problems so far.
pub(super) struct Reader {
    values: BTreeMap<String, Value>,
    problems: Vec<String>,
}

impl Reader {
    pub(super) fn new(values: BTreeMap<String, Value>, problems: Vec<String>) -> Self {
        Self { values, problems }
    }

    /// `result` where nothing was reported.
    pub(super) fn finish<T>(self, result: Result<T, Reported>) -> Result<T, Invalid> {
        match result {
            Ok(value) if self.problems.is_empty() => Ok(value),
            _ => Err(Invalid { problems: self.problems }),
        }
    }

    /// Writes down that the value of `key` is wrong, and why.
    pub(super) fn report(&mut self, key: &str, why: impl fmt::Display) -> Reported {
        let problem = match self.values.get(key) {
            Some(value) => {
                format!("{key} = {} ({}): {why}", in_force(key, value), value.origin().unwrap_or("unknown origin"))
            }
            None => format!("{key}: {why}"),
        };
        self.problems.push(problem);
        Reported
    }

    /// How many sections of this name there are: `name[1]`, `name[2]` and so on.
    pub(super) fn sections(&self, name: &str) -> usize {
        let number = |key: &String| key.strip_prefix(name)?.strip_prefix('[')?.split(']').next()?.parse::<usize>().ok();
        self.values.keys().filter_map(number).max().unwrap_or_default()
    }

    /// Whether a key has a value: those in a list of sections need not.
    pub(super) fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// A text as a type; `None` where it is empty.
    pub(super) fn optional<T>(
        &mut self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, Reported> {
        let text = match self.values.get(key).map(|value| &value.kind) {
            // Of keys in a list of sections; the others are all in the built-in file.
            None => return Ok(None),
            Some(ValueKind::String(text)) => text.trim().to_owned(),
            // A bare number is what it would be in the environment, where everything is text.
            Some(ValueKind::I64(number)) => number.to_string(),
            _ => return Err(self.report(key, "must be text, in quotes")),
        };
        if text.is_empty() {
            return Ok(None);
        }
        parse(&text).map(Some).map_err(|why| self.report(key, why))
    }

    /// A text as a type. Empty is not set, and this key has to be.
    pub(super) fn required<T>(
        &mut self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, Reported> {
        match self.optional(key, parse)? {
            Some(value) => Ok(value),
            None => Err(self.report(key, "must not be empty")),
        }
    }

    /// A whole number of 16 bits, as a number or as text.
    pub(super) fn number(&mut self, key: &str) -> Result<u16, Reported> {
        let number = match self.values.get(key).map(|value| &value.kind) {
            Some(ValueKind::I64(number)) => u16::try_from(*number).ok(),
            Some(ValueKind::String(text)) => text.trim().parse().ok(),
            _ => None,
        };
        number.ok_or_else(|| self.report(key, "must be a whole number from 0 to 65535"))
    }

    /// `true` or `false`, as such or as text.
    pub(super) fn flag(&mut self, key: &str) -> Result<bool, Reported> {
        let flag = match self.values.get(key).map(|value| &value.kind) {
            Some(ValueKind::Boolean(flag)) => Some(*flag),
            Some(ValueKind::String(text)) => text.trim().parse().ok(),
            _ => None,
        };
        flag.ok_or_else(|| self.report(key, "must be true or false"))
    }

    /// A list, each item as a type, as such or as text that is separated by commas. Empty text is an empty list.
    pub(super) fn list<T: PartialEq>(
        &mut self,
        key: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Vec<T>, Reported> {
        let items: Option<Vec<String>> = match self.values.get(key).map(|value| &value.kind) {
            Some(ValueKind::Array(items)) => items
                .iter()
                .map(|item| match &item.kind {
                    ValueKind::String(text) => Some(text.clone()),
                    ValueKind::I64(number) => Some(number.to_string()),
                    _ => None,
                })
                .collect(),
            Some(ValueKind::String(text)) if text.trim().is_empty() => Some(Vec::new()),
            Some(ValueKind::String(text)) => Some(text.split(',').map(str::to_owned).collect()),
            _ => None,
        };
        let Some(items) = items else {
            return Err(self.report(key, "must be a list of texts, such as [\"a\", \"b\"]"));
        };
        let mut parsed = Vec::new();
        let mut reported = None;
        for item in items {
            match parse(&item) {
                Ok(value) if parsed.contains(&value) => {
                    reported = Some(self.report(key, format!("{} is given twice: name each once", item.trim())));
                }
                Ok(value) => parsed.push(value),
                Err(why) => reported = Some(self.report(key, why)),
            }
        }
        reported.map_or(Ok(parsed), Err)
    }
}

/// A value as its file would write it, with passwords masked.
fn shown(value: &Value) -> String {
    match &value.kind {
        ValueKind::String(text) if text.contains("//") => {
            format!("{:?}", masked_url(text))
        }
        ValueKind::String(text) => format!("{text:?}"),
        ValueKind::Array(items) => {
            let items: Vec<String> = items.iter().map(shown).collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Table(_) => "{}".to_owned(),
        other => other.to_string(),
    }
}
