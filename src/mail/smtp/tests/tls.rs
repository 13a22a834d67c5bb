//! Encryption and accounts, against a server with a certificate that is made for the test.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use tokio::io::{AsyncBufRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::*;

/// A certificate for 127.0.0.1 that no machine trusts, and its key.
struct Certificate {
    directory: TempDir,
}

impl Certificate {
    fn make() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let made = Command::new("openssl")
            .current_dir(directory.path())
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=mx.example.org", "-addext", "subjectAltName=IP:127.0.0.1"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", "key.pem", "-out", "cert.pem"])
            .output()
            .expect("the command openssl");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self { directory }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("cert.pem")
    }

    fn acceptor(&self) -> TlsAcceptor {
        let chain = CertificateDer::pem_file_iter(self.file()).expect("a file").collect::<Result<_, _>>();
        let key = PrivateKeyDer::from_pem_file(self.directory.path().join("key.pem")).expect("a key");
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain.expect("certificates"), key))
            .expect("a configuration");
        TlsAcceptor::from(Arc::new(config))
    }
}

/// How the scripted server is encrypted.
#[derive(Clone, Copy, PartialEq)]
enum From {
    TheFirstByte,
    StartTls,
    /// Says that it is ready for TLS, and then speaks something else.
    Never,
}

/// Serves as many connections as there are, and tells what was said in each, first in the clear, then encrypted.
async fn serve(certificate: &Certificate, from: From) -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let (log, acceptor) = (heard.clone(), certificate.acceptor());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (log, acceptor) = (log.clone(), acceptor.clone());
            tokio::spawn(async move {
                if from == From::TheFirstByte {
                    let Ok(stream) = acceptor.accept(socket).await else { return };
                    converse(&mut BufReader::new(stream), "tls ", true, &log).await;
                    return;
                }
                let mut socket = BufReader::new(socket);
                if !converse(&mut socket, "clear ", true, &log).await {
                    return;
                }
                if from == From::Never {
                    let _ = socket.write_all(b"what is TLS?\r\n").await;
                    return;
                }
                let Ok(stream) = acceptor.accept(socket.into_inner()).await else { return };
                converse(&mut BufReader::new(stream), "tls ", false, &log).await;
            });
        }
    });
    (port, heard)
}

/// Answers everything with yes. Returns whether the client asks to go on encrypted.
async fn converse<S>(stream: &mut S, prefix: &str, greet: bool, log: &Mutex<Vec<String>>) -> bool
where
    S: AsyncBufRead + AsyncWrite + Unpin,
{
    if greet && stream.write_all(b"220 mx\r\n").await.is_err() {
        return false;
    }
    let mut line = String::new();
    let mut content = false;
    while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
        let said = std::mem::take(&mut line);
        if content {
            content = said != ".\r\n";
            if content {
                continue;
            }
        }
        let verb: String = said.chars().take_while(char::is_ascii_alphabetic).collect();
        log.lock().expect("not poisoned").push(format!("{prefix}{}", said.trim_end()));
        let offers = if prefix == "clear " { "250-STARTTLS\r\n" } else { "" };
        let answer = match verb.as_str() {
            "EHLO" => format!("250-mx\r\n{offers}250 AUTH PLAIN LOGIN XOAUTH2\r\n"),
            "STARTTLS" => "220 go\r\n".to_owned(),
            "AUTH" => "235 2.7.0 welcome\r\n".to_owned(),
            "DATA" => "354 go\r\n".to_owned(),
            _ => "250 ok\r\n".to_owned(),
        };
        content = verb == "DATA";
        let answered = stream.write_all(answer.as_bytes()).await.is_ok() && stream.flush().await.is_ok();
        if !answered || verb == "STARTTLS" {
            return answered;
        }
    }
    false
}

fn options(port: u16, tls: Tls, ca_file: Option<&Path>) -> config::Smtp {
    config::Smtp { tls, ca_file: ca_file.map(Path::to_owned), ..config::Smtp::plain("127.0.0.1", port) }
}

fn said(heard: &Mutex<Vec<String>>, start: &str) -> bool {
    heard.lock().expect("not poisoned").iter().any(|line| line.starts_with(start))
}

#[tokio::test]
async fn a_private_authority_is_trusted_where_it_is_named_and_nowhere_else() {
    let certificate = Certificate::make();
    for (tls, from) in [(Tls::Implicit, From::TheFirstByte), (Tls::StartTls, From::StartTls)] {
        let (port, heard) = serve(&certificate, from).await;
        let mut stranger = Smtp::new(options(port, tls, None));
        assert_eq!(phase_of(&stranger.ready().await.expect_err("not trusted")), Phase::Tls, "{tls:?}");
        assert!(!said(&heard, "tls "));
        let mut smtp = Smtp::new(options(port, tls, Some(&certificate.file())));
        assert!(matches!(smtp.send(&mail(), || async { true }).await, Happened::Accepted { .. }), "{tls:?}");
        assert!(said(&heard, "tls MAIL") && !said(&heard, "clear MAIL"), "{tls:?}");
    }
}

#[tokio::test]
async fn opportunistic_encryption_takes_what_it_gets() {
    let certificate = Certificate::make();
    let (port, heard) = serve(&certificate, From::StartTls).await;
    let mut smtp = Smtp::new(options(port, Tls::Opportunistic, None));
    assert!(matches!(smtp.send(&mail(), || async { true }).await, Happened::Accepted { .. }));
    assert!(said(&heard, "tls MAIL") && !said(&heard, "clear MAIL"), "whatever the certificate");

    let (port, heard) = serve(&certificate, From::Never).await;
    let mut smtp = Smtp::new(options(port, Tls::Opportunistic, None));
    assert!(matches!(smtp.send(&mail(), || async { true }).await, Happened::Accepted { .. }));
    assert!(said(&heard, "clear MAIL"), "in the clear where encryption fails");

    let server = Server::start(vec![script(&[&GREETING, &MAIL, &RCPT, &DATA, &ACCEPT])]).await;
    let mut smtp = server.smtp_with(Tls::Opportunistic, Timeouts::default());
    assert!(matches!(smtp.send(&mail(), || async { true }).await, Happened::Accepted { .. }), "where none is offered");
    server.finish().await;
}

#[tokio::test]
async fn a_token_is_read_at_each_connect_and_never_sent_where_others_read() {
    let certificate = Certificate::make();
    let (port, heard) = serve(&certificate, From::StartTls).await;
    let file = certificate.directory.path().join("token");
    let login = Some(Login { username: "ann".into(), proof: Proof::TokenFile(file.clone()) });
    for token in ["old", "new"] {
        std::fs::write(&file, format!("{token}\n")).expect("written");
        let certified = options(port, Tls::StartTls, Some(&certificate.file()));
        Smtp::new(config::Smtp { login: login.clone(), ..certified }).ready().await.expect("ready");
    }
    // base64 of user=ann, 1, auth=Bearer old, 1, 1; and of the same with "new".
    for proof in ["dXNlcj1hbm4BYXV0aD1CZWFyZXIgb2xkAQE=", "dXNlcj1hbm4BYXV0aD1CZWFyZXIgbmV3AQE="] {
        assert!(said(&heard, &format!("tls AUTH XOAUTH2 {proof}")), "{:?}", heard.lock());
    }
    for tls in [Tls::None, Tls::Opportunistic] {
        let refused = Smtp::new(config::Smtp { login: login.clone(), ..options(port, tls, None) }).ready().await;
        assert_eq!(phase_of(&refused.expect_err("not protected")), Phase::Auth, "{tls:?}");
    }
    assert_eq!(heard.lock().expect("not poisoned").iter().filter(|line| line.contains("AUTH")).count(), 2);
}
