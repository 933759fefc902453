//! Connections to the control plane: gRPC over TLS of ours, over sockets of the caller's.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap};
use tonic::transport::{Channel, Endpoint};

use crate::tls::{ClientTls, InvalidTls};
use crate::workload::{InvalidIdentity, TrustRoots, WorkloadIdentity};

/// The future of one TCP connection.
pub type Connecting = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;

/// Opens TCP connections. A proxy gives its own, whose sockets carry the mark that keeps them out
/// of capture.
pub trait DialTcp: Send + Sync + 'static {
    /// Connects to `host:port`.
    fn dial(&self, address: &str) -> Connecting;
}

/// Ordinary sockets.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlainTcp;

impl DialTcp for PlainTcp {
    fn dial(&self, address: &str) -> Connecting {
        let address = address.to_owned();
        Box::pin(TcpStream::connect(address))
    }
}

/// Where a text comes from. Read afresh each time, so that rotated files are picked up.
#[derive(Clone)]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// The text itself.
    Text(Arc<str>),
}

impl Source {
    /// The text, without white space around it.
    pub fn read(&self) -> io::Result<String> {
        match self {
            Self::File(path) => std::fs::read_to_string(path)
                .map(|text| text.trim().to_owned())
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
            Self::Text(text) => Ok(text.trim().to_owned()),
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            // It may be a token.
            Self::Text(_) => f.write_str("Text(…)"),
        }
    }
}

/// A control plane to talk to.
#[derive(Clone)]
pub struct ControlPlane {
    /// `host:port` to connect to.
    pub address: String,
    /// The DNS name its certificate must carry (`istiod.istio-system.svc`).
    pub server_name: String,
    /// Roots for its certificate; `None`: plaintext (port 15010).
    pub roots: Option<Source>,
    /// Our token, sent with each call; `None`: a client certificate must do.
    pub token: Option<Source>,
    /// Sent as `clusterid`.
    pub cluster_id: String,
    /// Sockets.
    pub tcp: Arc<dyn DialTcp>,
}

impl fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlPlane")
            .field("address", &self.address)
            .field("server_name", &self.server_name)
            .field("roots", &self.roots)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// A file cannot be read.
    #[error("cannot read the {what}")]
    Read {
        /// `token`, `root certificate`.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The root bundle is unusable.
    #[error("root certificate of the control plane is unusable")]
    Roots(#[source] InvalidIdentity),
    /// TLS cannot be set up.
    #[error("TLS to the control plane cannot be set up")]
    Tls(#[source] InvalidTls),
    /// The address or server name is malformed.
    #[error("{0:?} is not a valid control plane address or name")]
    Address(String),
    /// The token holds what a header may not.
    #[error("the token is not a valid header value")]
    Token,
    /// The connection failed.
    #[error("cannot connect to the control plane at {address}")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        source: tonic::transport::Error,
    },
}

/// How long one connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

impl ControlPlane {
    /// Connects once, showing `identity` when there is one. *Cancel safety*: may be dropped.
    pub async fn connect(&self, identity: Option<&WorkloadIdentity>) -> Result<Channel, ConnectError> {
        let tls = match &self.roots {
            None => None,
            Some(source) => {
                let text = source.read().map_err(|source| ConnectError::Read { what: "root certificate", source })?;
                let roots = TrustRoots::from_pem(text.as_bytes()).map_err(ConnectError::Roots)?;
                let mut tls = ClientTls::named(Arc::new(roots), vec![b"h2".to_vec()]);
                tls.certificate = identity.map(|identity| identity.keys.clone());
                Some(tls.build().map_err(ConnectError::Tls)?)
            }
        };
        let bad_name = || ConnectError::Address(self.server_name.clone());
        let server_name = ServerName::try_from(self.server_name.clone()).map_err(|_| bad_name())?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))
            .map_err(|_| ConnectError::Address(self.address.clone()))?
            .origin(format!("{scheme}://{}", self.server_name).parse().map_err(|_| bad_name())?)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(2 << 20);
        let tcp = Arc::clone(&self.tcp);
        let address = self.address.clone();
        let connector = tower::service_fn(move |_: http::Uri| {
            let (tcp, tls, server_name, address) =
                (Arc::clone(&tcp), tls.clone(), server_name.clone(), address.clone());
            async move {
                let stream = tcp.dial(&address).await?;
                stream.set_nodelay(true)?;
                let stream: Box<dyn Stream> = match tls {
                    Some(config) => Box::new(TlsConnector::from(config).connect(server_name, stream).await?),
                    None => Box::new(stream),
                };
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|source| ConnectError::Connect { address: self.address.clone(), source })
    }

    /// Metadata for each call: the token, read afresh, and the cluster.
    pub fn metadata(&self) -> Result<MetadataMap, ConnectError> {
        let mut metadata = MetadataMap::new();
        if let Some(source) = &self.token {
            let token = source.read().map_err(|source| ConnectError::Read { what: "token", source })?;
            let mut value = AsciiMetadataValue::try_from(format!("Bearer {token}")).map_err(|_| ConnectError::Token)?;
            value.set_sensitive(true);
            metadata.insert("authorization", value);
        }
        if let Ok(value) = AsciiMetadataValue::try_from(self.cluster_id.as_str()) {
            metadata.insert(AsciiMetadataKey::from_static("clusterid"), value);
        }
        Ok(metadata)
    }
}

trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Stream for T {}
