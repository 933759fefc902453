//! Handshakes in memory: who is let in, and what a session carries on.

use std::io;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    SanType,
};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConnection, HandshakeKind, ServerConnection};

use super::*;
use crate::peer::PeerFacts;

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    roots: Arc<TrustRoots>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let roots = Arc::new(TrustRoots::new(vec![issuer.der().clone()], Vec::new()).unwrap());
        Self { issuer, roots }
    }

    fn keys(&self, change: impl FnOnce(&mut CertificateParams)) -> KeyAndChain {
        self.keys_of(&rcgen::PKCS_ECDSA_P256_SHA256, change)
    }

    fn keys_of(
        &self,
        kind: &'static rcgen::SignatureAlgorithm,
        change: impl FnOnce(&mut CertificateParams),
    ) -> KeyAndChain {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate_for(kind).unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        KeyAndChain::new(vec![leaf.der().clone()], PrivateKeyDer::from(key)).unwrap()
    }

    fn workload(&self, uri_text: &str) -> WorkloadIdentity {
        let keys = self.keys(|params| params.subject_alt_names = vec![uri(uri_text)]);
        WorkloadIdentity::new(keys, Arc::clone(&self.roots), 1).unwrap()
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/productpage";
const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/reviews";
const SNI: &str = "outbound_.9080_._.reviews.shop.svc.cluster.local";

fn mesh_prefix() -> Vec<SanMatch> {
    vec![SanMatch::uri_prefix("spiffe://cluster.local/")]
}

#[derive(Debug)]
struct Shaken {
    client: ClientConnection,
    server: ServerConnection,
}

/// Runs a handshake to its end, and a byte in each direction: in TLS 1.3 a client learns only then
/// that its certificate was refused.
fn shake(client: &Arc<ClientConfig>, server: &ServerConfigs, name: &str) -> Result<Shaken, String> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let offers: Vec<&[u8]> = client.alpn_protocols.iter().map(Vec::as_slice).collect();
    let mut client_side =
        ClientConnection::new(Arc::clone(client), name).map_err(|error| format!("client: {error}"))?;
    let mut server_side = ServerConnection::new(Arc::clone(server.for_alpn(offers))).unwrap();
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client_side.wants_write() {
            client_side.write_tls(&mut wire).unwrap();
        }
        feed(&wire, |bytes| server_side.read_tls(bytes));
        server_side.process_new_packets().map_err(|error| format!("server: {error}"))?;
        let mut wire = Vec::new();
        while server_side.wants_write() {
            server_side.write_tls(&mut wire).unwrap();
        }
        feed(&wire, |bytes| client_side.read_tls(bytes));
        client_side.process_new_packets().map_err(|error| format!("client: {error}"))?;
    }
    assert!(!client_side.is_handshaking() && !server_side.is_handshaking());
    Ok(Shaken { client: client_side, server: server_side })
}

fn feed(mut wire: &[u8], mut read: impl FnMut(&mut dyn io::Read) -> io::Result<usize>) {
    while !wire.is_empty() {
        read(&mut wire).unwrap();
    }
}

fn check(what: &str, client: &ClientTls, server: &ServerTls, expect: Result<(), &str>) {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let mut client = client.clone();
        (client.bounds.min, client.bounds.max) = (version, version);
        let got = shake(&client.build().unwrap(), &server.build().unwrap(), SNI);
        match (got, expect) {
            (Ok(_), Ok(())) => {}
            (Err(error), Err(words)) => assert!(error.contains(words), "{what}, {version:?}: {error}"),
            (got, _) => panic!("{what}, {version:?}: {got:?}"),
        }
    }
}

#[test]
fn mesh_peers_know_each_other() {
    let mesh = Authority::new();
    let (client, server) = (mesh.workload(CLIENT), mesh.workload(SERVER));
    let tls = ClientTls::mesh(&client, vec![SanMatch::uri(SERVER)], vec![b"istio".to_vec()]);
    let serve = ServerTls::mesh(&server, mesh_prefix(), vec![b"h2".to_vec()]);
    let shaken = shake(&tls.build().unwrap(), &serve.build().unwrap(), SNI).unwrap();
    let peer = |certificates: Option<&[rustls::pki_types::CertificateDer<'static>]>| {
        PeerFacts::read(&certificates.unwrap()[0]).unwrap().id.unwrap().to_string()
    };
    assert_eq!(peer(shaken.server.peer_certificates()), CLIENT);
    assert_eq!(peer(shaken.client.peer_certificates()), SERVER);
    assert_eq!(shaken.server.server_name(), Some(SNI));
    assert_eq!(shaken.server.alpn_protocol(), None, "no common protocol, and yet a connection");
}

#[test]
fn only_the_single_spiffe_uri_of_a_leaf_is_a_peer() {
    let mesh = Authority::new();
    let other = Authority::new();
    let server = ServerTls::mesh(&mesh.workload(SERVER), mesh_prefix(), Vec::new());
    let good = ClientTls::mesh(&mesh.workload(CLIENT), vec![SanMatch::uri(SERVER)], Vec::new());
    let with = |keys: KeyAndChain| ClientTls { certificate: Some(keys), ..good.clone() };
    let names = |names: Vec<SanType>| mesh.keys(|params| params.subject_alt_names = names);
    let now = SystemTime::now();
    let day = Duration::from_hours(24);

    check("good", &good, &server, Ok(()));
    check(
        "no certificate",
        &ClientTls { certificate: None, ..good.clone() },
        &server,
        Err("server: peer sent no certificates"),
    );
    check("another root", &with(other.workload(CLIENT).keys), &server, Err("server: invalid peer certificate"));
    check("two identities", &with(names(vec![uri(CLIENT), uri(SERVER)])), &server, Err("no single SPIFFE URI"));
    check(
        "no SPIFFE",
        &with(names(vec![uri("https://cluster.local/ns/a/sa/b")])),
        &server,
        Err("no single SPIFFE URI"),
    );
    check("a name alone", &with(names(vec![dns("productpage.shop")])), &server, Err("no single SPIFFE URI"));
    check(
        "more path",
        &with(names(vec![uri("spiffe://cluster.local/ns/a/sa/b/c")])),
        &server,
        Err("no single SPIFFE URI"),
    );
    check(
        "another mesh",
        &with(names(vec![uri("spiffe://other.local/ns/shop/sa/productpage")])),
        &server,
        Err("match none"),
    );
    check(
        "almost our mesh",
        &with(names(vec![uri("spiffe://cluster.local.evil/ns/a/sa/b")])),
        &server,
        Err("match none"),
    );
    let expired = mesh.keys(|params| {
        params.subject_alt_names = vec![uri(CLIENT)];
        (params.not_before, params.not_after) = ((now - 2 * day).into(), (now - day).into());
    });
    check("expired", &with(expired), &server, Err("server: invalid peer certificate"));
    let early = mesh.keys(|params| {
        params.subject_alt_names = vec![uri(CLIENT)];
        params.not_before = (now + day).into();
    });
    check("early", &with(early), &server, Err("server: invalid peer certificate"));
    let authority = mesh.keys(|params| {
        params.subject_alt_names = vec![uri(CLIENT)];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    });
    check("an authority as a leaf", &with(authority), &server, Err("server: invalid peer certificate"));
    let servers_only = mesh.keys(|params| {
        params.subject_alt_names = vec![uri(CLIENT)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    check("not for clients", &with(servers_only), &server, Err("server: invalid peer certificate"));
}

#[test]
fn a_client_takes_only_the_server_it_means() {
    let mesh = Authority::new();
    let me = mesh.workload(CLIENT);
    let client = |sans: Vec<SanMatch>| ClientTls::mesh(&me, sans, Vec::new());
    let server = |keys: KeyAndChain| ServerTls {
        certificates: vec![keys],
        client_auth: ClientAuth::Required(Verify::mesh(Arc::clone(&mesh.roots), Vec::new())),
        ..ServerTls::default()
    };
    let reviews = server(mesh.workload(SERVER).keys);
    check("exact", &client(vec![SanMatch::uri(SERVER)]), &reviews, Ok(()));
    check("one of two", &client(vec![SanMatch::uri(CLIENT), SanMatch::uri(SERVER)]), &reviews, Ok(()));
    check("no rule", &client(Vec::new()), &reviews, Ok(()));
    check("another", &client(vec![SanMatch::uri(CLIENT)]), &reviews, Err("match none"));
    check("shorter", &client(vec![SanMatch::uri(&SERVER[..SERVER.len() - 1])]), &reviews, Err("match none"));
    // The right DNS name is no identity in the mesh.
    let named =
        server(mesh.keys(|params| params.subject_alt_names = vec![dns(SNI.trim_start_matches("outbound_.9080_._."))]));
    check("a DNS name", &client(Vec::new()), &named, Err("no single SPIFFE URI"));
    let foreign = server(Authority::new().workload(SERVER).keys);
    check("another root", &client(vec![SanMatch::uri(SERVER)]), &foreign, Err("client: invalid peer certificate"));
}

#[test]
fn servers_outside_are_known_by_name() {
    let authority = Authority::new();
    let server = ServerTls {
        certificates: vec![
            authority.keys(|params| params.subject_alt_names = vec![dns("*.example.com"), dns("example.org")]),
        ],
        ..ServerTls::default()
    };
    let client = ClientTls::named(Arc::clone(&authority.roots), Vec::new());
    let go = |client: &ClientTls, name: &str| shake(&client.build().unwrap(), &server.build().unwrap(), name).is_ok();
    assert!(go(&client, "www.example.com") && go(&client, "example.org"));
    assert!(!go(&client, "example.com") && !go(&client, "a.b.example.com") && !go(&client, "example.net"));
    // Names given by rules, whatever the server name.
    let rule = |kind: SanKind, text: &str| ClientTls {
        verify: Some(Verify::chain(
            Arc::clone(&authority.roots),
            vec![SanMatch { kind, rule: SanRule::Exact(text.to_owned()) }],
        )),
        ..client.clone()
    };
    assert!(
        go(&rule(SanKind::Dns, "WWW.example.com"), "elsewhere.net")
            && go(&rule(SanKind::Any, "example.org"), "elsewhere.net")
    );
    assert!(
        !go(&rule(SanKind::Dns, "x.y.example.com"), "elsewhere.net")
            && !go(&rule(SanKind::Uri, "example.org"), "example.org")
    );
    // Not checked at all, on request.
    assert!(go(&ClientTls { verify: None, ..client }, "anything.net"));
}

#[test]
fn of_two_certificates_a_client_gets_the_one_it_can_check() {
    let authority = Authority::new();
    let named = |params: &mut CertificateParams| params.subject_alt_names = vec![dns("example.org")];
    let kinds = [&rcgen::PKCS_RSA_SHA256, &rcgen::PKCS_ECDSA_P256_SHA256];
    let certificates = kinds.map(|kind| authority.keys_of(kind, named));
    let leaves = certificates.clone().map(|keys| keys.certified().cert[0].clone());
    let old = Bounds { max: TlsVersion::V1_2, ..Bounds::default() };
    let server = ServerTls { certificates: certificates.into(), bounds: old.clone(), ..ServerTls::default() };
    let shown = |suites: &[&str]| {
        let mut client = ClientTls::named(Arc::clone(&authority.roots), Vec::new());
        client.bounds =
            Bounds { cipher_suites: suites.iter().map(|suite| (*suite).to_owned()).collect(), ..old.clone() };
        let shaken = shake(&client.build().unwrap(), &server.build().unwrap(), "example.org").unwrap();
        shaken.client.peer_certificates().unwrap()[0].clone()
    };
    let (rsa, ecdsa) = ("ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-GCM-SHA256");
    assert_eq!(shown(&[rsa]), leaves[0]);
    assert_eq!(shown(&[ecdsa]), leaves[1]);
    assert_eq!(shown(&[ecdsa, rsa]), leaves[0], "the first where both would do");
}

#[test]
fn a_certificate_is_optional_but_never_bad() {
    let (mesh, other) = (Authority::new(), Authority::new());
    let server = ServerTls {
        certificates: vec![mesh.keys(|params| params.subject_alt_names = vec![dns("example.org")])],
        client_auth: ClientAuth::Optional(Verify::chain(Arc::clone(&mesh.roots), Vec::new())),
        ..ServerTls::default()
    };
    let anonymous = ClientTls { verify: None, ..ClientTls::named(Arc::clone(&mesh.roots), Vec::new()) };
    let with = |keys: KeyAndChain| ClientTls { certificate: Some(keys), ..anonymous.clone() };
    check("none", &anonymous, &server, Ok(()));
    check("good", &with(mesh.workload(CLIENT).keys), &server, Ok(()));
    check("bad", &with(other.workload(CLIENT).keys), &server, Err("server: invalid peer certificate"));
}

#[test]
fn sessions_carry_nothing_over() {
    let mesh = Authority::new();
    let open = |bounds: Bounds| ServerTls {
        certificates: vec![mesh.keys(|params| params.subject_alt_names = vec![dns("example.org"), dns("other.org")])],
        bounds,
        ..ServerTls::default()
    };
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let bounds = Bounds { min: version, max: version, ..Bounds::default() };
        let (first, second) = (open(bounds.clone()).build().unwrap(), open(bounds.clone()).build().unwrap());
        let required = ServerTls {
            client_auth: ClientAuth::Required(Verify::mesh(Arc::clone(&mesh.roots), Vec::new())),
            ..open(bounds.clone())
        };
        let required = required.build().unwrap();
        // A client that resumes whatever it can, unlike ours.
        let mut eager = ClientTls { verify: None, ..ClientTls::named(Arc::clone(&mesh.roots), Vec::new()) };
        eager.certificate = Some(mesh.workload(CLIENT).keys);
        let mut eager = Arc::unwrap_or_clone(eager.build().unwrap());
        eager.resumption = Resumption::in_memory_sessions(16);
        let eager = Arc::new(eager);
        let kind =
            |server: &ServerConfigs, name: &str| shake(&eager, server, name).unwrap().server.handshake_kind().unwrap();
        assert_ne!(kind(&first, "example.org"), HandshakeKind::Resumed);
        assert_eq!(
            kind(&first, "example.org"),
            HandshakeKind::Resumed,
            "{version:?}: the case shows nothing otherwise"
        );
        assert_ne!(kind(&second, "example.org"), HandshakeKind::Resumed, "{version:?}: another listener");
        // Back at the first one, under another name.
        assert_ne!(kind(&first, "other.org"), HandshakeKind::Resumed, "{version:?}: another name");
        for _ in 0..2 {
            assert_ne!(
                kind(&required, "example.org"),
                HandshakeKind::Resumed,
                "{version:?}: with a client certificate"
            );
        }
    }
}

#[test]
fn bounds_hold() {
    let mesh = Authority::new();
    let me = mesh.workload(CLIENT);
    let client = |min, max, suites: &[&str]| {
        let mut client = ClientTls::mesh(&me, Vec::new(), Vec::new());
        client.bounds = Bounds {
            min,
            max,
            cipher_suites: suites.iter().map(|suite| (*suite).to_owned()).collect(),
            curves: Vec::new(),
        };
        client
    };
    let mut server = ServerTls::mesh(&mesh.workload(SERVER), mesh_prefix(), Vec::new());
    server.bounds.min = TlsVersion::V1_3;
    let go =
        |client: &ClientTls, server: &ServerTls| shake(&client.build().unwrap(), &server.build().unwrap(), SNI).is_ok();
    assert!(!go(&client(TlsVersion::V1_2, TlsVersion::V1_2, &[]), &server));
    assert!(go(&client(TlsVersion::V1_2, TlsVersion::V1_3, &[]), &server));
    server.bounds = Bounds {
        max: TlsVersion::V1_2,
        cipher_suites: vec!["ECDHE-ECDSA-AES128-GCM-SHA256".to_owned()],
        ..Bounds::default()
    };
    assert!(go(&client(TlsVersion::V1_2, TlsVersion::V1_2, &[]), &server));
    assert!(!go(&client(TlsVersion::V1_2, TlsVersion::V1_2, &["ECDHE-ECDSA-AES256-GCM-SHA384"]), &server));
    let static_rsa = client(TlsVersion::V1_2, TlsVersion::V1_2, &["AES256-GCM-SHA384"]);
    assert!(matches!(static_rsa.build(), Err(InvalidTls::CipherSuites(_))));
    let upside_down = client(TlsVersion::V1_3, TlsVersion::V1_2, &[]);
    assert!(matches!(upside_down.build(), Err(InvalidTls::Versions)));
    // Istio's default list, static RSA included, leaves TLS 1.3 alone.
    let all = ["ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-RSA-AES256-GCM-SHA384", "AES256-GCM-SHA384"];
    server.bounds = Bounds { cipher_suites: all.map(str::to_owned).to_vec(), ..Bounds::default() };
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        assert!(go(&client(version, version, &[]), &server), "{version:?}");
    }
}

/// An authority that signs revocation lists.
fn revoking_authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A list that revokes this serial number and is valid for a day from `from`, in PEM.
fn revoked(by: &CertifiedIssuer<'static, KeyPair>, from: SystemTime, serial: u64) -> String {
    let list = rcgen::CertificateRevocationListParams {
        this_update: from.into(),
        next_update: (from + Duration::from_hours(24)).into(),
        crl_number: rcgen::SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: vec![rcgen::RevokedCertParams {
            serial_number: rcgen::SerialNumber::from(serial),
            revocation_time: from.into(),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    list.signed_by(by).unwrap().pem().unwrap()
}

/// What is refused is what Envoy 1.40 refuses.
#[test]
fn revoked_peers_are_refused_on_both_sides() {
    let (issuer, other) = (revoking_authority("ours"), revoking_authority("other"));
    let now = SystemTime::now();
    let lists = [&issuer, &other].map(|by| revoked(by, now, 66));
    let old = revoked(&issuer, now - Duration::from_hours(48), 66);
    let both = revoked(&issuer, now - Duration::from_hours(1), 67) + &lists[0];
    let bare = Arc::new(TrustRoots::new(vec![issuer.der().clone()], Vec::new()).unwrap());
    let authority = Authority { issuer, roots: Arc::clone(&bare) };
    let with_serial = |uri_text: &str, serial: u64, roots: &Arc<TrustRoots>| {
        let keys = authority.keys(|params| {
            params.subject_alt_names = vec![uri(uri_text)];
            params.serial_number = Some(rcgen::SerialNumber::from(serial));
        });
        WorkloadIdentity::new(keys, Arc::clone(roots), 1).unwrap()
    };
    let refused = "invalid peer certificate: ";
    for (what, list, good, revoked) in [
        ("the authority's list", &lists[0], Ok(()), "Revoked"),
        ("it and another's", &lists.concat(), Ok(()), "Revoked"),
        ("it behind an older one that is still valid", &both, Ok(()), "Revoked"),
        ("another's alone", &lists[1], Err("UnknownRevocationStatus"), "UnknownRevocationStatus"),
        ("a list of the past", &old, Err("certificate revocation list expired"), "certificate revocation list expired"),
    ] {
        let roots = Arc::new(bare.revoking(list.as_bytes()).unwrap());
        for (serial, expect) in [(1, good), (66, Err(revoked))] {
            let words = expect.map_err(|word| format!("{refused}{word}"));
            let expect = |side: &str| words.clone().map_err(|words| format!("{side}: {words}"));
            for (side, client, server) in [
                ("server", with_serial(CLIENT, serial, &bare), with_serial(SERVER, 2, &roots)),
                ("client", with_serial(CLIENT, 2, &roots), with_serial(SERVER, serial, &bare)),
            ] {
                let client = ClientTls::mesh(&client, vec![SanMatch::uri(SERVER)], Vec::new());
                let server = ServerTls::mesh(&server, mesh_prefix(), Vec::new());
                let expect = expect(side);
                let expect = expect.as_ref().copied().map_err(String::as_str);
                check(&format!("{what}, {serial}"), &client, &server, expect);
            }
        }
    }
    for none in ["", "no list", "-----BEGIN X509 CRL-----\nAA==\n-----END X509 CRL-----\n"] {
        bare.revoking(none.as_bytes()).unwrap_err();
    }
}

#[test]
fn one_pin_of_either_kind_is_enough() {
    let mesh = Authority::new();
    let server = ServerTls::mesh(&mesh.workload(SERVER), mesh_prefix(), Vec::new());
    let leaf = server.certificates[0].facts().unwrap();
    let client = |spki: &[[u8; 32]], certificates: &[&str]| {
        let mut client = ClientTls::mesh(&mesh.workload(CLIENT), Vec::new(), Vec::new());
        let verify = client.verify.as_mut().unwrap();
        verify.spki_pins = spki.to_vec();
        verify.certificate_pins = certificates.iter().map(|&pin| pin.to_owned()).collect();
        client
    };
    let (key, certificate, other) = (leaf.spki_sha256, &*leaf.sha256, "00");
    for (spki, certificates, expect) in [
        (&[key][..], &[][..], Ok(())),
        (&[[0; 32], key], &[other], Ok(())),
        (&[[0; 32]], &[certificate], Ok(())),
        (&[[0; 32]], &[], Err("pinned")),
        (&[], &[other], Err("pinned")),
        (&[[0; 32]], &[other], Err("pinned")),
    ] {
        check(&format!("{spki:?} {certificates:?}"), &client(spki, certificates), &server, expect);
    }
}
