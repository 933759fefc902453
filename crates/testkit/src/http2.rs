//! An HTTP/2 client, by prior knowledge or over TLS, and gRPC's messages over it.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Runtime;

use crate::http::Response;
use crate::tunnel::Tunnel;

/// How long one step of a stream may take.
const STEP_MAX: Duration = crate::PATIENCE;

/// One connection; its streams may be used side by side.
#[derive(Debug)]
pub struct Client2 {
    sender: SendRequest<Bytes>,
    runtime: Runtime,
    /// Sent with every request.
    headers: Vec<(String, String)>,
    /// Whose bytes carry the connection, if it begins in a pod.
    _tunnel: Option<Tunnel>,
}

/// A request under way.
#[derive(Debug)]
pub struct Stream2<'a> {
    client: &'a Client2,
    sending: SendStream<Bytes>,
    response: Option<ResponseFuture>,
    body: Option<RecvStream>,
    unread: BytesMut,
}

fn pairs(map: &HeaderMap) -> Vec<(String, String)> {
    map.iter().map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())).collect()
}

/// A message as gRPC puts it into a body: not compressed, length, bytes.
pub fn message(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0];
    out.extend(u32::try_from(bytes.len()).expect("a test's message is short").to_be_bytes());
    out.extend(bytes);
    out
}

impl Client2 {
    /// In the clear.
    pub fn plain(address: SocketAddr) -> io::Result<Self> {
        Self::connect(None, async move {
            let stream = tokio::net::TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })
    }

    /// Over TLS to `name`, trusting the certificate `root` only; the server must agree on `h2`.
    pub fn tls(address: SocketAddr, name: &str, root: &[u8]) -> io::Result<Self> {
        let mut config = crate::tls::client(root, rustls::crypto::aws_lc_rs::default_provider())?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let name = name.to_owned().try_into().map_err(io::Error::other)?;
        Self::connect(None, async move {
            let stream = tokio::net::TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
            match stream.get_ref().1.alpn_protocol() {
                Some(b"h2") => Ok(stream),
                other => Err(io::Error::other(format!("the server chose {other:?}"))),
            }
        })
    }

    /// With this header in every request.
    #[must_use]
    pub fn with_header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// From inside a pod.
    pub fn over(mut tunnel: Tunnel) -> io::Result<Self> {
        let (output, input) = tunnel.split().ok_or(io::ErrorKind::NotConnected)?;
        Self::connect(Some(tunnel), async move {
            let (output, input) =
                (tokio::process::ChildStdout::from_std(output)?, tokio::process::ChildStdin::from_std(input)?);
            Ok(tokio::io::join(output, input))
        })
    }

    fn connect<T>(tunnel: Option<Tunnel>, dial: impl Future<Output = io::Result<T>>) -> io::Result<Self>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let sender = runtime.block_on(async {
            let io = dial.await?;
            let (sender, connection) = h2::client::handshake(io).await.map_err(io::Error::other)?;
            // its end shows at the streams
            tokio::spawn(connection);
            Ok::<_, io::Error>(sender)
        })?;
        Ok(Self { sender, runtime, headers: Vec::new(), _tunnel: tunnel })
    }

    fn wait<T>(&self, what: impl Future<Output = Result<T, h2::Error>>) -> io::Result<T> {
        let limited = async { tokio::time::timeout(STEP_MAX, what).await };
        match self.runtime.block_on(limited) {
            Ok(done) => done.map_err(io::Error::other),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Begins a request; `ended` says that it has no body.
    pub fn open(
        &self,
        method: &str,
        host: &str,
        path: &str,
        headers: &[(&str, &str)],
        ended: bool,
    ) -> io::Result<Stream2<'_>> {
        let mut request = Request::builder().method(method).uri(format!("http://{host}{path}"));
        let always = self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in headers.iter().copied().chain(always) {
            request = request.header(name, value);
        }
        let request = request.body(()).map_err(io::Error::other)?;
        let mut sender = self.wait(self.sender.clone().ready())?;
        // a stream is registered with the runtime's connection
        let _entered = self.runtime.enter();
        let (response, sending) = sender.send_request(request, ended).map_err(io::Error::other)?;
        Ok(Stream2 { client: self, sending, response: Some(response), body: None, unread: BytesMut::new() })
    }

    /// Begins a gRPC call.
    pub fn call(&self, host: &str, method: &str, headers: &[(&str, &str)]) -> io::Result<Stream2<'_>> {
        let mut all = vec![("content-type", "application/grpc"), ("te", "trailers")];
        all.extend(headers);
        self.open("POST", host, method, &all, false)
    }

    /// Sends one request without body and reads the answer.
    pub fn send(&self, method: &str, host: &str, path: &str, headers: &[(&str, &str)]) -> io::Result<Response> {
        self.open(method, host, path, headers, true)?.rest()
    }

    /// One gRPC message there; the answer's body is what came back, framed.
    pub fn unary(&self, host: &str, method: &str, headers: &[(&str, &str)], body: &[u8]) -> io::Result<Response> {
        let mut stream = self.call(host, method, headers)?;
        // An answer may come before the message is said, and end the call.
        let said = stream.say(body).and_then(|()| stream.end());
        stream.rest().map_err(|error| said.err().unwrap_or(error))
    }
}

impl Stream2<'_> {
    /// Sends one gRPC message.
    pub fn say(&mut self, body: &[u8]) -> io::Result<()> {
        self.push(&message(body))
    }

    /// Sends one gRPC message, with which the request is complete.
    pub fn say_last(&mut self, body: &[u8]) -> io::Result<()> {
        self.push_then(&message(body), true)
    }

    /// Sends bytes of the body.
    pub fn push(&mut self, data: &[u8]) -> io::Result<()> {
        self.push_then(data, false)
    }

    fn push_then(&mut self, data: &[u8], ends: bool) -> io::Result<()> {
        let mut data = Bytes::copy_from_slice(data);
        while !data.is_empty() {
            self.sending.reserve_capacity(data.len());
            let sending = &mut self.sending;
            let room = self.client.wait(async {
                poll_fn(|cx| sending.poll_capacity(cx)).await.unwrap_or(Err(h2::Reason::STREAM_CLOSED.into()))
            })?;
            let piece = data.split_to(room.min(data.len()));
            self.sending.send_data(piece, ends && data.is_empty()).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// The request is complete.
    pub fn end(&mut self) -> io::Result<()> {
        self.sending.send_data(Bytes::new(), true).map_err(io::Error::other)
    }

    /// Gives the request up.
    pub fn cancel(mut self) {
        self.sending.send_reset(h2::Reason::CANCEL);
    }

    /// Waits for the response's head: no body yet.
    pub fn head(&mut self) -> io::Result<Response> {
        let response = self.response.take().ok_or_else(|| io::Error::other("the head was read already"))?;
        let (parts, body) = self.client.wait(response)?.into_parts();
        self.body = Some(body);
        Ok(Response {
            status: parts.status.as_u16(),
            headers: pairs(&parts.headers),
            body: String::new(),
            trailers: Vec::new(),
        })
    }

    /// The next bytes of the body; `None` at its end.
    pub fn data(&mut self) -> io::Result<Option<Bytes>> {
        if self.body.is_none() {
            self.head()?;
        }
        let Some(body) = &mut self.body else { return Ok(None) };
        let Some(chunk) = self.client.wait(async { body.data().await.transpose() })? else { return Ok(None) };
        body.flow_control().release_capacity(chunk.len()).map_err(io::Error::other)?;
        Ok(Some(chunk))
    }

    /// The next gRPC message; `None` at the body's end.
    pub fn hear(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if let Some(header) = self.unread.first_chunk::<5>() {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
                if self.unread.len() >= 5 + length {
                    self.unread.advance(5);
                    return Ok(Some(self.unread.split_to(length).freeze()));
                }
            }
            match self.data()? {
                Some(chunk) => self.unread.extend_from_slice(&chunk),
                None if self.unread.is_empty() => return Ok(None),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// Waits for what follows the body.
    pub fn trailers(&mut self) -> io::Result<Vec<(String, String)>> {
        let Some(body) = &mut self.body else { return Ok(Vec::new()) };
        Ok(self.client.wait(body.trailers())?.map_or_else(Vec::new, |map| pairs(&map)))
    }

    /// The whole answer.
    pub fn rest(mut self) -> io::Result<Response> {
        let mut response = self.head()?;
        let mut bytes = Vec::new();
        while let Some(chunk) = self.data()? {
            bytes.extend_from_slice(&chunk);
        }
        response.trailers = self.trailers()?;
        response.body = String::from_utf8_lossy(&bytes).into_owned();
        Ok(response)
    }
}
