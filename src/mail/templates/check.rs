//! Finds what is wrong with an operator's templates before a mail does.
//!
//! Two looks at each file. The first reads it: every variable that it takes from outside must be known, and so must every
//! field of what is known by name (`own`, `corrected`, `escalated`, `part`, `token`, and `at` for instants). The second renders every sample
//! letter in every language, and so finds what has another name or depends on what happens. Neither runs for templates that
//! are built in.

use std::collections::{BTreeMap, BTreeSet};

use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};

use super::built_in::AT;
use super::inline::next_code;
use super::{BadTemplates, DEFAULT, File, Language, Templates, Tree, environment, origin, resolved};
use crate::mail::letter::Kind;
use crate::mail::sample;

/// Names that every template has without anybody's doing.
const EVERYWHERE: [&str; 10] =
    ["loop", "range", "dict", "namespace", "debug", "super", "self", "caller", "locale", "subject"];

/// Everything that is wrong with the files that are not built in.
pub(super) fn check(tree: &Tree) -> Vec<String> {
    let mut problems = BTreeSet::new();
    // The names are the same in every language.
    let names = match Templates::built_in() {
        Ok(templates) => sample::known(templates.language(DEFAULT)).unwrap_or_default(),
        Err(BadTemplates { problems }) => return problems,
    };
    for (tag, files) in resolved(tree) {
        let files: BTreeMap<&str, &File> = files.into_iter().collect();
        match compiled(&files) {
            Ok(compiled) => {
                let language = Language { tag, compiled };
                for (name, file) in files.iter().filter(|(_, file)| file.path.is_some()) {
                    read(name, file, &language.compiled, &names, &mut problems);
                }
                if problems.is_empty() {
                    render(&language, &files, &mut problems);
                }
            }
            Err(found) => problems.extend(found),
        }
    }
    problems.into_iter().collect()
}

/// The files as they were written, before a style sheet comes into them: the lines are those that an editor shows.
fn compiled(files: &BTreeMap<&str, &File>) -> Result<Environment<'static>, Vec<String>> {
    let mut environment = environment().map_err(|error| vec![error.to_string()])?;
    let mut problems = Vec::new();
    for (name, file) in files {
        if let Err(error) = environment.add_template_owned((*name).to_owned(), file.source.clone()) {
            problems.push(told(&error, &origin(name, file), None));
        }
    }
    if problems.is_empty() { Ok(environment) } else { Err(problems) }
}

/// What a file names and nobody has.
fn read(
    name: &str,
    file: &File,
    compiled: &Environment<'_>,
    samples: &[(Kind, Value)],
    problems: &mut BTreeSet<String>,
) {
    let Ok(template) = compiled.get_template(name) else { return };
    let from_outside = template.undeclared_variables(false);
    // A file beside the mails may be used by any of them.
    let kinds: Vec<&Value> =
        samples.iter().filter(|(kind, _)| mail_of(name).is_none_or(|of| of == *kind)).map(|(_, known)| known).collect();
    let known = fields(&kinds);
    for Path { line, parts, is_filter } in paths(&file.source) {
        let at = || format!("{}:{line}", origin(name, file));
        let Some(first) = parts.first() else { continue };
        if is_filter {
            if compiled
                .compile_expression(&format!("'' | {first}"))
                .and_then(|it| it.eval(()))
                .is_err_and(|error| error.kind() == ErrorKind::UnknownFilter)
            {
                problems.insert(format!("{}: there is no filter {first:?}", at()));
            }
            continue;
        }
        let is_from_outside = from_outside.contains(*first);
        if is_from_outside && !EVERYWHERE.contains(first) && !known.contains(*first) && !is_shared(name, first) {
            let known: Vec<&str> = known.iter().map(String::as_str).chain(["locale", "subject"]).collect();
            problems.insert(format!("{}: there is no variable {first:?} here, only {}", at(), known.join(", ")));
            continue;
        }
        if let Some((field, known)) = unknown_field(&parts, &kinds) {
            problems.insert(format!("{}: {field:?} is not known; of {} there is {known}", at(), before(&parts, field)));
        }
    }
}

/// Whether what is beside the mails may take this from whoever includes it: `part`, `token`, and `at`, which phrases put into words.
fn is_shared(name: &str, variable: &str) -> bool {
    mail_of(name).is_none() && matches!(variable, "part" | "token" | AT)
}

fn mail_of(name: &str) -> Option<Kind> {
    let (directory, _) = name.split_once('/')?;
    Kind::ALL.into_iter().find(|kind| kind.as_str() == directory)
}

fn before(parts: &[&str], field: &str) -> String {
    parts.iter().take_while(|part| **part != field).copied().collect::<Vec<_>>().join(".")
}

fn fields(values: &[&Value]) -> BTreeSet<String> {
    values
        .iter()
        .filter_map(|value| value.try_iter().ok())
        .flatten()
        .filter_map(|key| key.as_str().map(str::to_owned))
        .collect()
}

/// The first field of a path that none of the samples has, and what they have instead.
fn unknown_field<'a>(parts: &[&'a str], samples: &[&Value]) -> Option<(&'a str, String)> {
    let (first, rest) = parts.split_first()?;
    let mut values: Vec<Value> = samples.iter().filter_map(|known| named(known, first)).collect();
    for part in rest {
        values.retain(|value| value.kind() == ValueKind::Map);
        if values.is_empty() {
            return None;
        }
        let known = fields(&values.iter().collect::<Vec<_>>());
        if !known.contains(*part) {
            return Some((part, known.into_iter().collect::<Vec<_>>().join(", ")));
        }
        values = values.iter().filter_map(|value| value.get_attr(part).ok()).collect();
    }
    None
}

/// What a name stands for in a sample. A part of a mail is called `part`, in loops a token `token`, and in phrases an instant `at`.
fn named(known: &Value, name: &str) -> Option<Value> {
    let parts = || ["own", "corrected", "escalated"].into_iter().filter_map(|part| known.get_attr(part).ok());
    let token = || {
        let mut first = parts().filter_map(|part| part.get_attr("first").ok());
        first.find(|first| first.kind() == ValueKind::Map)
    };
    match name {
        "part" => parts().find(|part| part.kind() == ValueKind::Map),
        "token" => token(),
        AT => token()?.get_attr("deadline").ok(),
        _ => known.get_attr(name).ok().filter(|value| !value.is_undefined()),
    }
}

fn render(language: &Language, files: &BTreeMap<&str, &File>, problems: &mut BTreeSet<String>) {
    let told = |error: &Error| {
        let name = error.name().unwrap_or_default();
        let file = files.get(name);
        let origin = file.map_or_else(|| name.to_owned(), |file| origin(name, file));
        told(error, &origin, file.map(|file| file.source.as_ref()))
    };
    let samples = match sample::known(language) {
        Ok(samples) => samples,
        Err(error) => {
            problems.insert(told(&error));
            return;
        }
    };
    for (kind, known) in &samples {
        if let Err(error) = language.write(*kind, known) {
            problems.insert(told(&error));
        }
        if let Some(Err(error)) = named(known, "token").map(|token| language.event(&token)) {
            problems.insert(told(&error));
        }
    }
}

/// An error of a template as its author reads it: the file, the line, what is wrong.
fn told(error: &Error, origin: &str, source: Option<&str>) -> String {
    // The innermost error is where it went wrong; those around it say how that was reached.
    let inner = std::iter::successors(Some(error), |error| {
        std::error::Error::source(*error).and_then(|source| source.downcast_ref::<Error>())
    })
    .last()
    .unwrap_or(error);
    let line = inner.line().or(error.line()).map_or_else(String::new, |line| format!(":{line}"));
    let detail = inner.detail().map_or_else(String::new, |detail| format!(": {detail}"));
    let at = source.zip(error.range()).and_then(|(source, range)| source.get(range));
    let at = at.map_or_else(String::new, |code| format!(" in {code:?}"));
    format!("{origin}{line}: {}{detail}{at}", inner.kind())
}

/// A name in a template's code, with the fields that follow it.
struct Path<'a> {
    line: usize,
    parts: Vec<&'a str>,
    is_filter: bool,
}

/// Every name in a template's code, in order.
fn paths(source: &str) -> Vec<Path<'_>> {
    let mut found = Vec::new();
    let mut offset = 0;
    while let Some((at, end)) = source.get(offset..).and_then(next_code) {
        let (begin, end) = (offset + at, offset + end);
        let code = source.get(begin..end).unwrap_or_default();
        if !code.starts_with("{#") {
            let line = source.get(..begin).unwrap_or_default().matches('\n').count() + 1;
            names(code, line, &mut found);
        }
        offset = end.max(begin + 1);
    }
    found
}

fn names<'a>(code: &'a str, first_line: usize, found: &mut Vec<Path<'a>>) {
    let mut rest = code;
    let mut line = first_line;
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let is_start = |c: char| c.is_alphabetic() || c == '_';
        let len = if c == '"' || c == '\'' {
            rest.get(1..).and_then(|inside| inside.find(c)).map_or(rest.len(), |end| end + 2)
        } else if is_start(c) {
            let is_name = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
            let len = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            let parts: Vec<&str> = rest.get(..len).unwrap_or_default().split('.').collect();
            let is_filter = before == '|';
            // What follows a value that has no name is not looked at: `first(own.listed).description`.
            if before != '.' {
                found.push(Path { line, parts, is_filter });
            }
            len
        } else if c.is_ascii_digit() {
            rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len())
        } else {
            c.len_utf8()
        };
        let (piece, after) = rest.split_at(len);
        line += piece.matches('\n').count();
        if !c.is_whitespace() {
            before = piece.chars().last().unwrap_or(c);
        }
        rest = after;
    }
}
