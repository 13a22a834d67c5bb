//! The three layers that a value can come from, merged: built-in defaults < file < environment.
//!
//! Guarantees that what comes out holds exactly the keys of `config/lapsed.toml`, each with the place that it came
//! from, and that every key which is not one of them has been reported. Relies on nobody reading a key that the
//! built-in file does not have.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::Path;

use config::{Config, ConfigError, Map, Source, Value, ValueKind};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Built into the program: the defaults, and the list of the keys that exist.
const DEFAULTS: &str = include_str!("../../config/lapsed.toml");

/// How the origin of a built-in default is written.
const BUILT_IN: &str = "built-in default";

/// How the origin of a value from the environment begins.
const VARIABLE: &str = "environment variable";

/// What the names of our environment variables begin with, and what parts them.
const PREFIX: &str = "LAPSED__";
const SEPARATOR: &str = "__";

/// Every key with its value, merged.
pub(super) type Values = BTreeMap<String, Value>;

/// One layer, flat: dotted keys, and values that know their origin.
#[derive(Debug, Clone, Default)]
struct Layer(Map<String, Value>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(self.0.clone())
    }
}

/// A value at the end of a path of keys, or an empty section.
struct Leaf {
    path: Vec<String>,
    value: Value,
}

impl Leaf {
    /// Whether it is in a `[[reminders.policy]]`: the only list of sections. Its path begins with `reminders`, `policy[1]`.
    fn is_of_a_policy(&self) -> bool {
        matches!(self.path.as_slice(), [section, list, ..] if section == "reminders" && list.starts_with("policy["))
    }

    /// Whether somebody tried to write a policy elsewhere.
    fn is_a_lost_policy(&self) -> bool {
        matches!(self.path.as_slice(), [section, list, ..] if section == "reminders" && list == "policy")
    }
}

/// What a policy may say.
const POLICY_KEYS: [&str; 7] =
    ["match.kind", "match.scope", "match.owner", "match.description", "lead_times", "window", "contacts"];

/// The values of policies by their keys, `reminders.policy[1].match.kind` and so on; others become problems.
fn policies(leaves: Vec<Leaf>, problems: &mut Vec<String>) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for Leaf { path, value } in leaves {
        let (key, name) = (dotted(&path), dotted(path.get(2..).unwrap_or_default()));
        let is_table = matches!(value.kind, ValueKind::Table(_));
        if name.is_empty() || name == "match" && is_table || POLICY_KEYS.contains(&name.as_str()) && !is_table {
            found.push((key, value));
        } else {
            let origin = value.origin().unwrap_or(BUILT_IN);
            problems
                .push(format!("{key} ({origin}): unknown key; the keys of a policy are {}", POLICY_KEYS.join(", ")));
        }
    }
    found
}

/// The merged values by their dotted keys. Adds what is wrong with the layers themselves to `problems`.
///
/// A file that is not TOML would make half the values look wrong, so then nothing is merged: `None`.
pub(super) fn merged(
    file: Option<&Path>,
    system_file: &Path,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    problems: &mut Vec<String>,
) -> Option<Values> {
    let built_in: Map<String, Value> = match leaves(DEFAULTS, BUILT_IN, false) {
        Ok(leaves) => leaves.into_iter().map(|leaf| (dotted(&leaf.path), leaf.value)).collect(),
        Err(problem) => {
            problems.push(problem);
            return None;
        }
    };
    let keys: BTreeSet<String> = built_in.keys().cloned().collect();

    let file_leaves = match read(file, system_file) {
        Ok(leaves) => leaves,
        Err(problem) => {
            problems.push(problem);
            return None;
        }
    };
    let (policy_leaves, file_leaves): (Vec<Leaf>, Vec<Leaf>) = file_leaves.into_iter().partition(Leaf::is_of_a_policy);
    let policies = policies(policy_leaves, problems);
    let environment_leaves = variables(environment, problems);
    let config = Config::builder()
        .add_source(Layer(built_in))
        .add_source(known(file_leaves, &keys, problems))
        .add_source(known(environment_leaves, &keys, problems))
        .build();
    match config {
        Ok(config) => {
            let mut values = BTreeMap::new();
            flatten(config.cache, String::new(), &mut values);
            values.extend(policies);
            Some(values)
        }
        Err(error) => {
            problems.push(error.to_string());
            None
        }
    }
}

/// The environment variable that sets a key.
pub(super) fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', SEPARATOR).to_uppercase())
}

/// The leaves of the file that was asked for, or of the system's file where there is one.
fn read(file: Option<&Path>, system_file: &Path) -> Result<Vec<Leaf>, String> {
    let path = file.unwrap_or(system_file);
    match std::fs::read_to_string(path) {
        Ok(text) => leaves(&text, &path.display().to_string(), true),
        Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(format!("{}: cannot read this configuration file: {error}", path.display())),
    }
}

/// The leaves of a TOML text, in its order. The origin of each is `origin`, with the line where `lines` asks for it.
fn leaves(text: &str, origin: &str, lines: bool) -> Result<Vec<Leaf>, String> {
    let table = DeTable::parse(text).map_err(|error| {
        // Not the error's own text: it quotes the line, which may hold a password.
        let at = error.span().map_or(0, |span| span.start);
        format!("{origin}:{}: {}", line(text, at), error.message())
    })?;
    let place = |at: usize| {
        if lines { format!("{origin}:{}", line(text, at)) } else { origin.to_owned() }
    };
    let mut found = Vec::new();
    collect(table.get_ref(), &[], &place, &mut found);
    Ok(found)
}

/// The line, counted from 1, of a byte offset.
fn line(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

fn collect(table: &DeTable<'_>, prefix: &[String], place: &impl Fn(usize) -> String, found: &mut Vec<Leaf>) {
    // A table is kept in the order of its keys; what a person reads should follow the file.
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (key, value) in entries {
        let mut path = prefix.to_vec();
        path.push(key.get_ref().to_string());
        match value.get_ref() {
            DeValue::Table(inner) if !inner.is_empty() => collect(inner, &path, place, found),
            DeValue::Array(items) if tables(items).count() > 0 => {
                let origin = place(key.span().start);
                for (n, table) in tables(items).enumerate() {
                    let mut path = path.clone();
                    if let Some(name) = path.last_mut() {
                        *name = format!("{name}[{}]", n + 1);
                    }
                    match table {
                        table if table.is_empty() => {
                            found.push(Leaf { path, value: Value::new(Some(&origin), ValueKind::Table(Map::new())) });
                        }
                        table => collect(table, &path, place, found),
                    }
                }
            }
            _ => {
                let origin = place(key.span().start);
                found.push(Leaf { path, value: Value::new(Some(&origin), kind(value)) });
            }
        }
    }
}

/// The tables of a list, as `[[reminders.policy]]` makes it.
fn tables<'a, 'b>(items: &'a [Spanned<DeValue<'b>>]) -> impl Iterator<Item = &'a DeTable<'b>> {
    items.iter().filter_map(|item| match item.get_ref() {
        DeValue::Table(table) => Some(table),
        _ => None,
    })
}

fn kind(value: &Spanned<DeValue<'_>>) -> ValueKind {
    match value.get_ref() {
        DeValue::String(text) => ValueKind::String(text.to_string()),
        DeValue::Boolean(flag) => ValueKind::Boolean(*flag),
        // A number that does not fit stays text, and is refused where it is read.
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| ValueKind::String(number.as_str().to_owned()), ValueKind::I64),
        DeValue::Float(number) => {
            number.as_str().parse().map_or_else(|_| ValueKind::String(number.as_str().to_owned()), ValueKind::Float)
        }
        DeValue::Datetime(instant) => ValueKind::String(instant.to_string()),
        DeValue::Array(items) => ValueKind::Array(items.iter().map(|item| Value::new(None, kind(item))).collect()),
        DeValue::Table(_) => ValueKind::Table(Map::new()),
    }
}

/// Our environment variables as leaves, in the order of their names.
fn variables(environment: impl IntoIterator<Item = (OsString, OsString)>, problems: &mut Vec<String>) -> Vec<Leaf> {
    let sorted: BTreeMap<OsString, OsString> = environment.into_iter().collect();
    let mut found = Vec::new();
    for (name, value) in sorted {
        let name = name.to_string_lossy();
        let Some(key) = name.strip_prefix(PREFIX) else {
            continue;
        };
        let origin = format!("{VARIABLE} {name}");
        let Ok(value) = value.into_string() else {
            problems.push(format!("{origin}: its value is not valid UTF-8"));
            continue;
        };
        found.push(Leaf {
            path: key.to_lowercase().split(SEPARATOR).map(str::to_owned).collect(),
            value: Value::new(Some(&origin), value),
        });
    }
    found
}

/// The leaves whose keys exist; the others become problems. Their values are not shown: who mistypes the name of a
/// password's key has written a password beside it.
fn known(leaves: Vec<Leaf>, keys: &BTreeSet<String>, problems: &mut Vec<String>) -> Layer {
    let mut layer = Layer::default();
    for leaf in leaves {
        let lost = leaf.is_a_lost_policy();
        let Leaf { path, value } = leaf;
        let key = dotted(&path);
        let origin = value.origin().unwrap_or(BUILT_IN).to_owned();
        if lost {
            problems.push(format!(
                "{key} ({origin}): policies stand in the configuration file, each under [[reminders.policy]]"
            ));
            continue;
        }
        let is_table = matches!(value.kind, ValueKind::Table(_));
        let is_section = keys.iter().any(|known| in_section(known, &key));
        if keys.contains(&key) {
            if is_table {
                problems.push(format!("{key} ({origin}): this is a key, not a section: write {key} = ..."));
            } else {
                layer.0.insert(key, value);
            }
        } else if is_section && !is_table {
            problems
                .push(format!("{key} ({origin}): this is a section, not a key: its keys are {}", inside(&key, keys)));
        } else if !is_section {
            problems.push(format!(
                "{key} ({origin}): unknown key; {}",
                suggestion(&key, keys, origin.starts_with(VARIABLE))
            ));
        }
    }
    layer
}

/// A path as it is written; a part that holds dots itself stays in quotes, and is not taken for several parts.
fn dotted(path: &[String]) -> String {
    let parts: Vec<String> =
        path.iter().map(|part| if part.contains('.') { format!("{part:?}") } else { part.clone() }).collect();
    parts.join(".")
}

fn in_section(key: &str, section: &str) -> bool {
    key.strip_prefix(section).is_some_and(|rest| rest.starts_with('.'))
}

/// The keys below a section, for a message.
fn inside(section: &str, keys: &BTreeSet<String>) -> String {
    let inside: Vec<&str> = keys.iter().filter(|key| in_section(key, section)).map(String::as_str).collect();
    inside.join(", ")
}

/// What somebody who wrote `key` may have meant.
fn suggestion(key: &str, keys: &BTreeSet<String>, from_environment: bool) -> String {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let score = |known: &str| {
        let whole = strsim::normalized_damerau_levenshtein(key, known);
        // The right name in the wrong section is the likelier the closer the section is.
        if last(key) == last(known) { 1.0 + whole } else { whole }
    };
    let best = keys
        .iter()
        .map(|known| (known, score(known)))
        .max_by(|(_, a), (_, b)| a.total_cmp(b))
        .filter(|(_, score)| *score >= 0.6);
    match best {
        Some((known, _)) if from_environment => {
            format!("did you mean {known} ({})?", variable(known))
        }
        Some((known, _)) => format!("did you mean {known}?"),
        None => {
            let section = key.split('.').next().unwrap_or_default();
            let near = inside(section, keys);
            if near.is_empty() {
                let sections: BTreeSet<&str> = keys.iter().filter_map(|key| key.split('.').next()).collect();
                let sections: Vec<&str> = sections.into_iter().collect();
                format!("the sections are {}", sections.join(", "))
            } else {
                format!("the keys of [{section}] are {near}")
            }
        }
    }
}

/// A tree of values as a flat map by dotted keys.
fn flatten(value: Value, key: String, values: &mut BTreeMap<String, Value>) {
    match value.kind {
        ValueKind::Table(table) => {
            for (name, inner) in table {
                let key = if key.is_empty() { name } else { format!("{key}.{name}") };
                flatten(inner, key, values);
            }
        }
        _ => {
            values.insert(key, value);
        }
    }
}
