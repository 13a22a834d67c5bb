//! The program as a user runs it: each command's output, exit status and complaints, on a store of its own.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::cli::{LAPSED, PATIENCE, Place, Ran, cells, eventually, fact, finish, instant, scrub, short};
use crate::support::postgres;
use chrono::TimeDelta;
use lapsed::clock::{Clock, SystemClock};
use sqlx::{Connection, SqliteConnection};

/// A Maildir, and leads that a test can wait for: a token of 20 seconds crosses both after five.
const IMPATIENT: &str = r#"
    [reminders]
    lead_times = ["16s", "15s"]
    [mail]
    transport = "maildir"
    from = "Tokens <tokens@example.org>"
    fallback_to = "ops@example.org"
    manage_url = "https://example.org/t/{token_id}"
    [mail.maildir]
    path = "mail"
"#;

fn seconds(n: i64) -> TimeDelta {
    TimeDelta::seconds(n)
}

#[test]
fn a_new_owner_gets_a_primary_token_whose_secret_is_shown_once() {
    let place = Place::new();
    let told = place.run(["owner", "add", "alice", "--email", "alice@example.org", "--name", "Alice Example"]);
    assert_eq!(told.stderr, "Keep the secret now: it is not shown again.\n");
    let told = told.ok();
    let expected = "token        [id]\n\
                    owner        alice (Alice Example)\n\
                    kind         primary\n\
                    description  primary token\n\
                    expires      never\n\
                    secret       [secret]\n";
    assert_eq!(scrub(&told), expected);

    let secret = fact(&told, "secret");
    let digits = secret.strip_prefix("lps_").expect("the prefix");
    assert!(digits.len() == 50 && digits.bytes().all(|b| b.is_ascii_alphanumeric()), "{secret}");
    let shown = place.run(["token", "show", &fact(&told, "token")]).ok();
    assert!(!shown.contains(digits) && !place.line("token list").ok().contains(digits));

    let mut stores = 0;
    for file in place.files() {
        let content = std::fs::read(&file).expect("a file");
        assert!(!content.windows(50).any(|part| part == digits.as_bytes()), "{} holds the secret", file.display());
        if file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("lapsed.db")) {
            let mode = std::fs::metadata(&file).expect("a file").permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{}", file.display());
            stores += 1;
        }
    }
    assert!(stores > 0);
}

#[test]
fn an_owner_may_have_several_addresses_and_exists_once() {
    let place = Place::new();
    place.run(["owner", "add", "team/ci", "--email", "a@example.org", "--email", "B@Example.ORG"]).ok();
    let complaint = place.run(["owner", "add", "team/ci", "--email", "c@example.org"]).fails(1);
    assert_eq!(complaint, "lapsed: owner team/ci exists already\n");
    // Nothing of the second attempt stays.
    let complaint = place.line("token list --owner c@example.org").fails(1);
    assert!(complaint.contains("there is no owner \"c@example.org\""), "{complaint}");
    assert_eq!(place.line("token list --owner b@example.org").ok().lines().count(), 2);
}

#[test]
fn what_cannot_be_an_owner_says_why() {
    let place = Place::new();
    let add = ["owner", "add"];
    for (arguments, why) in [
        (&["bob", "--email", "bob"][..], "\"bob\" is not a mail address: it has no @"),
        (&["bob", "--email", "bob@"], "nothing stands after the @"),
        (&["bob", "--email", "a b@example.org"], "it has a space"),
        (&["bob", "--email", "b@example.org\r\nBcc: x@example.org"], "is not a mail address"),
        (&["bob", "--email", "b@example.org", "--time-zone", "Europe/Berln"], "did you mean Europe/Berlin?"),
        (&["bob", "--email", "b@example.org", "--time-zone", "xqzv"], "use an IANA name such as Europe/Berlin"),
        (&["bob", "--email", "b@example.org", "--locale", "german"], "not a language tag such as en or de-AT"),
        (&["bob", "--email", "b@example.org", "--name", "a\nb"], "a name is one line"),
        (&[":system", "--email", "b@example.org"], "a key does not begin with a colon"),
        (&["two words", "--email", "b@example.org"], "a key has no spaces"),
        (&["", "--email", "b@example.org"], "a key cannot be empty"),
        (&["bob"], "--email <ADDR>"),
    ] {
        let complaint = place.run(add.iter().chain(arguments)).fails(2);
        assert!(complaint.contains(why), "{arguments:?}: {complaint}");
    }
    assert!(!place.path("lapsed.db").exists(), "wrong usage makes no store");
}

#[test]
fn wrong_usage_is_told_with_the_nearest_right_one() {
    let place = Place::new();
    place.empty_store();
    for (line, hint) in [
        ("ownr add", "'owner'"),
        ("owner ad bob", "'add'"),
        ("token lst", "'list'"),
        ("token list --ownr alice", "'--owner'"),
        ("run --onc", "'--once'"),
        ("token", "verify"),
        ("token show", "<ID>"),
        ("token verify lps_x", "unexpected argument"),
        ("token create --owner alice", "--description <TEXT>"),
        ("token rotate x --grace soon", "\"30d\""),
        ("token edit x", "give --description, --expires, --watch or --unwatch"),
        ("demo --smtp nowhere", "write HOST:PORT, such as localhost:1025"),
    ] {
        let complaint = place.line(line).fails(2);
        assert!(complaint.contains(hint), "{line}: {complaint}");
    }
    let nothing = finish(place.bare::<&str>([]), "").fails(2);
    assert!(nothing.contains("Usage: lapsed"), "{nothing}");
    assert!(place.line("help token create").ok().contains("--expires"));
    assert_eq!(place.line("--version").ok(), concat!("lapsed ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn a_deadline_can_be_written_in_four_ways() {
    let place = Place::new();
    place.run(["owner", "add", "kei", "--email", "kei@example.org", "--time-zone", "Asia/Tokyo"]).ok();
    let create = |expires: &[&str]| {
        let arguments = ["token", "create", "--owner", "kei", "--description", "deploy key (CI)"];
        place.run(arguments.iter().chain(expires)).ok()
    };

    let told = create(&["--expires", "90d", "--scope", "repo:read", "--scope", "repo:write"]);
    let created = instant(&place.run(["token", "show", &fact(&told, "token")]).ok(), "created");
    assert_eq!(instant(&told, "expires") - created, TimeDelta::days(90));
    assert!(fact(&told, "expires").starts_with("in 90 days, on "), "{told}");
    assert_eq!(fact(&told, "scopes"), "repo:read repo:write");
    assert_eq!((fact(&told, "kind"), fact(&told, "owner")), ("additional".into(), "kei".into()));
    assert_eq!(scrub(&fact(&told, "secret")), "[secret]");

    for (written, says) in [
        // The end of the day where the owner is, not where the program runs.
        ("2099-01-31", "at the end of 31 January 2099 (2099-02-01 00:00:00 JST, 2099-01-31 15:00:00 UTC)"),
        ("2099-07-31T09:00:00Z", "on 31 July 2099 at 18:00 (2099-07-31 18:00:00 JST, 2099-07-31 09:00:00 UTC)"),
        ("2099-07-31T09:00:30+02:00", "on 31 July 2099 at 16:00:30 (2099-07-31 16:00:30 JST, 2099-07-31 07:00:30 UTC)"),
    ] {
        let told = fact(&create(&["--expires", written]), "expires");
        assert!(told.starts_with("in ") && told.ends_with(&format!(" days, {says}")), "{written}: {told}");
    }
    assert_eq!(fact(&create(&["--expires", "never"]), "expires"), "never");
    assert_eq!(fact(&create(&[]), "expires"), "never");
}

#[test]
fn what_cannot_be_a_token_says_why() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    for (expires, why) in [
        ("2020-01-01", "the deadline 2020-01-02T00:00:00Z has passed"),
        ("2020-01-01T09:00:00Z", "the deadline 2020-01-01T09:00:00Z has passed"),
        ("9999-12-31", "use `never`"),
        ("10000-01-01", "is not a duration"),
        ("99999999d", "at most"),
        ("99999999999999999999d", "is too long"),
        ("0s", "to end one now, revoke it"),
        ("90", "such as \"90d\""),
        ("2027-02-30", "there is no such day"),
        ("2027-01-31T09:00", "with its offset"),
        ("tomorrow", "or write a date (2027-01-31), an instant, or `never`"),
    ] {
        let create = ["token", "create", "--owner", "alice", "--description", "x", "--expires", expires];
        let complaint = place.run(create).fails(2);
        assert!(complaint.contains(why), "{expires}: {complaint}");
    }
    let long = "ü".repeat(201);
    for (description, why) in [
        (long.as_str(), "at most 200 characters, and this one has 201"),
        ("deploy\nkey", "one line"),
        ("  ", "cannot be empty"),
    ] {
        let complaint = place.run(["token", "create", "--owner", "alice", "--description", description]).fails(2);
        assert!(complaint.contains(why), "{complaint}");
    }
    let complaint = place.run(["token", "create", "--owner", "alice", "--description", "x", "--scope", "a b"]).fails(2);
    assert!(complaint.contains("RFC 6749"), "{complaint}");
    let complaint = place.line("token create --owner nobody --description x").fails(1);
    assert!(complaint.contains("there is no owner \"nobody\"; name one by its key, its id, or"), "{complaint}");
    assert_eq!(place.line("token list").ok().lines().count(), 2, "none was made");
    place.run(["token", "create", "--owner", "alice", "--description", &"ü".repeat(200)]).ok();
}

#[test]
fn editing_changes_the_description_and_the_deadline() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "deploy key", "30d");
    let told = place.run(["token", "edit", &short(&id), "--description", "deploy key (CI)"]).ok();
    assert_eq!((fact(&told, "token"), fact(&told, "description")), (id.clone(), "deploy key (CI)".into()));
    assert!(fact(&told, "expires").starts_with("in 30 days"), "{told}");
    let told = place.run(["token", "edit", &id, "--expires", "2099-01-31"]).ok();
    assert!(fact(&told, "expires").contains("at the end of 31 January 2099 (2099-02-01 00:00:00 UTC)"), "{told}");
    let told = place.run(["token", "edit", &id, "--expires", "never", "--description", "for good"]).ok();
    assert_eq!((fact(&told, "expires"), fact(&told, "description")), ("never".into(), "for good".into()));
    let shown = place.run(["token", "show", &id]).ok();
    assert!(shown.starts_with(&told), "{shown}");
    place.verify(&secret).ok();

    let complaint = place.run(["token", "edit", &id, "--expires", "2020-01-31"]).fails(2);
    assert!(complaint.contains("has passed"), "{complaint}");
    // The primary token can be edited, too.
    let primary = primary_of(&place, "alice");
    let told = place.run(["token", "edit", &primary, "--expires", "90d"]).ok();
    assert_eq!(fact(&told, "kind"), "primary");
    assert!(fact(&told, "expires").starts_with("in 90 days"), "{told}");
}

/// The short id of an owner's active primary token.
fn primary_of(place: &Place, owner: &str) -> String {
    let list = place.run(["token", "list", "--owner", owner]).ok();
    let line = list.lines().find(|line| cells(line).contains(&"primary") && cells(line).contains(&"active"));
    cells(line.unwrap_or_else(|| panic!("no active primary in:\n{list}")))[0].to_owned()
}

#[test]
fn an_ended_token_is_not_revived() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "short", "1s");
    eventually("the deadline", PATIENCE, || (place.verify(&secret).status == Some(1)).then_some(()));
    for change in [&["--description", "x"][..], &["--expires", "30d"], &["--expires", "never"]] {
        let complaint = place.run(["token", "edit", &id].iter().chain(change)).fails(1);
        assert!(complaint.contains(&format!("token {id} expired at ")), "{complaint}");
        assert!(complaint.contains("an ended token is not revived: rotate it"), "{complaint}");
    }
    assert!(place.run(["token", "revoke", &id]).fails(1).contains("expired at"));

    // Which works, and gives the same lifetime again.
    let told = place.run(["token", "rotate", &id, "--expires", "1h"]).ok();
    assert_ne!(fact(&told, "token"), id);
    place.verify(&fact(&told, "secret")).ok();
    assert_eq!(place.verify(&secret).refused(), "expired");
    let complaint = place.run(["token", "rotate", &id]).fails(1);
    assert!(complaint.contains(&format!("was replaced by {}; use that one", fact(&told, "token"))), "{complaint}");
}

#[test]
fn rotating_replaces_the_secret_and_keeps_the_rest() {
    let place = Place::new();
    let primary_secret = place.owner("alice", "alice@example.org");
    let create = "token create --owner alice --description CI --expires 30d --scope a --scope b";
    let told = place.line(create).ok();
    let (id, secret) = (fact(&told, "token"), fact(&told, "secret"));

    let rotated = place.run(["token", "rotate", &id]);
    assert!(rotated.stderr.ends_with(&format!("The old token {} is no longer valid.\n", short(&id))), "{rotated}");
    let told = rotated.ok();
    let successor = fact(&told, "token");
    assert_ne!((&successor, &fact(&told, "secret")), (&id, &secret));
    assert_eq!((fact(&told, "description"), fact(&told, "scopes")), ("CI".into(), "a b".into()));
    assert_eq!(fact(&told, "kind"), "additional");
    let created = instant(&place.run(["token", "show", &successor]).ok(), "created");
    assert_eq!(instant(&told, "expires") - created, TimeDelta::days(30), "the same lifetime again");
    assert_eq!(place.verify(&secret).refused(), "revoked");
    place.verify(&fact(&told, "secret")).ok();
    let old = place.run(["token", "show", &id]).ok();
    assert_eq!((fact(&old, "status"), fact(&old, "replaced by")), ("revoked".into(), successor));

    // This is how a primary token is regenerated; with grace, both work for a while.
    let primary = primary_of(&place, "alice");
    let rotated = place.run(["token", "rotate", &primary, "--grace", "24h", "--expires", "never"]);
    assert!(rotated.stderr.contains(&format!("The old token {primary} stays valid until ")), "{rotated}");
    let told = rotated.ok();
    assert_eq!(fact(&told, "kind"), "primary");
    place.verify(&fact(&told, "secret")).ok();
    let old = place.verify(&primary_secret).ok();
    let left = instant(&old, "expires") - SystemClock::default().now();
    assert!(left <= TimeDelta::hours(24) && left > TimeDelta::hours(23), "{left}");
}

#[test]
fn grace_ends_by_itself_and_never_outlives_the_old_deadline() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "CI", "30d");
    let until = instant(&place.run(["token", "show", &id]).ok(), "expires");
    place.run(["token", "rotate", &id, "--grace", "60d"]).ok();
    assert_eq!(instant(&place.verify(&secret).ok(), "expires"), until, "never past its own deadline");

    let (id, secret) = place.token("alice", "CI", "30d");
    let told = place.run(["token", "rotate", &id, "--grace", "3s"]).ok();
    let end = instant(&place.run(["token", "show", &id]).ok(), "expires");
    refused_exactly_at(&place, &secret, end);
    place.verify(&fact(&told, "secret")).ok();
}

#[test]
fn revoking_ends_an_additional_token_only() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "CI", "30d");
    place.verify(&secret).ok();
    let told = place.run(["token", "revoke", &short(&id)]).ok();
    assert_eq!((fact(&told, "token"), fact(&told, "status")), (id.clone(), "revoked".into()));
    assert_eq!(place.verify(&secret).refused(), "revoked");
    for command in ["revoke", "rotate", "edit --description x"] {
        let mut words: Vec<&str> = ["token"].into_iter().chain(command.split(' ')).collect();
        words.insert(2, &id);
        let complaint = place.run(words).fails(1);
        assert!(complaint.contains(&format!("token {id} was revoked; create a new one")), "{command}: {complaint}");
    }

    let primary = primary_of(&place, "alice");
    let complaint = place.run(["token", "revoke", &primary]).fails(1);
    assert!(complaint.contains("primary token, which is ended only by rotating it"), "{complaint}");
}

#[test]
fn lists_show_those_that_expire_first_on_top() {
    let place = Place::new();
    place.empty_store();
    let empty = place.line("token list");
    assert!(empty.stderr.contains("There are no tokens. `lapsed owner add`"), "{empty}");
    assert_eq!(empty.ok(), "");

    place.owner("alice", "alice@example.org");
    place.owner("bob", "bob@example.org");
    let (later, _) = place.token("alice", "later", "2099-01-31");
    let (sooner, _) = place.token("bob", "sooner", "2098-01-31T09:30:00Z");
    let (ended, _) = place.token("alice", "ended", "2097-01-31");
    place.run(["token", "revoke", &ended]).ok();
    let list = place.line("token list").ok();
    let lines: Vec<Vec<&str>> = list.lines().map(cells).collect();
    assert_eq!(lines[0], ["ID", "OWNER", "KIND", "DESCRIPTION", "STATUS", "EXPIRES (UTC)"]);
    let sooner_line = [&short(&sooner), "bob", "additional", "sooner", "active", "2098-01-31 09:30:00"];
    assert_eq!(lines[1][..6], sooner_line);
    assert!(lines[1][6].starts_with("in ") && lines[1][6].ends_with(" days"), "{list}");
    let later_line = [&short(&later), "alice", "additional", "later", "active", "2099-02-01 00:00:00"];
    assert_eq!(lines[2][..6], later_line);
    assert_eq!((lines[3][1..].join(" "), lines[4][1..].join(" ")), {
        let primary = "primary primary token active never";
        (format!("alice {primary}"), format!("bob {primary}"))
    });
    assert_eq!(lines[5], [&short(&ended), "alice", "additional", "ended", "revoked", "2097-02-01 00:00:00"]);
    assert_eq!(lines.len(), 6);
}

#[test]
fn an_owner_is_named_by_key_id_or_address() {
    let place = Place::new();
    place.run(["owner", "add", "alice", "--email", "alice@example.org", "--email", "team@example.org"]).ok();
    place.run(["owner", "add", "bob", "--email", "team@example.org", "--name", "Bob Example"]).ok();
    let complaint = place.line("token list --owner Team@Example.org").fails(1);
    let lines: Vec<Vec<&str>> = complaint.lines().map(cells).collect();
    assert_eq!(lines[0], ["lapsed: \"Team@Example.org\" fits more than one owner; use a key or an id:"]);
    assert_eq!((&lines[1][1..], &lines[2][1..]), (&["alice", "alice"][..], &["bob", "Bob Example"][..]));

    let by_key = place.line("token list --owner alice").ok();
    assert_eq!((by_key.lines().count(), by_key.matches("alice").count()), (2, 1));
    for name in ["alice@example.org", "ALICE@example.ORG", lines[1][0]] {
        assert_eq!(place.run(["token", "list", "--owner", name]).ok(), by_key, "{name}");
    }
    let complaint = place.line("token create --owner team@example.org --description x").fails(1);
    assert!(complaint.contains("fits more than one owner"), "{complaint}");
}

#[test]
fn a_token_is_named_by_its_id_or_its_last_digits() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let mut ids: Vec<String> = Vec::new();
    // All ids of one owner end in the same two digits: of 257 tokens, two have the same four.
    let (one, two) = loop {
        let (id, _) = place.token("alice", "CI", "never");
        if let Some(twin) = ids.iter().find(|known| known[known.len() - 4..] == id[id.len() - 4..]) {
            break (twin.clone(), id);
        }
        ids.push(id);
        assert!(ids.len() <= 257, "257 pigeons in 256 holes");
    };
    let digits = &one[one.len() - 4..];
    let complaint = place.run(["token", "show", digits]).fails(1);
    assert!(complaint.starts_with(&format!("lapsed: {digits} fits more than one token; use the whole id:\n")));
    assert!(complaint.contains(&format!("  {one}  active  CI\n")), "{complaint}");
    assert!(complaint.contains(&format!("  {two}  active  CI\n")), "{complaint}");
    place.run(["token", "revoke", digits]).fails(1);
    for name in [one.clone(), short(&one), one.to_uppercase(), one.replace('-', "")] {
        assert_eq!(fact(&place.run(["token", "show", &name]).ok(), "token"), one, "{name}");
    }
    for (name, why) in [("0000", "there is no token 0000"), ("CI", "is not a token's id"), ("", "is not a token's id")]
    {
        let complaint = place.run(["token", "show", name]).fails(1);
        assert!(complaint.contains(why), "{name}: {complaint}");
    }
}

/// Asserts that a secret is honoured before this instant and refused from it on, by nothing but the clock.
#[track_caller]
fn refused_exactly_at(place: &Place, secret: &str, deadline: lapsed::clock::Timestamp) {
    let clock = SystemClock::default();
    loop {
        let before = clock.now();
        let verified = place.verify(secret);
        let after = clock.now();
        if verified.status == Some(0) {
            assert!(before < deadline, "honoured at {before}, past {deadline}");
            assert_eq!(fact(&verified.stdout, "status"), "active");
        } else {
            assert!(after >= deadline, "refused at {after}, before {deadline}");
            assert_eq!(verified.refused(), "expired");
            return;
        }
        assert!(after - deadline < seconds(20), "never refused");
    }
}

#[test]
fn a_secret_is_refused_exactly_at_the_deadline_without_a_daemon() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "short", "3s");
    let deadline = instant(&place.run(["token", "show", &id]).ok(), "expires");
    refused_exactly_at(&place, &secret, deadline);
    // What people see agrees, although nobody has marked the token.
    assert_eq!(fact(&place.run(["token", "show", &id]).ok(), "status"), "expired");
    let list = place.line("token list").ok();
    assert!(list.lines().any(|line| cells(line).starts_with(&[
        &short(&id),
        "alice",
        "additional",
        "short",
        "expired"
    ])));
}

#[test]
fn verify_says_what_it_knows() {
    let place = Place::new();
    let primary = place.owner("alice", "alice@example.org");
    let verified = place.run_with(["token", "verify"], &format!("  {primary}\r\n\n")).ok();
    let expected = "valid        yes\n\
                    token        [id]\n\
                    owner        alice\n\
                    kind         primary\n\
                    description  primary token\n\
                    status       active\n\
                    expires      never\n\
                    created      [instant] UTC\n\
                    last used    never\n";
    assert_eq!(scrub(&verified), expected);
    assert!(!verified.contains(&primary));

    // A good secret of another store, one with a wrong digit, and what is no secret at all.
    let stranger = Place::new().owner("alice", "alice@example.org");
    let last = if primary.ends_with('A') { "B" } else { "A" };
    let mistyped = format!("{}{last}", &primary[..primary.len() - 1]);
    for (text, detail) in [
        (stranger.as_str(), "no token has this secret"),
        (&mistyped, "no token has this secret; it is mistyped or not a secret of lapsed"),
        ("\n", "nothing came on standard input, where the secret belongs"),
        ("hunter2", "no token has this secret; it is mistyped or not a secret of lapsed"),
        (&"x".repeat(100_000), "no token has this secret; it is mistyped or not a secret of lapsed"),
    ] {
        let refused = place.verify(text);
        assert_eq!(refused.stderr, "", "{refused}");
        assert_eq!(fact(&refused.stdout, "detail"), detail);
        assert_eq!(refused.refused(), "unknown");
    }
    let binary = finish_with_bytes(&place, b"\xff\xfe\0lps_");
    assert_eq!(binary.refused(), "unknown");
}

fn finish_with_bytes(place: &Place, stdin: &[u8]) -> Ran {
    let mut command = place.bare(["--config", "lapsed.toml", "token", "verify"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program");
    let _ = child.stdin.take().expect("a pipe").write_all(stdin);
    Ran::new("token verify".into(), child.wait_with_output().expect("the program ends"))
}

#[test]
fn the_last_use_is_recorded_once_a_minute_at_most() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "CI", "30d");
    let clock = SystemClock::default();
    let before = clock.now();
    place.verify(&secret).ok();
    let after = clock.now();
    let used = instant(&place.run(["token", "show", &id]).ok(), "last used");
    assert!(before <= used && used <= after, "{before} {used} {after}");
    eventually("another second", PATIENCE, || (clock.now() > used).then_some(()));
    place.verify(&secret).ok();
    assert_eq!(instant(&place.run(["token", "show", &id]).ok(), "last used"), used);
    // Whoever is refused uses nothing.
    let (id, secret) = place.token("alice", "revoked", "30d");
    place.run(["token", "revoke", &id]).ok();
    place.verify(&secret).refused();
    assert_eq!(fact(&place.run(["token", "show", &id]).ok(), "last used"), "never");
}

#[test]
fn show_tells_every_reminder_and_why_one_was_not_sent() {
    let place = Place::new();
    place.configure(IMPATIENT);
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "CI", "20s");
    let shown = place.run(["token", "show", &id]).ok();
    assert!(shown.ends_with("\n\nNo reminder has been due yet.\n"), "{shown}");
    let expires = instant(&shown, "expires");
    let clock = SystemClock::default();
    eventually("both leads", PATIENCE, || (clock.now() >= expires - seconds(15)).then_some(()));

    let once = place.line("run --once").ok();
    assert_eq!(fact(&once, "remind"), "reminders: 1, settled: 1");
    assert_eq!(fact(&once, "deliver"), "messages sent: 1");
    assert_eq!(fact(&once, "expire"), "nothing was due");
    assert_eq!(
        history(&place, &id),
        [
            "16s superseded [instant] UTC alice@example.org a later reminder spoke instead",
            "15s sent [instant] UTC alice@example.org",
        ]
    );
    let shown = place.run(["token", "show", &id]).ok();
    let due = (expires - seconds(16)).format("%Y-%m-%d %H:%M:%S UTC").to_string();
    assert!(shown.lines().any(|line| cells(line).starts_with(&["16s", &due, "superseded"])), "{shown}");
    assert_eq!(place.mails("mail").len(), 1);

    refused_exactly_at(&place, &secret, expires);
    let once = place.line("run --once").ok();
    assert_eq!(fact(&once, "deliver"), "messages sent: 1");
    assert_eq!(history(&place, &id).last().expect("a line"), "expired sent [instant] UTC alice@example.org");
    // Everything was said: another run has nothing to do.
    for job in ["expire", "remind", "deliver", "purge"] {
        assert_eq!(fact(&place.line("run --once").ok(), job), "nothing was due");
    }
    assert_eq!(place.mails("mail").len(), 2);
}

/// What `show` says of a token's reminders: lead, state, when, to whom, and why. When it was due is left out.
fn history(place: &Place, id: &str) -> Vec<String> {
    let shown = place.run(["token", "show", id]).ok();
    let (_, table) = shown.split_once("\n\n").expect("the history");
    let lines: Vec<Vec<&str>> = table.lines().map(cells).collect();
    assert_eq!(lines[0], ["REMINDER", "DUE", "STATE", "WHEN", "TO", "WHY"], "{shown}");
    let rest = |line: &Vec<&str>| scrub(&[&line[..1], &line[2..]].concat().join(" "));
    lines[1..].iter().map(rest).collect()
}

#[test]
fn the_daemon_asks_for_the_mail_settings_and_the_others_do_not() {
    let place = Place::new();
    place.empty_store();
    place.line("token list").ok();
    for command in ["run", "run --once"] {
        let complaint = place.line(command).fails(2);
        for wanted in [
            "mail.transport is not set, and `lapsed run` needs it: write transport = \"smtp\" under [mail]",
            "LAPSED__MAIL__TRANSPORT",
            "mail.from is not set, and `lapsed run` needs it: write from = \"Tokens <tokens@example.org>\"",
            "LAPSED__MAIL__FROM",
        ] {
            assert!(complaint.contains(wanted), "{complaint}");
        }
    }
    place.configure("[mail]\ntransport = \"maildir\"\nfrom = \"tokens@example.org\"");
    let complaint = place.line("run --once").fails(2);
    assert!(complaint.contains("mail.maildir.path"), "{complaint}");
}

#[test]
fn all_mistakes_of_a_configuration_are_told_at_once() {
    let mut place = Place::new();
    place.configure(
        r#"
        [store]
        url = "mysql://lapsed:hunter2@db/lapsed"
        [reminders]
        lead_tmes = ["30d"]
        lead_times = ["30d", "-1d"]
        [schedule]
        expire = "*/5 * * *"
        remind = "0 0 0 31 2 *"
        [mail]
        transport = "pigeon"
        from = "nobody"
        [mail.smtp]
        port = 70000
        "#,
    );
    place.set("LAPSED__RETENTION__MESAGES", "9d");
    place.set("LAPSED__LOG__LEVEL", "inof");
    let complaint = place.line("token list").fails(2);
    for wanted in [
        "store.url = \"mysql://lapsed:***@db/lapsed\" (lapsed.toml:3): must begin with sqlite:, postgres:// or",
        "reminders.lead_tmes (lapsed.toml:5): unknown key; did you mean reminders.lead_times?",
        "reminders.lead_times = [\"30d\", \"-1d\"] (lapsed.toml:6): \"-1d\" is not a duration",
        "schedule.expire = \"*/5 * * *\" (lapsed.toml:8): has 4 fields",
        "schedule.remind = \"0 0 0 31 2 *\" (lapsed.toml:9): never fires",
        "mail.transport = \"pigeon\" (lapsed.toml:11): must be \"maildir\" or \"smtp\"",
        "mail.from = \"nobody\" (lapsed.toml:12): must be a mail address",
        "mail.smtp.port = 70000 (lapsed.toml:14)",
        "retention.mesages (environment variable LAPSED__RETENTION__MESAGES): unknown key; did you mean",
        "log.level = \"inof\" (environment variable LAPSED__LOG__LEVEL): \"inof\" is not a level",
    ] {
        assert!(complaint.contains(wanted), "{wanted}\nis not in:\n{complaint}");
    }
    assert!(!complaint.contains("hunter2"), "{complaint}");
    assert!(!place.path("lapsed.db").exists());
}

#[test]
fn a_configuration_that_cannot_be_read_is_named() {
    let place = Place::new();
    for (file, content, why) in [
        ("missing.toml", None, "missing.toml: cannot read this configuration file"),
        ("broken.toml", Some("[store]\nurl \"postgres://u:hunter2@h/db\"\n"), "broken.toml:2: "),
    ] {
        if let Some(content) = content {
            place.write(file, content);
        }
        // Where it stands does not matter.
        for line in [format!("--config {file} token list"), format!("token list --config {file}")] {
            let complaint = finish(place.bare(line.split(' ')), "").fails(2);
            assert!(complaint.contains(why) && !complaint.contains("hunter2"), "{complaint}");
        }
    }
}

#[tokio::test]
async fn a_store_that_cannot_be_used_is_named_with_the_reason() {
    let mut place = Place::new();
    place.write("text.db", &"this is a text, and not a database\n".repeat(100));
    std::fs::create_dir(place.path("directory.db")).expect("a directory");
    let url = format!("sqlite:{}?mode=rwc", place.path("another.db").display());
    let mut another = SqliteConnection::connect(&url).await.expect("a database");
    sqlx::raw_sql("CREATE TABLE songs (title TEXT)").execute(&mut another).await.expect("a table");
    another.close().await.expect("an end");
    let another = std::fs::read(place.path("another.db")).expect("a file");
    for (url, lists, adds) in [
        (
            "sqlite:nowhere/lapsed.db",
            "there is no store nowhere/lapsed.db: `lapsed run`, `lapsed owner add` and `lapsed token import` make one.",
            "the store nowhere/lapsed.db cannot be made: No such file or directory",
        ),
        ("sqlite:text.db", "text.db is not a SQLite database", "text.db is not a SQLite database"),
        (
            "sqlite:directory.db",
            "the store directory.db cannot be opened: Is a directory",
            "the store directory.db cannot be opened: Is a directory",
        ),
        (
            "sqlite:another.db",
            "another.db is a SQLite database of another program",
            "another.db is a SQLite database of another program",
        ),
    ] {
        place.set("LAPSED__STORE__URL", url);
        for (words, why) in [("token list", lists), ("owner add alice --email alice@example.org", adds)] {
            let complaint = place.line(words).fails(1);
            assert!(complaint.starts_with(&format!("lapsed: {why}")), "{url}: {complaint}");
            assert_eq!(complaint.lines().count(), 1, "{complaint}");
        }
    }
    assert_eq!(std::fs::read(place.path("another.db")).expect("a file"), another, "it is left as it was");
}

#[test]
fn a_file_that_is_here_and_was_not_named_is_told_of() {
    let place = Place::new();
    place.configure(IMPATIENT);
    let complaint = finish(place.bare(["run", "--once"]), "").fails(2);
    let told = "\nNo configuration file was read. There is one here: add --config lapsed.toml\n";
    assert!(complaint.ends_with(told), "{complaint}");
}

#[test]
fn what_people_typed_turns_nothing_round_on_a_terminal() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let (id, _) = place.token("alice", "deploy \u{202e}yek\u{200b}", "30d");
    for shown in [place.line("token list").ok(), place.line(&format!("token show {id}")).ok()] {
        assert!(shown.contains("deploy yek") && !shown.contains(['\u{202e}', '\u{200b}']), "{shown:?}");
    }
}

#[test]
fn a_token_shows_the_reminders_that_it_will_get() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let reminders = |expires: &str| {
        let (id, _) = place.token("alice", expires, expires);
        fact(&place.line(&format!("token show {id}")).ok(), "reminders")
    };
    assert_eq!(reminders("90d"), "30d, 7d, 1d");
    assert_eq!(reminders("5d"), "1d (not 30d, 7d: longer than 80 % of its lifetime)");
    assert_eq!(reminders("1h"), "none before the deadline (not 30d, 7d, 1d: longer than 80 % of its lifetime)");
    assert_eq!(reminders("never"), "none, as it never expires");
}

#[test]
fn who_revokes_what_was_issued_elsewhere_is_told_what_that_means() {
    let place = Place::new();
    place.run_with(["token", "import", "-"], "owner,description,expires_at\nalice,ci,2099-01-31\n").ok();
    let csv = place.line("token list --format csv").ok();
    let id = csv.lines().nth(1).and_then(|row| row.split(',').next()).expect("a row");
    let revoked = place.run(["token", "revoke", id]);
    assert!(revoked.stderr.starts_with("It was issued elsewhere, and is not watched any more."), "{revoked}");
    assert_eq!(fact(&revoked.ok(), "status"), "revoked");
}

#[test]
fn what_only_reads_makes_no_store() {
    let place = Place::new();
    place.configure(IMPATIENT);
    for line in [
        "token list",
        "token show 0123",
        "token create --owner alice --description ci",
        "owner list",
        "owner show alice",
        "status",
        "coverage",
        "forecast",
        "outbox list",
        "mail preview --token 0123",
        "run --once --dry-run",
        "store backup copy.db",
    ] {
        let complaint = place.line(line).fails(1);
        assert!(complaint.starts_with("lapsed: there is no store lapsed.db: "), "{line}: {complaint}");
    }
    place.verify("lps_whatever").fails(1);
    place.line("mail preview").ok();
    let checked = place.line("check").ok();
    assert!(checked.contains("there is no lapsed.db yet; the daemon makes it"), "{checked}");
    assert!(!place.path("lapsed.db").exists());
    place.configure("[store]\nurl = \"sqlite:nowhere/lapsed.db\"\n");
    assert!(place.line("check").stdout.contains("nowhere/lapsed.db cannot be made: No such file"));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    for words in ["token list", "--help", "help token create", "--version"] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = place.bare(["--config", "lapsed.toml"].into_iter().chain(words.split(' ')));
        command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
        let output = command.spawn().expect("the program").wait_with_output().expect("the program ends");
        let ran = Ran::new(words.into(), output);
        assert_eq!((ran.status, ran.stderr.as_str()), (Some(0), ""), "{ran}");
    }
}

#[test]
fn an_unreachable_database_is_told_without_its_password() {
    // A port of our own that nobody listens on: bound, but never listening.
    let held = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = held.local_addr().expect("the port").port();
    drop(held);
    let place = Place::with_store(&format!("postgres://lapsed:hunter2@127.0.0.1:{port}/lapsed"));
    let complaint = place.line("token list").fails(1);
    assert!(
        complaint.starts_with(&format!("lapsed: cannot connect to PostgreSQL at 127.0.0.1:{port}: ")),
        "{complaint}"
    );
    assert!(complaint.contains("Connection refused"), "{complaint}");
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    assert!(!complaint.contains("hunter2"), "{complaint}");
}

#[tokio::test]
async fn a_wrong_password_is_told_without_it() {
    let database = postgres::fresh().await;
    let (account, host) = database.url.rsplit_once('@').expect("an account");
    let (user, _) = account.rsplit_once(':').expect("a password");
    let complaint = Place::with_store(&format!("{user}:hunter2@{host}")).line("token list").fails(1);
    assert!(complaint.contains("password authentication failed"), "{complaint}");
    assert!(!complaint.contains("hunter2"), "{complaint}");
}

#[test]
fn the_whole_story_on_sqlite() {
    the_whole_story(&Place::new());
}

#[tokio::test]
async fn the_whole_story_on_postgresql_by_changing_the_url() {
    let database = postgres::fresh().await;
    let place = Place::with_store(&database.url);
    the_whole_story(&place);
    assert!(!place.path("lapsed.db").exists());
}

fn the_whole_story(place: &Place) {
    place.configure(IMPATIENT);
    let secret = place.owner("alice", "alice@example.org");
    assert_eq!(fact(&place.verify(&secret).ok(), "valid"), "yes");
    let duplicate = place.run(["owner", "add", "alice", "--email", "alice@example.org"]).fails(1);
    assert_eq!(duplicate, "lapsed: owner alice exists already\n");

    let (kept, _) = place.token("alice", "kept", "2099-01-31");
    let (short_lived, secret) = place.token("alice", "short-lived", "2s");
    let deadline = instant(&place.run(["token", "show", &short(&short_lived)]).ok(), "expires");
    refused_exactly_at(place, &secret, deadline);

    let once = place.line("run --once").ok();
    assert_eq!(fact(&once, "expire"), "tokens expired: 1, reminders: 1");
    assert_eq!(fact(&once, "deliver"), "messages sent: 1");
    assert_eq!(history(place, &short_lived), ["expired sent [instant] UTC alice@example.org"]);
    let mails = place.mails("mail");
    assert_eq!(mails.len(), 1);
    let mail = mail_parser::MessageParser::default().parse(&mails[0]).expect("a mail");
    assert_eq!(mail.subject(), Some("\"short-lived\" expired today"));

    let told = place.run(["token", "rotate", &short_lived, "--expires", "30d"]).ok();
    place.run(["token", "edit", &kept, "--description", "kept for long"]).ok();
    let list = place.line("token list --owner alice@example.org").ok();
    let rows: Vec<String> = list.lines().skip(1).map(|line| cells(line)[..5].join(" ")).collect();
    assert_eq!(
        rows,
        [
            format!("{} alice additional short-lived active", short(&fact(&told, "token"))),
            format!("{} alice additional kept for long active", short(&kept)),
            format!("{} alice primary primary token active", primary_of(place, "alice")),
            format!("{} alice additional short-lived expired", short(&short_lived)),
        ]
    );
    let shown = place.run(["token", "show", &short_lived]).ok();
    assert_eq!((fact(&shown, "status"), fact(&shown, "replaced by")), ("expired".into(), fact(&told, "token")));
    let complaint = place.line("token show 0000").fails(1);
    assert!(complaint.contains("there is no token 0000"), "{complaint}");
}
#[test]
fn rotating_an_expired_token_does_not_call_the_old_one_valid() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let (id, secret) = place.token("alice", "short", "1s");
    eventually("the deadline", PATIENCE, || (place.verify(&secret).status == Some(1)).then_some(()));
    let rotated = place.run(["token", "rotate", &id, "--expires", "1h"]);
    assert!(rotated.stderr.contains(&format!("The old token {} is no longer valid.", short(&id))), "{rotated}");
}

/// Longer than anything that reads takes, and shorter than writers wait for each other.
const SOON: Duration = Duration::from_secs(5);

#[tokio::test]
async fn who_only_reads_does_not_wait_for_writers() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let mut writer = locked(&place).await;
    let start = Instant::now();
    place.line("token list").ok();
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    sqlx::raw_sql("ROLLBACK").execute(&mut writer).await.expect("the end of the lock");
}

#[tokio::test]
async fn verify_answers_and_ends_although_its_use_cannot_be_recorded() {
    let place = Place::new();
    let secret = place.owner("alice", "alice@example.org");
    let mut writer = locked(&place).await;
    let start = Instant::now();
    assert_eq!(fact(&place.verify(&secret).ok(), "valid"), "yes");
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    sqlx::raw_sql("ROLLBACK").execute(&mut writer).await.expect("the end of the lock");
}

/// A writer in the middle of its transaction.
async fn locked(place: &Place) -> SqliteConnection {
    let url = format!("sqlite:{}", place.path("lapsed.db").display());
    let mut writer = SqliteConnection::connect(&url).await.expect("the store");
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut writer).await.expect("the lock");
    writer
}

#[test]
fn the_last_day_that_can_be_kept_is_named_as_it_is() {
    let place = Place::new();
    place.run(["owner", "add", "kei", "--email", "kei@example.org", "--time-zone", "Asia/Tokyo"]).ok();
    let told = place.line("token create --owner kei --description x --expires 9999-12-31").ok();
    let expires = fact(&told, "expires");
    assert!(
        expires.contains("at the end of 31 December 9999") && expires.contains("9999-12-31 15:00:00 UTC"),
        "{told}"
    );
}

#[test]
fn every_mistake_of_a_list_is_told() {
    let place = Place::new();
    place.configure("[reminders]\nlead_times = [\"7d\", \"7d\", \"soon\"]");
    let complaint = place.line("token list").fails(2);
    assert!(complaint.contains("\"soon\" is not a duration"), "{complaint}");
    assert!(complaint.contains("7d is given twice"), "{complaint}");
}

#[test]
fn a_store_url_that_makes_no_sense_is_wrong_configuration() {
    let mut place = Place::new();
    for url in ["sqlite::memory:", "postgres://lapsed:hunter2@127.0.0.1:port/lapsed"] {
        place.set("LAPSED__STORE__URL", url);
        let complaint = place.line("token list").fails(2);
        assert!(complaint.contains("store.url") && !complaint.contains("hunter2"), "{complaint}");
    }
}

#[test]
fn a_secret_that_nobody_could_read_is_not_a_success() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let create = ["--config", "lapsed.toml", "token", "create", "--owner", "alice", "--description", "x"];
    let mut command = place.bare(create);
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    let output = command.spawn().expect("the program").wait_with_output().expect("the program ends");
    assert_eq!(Ran::new("token create".into(), output).status, Some(1));
}

#[test]
fn a_read_only_store_is_told_as_such() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let store = place.path("lapsed.db");
    std::fs::set_permissions(&store, PermissionsExt::from_mode(0o400)).expect("chmod");
    let mut command = place.bare(["--config", "lapsed.toml", "token", "create", "--owner", "alice"]);
    command.args(["--description", "x"]);
    // Root may write everything, so then somebody else tries, with a copy of the program that they can reach.
    if nobody_takes_over(&place) {
        let program = place.path("lapsed");
        // `cp` and not this process makes the copy: while this one had it open for writing, a program that another
        // test starts would take the descriptor along, and a file that somebody may write does not run (ETXTBSY).
        let made = Command::new("cp").arg(LAPSED).arg(&program).status().expect("cp starts");
        assert!(made.success(), "a copy of the program");
        let mut as_nobody = Command::new(program);
        as_nobody.args(command.get_args()).current_dir(place.path("")).env_clear();
        as_nobody.uid(NOBODY).gid(NOBODY);
        command = as_nobody;
    }
    let complaint = finish(command, "").fails(1);
    assert!(complaint.contains("the store cannot be written: it is read-only"), "{complaint}");
}

/// The user and group that own nothing.
const NOBODY: u32 = 65_534;

/// Where the tests run as root, gives the place to nobody; returns whether.
fn nobody_takes_over(place: &Place) -> bool {
    let is_root = std::os::unix::fs::chown(place.path(""), Some(NOBODY), Some(NOBODY)).is_ok();
    if is_root {
        for file in place.files() {
            std::os::unix::fs::chown(file, Some(NOBODY), Some(NOBODY)).expect("chown");
        }
    }
    is_root
}

#[test]
fn an_unreachable_database_is_told_once() {
    let place = Place::with_store("postgres://lapsed:hunter2@127.0.0.1:1/lapsed");
    let complaint = place.line("token list").fails(1);
    assert_eq!(complaint.matches("Connection refused").count(), 1, "{complaint}");
}

#[test]
fn every_command_has_a_manual_page() {
    let place = Place::new();
    std::fs::create_dir(place.path("man")).expect("a directory");
    assert_eq!(place.run(["man", "man"]).ok(), "");
    let page = |name: &str| std::fs::read_to_string(place.path(&format!("man/{name}.1"))).expect(name);
    let mut commands = vec![String::new()];
    let mut pages = 0;
    while let Some(command) = commands.pop() {
        // As `--help` lists them.
        let help = place.line(&format!("{command} --help")).ok();
        let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
        let named = listed.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        let names: Vec<&str> = named.filter_map(|line| line.split_whitespace().next()).collect();
        commands.extend(names.iter().filter(|name| **name != "help").map(|name| format!("{command} {name}")));
        let text = page(&format!("lapsed{}", command.replace(' ', "-")));
        assert!(text.contains(".SH SYNOPSIS") && text.contains("config"), "{command}: {text}");
        pages += 1;
    }
    assert_eq!(std::fs::read_dir(place.path("man")).expect("the pages").count(), pages);
    assert!(page("lapsed-bounce").contains("sysexits.h"));
    let nowhere = place.run(["man", "nowhere"]).fails(1);
    assert!(nowhere.contains("No such file"), "{nowhere}");
}
