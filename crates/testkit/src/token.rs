//! Tokens and the key sets that check them.

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use rcgen::{KeyPair, PublicKeyData as _, SigningKey as _};
use serde_json::{Value, json};

/// Signs with ES256.
#[derive(Debug)]
pub struct Issuer {
    key: KeyPair,
    id: String,
}

impl Issuer {
    /// A new key named `id`.
    pub fn new(id: &str) -> Self {
        Self { key: KeyPair::generate().expect("a P-256 key can always be made"), id: id.to_owned() }
    }

    /// The key set as `jwks` takes it.
    pub fn jwks(&self) -> String {
        // Uncompressed point: 4, x, y.
        let point = self.key.der_bytes();
        let [x, y] = [&point[1..33], &point[33..65]].map(|part| BASE64.encode(part));
        json!({"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.id, "x": x, "y": y}]})
            .to_string()
    }

    /// The public key as PEM text, and as the bytes of its point.
    pub fn public_key(&self) -> (String, Vec<u8>) {
        (self.key.public_key_pem(), self.key.der_bytes().to_vec())
    }

    /// A token with these claims.
    pub fn sign(&self, claims: &Value) -> String {
        self.sign_as(&json!({}), claims)
    }

    /// A token whose header says what `head` says beside `alg`, `typ` and `kid`, or in their place.
    pub fn sign_as(&self, head: &Value, claims: &Value) -> String {
        let mut all = json!({"alg": "ES256", "typ": "JWT", "kid": self.id});
        for (name, value) in head.as_object().into_iter().flatten() {
            all[name] = value.clone();
        }
        let head = all;
        let text = format!("{}.{}", BASE64.encode(head.to_string()), BASE64.encode(claims.to_string()));
        let der = self.key.sign(text.as_bytes()).expect("signing with a key in memory cannot fail");
        format!("{text}.{}", BASE64.encode(fixed_signature(&der)))
    }
}

/// A token signed by HMAC with `secret`, as those try who know a public key only.
pub fn forge(secret: &[u8], head: &Value, claims: &Value) -> String {
    let text = format!("{}.{}", BASE64.encode(head.to_string()), BASE64.encode(claims.to_string()));
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    format!("{text}.{}", BASE64.encode(hmac::sign(&key, text.as_bytes())))
}

/// `SEQUENCE { INTEGER r, INTEGER s }` as the 64 bytes that RFC 7518 section 3.4 wants.
fn fixed_signature(der: &[u8]) -> [u8; 64] {
    let mut out = [0; 64];
    let mut rest = &der[2..];
    for half in out.chunks_mut(32) {
        let length = usize::from(rest[1]);
        let number = &rest[2..2 + length];
        let number = &number[number.len().saturating_sub(32)..];
        half[32 - number.len()..].copy_from_slice(number);
        rest = &rest[2 + length..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_have_their_fixed_form() {
        let der = [&[0x30, 9, 2, 2, 0, 0xff, 2, 3, 1, 2, 3][..]].concat();
        let fixed = fixed_signature(&der);
        assert_eq!(fixed[31], 0xff);
        assert_eq!(fixed[61..], [1, 2, 3]);
        assert!(fixed[..31].iter().chain(&fixed[32..61]).all(|byte| *byte == 0));
    }
}
