//! The log in each of its forms: what it holds, and what it never does.

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use crate::support::cli::{LAPSED, Place, Ran, eventually, fact};
use crate::support::smtp_script::{Phase, Script, reply};
use serde_json::Value;

/// What nobody may read in a log.
const PASSWORD: &str = "pa55-of-the-mail-server";
const BOUNCE_KEY: &str = "key-that-signs-the-return-paths";

/// Mail through a server that wants an account, and everything logged.
fn configure(place: &Place, port: u16, format: &str) {
    place.write("password", PASSWORD);
    place.write("bounce-key", BOUNCE_KEY);
    place.configure(&format!(
        r#"
        [mail]
        transport = "smtp"
        from = "Tokens <tokens@example.org>"
        fallback_to = "ops@example.org"
        [mail.smtp]
        host = "127.0.0.1"
        port = {port}
        tls = "none"
        username = "mailer@example.org"
        password_file = "password"
        allow_plain_auth = true
        [mail.bounce]
        address = "bounces@example.org"
        key_file = "bounce-key"
        [log]
        level = "trace"
        format = "{format}"
        "#
    ));
}

/// A server that takes mail from whoever has an account, refuses one address, and names addresses in what it says.
fn server() -> Script {
    Script::new()
        .extension("AUTH PLAIN")
        .decide(Phase::Other, |line| line.starts_with("AUTH").then(|| reply("235 2.7.0 welcome")))
        .on_rcpt("gone@example.org", "550 5.1.1 <gone@example.org>: no such user")
        .on_rcpt("later@example.org", "451 4.7.1 <later@example.org>: try again")
}

/// Everything that commands do, one after the other; what they wrote to stderr, and the secrets that were shown.
fn everything(place: &Place) -> (Vec<Ran>, Vec<String>) {
    let mut secrets = Vec::new();
    for (key, address) in [("alice", "alice@example.org"), ("bob", "gone@example.org"), ("carol", "later@example.org")]
    {
        secrets.push(place.owner(key, address));
    }
    let mut ran = Vec::new();
    let mut ids = Vec::new();
    for owner in ["alice", "bob", "carol"] {
        let (id, secret) = place.token(owner, "deploy", "1s");
        secrets.push(secret);
        ids.push(id);
    }
    place.write("tokens.csv", "owner,emails,description,expires_at\ndan,dan@example.org,CI,2099-01-31\nbad\n");
    for line in [
        "token import tokens.csv",
        "owner contact add alice second@example.org",
        "owner contact remove alice second@example.org",
        "owner list",
        "token list --format json",
        "check",
        "forecast --days 5",
        "coverage",
        "schedule --next 1",
        "mail test alice@example.org",
        "mail preview",
        "status",
        "config show",
    ] {
        ran.push(place.line(line));
    }
    ran.push(place.verify(&secrets[0]));
    eventually("the deadlines", crate::support::cli::PATIENCE, || {
        (place.verify(&secrets[5]).status == Some(1)).then_some(())
    });
    let rotated = place.run(["token", "rotate", &ids[0], "--expires", "30d"]);
    secrets.push(fact(&rotated.stdout, "secret"));
    ran.push(rotated);
    ran.push(place.line("run --once"));
    for line in ["outbox list --all", "outbox retry --failed", "run --once", "outbox cancel --held"] {
        ran.push(place.line(line));
    }
    let bounce = "Return-Path: <>\nTo: bounces+x.y@example.org\nSubject: undelivered\n\n<alice@example.org>\n";
    ran.push(place.run_with(["bounce"], bounce));
    (ran, secrets)
}

/// Whatever is private and stands in this text.
fn private(text: &str, secrets: &[String]) -> BTreeSet<String> {
    let known = ["@example.org", "lps_", PASSWORD, BOUNCE_KEY];
    let secrets = secrets.iter().map(|secret| secret.trim_start_matches("lps_"));
    // What AUTH PLAIN makes of the account (RFC 4616, section 2).
    let encoded = "AG1haWxlckBleGFtcGxlLm9yZ";
    known.into_iter().chain(secrets).chain([encoded]).filter(|word| text.contains(word)).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_private_is_logged_by_any_command_as_text() {
    let server = server().start().await;
    let place = Place::new();
    configure(&place, server.port(), "text");
    let (ran, secrets) = everything(&place);
    let mut lines = 0;
    for ran in &ran {
        for line in ran.stderr.lines().filter(|line| is_logged(line)) {
            lines += 1;
            assert_eq!(private(line, &secrets), BTreeSet::new(), "{line}");
        }
    }
    assert!(lines > 8, "there is something to search: {lines}");
    assert!(server.commands().iter().any(|line| line.starts_with("AUTH PLAIN")), "there was a password to tell");
    let once = &ran[ran.len() - 6].stderr;
    assert!(once.contains("pass{job=\"deliver\"}: ") || once.contains("pass: "), "{once}");
}

/// Whether it is a line of the log, and not what a command tells whoever typed it.
fn is_logged(line: &str) -> bool {
    // 2027-01-31T09:00:00.000000Z
    line.as_bytes().get(26) == Some(&b'Z') && line.starts_with("20")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_private_is_logged_by_any_command_as_json_and_each_line_is_an_object() {
    let server = server().start().await;
    let place = Place::new();
    configure(&place, server.port(), "json");
    let (ran, secrets) = everything(&place);
    let mut events = Vec::new();
    for ran in &ran {
        for line in ran.stderr.lines().filter(|line| line.starts_with('{')) {
            assert_eq!(private(line, &secrets), BTreeSet::new(), "{line}");
            let event: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            // What is written twice has one value, but not one field.
            assert_eq!(line.matches("\"message\":").count(), 1, "{line}");
            events.push(event);
        }
    }
    let of = |message: &str| events.iter().find(|event| event["message"] == message);
    let sent = of("sent a message").unwrap_or_else(|| panic!("no mail was sent: {events:?}"));
    assert_eq!(sent["reminders"], 1);
    assert!(sent["message_id"].as_str().is_some_and(|id| id.len() == 36), "{sent}");
    let pass = of("pass finished").expect("tokens expired");
    assert_eq!((&pass["expired"], pass["level"].as_str()), (&Value::from(3), Some("INFO")), "{pass}");
    assert!(pass["millis"].is_u64() && pass["timestamp"].is_string(), "{pass}");
    assert!(of("nothing was due").is_some_and(|event| event["level"] == "DEBUG"), "a quiet pass is no news");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_mail_server_says_is_logged_without_addresses() {
    let refusal = "550 5.7.1 <tokens@example.org>: not from you, mailer@example.org";
    let server = Script::new().extension("AUTH PLAIN").on(Phase::Ehlo, reply(refusal)).start().await;
    let place = Place::new();
    configure(&place, server.port(), "text");
    place.owner("alice", "alice@example.org");
    let (_, secret) = place.token("alice", "deploy", "1s");
    eventually("the deadline", crate::support::cli::PATIENCE, || {
        (place.verify(&secret).status == Some(1)).then_some(())
    });
    let log = place.line("run --once").stderr;
    assert!(log.contains("no mail can be handed over") && log.contains("[address]"), "{log}");
    assert_eq!(private(&log, &[]), BTreeSet::new(), "{log}");
}

/// An entry in the journal's own protocol, one `NAME=value` a line: either that, or the name, the value's length in eight bytes,
/// and the value (systemd's "Native Journal Protocol").
fn fields(mut entry: &[u8]) -> String {
    let mut text = String::new();
    while let Some(end) = entry.iter().position(|byte| *byte == b'\n') {
        let (line, rest) = entry.split_at(end);
        let line = String::from_utf8_lossy(line);
        if line.contains('=') {
            text.push_str(&format!("{line}\n"));
            entry = &rest[1..];
        } else {
            let length = u64::from_le_bytes(rest[1..9].try_into().expect("eight bytes"));
            let length = usize::try_from(length).expect("it is here");
            text.push_str(&format!("{line}={}\n", String::from_utf8_lossy(&rest[9..9 + length])));
            entry = &rest[10 + length..];
        }
    }
    text
}

/// A journal of our own stands where systemd's would, in a mount namespace of the daemon's.
#[test]
fn the_journal_gets_fields_and_nothing_private() {
    let namespace = ["--mount", "--user", "--map-root-user"];
    let may = Command::new("unshare").args(namespace).args(["mount", "-t", "tmpfs", "x", "/run"]).status();
    if !may.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this user may not make mount namespaces (unshare --mount --user)");
        return;
    }
    let place = Place::new();
    std::fs::create_dir(place.path("journal")).expect("a directory");
    let journal = UnixDatagram::bind(place.path("journal/socket")).expect("a socket");
    configure(&place, 1, "journald");
    place.owner("alice", "alice@example.org");
    let (_, secret) = place.token("alice", "deploy", "1s");
    eventually("the deadline", crate::support::cli::PATIENCE, || {
        (place.verify(&secret).status == Some(1)).then_some(())
    });
    let script = "mount -t tmpfs x /run && mkdir -p /run/systemd && ln -s \"$PWD/journal\" /run/systemd/journal && exec \"$0\" \
                  --config lapsed.toml run --once";
    let mut command = Command::new("unshare");
    command.args(namespace).args(["sh", "-c", script, LAPSED]).current_dir(place.path("")).env_clear();
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let reader = std::thread::spawn(move || {
        journal.set_read_timeout(Some(crate::support::cli::PATIENCE)).expect("a timeout");
        let mut entries = Vec::new();
        let mut buffer = [0; 65_536];
        while let Ok(length) = journal.recv(&mut buffer) {
            if &buffer[..length] == b"the end" {
                return entries;
            }
            entries.push(fields(&buffer[..length]));
        }
        panic!("the end never came: {entries:?}");
    });
    let output = command.output().expect("unshare");
    let end = UnixDatagram::unbound().expect("a socket");
    end.send_to(b"the end", place.path("journal/socket")).expect("the reader listens");
    let entries = reader.join().expect("no panic");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!stderr.contains("pass finished"), "once is enough: {stderr}");
    let pass =
        entries.iter().find(|entry| entry.contains("pass finished")).unwrap_or_else(|| panic!("{entries:?} {stderr}"));
    for field in
        ["PRIORITY=6\n", "LAPSED_JOB=expire\n", "LAPSED_EXPIRED=1\n", "LAPSED_MILLIS=", "SYSLOG_IDENTIFIER=lapsed\n"]
    {
        assert!(pass.contains(field), "{field}: {pass}");
    }
    for entry in &entries {
        assert_eq!(private(entry, std::slice::from_ref(&secret)), BTreeSet::new(), "{entry}");
    }
}

#[test]
fn without_a_journal_the_log_goes_to_stderr_and_says_so() {
    if std::path::Path::new("/run/systemd/journal/socket").exists() {
        eprintln!("skipped: this machine has a journal");
        return;
    }
    let place = Place::new();
    configure(&place, 1, "journald");
    let log = place.line("run --once").stderr;
    assert!(
        log.contains("WARN") && log.contains("systemd's journal cannot be reached: the log goes to stderr"),
        "{log}"
    );
    assert!(log.contains("the store is open"), "{log}");
    // Whoever types another command reads it, and not the journal.
    let log = place.line("owner list").stderr;
    assert!(!log.contains("journal"), "{log}");
}
