//! What whoever watches the daemon is told over HTTP.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use lapsed::config::Schedule;
use lapsed::health::Health;
use lapsed::http::{self, Site};
use lapsed::metrics::Metrics;
use lapsed::schedule::Cron;
use lapsed::store::{Jobs, Store};
use sqlx::{Connection, SqliteConnection};
use tokio_util::sync::CancellationToken;

use crate::support::backend::{Backend, OnPartitions, OnPostgres, OnSqlite};
use crate::support::cli::{Daemon, LAPSED, PATIENCE, Place, eventually, fact};
use crate::support::world::World;

on_every_back_end!(a_job_that_is_overdue_and_a_store_that_is_gone_are_not_ready);

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What came back.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        Self { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    /// A sample's value.
    #[track_caller]
    fn sample(&self, series: &str) -> f64 {
        let line = self.body.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {series} in\n{}", self.body))
    }
}

/// Sends these bytes, and reads until the other side is done.
fn say(address: SocketAddr, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn request(address: SocketAddr, method: &str, path: &str, more: &str) -> Answer {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n{more}\r\n");
    Answer::parse(&say(address, request.as_bytes()).expect("an answer"))
}

fn get(address: SocketAddr, path: &str) -> Answer {
    request(address, "GET", path, "")
}

/// A daemon with a Maildir, and where it listens.
fn watched(place: &Place) -> (Daemon, SocketAddr) {
    place.configure(
        r#"
        [schedule]
        expire = "* * * * * *"
        remind = "* * * * * *"
        deliver = "* * * * * *"
        [digest]
        hold = "1s"
        [mail]
        transport = "maildir"
        from = "Tokens <tokens@example.org>"
        [mail.maildir]
        path = "mail"
        [http]
        listen = "127.0.0.1:0"
        "#,
    );
    let daemon = place.daemon();
    let address = listens(&daemon);
    (daemon, address)
}

fn listens(daemon: &Daemon) -> SocketAddr {
    eventually("an address", PATIENCE, || {
        let log = daemon.log();
        let (_, rest) = log.split_once("http=")?;
        rest.split_whitespace().next()?.parse().ok()
    })
}

#[test]
fn what_is_asked_wrongly_is_told_what_would_be_right() {
    let place = Place::new();
    let (daemon, address) = watched(&place);
    for path in ["/healthz", "/readyz", "/healthz?verbose"] {
        let answer = get(address, path);
        assert_eq!((answer.status, answer.body.as_str()), (200, "ok\n"), "{path}: {answer:?}");
        assert!(answer.head.contains("content-type: text/plain; charset=utf-8"), "{answer:?}");
        assert!(
            answer.head.contains("connection: close") && answer.head.contains("cache-control: no-store"),
            "{answer:?}"
        );
    }
    for path in ["/", "/metrics/", "/health", "//metrics", "/healthz%00"] {
        let answer = get(address, path);
        assert_eq!(answer.status, 404, "{path}: {answer:?}");
        assert!(answer.body.contains("/healthz, /readyz and /metrics"), "{answer:?}");
    }
    for method in ["POST", "DELETE", "OPTIONS", "BREW"] {
        let answer = request(address, method, "/metrics", "Content-Length: 5\r\n");
        assert_eq!(answer.status, 405, "{method}: {answer:?}");
        assert!(answer.head.contains("allow: get, head"), "{answer:?}");
    }
    let head = request(address, "HEAD", "/metrics", "");
    assert_eq!((head.status, head.body.as_str()), (200, ""), "{head:?}");
    let metrics = get(address, "/metrics");
    assert!(metrics.head.contains(&format!("content-type: {OPEN_METRICS}")), "{}", metrics.head);
    assert!(metrics.body.ends_with("# EOF\n"), "{}", metrics.body);
    let plain = request(address, "GET", "/metrics", "Accept: text/plain;version=0.0.4, */*;q=0.1\r\n");
    assert!(plain.head.contains("content-type: text/plain; version=0.0.4"), "{}", plain.head);
    assert!(
        !plain.body.contains("# EOF") && plain.body.contains("# TYPE lapsed_expired_total counter"),
        "{}",
        plain.body
    );
    let both = "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4\r\n";
    assert!(request(address, "GET", "/metrics", both).head.contains(OPEN_METRICS));
    daemon.stop();
}

/// A failure at a lead time that came by a reload is an increase as well.
#[test]
fn lead_times_that_come_while_it_runs_are_counted_from_zero() {
    let place = Place::new();
    let (daemon, address) = watched(&place);
    let series = "lapsed_reminders_total{lead=\"3d\",state=\"failed\"} 0\n";
    let body = get(address, "/metrics").body;
    assert!(!body.contains(series) && body.contains(&series.replace("3d", "7d")), "{body}");
    let before = std::fs::read_to_string(place.path("lapsed.toml")).expect("the configuration");
    place.configure(&format!("{before}[reminders]\nlead_times = [\"3d\"]\n"));
    eventually("the new lead time", PATIENCE, || get(address, "/metrics").body.contains(series).then_some(()));
    daemon.stop();
}

#[test]
fn clients_that_are_slow_or_speak_nonsense_hold_nothing_up() {
    let place = Place::new();
    let (daemon, address) = watched(&place);
    // More than are served at once, at every stage of a request.
    let beginnings: [&[u8]; 4] =
        [b"", b"GE", b"GET /metrics HTTP/1.1\r\n", b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n"];
    let mut idle = Vec::new();
    for beginning in beginnings.iter().cycle().take(100) {
        let mut stream = TcpStream::connect(address).expect("a connection");
        stream.write_all(beginning).expect("a beginning");
        idle.push(stream);
    }
    let asked = Instant::now();
    assert_eq!(get(address, "/readyz").status, 200);
    assert!(asked.elapsed() < Duration::from_secs(5), "nobody waits for them: {:?}", asked.elapsed());
    for nonsense in [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"GET /metrics HTTP/9.9\r\n\r\n".to_vec(),
        b"EHLO example.org\r\n".to_vec(),
        vec![b'A'; 20_000],
        [b"GET /metrics HTTP/1.1\r\nX: ".to_vec(), vec![b'x'; 100_000], b"\r\n\r\n".to_vec()].concat(),
        ["GET /metrics HTTP/1.1\r\n", &"X: y\r\n".repeat(200), "\r\n"].concat().into_bytes(),
        ["GET /", &"x".repeat(50_000), " HTTP/1.1\r\n\r\n"].concat().into_bytes(),
    ] {
        // It may hang up before it has read all of it.
        if let Ok(answer) = say(address, &nonsense)
            && !answer.is_empty()
        {
            let status = Answer::parse(&answer).status;
            assert!(
                (400..500).contains(&status),
                "{status}: {:?}",
                String::from_utf8_lossy(&nonsense[..20.min(nonsense.len())])
            );
        }
    }
    assert_eq!(get(address, "/healthz").status, 200);
    drop(idle);
    let log = daemon.stop();
    assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
}

#[test]
fn the_daemon_works_and_tells_of_it_while_many_ask() {
    let place = Place::new();
    let (daemon, address) = watched(&place);
    place.owner("alice", "alice@example.org");
    place.owner("bob", "bob@example.org");
    let asking = std::thread::scope(|scope| {
        let askers: Vec<_> = (0..6)
            .map(|_| {
                scope.spawn(|| {
                    let mut answers = 0;
                    for _ in 0..100 {
                        let answer = get(address, "/metrics");
                        assert_eq!(answer.status, 200, "{answer:?}");
                        assert!(answer.body.ends_with("# EOF\n"), "{answer:?}");
                        answers += 1;
                    }
                    answers
                })
            })
            .collect();
        for n in 0..5 {
            place.token(if n < 3 { "alice" } else { "bob" }, &format!("CI {n}"), "1s");
        }
        askers.into_iter().map(|asker| asker.join().expect("no panic")).sum::<u32>()
    });
    assert_eq!(asking, 600);
    let told = eventually("the end of all five in the metrics", Duration::from_secs(60), || {
        let told = get(address, "/metrics");
        let sent = "lapsed_reminders_total{lead=\"expired\",state=\"sent\"}";
        (told.sample("lapsed_expired_total") >= 5.0 && told.sample(sent) >= 5.0).then_some(told)
    });
    assert_eq!(told.sample("lapsed_expired_total"), 5.0);
    assert_eq!(told.sample("lapsed_expiry_lag_seconds_count"), 5.0);
    assert!(told.sample("lapsed_expiry_lag_seconds_sum") < 300.0);
    assert_eq!(told.sample("lapsed_reminders_total{lead=\"expired\",state=\"pending\"}"), 5.0);
    let messages = place.mails("mail").len();
    assert!((2..=5).contains(&messages), "{messages}");
    let messages = f64::from(u32::try_from(messages).expect("few"));
    assert_eq!(told.sample("lapsed_messages_total{outcome=\"sent\"}"), messages);
    assert_eq!(told.sample("lapsed_smtp_reply_total{class=\"2xx\"}"), messages);
    assert_eq!(told.sample("lapsed_messages_total{outcome=\"failed\"}"), 0.0);
    for job in ["expire", "remind", "deliver", "purge"] {
        assert!(told.sample(&format!("lapsed_job_duration_seconds_count{{job=\"{job}\"}}")) >= 1.0, "{job}");
        assert!(told.sample(&format!("lapsed_job_last_success_timestamp_seconds{{job=\"{job}\"}}")) > 1e9, "{job}");
        assert!(told.sample(&format!("lapsed_job_overdue_seconds{{job=\"{job}\"}}")) < 60.0, "{job}");
    }
    for private in ["alice", "bob", "example.org", "CI", "lps_"] {
        assert!(!told.body.contains(private), "{private}: {}", told.body);
    }
    daemon.stop();
    // Counted when the next one starts: five that expired, and nobody was owed a reminder before.
    let (daemon, address) = watched(&place);
    let told = eventually("the counts", PATIENCE, || {
        Some(get(address, "/metrics"))
            .filter(|told| told.body.contains("\nlapsed_coverage_ratio ") && told.body.contains("{what=\"tokens\"}"))
    });
    assert_eq!(told.sample("lapsed_tokens{status=\"expired\"}"), 5.0);
    assert_eq!(told.sample("lapsed_tokens{status=\"active\"}"), 2.0, "the primary ones");
    assert_eq!(told.sample("lapsed_outbox_messages{state=\"open\"}"), 0.0);
    assert_eq!(told.sample("lapsed_outbox_oldest_seconds"), 0.0);
    assert_eq!(told.sample("lapsed_coverage_ratio"), 1.0);
    assert_eq!(told.sample("lapsed_suppressed_contacts"), 0.0);
    daemon.stop();
}

/// Counted by spans of the last 30 days, it is what the command counts at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_coverage_is_what_the_command_tells() {
    let place = Place::new();
    let (daemon, _) = watched(&place);
    place.owner("alice", "alice@example.org");
    for description in ["told", "told late", "not told", "told in another span"] {
        place.token("alice", description, "1s");
    }
    eventually("the marks", PATIENCE, || {
        let list = place.line("token list --status expired --format json").ok();
        list.lines()
            .all(|token| !token.contains("\"ended_at\":null"))
            .then_some(())
            .filter(|()| list.lines().count() == 4)
    });
    eventually("the notices", Duration::from_secs(40), || (!place.mails("mail").is_empty()).then_some(()));
    daemon.stop();
    // They had lived for 100 days, and two of their owners had a reminder.
    let url = format!("sqlite:{}", place.path("lapsed.db").display());
    let mut store = SqliteConnection::connect(&url).await.expect("the store");
    for statement in [
        "UPDATE tokens SET deadline_set_at = expires_at - 8640000 WHERE kind = 'additional'",
        "INSERT INTO reminders (bucket, token_id, generation, lead, contact_id, deadline, state, escalation, created_at, settled_at) \
         SELECT r.bucket, r.token_id, r.generation, 86400, r.contact_id, r.deadline, 'sent', 0, r.deadline, \
                r.deadline - IIF(t.description = 'told late', 60, 172800) \
         FROM reminders r JOIN tokens t ON t.id = r.token_id \
         WHERE t.description LIKE 'told%'",
        "UPDATE reminders SET deadline = deadline - 1000000 WHERE token_id = (SELECT id FROM tokens WHERE description LIKE '%span')",
        "UPDATE tokens SET expires_at = expires_at - 1000000, ended_at = ended_at - 1000000, \
                deadline_set_at = deadline_set_at - 1000000 \
         WHERE description LIKE '%span'",
        "UPDATE reminders SET settled_at = deadline - 172800 \
         WHERE lead = 86400 AND token_id = (SELECT id FROM tokens WHERE description LIKE '%span')",
    ] {
        sqlx::query(statement).execute(&mut store).await.expect("a write");
    }
    let told = place.line("coverage").ok();
    assert_eq!(fact(&told, "told in time"), "2 of 4 that were owed a reminder: 50.0 %", "{told}");
    let (daemon, address) = watched(&place);
    let told = eventually("the count", PATIENCE, || {
        Some(get(address, "/metrics")).filter(|told| told.body.contains("\nlapsed_coverage_ratio "))
    });
    assert_eq!(told.sample("lapsed_coverage_ratio"), 0.5);
    daemon.stop();
}

/// The reference implementation's parser, which is strict: the order of lines, suffixes, units, the end.
#[test]
fn a_parser_of_prometheus_reads_the_metrics() {
    let place = Place::new();
    let (daemon, address) = watched(&place);
    place.owner("alice", "alice@example.org");
    let (_, secret) = place.token("alice", "CI", "1s");
    eventually("the mark", PATIENCE, || (get(address, "/metrics").sample("lapsed_expired_total") > 0.0).then_some(()));
    assert_eq!(place.verify(&secret).refused(), "expired");
    let script = "import sys\n\
        from prometheus_client.openmetrics.parser import text_string_to_metric_families as read\n\
        for family in read(sys.stdin.read()):\n    print(family.name, family.type, family.unit or '-', len(family.samples))\n";
    let python = crate::support::from_environment("LAPSED_TEST_PYTHON", "provides a python3 with prometheus_client");
    let mut command = Command::new(python);
    command.args(["-c", script]);
    let ran = crate::support::cli::finish(command, &get(address, "/metrics").body);
    daemon.stop();
    let families = ran.ok();
    for wanted in [
        "lapsed_build info - 1",
        "lapsed_expired counter - 1",
        "lapsed_expiry_lag_seconds histogram seconds 13",
        "lapsed_messages counter - 7",
        "lapsed_smtp_reply counter - 4",
        "lapsed_job_overdue_seconds gauge seconds 5",
        "lapsed_outbox_oldest_seconds gauge seconds 1",
    ] {
        assert!(families.lines().any(|line| line == wanted), "{wanted} in\n{families}");
    }
}

#[test]
fn a_port_that_is_taken_is_an_error_that_says_what_would_be_right() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address");
    let mut place = Place::new();
    place.configure("[mail]\ntransport = \"maildir\"\nfrom = \"a@example.org\"\n[mail.maildir]\npath = \"mail\"\n");
    place.set("LAPSED__HTTP__LISTEN", &address.to_string());
    let told = place.line("run").fails(1);
    let wanted =
        format!("http.listen = \"{address}\": Address already in use (os error 98); something else listens there");
    assert!(told.contains(&wanted) && told.contains("choose another port"), "{told}");
    // What only looks and what is done once need no port.
    place.line("run --once").ok();
    place.set("LAPSED__HTTP__LISTEN", "192.0.2.1:9464");
    assert!(place.line("run").fails(1).contains("this machine has no such address"));
}

/// As systemd does it for a socket unit: the socket is the fourth file, and two variables say so.
#[test]
fn a_socket_that_systemd_passes_is_used() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let place = Place::new();
    place.configure("[mail]\ntransport = \"maildir\"\nfrom = \"a@example.org\"\n[mail.maildir]\npath = \"mail\"\n");
    let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" --config lapsed.toml run";
    let mut command = Command::new("sh");
    command.args(["-c", script, LAPSED]).current_dir(place.path("")).env_clear();
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener))).stderr(Stdio::null());
    let mut child = command.spawn().expect("sh");
    // It waits in the socket's queue until the daemon is there.
    let answer = say(address, b"GET /healthz HTTP/1.0\r\n\r\n");
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    assert_eq!(Answer::parse(&answer.expect("an answer")).body, "ok\n");
}

async fn a_job_that_is_overdue_and_a_store_that_is_gone_are_not_ready<B: Backend>() {
    let world = World::<B>::new().await;
    let cron = |text| Cron::parse(text, chrono_tz::UTC).expect("a schedule");
    let schedule = Schedule {
        expire: cron("*/5 * * * * *"),
        remind: cron("30 * * * * *"),
        deliver: cron("*/10 * * * * *"),
        purge: cron("0 0 0 1 1 *"),
        reconcile: cron("0 0 0 1 1 *"),
    };
    let metrics = Arc::new(Metrics::new(&[]));
    let health = Arc::new(Health::new(schedule, world.now()));
    let site = Site::new(world.store.clone(), world.clock.clone(), metrics, health.clone(), Box::new(|| None));
    let listener = http::listen(Some("127.0.0.1:0".parse().expect("an address"))).expect("a port").expect("a listener");
    let address = listener.local_addr().expect("an address");
    let stop = CancellationToken::new();
    let serving = tokio::spawn(http::serve(listener, Arc::new(site), stop.clone()));
    let ask = |path: &'static str| async move {
        tokio::task::spawn_blocking(move || get(address, path)).await.expect("no panic")
    };
    assert_eq!(ask("/readyz").await.body, "ok\n");

    world.clock.advance(TimeDelta::minutes(11));
    let late = ask("/readyz").await;
    assert_eq!(late.status, 503);
    for job in ["expire", "remind", "deliver"] {
        assert!(late.body.contains(&format!("{job}: overdue for 10 min, has not gone well yet\n")), "{}", late.body);
    }
    assert!(!late.body.contains("purge"), "once a year: {}", late.body);
    assert!(ask("/metrics").await.sample("lapsed_job_overdue_seconds{job=\"expire\"}") > 600.0);
    assert_eq!(ask("/healthz").await.status, 200, "the process is well");

    // Another process did it, as the store knows.
    world.expire().await;
    world.remind().await;
    health.succeeded("deliver", world.now());
    // For a second the store's last answer counts.
    let ready = async || loop {
        let answer = ask("/readyz").await;
        if answer.status == 200 {
            return answer;
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, ready()).await.expect("it is ready again").body, "ok\n");
    assert_eq!(ask("/metrics").await.sample("lapsed_job_overdue_seconds{job=\"expire\"}"), 0.0);

    // A failure is no success.
    let failed = world.now() + TimeDelta::minutes(1);
    world.clock.set(failed);
    let lease = world.lease("expire").await;
    world.store.finish(&lease, failed, Err("it broke")).await.expect("a write");
    health.succeeded("deliver", failed + TimeDelta::minutes(11));
    health.succeeded("remind", failed + TimeDelta::minutes(11));
    world.clock.advance(TimeDelta::minutes(11));
    let late = ask("/readyz").await;
    assert!(
        late.body.starts_with("expire: overdue for 1") && late.body.contains("last went well at "),
        "{}",
        late.body
    );

    world.store.close().await;
    let gone = async || loop {
        let answer = ask("/readyz").await;
        if answer.body.contains("store") {
            return answer;
        }
    };
    let gone = tokio::time::timeout(PATIENCE, gone()).await.expect("the store is gone");
    assert_eq!((gone.status, gone.body.lines().next()), (503, Some("store: does not answer")));
    assert_eq!(ask("/metrics").await.status, 200, "what was counted is there");
    stop.cancel();
    serving.await.expect("no panic");
}

/// By the names of the migrations, which the partitioned variant of the tests does not keep.
#[tokio::test]
async fn an_index_that_is_gone_is_told_of() {
    an_index_that_is_gone_is_told::<OnSqlite>().await;
    an_index_that_is_gone_is_told::<OnPostgres>().await;
}

async fn an_index_that_is_gone_is_told<B: Backend>() {
    let world = World::<B>::new().await;
    let indexes = world.store.indexes().await.expect("a read");
    assert!(indexes.good > 15, "{indexes:?}");
    assert_eq!((indexes.missing.len(), indexes.unused.len()), (0, 0), "{indexes:?}");
    for index in ["messages_queue", "tokens_deadline"] {
        world.backend.execute(&format!("DROP INDEX {index}")).await;
    }
    let gone = world.store.indexes().await.expect("a read");
    assert_eq!(
        (gone.good, gone.missing),
        (indexes.good - 2, vec!["messages_queue".to_owned(), "tokens_deadline".to_owned()])
    );
}

#[tokio::test]
async fn a_job_that_hangs_is_not_healthy() {
    let world = World::<OnSqlite>::new().await;
    let never = || Cron::parse("0 0 0 1 1 *", chrono_tz::UTC).expect("a schedule");
    let schedule = Schedule { expire: never(), remind: never(), deliver: never(), purge: never(), reconcile: never() };
    let health = Arc::new(Health::new(schedule, world.now()));
    let hangs = Box::new(|| Some("remind"));
    let site = Site::new(world.store.clone(), world.clock.clone(), Arc::new(Metrics::new(&[])), health, hangs);
    let listener = http::listen(Some("127.0.0.1:0".parse().expect("an address"))).expect("a port").expect("a listener");
    let address = listener.local_addr().expect("an address");
    let stop = CancellationToken::new();
    let serving = tokio::spawn(http::serve(listener, Arc::new(site), stop.clone()));
    let answer = tokio::task::spawn_blocking(move || get(address, "/healthz")).await.expect("no panic");
    assert_eq!((answer.status, answer.body.as_str()), (503, "remind: hangs\n"));
    stop.cancel();
    serving.await.expect("no panic");
}
