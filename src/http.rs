//! `/healthz`, `/readyz` and `/metrics`, for whoever watches the daemon.
//!
//! Guarantees that nobody who asks can hold anything up: a connection has a few seconds and one request, there are few at
//! once, a header has a bound, and what is answered was counted before. `/readyz` alone asks the store, one small question a
//! second at most, and does not wait for long. Relies on whoever configures the address to choose who may reach it: there is
//! no encryption and no account, and nothing private to read. A crash leaves nothing behind.

mod site;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::store::Store;
pub use site::{Hangs, Site};

/// How many connections are served at once: one more ends the oldest, which had its time.
const CONNECTIONS: usize = 32;

/// How long a connection may take, from its first byte to its last.
const CONNECTION: Duration = Duration::from_secs(10);

/// How large a request's head may be, in bytes: the least that hyper takes for its buffer.
const HEAD: usize = 8_192;

/// How many headers a request may have.
const HEADERS: usize = 64;

/// How long it waits where no connection can be accepted: too many files are open, say.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// The socket that systemd passes (systemd.socket(5)), or else one of our own at this address; `None` where there is
/// neither.
///
/// # Errors
/// When nothing can listen there: what is wrong, and what would be right.
pub fn listen(address: Option<SocketAddr>) -> anyhow::Result<Option<TcpListener>> {
    let passed = listenfd::ListenFd::from_env().take_tcp_listener(0);
    let passed =
        passed.context("the socket that systemd passes is not one for TCP: see ListenStream= of the socket unit")?;
    let listener = match (passed, address) {
        (Some(passed), _) => passed,
        (None, Some(address)) => std::net::TcpListener::bind(address).map_err(|error| {
            let right = match error.kind() {
                ErrorKind::AddrInUse => "something else listens there (`ss -ltnp` tells what): choose another port",
                ErrorKind::AddrNotAvailable => "this machine has no such address: 127.0.0.1 is always there",
                ErrorKind::PermissionDenied => "choose a port above 1023",
                _ => "choose another address",
            };
            anyhow::anyhow!("http.listen = \"{address}\": {error}; {right}")
        })?,
        (None, None) => return Ok(None),
    };
    listener.set_nonblocking(true).context("the socket for HTTP cannot be used")?;
    Ok(Some(TcpListener::from_std(listener).context("the socket for HTTP cannot be used")?))
}

/// Answers until `stop`.
pub async fn serve<S: Store, C: Clock>(listener: TcpListener, site: Arc<Site<S, C>>, stop: CancellationToken) {
    let address = listener.local_addr().map_or_else(|_| "an unknown address".to_owned(), |address| address.to_string());
    tracing::info!(http = %address, "answers at /healthz, /readyz and /metrics");
    // Dropped at the end, and with it whatever is still under way.
    let mut connections = JoinSet::new();
    let mut oldest_first: VecDeque<AbortHandle> = VecDeque::new();
    let mut refused = false;
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                refused = false;
                oldest_first.retain(|connection| !connection.is_finished());
                if oldest_first.len() >= CONNECTIONS
                    && let Some(oldest) = oldest_first.pop_front()
                {
                    oldest.abort();
                }
                oldest_first.push_back(connections.spawn(answer(stream, site.clone())));
            }
            Err(error) => {
                if !std::mem::replace(&mut refused, true) {
                    tracing::warn!(%error, "cannot accept a connection for HTTP: will try again");
                }
                stop.run_until_cancelled(tokio::time::sleep(ACCEPT_AGAIN)).await;
            }
        }
    }
}

/// Answers the one request of a connection. A client that hangs up, is too slow or speaks something else has no answer to
/// hear.
async fn answer<S: Store, C: Clock>(stream: TcpStream, site: Arc<Site<S, C>>) {
    let answer = service_fn(|request| {
        let site = site.clone();
        async move { Ok::<_, Infallible>(site.answer(&request).await) }
    });
    let mut http = http1::Builder::new();
    http.keep_alive(false).max_buf_size(HEAD).max_header_size(HEAD).max_headers(HEADERS);
    let _ = tokio::time::timeout(CONNECTION, http.serve_connection(TokioIo::new(stream), answer)).await;
}
