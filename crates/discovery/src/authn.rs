//! Who is calling: by client certificate, else by token. The first that vouches wins.
//!
//! A caller is a workload identity of the mesh's trust domain and nothing else; what a request
//! says about itself (node id, CSR names) is compared with it or ignored.

pub mod jwt;
pub mod token_review;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::BoxFuture;
use thiserror::Error;
use tonic::metadata::MetadataMap;
use types::{SpiffeId, TrustDomain};

use crate::listen::Connection;

/// Longest token that is looked at.
const TOKEN_BYTES_MAX: usize = 16 * 1024;

/// An authenticated caller.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    /// Who.
    pub id: SpiffeId,
    /// The pod a token is bound to, when it says so.
    pub pod: Option<Box<str>>,
    /// What vouched: `certificate`, `token review`, `jwt`.
    pub by: &'static str,
}

/// A service account that a token proved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: Box<str>,
    /// Its name.
    pub name: Box<str>,
    /// The pod the token is bound to.
    pub pod: Option<Box<str>>,
}

/// Checks tokens.
pub trait TokenAuthenticator: Send + Sync + 'static {
    /// For logs: `token review`, `jwt`.
    fn name(&self) -> &'static str;
    /// Checks a token for [`types::wellknown::TOKEN_AUDIENCE`]. *Cancel safety*: may be dropped.
    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<ServiceAccount, Unauthenticated>>;
}

/// Why nobody vouched. For logs, never for the caller.
#[derive(Debug, Error)]
pub enum Unauthenticated {
    /// Plaintext callers are nobody.
    #[error("the connection is not secured")]
    Plaintext,
    /// Neither certificate nor token.
    #[error("neither a client certificate nor a bearer token was given")]
    Nothing,
    /// The certificate is of another trust domain.
    #[error("certificate of {id} is not of the trust domain {expected}")]
    TrustDomain {
        /// Whose.
        id: SpiffeId,
        /// The mesh's.
        expected: TrustDomain,
    },
    /// The certificate ran out since the handshake.
    #[error("certificate of {0} is not valid now")]
    Expired(SpiffeId),
    /// The `authorization` header is malformed.
    #[error("the authorization header is not a bearer token")]
    Header,
    /// Another cluster is meant.
    #[error("cluster {0:?} is unknown")]
    Cluster(String),
    /// The token was refused.
    #[error("token refused: {0}")]
    Token(String),
    /// Who could tell is not reachable.
    #[error("tokens cannot be checked now: {0}")]
    Unavailable(String),
}

/// All ways to authenticate.
pub struct Authn {
    trust_domain: TrustDomain,
    cluster_id: Box<str>,
    tokens: Vec<Arc<dyn TokenAuthenticator>>,
}

impl fmt::Debug for Authn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.tokens.iter().map(|tokens| tokens.name()).collect();
        f.debug_struct("Authn")
            .field("trust_domain", &self.trust_domain)
            .field("tokens", &names)
            .finish_non_exhaustive()
    }
}

impl Authn {
    /// Certificates of `trust_domain`, then `tokens` in order.
    pub fn new(trust_domain: TrustDomain, cluster_id: &str, tokens: Vec<Arc<dyn TokenAuthenticator>>) -> Self {
        Self { trust_domain, cluster_id: cluster_id.into(), tokens }
    }

    /// Who calls.
    pub async fn caller(&self, connection: &Connection, metadata: &MetadataMap) -> Result<Caller, Unauthenticated> {
        if !connection.is_secure {
            return Err(Unauthenticated::Plaintext);
        }
        if let Some(facts) = &connection.facts
            && let Some(id) = &facts.id
        {
            if id.trust_domain != self.trust_domain {
                return Err(Unauthenticated::TrustDomain { id: id.clone(), expected: self.trust_domain.clone() });
            }
            // The handshake may be long ago.
            if !facts.is_valid_at(SystemTime::now()) {
                return Err(Unauthenticated::Expired(id.clone()));
            }
            return Ok(Caller { id: id.clone(), pod: None, by: "certificate" });
        }
        let token = bearer(metadata)?;
        if let Some(cluster) = metadata.get("clusterid") {
            let cluster = cluster.to_str().unwrap_or_default();
            if !cluster.is_empty() && *cluster != *self.cluster_id {
                return Err(Unauthenticated::Cluster(cluster.to_owned()));
            }
        }
        let mut last = Unauthenticated::Token("no token authenticator is configured".to_owned());
        for authenticator in &self.tokens {
            match authenticator.authenticate(token).await {
                Ok(account) => {
                    let id = SpiffeId::new(self.trust_domain.clone(), &account.namespace, &account.name)
                        .map_err(|invalid| Unauthenticated::Token(invalid.to_string()))?;
                    return Ok(Caller { id, pod: account.pod, by: authenticator.name() });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// The one token of a call. Two headers are refused: which would count?
fn bearer(metadata: &MetadataMap) -> Result<&str, Unauthenticated> {
    let mut values = metadata.get_all("authorization").iter();
    let value = values.next().ok_or(Unauthenticated::Nothing)?;
    if values.next().is_some() {
        return Err(Unauthenticated::Header);
    }
    let text = value.to_str().map_err(|_| Unauthenticated::Header)?;
    let token = text.strip_prefix("Bearer ").ok_or(Unauthenticated::Header)?.trim();
    if token.is_empty() || token.len() > TOKEN_BYTES_MAX { Err(Unauthenticated::Header) } else { Ok(token) }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(&'static str);

    impl TokenAuthenticator for Fixed {
        fn name(&self) -> &'static str {
            "fixed"
        }

        fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<ServiceAccount, Unauthenticated>> {
            Box::pin(async move {
                if token == self.0 {
                    Ok(ServiceAccount { namespace: "shop".into(), name: "reviews".into(), pod: None })
                } else {
                    Err(Unauthenticated::Token("unknown".to_owned()))
                }
            })
        }
    }

    async fn check(headers: &[(&'static str, &str)], expect: Result<&str, &str>) {
        let authn =
            Authn::new(TrustDomain::default(), "Kubernetes", vec![Arc::new(Fixed("one")), Arc::new(Fixed("two"))]);
        let mut metadata = MetadataMap::new();
        for (name, value) in headers {
            metadata.append(*name, value.parse().unwrap());
        }
        let connection = Connection { is_secure: true, ..Connection::default() };
        let got = authn.caller(&connection, &metadata).await;
        match expect {
            Ok(id) => assert_eq!(got.unwrap().id.to_string(), id, "{headers:?}"),
            Err(words) => {
                let error = got.unwrap_err().to_string();
                assert!(error.contains(words), "{headers:?}: {error}");
            }
        }
        let plain = authn.caller(&Connection::default(), &metadata).await;
        assert!(matches!(plain, Err(Unauthenticated::Plaintext)));
    }

    #[tokio::test]
    async fn tokens() {
        let id = "spiffe://cluster.local/ns/shop/sa/reviews";
        check(&[("authorization", "Bearer one")], Ok(id)).await;
        check(&[("authorization", "Bearer two")], Ok(id)).await;
        check(&[("authorization", "Bearer two"), ("clusterid", "Kubernetes")], Ok(id)).await;
        check(&[("authorization", "Bearer two"), ("clusterid", "")], Ok(id)).await;
        check(&[("authorization", "Bearer two"), ("clusterid", "elsewhere")], Err("cluster \"elsewhere\"")).await;
        check(&[], Err("neither")).await;
        check(&[("authorization", "Bearer three")], Err("token refused")).await;
        check(&[("authorization", "Bearer ")], Err("not a bearer")).await;
        check(&[("authorization", "Basic one")], Err("not a bearer")).await;
        check(&[("authorization", "Bearer one"), ("authorization", "Bearer two")], Err("not a bearer")).await;
    }
}
