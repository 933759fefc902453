//! Tokens of pods' service accounts: minted for one pod and one audience, reviewed against it.
//!
//! The form is Kubernetes' (a JWT with the claim `kubernetes.io`), signed ES256 with a key that
//! lives as long as the process. A token is good as long as its pod: a review looks it up.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use api::{ConfigSet, k8s};
use types::NamespacedName;

const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// A token longer than this is not one of ours.
const TOKEN_BYTES_MAX: usize = 16 * 1024;

/// Whom a token is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TokenSubject {
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Pod.
    pub pod: String,
    /// The pod's uid: a namesake is another pod.
    pub pod_uid: String,
}

/// Asks whether a token is good. The body of `POST /tokenreview`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TokenReview {
    /// The token.
    pub token: String,
    /// Whom it must be meant for.
    pub audience: String,
}

/// The answer to a [`TokenReview`].
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenReviewed {
    /// Whether it is good.
    pub authenticated: bool,
    /// The pod's namespace.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// The pod's service account.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub service_account: String,
    /// The pod.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod: String,
    /// Why it is not good.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub error: String,
}

/// Mints and reviews tokens.
pub struct Tokens {
    key: EcdsaKeyPair,
    random: SystemRandom,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens")
    }
}

impl Default for Tokens {
    fn default() -> Self {
        Self::new()
    }
}

impl Tokens {
    /// A minter with a fresh key.
    pub fn new() -> Self {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a P-256 key can always be made");
        Self { key, random: SystemRandom::new() }
    }

    /// A token for `subject`, meant for `audience`, good for `seconds` from `now` (seconds since 1970).
    pub fn mint(&self, subject: &TokenSubject, audience: &str, now: i64, seconds: u64) -> String {
        let TokenSubject { namespace, service_account, pod, pod_uid } = subject;
        let header = json!({"alg": "ES256", "typ": "JWT"});
        let claims = json!({
            "iss": ISSUER,
            "aud": [audience],
            "iat": now,
            "nbf": now,
            "exp": now.saturating_add(i64::try_from(seconds).unwrap_or(i64::MAX)),
            "sub": format!("system:serviceaccount:{namespace}:{service_account}"),
            "kubernetes.io": {
                "namespace": namespace,
                "pod": {"name": pod, "uid": pod_uid},
                "serviceaccount": {"name": service_account},
            },
        });
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let signature = self.key.sign(&self.random, signed.as_bytes()).expect("signing with a good key does not fail");
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }

    /// Whether a token is good now, and whose it is.
    pub fn review(&self, review: &TokenReview, objects: &ConfigSet, now: i64) -> TokenReviewed {
        match self.check(review, objects, now) {
            Ok(subject) => TokenReviewed {
                authenticated: true,
                namespace: subject.namespace,
                service_account: subject.service_account,
                pod: subject.pod,
                error: String::new(),
            },
            Err(error) => TokenReviewed { error: error.to_owned(), ..TokenReviewed::default() },
        }
    }

    fn check(&self, review: &TokenReview, objects: &ConfigSet, now: i64) -> Result<TokenSubject, &'static str> {
        if review.token.len() > TOKEN_BYTES_MAX {
            return Err("token is too long");
        }
        let (signed, signature) = review.token.rsplit_once('.').ok_or("not a token")?;
        let (header, claims) = signed.split_once('.').ok_or("not a token")?;
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| "not a token")?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key().as_ref())
            .verify(signed.as_bytes(), &signature)
            .map_err(|_| "token was not signed here")?;
        let decode = |part: &str| -> Result<Value, &'static str> {
            let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| "not a token")?;
            serde_json::from_slice(&bytes).map_err(|_| "not a token")
        };
        if decode(header)?["alg"] != "ES256" {
            return Err("not a token");
        }
        let claims = decode(claims)?;
        let audiences = claims["aud"].as_array().ok_or("token has no audience")?;
        if !audiences.iter().any(|audience| audience == review.audience.as_str()) {
            return Err("token is meant for another audience");
        }
        if claims["exp"].as_i64().is_none_or(|end| end <= now) {
            return Err("token is expired");
        }
        if claims["nbf"].as_i64().is_none_or(|start| start > now + 60) {
            return Err("token is not valid yet");
        }
        let bound = &claims["kubernetes.io"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let subject = TokenSubject {
            namespace: text(&bound["namespace"]),
            service_account: text(&bound["serviceaccount"]["name"]),
            pod: text(&bound["pod"]["name"]),
            pod_uid: text(&bound["pod"]["uid"]),
        };
        let key = NamespacedName::new(&subject.namespace, &subject.pod);
        let (object, pod) = objects.get::<k8s::Pod>(&key.namespace, &key.name).ok_or("the token's pod is gone")?;
        if *object.meta.uid != *subject.pod_uid || pod.spec.account() != subject.service_account {
            return Err("the token's pod is gone");
        }
        Ok(subject)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, account: &str) -> ConfigSet {
        let value = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "shop", "uid": uid},
            "spec": {"serviceAccountName": account, "containers": [{"name": "c", "image": "i"}]}});
        ConfigSet::new(api::from_json(&value).0)
    }

    #[test]
    fn a_token_is_as_good_as_its_pod() {
        let tokens = Tokens::new();
        let subject = TokenSubject {
            namespace: "shop".into(),
            service_account: "reviews".into(),
            pod: "p".into(),
            pod_uid: "u1".into(),
        };
        let token = tokens.mint(&subject, "istio-ca", 1000, 600);
        let check = |token: &str, audience: &str, set: &ConfigSet, now: i64| {
            tokens.review(&TokenReview { token: token.to_owned(), audience: audience.to_owned() }, set, now)
        };
        let live = pod("u1", "reviews");
        let good = check(&token, "istio-ca", &live, 1100);
        assert!(good.authenticated && good.service_account == "reviews" && good.pod == "p", "{good:?}");
        for (token, audience, set, now, why) in [
            (token.as_str(), "other", &live, 1100, "audience"),
            (token.as_str(), "istio-ca", &live, 1600, "expired"),
            (token.as_str(), "istio-ca", &live, 100, "not valid yet"),
            (token.as_str(), "istio-ca", &pod("u2", "reviews"), 1100, "gone"),
            (token.as_str(), "istio-ca", &pod("u1", "ratings"), 1100, "gone"),
            (token.as_str(), "istio-ca", &ConfigSet::default(), 1100, "gone"),
            ("a.b.c", "istio-ca", &live, 1100, "not"),
            ("", "istio-ca", &live, 1100, "not a token"),
        ] {
            let bad = check(token, audience, set, now);
            assert!(!bad.authenticated && bad.error.contains(why), "{why}: {bad:?}");
        }
        let forged = Tokens::new().mint(&subject, "istio-ca", 1000, 600);
        assert!(!check(&forged, "istio-ca", &live, 1100).authenticated);
        let (head, _) = token.rsplit_once('.').unwrap();
        assert!(!check(&format!("{head}."), "istio-ca", &live, 1100).authenticated);
    }
}
