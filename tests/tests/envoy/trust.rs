//! Whom a listener takes: roots, revocation lists, names and pins, written in place and in secrets.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, CertifiedIssuer, DnType, KeyPair, PublicKeyData as _, SanType, SerialNumber};
use serde_json::{Value, json};
use testkit::{Client, TlsClient, eventually};

use crate::filters::{bootstrap, hcm, listener, typed};
use crate::sources::{SECRET, file, put, with_type};
use crate::standalone::{Pair, refused};

/// An authority that signs revocation lists.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate with its key, in PEM.
pub(crate) struct Leaf {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn leaf(&self, name: &str, serial: u64) -> Leaf {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().unwrap();
        Leaf { certificate: params.signed_by(&key, &self.0).unwrap(), key }
    }

    /// A list that revokes these and is valid for two days from `from`.
    fn revoked(&self, serials: &[u64], from: SystemTime) -> String {
        let list = rcgen::CertificateRevocationListParams {
            this_update: from.into(),
            next_update: (from + Duration::from_hours(48)).into(),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: serials
                .iter()
                .map(|serial| rcgen::RevokedCertParams {
                    serial_number: SerialNumber::from(*serial),
                    revocation_time: from.into(),
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        list.signed_by(&self.0).unwrap().pem().unwrap()
    }
}

impl Leaf {
    pub(crate) fn secret(&self) -> Value {
        json!({ "certificate_chain": inline(&self.certificate.pem()), "private_key": inline(&self.key.serialize_pem()) })
    }

    fn sha256(&self) -> String {
        testkit::tls::certificate_pin(self.certificate.der())
    }

    fn client(&self) -> TlsClient {
        TlsClient::new(&[], Some((&self.certificate.pem(), &self.key.serialize_pem())))
    }
}

fn inline(text: &str) -> Value {
    json!({ "inline_string": text })
}

/// Whether a server takes a client. (In TLS 1.3 a client hears of a refusal when it reads.)
fn takes(at: SocketAddr, client: &TlsClient) -> Result<(), String> {
    let ask = || Client::over(client.connect(TcpStream::connect(at)?, "a.test")?).send("GET", "a.test", "/", &[]);
    let answer = ask().map_err(|error| error.to_string())?;
    assert_eq!(answer.status, 200, "{answer:?}");
    Ok(())
}

/// A listener that wants a certificate, judged by `context`.
fn secure(name: &str, server: &Leaf, context: (&str, Value)) -> Value {
    let manager = hcm(&[], &json!([{ "match": { "prefix": "/" }, "direct_response": { "status": 200 } }]), &json!({}));
    let mut made = listener(name, &[manager]);
    let mut common = json!({ "tls_certificates": [server.secret()] });
    common[context.0] = context.1;
    made["filter_chains"][0]["transport_socket"] = typed(
        "envoy.transport_sockets.tls",
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        json!({ "require_client_certificate": true, "common_tls_context": common }),
    );
    made
}

#[test]
fn what_stands_beside_the_roots_counts_in_place_and_in_a_secret() {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let now = SystemTime::now() - Duration::from_hours(1);
    let (server, good, bad) = (ours.leaf("server.test", 2), ours.leaf("good.test", 1), ours.leaf("bad.test", 66));
    let (list, others) = (ours.revoked(&[66], now), other.revoked(&[], now));
    let old = ours.revoked(&[66], now - Duration::from_hours(96));
    let dns = |name: &str| json!([{ "san_type": "DNS", "matcher": { "exact": name } }]);
    let spki = |leaf: &Leaf| testkit::tls::key_pin(&leaf.key.subject_public_key_info());
    // what stands beside the roots, and whether the good one and the bad one get in
    let cases = [
        ("nothing", json!({}), [true, true]),
        ("list", json!({ "crl": inline(&list) }), [true, false]),
        ("lists", json!({ "crl": inline(&(others.clone() + &list)) }), [true, false]),
        ("list-of-others", json!({ "crl": inline(&others) }), [false, false]),
        ("old-list", json!({ "crl": inline(&old) }), [false, false]),
        ("name", json!({ "match_typed_subject_alt_names": dns("good.test") }), [true, false]),
        ("hash", json!({ "verify_certificate_hash": [good.sha256()] }), [true, false]),
        ("key", json!({ "verify_certificate_spki": [spki(&bad)] }), [false, true]),
        (
            "hash-or-key",
            json!({ "verify_certificate_hash": [good.sha256()], "verify_certificate_spki": [spki(&bad)] }),
            [true, true],
        ),
    ];
    let (mut listeners, mut secrets, mut expected) = (Vec::new(), Vec::new(), Vec::new());
    for (name, beside, expect) in &cases {
        let mut context = beside.clone();
        context["trusted_ca"] = inline(&ours.0.pem());
        let by_name = json!({ "name": name, "sds_config": file(&format!("{name}.yaml")) });
        listeners.push(secure(name, &server, ("validation_context", context.clone())));
        let secret = format!("{name}-in-a-secret");
        listeners.push(secure(&secret, &server, ("validation_context_sds_secret_config", by_name)));
        secrets.push((name, with_type(SECRET, json!({ "name": name, "validation_context": context }))));
        expected.extend([((*name).to_owned(), *expect), (secret, *expect)]);
    }
    // Both at once: the lists follow each other.
    for (name, default, of_secret, expect) in [
        ("name-beside", json!({ "match_typed_subject_alt_names": dns("bad.test") }), "name", [true, true]),
        ("list-beside", json!({ "crl": inline(&list) }), "nothing", [true, false]),
        ("list-within", json!({ "match_typed_subject_alt_names": dns("good.test") }), "list", [true, false]),
    ] {
        let combined = json!({
            "default_validation_context": default,
            "validation_context_sds_secret_config": { "name": of_secret, "sds_config": file(&format!("{of_secret}.yaml")) },
        });
        listeners.push(secure(name, &server, ("combined_validation_context", combined)));
        expected.push((name.to_owned(), expect));
    }
    // Envoy takes one secret from a file.
    let pair = Pair::with_files(&bootstrap(&listeners, &[]), |dir| {
        for (name, secret) in &secrets {
            put(dir, &format!("{name}.yaml"), std::slice::from_ref(secret));
        }
    });
    let clients = [good.client(), bad.client()];
    for proxy in pair.both() {
        for (name, expect) in &expected {
            let at = proxy.listener(name);
            for (client, (whose, expect)) in clients.iter().zip(["good", "bad"].into_iter().zip(expect)) {
                let got = takes(at, client);
                assert_eq!(got.is_ok(), *expect, "{} {name}, {whose}: {got:?}\n{}", proxy.kind, proxy.log());
            }
        }
        // Whom a new list revokes is not taken any more.
        let mut next = secrets[0].1.clone();
        next["validation_context"]["crl"] = inline(&ours.revoked(&[1], now));
        put(proxy.dir.path(), "nothing.yaml", &[next]);
        eventually(&format!("{}: a revoked client", proxy.kind), || {
            match takes(proxy.listener("nothing-in-a-secret"), &clients[0]) {
                Ok(()) => Err("it is taken".to_owned()),
                Err(_) => Ok(()),
            }
        });
        takes(proxy.listener("nothing-in-a-secret"), &clients[1]).unwrap();
    }
}

/// What would be believed and is not looked at is refused by name: as Envoy does, or because it is not built.
#[test]
fn what_is_not_looked_at_beside_roots_is_refused() {
    let ours = Authority::new("ours");
    let server = ours.leaf("server.test", 2);
    let list = inline(&ours.revoked(&[], SystemTime::now() - Duration::from_hours(1)));
    let roots = inline(&ours.0.pem());
    let name = json!([{ "san_type": "DNS", "matcher": { "exact": "a.test" } }]);
    let text = |context: &Value| {
        let client = json!({ "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": { "validation_context": context } });
        let mut cluster = crate::filters::cluster("up", &["127.0.0.1:9".parse().unwrap()]);
        cluster["transport_socket"] = json!({ "name": "envoy.transport_sockets.tls", "typed_config": client });
        bootstrap(&[], &[cluster])
    };
    for (context, words, by_envoy) in [
        (json!({ "crl": list }), "crl needs trusted_ca", true),
        (json!({ "match_typed_subject_alt_names": name }), "match_typed_subject_alt_names needs trusted_ca", true),
        (json!({ "verify_certificate_hash": [server.sha256()] }), "verify_certificate_hash", false),
        (json!({ "trusted_ca": roots, "only_verify_leaf_cert_crl": true }), "only_verify_leaf_cert_crl", false),
    ] {
        let bootstrap = text(&context);
        let said = refused("lateen", &bootstrap);
        assert!(said.contains(words), "{said}");
        if by_envoy {
            refused("envoy", &bootstrap);
        }
    }
    let secret = |kind: &str, body: &Value| {
        let mut all: Value = serde_json::from_str(&bootstrap(&[], &[])).unwrap();
        all["static_resources"]["secrets"] = json!([{ "name": "s", kind: body }]);
        all.to_string()
    };
    let mut pair = server.secret();
    pair["password"] = inline("x");
    for (kind, body, words) in [
        ("tls_certificate", pair, "tls_certificate.password"),
        ("validation_context", json!({ "trusted_ca": roots, "max_verify_depth": 1 }), "max_verify_depth"),
        ("validation_context", json!({ "trusted_ca": roots, "crl": inline("none") }), "no revocation list"),
    ] {
        let said = refused("lateen", &secret(kind, &body));
        assert!(said.contains(words), "{said}");
    }
}
