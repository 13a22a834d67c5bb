//! The bytes between us and a mail server: how they are carried and protected.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use lettre::transport::smtp::client::AsyncTokioStream;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// How long a line of a reply may be, in bytes. 512 is what a client must take (RFC 5321, section 4.5.3.1.5); lettre gives up
/// at 1,000, but only when it has read the whole of it.
const LONGEST_LINE: usize = 4_096;

/// After how much silence the machine asks whether the other end is still there, and how often it asks again.
const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(10);

/// Connects to the first of the host's addresses that answers within `limit`.
///
/// # Errors
/// What went wrong with the last one.
pub(super) async fn connect(host: &str, port: u16, limit: Duration) -> io::Result<(TcpStream, SocketAddr)> {
    let silent = || io::Error::new(io::ErrorKind::TimedOut, "no answer");
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in timeout(limit, lookup_host((host, port))).await.map_err(|_| silent())?? {
        match timeout(limit, TcpStream::connect(address)).await {
            Ok(Ok(socket)) => {
                // A command waits for its answer, so Nagle's algorithm would hold back each final dot.
                socket.set_nodelay(true)?;
                let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE_EVERY);
                SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
                return Ok((socket, address));
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = silent(),
        }
    }
    Err(last)
}

/// TLS with the authorities of this file, or else with those that this machine trusts.
///
/// # Errors
/// When there are none, the host's name cannot be one, or the handshake fails.
pub(super) async fn protect(socket: TcpStream, host: &str, ca_file: Option<&Path>) -> io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(file) => {
            let pem = tokio::fs::read(file).await?;
            let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
            roots.add_parsable_certificates(certificates.map_err(io::Error::other)?);
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    TlsConnector::from(Arc::new(config)).connect(name, socket).await
}

/// How many bytes have gone out on a stream; clones count the same.
///
/// Below TLS it counts what is encrypted, which is never less than what was to be said.
#[derive(Clone, Debug, Default)]
pub(super) struct Written(Arc<AtomicUsize>);

impl Written {
    /// So many until now. Of more than the address space holds it begins anew.
    pub(super) fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A stream that is read one line at a time, and counts what is written.
///
/// lettre reads ahead, and keeps what it read when STARTTLS replaces the stream below. Whoever sits on the wire could
/// so put replies in the clear behind the answer to STARTTLS, which would later pass for the server's (the flaw of
/// CVE-2011-0411). Behind this stream nothing is read ahead: such replies meet the TLS handshake instead, which fails.
/// A line that does not end is an error, and not read for as long as the server cares to go on.
#[derive(Debug)]
pub(super) struct LineByLine<S> {
    inner: S,
    peer: SocketAddr,
    written: Written,
    /// Read, but not handed on yet: from `at`.
    read: Vec<u8>,
    at: usize,
    /// How much of the present line has been handed on.
    of_line: usize,
}

impl<S> LineByLine<S> {
    pub(super) fn new(inner: S, peer: SocketAddr, written: Written) -> Self {
        Self { inner, peer, written, read: Vec::new(), at: 0, of_line: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for LineByLine<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.at == this.read.len() {
            let mut bytes = [0; 4096];
            let mut chunk = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut chunk))?;
            this.read.clear();
            this.read.extend_from_slice(chunk.filled());
            this.at = 0;
        }
        let rest = this.read.get(this.at..).unwrap_or_default();
        let line = rest.iter().position(|byte| *byte == b'\n').map_or(rest.len(), |end| end + 1);
        let (line, _) = rest.split_at(line.min(out.remaining()));
        this.of_line += line.len();
        if this.of_line > LONGEST_LINE {
            let problem = format!("a line of the reply is longer than {LONGEST_LINE} bytes");
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, problem)));
        }
        if line.ends_with(b"\n") {
            this.of_line = 0;
        }
        out.put_slice(line);
        this.at += line.len();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LineByLine<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.inner).poll_write(context, bytes));
        if let Ok(bytes) = written {
            this.written.add(bytes);
        }
        Poll::Ready(written)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}

impl<S> AsyncTokioStream for LineByLine<S>
where
    S: AsyncRead + AsyncWrite + Send + Sync + Unpin + std::fmt::Debug,
{
    fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.peer)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

    use super::*;

    fn by_line<S: AsyncRead + Unpin>(inner: S) -> BufReader<LineByLine<S>> {
        BufReader::new(LineByLine::new(inner, ([127, 0, 0, 1], 25).into(), Written::default()))
    }

    #[tokio::test]
    async fn a_line_that_does_not_end_is_not_read_for_ever() {
        let mut read = Vec::new();
        let mut endless = by_line(tokio::io::repeat(b'x'));
        let error = endless.read_until(b'\n', &mut read).await.expect_err("no end");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(read.len() <= LONGEST_LINE, "{}", read.len());
    }

    #[tokio::test]
    async fn many_lines_are_no_long_line() {
        let line = [&[b'x'; 998][..], b"\r\n"].concat();
        let mut read = Vec::new();
        by_line(&*line.repeat(20)).read_to_end(&mut read).await.expect("lines");
        assert_eq!(read.len(), 20_000);
    }
}
