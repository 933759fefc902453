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

fn broken(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
    ClientError::Broken(error.into())
}

/// A client; each call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// A client of the socket at `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    async fn send(&self, method: Method, uri: &str, body: Vec<u8>) -> Result<http::Response<Incoming>, ClientError> {
        let unreachable = |source: std::io::Error| {
            let path = self.path.clone();
            match source.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => ClientError::NotRunning { path },
                _ => ClientError::Unreachable { path, source },
            }
        };
        let stream = UnixStream::connect(&self.path).await.map_err(unreachable)?;
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

    /// `DELETE`.
    pub async fn delete(&self, uri: &str) -> Result<Value, ClientError> {
        self.decoded(Method::DELETE, uri, Vec::new()).await
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
