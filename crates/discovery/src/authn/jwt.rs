//! Service-account tokens checked by public keys, for use without a node.

use std::fmt;

use futures_util::future::BoxFuture;
use jsonwebtoken::jwk::{AlgorithmParameters, Jwk, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use thiserror::Error;
use types::wellknown::TOKEN_AUDIENCE;

use super::{ServiceAccount, TokenAuthenticator, Unauthenticated};

/// Checks signature, audience, dates and subject.
pub struct JwtKeys {
    issuer: Option<String>,
    keys: Vec<(Option<String>, Algorithm, DecodingKey)>,
}

impl fmt::Debug for JwtKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtKeys").field("issuer", &self.issuer).field("keys", &self.keys.len()).finish()
    }
}

/// Why keys are not usable.
#[derive(Debug, Error)]
pub enum InvalidKeys {
    /// Not JSON, or not a key set.
    #[error("is neither a JSON Web Key Set nor a PEM public key")]
    Format,
    /// No key in it can be used.
    #[error("holds no key that can be used (RSA, P-256, P-384 or Ed25519)")]
    Nothing,
    /// A key is damaged.
    #[error("holds a damaged key")]
    Key(#[source] jsonwebtoken::errors::Error),
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    #[serde(rename = "kubernetes.io", default)]
    kubernetes: Option<Kubernetes>,
}

#[derive(Deserialize)]
struct Kubernetes {
    #[serde(default)]
    pod: Option<Named>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

impl JwtKeys {
    /// Reads a key set (JSON) or one public key (PEM). With an issuer, tokens must name it.
    pub fn parse(text: &str, issuer: Option<&str>) -> Result<Self, InvalidKeys> {
        let keys = if text.trim_start().starts_with('{') {
            let set: JwkSet = serde_json::from_str(text).map_err(|_| InvalidKeys::Format)?;
            let usable = set.keys.iter().filter_map(|key| Some((key, algorithm(key)?)));
            let keys: Result<Vec<_>, _> = usable
                .map(|(key, algorithm)| {
                    let decoding = DecodingKey::from_jwk(key).map_err(InvalidKeys::Key)?;
                    Ok((key.common.key_id.clone(), algorithm, decoding))
                })
                .collect();
            keys?
        } else {
            let bytes = text.as_bytes();
            // The PEM does not say what the key is for; each reader takes its own kind only.
            let candidates = [
                (Algorithm::ES256, DecodingKey::from_ec_pem(bytes)),
                (Algorithm::RS256, DecodingKey::from_rsa_pem(bytes)),
                (Algorithm::EdDSA, DecodingKey::from_ed_pem(bytes)),
            ];
            let keys: Vec<_> =
                candidates.into_iter().filter_map(|(algorithm, key)| Some((None, algorithm, key.ok()?))).collect();
            if keys.is_empty() {
                return Err(InvalidKeys::Format);
            }
            keys
        };
        if keys.is_empty() {
            return Err(InvalidKeys::Nothing);
        }
        Ok(Self { issuer: issuer.map(str::to_owned), keys })
    }

    fn check(&self, token: &str) -> Result<ServiceAccount, Unauthenticated> {
        let refuse = |error: &dyn fmt::Display| Unauthenticated::Token(error.to_string());
        let header = jsonwebtoken::decode_header(token).map_err(|error| refuse(&error))?;
        let mut last = Unauthenticated::Token("no key is for this token".to_owned());
        for (key_id, algorithm, key) in &self.keys {
            if key_id.is_some() && header.kid.is_some() && *key_id != header.kid {
                continue;
            }
            // The key says which algorithm it is for, not the token (property 14).
            let mut validation = Validation::new(*algorithm);
            validation.set_audience(&[TOKEN_AUDIENCE]);
            validation.set_required_spec_claims(&["exp", "aud", "sub"]);
            validation.validate_nbf = true;
            validation.leeway = 10;
            if let Some(issuer) = &self.issuer {
                validation.set_issuer(&[issuer]);
            }
            match jsonwebtoken::decode::<Claims>(token, key, &validation) {
                Ok(data) => return account(data.claims),
                Err(error) => last = refuse(&error),
            }
        }
        Err(last)
    }
}

fn account(claims: Claims) -> Result<ServiceAccount, Unauthenticated> {
    let mut parts = claims.sub.split(':');
    let (Some("system"), Some("serviceaccount"), Some(namespace), Some(name), None) =
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Unauthenticated::Token(format!("subject {:?} is not a service account", claims.sub)));
    };
    let pod = claims.kubernetes.and_then(|kubernetes| kubernetes.pod).map(|pod| pod.name.into());
    Ok(ServiceAccount { namespace: namespace.into(), name: name.into(), pod })
}

/// What a key is for; symmetric keys are for nothing here.
fn algorithm(key: &Jwk) -> Option<Algorithm> {
    use jsonwebtoken::jwk::EllipticCurve;
    match &key.algorithm {
        AlgorithmParameters::RSA(_) => Some(Algorithm::RS256),
        AlgorithmParameters::EllipticCurve(curve) => match curve.curve {
            EllipticCurve::P256 => Some(Algorithm::ES256),
            EllipticCurve::P384 => Some(Algorithm::ES384),
            _ => None,
        },
        AlgorithmParameters::OctetKeyPair(_) => Some(Algorithm::EdDSA),
        _ => None,
    }
}

impl TokenAuthenticator for JwtKeys {
    fn name(&self) -> &'static str {
        "jwt"
    }

    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<ServiceAccount, Unauthenticated>> {
        Box::pin(std::future::ready(self.check(token)))
    }
}
