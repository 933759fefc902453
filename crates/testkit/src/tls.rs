//! TLS of servers and clients that a test plays.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ClientConfig, ServerConfig, ServerConnection, StreamOwned};

/// A client that trusts the certificate `root` only.
pub(crate) fn client(root: &[u8], provider: CryptoProvider) -> io::Result<ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(root.to_vec().into()).map_err(io::Error::other)?;
    let config = ClientConfig::builder_with_provider(provider.into())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// A certificate with its key, and the protocols that are spoken.
#[derive(Clone, Debug)]
pub struct TlsServer(Arc<ServerConfig>);

impl TlsServer {
    /// With a certificate for `name` that it signs itself, and ALPN names, best first.
    pub fn new(name: &str, alpn: &[&str]) -> Self {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a name makes a certificate");
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let provider = rustls::crypto::aws_lc_rs::default_provider().into();
        let config =
            ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().and_then(|config| {
                config.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key.into())
            });
        let mut config = config.expect("a certificate goes with its own key");
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Self(Arc::new(config))
    }

    /// Shakes hands.
    pub fn accept(&self, stream: TcpStream) -> io::Result<StreamOwned<ServerConnection, TcpStream>> {
        let session = ServerConnection::new(Arc::clone(&self.0)).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(session, stream);
        stream.conn.complete_io(&mut stream.sock)?;
        Ok(stream)
    }
}
