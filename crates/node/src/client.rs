//! A client of the local socket.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes, BytesMut};
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;
use tokio::net::UnixStream;

/// Why a call failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody serves the socket.
    #[error("no mesh is running at {path}: start one with `lateen up` or `lateen demo`, or say which one with --name or --state-dir", path = path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
    },
    /// The mesh runs, its control plane does not.
    #[error("the mesh runs, but its control plane does not answer: `lateen get pods -n istio-system` says more")]
    NoControlPlane,
    /// The socket is there, and not for us.
    #[error("the mesh at {path} cannot be asked; it answers its owner only", path = path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The mesh said no.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Its words.
        message: String,
        /// The whole answer, if it was JSON.
        body: Value,
    },
    /// The connection broke.
    #[error("the mesh went away in the middle of a call")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A path of these segments with these parameters, whatever is in them.
pub fn uri(segments: &[&str], parameters: &[(&str, &str)]) -> String {
    let mut out = String::new();
    for segment in segments {
        out.push('/');
        escape(segment, &mut out);
    }
    for (index, (name, value)) in parameters.iter().enumerate() {
        out.push(if index == 0 { '?' } else { '&' });
        escape(name, &mut out);
        out.push('=');
        escape(value, &mut out);
    }
    out
}

/// *Source*: RFC 3986, 2.1 and 2.3.
fn escape(text: &str, out: &mut String) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.extend(['%', char::from(HEX[usize::from(byte >> 4)]), char::from(HEX[usize::from(byte & 15)])]);
        }
    }
}

/// The text that was [escaped](uri). `None` for an escape that is none, or bytes that are no text.
pub(crate) fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first != b'%' {
            bytes.push(first);
            rest = after;
            continue;
        }
        let [high, low, after @ ..] = after else { return None };
        let digit = |hex: &u8| char::from(*hex).to_digit(16);
        bytes.push(u8::try_from(digit(high)? * 16 + digit(low)?).ok()?);
        rest = after;
    }
    String::from_utf8(bytes).ok()
}

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
    ClientError::Broken(error.into())
}

/// A client; each call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
    /// The node's socket, when the other one is the control plane's.
    node: Option<PathBuf>,
}

impl Client {
    /// A client of the socket at `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), node: None }
    }

    /// A client of the control plane's socket at `path`; `node` is the socket of the node beside it.
    pub fn of_control_plane(path: &Path, node: &Path) -> Self {
        Self { path: path.to_owned(), node: Some(node.to_owned()) }
    }

    async fn send(&self, method: Method, uri: &str, body: Vec<u8>) -> Result<http::Response<Incoming>, ClientError> {
        let stream = match UnixStream::connect(&self.path).await {
            Ok(stream) => stream,
            Err(error) => return Err(self.unreachable(error).await),
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(uri).header("host", "lateen");
        let request = request.body(Full::new(Bytes::from(body))).map_err(broken)?;
        let response = sender.send_request(request).await.map_err(broken)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.map_err(broken)?.to_bytes();
        let said: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let message = said["error"].as_str().map_or_else(|| format!("status {status}"), str::to_owned);
        Err(ClientError::Refused { status, message, body: said })
    }

    async fn unreachable(&self, source: std::io::Error) -> ClientError {
        let path = self.path.clone();
        match (source.kind(), &self.node) {
            (ErrorKind::NotFound | ErrorKind::ConnectionRefused, None) => ClientError::NotRunning { path },
            (ErrorKind::NotFound | ErrorKind::ConnectionRefused, Some(node)) => match UnixStream::connect(node).await {
                Ok(_) => ClientError::NoControlPlane,
                Err(_) => ClientError::NotRunning { path: node.clone() },
            },
            _ => ClientError::Unreachable { path, source },
        }
    }

    async fn decoded<T: DeserializeOwned>(&self, method: Method, uri: &str, body: Vec<u8>) -> Result<T, ClientError> {
        let response = self.send(method, uri, body).await?;
        let bytes = response.into_body().collect().await.map_err(broken)?.to_bytes();
        serde_json::from_slice(&bytes).map_err(broken)
    }

    /// `GET`, decoded.
    pub async fn get<T: DeserializeOwned>(&self, uri: &str) -> Result<T, ClientError> {
        self.decoded(Method::GET, uri, Vec::new()).await
    }

    /// `POST`, decoded.
    pub async fn post<T: DeserializeOwned>(&self, uri: &str, body: Vec<u8>) -> Result<T, ClientError> {
        self.decoded(Method::POST, uri, body).await
    }

    /// `GET`, a line at a time.
    pub async fn lines(&self, uri: &str) -> Result<Lines, ClientError> {
        let response = self.send(Method::GET, uri, Vec::new()).await?;
        Ok(Lines { body: response.into_body(), kept: BytesMut::new() })
    }
}

/// Lines of a streamed answer.
pub struct Lines {
    body: Incoming,
    kept: BytesMut,
}

impl Lines {
    /// The next line without its end; `None` at the end of the stream. What follows the last line
    /// end comes as a line too.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.kept.iter().position(|byte| *byte == b'\n') {
                let line = self.kept.split_to(end);
                self.kept.advance(1);
                return Some(String::from_utf8_lossy(&line).into_owned());
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.kept.extend_from_slice(&data);
                    }
                }
                _ if self.kept.is_empty() => return None,
                _ => return Some(String::from_utf8_lossy(&self.kept.split()).into_owned()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_mesh_without_control_plane_is_no_mesh_that_does_not_run() {
        let folder = tempfile::tempdir().unwrap();
        let (plane, node) = (folder.path().join("debug.sock"), folder.path().join("api.sock"));
        let client = Client::of_control_plane(&plane, &node);
        let error = client.get::<Value>("/version").await.unwrap_err().to_string();
        assert!(error.contains("no mesh is running") && error.contains("api.sock"), "{error}");
        let _listening = tokio::net::UnixListener::bind(&node).unwrap();
        let error = client.get::<Value>("/version").await.unwrap_err();
        assert!(matches!(error, ClientError::NoControlPlane), "{error}");
    }

    #[test]
    fn whatever_is_in_a_name_is_not_a_path() {
        let made = uri(&["objects", "../x", "a?b#c%20"], &[("file", "ü &=.yaml"), ("n", "")]);
        assert_eq!(made, "/objects/..%2Fx/a%3Fb%23c%2520?file=%C3%BC%20%26%3D.yaml&n=");
        assert_eq!(unescape("..%2fx"), Some("../x".to_owned()));
        assert_eq!(unescape("%C3%BC%20%26%3D.yaml"), Some("ü &=.yaml".to_owned()));
        for bad in ["%", "%2", "%zz", "%ff"] {
            assert_eq!(unescape(bad), None, "{bad}");
        }
    }
}
