//! What each key accepts, and what people are told when its value is impossible.

use super::*;

#[test]
fn wrong_types_are_refused() {
    refused("[log]\nlevel = true\n", &["log.level = true", "in quotes"]);
    refused("[reminders]\nlead_times = true\n", &["must be a list"]);
    refused("[reminders]\nexpired_notice = \"maybe\"\n", &["true or false"]);
    refused("[mail.smtp]\nport = 70000\n", &["from 0 to 65535"]);
    refused("[mail.smtp]\nport = 99999999999999999999\n", &["from 0 to 65535"]);
    refused("[retention]\nmessages = 90\n", &["has no unit", "\"90d\""]);
    refused("[retention]\nmessages = \"\"\n", &["must not be empty"]);
}

#[test]
fn the_url_file_wins_and_is_trimmed() {
    let machine = Machine::new();
    let secret = machine.file("url", "\n postgres://u:geheim@h/db \n");
    let text = format!("[store]\nurl = \"nonsense\"\nurl_file = {:?}\n", secret);
    let path = machine.file("given.toml", &text);
    let settings = machine.load(Some(&path)).unwrap();
    assert_eq!(settings.store.url.expose(), "postgres://u:geheim@h/db");
    assert!(!format!("{settings:?}").contains("geheim"));

    machine.file("url", "mysql://u:geheim@h/db");
    let problem = machine.problems(&text).join("\n");
    assert!(problem.contains("the URL in this file must begin with"), "{problem}");
    assert!(!problem.contains("geheim"), "{problem}");

    refused("[store]\nurl_file = \"/nowhere/url\"\n", &["store.url_file", "cannot be read"]);
}

#[test]
fn lead_times_are_positive_and_given_once() {
    refused("[reminders]\nlead_times = [\"0s\"]\n", &["reminders.expired_notice"]);
    refused("[reminders]\nlead_times = [\"1d\", \"7d\", \"24h\"]\n", &["24h is given twice"]);
}

#[test]
fn retentions_are_positive_and_stale_after_may_be_zero() {
    refused("[retention]\nmessages = \"0s\"\n", &["longer than zero"]);
    refused("[retention]\nended_tokens = \"29d\"\n", &["retention.ended_tokens", "less than 30d"]);
    let settings = load("[reminders]\nstale_after = \"0s\"\n");
    assert_eq!(settings.reminders.stale_after, TimeDelta::zero());
}

#[test]
fn schedules_are_checked() {
    refused("[schedule]\npurge = \"17 3 * *\"\n", &["schedule.purge", "has 4 fields where five or six belong"]);
    refused("[schedule]\ntime_zone = \"Mars\"\n", &["schedule.time_zone", "no time zone is called \"Mars\""]);
    refused("[schedule]\npurge = \"0 0 0 31 2 *\"\n", &["never fires"]);
}

#[test]
fn log_levels_are_checked() {
    refused("[log]\nlevel = \"inof\"\n", &["log.level = \"inof\"", "is not a level"]);
    assert_eq!(load("[log]\nlevel = \"lapsed=debug,info\"\n").log.level, "lapsed=debug,info");
}

#[test]
fn http_listens_at_an_address_and_a_port() {
    for wrong in ["9464", "localhost:9464", "127.0.0.1", "http://127.0.0.1:9464"] {
        refused(&format!("[http]\nlisten = {wrong:?}\n"), &["http.listen", "\"127.0.0.1:9464\" or \"[::1]:9464\""]);
    }
    let at = |text: &str| load(&format!("[http]\nlisten = {text:?}\n")).http.listen;
    assert_eq!(at("[::1]:9464"), Some("[::1]:9464".parse().expect("an address")));
    assert_eq!(at(""), None);
}

#[test]
fn log_formats_are_named() {
    refused("[log]\nformat = \"yaml\"\n", &["log.format = \"yaml\"", "\"text\", \"json\" or \"journald\""]);
    assert_eq!(load("[log]\nformat = \"journald\"\n").log.format, LogFormat::Journald);
}

#[test]
fn a_maildir_needs_its_path() {
    refused(
        "[mail]\ntransport = \"maildir\"\n",
        &["mail.maildir.path = \"\" (built-in default)", "must name a directory"],
    );
    assert_eq!(
        load("[mail]\ntransport = \"maildir\"\nmaildir.path = \"/var/mail/x\"\n").mail.transport,
        Some(Transport::Maildir { path: "/var/mail/x".into() })
    );
    refused("[mail]\ntransport = \"pigeon\"\n", &["\"maildir\" or \"smtp\""]);
}

#[test]
fn each_kind_of_encryption_has_its_port() {
    for (tls, port) in [("starttls", 587), ("implicit", 465), ("opportunistic", 25), ("none", 25)] {
        let settings = load(&format!("[mail]\ntransport = \"smtp\"\nsmtp.tls = {tls:?}\n"));
        let Some(Transport::Smtp(smtp)) = settings.mail.transport else {
            panic!("smtp was chosen");
        };
        assert_eq!(smtp.relays[0].port, port);
    }
}

#[test]
fn credentials_come_whole_and_encrypted() {
    refused("[mail.smtp]\nusername = \"u\"\n", &["mail.smtp.username", "password_file"]);
    refused("[mail.smtp]\npassword_file = \"/p\"\n", &["mail.smtp.password_file", "username"]);
    refused(
        "[mail.smtp]\nusername = \"u\"\npassword_file = \"/p\"\ntls = \"none\"\n",
        &["mail.smtp.tls = \"none\"", "where others may read it", "allow_plain_auth"],
    );
    let opportunistic = "[mail.smtp]\nusername = \"u\"\noauth_token_file = \"/t\"\ntls = \"opportunistic\"\n";
    refused(opportunistic, &["mail.smtp.tls = \"opportunistic\"", "allow_plain_auth"]);
    let settings = load(&format!("[mail]\ntransport = \"smtp\"\n{opportunistic}allow_plain_auth = true\n"));
    let Some(Transport::Smtp(smtp)) = settings.mail.transport else { panic!("smtp was chosen") };
    assert_eq!(smtp.login, Some(Login { username: "u".into(), proof: Proof::TokenFile("/t".into()) }));
    let both = "[mail.smtp]\nusername = \"u\"\npassword_file = \"/p\"\noauth_token_file = \"/t\"\n";
    refused(both, &["mail.smtp.oauth_token_file", "beside"]);
    refused("[mail.smtp]\noauth_token_file = \"/t\"\n", &["mail.smtp.oauth_token_file", "username"]);
    refused("[mail.smtp]\nhost = \"smtp://h\"\n", &["mail.smtp.host"]);
    refused("[mail.smtp]\nhost = \"localhost:25\"\n", &["mail.smtp.host", "the port is mail.smtp.port"]);
    load("[mail.smtp]\nhost = \"::1\"\n");
}

#[test]
fn the_limits_of_sending_are_checked() {
    let text = "[mail]\ntransport = \"smtp\"\n[mail.smtp]\nrelays = [\"mx2\", \"mx3:2525\"]\nconnections = 16\n\
                rate = \"20/m\"\nmax_messages_per_connection = 0\ntimeouts.dot = \"1h\"\n";
    let Some(Transport::Smtp(smtp)) = load(text).mail.transport else { panic!("smtp was chosen") };
    let relays: Vec<_> = smtp.relays.iter().map(ToString::to_string).collect();
    assert_eq!(relays, ["localhost:587", "mx2:587", "mx3:2525"]);
    assert_eq!((smtp.connections, smtp.max_messages_per_connection), (16, 0));
    assert_eq!((smtp.every.as_secs(), smtp.timeouts.dot.as_secs()), (3, 3_600));
    assert_eq!(smtp.timeouts.mail, Timeouts::default().mail);
    refused("[mail.smtp]\nconnections = 0\n", &["mail.smtp.connections = 0", "at least 1"]);
    refused("[mail.smtp]\nrate = \"fast\"\n", &["mail.smtp.rate = \"fast\"", "100/s"]);
    refused("[mail.smtp]\nrelays = [\"mx:0\"]\n", &["mail.smtp.relays", "HOST:PORT"]);
    refused("[mail.smtp]\ntimeouts.mail = \"0s\"\n", &["mail.smtp.timeouts.mail", "longer than zero"]);
    refused("[mail.smtp]\nca_file = \"/nowhere\"\n", &["mail.smtp.ca_file", "cannot be read"]);
    refused("[mail]\ngive_up_after = \"0s\"\n", &["mail.give_up_after", "longer than zero"]);
    assert_eq!(load("[mail]\ngive_up_after = \"1w\"\n").mail.give_up_after, TimeDelta::weeks(1));
}

#[test]
fn mail_addresses_are_checked() {
    let from = |text: &str| load(&format!("[mail]\nfrom = '{text}'\n")).mail.from.unwrap();
    assert_eq!(from("a@example.org").name, None);
    assert_eq!(from("J. Doe, Tokens <a@example.org>").name.unwrap(), "J. Doe, Tokens");
    assert_eq!(from("\"Quoted\" <a@example.org>").name.unwrap(), "Quoted");
    assert_eq!(from("<a@example.org>").email.to_string(), "a@example.org");
    for wrong in ["a", "a@", "a@example.org, b@example.org", "a@example.org b", "X <a>", "\"X <a@example.org>"] {
        refused(&format!("[mail]\nfrom = '{wrong}'\n"), &["mail.from", "must be a mail address"]);
    }
    refused("[mail]\nfrom = \"X\\r\\nBcc: y <a@example.org>\"\n", &["line breaks"]);
    refused("[mail]\nfallback_to = \"Ops <ops@example.org>\"\n", &["mail.fallback_to", "a mail address alone"]);
}

#[test]
fn the_manage_url_is_a_url_with_known_placeholders() {
    for right in ["https://example.org/tokens/{token_id}?o={owner_id}&x={external_id}", "http://localhost:8080"] {
        let settings = load(&format!("[mail]\nmanage_url = {right:?}\n"));
        assert_eq!(settings.mail.manage_url.as_deref(), Some(right));
    }
    for (wrong, word) in [
        ("https://example.org/{id}", "no placeholder {id}"),
        ("https://example.org/{token_id", "without its partner"),
        ("https://example.org/token_id}", "without its partner"),
        ("ftp://example.org", "must be a URL"),
        ("https:///path", "must be a URL"),
        ("https://example.org/a b", "must be a URL"),
        ("javascript:alert(1)", "must be a URL"),
    ] {
        refused(&format!("[mail]\nmanage_url = {wrong:?}\n"), &["mail.manage_url", word]);
    }
}

#[test]
fn bounces_need_a_short_address_and_a_key() {
    let bounce = |text: &str| format!("[mail.bounce]\naddress = {text:?}\nkey_file = \"/k\"\n");
    let set = load(&bounce("lapsed-bounces@bücher.example")).mail.bounce.unwrap();
    assert_eq!((set.mailbox.to_string(), set.key_file), ("lapsed-bounces@xn--bcher-kva.example".into(), "/k".into()));
    for wrong in ["lapsed-bounces1@example.org", "bounces+x@example.org"] {
        refused(&bounce(wrong), &["mail.bounce.address", "14 characters at most", "no +"]);
    }
    refused(&bounce("bounces"), &["mail.bounce.address", "a mail address alone"]);
    refused("[mail.bounce]\naddress = \"b@example.org\"\n", &["mail.bounce.address", "key_file beside it"]);
    refused("[mail.bounce]\nkey_file = \"/k\"\n", &["mail.bounce.key_file", "address beside it"]);
}

#[test]
fn running_needs_a_transport_and_a_sender() {
    let error = Machine::new().load(None).unwrap().require_mail().unwrap_err().to_string();
    for words in [
        "mail.transport is not set",
        "transport = \"smtp\"",
        "LAPSED__MAIL__TRANSPORT",
        "mail.from is not set",
        "from = \"Tokens <tokens@example.org>\"",
        "LAPSED__MAIL__FROM",
    ] {
        assert!(error.contains(words), "{words:?} is not in: {error}");
    }
    let settings = load("[mail]\ntransport = \"smtp\"\nfrom = \"a@example.org\"\n");
    let (transport, from) = settings.require_mail().unwrap();
    assert!(matches!(transport, Transport::Smtp(_)));
    assert_eq!(from.email.to_string(), "a@example.org");
}
