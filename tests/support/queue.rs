//! A queue of messages that wait, as the program itself plans them, for daemons to work off.

use std::collections::BTreeMap;
use std::fmt::Write;

use chrono::TimeDelta;
use lapsed::clock::{Clock, SystemClock};
use mail_parser::MessageParser;

use super::cli::Place;
use super::smtp_script::Server;

/// Sessions of each daemon.
pub const CONNECTIONS: usize = 4;

/// How many messages it hands over at most without having recorded them.
pub const UNRECORDED: usize = 32;

/// A message for each of so many owners, planned and not sent.
pub fn plan(place: &Place, messages: usize) {
    let deadline = (SystemClock::default().now() + TimeDelta::hours(12)).format("%Y-%m-%dT%H:%M:%SZ");
    let mut list = String::from("owner,emails,description,expires_at\n");
    for i in 0..messages {
        writeln!(list, "owner-{i},contact-{i}@example.org,key {i},{deadline}").expect("memory");
    }
    place.run_with(["token", "import", "-"], &list).ok();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").and_then(|held| held.local_addr()).expect("a port");
    configure(place, nobody.port());
    let once = place.line("run --once");
    assert!(once.stderr.contains("messages wait in the store"), "{once}");
}

/// Daemons that start from now on send to this port of 127.0.0.1.
pub fn configure(place: &Place, port: u16) {
    place.configure(&format!(
        r#"
        [schedule]
        deliver = "* * * * * *"
        [reminders]
        lead_times = ["1d"]
        [mail]
        transport = "smtp"
        from = "Tokens <tokens@example.org>"
        [mail.smtp]
        host = "127.0.0.1"
        port = {port}
        tls = "none"
        connections = {CONNECTIONS}
        "#
    ));
}

/// How often each Message-ID arrived.
pub fn arrived(server: &Server) -> BTreeMap<String, usize> {
    let mut arrived = BTreeMap::new();
    for message in server.accepted() {
        let mail = MessageParser::default().parse(&message.data).expect("a mail");
        *arrived.entry(mail.message_id().expect("a Message-ID").to_owned()).or_default() += 1;
    }
    arrived
}
