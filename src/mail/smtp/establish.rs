//! Everything from the name of a mail server to a session that can deliver.

use std::path::Path;
use std::sync::Arc;

use lettre::transport::smtp::authentication::{Credentials, Mechanism};
use lettre::transport::smtp::client::{
    AsyncSmtpConnection, AsyncTokioStream, Certificate, CertificateStore, TlsParameters,
};
use lettre::transport::smtp::commands::Ehlo;
use lettre::transport::smtp::extension::ClientId;

use super::fault::{Fault, broken, within};
use super::offers::Offers;
use super::stream::{self, Written};
use crate::config::{self, Login, Proof, Relay, Tls};
use crate::mail::outcome::{Happened, Phase};

/// A connection on which a message can be delivered.
pub(super) struct Established {
    pub(super) connection: AsyncSmtpConnection,
    pub(super) written: Written,
    pub(super) offers: Offers,
}

/// Connects, encrypts and authenticates as the options say.
///
/// # Errors
/// What went wrong, in a phase before any message was mentioned.
pub(super) async fn establish(
    options: Arc<config::Smtp>,
    relay: Relay,
    hello: ClientId,
) -> Result<Established, Happened> {
    let written = Written::default();
    let mut connection = match encrypted(&options, &relay, options.tls, &hello, &written).await {
        // Who may read along may just as well: a handshake that fails must not keep the mail back.
        Err(happened) if options.tls == Tls::Opportunistic && is_about_tls(&happened) => {
            encrypted(&options, &relay, Tls::None, &hello, &written).await?
        }
        connection => connection?,
    };
    if let Some(login) = &options.login {
        authenticate(&mut connection, login, &options).await?;
    }
    // lettre keeps to itself what it does not know, such as PIPELINING, so the server is asked once more.
    let answer = within(options.timeouts.hello, connection.command(Ehlo::new(hello))).await;
    let offers = Offers::read(answer.map_err(|fault| fault.at(Phase::Hello))?.message());
    Ok(Established { connection, written, offers })
}

fn is_about_tls(happened: &Happened) -> bool {
    matches!(happened, Happened::Refused { phase: Phase::Tls, .. } | Happened::Broken { phase: Phase::Tls, .. })
}

async fn encrypted(
    options: &config::Smtp,
    relay: &Relay,
    tls: Tls,
    hello: &ClientId,
    written: &Written,
) -> Result<AsyncSmtpConnection, Happened> {
    let timeouts = &options.timeouts;
    let (socket, peer) = stream::connect(&relay.host, relay.port, timeouts.connect)
        .await
        .map_err(|error| broken(Phase::Connect, &format!("{relay}: {error}")))?;
    let stream: Box<dyn AsyncTokioStream> = if tls == Tls::Implicit {
        let protected = async {
            let protected = stream::protect(socket, &relay.host, options.ca_file.as_deref()).await;
            protected.map_err(|error| Fault::Broken(error.to_string()))
        };
        let protected = within(timeouts.tls, protected).await.map_err(|fault| fault.at(Phase::Tls))?;
        Box::new(stream::LineByLine::new(protected, peer, written.clone()))
    } else {
        Box::new(stream::LineByLine::new(socket, peer, written.clone()))
    };
    let connection = AsyncSmtpConnection::connect_with_transport(stream, hello);
    let mut connection = within(timeouts.hello, connection).await.map_err(|fault| fault.at(Phase::Hello))?;
    let starttls = match (tls, connection.can_starttls()) {
        (Tls::StartTls, false) => {
            return Err(broken(Phase::Tls, "the server does not offer STARTTLS, and tls = \"starttls\" requires it"));
        }
        (Tls::StartTls | Tls::Opportunistic, offered) => offered,
        (Tls::Implicit | Tls::None, _) => false,
    };
    if starttls {
        let parameters = parameters(options, relay, tls).await.map_err(|error| broken(Phase::Tls, &error))?;
        let protected = connection.starttls(parameters, hello);
        within(timeouts.tls, protected).await.map_err(|fault| fault.at(Phase::Tls))?;
    }
    Ok(connection)
}

/// Whom to trust.
async fn parameters(options: &config::Smtp, relay: &Relay, tls: Tls) -> Result<TlsParameters, String> {
    let mut builder = TlsParameters::builder(relay.host.clone());
    if tls == Tls::Opportunistic {
        // Whoever could show a wrong certificate could also hide that TLS is offered (RFC 7435).
        builder = builder.dangerous_accept_invalid_certs(true).dangerous_accept_invalid_hostnames(true);
    } else if let Some(file) = &options.ca_file {
        let pem = read(file, "the certificates").await?;
        let certificate = Certificate::from_pem(pem.as_bytes()).map_err(|error| error.to_string())?;
        builder = builder.certificate_store(CertificateStore::None).add_root_certificate(certificate);
    }
    builder.build().map_err(|error| error.to_string())
}

async fn authenticate(
    connection: &mut AsyncSmtpConnection,
    login: &Login,
    options: &config::Smtp,
) -> Result<(), Happened> {
    if !options.tls.protects() && !options.allow_plain_auth {
        let error = "credentials are not sent over an unprotected connection unless allow_plain_auth is true";
        return Err(broken(Phase::Auth, error));
    }
    let (mechanisms, file, what): (&[Mechanism], _, _) = match &login.proof {
        Proof::PasswordFile(file) => (&[Mechanism::Plain, Mechanism::Login], file, "the password"),
        Proof::TokenFile(file) => (&[Mechanism::Xoauth2], file, "the access token"),
    };
    let proof = read(file, what).await.map_err(|error| broken(Phase::Auth, &error))?;
    let proof = proof.trim_end_matches(['\r', '\n']).to_owned();
    let credentials = Credentials::new(login.username.clone(), proof);
    let welcome = within(options.timeouts.auth, connection.auth(mechanisms, &credentials)).await;
    welcome.map(|_| ()).map_err(|fault| fault.at(Phase::Auth))
}

async fn read(file: &Path, what: &str) -> Result<String, String> {
    let text = tokio::fs::read_to_string(file).await;
    text.map_err(|error| format!("cannot read {what} from {}: {error}", file.display()))
}
