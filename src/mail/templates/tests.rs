use std::fs;

use chrono::DateTime;
use proptest::prelude::*;

use super::*;
use crate::clock::Timestamp;
use crate::mail::sample;
use crate::mail::when::{Moment, date_phrase, day_phrase};

/// What is wrong with templates that have these files.
fn problems(files: &[(&str, &str)]) -> Vec<String> {
    load(files).err().map(|bad| bad.problems).unwrap_or_default()
}

fn load(files: &[(&str, &str)]) -> Result<Templates, BadTemplates> {
    let directory = tempfile::tempdir().expect("a directory");
    for (place, source) in files {
        let path = directory.path().join(place);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, source).expect("a file");
    }
    let here = format!("{}/", directory.path().display());
    Templates::load(directory.path()).map_err(|bad| BadTemplates {
        problems: bad.problems.into_iter().map(|problem| problem.replace(&here, "")).collect(),
    })
}

fn written(templates: &Templates, locale: &str, kind: Kind) -> Written {
    // Of each kind the second sample is about one token.
    let (_, known) = sample::known(templates.language(locale))
        .expect("words")
        .into_iter()
        .filter(|(of, _)| *of == kind)
        .nth(1)
        .expect("a sample");
    templates.language(locale).write(kind, &known).expect("written")
}

#[test]
fn locales_lead_to_the_nearest_language() {
    let templates = Templates::built_in().expect("templates");
    assert_eq!(templates.languages().collect::<Vec<_>>(), ["en", "de"]);
    for (locale, tag) in [("de", "de"), ("de-AT", "de"), ("DE_ch", "de"), ("en-GB", "en"), ("fr", "en"), ("", "en")] {
        assert_eq!(templates.language(locale).tag(), tag, "{locale}");
    }
}

#[test]
fn the_built_in_templates_render_every_sample_in_every_language() {
    let templates = Templates::built_in().expect("templates");
    for tag in ["en", "de"] {
        for (kind, known) in sample::known(templates.language(tag)).expect("words") {
            let written =
                templates.language(tag).write(kind, &known).unwrap_or_else(|error| panic!("{tag} {kind:?}: {error:#}"));
            assert!(written.html.contains(&format!("<html lang=\"{tag}\"")), "{}", written.html);
            assert!(!written.html.contains("!--lapsed:") && !written.html.contains("{%"), "{}", written.html);
            assert!(!written.subject.is_empty() && written.text.len() > 100);
        }
    }
}

#[test]
fn a_file_takes_the_place_of_the_built_in_one_and_of_no_other() {
    let templates = load(&[("reminder/subject.txt", "Mind {{ own.first.title }}"), (".hidden", ""), ("x.txt~", "")]);
    let templates = templates.expect("templates");
    assert_eq!(written(&templates, "en", Kind::Reminder).subject, "Mind deploy key (CI)");
    assert!(written(&templates, "de", Kind::Reminder).subject.starts_with("„deploy key (CI)“ läuft"));
    assert!(written(&templates, "en", Kind::Expired).subject.ends_with("expired today"));
    let german = load(&[("de/reminder/subject.txt", "Bald: {{ own.first.title }}")]).expect("templates");
    assert_eq!(written(&german, "de-AT", Kind::Reminder).subject, "Bald: deploy key (CI)");
    assert!(written(&german, "en", Kind::Reminder).subject.starts_with("\"deploy key (CI)\" expires"));
}

#[test]
fn a_language_has_what_it_lacks_from_the_one_that_it_is_a_variety_of() {
    let templates = load(&[("de-CH/reminder/subject.txt", "Grüezi"), ("fr/reminder/subject.txt", "Bientôt")]);
    let templates = templates.expect("templates");
    assert_eq!(templates.languages().collect::<Vec<_>>(), ["en", "de", "de-ch", "fr"]);
    let swiss = written(&templates, "de-CH", Kind::Reminder);
    assert_eq!(swiss.subject, "Grüezi");
    assert!(swiss.text.starts_with("Dieses Token läuft bald ab."));
    let french = written(&templates, "fr", Kind::Reminder);
    assert_eq!(french.subject, "Bientôt");
    assert!(french.text.starts_with("This token expires soon."));
}

#[test]
fn the_style_sheet_is_written_into_the_elements() {
    let html = written(&Templates::built_in().expect("templates"), "en", Kind::Reminder).html;
    assert!(html.contains("<h1 class=\"title\" style=\"margin: 0;"), "{html}");
    assert!(html.contains("prefers-color-scheme: dark"));
    let blue = load(&[("style.css", ".title { color: #00f }")]).expect("templates");
    assert!(written(&blue, "de", Kind::Expired).html.contains("<h1 class=\"title\" style=\"color: #00f"));
}

#[test]
fn parts_of_ones_own_can_be_included() {
    let files = [("_sign.txt", "-- \nThe {{ locale }} desk"), ("test/body.txt", "Hello\n{% include \"_sign.txt\" %}")];
    assert_eq!(written(&load(&files).expect("templates"), "en", Kind::Test).text, "Hello\n-- \nThe en desk");
}

#[test]
fn what_is_wrong_is_told_with_file_and_line_and_what_there_is() {
    for (files, expected) in [
        (
            &[("reminder/subject.txt", "a\n{{ ownr.count }}")],
            "reminder/subject.txt:2: there is no variable \"ownr\" here, only corrected, escalated, own, locale, subject",
        ),
        (
            &[("reminder/body.txt", "\n\n{{ own.cuont }}")],
            "reminder/body.txt:3: \"cuont\" is not known; of own there is count, expired",
        ),
        (
            &[("de/expired/body.txt", "{% for token in own.listed %}\n{{ token.descripton }}\n{% endfor %}")],
            "de/expired/body.txt:2: \"descripton\" is not known; of token there is change, created,",
        ),
        (
            &[("token.txt", "{{ token.description }} {{ token.deadline.dya }}")],
            "token.txt:1: \"dya\" is not known; of token.deadline there is ahead, day, days",
        ),
        (
            &[("tokens.txt", "{{ part.cuont }}")],
            "tokens.txt:1: \"cuont\" is not known; of part there is count, expired",
        ),
        (&[("phrases/day.txt", "{{ at.dai }}")], "phrases/day.txt:1: \"dai\" is not known; of at there is ahead, day"),
        (
            &[("reminder/body.txt", "{% for t in own.listed %}\n{{ t.hnit }}\n{% endfor %}")],
            "reminder/body.txt:2: undefined value",
        ),
        (
            &[("alert/body.txt", "{{ own.count }}")],
            "alert/body.txt:1: there is no variable \"own\" here, only count, deadline, kind, since, locale, subject",
        ),
        (&[("reminder/body.txt", "{{ subject | shout }}")], "reminder/body.txt:1: there is no filter \"shout\""),
        (&[("reminder/body.txt", "\n{% if own %}")], "reminder/body.txt:2: syntax error: unexpected end of input"),
        (&[("reminder/body.txt", "{% include \"_none.txt\" %}")], "reminder/body.txt:1: "),
        (
            &[("reminder/body.html", "<p {% if own.count %}class=\"x\"{% endif %}>x</p>")],
            "reminder/body.html: {% if own.count %} stands where code cannot stand",
        ),
        (
            &[("reminder/body.text", "x")],
            "reminder/body.text: no mail has a template of this name. There are alert/body.html, ",
        ),
        (&[("french/reminder/body.txt", "x")], "french/reminder/body.txt: no mail has a template of this name."),
    ] {
        let found = problems(files);
        assert!(found.iter().any(|problem| problem.starts_with(expected)), "expected {expected}, found {found:#?}");
    }
}

#[test]
fn all_that_is_wrong_is_told_at_once() {
    let found = problems(&[("expired/subject.txt", "{{ a }} {{ b }}"), ("reminder/subject.txt", "{{ c }}")]);
    assert_eq!(found.len(), 3, "{found:#?}");
    assert!(Templates::load(Path::new("/nonexistent")).is_err());
}

#[test]
fn what_is_right_is_not_complained_of() {
    let right = "{% set x = {\"own\": 1} %}{% for token in own.listed if not token.expired %}{{ loop.index }} \
                 {{ token.title | upper ~ 'own.nothing' }}{{ token.deadline.days }}{% endfor %}{# token.nothing #}";
    assert_eq!(problems(&[("reminder/body.txt", right)]), Vec::<String>::new());
}

#[test]
fn the_document_names_everything_that_templates_know() {
    let document = include_str!("../../../docs/mail.md");
    let keys = |value: &Value| -> Vec<String> {
        value.try_iter().map(|keys| keys.map(|key| key.to_string()).collect()).unwrap_or_default()
    };
    let all = sample::known(Templates::built_in().expect("templates").language("en")).expect("words");
    let known = &all.iter().find(|(kind, _)| *kind == Kind::Changed).expect("a sample").1;
    let at = |path: &[&str]| path.iter().fold(known.clone(), |value, key| value.get_attr(key).expect("a field"));
    let mut names = vec![];
    for path in [
        &[][..],
        &["own"],
        &["own", "first"],
        &["own", "first", "change"],
        &["own", "first", "deadline"],
        &["own", "first", "words"],
    ] {
        names.extend(keys(&at(path)));
    }
    let corrections = &all.iter().find(|(kind, _)| *kind == Kind::Correction).expect("a sample").1;
    let overtaken =
        ["corrected", "first", "overtaken"].iter().try_fold(corrections.clone(), |it, key| it.get_attr(key));
    names.extend(keys(&overtaken.expect("a field")));
    names.extend(all.iter().filter(|(kind, _)| *kind == Kind::Alert).flat_map(|(_, known)| keys(known)));
    names.extend(built_in::names().filter(|name| !name.contains('/')).map(str::to_owned));
    let phrases = built_in::names().filter_map(|name| name.strip_prefix("phrases/")?.strip_suffix(".txt"));
    names.extend(phrases.map(str::to_owned));
    assert!(names.len() > 40, "{names:?}");
    for name in names {
        assert!(document.contains(&format!("`{name}`")), "docs/mail.md does not name {name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// The command line and the mails name an instant alike.
    #[test]
    fn english_phrases_agree_with_the_command_line(
        now in 1_700_000_000i64..2_000_000_000,
        away in prop_oneof![-200_000i64..200_000, -40_000_000i64..40_000_000],
        to_midnight: bool,
    ) {
        let zone = chrono_tz::Europe::Berlin;
        let instant = |seconds| -> Timestamp { DateTime::from_timestamp(seconds, 0).expect("in range") };
        let now = instant(now);
        let deadline = instant(if to_midnight { (now.timestamp() + away) / 86_400 * 86_400 - 3_600 } else { now.timestamp() + away });
        prop_assume!(deadline != now);
        let templates = Templates::built_in().expect("templates");
        let english = &templates.language("en").compiled;
        let source = "{% include 'phrases/left.txt' %}|{% include 'phrases/moment.txt' %}";
        let at = crate::mail::view::moment(&Moment::of_deadline(deadline, now, zone));
        let said = english.render_str(source, minijinja::context! { at }).expect("rendered");
        let left = day_phrase(deadline, now, zone);
        prop_assert_eq!(said, format!("{left}|{}", date_phrase(deadline, zone)));
    }

    /// Whatever an operator writes is told or works; nothing panics.
    #[test]
    fn any_template_comes_to_an_end(source in "([a-z{}%#.\"' |~]|own|token|\\{\\{|\\{%|%\\}|\\}\\}){0,30}") {
        let _ = problems(&[("reminder/subject.txt", &source), ("expired/body.html", &source)]);
    }
}
