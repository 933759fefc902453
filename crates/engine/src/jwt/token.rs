//! One token: its three sections, and what they must be.
//!
//! *Source*: RFC 7515, RFC 7519, RFC 8725. Nothing in a token's header chooses anything but one of
//! the configured keys; critical extensions are refused, and so are names that occur twice, since
//! two readers may take different ones (property 14).

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::Refusal;
use super::keys::{Algorithm, KeySet};

/// A token whose form is valid. Its signature may not have been looked at.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) header: Arc<Value>,
    pub(super) payload: Arc<Value>,
    /// The payload as sent, base64url without padding.
    pub(super) payload_text: Box<str>,
    algorithm: Algorithm,
    key_id: Option<Box<str>>,
    issuer: Box<str>,
    subject: Box<str>,
    audiences: Vec<Box<str>>,
    issued_at: Option<u64>,
    not_before: Option<u64>,
    expires: Option<u64>,
    signature: Vec<u8>,
}

/// JSON in which no name occurs twice.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Value;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_string<E>(self, value: String) -> Result<Value, E> {
                Ok(value.into())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
                let mut list = Vec::new();
                while let Some(Strict(item)) = access.next_element()? {
                    list.push(item);
                }
                Ok(Value::Array(list))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
                let mut map = Map::new();
                while let Some((name, Strict(value))) = access.next_entry::<String, _>()? {
                    if map.insert(name, value).is_some() {
                        return Err(A::Error::custom("a name occurs twice"));
                    }
                }
                Ok(Value::Object(map))
            }
        }
        deserializer.deserialize_any(Reader).map(Self)
    }
}

/// The object in a section.
fn object(section: &str, bad_base64: Refusal, bad_json: Refusal) -> Result<Value, Refusal> {
    let bytes = URL_SAFE_NO_PAD.decode(section).map_err(|_| bad_base64)?;
    match serde_json::from_slice::<Strict>(&bytes) {
        Ok(Strict(value @ Value::Object(_))) => Ok(value),
        _ => Err(bad_json),
    }
}

fn optional_text<'a>(value: &'a Value, name: &str, bad: Refusal) -> Result<Option<&'a str>, Refusal> {
    match value.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(bad),
    }
}

/// Seconds since the epoch: a number that is not negative.
fn time(value: &Value, name: &str, bad: Refusal) -> Result<Option<u64>, Refusal> {
    let Some(value) = value.get(name) else { return Ok(None) };
    if let Some(seconds) = value.as_u64() {
        return Ok(Some(seconds));
    }
    match value.as_f64() {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be within range")]
        Some(seconds) if (0.0..9_000_000_000_000_000.0).contains(&seconds) => Ok(Some(seconds as u64)),
        _ => Err(bad),
    }
}

impl Token {
    /// Reads a token.
    pub(super) fn parse(text: &str) -> Result<Self, Refusal> {
        let mut sections = text.split('.');
        let (Some(header_text), Some(payload_text), Some(signature_text), None) =
            (sections.next(), sections.next(), sections.next(), sections.next())
        else {
            return Err(Refusal::BAD_FORMAT);
        };
        let header = object(header_text, Refusal::HEADER_BASE64, Refusal::HEADER_JSON)?;
        let algorithm = optional_text(&header, "alg", Refusal::HEADER_ALG)?.ok_or(Refusal::HEADER_ALG)?;
        let algorithm = Algorithm::parse(algorithm).ok_or(Refusal::ALG_NOT_SUPPORTED)?;
        let key_id = optional_text(&header, "kid", Refusal::HEADER_KID)?.filter(|id| !id.is_empty()).map(Into::into);
        if header.get("crit").is_some() {
            return Err(Refusal::CRITICAL);
        }
        let payload = object(payload_text, Refusal::PAYLOAD_BASE64, Refusal::PAYLOAD_JSON)?;
        let issuer = optional_text(&payload, "iss", Refusal::ISS)?.unwrap_or_default().into();
        let subject = optional_text(&payload, "sub", Refusal::SUB)?.unwrap_or_default().into();
        optional_text(&payload, "jti", Refusal::JTI)?;
        let issued_at = time(&payload, "iat", Refusal::IAT)?;
        let not_before = time(&payload, "nbf", Refusal::NBF)?;
        let expires = time(&payload, "exp", Refusal::EXP)?;
        let audiences = match payload.get("aud") {
            None => Vec::new(),
            Some(Value::String(one)) => vec![one.as_str().into()],
            Some(Value::Array(list)) => {
                list.iter().map(|item| item.as_str().map(Into::into).ok_or(Refusal::AUD)).collect::<Result<_, _>>()?
            }
            Some(_) => return Err(Refusal::AUD),
        };
        let signature = URL_SAFE_NO_PAD.decode(signature_text).map_err(|_| Refusal::SIGNATURE_BASE64)?;
        Ok(Self {
            algorithm,
            key_id,
            issuer,
            subject,
            audiences,
            issued_at,
            not_before,
            expires,
            signature,
            payload_text: payload_text.into(),
            header: Arc::new(header),
            payload: Arc::new(payload),
        })
    }

    pub(super) fn issuer(&self) -> &str {
        &self.issuer
    }

    pub(super) fn subject(&self) -> &str {
        &self.subject
    }

    /// Whether it is valid at `now`, give or take `skew` seconds.
    pub(super) fn check_time(&self, now: u64, skew: u64) -> Result<(), Refusal> {
        if self.not_before.is_some_and(|start| now.saturating_add(skew) < start) {
            return Err(Refusal::NOT_YET_VALID);
        }
        if self.expires.is_some_and(|end| now > end.saturating_add(skew)) {
            return Err(Refusal::EXPIRED);
        }
        Ok(())
    }

    pub(super) fn expires(&self) -> Option<u64> {
        self.expires
    }

    pub(super) fn issued_at(&self) -> Option<u64> {
        self.issued_at.or(self.not_before)
    }

    /// Whether it is for one of `wanted`; everybody, if nobody is named.
    pub(super) fn check_audience(&self, wanted: &[Box<str>]) -> Result<(), Refusal> {
        let fits =
            wanted.is_empty() || self.audiences.iter().any(|one| wanted.iter().any(|other| bare(one) == bare(other)));
        if fits { Ok(()) } else { Err(Refusal::WRONG_AUDIENCE) }
    }

    fn verify(&self, text: &str, keys: &KeySet) -> Result<(), Refusal> {
        let end = text.rfind('.').ok_or(Refusal::BAD_FORMAT)?;
        keys.verify(self.key_id.as_deref(), self.algorithm, &text.as_bytes()[..end], &self.signature)
    }
}

/// An audience without scheme and trailing slash, as Envoy compares them.
fn bare(audience: &str) -> &str {
    let rest = audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://")).unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}

/// Tokens whose signature was found good, so that the next request need not look again.
///
/// Keyed by the key set and every byte of the token; times and audiences are judged each time.
#[derive(Debug, Default)]
pub struct TokenCache {
    known: HashMap<[u8; 32], Arc<Token>>,
    order: VecDeque<[u8; 32]>,
}

/// Tokens remembered by one worker.
const CACHE_MAX: usize = 512;

impl TokenCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    fn key(keys: &KeySet, text: &str) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(keys.id());
        context.update(text.as_bytes());
        let mut key = [0; 32];
        key.copy_from_slice(context.finish().as_ref());
        key
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Verifies `token`, which was read from `text`.
    pub(super) fn verified(&mut self, token: Token, text: &str, keys: &KeySet) -> Result<Arc<Token>, Refusal> {
        let key = Self::key(keys, text);
        if let Some(known) = self.known.get(&key) {
            return Ok(Arc::clone(known));
        }
        token.verify(text, keys)?;
        let token = Arc::new(token);
        if self.order.len() >= CACHE_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.order.push_back(key);
        self.known.insert(key, Arc::clone(&token));
        Ok(token)
    }
}
