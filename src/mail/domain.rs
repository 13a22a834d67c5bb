//! Whether the domain of a sender takes mail, so that answers and bounces arrive, and whether it says who may send for it.
//!
//! Asks the name servers of this machine (RFC 1035), each for two seconds, and gives up where none answers: what cannot be
//! looked up is unknown, and no mistake. Nothing is cached, and nothing but a command asks.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use simple_dns::rdata::RData;
use simple_dns::{CLASS, Name, Packet, PacketFlag, QTYPE, Question, RCODE, TYPE};
use tokio::net::UdpSocket;

/// Where the addresses of this machine's name servers are (resolv.conf(5)).
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// How long one server may take for one answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many bytes an answer over UDP may have: what travels unbroken nearly everywhere (DNS Flag Day 2020).
const LARGEST: u16 = 1_232;

/// Domains that are for examples and trials (RFC 2606, RFC 6761).
const RESERVED: [&str; 8] =
    ["example.com", "example.net", "example.org", "example", "test", "invalid", "localhost", "localdomain"];

/// What was found out about a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is for examples: nobody gets its mail, and nobody was asked.
    Reserved,
    /// No name server answered; why.
    Unknown(String),
    /// There is no such domain.
    Missing,
    /// It exists, and takes no mail.
    TakesNone,
    /// It takes mail.
    Takes {
        /// The first host that takes it (RFC 5321, section 5.1).
        at: String,
        /// Whether it says who may send in its name (SPF, RFC 7208).
        says_who: bool,
    },
}

/// The name servers of this machine.
pub fn name_servers() -> Vec<SocketAddr> {
    read_servers(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default())
}

fn read_servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let addresses = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.next().filter(|word| *word == "nameserver")?;
        // A zone of a link-local address, after %, is not for us.
        words.next()?.parse::<IpAddr>().ok()
    });
    addresses.take(3).map(|address| SocketAddr::new(address, 53)).collect()
}

/// Looks a domain up, in ASCII.
pub async fn look_up(domain: &str, servers: &[SocketAddr]) -> Found {
    let domain = domain.trim_end_matches('.').to_ascii_lowercase();
    let within = |of: &str| domain.strip_suffix(of).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    if RESERVED.into_iter().any(within) {
        return Found::Reserved;
    }
    match look(&domain, servers).await {
        Ok(found) => found,
        Err(why) => Found::Unknown(why),
    }
}

async fn look(domain: &str, servers: &[SocketAddr]) -> Result<Found, String> {
    let Some(records) = ask(domain, TYPE::MX, servers).await? else { return Ok(Found::Missing) };
    let mut hosts: Vec<(u16, String)> = records
        .into_iter()
        .filter_map(|record| match record {
            Record::Host(preference, host) => Some((preference, host)),
            Record::Address | Record::Policy => None,
        })
        .collect();
    hosts.sort();
    let at = match hosts.into_iter().next() {
        // A host without a name: it says that it takes none (RFC 7505).
        Some((_, host)) if host.is_empty() => return Ok(Found::TakesNone),
        Some((_, host)) => host,
        // Without such a record, the domain itself is the host.
        None => {
            let mut addresses = ask(domain, TYPE::A, servers).await?.unwrap_or_default();
            if addresses.is_empty() {
                addresses = ask(domain, TYPE::AAAA, servers).await?.unwrap_or_default();
            }
            if !addresses.contains(&Record::Address) {
                return Ok(Found::TakesNone);
            }
            domain.to_owned()
        }
    };
    let texts = ask(domain, TYPE::TXT, servers).await?.unwrap_or_default();
    Ok(Found::Takes { at, says_who: texts.contains(&Record::Policy) })
}

/// What matters here of an answer.
#[derive(Debug, PartialEq, Eq)]
enum Record {
    Host(u16, String),
    Address,
    Policy,
}

/// Asks one server after the other; `None`: there is no such domain.
async fn ask(domain: &str, what: TYPE, servers: &[SocketAddr]) -> Result<Option<Vec<Record>>, String> {
    let mut why = format!("{RESOLV_CONF} names no name server");
    for server in servers {
        match tokio::time::timeout(PATIENCE, ask_one(domain, what, *server)).await {
            Ok(Ok(records)) => return Ok(records),
            Ok(Err(error)) => why = format!("the name server {}: {error}", server.ip()),
            Err(_) => why = format!("the name server {} does not answer", server.ip()),
        }
    }
    Err(why)
}

async fn ask_one(domain: &str, what: TYPE, server: SocketAddr) -> Result<Option<Vec<Record>>, String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let name = Name::new(domain).map_err(|error| words(&error))?;
    let id = rand::random();
    let mut query = Packet::new_query(id);
    query.set_flags(PacketFlag::RECURSION_DESIRED);
    query.questions.push(Question::new(name, QTYPE::TYPE(what), CLASS::IN.into(), false));
    *query.opt_mut() = Some(simple_dns::rdata::OPT { opt_codes: Vec::new(), udp_packet_size: LARGEST, version: 0 });
    let query = query.build_bytes_vec().map_err(|error| words(&error))?;

    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).await.map_err(|error| words(&error))?;
    // From this server alone.
    socket.connect(server).await.map_err(|error| words(&error))?;
    socket.send(&query).await.map_err(|error| words(&error))?;
    let mut buffer = vec![0; usize::from(LARGEST)];
    loop {
        let length = socket.recv(&mut buffer).await.map_err(|error| words(&error))?;
        // Whatever is not an answer to this question is somebody else's.
        let Ok(answer) = Packet::parse(buffer.get(..length).unwrap_or_default()) else { continue };
        if answer.id() != id || !answer.has_flags(PacketFlag::RESPONSE) {
            continue;
        }
        return match answer.rcode() {
            RCODE::NoError => Ok(Some(answer.answers.iter().filter_map(|record| read(&record.rdata)).collect())),
            RCODE::NameError => Ok(None),
            other => Err(format!("{other:?}")),
        };
    }
}

fn read(record: &RData<'_>) -> Option<Record> {
    match record {
        RData::MX(mx) => Some(Record::Host(mx.preference, mx.exchange.to_string())),
        RData::A(_) | RData::AAAA(_) => Some(Record::Address),
        // "v=spf1 ...", read as a name and a value.
        RData::TXT(text) => text
            .iter_raw()
            .next()
            .filter(|(name, value)| *name == b"v" && value.is_some_and(|value| value.starts_with(b"spf1")))
            .map(|_| Record::Policy),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use simple_dns::ResourceRecord;
    use simple_dns::rdata::{A, MX, TXT};

    use super::*;

    /// A name server on this machine; its answers depend on the name and on what is asked.
    async fn server(answer: fn(&str, TYPE) -> Result<Vec<RData<'static>>, RCODE>) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            loop {
                let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
                let query = Packet::parse(&buffer[..length]).unwrap();
                let question = &query.questions[0];
                let QTYPE::TYPE(what) = question.qtype else { panic!("a type") };
                let mut reply = Packet::new_reply(query.id());
                match answer(&question.qname.to_string(), what) {
                    Ok(records) => {
                        let record = |rdata| ResourceRecord::new(question.qname.clone(), CLASS::IN, 60, rdata);
                        reply.answers.extend(records.into_iter().map(record));
                    }
                    Err(code) => *reply.rcode_mut() = code,
                }
                // What somebody else sends is passed over.
                socket.send_to(b"noise", from).await.unwrap();
                socket.send_to(&reply.build_bytes_vec().unwrap(), from).await.unwrap();
            }
        });
        address
    }

    fn mx(preference: u16, host: &'static str) -> RData<'static> {
        RData::MX(MX { preference, exchange: Name::new_unchecked(host) })
    }

    fn zones(name: &str, what: TYPE) -> Result<Vec<RData<'static>>, RCODE> {
        match (name, what) {
            ("mail.lapsed.dev", TYPE::MX) => Ok(vec![mx(20, "second.lapsed.dev"), mx(10, "first.lapsed.dev")]),
            ("mail.lapsed.dev", TYPE::TXT) => Ok(vec![
                RData::TXT(TXT::new().with_string("site=1").unwrap()),
                RData::TXT(TXT::new().with_string("v=spf1 mx -all").unwrap()),
            ]),
            ("web.lapsed.dev", TYPE::A) => Ok(vec![RData::A(A { address: 0x7f00_0001 })]),
            ("null.lapsed.dev", TYPE::MX) => Ok(vec![mx(0, "")]),
            ("null.lapsed.dev", TYPE::A) => Ok(vec![RData::A(A { address: 0x7f00_0001 })]),
            ("gone.lapsed.dev", _) => Err(RCODE::NameError),
            ("broken.lapsed.dev", _) => Err(RCODE::ServerFailure),
            _ => Ok(Vec::new()),
        }
    }

    #[tokio::test]
    async fn a_domain_takes_mail_or_it_does_not() {
        let servers = [server(zones).await];
        let takes = |at: &str, says_who| Found::Takes { at: at.to_owned(), says_who };
        assert_eq!(look_up("Mail.Lapsed.dev.", &servers).await, takes("first.lapsed.dev", true));
        assert_eq!(look_up("web.lapsed.dev", &servers).await, takes("web.lapsed.dev", false));
        assert_eq!(look_up("null.lapsed.dev", &servers).await, Found::TakesNone);
        assert_eq!(look_up("empty.lapsed.dev", &servers).await, Found::TakesNone);
        assert_eq!(look_up("gone.lapsed.dev", &servers).await, Found::Missing);
        assert!(
            matches!(look_up("broken.lapsed.dev", &servers).await, Found::Unknown(why) if why.contains("ServerFailure"))
        );
    }

    #[tokio::test]
    async fn where_nobody_answers_nothing_is_known() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let silent = silent.local_addr().unwrap();
        // Nobody has that port any more, so the next server is asked at once.
        let servers = [silent, server(zones).await];
        assert!(matches!(look_up("mail.lapsed.dev", &servers).await, Found::Takes { .. }));
        assert!(
            matches!(look_up("mail.lapsed.dev", &[silent]).await, Found::Unknown(why) if why.contains("127.0.0.1"))
        );
        assert!(matches!(look_up("mail.lapsed.dev", &[]).await, Found::Unknown(why) if why.contains("no name server")));
        for reserved in ["example.org", "mail.example.com", "x.test", "localhost"] {
            assert_eq!(look_up(reserved, &[]).await, Found::Reserved);
        }
    }

    #[test]
    fn name_servers_are_read_from_resolv_conf() {
        let text =
            "# a comment\nsearch lapsed.dev\nnameserver 192.0.2.1\nnameserver\t2001:db8::1\nnameserver fe80::1%eth0\n";
        assert_eq!(read_servers(text), ["192.0.2.1:53".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()]);
    }
}
