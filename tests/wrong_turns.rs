//! Wrong turns: each ends with one clear line, a status that is not 0, and nothing lost. None panics.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::cli::{LAPSED, Place, Ran, fact, finish};
use crate::support::postgres;
use chrono::TimeDelta;
use lapsed::clock::{Clock, SystemClock};
use sqlx::{Connection, PgConnection, SqliteConnection};

const HEADER: &str = "owner,emails,description,expires_at,external_id\n";

/// A list of this many good rows, a hundred for each owner.
fn list(rows: u32) -> String {
    (0..rows).fold(HEADER.to_owned(), |mut text, n| {
        writeln!(text, "o{},o{}@example.org,token {n},2099-01-31,{n}", n / 100, n / 100).expect("a text grows");
        text
    })
}

async fn open(place: &Place) -> SqliteConnection {
    let url = format!("sqlite:{}", place.path("lapsed.db").display());
    SqliteConnection::connect(&url).await.expect("the store")
}

async fn count(connection: &mut SqliteConnection, query: &'static str) -> u64 {
    let count: i64 = sqlx::query_scalar(query).fetch_one(connection).await.expect(query);
    u64::try_from(count).expect("a count")
}

/// How many tokens a place has.
async fn tokens(place: &Place) -> u64 {
    count(&mut open(place).await, "SELECT COUNT(*) FROM tokens").await
}

/// The number of a fact.
fn number(text: &str, name: &str) -> u64 {
    fact(text, name).parse().expect(text)
}

#[tokio::test]
async fn a_store_of_a_newer_version_is_left_alone() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    let newer = "INSERT INTO _sqlx_migrations VALUES (9999, 'of tomorrow', CURRENT_TIMESTAMP, 1, X'00', 0)";
    let mut store = open(&place).await;
    sqlx::raw_sql(newer).execute(&mut store).await.expect("a migration of tomorrow");
    store.close().await.expect("the end");
    for words in ["token list", "owner remove alice --revoke-tokens", "status"] {
        assert_eq!(
            place.line(words).fails(1),
            "lapsed: the database has migration 9999, which this version of lapsed does not know: it was last used by a \
             newer one; install that, or restore a backup made before it\n"
        );
    }
    assert_eq!(tokens(&place).await, 1);
}

#[test]
fn what_is_no_list_says_so() {
    let place = Place::new();
    std::fs::create_dir(place.path("directory")).expect("a directory");
    let columns =
        "owner, description, expires_at, emails, watch, external_id, created_at, last_used_at, revoked_at, time_zone";
    let no_column = |name: &str, line: &str| {
        format!(
            "has no column \"{name}\"; its first line is \"{line}\", where a CSV names its columns: owner, description, expires_at, \
             which each list needs, and as far as it has them emails, watch, external_id, created_at, last_used_at, \
             revoked_at, time_zone"
        )
    };
    for (file, content, complaint) in [
        ("missing.csv", None, "cannot open missing.csv: No such file or directory (os error 2)".to_owned()),
        ("directory", None, "directory is a directory; name the file in it".into()),
        (
            "empty.csv",
            Some(&b""[..]),
            format!("empty.csv is empty; the first line of a CSV names its columns: {columns}"),
        ),
        (
            "blank.csv",
            Some(b"\r\n \n"),
            format!("blank.csv is empty; the first line of a CSV names its columns: {columns}"),
        ),
        ("no-header.csv", Some(b"alice,x,2099-01-31\n"), format!("no-header.csv {}", no_column("owner", "alice,x,2099-01-31"))),
        ("column.csv", Some(b"owner,description\nalice,x\n"), format!("column.csv {}", no_column("expires_at", "owner,description"))),
        (
            "semicolons.csv",
            Some(b"owner;description;expires_at\nalice;x;\n"),
            "semicolons.csv has no column \"owner\"; its first line is \"owner;description;expires_at\": separate columns \
             with commas, not with semicolons"
                .into(),
        ),
        ("utf16.csv", Some(b"\xff\xfeo\0w\0n\0e\0r\0,\0\n\0"), "utf16.csv is UTF-16; make it UTF-8 first, for example with iconv -f UTF-16 -t UTF-8".into()),
        ("twice.csv", Some(b"owner,description,expires_at,Owner\n"), "twice.csv has two columns \"owner\"".into()),
        (
            "array.json",
            Some(b"[{\"owner\":\"alice\"}]"),
            "array.json is one JSON array; make it lines, for example with: jq -c '.[]'".into(),
        ),
    ] {
        if let Some(content) = content {
            std::fs::write(place.path(file), content).expect("a file");
        }
        let told = place.line(&format!("token import {file}")).fails(1);
        let last = told.lines().last().expect("a line");
        assert_eq!(last, format!("lapsed: {complaint}"), "{file}");
    }
    let told = place.line("token import -").fails(1);
    assert!(told.starts_with("lapsed: standard input is empty; "), "{told}");
    assert_eq!(place.line("token list").ok(), "");
}

#[test]
fn a_row_that_cannot_be_is_one_bad_row() {
    let place = Place::new();
    let long = "ü".repeat(201);
    let mut content = format!(
        "{HEADER}\
         alice,,good,2099-01-31,1\n\
         alice,,\"two\r\nlines\",2099-01-31,2\n\
         alice,,{long},2099-01-31,3\n\
         \"al\nice\",,x,2099-01-31,4\n\
         alice,\"a@example.org\r\nBcc: b@example.org\",x,2099-01-31,5\n\
         alice,,x,10000-01-01,6\n\
         alice,,x,9999-12-31,7\n\
         alice,,x,1969-01-01,8\n\
         alice,,tab\there,2099-01-31,9\n"
    )
    .into_bytes();
    content.extend(b"alice,,\xff\xfe,2099-01-31,10\nalice,,also good,2099-01-31T00:00:00+14:00,11\n");
    std::fs::write(place.path("list.csv"), content).expect("a file");
    let imported = place.line("token import list.csv");
    assert_eq!(imported.status, Some(1), "{imported}");
    let told: Vec<&str> = imported.stderr.lines().collect();
    for (told, (line, why)) in told.iter().zip([
        (3, "description: a description is one line, without control characters"),
        (5, "description: a description has at most 200 characters, and this one has 201"),
        (6, "owner: a key has no spaces and no control characters"),
        (8, "is not a mail address"),
        (10, "expires_at: "),
        (11, "expires_at: the deadline lies beyond 9999-12-31T23:59:59Z; use `never`"),
        (12, "expires_at: the deadline lies before the year 1970"),
        (13, "description: a description is one line, without control characters"),
        (14, "its text is not UTF-8"),
    ]) {
        assert!(told.starts_with(&format!("line {line}: ")) && told.contains(why), "{line}: {told}\n{imported}");
    }
    assert_eq!(told.len(), 11, "{imported}");
    assert!(told[9].starts_with("one owner has no contact, so nobody can be told"), "{imported}");
    assert_eq!(number(&imported.stdout, "added"), 2);
    for name in ["a\nb", "a\r\nBcc: x@example.org", ""] {
        let complaint = place.run(["token", "import", "list.csv", "--source", name]).fails(2);
        assert!(complaint.contains("a name "), "{complaint}");
        place.run(["owner", "rename", "alice", name]).fails(2);
    }
    // A quote that never closes takes all that follows with it; what came before it stays.
    let endless = format!("{HEADER}bob,,kept,2099-01-31,1\nbob,,\"open,2099-01-31,2\n{}", "x,\n".repeat(400_000));
    place.write("endless.csv", &endless);
    let told = place.line("token import endless.csv");
    assert_eq!((told.status, number(&told.stdout, "added")), (Some(1), 1), "{told}");
    assert!(told.stderr.contains("a row of more than a mebibyte; is a closing quote missing?"), "{told}");
}

#[test]
fn a_bad_list_stays_bad_when_nobody_reads_on() {
    let place = Place::new();
    let mut bad = String::from(HEADER);
    (0..10_000).for_each(|n| writeln!(bad, "alice,nobody,x,2099-01-31,{n}").expect("a text grows"));
    bad += "alice,,good,2099-01-31,good\n";
    place.write("bad.csv", &bad);
    let line = "\"$0\" --config lapsed.toml token import bad.csv 2>&1 | head -n 3; echo \"${PIPESTATUS[0]}\"";
    let mut command = Command::new("bash");
    command.args(["-c", line, LAPSED]).current_dir(place.path(""));
    let told = finish(command, "").ok();
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines[0], "line 2: emails: \"nobody\" is not a mail address: it has no @");
    assert_eq!((lines.len(), lines[3]), (4, "1"), "{told}");
    assert_eq!(place.line("token list").ok().lines().count(), 2, "the good row landed");
}

#[test]
fn a_reader_that_goes_away_is_no_error_in_any_format() {
    let place = Place::new();
    // More than any pipe and any buffer holds.
    place.write("list.csv", &list(3_000));
    place.line("token import list.csv").ok();
    for format in ["table", "json", "csv"] {
        for list in ["token list", "owner list", "owner contact list o1", "config show"] {
            for reads in [0, 1] {
                closes_after(&place, &format!("{list} --format {format}"), reads);
            }
        }
    }
    for words in ["status", "status --format json", "owner show o1", "completions bash"] {
        closes_after(&place, words, 0);
    }
}

/// Runs a command whose reader reads so many bytes and then goes away.
#[track_caller]
fn closes_after(place: &Place, words: &str, reads: usize) {
    let mut command = place.bare(["--config", "lapsed.toml"].into_iter().chain(words.split(' ')));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program");
    let mut reader = child.stdout.take().expect("a pipe");
    reader.read_exact(&mut vec![0; reads]).expect("some bytes");
    drop(reader);
    let ran = Ran::new(words.into(), child.wait_with_output().expect("the program ends"));
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(0), ""), "{ran}");
}

/// Starts an import from standard input.
fn importing(place: &Place, more: &[&str]) -> Child {
    let words = ["--config", "lapsed.toml", "token", "import", "-"];
    let mut command = place.bare(words.iter().chain(more));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("the program")
}

fn interrupt(child: &Child) {
    let sent = Command::new("sh").args(["-c", &format!("kill -s INT {}", child.id())]).status().expect("sh");
    assert!(sent.success());
}

#[tokio::test]
async fn an_import_that_is_interrupted_goes_on_when_it_is_repeated() {
    let place = Place::new();
    place.empty_store();
    let text = list(20_000);
    let (first, _) = text.split_at(text.len() / 2);
    let mut child = importing(&place, &[]);
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(first.as_bytes()).expect("the program reads");
    let mut store = open(&place).await;
    let start = Instant::now();
    while count(&mut store, "SELECT COUNT(*) FROM tokens").await == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing is imported");
    }
    interrupt(&child);
    // The input stays open: it is the signal that ends the import.
    let ran = Ran::new("token import -".into(), child.wait_with_output().expect("the program ends"));
    drop(input);
    assert_eq!(ran.status, Some(1), "{ran}");
    assert_eq!(
        ran.stderr,
        "lapsed: interrupted: what was counted above is in the store; import the list again to go on\n"
    );
    let (told, kept) = (number(&ran.stdout, "added"), tokens(&place).await);
    assert!(0 < told && told <= kept && kept <= 10_000, "told {told}, kept {kept}");

    place.write("list.csv", &text);
    let again = place.line("token import list.csv").ok();
    assert_eq!((number(&again, "unchanged"), number(&again, "added")), (kept, 20_000 - kept));
    assert_eq!(tokens(&place).await, 20_000);
}

#[tokio::test]
async fn a_strict_import_that_is_interrupted_leaves_nothing() {
    let place = Place::new();
    place.empty_store();
    let mut child = importing(&place, &["--strict"]);
    let mut input = child.stdin.take().expect("a pipe");
    // More than the program reads ahead: when all of this is written, it has begun.
    input.write_all(list(20_000).as_bytes()).expect("the program reads");
    interrupt(&child);
    let ran = Ran::new("token import - --strict".into(), child.wait_with_output().expect("the program ends"));
    drop(input);
    assert_eq!((ran.status, number(&ran.stdout, "added")), (Some(1), 0), "{ran}");
    assert_eq!(tokens(&place).await, 0);
}

#[tokio::test]
async fn a_prune_that_is_interrupted_stops_between_two_transactions() {
    let database = postgres::fresh().await;
    let place = Place::with_store(&database.url);
    place.write("all.csv", &list(1_000));
    place.write("one.csv", &list(1));
    place.line("token import all.csv").ok();
    // Somebody has one of the tokens that end first, so that the program must wait in the middle.
    let mut store = PgConnection::connect(&database.url).await.expect("the store");
    let active = "SELECT COUNT(*) FROM tokens WHERE status = 'active'";
    let lock = "SELECT id FROM tokens WHERE external_id <> '0' ORDER BY bucket, id LIMIT 1 FOR UPDATE";
    sqlx::raw_sql("BEGIN").execute(&mut store).await.expect("a transaction");
    sqlx::raw_sql(lock).execute(&mut store).await.expect("the lock");
    let words = ["--config", "lapsed.toml", "token", "import", "one.csv", "--prune", "--force"];
    let mut command = place.bare(words);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("the program");
    let waiting =
        "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    // Not from within the transaction, where this does not change.
    let mut watch = PgConnection::connect(&database.url).await.expect("the store");
    let start = Instant::now();
    while sqlx::query_scalar::<_, i64>(waiting).fetch_one(&mut watch).await.expect(waiting) == 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "nobody waits for the lock");
    }
    interrupt(&child);
    sqlx::raw_sql("ROLLBACK").execute(&mut store).await.expect("the end of the lock");
    let ran = Ran::new("token import --prune".into(), child.wait_with_output().expect("the program ends"));
    let ended = number(&ran.stdout, "ended");
    assert!(0 < ended && ended < 999, "{ran}");
    let told = format!(
        "lapsed: interrupted: the list is imported, and {ended} of the 999 tokens that it no longer has were ended; \
         import it again to end the others\n"
    );
    assert_eq!((ran.status, &ran.stderr), (Some(1), &told));
    let left: i64 = sqlx::query_scalar(active).fetch_one(&mut store).await.expect(active);
    assert_eq!(left.unsigned_abs(), 1_000 - ended);
    assert_eq!(number(&place.run(&words[2..]).ok(), "ended"), 999 - ended);
}

#[tokio::test]
async fn a_store_that_stays_locked_is_told_as_busy() {
    let place = Place::new();
    place.owner("alice", "alice@example.org");
    place.write("list.csv", &list(10));
    let mut writer = open(&place).await;
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut writer).await.expect("the lock");
    // At the same time, for each waits as long as it can.
    std::thread::scope(|scope| {
        for words in [
            "token create --owner alice --description x",
            "owner contact add alice b@example.org",
            "owner rename alice b",
        ] {
            let mut command = place.bare(["--config", "lapsed.toml"].into_iter().chain(words.split(' ')));
            command.stdin(Stdio::null());
            scope.spawn(move || {
                let start = Instant::now();
                let complaint = finish(command, "").fails(1);
                assert!(complaint.starts_with("lapsed: the database was busy: "), "{words}: {complaint}");
                assert_eq!(complaint.lines().count(), 1, "{complaint}");
                assert!(start.elapsed() > Duration::from_secs(10), "{words}: {:?}", start.elapsed());
            });
        }
    });
    sqlx::raw_sql("ROLLBACK").execute(&mut writer).await.expect("the end of the lock");
    assert_eq!(place.line("token import list.csv").ok().lines().count(), 5);
    assert_eq!(tokens(&place).await, 11);
}

/// What happens where nothing more can be written: a large import fails, and what it told stays.
fn full(place: &Place, prologue: &str, mut shell: Command) {
    let script = format!(
        "{prologue}\n\
         place=$1\n\
         lapsed() {{ \"$0\" --config \"$place/lapsed.toml\" \"$@\"; }}\n\
         run() {{ lapsed \"$@\"; echo \"status $?\" >&2; }}\n\
         run owner add alice --email alice@example.org >/dev/null 2>&1 || exit 70\n\
         run token import \"$place/list.csv\" >\"$place/imported\" 2>\"$place/complaint\"\n\
         lapsed token list >\"$place/listed\" || exit 71\n\
         exit 0\n"
    );
    place.write("list.csv", &list(100_000));
    shell.args(["-c", &script, LAPSED]).arg(place.path("")).stdin(Stdio::null()).current_dir(place.path(""));
    shell.env("LAPSED__STORE__URL", "sqlite:lapsed.db");
    let output = shell.output().expect("a shell");
    let read = |name| std::fs::read_to_string(place.path(name)).unwrap_or_default();
    let (imported, complaint, listed) = (read("imported"), read("complaint"), read("listed"));
    assert!(output.status.success(), "{}: {}\n{complaint}", output.status, String::from_utf8_lossy(&output.stderr));
    assert!(!complaint.contains("panicked"), "{complaint}");
    let lines: Vec<&str> = complaint.lines().collect();
    assert_eq!((lines.len(), lines.last()), (2, Some(&"status 1")), "{complaint}");
    assert!(lines[0].starts_with("lapsed: the store cannot be written: "), "{complaint}");
    let kept = listed.lines().count() as u64;
    // The header of the list, and alice's own token.
    assert!(kept >= 2 && number(&imported, "added") <= kept - 2, "{imported}\n{kept} lines");
}

#[test]
fn a_full_disk_is_told_and_loses_nothing() {
    let place = Place::new();
    std::fs::create_dir(place.path("small")).expect("a directory");
    // A mount of its own, which goes away with the process.
    let probe = "mount -t tmpfs -o size=64k lapsed-full small";
    let namespace = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash"]).current_dir(place.path(""));
        command.args((!script.is_empty()).then_some(["-c", script]).into_iter().flatten());
        command
    };
    let possible =
        namespace(probe).stdin(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    if !possible {
        eprintln!("skipped: a file system of its own needs root");
        return;
    }
    full(&place, "mount -t tmpfs -o size=3m lapsed-full small && cd small || exit 69", namespace(""));
}

#[test]
fn a_file_that_may_not_grow_is_told_and_loses_nothing() {
    let place = Place::new();
    // As with a quota: the write fails, and the signal that would come with it is ignored.
    full(&place, "trap '' XFSZ; ulimit -f 2000; ulimit -c 0", Command::new("bash"));
}

/// No command takes longer than this beside a busy daemon.
const AT_MOST: Duration = Duration::from_secs(10);

#[tokio::test]
async fn commands_work_beside_a_daemon_that_is_busy_with_100_000_tokens() {
    let place = Place::new();
    place.configure(
        "[mail]\ntransport = \"maildir\"\nfrom = \"Tokens <tokens@example.org>\"\n[mail.maildir]\npath = \"mail\"\n\
         [guard]\nexpired_per_hour = 0\n",
    );
    let secret = place.owner("alice", "alice@example.org");
    let (id, _) = place.token("alice", "edited", "90d");
    let past = (SystemClock::default().now() - TimeDelta::hours(2)).timestamp();
    due_tokens(&place, past).await;
    let mut store = open(&place).await;
    let due = "SELECT COUNT(*) FROM tokens WHERE status = 'active' AND description = 'due'";
    assert_eq!(count(&mut store, due).await, 100_000);

    let daemon = place.daemon();
    let (mut rounds, mut longest, mut left) = (0, Duration::ZERO, u64::MAX);
    while left > 0 {
        let create = ["token", "create", "--owner", "alice", "--description", "beside", "--expires", "30d"];
        let description = format!("round {rounds}");
        let edit = ["token", "edit", &id, "--description", &description, "--expires", "60d"];
        for words in [&create[..], &edit[..], &["token", "list", "--owner", "alice"]] {
            let start = Instant::now();
            place.run(words).ok();
            longest = longest.max(start.elapsed());
            assert!(start.elapsed() < AT_MOST, "{words:?} took {:?} in round {rounds}", start.elapsed());
        }
        let start = Instant::now();
        assert_eq!(fact(&place.verify(&secret).ok(), "valid"), "yes");
        assert!(start.elapsed() < AT_MOST, "verify took {:?} in round {rounds}", start.elapsed());
        rounds += 1;
        left = count(&mut store, due).await;
        let log = daemon.log();
        assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
    }
    eprintln!("{rounds} rounds, the longest command took {longest:?}");
    assert!(rounds >= 2, "the daemon was done before anything ran beside it");
    assert_eq!(place.line("token list --owner alice").ok().lines().count(), 3 + rounds);
    daemon.stop();
}

/// 100,000 active tokens whose deadline was at this instant, ten for each of 10,000 owners with one address each.
async fn due_tokens(place: &Place, deadline: i64) {
    let mut store = open(place).await;
    let statements = format!(
        "BEGIN IMMEDIATE;
         CREATE TEMP TABLE n (i INTEGER PRIMARY KEY);
         WITH RECURSIVE g (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM g WHERE i < 99999) INSERT INTO n SELECT i FROM g;
         INSERT INTO owners (bucket, id, key, name, time_zone, locale, created_at)
         SELECT i % 256, UNHEX(PRINTF('019000000001%018x%02x', i, i % 256)), 'o' || i, 'o' || i, 'UTC', 'en', 0
         FROM n WHERE i < 10000;
         INSERT INTO contacts (bucket, id, address, created_at)
         SELECT i % 256, UNHEX(PRINTF('019000000002%018x%02x', i, i % 256)), 'o' || i || '@example.org', 0
         FROM n WHERE i < 10000;
         INSERT INTO owner_contacts (bucket, owner_id, contact_id)
         SELECT i % 256, UNHEX(PRINTF('019000000001%018x%02x', i, i % 256)),
                UNHEX(PRINTF('019000000002%018x%02x', i, i % 256))
         FROM n WHERE i < 10000;
         INSERT INTO tokens
             (bucket, id, owner_id, kind, description, scopes, created_at, expires_at, deadline_set_at, generation,
              unplanned, status)
         SELECT i % 10000 % 256, UNHEX(PRINTF('019000000003%018x%02x', i, i % 10000 % 256)),
                UNHEX(PRINTF('019000000001%018x%02x', i % 10000, i % 10000 % 256)), 'additional', 'due', '',
                {deadline} - 8640000, {deadline}, {deadline} - 8640000, 0, 0, 'active'
         FROM n;
         COMMIT;"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(statements)).execute(&mut store).await.expect("the tokens");
    store.close().await.expect("the end");
}
