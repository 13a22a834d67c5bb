//! Loading as a whole: the layers, and what people are told of keys that do not exist. `values` holds each key to
//! what it accepts.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use chrono::TimeDelta;
use tempfile::TempDir;

use super::*;
use crate::digest::Digest;

mod values;

/// A machine with a directory for files, and an environment.
struct Machine {
    directory: TempDir,
    environment: BTreeMap<OsString, OsString>,
}

impl Machine {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), environment: BTreeMap::new() }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn set(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.into(), value.into());
        self
    }

    fn load(&self, file: Option<&Path>) -> Result<Settings, Invalid> {
        let system_file = self.directory.path().join("system.toml");
        load_from(file, &system_file, self.environment.clone())
    }

    fn problems(&self, text: &str) -> Vec<String> {
        let path = self.file("given.toml", text);
        self.load(Some(&path)).unwrap_err().problems
    }
}

fn load(text: &str) -> Settings {
    let machine = Machine::new();
    let path = machine.file("given.toml", text);
    machine.load(Some(&path)).unwrap()
}

/// The one problem that a file has.
fn problem(text: &str) -> String {
    let problems = Machine::new().problems(text);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    problems.into_iter().next().unwrap()
}

/// That a file has one problem, which says all of `words`.
#[track_caller]
fn refused(text: &str, words: &[&str]) {
    let problem = problem(text);
    for word in words {
        assert!(problem.contains(word), "{word:?} is not in: {problem}");
    }
}

#[test]
fn the_defaults_are_complete() {
    let settings = Machine::new().load(None).unwrap();
    assert_eq!(settings.store.url.expose(), "sqlite:lapsed.db");
    assert_eq!(settings.schedule.expire.as_str(), "*/5 * * * * *");
    assert_eq!(settings.schedule.reconcile.as_str(), "0 47 2 * * *");
    assert_eq!(
        settings.reminders,
        Reminders {
            lead_times: vec![TimeDelta::days(30), TimeDelta::days(7), TimeDelta::days(1)],
            expired_notice: true,
            stale_after: TimeDelta::days(7),
            skip_unused: false,
            policies: Vec::new(),
        }
    );
    assert_eq!(
        settings.digest,
        Digest { urgent_within: TimeDelta::days(1), ..Digest::holding(TimeDelta::minutes(10)) }
    );
    assert_eq!(
        settings.mail,
        Mail {
            transport: None,
            from: None,
            reply_to: None,
            fallback_to: None,
            give_up_after: TimeDelta::days(2),
            manage_url: None,
            templates: None,
            bounce: None,
        }
    );
    assert_eq!(settings.retention.messages, TimeDelta::days(90));
    assert_eq!(settings.http.listen, None);
    assert_eq!((settings.log.level.as_str(), settings.log.format), ("info", LogFormat::Text));
}

#[test]
fn every_key_of_the_reference_has_a_comment() {
    let text = include_str!("../../config/lapsed.toml");
    let mut commented = false;
    for line in text.lines() {
        // Two keys may share one comment; an empty line or a section ends it.
        match line.chars().next() {
            Some('#') => commented = true,
            Some('[') | None => commented = false,
            Some(_) => assert!(commented, "{line}"),
        }
    }
}

#[test]
fn the_environment_wins_over_the_file_and_the_file_over_the_defaults() {
    let machine = Machine::new()
        .set("LAPSED__MAIL__SMTP__HOST", "from-environment")
        .set("LAPSED__REMINDERS__LEAD_TIMES", "2d, 1w")
        .set("LAPSED__REMINDERS__EXPIRED_NOTICE", "false")
        .set("LAPSED__LOG__LEVEL", "debug")
        .set("LAPSED_UNRELATED", "x")
        .set("HOME", "/nowhere");
    let path = machine.file(
        "given.toml",
        "[mail]\ntransport = \"smtp\"\n[mail.smtp]\nhost = \"from-file\"\nport = 2525\n[log]\nlevel = \"warn\"\n",
    );
    let settings = machine.load(Some(&path)).unwrap();
    assert_eq!(
        settings.mail.transport,
        Some(Transport::Smtp(Box::new(Smtp {
            tls: Tls::StartTls,
            connections: 4,
            ..Smtp::plain("from-environment", 2525)
        })))
    );
    assert_eq!(settings.reminders.lead_times, [TimeDelta::weeks(1), TimeDelta::days(2)]);
    assert!(!settings.reminders.expired_notice);
    assert_eq!(settings.log.level, "debug");
}

#[test]
fn an_empty_variable_unsets_a_key_and_empties_a_list() {
    let machine = Machine::new().set("LAPSED__MAIL__REPLY_TO", "").set("LAPSED__REMINDERS__LEAD_TIMES", "");
    let path = machine.file("given.toml", "[mail]\nreply_to = \"a@example.org\"\n");
    let settings = machine.load(Some(&path)).unwrap();
    assert_eq!(settings.mail.reply_to, None);
    assert!(settings.reminders.lead_times.is_empty());
}

#[test]
fn the_system_file_is_read_only_where_no_other_is_named() {
    let machine = Machine::new();
    machine.file("system.toml", "[log]\nlevel = \"error\"\n");
    let given = machine.file("given.toml", "");
    assert_eq!(machine.load(None).unwrap().log.level, "error");
    assert_eq!(machine.load(Some(&given)).unwrap().log.level, "info");
}

#[test]
fn a_named_file_must_exist() {
    let error = Machine::new().load(Some(Path::new("/nowhere/given.toml"))).unwrap_err();
    assert!(error.to_string().contains("/nowhere/given.toml: cannot read"), "{error}");
}

#[test]
fn everything_is_told_at_once_with_its_place() {
    let machine = Machine::new().set("LAPSED__MAIL__SMTP__PORT", "smtp");
    let text = "[store]\nurl = \"mysql://u:geheim@h/db\"\n\n[reminders]\nlead_times = [\"30d\", \"soon\"]\n\
                [mail]\nform = \"x\"\n";
    let path = machine.file("given.toml", text);
    let error = machine.load(Some(&path)).unwrap_err();
    let file = path.display();
    assert_eq!(
        error.to_string(),
        format!(
            "the configuration is not valid:\n  \
             mail.form ({file}:7): unknown key; did you mean mail.from?\n  \
             store.url = \"mysql://u:***@h/db\" ({file}:2): must begin with sqlite:, postgres:// or postgresql://\n  \
             reminders.lead_times = [\"30d\", \"soon\"] ({file}:5): \"soon\" is not a duration: write whole numbers \
             with units, such as \"30d\", \"90s\" or \"1h 30m\"\n  \
             mail.smtp.port = \"smtp\" (environment variable LAPSED__MAIL__SMTP__PORT): must be a whole number from \
             0 to 65535"
        )
    );
}

#[test]
fn broken_toml_gives_the_line_and_hides_it() {
    let problem = problem("[store]\nurl = \"postgres://u:geheim@h/db\n");
    assert!(problem.contains("given.toml:2: "), "{problem}");
    assert!(!problem.contains("geheim"), "{problem}");
}

#[test]
fn unknown_keys_get_a_suggestion() {
    refused("[stroe]\nurl = \"sqlite:x\"\n", &["stroe.url", "did you mean store.url?"]);
    refused("lead_times = []\n", &["did you mean reminders.lead_times?"]);
    refused("[smtp]\nhost = \"x\"\n", &["did you mean mail.smtp.host?"]);
    refused("[log]\nzzz = 1\n", &["the keys of [log] are log.format, log.level"]);
    refused("[zzz]\n", &["zzz", "the sections are digest, guard, http, log, mail, reminders"]);
    refused("[store.url]\nx = 1\n", &["store.url.x", "did you mean store.url?"]);
    refused("\"mail.from\" = \"a@example.org\"\n", &["unknown key"]);
}

#[test]
fn unknown_variables_get_a_suggestion() {
    let problems = Machine::new().set("LAPSED__MAIL__SMTP_HOST", "x").problems("");
    assert_eq!(
        problems,
        ["mail.smtp_host (environment variable LAPSED__MAIL__SMTP_HOST): unknown key; did you mean \
             mail.smtp.host (LAPSED__MAIL__SMTP__HOST)?"]
    );
}

#[test]
fn the_value_of_an_unknown_key_is_not_shown() {
    let problem = problem("[mail.smtp]\npassword = \"geheim\"\n");
    assert!(problem.contains("did you mean mail.smtp.password_file?"), "{problem}");
    assert!(!problem.contains("geheim"), "{problem}");
}

#[test]
fn keys_and_sections_are_not_mixed_up() {
    refused("mail = 3\n", &["mail", "this is a section", "mail.smtp.host"]);
    refused("[store.url]\n", &["store.url", "this is a key, not a section"]);
    assert_eq!(load("[mail.smtp]\n"), Machine::new().load(None).unwrap());
}

#[test]
fn a_variable_must_be_utf8() {
    use std::os::unix::ffi::OsStringExt;
    let mut machine = Machine::new();
    machine.environment.insert("LAPSED__MAIL__MAILDIR__PATH".into(), OsString::from_vec(vec![b'/', 0xff]));
    let error = machine.load(None).unwrap_err().to_string();
    assert!(error.contains("LAPSED__MAIL__MAILDIR__PATH: its value is not valid UTF-8"), "{error}");
}

#[test]
fn when_messages_go_is_read() {
    let text = "[digest]\nhold = \"0s\"\nwindow = \"Mon-Fri 08:00-18:00\"\nmin_interval = \"1d\"\nurgent_within = \"36h\"\n\
                [reminders]\nunused = \"skip\"\n";
    let machine = Machine::new();
    let path = machine.file("given.toml", text);
    let settings = machine.load(Some(&path)).unwrap();
    let expected = Digest {
        hold: TimeDelta::zero(),
        window: Some("mon-fri 08:00-18:00".parse().unwrap()),
        min_interval: Some(TimeDelta::days(1)),
        urgent_within: TimeDelta::hours(36),
    };
    assert_eq!(settings.digest, expected);
    assert!(settings.reminders.skip_unused);
    refused("[digest]\nhold = \"\"", &["digest.hold = \"\"", "must not be empty"]);
    refused("[digest]\nwindow = \"8-18\"", &["digest.window = \"8-18\"", "mon-fri 08:00-18:00"]);
    refused("[digest]\nmin_interval = \"0s\"", &["digest.min_interval", "longer than zero"]);
    refused("[digest]\nurgent_within = \"soon\"", &["digest.urgent_within", "not a duration"]);
    refused("[reminders]\nunused = \"hide\"", &["reminders.unused = \"hide\"", "\"mention\" or \"skip\""]);
}

#[test]
fn the_examples_of_the_documentation_are_configurations() {
    let text = include_str!("../../docs/reminders.md");
    let examples: Vec<&str> = text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(!examples.is_empty());
    for example in examples {
        let machine = Machine::new();
        let path = machine.file("example.toml", example);
        machine.load(Some(&path)).unwrap_or_else(|error| panic!("{error}\n{example}"));
    }
}

#[test]
fn policies_are_read_in_their_order() {
    let text = r#"
        [reminders]
        lead_times = ["30d"]
        [[reminders.policy]]
        match.kind = "additional"
        match.owner = "{ci,cd}-*"
        lead_times = ["2d", "14d"]
        contacts = ["Security@example.org"]
        [[reminders.policy]]
        window = "mon-fri 08:00-18:00"
        [reminders.policy.match]
        description = "*laptop*"
        scope = "repo:*"
    "#;
    let machine = Machine::new();
    let path = machine.file("given.toml", text);
    let settings = machine.load(Some(&path)).unwrap();
    let [first, second] = settings.reminders.policies.as_slice() else { panic!("{:?}", settings.reminders.policies) };
    assert_eq!(first.matches.to_string(), "kind = \"additional\", owner = \"{ci,cd}-*\"");
    assert_eq!(first.lead_times, Some(vec![TimeDelta::days(14), TimeDelta::days(2)]));
    assert_eq!(first.contacts.iter().map(ToString::to_string).collect::<Vec<_>>(), ["security@example.org"]);
    assert_eq!((first.window, second.lead_times.as_ref()), (None, None));
    assert_eq!(second.matches.to_string(), "scope = \"repo:*\", description = \"*laptop*\"");
    assert_eq!(second.window.map(|window| window.to_string()).as_deref(), Some("mon-fri 08:00-18:00"));
}

#[test]
fn what_is_wrong_with_a_policy_names_its_key() {
    let second = |text: &str| format!("[[reminders.policy]]\nmatch.owner = \"a\"\n[[reminders.policy]]\n{text}\n");
    let owner = "match.owner = \"b\"";
    refused(
        &second("match.kind = \"third\""),
        &["reminders.policy[2].match.kind = \"third\"", ":4)", "\"primary\" or \"additional\""],
    );
    refused(&second("match.scope = \"[a\""), &["reminders.policy[2].match.scope = \"[a\"", "is no pattern"]);
    refused(&second("match.scope = 3.5"), &["reminders.policy[2].match.scope", "must be text"]);
    refused(&second("window = \"mon-fri 08:00-18:00\""), &["reminders.policy[2].match:", "at least one of kind"]);
    refused(&second(""), &["reminders.policy[2].match:", "at least one of kind"]);
    refused(&second(&format!("{owner}\nlead_times = [\"0s\"]")), &["reminders.policy[2].lead_times", "expired_notice"]);
    refused(&second(&format!("{owner}\nwindow = \"9-5\"")), &["reminders.policy[2].window = \"9-5\""]);
    refused(&second(&format!("{owner}\ncontacts = [\"nobody\"]")), &["reminders.policy[2].contacts = [\"nobody\"]"]);
    refused(
        &second(&format!("{owner}\nleads = [\"1d\"]")),
        &["reminders.policy[2].leads", "unknown key", "match.kind, match.scope", "lead_times"],
    );
    refused(&second(&format!("{owner}\nlead_times.x = 1")), &["reminders.policy[2].lead_times.x", "unknown key"]);
    refused("[reminders.policy]\nmatch.kind = \"primary\"\n", &["reminders.policy.match.kind", "[[reminders.policy]]"]);
    refused("[reminders]\npolicy = 3\n", &["reminders.policy (", "[[reminders.policy]]"]);
    refused("[[digest]]\nhold = \"1m\"\n", &["digest[1].hold", "unknown key"]);
}
