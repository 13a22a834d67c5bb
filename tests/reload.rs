//! Other settings while the daemon runs: taken over as a whole or not at all, with nothing lost and nothing sent twice.

use std::time::Duration;

use chrono::TimeDelta;
use lapsed::clock::{Clock, SystemClock};

use crate::support::cli::{Daemon, PATIENCE, Place, eventually, fact};
use crate::support::smtp_script::{Action, Phase, Script, Server, reply};
use crate::support::supervisor::Supervisor;

const SCHEDULE: &str = r#"
    [schedule]
    expire = "* * * * * *"
    remind = "* * * * * *"
    deliver = "* * * * * *"
"#;

/// A configuration whose mails go into this Maildir.
fn maildir(name: &str, more: &str) -> String {
    format!(
        r#"{more}
        [mail]
        transport = "maildir"
        from = "Tokens <tokens@example.org>"
        [mail.maildir]
        path = "{name}"
        [digest]
        hold = "1s"
        "#
    )
}

/// A configuration whose mails go to this port.
fn smtp(port: u16, more: &str) -> String {
    format!(
        r#"{SCHEDULE}
        [log]
        level = "debug"
        [mail]
        transport = "smtp"
        from = "Tokens <tokens@example.org>"
        [digest]
        hold = "1s"
        [mail.smtp]
        host = "127.0.0.1"
        port = {port}
        tls = "none"
        {more}
        "#
    )
}

/// Replaces the configuration file as editors do: another file is renamed into its place.
fn replace(place: &Place, toml: &str) {
    place.write(".lapsed.toml.new", toml);
    std::fs::rename(place.path(".lapsed.toml.new"), place.path("lapsed.toml")).expect("a rename");
}

/// How often the configuration was read again, or refused.
fn reloads(daemon: &Daemon) -> usize {
    let log = daemon.log();
    log.matches("read the configuration again").count() + log.matches("the new configuration is refused").count()
}

/// Waits until it was so often.
#[track_caller]
fn wait_for_reloads(daemon: &Daemon, times: usize) {
    eventually("a reload", PATIENCE, || (reloads(daemon) >= times).then_some(()));
}

/// The status of a token.
fn status(place: &Place, id: &str) -> String {
    fact(&place.run(["token", "show", id]).ok(), "status")
}

/// Tokens of as many owners, all of them past their deadline, each of whose notices is a mail of its own.
fn import_expired(place: &Place, tokens: usize) {
    let mut list = String::from("owner,emails,description,expires_at\n");
    let expired = (SystemClock::default().now() - TimeDelta::hours(2)).format("%FT%TZ");
    for n in 0..tokens {
        list += &format!("owner-{n},owner-{n}@example.org,key {n},{expired}\n");
    }
    place.write("tokens.csv", &list);
    place.line("token import tokens.csv").ok();
}

/// Who got how many mails.
fn received(servers: &[&Server]) -> Vec<String> {
    let mut to: Vec<String> =
        servers.iter().flat_map(|server| server.accepted()).flat_map(|mail| mail.rcpt_to).collect();
    to.sort();
    to
}

fn expected(tokens: usize) -> Vec<String> {
    let mut to: Vec<String> = (0..tokens).map(|n| format!("owner-{n}@example.org")).collect();
    to.sort();
    to
}

/// A new file holds without a signal: schedules, where mail goes, and how much is logged.
#[test]
fn a_file_that_is_renamed_into_place_holds_at_once() {
    let place = Place::new();
    let rarely = "0 0 0 29 2 MON";
    replace(&place, &maildir("before", &format!("[schedule]\nexpire = \"{rarely}\"\nremind = \"{rarely}\"\n")));
    place.owner("alice", "alice@example.org");
    let mut daemon = place.daemon();
    assert!(!daemon.log().contains("DEBUG"), "{}", daemon.log());

    replace(&place, &maildir("after", &format!("{SCHEDULE}[log]\nlevel = \"debug\"\n")));
    daemon.wait_for_log("read the configuration again");
    let log = daemon.log();
    for key in ["log.level", "mail.maildir.path", "schedule.expire", "schedule.remind"] {
        assert!(log.contains(key), "{key} in:\n{log}");
    }
    assert!(!log.contains("mail.from"), "has not changed:\n{log}");
    daemon.wait_for_log("DEBUG");
    // By the first schedule, nobody would look for years.
    let (id, _) = place.token("alice", "CI", "2s");
    eventually("the mark", PATIENCE, || (status(&place, &id) == "expired").then_some(()));
    eventually("a mail", Duration::from_secs(40), || (place.mails("after").len() == 1).then_some(()));
    assert!(place.mails("before").is_empty());
    let log = daemon.stop();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
}

/// A wrong file is refused as a whole, with each of its problems; the daemon goes on by the old one, and says so to its
/// supervisor until the file is right.
#[test]
fn a_wrong_configuration_is_refused_as_a_whole() {
    let mut place = Place::new();
    let good = maildir("mail", SCHEDULE);
    place.configure(&good);
    let supervisor = Supervisor::of(&mut place);
    place.owner("alice", "alice@example.org");
    let mut daemon = place.spawn(["run"]);
    supervisor.hear("READY=1");
    supervisor.hear("STATUS=no mail due");

    let wrong =
        maildir("elsewhere", SCHEDULE).replace("expire = \"*", "expire = \"99") + "\n[guard]\nmessages_per_hou = 3\n";
    replace(&place, &wrong);
    supervisor.hear("RELOADING=1");
    supervisor.hear("READY=1");
    let said = supervisor.hear("STATUS=new configuration refused");
    assert!(said.contains("2 to mend") && said.contains("no mail due"), "{said}");
    let log = daemon.log();
    let refused: Vec<&str> = log.lines().filter(|line| line.contains("refused: ")).collect();
    assert_eq!(refused.len(), 2, "{log}");
    assert!(refused.iter().any(|line| line.contains("ERROR") && line.contains("schedule.expire")), "{log}");
    assert!(
        refused.iter().any(|line| line.contains("guard.messages_per_hou ") && line.contains("messages_per_hour?")),
        "{log}"
    );

    // Commands do not read past a wrong file either.
    Place::with_store(&format!("sqlite:{}", place.path("lapsed.db").display())).token("alice", "CI", "1s");
    eventually("a mail", Duration::from_secs(40), || (place.mails("mail").len() == 1).then_some(()));
    assert!(!place.path("elsewhere").exists());
    replace(&place, &good);
    daemon.wait_for_log("read the configuration again");
    supervisor.hear("STATUS=no mail due");
    daemon.stop();
}

#[test]
fn a_supervisor_hears_of_a_reload_and_of_what_waits_for_the_next_start() {
    let mut place = Place::new();
    place.configure(&maildir("mail", SCHEDULE));
    let supervisor = Supervisor::of(&mut place);
    let mut daemon = place.spawn(["run"]);
    supervisor.hear("READY=1");
    daemon.signal("HUP");
    supervisor.hear("RELOADING=1");
    supervisor.hear("READY=1");
    daemon.wait_for_log("changed=nothing");

    place.configure(&maildir("mail", &format!("{SCHEDULE}[store]\nurl = \"sqlite:other.db\"\n")));
    daemon.signal("HUP");
    daemon.wait_for_log("cannot change while the daemon runs: it stays as it was until the next start key=store.url");
    supervisor.hear("STATUS=store.url: changed, holds from the next start on");
    let log = daemon.stop();
    assert!(log.contains("WARN") && !log.contains("ERROR"), "{log}");
    assert!(!place.path("other.db").exists());
}

/// The old server takes its time with one message while the others go to the new one: that one is neither cut off nor sent
/// again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_being_sent_is_finished_where_it_began() {
    const TOKENS: usize = 20;
    let (old, new) = (Script::new().once(Phase::Dot, Action::Stall).start().await, Script::new().start().await);
    let place = Place::new();
    // Planned by a run that reaches no mail server: a daemon sends what it finds at once.
    place.configure(&smtp(1, "connections = 1"));
    import_expired(&place, TOKENS);
    assert_eq!(place.line("run --once").status, Some(1));
    place.configure(&smtp(old.port(), "connections = 1"));
    let daemon = place.daemon();
    old.reached(Phase::Dot, 1).await;
    replace(&place, &smtp(new.port(), "connections = 1"));
    tokio::task::block_in_place(|| {
        eventually("all but one", Duration::from_secs(40), || (new.accepted().len() == TOKENS - 1).then_some(()));
    });
    assert_eq!(old.accepted().len(), 0);
    old.release();
    tokio::task::block_in_place(|| {
        eventually("the last one", PATIENCE, || {
            (daemon.log().matches("sent a message").count() == TOKENS).then_some(())
        });
        daemon.stop();
    });
    assert_eq!((old.accepted().len(), old.times(Phase::Connect)), (1, 1), "nothing more begins there");
    assert_eq!(received(&[&old, &new]), expected(TOKENS));
}

/// Another server, another rate, other limits, again and again while a queue is worked off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_survives_one_reload_after_the_other() {
    const TOKENS: usize = 400;
    let slowly = || Script::new().pipelining().on(Phase::Dot, Action::After(Duration::from_millis(10)));
    let servers = [slowly().start().await, slowly().start().await];
    let place = Place::new();
    place.configure(&smtp(servers[0].port(), "connections = 3"));
    import_expired(&place, TOKENS);
    let daemon = place.daemon();
    let mut asked = 0;
    tokio::task::block_in_place(|| {
        while received(&[&servers[0], &servers[1]]).len() < TOKENS {
            asked += 1;
            let port = servers[asked % 2].port();
            let limits = format!("[guard]\nmessages_per_hour = {}\n", 1_000 + asked);
            place.configure(&smtp(port, &format!("connections = {}\n{limits}", 1 + asked % 4)));
            daemon.signal("HUP");
            wait_for_reloads(&daemon, asked);
            assert!(asked < 1_000, "{}", daemon.log());
        }
    });
    assert!(asked > 10, "{asked}: reloads and mails alternate");
    let log = tokio::task::block_in_place(|| {
        eventually("the last record", PATIENCE, || {
            (daemon.log().matches("sent a message").count() >= TOKENS).then_some(())
        });
        daemon.stop()
    });
    assert_eq!(received(&[&servers[0], &servers[1]]), expected(TOKENS), "each once");
    assert!(!log.contains("ERROR") && !log.contains("unknown"), "{log}");
    assert!(place.line("run --once").ok().contains("deliver  nothing was due"));
}

/// A password that changed in its file is used from the next signal on, also where a session is open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_is_read_again() {
    let auth = |line: &str| line.starts_with("AUTH").then(|| reply("235 2.7.0 ok"));
    let server = Script::new().extension("AUTH PLAIN").decide(Phase::Other, auth).start().await;
    let place = Place::new();
    let account = "connections = 1\nusername = \"lapsed\"\npassword_file = \"password\"\nallow_plain_auth = true";
    place.configure(&smtp(server.port(), account));
    place.write("password", "first");
    place.owner("alice", "alice@example.org");
    let daemon = place.daemon();
    let proofs = || server.commands().into_iter().filter(|line| line.starts_with("AUTH")).collect::<Vec<_>>();
    tokio::task::block_in_place(|| {
        for (n, secret) in ["first", "second"].into_iter().enumerate() {
            place.write("password", secret);
            daemon.signal("HUP");
            wait_for_reloads(&daemon, n + 1);
            place.token("alice", secret, "1s");
            eventually("a mail", Duration::from_secs(40), || (server.accepted().len() > n).then_some(()));
        }
        daemon.stop();
    });
    let proofs = proofs();
    assert!(proofs.len() == 2 && proofs[0] != proofs[1], "{proofs:?}");
}
