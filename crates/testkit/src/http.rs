//! A small HTTP/1.1 client: what it sends is what the test wrote.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// Certificates of a PEM text, in DER.
pub fn der(pem: &str) -> Vec<Vec<u8>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).map(|one| one.expect("certificates in PEM").to_vec()).collect()
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Names in lower case, in order.
    pub headers: Vec<(String, String)>,
    /// The whole body, lossily as text.
    pub body: String,
    /// What followed the body, names in lower case.
    pub trailers: Vec<(String, String)>,
}

impl Response {
    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    /// The first value of a trailer, or, of an answer without body, of a header.
    pub fn trailer(&self, name: &str) -> Option<&str> {
        let trailer = self.trailers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str());
        trailer.or_else(|| if self.body.is_empty() { self.header(name) } else { None })
    }

    /// The body as JSON, or null.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// One kept-alive connection.
pub struct Client {
    stream: BufReader<Box<dyn Stream>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(crate::PATIENCE))?;
    Ok(stream)
}

impl Client {
    /// In the clear.
    pub fn plain(address: SocketAddr) -> io::Result<Self> {
        Ok(Self { stream: BufReader::new(Box::new(dial(address)?)) })
    }

    /// Over TLS to `name`, trusting the certificate `root` only.
    pub fn tls(address: SocketAddr, name: &str, root: &[u8]) -> io::Result<Self> {
        Self::tls_by(address, name, root, rustls::crypto::aws_lc_rs::default_provider())
    }

    /// [`tls`](Self::tls) that takes only signatures of one kind from the server: `RSA` or `ECDSA`.
    pub fn tls_signed(address: SocketAddr, name: &str, root: &[u8], kind: &str) -> io::Result<Self> {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        let all = provider.signature_verification_algorithms.mapping.iter();
        let of_kind: Vec<_> = all.filter(|(scheme, _)| format!("{scheme:?}").starts_with(kind)).copied().collect();
        // rustls wants them for ever.
        provider.signature_verification_algorithms.mapping = of_kind.leak();
        Self::tls_by(address, name, root, provider)
    }

    fn tls_by(
        address: SocketAddr,
        name: &str,
        root: &[u8],
        provider: rustls::crypto::CryptoProvider,
    ) -> io::Result<Self> {
        let config = crate::tls::client(root, provider)?;
        let name = name.to_owned().try_into().map_err(io::Error::other)?;
        let session = rustls::ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        let mut stream = rustls::StreamOwned::new(session, dial(address)?);
        stream.conn.complete_io(&mut stream.sock)?;
        Ok(Self { stream: BufReader::new(Box::new(stream)) })
    }

    /// Over any bytes, such as a [`Tunnel`](crate::Tunnel) that begins in a pod.
    pub fn over(stream: impl Read + Write + Send + 'static) -> Self {
        Self { stream: BufReader::new(Box::new(stream)) }
    }

    /// Sends one request without body and reads the answer.
    pub fn send(&mut self, method: &str, host: &str, path: &str, headers: &[(&str, &str)]) -> io::Result<Response> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        self.raw(head.as_bytes(), method == "HEAD")
    }

    /// Sends bytes as they are and reads one answer.
    pub fn raw(&mut self, bytes: &[u8], is_head: bool) -> io::Result<Response> {
        let stream = self.stream.get_mut();
        stream.write_all(bytes)?;
        stream.flush()?;
        self.read(is_head)
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    }

    fn read(&mut self, is_head: bool) -> io::Result<Response> {
        let first = self.line()?;
        let status = first
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .ok_or_else(|| io::Error::other(format!("no status line: {first:?}")))?;
        let mut headers = Vec::new();
        loop {
            let line = self.line()?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut response = Response { status, headers, body: String::new(), trailers: Vec::new() };
        let mut body = Vec::new();
        if is_head || status == 204 || status == 304 {
            return Ok(response);
        }
        if response.header("transfer-encoding").is_some() {
            loop {
                let line = self.line()?;
                let size = usize::from_str_radix(line.split(';').next().unwrap_or_default(), 16)
                    .map_err(|_| io::Error::other(format!("no chunk size: {line:?}")))?;
                if size == 0 {
                    while let Some((name, value)) = self.line()?.split_once(':') {
                        response.trailers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
                    }
                    break;
                }
                let start = body.len();
                body.resize(start + size, 0);
                self.stream.read_exact(&mut body[start..])?;
                self.line()?;
            }
        } else if let Some(length) = response.header("content-length") {
            body.resize(length.parse().map_err(io::Error::other)?, 0);
            self.stream.read_exact(&mut body)?;
        } else {
            self.stream.read_to_end(&mut body)?;
        }
        response.body = String::from_utf8_lossy(&body).into_owned();
        Ok(response)
    }
}
