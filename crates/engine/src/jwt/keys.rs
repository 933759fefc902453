//! Key sets (JWKS) and signatures under them.
//!
//! *Source*: RFC 7517, RFC 7518. A key verifies only the algorithms it is for: its own `alg`, else
//! those of its type and curve (property 14).

use aws_lc_rs::{digest, hmac, signature};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

use super::Refusal;

/// Keys kept of one set.
const KEYS_MAX: usize = 256;

/// A signature algorithm of RFC 7518 and 8037; `none` is not among them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Algorithm {
    Es256,
    Es384,
    Es512,
    Hs256,
    Hs384,
    Hs512,
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    EdDsa,
}

impl Algorithm {
    /// By its registered name.
    pub(super) fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            "ES512" => Self::Es512,
            "HS256" => Self::Hs256,
            "HS384" => Self::Hs384,
            "HS512" => Self::Hs512,
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "EdDSA" => Self::EdDsa,
            _ => return None,
        })
    }
}

/// One usable key.
#[derive(Clone, PartialEq, Eq)]
struct Key {
    id: Option<Box<str>>,
    algorithm: Option<Algorithm>,
    material: Material,
}

#[derive(Clone, PartialEq, Eq)]
enum Material {
    Rsa {
        n: Box<[u8]>,
        e: Box<[u8]>,
    },
    /// Uncompressed points.
    P256(Box<[u8]>),
    P384(Box<[u8]>),
    P521(Box<[u8]>),
    Ed25519(Box<[u8]>),
    Secret(Box<[u8]>),
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the material: it may be a secret.
        f.debug_struct("Key").field("id", &self.id).field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

/// The keys of an issuer. A broken set refuses every token and leaves requests without one alone
/// (property 15).
#[derive(Clone, Debug)]
pub struct KeySet {
    id: [u8; 32],
    keys: Result<Vec<Key>, Refusal>,
}

impl PartialEq for KeySet {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

fn decode(value: &Value, name: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(value.get(name)?.as_str()?.trim_end_matches('=')).ok()
}

/// Without leading zeros; `None` for zero.
fn integer(value: &Value, name: &str) -> Option<Box<[u8]>> {
    let bytes = decode(value, name)?;
    let start = bytes.iter().position(|b| *b != 0)?;
    Some(bytes[start..].into())
}

/// An uncompressed point of two coordinates of `length` bytes.
fn point(value: &Value, length: usize) -> Option<Box<[u8]>> {
    let mut point = vec![4];
    for name in ["x", "y"] {
        let bytes = decode(value, name)?;
        point.resize(point.len() + length.checked_sub(bytes.len())?, 0);
        point.extend_from_slice(&bytes);
    }
    Some(point.into())
}

impl Key {
    /// A key that is not for verifying signatures, or not understood, is no key.
    fn read(value: &Value) -> Option<Self> {
        let text = |name: &str| value.get(name).map(|value| value.as_str().ok_or(())).transpose();
        if text("use").ok()?.is_some_and(|used_for| used_for != "sig") {
            return None;
        }
        if let Some(operations) = value.get("key_ops")
            && !operations.as_array()?.iter().any(|operation| operation == "verify")
        {
            return None;
        }
        let material = match text("kty").ok()?? {
            "RSA" => Material::Rsa { n: integer(value, "n")?, e: integer(value, "e")? },
            "EC" => match text("crv").ok()?? {
                "P-256" => Material::P256(point(value, 32)?),
                "P-384" => Material::P384(point(value, 48)?),
                "P-521" => Material::P521(point(value, 66)?),
                _ => return None,
            },
            "OKP" if text("crv").ok()? == Some("Ed25519") => {
                Material::Ed25519(decode(value, "x").filter(|x| x.len() == 32)?.into())
            }
            "oct" => Material::Secret(decode(value, "k").filter(|k| !k.is_empty())?.into()),
            _ => return None,
        };
        let algorithm = match text("alg").ok()? {
            None => None,
            Some(name) => Some(Algorithm::parse(name).filter(|algorithm| material.fits(*algorithm))?),
        };
        Some(Self { id: text("kid").ok()?.map(Into::into), algorithm, material })
    }

    fn fits(&self, id: Option<&str>, algorithm: Algorithm) -> bool {
        let same_id = match (id, &self.id) {
            (Some(wanted), Some(own)) => wanted == &**own,
            _ => true,
        };
        same_id && self.material.fits(algorithm) && self.algorithm.is_none_or(|own| own == algorithm)
    }
}

impl Material {
    fn fits(&self, algorithm: Algorithm) -> bool {
        use Algorithm as A;
        match self {
            Self::Rsa { .. } => {
                matches!(algorithm, A::Rs256 | A::Rs384 | A::Rs512 | A::Ps256 | A::Ps384 | A::Ps512)
            }
            Self::P256(_) => algorithm == A::Es256,
            Self::P384(_) => algorithm == A::Es384,
            Self::P521(_) => algorithm == A::Es512,
            Self::Ed25519(_) => algorithm == A::EdDsa,
            Self::Secret(_) => matches!(algorithm, A::Hs256 | A::Hs384 | A::Hs512),
        }
    }

    fn verifies(&self, algorithm: Algorithm, message: &[u8], sig: &[u8]) -> bool {
        use Algorithm as A;
        let public = |with: &'static dyn signature::VerificationAlgorithm, key: &[u8]| {
            signature::UnparsedPublicKey::new(with, key).verify(message, sig).is_ok()
        };
        match (self, algorithm) {
            (Self::Rsa { n, e }, _) => {
                let with = match algorithm {
                    A::Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
                    A::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
                    A::Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
                    A::Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
                    A::Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
                    A::Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
                    _ => return false,
                };
                signature::RsaPublicKeyComponents { n, e }.verify(with, message, sig).is_ok()
            }
            (Self::P256(key), A::Es256) => public(&signature::ECDSA_P256_SHA256_FIXED, key),
            (Self::P384(key), A::Es384) => public(&signature::ECDSA_P384_SHA384_FIXED, key),
            (Self::P521(key), A::Es512) => public(&signature::ECDSA_P521_SHA512_FIXED, key),
            (Self::Ed25519(key), A::EdDsa) => public(&signature::ED25519, key),
            (Self::Secret(key), _) => {
                let with = match algorithm {
                    A::Hs256 => hmac::HMAC_SHA256,
                    A::Hs384 => hmac::HMAC_SHA384,
                    A::Hs512 => hmac::HMAC_SHA512,
                    _ => return false,
                };
                hmac::verify(&hmac::Key::new(with, key), message, sig).is_ok()
            }
            _ => false,
        }
    }
}

impl KeySet {
    /// Reads a JWKS document. Keys that are not understood are left out; if none is left, or the
    /// document is not a key set, the set is broken.
    pub fn parse(document: &[u8]) -> Self {
        let mut id = [0; 32];
        id.copy_from_slice(digest::digest(&digest::SHA256, document).as_ref());
        let keys = match serde_json::from_slice::<Value>(document) {
            Err(_) => Err(Refusal::KEYS_INVALID),
            Ok(document) => match document.get("keys").and_then(Value::as_array) {
                None => Err(Refusal::KEYS_INVALID),
                Some(list) => {
                    let keys: Vec<_> = list.iter().filter_map(Key::read).take(KEYS_MAX).collect();
                    if keys.is_empty() { Err(Refusal::KEYS_NONE_VALID) } else { Ok(keys) }
                }
            },
        };
        Self { id, keys }
    }

    /// Tells one document from another.
    pub(super) fn id(&self) -> &[u8; 32] {
        &self.id
    }

    /// Verifies `sig` over `message`.
    pub(super) fn verify(
        &self,
        key_id: Option<&str>,
        algorithm: Algorithm,
        message: &[u8],
        sig: &[u8],
    ) -> Result<(), Refusal> {
        let keys = self.keys.as_ref().map_err(|refusal| *refusal)?;
        let mut tried = false;
        for key in keys.iter().filter(|key| key.fits(key_id, algorithm)) {
            tried = true;
            if key.material.verifies(algorithm, message, sig) {
                return Ok(());
            }
        }
        Err(if tried { Refusal::BAD_SIGNATURE } else { Refusal::NO_KEY })
    }
}
