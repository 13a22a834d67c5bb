//! The commands of every day as a user runs them: importing lists, owners and contacts, lists and their formats, and what
//! the program says of itself. Outputs are compared whole, with ids and instants replaced.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::support::backend::OnSqlite;
use crate::support::cli::{Place, cells, fact, scrub, short};
use crate::support::postgres;
use crate::support::world::{World, days, lead};
use chrono::TimeDelta;
use lapsed::clock::{Clock, SystemClock};
use lapsed::policies::{Group, Match, Pattern};
use lapsed::policy::Policy;

/// Mails in a Maildir, and the default lead times.
const WITH_MAIL: &str = r#"
    [mail]
    transport = "maildir"
    from = "Tokens <tokens@example.org>"
    [mail.maildir]
    path = "mail"
"#;

/// A list with each column, and with two that mean nothing.
const LIST: &str = "\
owner,emails,description,expires_at,external_id,created_at,last_used_at,revoked_at,time_zone,watch,colour,shoe size
alice,alice@example.org;team@example.org,deploy key,2099-01-31,17,2024-05-01T09:00:00Z,2026-01-02,,Asia/Tokyo,sec@example.org; ops@example.org,red,42
alice,,\"nightly, backup\",never,18,,,,,,,
bob,Bob@Example.org,registry,2099-03-01T12:00:00+02:00,19,2024-01-01,,2026-02-03T04:05:06Z,,,,
";

/// The same as JSON lines.
const JSON_LINES: &str = r#"
{"owner":"alice","emails":["alice@example.org","team@example.org"],"description":"deploy key","expires_at":"2099-01-31","external_id":17,"created_at":"2024-05-01T09:00:00Z","last_used_at":"2026-01-02","time_zone":"Asia/Tokyo","watch":["sec@example.org","ops@example.org"]}
{"owner":"alice","description":"nightly, backup","expires_at":null,"external_id":"18","colour":"red"}
{"owner":"bob","emails":"Bob@Example.org","description":"registry","expires_at":"2099-03-01T12:00:00+02:00","external_id":19,"created_at":"2024-01-01","revoked_at":"2026-02-03T04:05:06Z"}
"#;

/// How long tokens that have ended are kept, where a list has long past ones.
const KEEP: &str = "LAPSED__RETENTION__ENDED_TOKENS";

/// What an import prints.
fn counts(rows: u32, added: u32, updated: u32, unchanged: u32, bad: u32) -> String {
    format!("rows       {rows}\nadded      {added}\nupdated    {updated}\nunchanged  {unchanged}\nbad        {bad}\n")
}

/// The text with ids, instants, and numbers of days and seconds replaced.
fn plain(text: &str) -> String {
    let scrubbed = scrub(text);
    let words: Vec<&str> = scrubbed.split(' ').collect();
    let count = |at: usize| words[at].bytes().all(|byte| byte.is_ascii_digit()) && !words[at].is_empty();
    let replaced = |at: usize| match (words[at], words.get(at + 1).copied().unwrap_or_default()) {
        (_, unit) if count(at) && (unit.starts_with("days") || unit == "s") => "[n]",
        (word, _) => word,
    };
    (0..words.len()).map(replaced).collect::<Vec<_>>().join(" ")
}

/// The rows of a table, cells parted by bars; widths, which depend on what was replaced, are left out.
fn rows(table: &str) -> Vec<String> {
    plain(table).lines().map(|line| cells(line).join(" | ")).collect()
}

/// The descriptions of a list of tokens, in its order.
fn described(place: &Place, arguments: &str) -> Vec<String> {
    let list = place.line(&format!("token list --format json {arguments}")).ok();
    list.lines().map(|line| json(line)["description"].as_str().expect("a description").to_owned()).collect()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn a_list_is_imported_and_importing_it_again_changes_nothing() {
    imported_again(&Place::new());
}

#[tokio::test]
async fn a_list_is_imported_and_importing_it_again_changes_nothing_on_postgresql() {
    let database = postgres::fresh().await;
    imported_again(&Place::with_store(&database.url));
}

fn imported_again(place: &Place) {
    place.write("list.csv", LIST);
    let imported = place.line("token import list.csv");
    assert_eq!(
        imported.stderr,
        "column \"colour\" is not known and is ignored\ncolumn \"shoe size\" is not known and is ignored\n\
         the columns that are known: owner, description, expires_at, emails, watch, external_id, created_at, \
         last_used_at, revoked_at, time_zone\n"
    );
    assert_eq!(imported.ok(), counts(3, 3, 0, 0, 0));
    assert_eq!(place.line("token import list.csv").ok(), counts(3, 0, 0, 3, 0));
    // The same list in its other form, and from standard input.
    assert_eq!(place.run_with(["token", "import", "-"], JSON_LINES).ok(), counts(3, 0, 0, 3, 0));
    assert_eq!(
        rows(&place.line("token list").ok()),
        [
            "ID | OWNER | KIND | DESCRIPTION | STATUS | EXPIRES (UTC)",
            "[short id] | alice | additional | deploy key | active | [instant] | in [n] days",
            "[short id] | alice | additional | nightly, backup | active | never",
            "[short id] | bob | additional | registry | revoked | [instant]",
        ]
    );
    assert_eq!(place.line("token import list.csv --source other").status, Some(1), "it is watched already");
    let changed = LIST.replace("deploy key", "deploy key (CI)").replace("2099-03-01", "2099-04-01");
    assert_eq!(place.run_with(["token", "import", "-"], &changed).ok(), counts(3, 0, 1, 2, 0));
}

#[test]
fn json_lines_mean_the_same_as_csv() {
    let (one, two) = (Place::new(), Place::new());
    one.run_with(["token", "import", "-"], LIST).ok();
    two.run_with(["token", "import", "-"], JSON_LINES).ok();
    for list in ["token list --format csv --sort owner", "owner contact list alice --format csv"] {
        let sorted = |place: &Place| {
            let mut lines: Vec<String> = scrub(&place.line(list).ok()).lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&one), sorted(&two));
    }
}

#[test]
fn an_imported_token_is_watched_and_has_nothing_to_verify() {
    let place = Place::new();
    place.run_with(["token", "import", "-", "--source", "forge"], LIST).ok();
    let id = short_of(&place, "deploy key");
    let shown = place.run(["token", "show", &id]).ok();
    let expected = "token        [id]\n\
                    owner        alice\n\
                    kind         additional\n\
                    description  deploy key\n\
                    status       active\n\
                    expires      in [n] days, at the end of 31 January 2099 ([instant] JST, [instant] UTC)\n\
                    created      [instant] JST, [instant] UTC\n\
                    last used    [instant] JST, [instant] UTC\n\
                    source       forge\n\
                    external id  17\n\
                    watched by   ops@example.org, sec@example.org\n\
                    reminders    30d, 7d, 1d\n\
                    \n\
                    No reminder has been due yet.\n";
    assert_eq!(plain(&shown), expected);
    let unused = place.run(["token", "show", &short_of(&place, "nightly, backup")]).ok();
    assert_eq!(fact(&unused, "last used"), "not known: it was imported");
    // An imported owner gets a token of ours like any other.
    let (_, secret) = place.token("alice", "ours", "30d");
    assert_eq!(fact(&place.verify(&secret).ok(), "owner"), "alice");
    assert_eq!(described(&place, "--source forge").len(), 3);
}

fn short_of(place: &Place, description: &str) -> String {
    let list = place.line("token list --format json").ok();
    let found = list.lines().map(json).find(|token| token["description"] == description);
    short(found.expect("the token")["id"].as_str().expect("an id"))
}

#[test]
fn bad_rows_are_told_with_line_and_reason_and_the_good_ones_land() {
    let place = Place::new();
    let list = "owner,emails,description,expires_at,external_id,created_at\n\
        carol,carol@example.org,good,2099-01-31,1,\n\
        carol,carol,bad mail,2099-01-31,2,\n\
        ,x@example.org,no owner,2099-01-31,3,\n\
        carol,,,2099-01-31,4,\n\
        carol,,bad date,2099-02-30,5,\n\
        carol,,twice,2099-01-31,1,\n\
        carol,,a span,30d,6,\n\
        carol,,also good,never,7,2020-01-01\n\
        carol,,made when,2099-01-31,8,yesterday\n\
        carol,short\n";
    place.write("bad.csv", list);
    let strict = place.line("token import bad.csv --strict");
    let complaints = [
        "line 3: emails: \"carol\" is not a mail address: it has no @",
        "line 4: owner: a key cannot be empty",
        "line 5: description: a description cannot be empty",
        "line 6: expires_at: there is no such day; write a date as 2027-01-31",
        "line 7: external id \"1\" of owner \"carol\" stands in the list twice; the first row counts",
        "line 8: expires_at: \"30d\" is not a deadline: write 2027-01-31T09:00:00Z, or 2027-01-31 for the end of that \
         day, or nothing for never",
        "line 10: created_at: \"yesterday\" is not an instant such as 2027-01-31T09:00:00Z",
        "line 11: it has 2 fields, and the header names 6 columns; is a quote or a comma missing?",
    ];
    let told = |last: &str| format!("{}\n{last}\n", complaints.join("\n"));
    assert_eq!(strict.stderr, told("lapsed: 8 bad rows in bad.csv; with --strict nothing was imported"));
    assert_eq!((strict.status, strict.stdout), (Some(1), counts(10, 0, 0, 0, 8)));
    assert_eq!(place.line("token list").ok(), "");
    assert_eq!(place.line("owner list").ok(), "");

    let imported = place.line("token import bad.csv");
    assert_eq!(imported.stderr, told("lapsed: 8 bad rows in bad.csv"));
    assert_eq!((imported.status, imported.stdout), (Some(1), counts(10, 2, 0, 0, 8)));
    assert_eq!(described(&place, ""), ["good", "also good"]);
    // A strict import of a good list.
    let good: String = list.lines().take(2).map(|line| format!("{line}\n")).collect();
    let again = place.run_with(["token", "import", "-", "--strict"], &good);
    assert_eq!(again.ok(), counts(1, 0, 0, 1, 0));
    // A bad row prunes nothing: the list may not be complete.
    let pruned = place.run_with(["token", "import", "-", "--prune", "--force"], &(good + "carol,short\n"));
    assert!(
        pruned
            .stderr
            .ends_with("lapsed: one bad row in standard input; nothing was pruned, for the list may not be complete\n"),
        "{pruned}"
    );
    assert_eq!(described(&place, "--status active").len(), 2);
}

#[test]
fn what_an_import_leaves_out_and_whom_it_cannot_tell_is_said() {
    let mut place = Place::new();
    place.set(KEEP, "30d");
    let day = |days: i64| (SystemClock::default().now() + TimeDelta::days(days)).to_rfc3339();
    let list = format!(
        "owner,emails,description,expires_at\nalice,a@example.org,x,{}\nbob,,x,{}\nbob,,y,{}\nold,,z,{}\n",
        day(9),
        day(9),
        day(-29),
        day(-31)
    );
    for (added, unchanged) in [(3, 0), (0, 3)] {
        let imported = place.run_with(["token", "import", "-"], &list);
        let left_out = counts(4, added, 0, unchanged, 0).replace("bad", "left out   1\nbad");
        assert_eq!((imported.status, &imported.stdout), (Some(0), &left_out));
        assert_eq!(
            imported.stderr,
            "one row is left out: the token ended longer ago than retention.ended_tokens (30d)\n\
             one owner has no contact, so nobody can be told of their deadlines; `lapsed owner list` shows which\n"
        );
    }
    let strict = place.run_with(["token", "import", "-", "--strict"], &(list + "bob\n"));
    assert_eq!(strict.stdout, counts(5, 0, 0, 0, 1));
    assert!(strict.stderr.starts_with("line 6: ") && strict.stderr.lines().count() == 2, "{strict}");
}

#[test]
fn what_a_complete_list_no_longer_has_ends_with_prune() {
    let place = Place::new();
    let list = |numbers: std::ops::Range<u32>| {
        let rows: String = numbers.map(|n| format!("alice,a@example.org,t{n},2099-01-31,{n}\n")).collect();
        format!("owner,emails,description,expires_at,external_id\n{rows}")
    };
    place.write("all.csv", &list(0..20));
    place.write("one-less.csv", &list(1..20));
    place.write("half.csv", &list(0..10));
    place.line("token import all.csv --source forge").ok();
    place.run_with(["token", "import", "-", "--source", "cloud"], &list(100..110)).ok();

    let refused = place.line("token import half.csv --source forge --prune");
    assert_eq!((refused.status, &refused.stdout), (Some(1), &counts(10, 0, 0, 10, 0)));
    assert_eq!(
        refused.stderr,
        "lapsed: --prune would end 10 of the 20 active tokens of source \"forge\", more than 10 %: is the list complete? \
         If it is, add --force\n"
    );
    assert_eq!(described(&place, "--status active").len(), 30);
    let pruned = place.line("token import one-less.csv --source forge --prune").ok();
    assert_eq!(pruned, counts(19, 0, 0, 19, 0) + "ended      1\n");
    assert_eq!(described(&place, "--status revoked"), ["t0"]);
    let pruned = place.line("token import half.csv --source forge --prune --force").ok();
    assert_eq!(pruned, counts(10, 0, 1, 9, 0) + "ended      10\n", "t0 is back on the list");
    assert_eq!(described(&place, "--status active --source cloud").len(), 10, "another source is left alone");
    assert_eq!(described(&place, "--status active --source forge").len(), 10);
    let complaint = place.line("token import half.csv --force").fails(2);
    assert!(complaint.contains("--prune"), "{complaint}");
}

#[test]
fn reminders_that_are_due_already_are_mailed_whether_or_not_the_daemon_ran_before() {
    for ran_before in [false, true] {
        let place = Place::new();
        place.configure(WITH_MAIL);
        if ran_before {
            place.line("run --once").ok();
        }
        let in_days = |days: i64| (SystemClock::default().now() + TimeDelta::days(days)).to_rfc3339();
        let list = |near: String| {
            format!(
                "owner,emails,description,expires_at,external_id,created_at\n\
                 alice,alice@example.org,far,{},1,2020-01-01\n\
                 alice,,near,{near},2,2020-01-01\n\
                 bob,alice@example.org,past,{},3,2020-01-01\n\
                 bob,,long past,{},4,2020-01-01\n",
                in_days(90),
                in_days(-1),
                in_days(-90),
            )
        };
        assert_eq!(place.run_with(["token", "import", "-"], &list(in_days(5))).ok(), counts(4, 4, 0, 0, 0));
        let once = place.line("run --once").ok();
        assert_eq!(fact(&once, "deliver"), "messages sent: 1", "one digest:\n{once}");
        let mails = place.mails("mail");
        let text = String::from_utf8_lossy(&mails[0]).into_owned();
        assert!(text.contains("near") && text.contains("past"), "{text}");
        assert!(!text.contains("long past") && !text.contains("far\n"), "{text}");
        // The tightest lead alone speaks.
        let shown = place.run(["token", "show", &short_of(&place, "near")]).ok();
        let states: Vec<String> = rows(&shown).into_iter().filter(|line| line.contains("alice@")).collect();
        assert_eq!(states.len(), 2, "{shown}");
        assert!(states[0].starts_with("30d |") && states[0].contains("| superseded |"), "{shown}");
        assert!(states[1].starts_with("7d |") && states[1].contains("| sent |"), "{shown}");
        assert_eq!(fact(&place.line("run --once").ok(), "deliver"), "nothing was due");

        // Renewed elsewhere: active again, and nothing is owed for a while.
        let id = short_of(&place, "past");
        assert_eq!(fact(&place.run(["token", "show", &id]).ok(), "status"), "expired");
        let renewed = list(in_days(5)).replace(&in_days(-1)[..10], &in_days(200)[..10]);
        let told = place.run_with(["token", "import", "-"], &renewed).ok();
        assert_eq!(fact(&told, "bad"), "0");
        let shown = place.run(["token", "show", &id]).ok();
        assert_eq!(fact(&shown, "status"), "active");
        assert!(fact(&shown, "expires").starts_with("in 200 days"), "{shown}");
        assert_eq!(fact(&place.line("run --once").ok(), "deliver"), "nothing was due");
    }
}

#[test]
fn owners_are_listed_shown_renamed_and_removed() {
    owners(&Place::new());
}

#[tokio::test]
async fn owners_are_listed_shown_renamed_and_removed_on_postgresql() {
    let database = postgres::fresh().await;
    owners(&Place::with_store(&database.url));
}

fn owners(place: &Place) {
    place.empty_store();
    let empty = place.line("owner list");
    assert_eq!(empty.stderr, "There are no owners. `lapsed owner add` makes one, `lapsed token import` many.\n");
    assert_eq!(empty.ok(), "");
    place.run(["owner", "add", "alice", "--email", "alice@example.org", "--time-zone", "Europe/Berlin"]).ok();
    let ended = (SystemClock::default().now() - TimeDelta::days(9)).to_rfc3339();
    let list = format!("owner,description,expires_at\nbob,x,2099-01-31\nbob,y,{ended}\n");
    place.run_with(["token", "import", "-"], &list).ok();

    let list = rows(&place.line("owner list").ok());
    assert_eq!(
        list,
        [
            "ID | KEY | NAME | TIME ZONE | CONTACTS | ACTIVE TOKENS",
            "[short id] | alice | alice | Europe/Berlin | 1 | 1",
            "[short id] | bob | bob | UTC | 0 | 1",
        ]
    );
    let lines: Vec<String> = scrub(&place.line("owner list --format json").ok()).lines().map(Into::into).collect();
    assert_eq!(
        lines,
        [
            r#"{"id":"[id]","key":"alice","name":"alice","time_zone":"Europe/Berlin","locale":"en","contacts":1,"active_tokens":1}"#,
            r#"{"id":"[id]","key":"bob","name":"bob","time_zone":"UTC","locale":"en","contacts":0,"active_tokens":1}"#,
        ]
    );
    let csv = scrub(&place.line("owner list --format csv").ok());
    assert!(csv.starts_with("id,key,name,time_zone,locale,contacts,active_tokens\n"), "{csv}");
    assert!(csv.contains("[id],alice,alice,Europe/Berlin,en,1,1\n"), "{csv}");

    let renamed = place.run(["owner", "rename", "bob", "Bob \"the builder\" Example"]).ok();
    assert_eq!(renamed, "key   bob\nwas   bob\nname  Bob \"the builder\" Example\n");
    assert_eq!(
        plain(&place.line("owner show bob").ok()),
        "owner          [id]\n\
         key            bob\n\
         name           Bob \"the builder\" Example\n\
         time zone      UTC\n\
         locale         en\n\
         tokens         1 active, 1 expired\n\
         next deadline  in [n] days, at the end of 31 January 2099 ([instant] UTC)\n\
         contact        none: nobody can be told\n"
    );
    let complaint = place.run(["owner", "rename", "bob", "two\r\nlines"]).fails(2);
    assert!(complaint.contains("a name is one line, without control characters"), "{complaint}");
    assert!(place.line("owner show nobody").fails(1).contains("there is no owner \"nobody\""));
    assert_eq!(place.line("owner show alcie").fails(1), "lapsed: there is no owner \"alcie\"; did you mean alice?\n");
    assert!(place.line("owner rename nobody x").fails(1).contains("there is no owner \"nobody\""));

    let complaint = place.line("owner remove bob").fails(1);
    assert_eq!(complaint, "lapsed: bob has active tokens (1); to end them with it, add --revoke-tokens\n");
    assert_eq!(place.line("owner remove bob --revoke-tokens").ok(), "removed  bob\n");
    assert!(place.line("owner show bob").fails(1).contains("there is no owner"));
    assert_eq!(described(place, ""), ["primary token"]);
    let (_, secret) = place.token("alice", "x", "30d");
    place.line("owner remove alice").fails(1);
    place.verify(&secret).ok();
    place.line("owner remove alice --revoke-tokens").ok();
    assert_eq!(place.verify(&secret).refused(), "unknown");
    // The address is free again, and the key.
    place.owner("alice", "alice@example.org");
}

#[test]
fn an_imported_owner_gets_its_primary_and_its_contacts_at_once() {
    completed(&Place::new());
}

#[tokio::test]
async fn an_imported_owner_gets_its_primary_and_its_contacts_at_once_on_postgresql() {
    let database = postgres::fresh().await;
    completed(&Place::with_store(&database.url));
}

fn completed(place: &Place) {
    place.run_with(["token", "import", "-"], "owner,description,expires_at\nbob,x,2099-01-31\n").ok();
    let added = place.line("owner add bob --email b@example.org --email a@example.org");
    assert_eq!(
        added.stderr,
        "Keep the secret now: it is not shown again.\nbob was imported before; now it has a primary token.\n"
    );
    let told = added.ok();
    assert_eq!((fact(&told, "owner"), fact(&told, "kind")), ("bob".into(), "primary".into()));
    place.verify(&fact(&told, "secret")).ok();
    let contacts = || {
        let list = place.line("owner contact list bob --format json").ok();
        list.lines().map(|line| json(line)["address"].to_string()).collect::<Vec<_>>()
    };
    assert_eq!(contacts(), ["\"a@example.org\"", "\"b@example.org\""]);
    // It has a primary now: nothing of a second attempt stays.
    let complaint = place.line("owner add bob --email c@example.org").fails(1);
    assert_eq!(complaint, "lapsed: owner bob exists already\n");
    assert_eq!(contacts().len(), 2);
    assert_eq!(described(place, "--owner bob").len(), 2);
}

#[test]
fn an_address_may_speak_for_several_owners() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    place.owner("bob", "bob@example.org");
    let own_zone = place.line("owner contact add bob new@example.org --time-zone Asia/Tokyo --locale de");
    assert_eq!(own_zone.stderr, "");
    assert_eq!(own_zone.ok(), "owner      bob\ncontact    new@example.org\ntime zone  Asia/Tokyo\nlocale     de\n");
    let told = place.line("owner contact add bob Alice@Example.ORG").ok();
    assert_eq!(told, "owner    bob\ncontact  alice@example.org\n");
    assert_eq!(place.line("owner contact add bob alice@example.org").ok(), told, "once more changes nothing");
    place.line("owner contact add bob new@example.org").ok();
    let list = place.line("owner contact list bob").ok();
    assert_eq!(
        list,
        "ADDRESS            TIME ZONE    LOCALE       SUPPRESSED\n\
         alice@example.org  the owner's  the owner's\n\
         bob@example.org    the owner's  the owner's\n\
         new@example.org    Asia/Tokyo   de\n"
    );
    let csv = scrub(&place.line("owner contact list bob --format csv").ok());
    assert_eq!(
        csv,
        "id,address,time_zone,locale,suppressed_at,suppressed_why\n\
         [id],alice@example.org,,,,\n\
         [id],bob@example.org,,,,\n\
         [id],new@example.org,Asia/Tokyo,de,,\n"
    );
    let lines = scrub(&place.line("owner contact list alice --format json").ok());
    assert_eq!(
        lines,
        "{\"id\":\"[id]\",\"address\":\"alice@example.org\",\"time_zone\":null,\"locale\":null,\
         \"suppressed_at\":null,\"suppressed_why\":null}\n"
    );
    // What is given for an address that exists holds for it, and the rest stays.
    let changed = place.line("owner contact add alice new@example.org --time-zone America/Lima");
    assert_eq!(changed.stderr, "This address speaks for 2 owners, and this holds for its mails about each.\n");
    changed.ok();
    let list = place.line("owner contact list bob").ok();
    assert_eq!(cells(list.lines().last().expect("a row")), ["new@example.org", "America/Lima", "de"]);
    place.line("owner contact remove alice new@example.org").ok();
    let complaint = place.line("owner contact remove alice bob@example.org").fails(1);
    assert_eq!(
        complaint,
        "lapsed: bob@example.org does not speak for alice; `lapsed owner contact list alice` tells who does\n"
    );
    let removed = place.line("owner contact remove bob alice@example.org");
    assert_eq!((removed.stdout.as_str(), removed.stderr.as_str()), ("owner    bob\nremoved  alice@example.org\n", ""));
    let last = place.line("owner contact remove alice alice@example.org");
    assert_eq!(last.stderr, "alice has no contact left: nobody can be told of its deadlines.\n");
    last.ok();
    let none = place.line("owner contact list alice");
    assert_eq!(none.stderr, "alice has no contact: nobody can be told of its deadlines.\n");
    assert_eq!(none.ok(), "");
    for address in ["nobody", "a b@example.org", "x@example.org\r\nBcc: y@example.org"] {
        let complaint = place.run(["owner", "contact", "add", "alice", address]).fails(2);
        assert!(complaint.contains("is not a mail address"), "{complaint}");
    }
}

/// Tokens in every status, of two owners and two sources, and of none.
fn a_mixed_store(mut place: Place) -> Place {
    place.set(KEEP, "36500d");
    let forge = "owner,description,expires_at,external_id,created_at,last_used_at,revoked_at\n\
        alice,one,2099-01-31,1,2021-01-01,2026-03-01,\n\
        bob,two,2020-01-31,2,2019-01-01,,\n\
        alice,three,2098-01-31,3,2020-01-01,2026-02-01,2026-06-01\n\
        bob,four,,4,2018-01-01,2026-04-01,\n";
    place.run_with(["token", "import", "-", "--source", "forge"], forge).ok();
    let cloud = "owner,description,expires_at,external_id,created_at\nalice,five \"and\" six,2097-01-31,5,2022-01-01\n";
    place.run_with(["token", "import", "-", "--source", "cloud"], cloud).ok();
    let create = ["token", "create", "--owner", "bob", "--description", "seven", "--expires", "20d", "--scope", "a"];
    place.run(create.iter().chain(&["--scope", "b"])).ok();
    place
}

#[test]
fn lists_of_tokens_are_filtered_and_sorted() {
    filtered_and_sorted(&a_mixed_store(Place::new()));
}

#[tokio::test]
async fn lists_of_tokens_are_filtered_and_sorted_on_postgresql() {
    let database = postgres::fresh().await;
    filtered_and_sorted(&a_mixed_store(Place::with_store(&database.url)));
}

fn filtered_and_sorted(place: &Place) {
    for (arguments, expected) in [
        ("", &["seven", "five \"and\" six", "one", "four", "two", "three"][..]),
        ("--owner alice", &["five \"and\" six", "one", "three"]),
        ("--status active", &["seven", "five \"and\" six", "one", "four"]),
        ("--status expired", &["two"]),
        ("--status revoked", &["three"]),
        ("--source forge", &["one", "four", "two", "three"]),
        ("--source cloud --owner alice", &["five \"and\" six"]),
        ("--source nowhere", &[]),
        ("--expiring-within 30d", &["seven"]),
        ("--expiring-within 19d", &[]),
        ("--expiring-within 30d --owner alice", &[]),
        ("--expiring-within 30d --status expired", &[]),
        ("--sort created", &["four", "two", "three", "one", "five \"and\" six", "seven"]),
        ("--sort used", &["two", "five \"and\" six", "seven", "three", "one", "four"]),
        ("--sort owner", &["five \"and\" six", "three", "one", "two", "seven", "four"]),
        ("--sort expires --status active --source forge", &["one", "four"]),
    ] {
        assert_eq!(described(place, arguments), expected, "{arguments}");
    }
    let none = place.line("token list --source nowhere");
    assert_eq!((none.stdout.as_str(), none.stderr.as_str()), ("", "No token fits.\n"));
    for (arguments, why) in [
        ("--status expird", "a status is active, expired or revoked"),
        ("--sort nme", "[possible values: expires, created, used, owner]"),
        ("--expiring-within soon", "\"soon\" is not a duration"),
        ("--format jsn", "a similar value exists: 'json'"),
    ] {
        let complaint = place.line(&format!("token list {arguments}")).fails(2);
        assert!(complaint.contains(why), "{complaint}");
    }
    assert!(place.line("token list --owner nobody").fails(1).contains("there is no owner \"nobody\""));
}

#[test]
fn csv_and_json_have_the_same_fields() {
    let place = a_mixed_store(Place::new());
    let lines = place.line("token list --format json").ok();
    let names = [
        "id",
        "owner",
        "kind",
        "description",
        "scopes",
        "status",
        "expires_at",
        "created_at",
        "last_used_at",
        "ended_at",
        "replaced_by",
        "source",
        "external_id",
    ];
    assert_eq!(
        scrub(lines.lines().next().expect("a line")),
        "{\"id\":\"[id]\",\"owner\":\"bob\",\"kind\":\"primary\",\"description\":\"seven\",\"scopes\":[\"a\",\"b\"],\
         \"status\":\"active\",\"expires_at\":\"[instant]\",\"created_at\":\"[instant]\",\"last_used_at\":null,\
         \"ended_at\":null,\"replaced_by\":null,\"source\":null,\"external_id\":null}"
    );
    let one = lines.lines().map(json).find(|token| token["description"] == "one").expect("the token");
    assert_eq!(
        (&one["expires_at"], &one["created_at"], &one["last_used_at"], &one["source"], &one["external_id"]),
        (
            &json("\"2099-02-01T00:00:00Z\""),
            &json("\"2021-01-01T00:00:00Z\""),
            &json("\"2026-03-01T00:00:00Z\""),
            &json("\"forge\""),
            &json("\"1\"")
        )
    );
    let text = place.line("token list --format csv").ok();
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    assert_eq!(reader.headers().expect("a header"), names.to_vec());
    let records: Vec<BTreeMap<String, String>> = reader.deserialize().map(|record| record.expect("a record")).collect();
    assert_eq!(records.len(), lines.lines().count());
    for (record, object) in records.iter().zip(lines.lines().map(json)) {
        for name in names {
            let expected = match &object[name] {
                serde_json::Value::Null => String::new(),
                serde_json::Value::Array(scopes) => {
                    scopes.iter().filter_map(|scope| scope.as_str()).collect::<Vec<_>>().join(" ")
                }
                value => value.as_str().expect("a text").to_owned(),
            };
            assert_eq!(record[name], expected, "{name}");
        }
    }
}

#[test]
fn status_tells_what_the_jobs_did_and_what_waits() {
    status_tells(Place::new());
}

#[tokio::test]
async fn status_tells_what_the_jobs_did_and_what_waits_on_postgresql() {
    let database = postgres::fresh().await;
    status_tells(Place::with_store(&database.url));
}

fn status_tells(mut place: Place) {
    place.configure(WITH_MAIL);
    place.empty_store();
    let before = place.line("status").ok();
    let none = "tokens    none\nmessages  none\nwaiting   0\n\nNo job has run yet: `lapsed run` starts them.\n";
    assert_eq!(before, none);
    assert_eq!(
        place.line("status --format json").ok(),
        "{\"jobs\":[],\"last_sent_at\":null,\"messages\":{},\"oldest_waiting_since\":null,\"tokens\":{},\"watermarks\":{}}\n"
    );
    let near = (SystemClock::default().now() + TimeDelta::days(5)).to_rfc3339();
    let list = format!("owner,emails,description,expires_at,created_at\nalice,a@example.org,x,{near},2020-01-01\n");
    let more = "alice,,past,2020-01-31,2019-01-01\nalice,,gone,2020-01-31,2019-01-01\nalice,,never,,2019-01-01\n";
    place.set(KEEP, "36500d");
    place.run_with(["token", "import", "-"], &(list + more)).ok();
    place.run(["token", "revoke", &short_of(&place, "never")]).ok();
    let unmarked = place.line("status").ok();
    assert_eq!(fact(&unmarked, "tokens"), "1 active, 2 past their deadline and not yet marked, 1 revoked");
    assert_eq!(
        json(&place.line("status --format json").ok())["tokens"],
        json("{\"active\":1,\"past_deadline\":2,\"revoked\":1}")
    );
    place.line("run --once").ok();
    let after = rows(&place.line("status").ok());
    assert_eq!(
        after,
        [
            "tokens | 1 active, 2 expired, 1 revoked",
            "messages | 1 sent",
            "waiting | 0",
            "last sent | [n] s ago",
            "reminders done | 30d lead, up to what was due [n] s ago",
            "reminders done | 7d lead, up to what was due [n] s ago",
            "reminders done | 1d lead, up to what was due [n] s ago",
            "",
            "JOB | LAST START | FINISHED | LEASE | RESULT",
            "expire | [n] s ago | [n] s ago | free | tokens expired: 2, settled: 2",
            "purge | [n] s ago | [n] s ago | free | reminders purged: 2",
            "reconcile | [n] s ago | [n] s ago | free | started over",
            "remind | [n] s ago | [n] s ago | free | reminders: 1, settled: 1",
        ]
    );
    let status = json(&place.line("status --format json").ok());
    assert_eq!(
        (&status["tokens"], &status["messages"]),
        (&json("{\"active\":1,\"expired\":2,\"revoked\":1}"), &json("{\"sent\":1}"))
    );
    assert_eq!(scrub(&status["last_sent_at"].to_string()), "\"[instant]\"");
    assert_eq!(status["jobs"].as_array().map(Vec::len), Some(4));
    let remind = &status["jobs"][3];
    assert_eq!(
        scrub(&remind.to_string()),
        "{\"error\":null,\"finished_at\":\"[instant]\",\"lease_until\":\"[instant]\",\"name\":\"remind\",\
         \"report\":\"reminders: 1, settled: 1\",\"started_at\":\"[instant]\"}"
    );
    assert_eq!(
        scrub(&status["watermarks"].to_string()),
        "{\"1d\":\"[instant]\",\"30d\":\"[instant]\",\"7d\":\"[instant]\"}"
    );
    place.line("status --format csv").fails(2);
}

#[test]
fn config_show_says_where_each_value_came_from() {
    let mut place = Place::new();
    place.configure(WITH_MAIL);
    place.set("LAPSED__STORE__URL", "postgres://lapsed:hunter2@db.example.org/lapsed");
    let shown = place.line("config show").ok();
    assert!(!shown.contains("hunter2"), "{shown}");
    let lines = rows(&shown);
    assert_eq!(lines[0], "KEY | VALUE | FROM");
    for expected in [
        "log.level | \"info\" | built-in default",
        "mail.from | \"Tokens <tokens@example.org>\" | lapsed.toml:4",
        "mail.maildir.path | \"mail\" | lapsed.toml:6",
        "reminders.lead_times | [\"30d\", \"7d\", \"1d\"] | built-in default",
        "store.url | \"postgres://lapsed:***@db.example.org/lapsed\" | environment variable LAPSED__STORE__URL",
    ] {
        assert!(lines.iter().any(|line| line == expected), "{expected}\nis not in:\n{shown}");
    }
    // Every key of the reference, and in each form.
    let reference = include_str!("../config/lapsed.toml");
    let keys = reference.lines().filter(|line| !line.starts_with('#') && line.contains(" = ")).count();
    assert_eq!(lines.len(), keys + 1);
    for format in ["json", "csv"] {
        let shown = place.line(&format!("config show --format {format}")).ok();
        assert!(!shown.contains("hunter2") && shown.contains("postgres://lapsed:***@db.example.org/lapsed"), "{shown}");
        assert_eq!(shown.lines().count(), keys + usize::from(format == "csv"));
    }
    // The type of a value does not depend on where it came from.
    place.set("LAPSED__REMINDERS__LEAD_TIMES", "14d, 2d");
    place.set("LAPSED__MAIL__SMTP__PORT", "2525");
    place.set("LAPSED__REMINDERS__EXPIRED_NOTICE", "false");
    let lines = place.line("config show --format json").ok();
    let values: BTreeMap<String, serde_json::Value> = lines
        .lines()
        .map(|line| (json(line)["key"].as_str().expect("a key").to_owned(), json(line)["value"].clone()))
        .collect();
    for (key, value) in [
        ("reminders.lead_times", "[\"14d\",\"2d\"]"),
        ("mail.smtp.port", "2525"),
        ("reminders.expired_notice", "false"),
        ("reminders.stale_after", "\"7d\""),
        ("mail.reply_to", "\"\""),
        ("mail.from", "\"Tokens <tokens@example.org>\""),
        ("store.url", "\"postgres://lapsed:***@db.example.org/lapsed\""),
    ] {
        assert_eq!(values[key], json(value), "{key}");
    }
    let csv = place.line("config show --format csv").ok();
    assert!(csv.contains("\nreminders.lead_times,14d 2d,environment variable "), "{csv}");
    place.configure("[mail]\nfrom = 7");
    assert!(place.line("config show").fails(2).contains("mail.from"));
    assert!(!place.path("lapsed.db").exists(), "it opens no store");
}

#[test]
fn completions_fit_their_shells() {
    let place = Place::new();
    for (shell, has) in [("bash", "complete -F _lapsed"), ("zsh", "#compdef lapsed"), ("fish", "complete -c lapsed")] {
        let script = place.line(&format!("completions {shell}")).ok();
        for word in [has, "completions", "expiring-within", "revoke-tokens", "contact"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
        let file = format!("lapsed.{shell}");
        place.write(&file, &script);
        match Command::new(shell).arg("-n").arg(place.path(&file)).stdin(Stdio::null()).status() {
            Ok(status) => assert!(status.success(), "{shell} -n"),
            Err(error) => assert_ne!(shell, "bash", "{error}"),
        }
    }
    assert!(place.line("completions csh").fails(2).contains("possible values: bash, elvish, fish, powershell, zsh"));
    assert!(!place.path("lapsed.db").exists(), "it opens no store");
}

/// Runs a `jq` line of ours over files of `tests/data`.
fn jq(arguments: &[&str]) -> String {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut command = Command::new("jq");
    command.arg("-c").args(arguments).current_dir(data).stdin(Stdio::null());
    let output = command.output().expect("jq; tests/run installs it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The tokens of a place: owner, description, status, deadline, and external id.
fn watched(place: &Place) -> Vec<String> {
    let list = place.line("token list --sort owner --format json").ok();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or("-").to_owned();
    let row = |token: serde_json::Value| {
        ["owner", "description", "status", "expires_at", "external_id"].map(|name| text(&token[name])).join(" | ")
    };
    list.lines().map(json).map(row).collect()
}

#[test]
fn gitlabs_answer_becomes_a_list() {
    let place = Place::new();
    let list = jq(&["--slurpfile", "users", "gitlab-users.json", "-f", "gitlab.jq", "gitlab-tokens.json"]);
    let import = ["token", "import", "-", "--source", "gitlab", "--strict"];
    assert_eq!(place.run_with(import, &list).ok(), counts(3, 3, 0, 0, 0));
    assert_eq!(
        watched(&place),
        [
            "gitlab-user-1234 | Registry mirror | active | - | 57",
            "mira | Laptop, \"old\" | revoked | 2099-02-28T00:00:00Z | 42",
            "renovate-bot | Renovate | active | 2099-01-31T00:00:00Z | 41",
        ]
    );
    let contacts = place.line("owner contact list mira").ok();
    assert!(contacts.contains("mira.mueller@example.org"), "{contacts}");
    assert_eq!(place.run_with(import, &list).ok(), counts(3, 0, 0, 3, 0));
    // Without the users, the numbers of GitLab stand for them.
    let list = jq(&["-f", "gitlab.jq", "gitlab-tokens.json"]);
    assert_eq!(Place::new().run_with(import, &list).ok(), counts(3, 3, 0, 0, 0));
}

#[test]
fn githubs_answers_become_a_list() {
    let mut place = Place::new();
    place.set(KEEP, "36500d");
    let emails = "github-emails.json";
    let files = ["github-fine-grained.json", "github-classic.json"];
    let list = jq(&["--slurpfile", "emails", emails, "-f", "github.jq", files[0], files[1]]);
    let import = ["token", "import", "-", "--source", "github", "--strict"];
    assert_eq!(place.run_with(import, &list).ok(), counts(4, 4, 0, 0, 0));
    assert_eq!(
        watched(&place),
        [
            "hubot | deploy | expired | 2025-01-09T18:00:00Z | fine-grained-98801",
            "hubot | classic token | active | - | classic-161197",
            "octocat | gh on the laptop | active | 2099-02-25T19:06:43Z | classic-161195",
            "octocat | Release notes | active | 2099-11-16T15:47:09Z | fine-grained-98716",
        ]
    );
    assert!(place.line("owner contact list octocat").ok().contains("octocat@example.org"));
    assert_eq!(place.run_with(import, &list).ok(), counts(4, 0, 0, 4, 0));
    let list = jq(&["-f", "github.jq", files[0]]);
    let told = Place::new().run_with(import, &list).ok();
    assert_eq!((fact(&told, "added"), fact(&told, "left out")), ("1".into(), "1".into()), "one expired in 2025");
}

#[test]
fn the_schedule_says_what_comes_next_in_both_zones() {
    let mut place = Place::new();
    place.set("LAPSED__SCHEDULE__TIME_ZONE", "Europe/Berlin");
    place.set("LAPSED__SCHEDULE__PURGE", "30 2 * * *");
    place.set("LAPSED__SCHEDULE__RECONCILE", "CRON_TZ=Asia/Kolkata 0 30 9 * * *");
    let lines = place.line("schedule --next 3 --from 2026-10-24 --format csv").ok();
    let of = |job: &str| -> Vec<&str> { lines.lines().filter(|line| line.starts_with(job)).collect() };
    assert_eq!(lines.lines().next(), Some("job,expression,time_zone,at,local"));
    assert_eq!(
        of("purge"),
        [
            "purge,30 2 * * *,Europe/Berlin,2026-10-24T00:30:00Z,2026-10-24T02:30:00+02:00",
            "purge,30 2 * * *,Europe/Berlin,2026-10-25T00:30:00Z,2026-10-25T02:30:00+02:00",
            "purge,30 2 * * *,Europe/Berlin,2026-10-26T01:30:00Z,2026-10-26T02:30:00+01:00",
        ]
    );
    assert_eq!(of("reconcile")[0].split(',').nth(3), Some("2026-10-24T04:00:00Z"));
    let table = place.line("schedule --next 1 --from 2026-10-25T00:00:00Z").ok();
    assert!(fact(&table, "purge").starts_with("At 02:30. (30 2 * * *, Europe/Berlin)"), "{table}");
    for (wrong, why) in [("--from tomorrow", "write a date"), ("--next 0", "0 is not in 1..=1000")] {
        let complaint = place.line(&format!("schedule {wrong}")).fails(2);
        assert!(complaint.contains(why), "{complaint}");
    }
    place.set("LAPSED__SCHEDULE__TIME_ZONE", "Mars/Olympus");
    assert!(place.line("schedule").fails(2).contains("no time zone is called \"Mars/Olympus\""));
}

/// What happened lies behind us: whatever the machine's load, all of it is over.
#[tokio::test]
async fn coverage_says_who_knew_in_time_and_why_others_did_not() {
    let mut world = World::<OnSqlite>::new().await;
    let place = Place::with_store(&world.backend.url());
    let none = place.line("coverage").ok();
    assert_eq!(fact(&none, "told in time"), "0 of 0 that were owed a reminder: no reminder was owed");
    let now = SystemClock::default().now();
    let deadline = now - TimeDelta::hours(12);
    world.clock.set(now - days(50));
    let (alice, bot) = (world.owner("alice", &["alice@example.org"]).await, world.owner("bot", &[]).await);
    let sec = world.owner("sec", &["sec@example.org"]).await;
    for owner in [alice, bot, sec] {
        world.imported(owner, world.now(), deadline).await;
    }
    // By its own policy it is told three days ahead, which would be too late by that for all.
    world.rules.policy = Policy::new([lead(7)], true, days(7));
    world.rules.groups = Arc::from([Group {
        matches: Match { owner: Some(Pattern::parse("sec", false).expect("a pattern")), ..Match::default() },
        policy: Policy::new([lead(3)], true, days(7)),
        digest: world.rules.digest.clone(),
        contacts: Vec::new(),
    }]);
    let mut courier = world.courier();
    for ahead in [days(7), days(3), TimeDelta::hours(1), TimeDelta::zero()] {
        world.clock.set(deadline - ahead);
        if ahead == TimeDelta::hours(1) {
            world.imported(alice, world.now(), deadline).await;
        }
        world.expire().await;
        world.remind().await;
        world.deliver(&mut courier.deliverer).await;
    }
    place.configure("[reminders]\nlead_times = [\"7d\"]\n[[reminders.policy]]\nmatch = { owner = \"sec\" }\nlead_times = [\"3d\"]\n");
    let covered = place.line("coverage").ok();
    assert_eq!(fact(&covered, "expired"), "4 tokens", "{covered}");
    assert_eq!(fact(&covered, "told in time"), "2 of 3 that were owed a reminder: 66.6 %", "{covered}");
    assert!(fact(&covered, "not owed").starts_with("1 that"), "{covered}");
    let last = cells(covered.lines().last().expect("a row")).join(" | ");
    assert!(last.contains("bot | deploy key") && last.ends_with("the owner has no contact that takes mail"), "{last}");
    let csv = place.line("coverage --since 1d --format csv").ok();
    assert_eq!(csv.lines().next(), Some("id,owner,description,expired_at,why"));
    assert_eq!(csv.lines().count(), 2, "{csv}");
    assert_eq!(place.line("coverage --since 1h --format csv").ok().lines().count(), 1, "nothing expired since");
}

#[test]
fn a_check_says_what_the_daemon_would_miss() {
    let place = Place::new();
    place.configure(WITH_MAIL);
    place.empty_store();
    let ran = place.line("check");
    assert_eq!(ran.status, Some(0), "a warning is not a failure: {ran}");
    let found: Vec<(String, String)> =
        ran.stdout.lines().skip(1).map(|line| (cells(line)[0].to_owned(), cells(line)[1].to_owned())).collect();
    let of = |what: &str| found.iter().find(|(name, _)| name == what).map(|(_, result)| result.as_str());
    for what in ["configuration", "database", "indexes", "clock", "templates", "mail"] {
        assert_eq!(of(what), Some("ok"), "{ran}");
    }
    assert_eq!(of("fallback"), Some("warning"), "nobody would hear: {ran}");

    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = nobody.local_addr().expect("an address").port();
    drop(nobody);
    place.configure(&format!(
        "[mail]\ntransport = \"smtp\"\nfrom = \"tokens@example.org\"\nfallback_to = \"ops@example.org\"\n\
         [mail.smtp]\nhost = \"127.0.0.1\"\nport = {port}\ntls = \"none\"\n"
    ));
    let ran = place.line("check --format json");
    assert_eq!(ran.status, Some(1), "{ran}");
    let failed: Vec<serde_json::Value> = ran
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .filter(|check: &serde_json::Value| check["ok"] == false)
        .collect();
    assert_eq!(failed.len(), 1, "{ran}");
    assert_eq!(failed[0]["check"], "mail");
    assert_eq!(failed[0]["result"], "failed");
    assert!(ran.stderr.contains("one check failed"), "{ran}");
    assert!(failed[0]["details"].as_str().is_some_and(|details| details.contains("see [mail.smtp]")), "{ran}");
    assert!(ran.stdout.contains("not looked up: example.org is for examples"), "{ran}");
}

#[test]
fn a_mail_can_be_read_before_and_sent_to_try() {
    let place = Place::new();
    let reminder = place.line("mail preview").ok();
    assert!(reminder.starts_with("Subject: 2 tokens expire soon, the first in 7 days\n\n"), "{reminder}");
    assert!(place.line("mail preview --kind held").ok().contains("lapsed outbox release --all"));
    assert!(place.line("mail preview --kind escalation --part html").ok().starts_with("<!DOCTYPE html>"));
    let german = place.line("mail preview --sample --kind expired --locale de-AT").ok();
    // It expired some minutes ago: soon after midnight that was yesterday.
    let day = ["heute", "gestern"].into_iter().find(|day| german.contains(&format!("ist {day} abgelaufen\n")));
    assert!(day.is_some() && german.starts_with("Subject: „deploy key (CI)“ ist "), "{german}");
    assert!(place.line("mail preview --part ics").ok().starts_with("BEGIN:VCALENDAR\r\nVERSION:2.0\r\n"));
    assert!(place.line("mail preview --kind expired --part ics").fails(1).contains("no deadline in it lies ahead"));
    let opened = place.line("mail preview --open");
    let files: Vec<&str> = opened.stdout.lines().collect();
    assert!(files.iter().all(|file| std::path::Path::new(file).is_file()), "{files:?}");
    let names: Vec<&str> = files.iter().filter_map(|file| file.rsplit('/').next()).collect();
    assert_eq!(names, ["mail.eml", "mail.txt", "deadlines.ics", "mail.html"]);
    assert!(opened.stderr.contains("open mail.html in a browser"), "there is no desktop here: {}", opened.stderr);
    place.line("mail test me@example.org").fails(2);

    place.configure(&format!("{WITH_MAIL}[guard]\nmessages_per_hour = 1\n"));
    place.owner("alice", "alice@example.org");
    let (id, _) = place.token("alice", "deploy <b>key</b>", "40d");
    let about = place.line(&format!("mail preview --token {id}")).ok();
    assert!(about.starts_with("Subject: \"deploy <b>key</b>\" expires in 40 days\n"), "{about}");
    let html = place.line(&format!("mail preview --token {id} --part html")).ok();
    assert!(html.contains("deploy &lt;b&gt;key") && !html.contains("<b>key"), "{html}");
    let never = place.line("token create --owner alice --description eternal").ok();
    let complaint = place.line(&format!("mail preview --token {}", fact(&never, "token"))).fails(1);
    assert!(complaint.contains("never expires"), "{complaint}");

    let sent = place.line("mail test me@example.org").ok();
    assert!(fact(&sent, "the answer").starts_with("written to mail/new/"), "{sent}");
    let mails = place.mails("mail");
    let mail = mail_parser::MessageParser::default().parse(&mails[0]).expect("a mail");
    assert_eq!(mail.subject(), Some("Test of lapsed: mail from here arrives"));
    assert_eq!(place.line("outbox list --all").stderr, "There is no message.\n", "the outbox knows nothing of it");
}

#[test]
fn a_forecast_counts_what_comes_and_compares() {
    let place = Place::new();
    place.configure(WITH_MAIL);
    place.empty_store();
    assert!(place.line("forecast").stderr.contains("Nothing expires, and nobody is mailed."));
    place.owner("alice", "alice@example.org");
    for description in ["one", "two"] {
        place.token("alice", description, "40d");
    }
    place.line("owner add bot --email bot@example.org").ok();
    place.line("owner contact remove bot bot@example.org").ok();
    place.token("bot", "nobody's", "3d");
    let ran = place.line("forecast --days 60");
    // Leads of 30, 7 and 1 days and the notice, for one address; a 3-day token owes one lead and the notice, to nobody.
    assert_eq!(fact(&ran.stderr, "expire"), "3 tokens within 60 days (UTC)", "{ran}");
    assert_eq!(fact(&ran.stderr, "mails"), "4 about 8 reminders", "{ran}");
    assert!(fact(&ran.stderr, "nobody").starts_with("2 reminders"), "{ran}");
    let rows: Vec<Vec<&str>> = ran.stdout.lines().skip(1).map(cells).collect();
    assert_eq!(rows.len(), 6, "{ran}");
    assert_eq!(&rows[2][1..], ["0", "2", "1", "##############################"], "{ran}");
    let csv = place.line("forecast --days 60 --format csv").ok();
    assert_eq!((csv.lines().next(), csv.lines().count()), (Some("day,expire,reminders,mails,unreachable"), 61));

    place.write("quiet.toml", &format!("{WITH_MAIL}[reminders]\nlead_times = [\"7d\"]\nexpired_notice = false\n"));
    let compared = place.line("forecast --days 60 --compare quiet.toml");
    assert_eq!(fact(&compared.stderr, "with the other"), "1 about 2 reminders, -3", "{compared}");
    place.line("forecast --compare nowhere.toml").fails(2);
    place.line("forecast --days 0").fails(2);
}

#[test]
fn who_watches_a_token_and_which_policy_it_follows_is_shown() {
    let place = Place::new();
    place.configure(
        r#"
        [[reminders.policy]]
        match.description = "*production*"
        lead_times = ["14d", "60d"]
        contacts = ["security@example.org"]
        "#,
    );
    place.owner("alice", "alice@example.org");
    let create = ["token", "create", "--owner", "alice", "--expires", "2099-01-31", "--description", "Production CA"];
    place.run(create.iter().chain(["--watch", "ravi@example.org", "--watch", "bo@example.org"].iter())).ok();
    let id = short_of(&place, "Production CA");
    let shown = place.run(["token", "show", &id]).ok();
    assert_eq!(fact(&shown, "watched by"), "bo@example.org, ravi@example.org");
    let policy = "60d, 14d, by reminders.policy[1] (description = \"*production*\"), also to security@example.org";
    assert_eq!(fact(&shown, "reminders"), policy);

    let edited = place.run(["token", "edit", &id, "--unwatch", "bo@example.org", "--unwatch", "eve@example.org"]);
    assert_eq!(fact(&edited.stdout, "watched by"), "ravi@example.org");
    assert_eq!(edited.stderr, "eve@example.org does not watch this token.\n");
    let renamed = place.run(["token", "edit", &id, "--description", "test CA"]).ok();
    assert_eq!(fact(&renamed, "watched by"), "ravi@example.org");
    assert_eq!(fact(&place.run(["token", "show", &id]).ok(), "reminders"), "30d, 7d, 1d");

    let config = place.line("config show --format json").ok();
    let line = config.lines().find(|line| line.contains("policy[1].lead_times")).expect("the policy");
    let expected = r#"{"key":"reminders.policy[1].lead_times","value":["14d","60d"],"from":"lapsed.toml:4"}"#;
    assert_eq!(line, expected);
    place.configure("[[reminders.policy]]\nmatch.kind = \"third\"\n");
    let told = place.line("token list").fails(2);
    assert!(told.contains("reminders.policy[1].match.kind = \"third\" (lapsed.toml:2): must be"), "{told}");
}

#[test]
fn a_forecast_compares_policies() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let soon = ["token", "create", "--owner", "alice", "--expires", "20d", "--description", "soon"];
    place.run(soon.iter().chain(["--watch", "ravi@example.org"].iter())).ok();
    place.write(
        "other.toml",
        "[[reminders.policy]]\nmatch.owner = \"ali*\"\nlead_times = [\"3d\"]\ncontacts = [\"security@example.org\"]\n",
    );
    let told = place.line("forecast --days 30 --compare other.toml");
    // Seven days, one day and the notice, to two each; with the policy three days and the notice, to three each.
    assert!(told.stderr.contains("6 about 6 reminders"), "{told}");
    assert!(told.stderr.contains("6 about 6 reminders, +0"), "{told}");
    assert!(place.line("owner list").ok().lines().count() == 2, "and nothing is made for it");
}
