//! `[mail.smtp]`: the mail servers that take our mail, and how they are spoken to.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check::{path, positive};
use super::reader::{Reader, Reported};

/// `[mail.smtp]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smtp {
    /// The servers, at least one: `host` and `port`, and then `relays`. Each is used while those before it are out of
    /// reach.
    pub relays: Vec<Relay>,
    /// How connections are encrypted.
    pub tls: Tls,
    /// PEM: the authorities that a server's certificate may come from, in the place of this machine's.
    pub ca_file: Option<PathBuf>,
    /// Who we are. Where the connection may be neither encrypted nor certain, only with `allow_plain_auth`.
    pub login: Option<Login>,
    /// Whether credentials may be sent over a connection that is not protected.
    pub allow_plain_auth: bool,
    /// How many connections there may be at once, at least 1.
    pub connections: usize,
    /// After how many messages a connection is replaced; 0: never.
    pub max_messages_per_connection: u64,
    /// How long a connection that has nothing to do stays open.
    pub idle_timeout: Duration,
    /// The least time between the starts of two messages; zero: no limit.
    pub every: Duration,
    /// How long a server may take.
    pub timeouts: Timeouts,
}

/// A mail server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// A host name or an IP address.
    pub host: String,
    /// Never 0.
    pub port: u16,
}

impl std::fmt::Display for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// An account, and what proves that it is ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The account.
    pub username: String,
    /// The proof.
    pub proof: Proof,
}

/// What proves that an account is ours. The files are read anew for each connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// A file that holds the password.
    PasswordFile(PathBuf),
    /// A file that holds an OAuth 2 access token.
    TokenFile(PathBuf),
}

/// `mail.smtp.tls`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// Begins in the clear, and goes on only once encrypted (RFC 3207).
    StartTls,
    /// Encrypted from the first byte (RFC 8314).
    Implicit,
    /// Encrypted where the server offers it, whatever its certificate (RFC 7435); else in the clear.
    Opportunistic,
    /// In the clear.
    None,
}

impl Tls {
    /// The port where servers usually speak it: submission (RFC 6409), submissions (RFC 8314), smtp (RFC 5321).
    pub fn usual_port(self) -> u16 {
        match self {
            Self::StartTls => 587,
            Self::Implicit => 465,
            Self::Opportunistic | Self::None => 25,
        }
    }

    /// Whether what is sent can be read by nobody but the server that was meant.
    pub fn protects(self) -> bool {
        matches!(self, Self::StartTls | Self::Implicit)
    }
}

/// `[mail.smtp.timeouts]`: how long each phase may take. The defaults are the least that RFC 5321, section 4.5.3.2 asks
/// for, where it asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// To find and reach the server, for each of its addresses. Not in the RFC: TCP's own limit is some two minutes.
    pub connect: Duration,
    /// To greet us and answer EHLO (section 4.5.3.2.1: 5 minutes).
    pub hello: Duration,
    /// To agree on TLS. Not in the RFC.
    pub tls: Duration,
    /// To answer AUTH (RFC 4954 names no limit).
    pub auth: Duration,
    /// To answer MAIL (4.5.3.2.2: 5 minutes).
    pub mail: Duration,
    /// To answer RCPT (4.5.3.2.3: 5 minutes).
    pub rcpt: Duration,
    /// To answer DATA (4.5.3.2.4: 2 minutes).
    pub data: Duration,
    /// To take the content (4.5.3.2.5: 3 minutes).
    pub content: Duration,
    /// To answer the final dot (4.5.3.2.6: 10 minutes).
    pub dot: Duration,
    /// To answer RSET and NOOP. Not in the RFC.
    pub aside: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        const MINUTE: u64 = 60;
        Self {
            connect: Duration::from_secs(30),
            hello: Duration::from_secs(5 * MINUTE),
            tls: Duration::from_secs(MINUTE),
            auth: Duration::from_secs(2 * MINUTE),
            mail: Duration::from_secs(5 * MINUTE),
            rcpt: Duration::from_secs(5 * MINUTE),
            data: Duration::from_secs(2 * MINUTE),
            content: Duration::from_secs(3 * MINUTE),
            dot: Duration::from_secs(10 * MINUTE),
            aside: Duration::from_secs(30),
        }
    }
}

impl Smtp {
    /// One server that is spoken to in the clear, over one connection, with the defaults for everything else.
    pub fn plain(host: impl Into<String>, port: u16) -> Self {
        Self {
            relays: vec![Relay { host: host.into(), port }],
            tls: Tls::None,
            ca_file: None,
            login: None,
            allow_plain_auth: false,
            connections: 1,
            max_messages_per_connection: 1_000,
            idle_timeout: Duration::from_secs(60),
            every: Duration::ZERO,
            timeouts: Timeouts::default(),
        }
    }
}

/// Reads the section.
pub(super) fn smtp(r: &mut Reader) -> Result<Smtp, Reported> {
    let host = r.required("mail.smtp.host", host);
    let port = r.number("mail.smtp.port");
    let tls = r.required("mail.smtp.tls", |text| match text {
        "starttls" => Ok(Tls::StartTls),
        "implicit" => Ok(Tls::Implicit),
        "opportunistic" => Ok(Tls::Opportunistic),
        "none" => Ok(Tls::None),
        _ => Err("must be \"starttls\", \"implicit\", \"opportunistic\" or \"none\"".to_owned()),
    });
    let further = r.list("mail.smtp.relays", relay);
    let ca_file = r.optional("mail.smtp.ca_file", |text| path(text).and_then(|file| authorities(&file).map(|()| file)));
    let allow_plain_auth = r.flag("mail.smtp.allow_plain_auth");
    let login = login(r);
    let connections = r.number("mail.smtp.connections");
    let max_messages_per_connection = r.number("mail.smtp.max_messages_per_connection");
    let idle_timeout = r.required("mail.smtp.idle_timeout", span);
    let every = r.required("mail.smtp.rate", rate);
    let timeouts = timeouts(r);

    if let (Ok(tls), Ok(Some(_)), Ok(false)) = (&tls, &login, &allow_plain_auth)
        && !tls.protects()
    {
        r.report(
            "mail.smtp.tls",
            "would send the password of mail.smtp.username where others may read it: use \"starttls\" or \"implicit\", \
             or else allow_plain_auth = true",
        );
    }
    let connections = match connections? {
        0 => return Err(r.report("mail.smtp.connections", "must be at least 1")),
        connections => usize::from(connections),
    };
    let tls = tls?;
    let usual = |port: u16| if port == 0 { tls.usual_port() } else { port };
    let mut relays = vec![Relay { host: host?, port: usual(port?) }];
    relays.extend(further?.into_iter().map(|(host, port)| Relay { host, port: usual(port) }));
    Ok(Smtp {
        relays,
        tls,
        ca_file: ca_file?,
        login: login?,
        allow_plain_auth: allow_plain_auth?,
        connections,
        max_messages_per_connection: max_messages_per_connection?.into(),
        idle_timeout: idle_timeout?,
        every: every?,
        timeouts: timeouts?,
    })
}

fn login(r: &mut Reader) -> Result<Option<Login>, Reported> {
    let username = r.optional("mail.smtp.username", |text| Ok(text.to_owned()));
    let password_file = r.optional("mail.smtp.password_file", path);
    let token_file = r.optional("mail.smtp.oauth_token_file", path);
    let proof = match (password_file?, token_file?) {
        (Some(_), Some(_)) => {
            return Err(r.report("mail.smtp.oauth_token_file", "cannot stand beside mail.smtp.password_file"));
        }
        (Some(file), None) => Some(Proof::PasswordFile(file)),
        (None, Some(file)) => Some(Proof::TokenFile(file)),
        (None, None) => None,
    };
    match (username?, proof) {
        (Some(username), Some(proof)) => Ok(Some(Login { username, proof })),
        (None, None) => Ok(None),
        (Some(_), None) => {
            let why = "needs mail.smtp.password_file or mail.smtp.oauth_token_file beside it";
            Err(r.report("mail.smtp.username", why))
        }
        (None, Some(Proof::PasswordFile(_))) => {
            Err(r.report("mail.smtp.password_file", "needs mail.smtp.username beside it"))
        }
        (None, Some(Proof::TokenFile(_))) => {
            Err(r.report("mail.smtp.oauth_token_file", "needs mail.smtp.username beside it"))
        }
    }
}

fn timeouts(r: &mut Reader) -> Result<Timeouts, Reported> {
    let connect = r.required("mail.smtp.timeouts.connect", span);
    let hello = r.required("mail.smtp.timeouts.hello", span);
    let tls = r.required("mail.smtp.timeouts.tls", span);
    let auth = r.required("mail.smtp.timeouts.auth", span);
    let mail = r.required("mail.smtp.timeouts.mail", span);
    let rcpt = r.required("mail.smtp.timeouts.rcpt", span);
    let data = r.required("mail.smtp.timeouts.data", span);
    let content = r.required("mail.smtp.timeouts.content", span);
    let dot = r.required("mail.smtp.timeouts.dot", span);
    let aside = r.required("mail.smtp.timeouts.aside", span);
    Ok(Timeouts {
        connect: connect?,
        hello: hello?,
        tls: tls?,
        auth: auth?,
        mail: mail?,
        rcpt: rcpt?,
        data: data?,
        content: content?,
        dot: dot?,
        aside: aside?,
    })
}

fn host(text: &str) -> Result<String, String> {
    // A colon that is alone stands before a port; an IPv6 address has more.
    if text.contains(|c: char| c.is_whitespace() || "/@[]".contains(c)) || text.matches(':').count() == 1 {
        Err("must be the name or the address of a host, and nothing else; the port is mail.smtp.port".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

/// `HOST`, `HOST:PORT` or `[ADDRESS]:PORT`; the port is 0 where none is given.
fn relay(text: &str) -> Result<(String, u16), String> {
    let text = text.trim();
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => (name, Some(port)),
        _ => (text, None),
    };
    let wrong = || format!("{text:?} is no host: write \"HOST\" or \"HOST:PORT\"");
    let port = port.map(|port| port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)).transpose()?;
    let name = name.trim_start_matches('[').trim_end_matches(']');
    if name.is_empty() {
        return Err(wrong());
    }
    Ok((host(name)?, port.unwrap_or_default()))
}

/// The file must be there and hold certificates: a daemon that trusts nobody delivers nothing.
fn authorities(file: &Path) -> Result<(), String> {
    use tokio_rustls::rustls::pki_types::{CertificateDer, pem::PemObject};
    let certificates = CertificateDer::pem_file_iter(file).map_err(|error| format!("cannot be read: {error}"))?;
    let mut found = 0_usize;
    for certificate in certificates {
        certificate.map_err(|error| format!("is not a PEM file of certificates: {error}"))?;
        found += 1;
    }
    if found == 0 { Err("holds no certificate in PEM form".to_owned()) } else { Ok(()) }
}

/// "100/s", "20/m", "500/h", or "0": the time between two messages.
fn rate(text: &str) -> Result<Duration, String> {
    let wrong = || "must be a number of messages per second, minute or hour, such as \"100/s\", or \"0\"".to_owned();
    if text.trim() == "0" {
        return Ok(Duration::ZERO);
    }
    let (count, unit) = text.split_once('/').ok_or_else(wrong)?;
    let unit = match unit.trim() {
        "s" => Duration::from_secs(1),
        "m" => Duration::from_secs(60),
        "h" => Duration::from_secs(3_600),
        _ => return Err(wrong()),
    };
    match count.trim().parse::<u32>() {
        Ok(0) => Ok(Duration::ZERO),
        Ok(count) if count <= 1_000_000 => Ok(unit / count),
        _ => Err(wrong()),
    }
}

fn span(text: &str) -> Result<Duration, String> {
    positive(text)?.to_std().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_times_between_messages() {
        assert_eq!(rate("100/s"), Ok(Duration::from_millis(10)));
        assert_eq!(rate("30 / m"), Ok(Duration::from_secs(2)));
        assert_eq!(rate("1/h"), Ok(Duration::from_secs(3_600)));
        assert_eq!((rate("0"), rate("0/s")), (Ok(Duration::ZERO), Ok(Duration::ZERO)));
        for wrong in ["", "100", "s", "-1/s", "1/d", "1.5/s", "9999999/s"] {
            assert!(rate(wrong).is_err_and(|why| why.contains("100/s")), "{wrong}");
        }
    }

    #[test]
    fn relays_have_a_host_and_perhaps_a_port() {
        for (text, host, port) in [
            ("mx2.example.org", "mx2.example.org", 0),
            (" mx2.example.org:2525", "mx2.example.org", 2525),
            ("[2001:db8::1]:25", "2001:db8::1", 25),
            ("[2001:db8::1]", "2001:db8::1", 0),
            ("2001:db8::1", "2001:db8::1", 0),
        ] {
            assert_eq!(relay(text), Ok((host.to_owned(), port)), "{text}");
        }
        for wrong in ["", ":25", "mx:0", "mx:smtp", "mx:99999", "a b", "u@h"] {
            assert!(relay(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Relay { host: "2001:db8::1".into(), port: 25 }.to_string(), "[2001:db8::1]:25");
    }
}
