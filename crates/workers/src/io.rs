//! Sockets: TCP or, in tests, a pipe; plain or TLS; with bytes that were read to detect a protocol
//! put back in front.
//!
//! All of the data path reads and writes through [`Io`], so that another driver can be tried.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::TcpStream;

/// Bytes that were read before, to be read again.
#[derive(Debug, Default)]
struct Front(Bytes);

impl Front {
    /// Puts bytes before what is here already, of which they were read.
    fn put_back(&mut self, bytes: Bytes) {
        self.0 = if self.0.is_empty() { bytes } else { [bytes, self.0.clone()].concat().into() };
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives what fits. `false`: there is nothing.
    fn give(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        if self.0.is_empty() {
            return false;
        }
        let n = self.0.len().min(buf.remaining());
        buf.put_slice(&self.0[..n]);
        self.0.advance(n);
        true
    }
}

/// A byte stream below TLS.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: Stream,
    front: Front,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    /// A pipe inside the process.
    Pipe(DuplexStream),
}

impl Socket {
    pub(crate) fn tcp(stream: TcpStream) -> Self {
        Self { stream: Stream::Tcp(stream), front: Front::default() }
    }

    #[cfg_attr(not(test), expect(dead_code, reason = "tests drive connections through pipes"))]
    pub(crate) fn pipe(stream: DuplexStream) -> Self {
        Self { stream: Stream::Pipe(stream), front: Front::default() }
    }

    /// Puts bytes back, to be read first.
    pub(crate) fn unread(&mut self, bytes: Bytes) {
        self.front.put_back(bytes);
    }

    pub(crate) fn tcp_stream(&self) -> Option<&TcpStream> {
        match &self.stream {
            Stream::Tcp(stream) => Some(stream),
            Stream::Pipe(_) => None,
        }
    }

    /// Ready when a read may give something; may be ready falsely.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.stream {
            Stream::Tcp(stream) if self.front.is_empty() => stream.poll_read_ready(cx).map(|_| ()),
            _ => Poll::Ready(()),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.front.give(buf) {
            return Poll::Ready(Ok(()));
        }
        match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Pipe(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Pipe(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Pipe(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        matches!(self.stream, Stream::Tcp(_))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Pipe(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// A byte stream as codecs see it.
#[derive(Debug)]
pub(crate) enum Io {
    Plain(Socket),
    ServerTls(Box<ServerTls>),
    ClientTls(Box<tokio_rustls::client::TlsStream<Socket>>),
}

/// The server's end of TLS.
#[derive(Debug)]
pub(crate) struct ServerTls {
    stream: tokio_rustls::server::TlsStream<Socket>,
    front: Front,
}

impl Io {
    /// The server's end of TLS, after the handshake.
    pub(crate) fn server_tls(stream: tokio_rustls::server::TlsStream<Socket>) -> Self {
        Self::ServerTls(Box::new(ServerTls { stream, front: Front::default() }))
    }

    pub(crate) fn socket(&self) -> &Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::ServerTls(tls) => tls.stream.get_ref().0,
            Self::ClientTls(stream) => stream.get_ref().0,
        }
    }

    /// Puts bytes of a client back, to be read first.
    pub(crate) fn unread(&mut self, bytes: Bytes) {
        match self {
            Self::Plain(socket) => socket.unread(bytes),
            Self::ServerTls(tls) => tls.front.put_back(bytes),
            Self::ClientTls(_) => debug_assert!(bytes.is_empty(), "only clients are read ahead of"),
        }
    }

    /// From now on its end is a reset: whoever reads it must not take what came for all there was.
    pub(crate) fn end_in_reset(&self) {
        if let Some(stream) = self.socket().tcp_stream()
            && let Err(error) = socket2::SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO))
        {
            tracing::debug!(%error, "a broken connection ends without a reset");
        }
    }

    /// The protocol TLS agreed on.
    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        match self {
            Self::Plain(_) => None,
            Self::ServerTls(tls) => tls.stream.get_ref().1.alpn_protocol(),
            Self::ClientTls(stream) => stream.get_ref().1.alpn_protocol(),
        }
    }

    /// Ready when a read may give something. Only right after a read said `Pending`.
    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::ServerTls(tls) if !tls.front.is_empty() => Poll::Ready(()),
            _ => self.socket().poll_readable(cx),
        }
    }

    /// Reads once into `buf`, which keeps what it holds. 0 is the end.
    pub(crate) fn poll_read_buf(&mut self, cx: &mut Context<'_>, buf: &mut BytesMut) -> Poll<io::Result<usize>> {
        debug_assert!(buf.capacity() > buf.len(), "a read needs room");
        let read = self.read_buf(buf);
        std::pin::pin!(read).poll(cx)
    }
}

macro_rules! each {
    ($self:expr, $stream:ident => $body:expr) => {
        match $self.get_mut() {
            Io::Plain($stream) => $body,
            Io::ServerTls(tls) => {
                let $stream = &mut tls.stream;
                $body
            }
            Io::ClientTls($stream) => $body,
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Self::ServerTls(tls) = &mut *self
            && tls.front.give(buf)
        {
            return Poll::Ready(Ok(()));
        }
        each!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(socket) => socket.is_write_vectored(),
            Self::ServerTls(_) | Self::ClientTls(_) => true,
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn what_was_put_back_is_read_first() {
        let (mut far, near) = tokio::io::duplex(64);
        let mut socket = Socket::pipe(near);
        socket.unread(Bytes::from_static(b"ab"));
        far.write_all(b"cd").await.unwrap();
        drop(far);
        let mut all = Vec::new();
        Io::Plain(socket).read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"abcd");
    }
}
