//! One fetch of a key set over http or https.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, HOST, LOCATION, USER_AGENT};
use http::uri::{Authority, Scheme};
use http::{StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use identity::workload::{InvalidIdentity, TrustRoots};
use ipnet::IpNet;
use mesh::KeySource;
use rustls::pki_types::{InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Largest discovery document or key set.
const BODY_BYTES_MAX: usize = 1 << 20;
/// Redirects that are followed.
const REDIRECTS_MAX: usize = 5;

/// Why there are no keys.
#[derive(Debug, Error)]
pub(super) enum FetchError {
    /// Not an absolute URL of http or https.
    #[error("{0:?} is not an http or https URL")]
    Url(String),
    /// A URL with a user or password in it: neither is sent, nor told to anybody.
    #[error("the URL holds a user or password, which is not supported")]
    Userinfo,
    /// DNS.
    #[error("{0:?} does not resolve")]
    Resolve(String, #[source] io::Error),
    /// It resolves to nothing.
    #[error("{0:?} has no address")]
    NoAddress(String),
    /// An address that must not be asked.
    #[error("{0:?} leads to {1}, which keys are never fetched from")]
    Blocked(String, IpAddr),
    /// TCP or TLS.
    #[error("{0:?} cannot be connected to")]
    Connect(String, #[source] io::Error),
    /// The name cannot be in a certificate.
    #[error("{0:?} is no name of a server")]
    Name(String, #[source] InvalidDnsNameError),
    /// There are no roots to check servers with.
    #[error("there are no root certificates to check {0:?} with")]
    Roots(String, #[source] InvalidIdentity),
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
    /// HTTP broke off.
    #[error("{0:?} does not answer in HTTP")]
    Http(String, #[source] hyper::Error),
    /// The request cannot be written.
    #[error("{0:?} cannot be asked for")]
    Request(String, #[source] http::Error),
    /// Another status than 200.
    #[error("{0:?} answers {1}")]
    Status(String, StatusCode),
    /// Too many redirects, or one to nowhere.
    #[error("{0:?} redirects too often or to where it may not")]
    Redirect(String),
    /// The body is too long or broke off.
    #[error("the answer of {0:?} is too long or breaks off")]
    Body(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// No JSON.
    #[error("the answer of {0:?} is not JSON")]
    Json(String, #[source] serde_json::Error),
    /// A discovery document without the address of keys.
    #[error("the discovery document {0:?} has no jwks_uri")]
    NoKeysUri(String),
    /// JSON, but no key set.
    #[error("the answer of {0:?} is not a JSON Web Key Set with at least one key")]
    NoKeys(String),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Slow(Duration),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What all fetches share.
pub(super) struct Fetcher {
    blocked: Vec<IpNet>,
    extra_roots: PathBuf,
}

enum Fetched {
    Body(Bytes),
    Elsewhere(Uri),
}

impl Fetcher {
    pub(super) fn new(blocked: Vec<IpNet>, extra_roots: PathBuf) -> Self {
        Self { blocked, extra_roots }
    }

    /// The key set of a source, as its JSON was written. Bounded in size, not in time. *Cancel
    /// safety*: may be dropped.
    pub(super) async fn key_set(&self, source: &KeySource) -> Result<String, FetchError> {
        let uri = match source {
            KeySource::Uri(uri) => uri.to_string(),
            KeySource::Issuer(issuer) => {
                let at = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
                let document = json(&at, &self.get(&at).await?)?;
                let found = document.get("jwks_uri").and_then(serde_json::Value::as_str);
                found.map(str::to_owned).ok_or(FetchError::NoKeysUri(at))?
            }
        };
        let body = self.get(&uri).await?;
        let keys = json(&uri, &body)?;
        if keys.get("keys").and_then(serde_json::Value::as_array).is_none_or(Vec::is_empty) {
            return Err(FetchError::NoKeys(uri));
        }
        Ok(keys.to_string())
    }

    /// The body of a URL, after redirects.
    async fn get(&self, url: &str) -> Result<Bytes, FetchError> {
        let mut uri: Uri = url.parse().map_err(|_| FetchError::Url(url.to_owned()))?;
        for _ in 0..=REDIRECTS_MAX {
            match self.get_once(&uri).await? {
                Fetched::Body(body) => return Ok(body),
                Fetched::Elsewhere(next) => uri = next,
            }
        }
        Err(FetchError::Redirect(url.to_owned()))
    }

    async fn get_once(&self, uri: &Uri) -> Result<Fetched, FetchError> {
        let text = || uri.to_string();
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else {
            return Err(FetchError::Url(text()));
        };
        if authority.as_str().contains('@') {
            return Err(FetchError::Userinfo);
        }
        let stream = self.connect(scheme, authority, uri).await?;
        let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_buf_size(64 * 1024)
            .handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
            .await
            .map_err(|error| FetchError::Http(text(), error))?;
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let request = http::Request::get(path)
            .header(HOST, authority.as_str())
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, "lateen-discovery")
            .body(Empty::new())
            .map_err(|error| FetchError::Request(text(), error))?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(|error| FetchError::Http(text(), error))?;
            if response.status().is_redirection() {
                let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
                let next = location.and_then(|location| redirected(uri, location));
                return next.map(Fetched::Elsewhere).ok_or_else(|| FetchError::Redirect(text()));
            }
            if response.status() != StatusCode::OK {
                return Err(FetchError::Status(text(), response.status()));
            }
            let body = Limited::new(response.into_body(), BODY_BYTES_MAX).collect().await;
            let body = body.map_err(|error| FetchError::Body(text(), error))?;
            Ok(Fetched::Body(body.to_bytes()))
        };
        // The connection moves the answer along. It may end first when all of the answer was read.
        let mut answer = std::pin::pin!(answer);
        tokio::select! {
            biased;
            answered = &mut answer => answered,
            ended = connection => match ended {
                Ok(()) => answer.await,
                Err(error) => Err(FetchError::Http(text(), error)),
            },
        }
    }

    async fn connect(&self, scheme: &Scheme, authority: &Authority, uri: &Uri) -> Result<Box<dyn Stream>, FetchError> {
        let is_tls = *scheme == Scheme::HTTPS;
        if !is_tls && *scheme != Scheme::HTTP {
            return Err(FetchError::Url(uri.to_string()));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host((host, port))
            .await
            .map_err(|error| FetchError::Resolve(host.to_owned(), error))?
            .collect();
        // Checked after resolution and then dialled by address, so that no second answer differs.
        if let Some(address) = addresses.iter().find(|address| self.is_blocked(address.ip())) {
            return Err(FetchError::Blocked(uri.to_string(), address.ip()));
        }
        let mut last = FetchError::NoAddress(host.to_owned());
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) if is_tls => return self.handshake(stream, host, uri).await,
                Ok(stream) => return Ok(Box::new(stream)),
                Err(error) => last = FetchError::Connect(uri.to_string(), error),
            }
        }
        Err(last)
    }

    async fn handshake(&self, stream: TcpStream, host: &str, uri: &Uri) -> Result<Box<dyn Stream>, FetchError> {
        let name = ServerName::try_from(host.to_owned()).map_err(|error| FetchError::Name(host.to_owned(), error))?;
        let config = ClientConfig::builder_with_provider(Arc::clone(identity::tls::provider()))
            .with_safe_default_protocol_versions()
            .map_err(FetchError::Tls)?
            .with_root_certificates(self.roots(host)?)
            .with_no_client_auth();
        let connected = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        Ok(Box::new(connected.map_err(|error| FetchError::Connect(uri.to_string(), error))?))
    }

    /// The system's roots and the extra ones; one of the two must be there.
    fn roots(&self, host: &str) -> Result<RootCertStore, FetchError> {
        let mut store = RootCertStore::empty();
        let system = TrustRoots::system();
        if let Ok(system) = &system {
            store.add_parsable_certificates(system.certificates().iter().cloned());
        }
        if let Ok(text) = std::fs::read(&self.extra_roots) {
            let extra = TrustRoots::from_pem(&text).map_err(|error| FetchError::Roots(host.to_owned(), error))?;
            store.add_parsable_certificates(extra.certificates().iter().cloned());
        }
        match system {
            Err(error) if store.is_empty() => Err(FetchError::Roots(host.to_owned(), error)),
            _ => Ok(store),
        }
    }

    fn is_blocked(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.blocked.iter().any(|net| net.contains(&ip))
    }
}

fn json(url: &str, body: &[u8]) -> Result<serde_json::Value, FetchError> {
    serde_json::from_slice(body).map_err(|error| FetchError::Json(url.to_owned(), error))
}

/// Where a redirect leads; `None` where it may not: to another scheme's plaintext, or nowhere.
fn redirected(from: &Uri, location: &str) -> Option<Uri> {
    let next: Uri = location.parse().ok()?;
    let next = if next.scheme().is_some() {
        next
    } else {
        let is_path = location.starts_with('/') && !location.starts_with("//");
        let path = is_path.then_some(location)?;
        Uri::builder()
            .scheme(from.scheme()?.clone())
            .authority(from.authority()?.clone())
            .path_and_query(path)
            .build()
            .ok()?
    };
    let is_downgrade = from.scheme() == Some(&Scheme::HTTPS) && next.scheme() != Some(&Scheme::HTTPS);
    (!is_downgrade).then_some(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects() {
        let check = |from: &str, location: &str, expect: Option<&str>| {
            let next = redirected(&from.parse().unwrap(), location).map(|uri| uri.to_string());
            assert_eq!(next.as_deref(), expect, "{from} {location}");
        };
        check("https://id/a", "https://keys/b?c", Some("https://keys/b?c"));
        check("https://id/a", "/b", Some("https://id/b"));
        check("http://id/a", "https://id/a", Some("https://id/a"));
        check("https://id/a", "http://id/a", None);
        check("https://id/a", "b", None);
        check("https://id/a", "//other/b", None);
    }

    #[test]
    fn blocked_addresses() {
        let fetcher = Fetcher::new(super::super::Settings::default().blocked, PathBuf::new());
        for ip in ["127.0.0.1", "::1", "169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "fd00:ec2::254"] {
            assert!(fetcher.is_blocked(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["10.0.0.1", "192.0.2.1", "2001:db8::1"] {
            assert!(!fetcher.is_blocked(ip.parse().unwrap()), "{ip}");
        }
    }

    #[tokio::test]
    async fn names_of_this_machine_are_not_asked() {
        let fetcher = Fetcher::new(super::super::Settings::default().blocked, PathBuf::new());
        for url in
            ["http://localhost:1/keys", "http://127.0.0.1:1/keys", "http://[::1]:1/keys", "http://169.254.169.254/"]
        {
            let refused = fetcher.key_set(&KeySource::Uri(url.into())).await;
            assert!(matches!(refused, Err(FetchError::Blocked(..))), "{url}: {refused:?}");
        }
        let refused = fetcher.key_set(&KeySource::Uri("http://user:secret@example.com/".into())).await;
        assert!(matches!(refused, Err(FetchError::Userinfo)), "{refused:?}");
        for url in ["ftp://example.com/keys", "keys", "file:///etc/passwd"] {
            let refused = fetcher.key_set(&KeySource::Uri(url.into())).await;
            assert!(matches!(refused, Err(FetchError::Url(_))), "{url}: {refused:?}");
        }
    }
}
