//! The templates of mails: those that are built in, and an operator's own in the place of any of them.
//!
//! A tree of files: each mail is a directory with `subject.txt`, `body.txt` and `body.html`; what they share lies beside
//! them. A language is a directory of the same tree, named by its tag (`de`, `pt-br`), and what it lacks is taken from the
//! language that it is a variety of, and then from the tree itself, which is in English. An operator's file takes the place
//! of the built-in file at the same place in the tree.
//!
//! Guarantees that all of them are read, checked and compiled when [`Templates`] are made, and never again: that each can
//! be read, names nothing that is not there, and renders every sample of its mail. The built-in ones are taken to be
//! right: tests see to that.

mod built_in;
mod check;
mod inline;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, UndefinedBehavior};

use super::clean::{header_line, unlinked};
use super::letter::Kind;
use super::view::SHOWN;
use super::wrap::hanging;

/// Columns of the labels in texts.
const LABEL: usize = 10;

/// The language of the tree itself.
const DEFAULT: &str = "en";

/// How large a template may be, in bytes.
const MAX_SIZE: u64 = 1 << 20;

/// How deep directories may lie in each other.
const MAX_DEPTH: usize = 4;

/// The templates, in every language that there is.
#[derive(Debug)]
pub struct Templates {
    /// The default first, then the others by their tags.
    languages: Vec<Language>,
}

/// The templates in one language.
#[derive(Debug)]
pub struct Language {
    tag: String,
    compiled: Environment<'static>,
}

/// What a mail says, as people read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The subject.
    pub subject: String,
    /// For programs that show plain text.
    pub text: String,
    /// The same for programs that show HTML.
    pub html: String,
}

/// Everything that is wrong with an operator's templates: of each thing the file, the line, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", problems.join("\n"))]
pub struct BadTemplates {
    /// One each.
    pub problems: Vec<String>,
}

/// A file of the tree.
#[derive(Clone, Debug)]
struct File {
    source: Cow<'static, str>,
    /// Where it was read; `None`: built in.
    path: Option<PathBuf>,
}

/// The files by their place in the tree, such as `de/reminder/body.txt`.
type Tree = BTreeMap<String, File>;

/// The built-in templates in one language: the tag, and each file's name and source as it is compiled.
type Prepared = Vec<(String, Vec<(String, String)>)>;

static BUILT_IN: LazyLock<Result<Prepared, BadTemplates>> = LazyLock::new(|| prepared(&built_in::tree()));

impl Templates {
    /// The built-in ones.
    ///
    /// # Errors
    /// Never, unless a built-in template is broken.
    pub fn built_in() -> Result<Self, BadTemplates> {
        BUILT_IN.as_ref().map_err(BadTemplates::clone).and_then(compiled)
    }

    /// The built-in ones, with the files of a directory in the place of theirs.
    ///
    /// # Errors
    /// Everything that is wrong with these files.
    pub fn load(directory: &Path) -> Result<Self, BadTemplates> {
        let mut tree = built_in::tree();
        let mut problems = Vec::new();
        read(directory, "", 0, &mut tree, &mut problems);
        if problems.is_empty() {
            problems = check::check(&tree);
        }
        if problems.is_empty() {
            prepared(&tree).as_ref().map_err(BadTemplates::clone).and_then(compiled)
        } else {
            Err(BadTemplates { problems })
        }
    }

    /// The language for a reader: of their locale (a BCP 47 tag), or else of the one that it is a variety of, or else the
    /// default.
    pub fn language(&self, locale: &str) -> &Language {
        let mut wanted = tag(locale);
        loop {
            if let Some(found) = self.languages.iter().find(|language| language.tag == wanted) {
                return found;
            }
            match wanted.rfind('-') {
                Some(end) => wanted.truncate(end),
                None => return &self.languages[0],
            }
        }
    }

    /// The tags of all languages, the default first.
    pub fn languages(&self) -> impl Iterator<Item = &str> {
        self.languages.iter().map(|language| language.tag.as_str())
    }
}

impl Language {
    /// Its tag.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// Fills in the templates of a mail.
    ///
    /// # Errors
    /// When a template fails on this letter.
    pub fn write(&self, kind: Kind, known: &Value) -> Result<Written, minijinja::Error> {
        let name = |file: &str| format!("{}/{file}", kind.as_str());
        let render = |file: &str, known: &Value| self.compiled.get_template(&name(file))?.render(known);
        // One map: what `context!` joins is looked through for each name.
        let named = |key: Value| Some((key.as_str()?.to_owned(), known.get_item(&key).ok()?));
        let mut known: BTreeMap<String, Value> = known.try_iter()?.filter_map(named).collect();
        known.insert("locale".to_owned(), self.tag.as_str().into());
        // The subject first: the other two repeat it.
        let subject = header_line(&render("subject.txt", &Value::from_object(known.clone()))?, SHOWN);
        known.insert("subject".to_owned(), unlinked(&subject).into());
        let known = Value::from_object(known);
        Ok(Written { text: render("body.txt", &known)?, html: render("body.html", &known)?, subject })
    }

    /// What mails say of a token in words: `token.words`.
    ///
    /// # Errors
    /// When the template fails on this token.
    pub fn words(&self, token: &Value) -> Result<Value, minijinja::Error> {
        let known = minijinja::context! { locale => self.tag.as_str(), token };
        let captured = self.compiled.get_template(built_in::WORDS)?.render_captured(known)?;
        let state = captured.state();
        let names = state.exports().into_iter().filter(|name| *name != built_in::AT);
        let words: BTreeMap<String, Value> =
            names.filter_map(|name| Some((name.to_owned(), state.lookup(name)?))).collect();
        Ok(words.into())
    }

    /// The title and the text of a token's entry in a calendar.
    ///
    /// # Errors
    /// When the template fails on this token.
    pub fn event(&self, token: &Value) -> Result<(String, String), minijinja::Error> {
        let known = minijinja::context! { locale => self.tag.as_str(), token };
        let written = self.compiled.get_template(built_in::EVENT)?.render(known)?;
        let (title, text) = written.split_once('\n').unwrap_or((&written, ""));
        // Where a subject stands, nothing makes links; calendars do.
        Ok((unlinked(title.trim()), text.trim().to_owned()))
    }
}

/// A tag as directories and look-ups have it.
fn tag(locale: &str) -> String {
    locale.to_ascii_lowercase().replace('_', "-")
}

/// The language of a file and its name within it.
fn divided(place: &str) -> (&str, &str) {
    match place.split_once('/') {
        Some((first, name)) if is_language(first) => (first, name),
        _ => ("", place),
    }
}

/// Whether a directory is a language: two or three letters, and perhaps more after hyphens. None of the mails is called so.
fn is_language(name: &str) -> bool {
    let mut parts = name.split('-');
    let is_first =
        parts.next().is_some_and(|part| matches!(part.len(), 2 | 3) && part.bytes().all(|b| b.is_ascii_lowercase()));
    is_first && parts.all(|part| (2..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// Reads an operator's files into the tree. Hidden files and editors' copies are passed over.
fn read(directory: &Path, place: &str, depth: usize, tree: &mut Tree, problems: &mut Vec<String>) {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => return problems.push(format!("{}: cannot be read: {error}", directory.display())),
    };
    for entry in entries {
        let path = match entry {
            Ok(entry) => entry.path(),
            Err(error) => return problems.push(format!("{}: cannot be read: {error}", directory.display())),
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || name.ends_with('~') {
            continue;
        }
        let within = format!("{place}{name}");
        if path.is_dir() {
            if depth < MAX_DEPTH {
                // Languages are found whatever the case of their letters.
                let within = if depth == 0 && is_language(&tag(&name)) { tag(&name) } else { within };
                read(&path, &format!("{within}/"), depth + 1, tree, problems);
            }
        } else {
            match file(&path, &within) {
                Ok(file) => _ = tree.insert(within, file),
                Err(problem) => problems.push(format!("{}: {problem}", path.display())),
            }
        }
    }
}

fn file(path: &Path, place: &str) -> Result<File, String> {
    let name = divided(place).1;
    let is_part = name.starts_with('_') && [".txt", ".html"].iter().any(|ending| name.ends_with(ending));
    if !is_part && !built_in::names().any(|known| known == name) {
        let known: Vec<&str> = built_in::names().collect();
        return Err(format!(
            "no mail has a template of this name. There are {}; files that your templates include begin with _ and end in \
             .txt or .html",
            known.join(", ")
        ));
    }
    let size = std::fs::metadata(path).map_err(|error| format!("cannot be read: {error}"))?.len();
    if size > MAX_SIZE {
        return Err(format!("is larger than {MAX_SIZE} bytes"));
    }
    let source = std::fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))?;
    Ok(File { source: source.into(), path: Some(path.to_owned()) })
}

/// All languages of a tree with the files that each of them uses.
fn resolved(tree: &Tree) -> Vec<(String, Vec<(&str, &File)>)> {
    let tags: BTreeSet<&str> = tree.keys().map(|place| divided(place).0).collect();
    let names: BTreeSet<&str> = tree.keys().map(|place| divided(place).1).collect();
    let find = |tag: &str, name: &str| {
        let mut tag = tag;
        loop {
            let place = if tag.is_empty() { name.to_owned() } else { format!("{tag}/{name}") };
            if let Some(file) = tree.get(&place) {
                return Some(file);
            }
            if tag.is_empty() {
                return None;
            }
            tag = tag.rfind('-').map_or("", |end| &tag[..end]);
        }
    };
    tags.into_iter()
        .map(|tag| {
            let files = names.iter().filter_map(|name| Some((*name, find(tag, name)?))).collect();
            (if tag.is_empty() { DEFAULT } else { tag }.to_owned(), files)
        })
        .collect()
}

/// The sources of all languages with the style sheet written into their HTML.
fn prepared(tree: &Tree) -> Result<Prepared, BadTemplates> {
    let mut problems = Vec::new();
    let mut languages = Prepared::new();
    for (tag, files) in resolved(tree) {
        let css = files.iter().find(|(name, _)| *name == built_in::STYLE).map_or("", |(_, file)| &file.source);
        let mut sources = Vec::new();
        for (name, file) in &files {
            let source = match Path::new(name).extension() {
                Some(extension) if extension == "html" => inline::inline(&file.source, css),
                _ => Ok(file.source.clone().into_owned()),
            };
            match source {
                Ok(source) => sources.push(((*name).to_owned(), source)),
                Err(problem) => problems.push(format!("{}: {problem}", origin(name, file))),
            }
        }
        languages.push((tag, sources));
    }
    if problems.is_empty() { Ok(languages) } else { Err(BadTemplates { problems }) }
}

fn compiled(languages: &Prepared) -> Result<Templates, BadTemplates> {
    let compile = |(tag, sources): &(String, Vec<(String, String)>)| {
        let mut compiled = environment()?;
        for (name, source) in sources {
            compiled.add_template_owned(name.clone(), source.clone())?;
        }
        Ok(Language { tag: tag.clone(), compiled })
    };
    let languages: Result<Vec<Language>, minijinja::Error> = languages.iter().map(compile).collect();
    languages
        .map(|languages| Templates { languages })
        .map_err(|error| BadTemplates { problems: vec![format!("a template does not compile: {error}")] })
}

/// What every template may use, and no templates.
fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.add_filter("wrap", wrap);
    environment.add_filter("field", field);
    Ok(environment)
}

/// Fills lines, with something before the first.
fn wrap(text: Cow<'_, str>, first: Option<Cow<'_, str>>) -> String {
    hanging(&first.unwrap_or_default(), &text)
}

/// Fills lines behind a label.
fn field(text: Cow<'_, str>, label: Cow<'_, str>) -> String {
    let mut first = String::with_capacity(2 + LABEL.max(label.len()));
    first.push_str("  ");
    first.push_str(&label);
    first.extend(std::iter::repeat_n(' ', LABEL.saturating_sub(label.chars().count())));
    hanging(&first, &text)
}

/// How people find a file.
fn origin(name: &str, file: &File) -> String {
    file.path.as_ref().map_or_else(|| format!("the built-in {name}"), |path| path.display().to_string())
}

#[cfg(test)]
mod tests;
