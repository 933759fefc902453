//! The ingress gateway: hosts, TLS, redirects.

use std::net::TcpStream;
use std::time::{Duration, SystemTime};

use testkit::{Client, TlsClient, eventually};

use crate::apps::{TRAFFIC, virtual_service};
use crate::rollouts::under_load;

#[test]
fn a_host_reaches_the_mail_catcher_and_an_unknown_host_is_404() {
    let mesh = TRAFFIC.turn();
    let mails = mesh.get("maildev.localhost", "/email", &[]);
    assert_eq!(mails.status, 200, "{mails:?}");
    assert!(mails.json().is_array(), "{mails:?}");
    let port = mesh.get("maildev.localhost:8080", "/email", &[]);
    assert_eq!(port.status, 200, "a port in Host does not matter: {port:?}");
    let unknown = mesh.get("nobody.example", "/email", &[]);
    assert_eq!((unknown.status, unknown.body.as_str()), (404, ""), "{unknown:?}");
}

/// A certificate that signs itself, and the Secret `shop-credential` with its key.
pub(crate) struct Pair {
    pub(crate) root: Vec<u8>,
    pub(crate) secret: String,
}

pub(crate) fn pair(host: &str) -> Pair {
    pair_of(&[host])
}

fn pair_of(hosts: &[&str]) -> Pair {
    let names: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let secret = credential(&made.cert.pem(), &made.signing_key.serialize_pem());
    Pair { root: made.cert.der().to_vec(), secret }
}

fn credential(certificate: &str, key: &str) -> String {
    let secret = serde_json::json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": "shop-credential", "namespace": "istio-system"},
        "stringData": {"tls.crt": certificate, "tls.key": key},
    });
    secret.to_string()
}

/// TLS for `NAME.shop.test`, ended at the gateway, on to httpbin.
pub(crate) fn https(name: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: {name}, namespace: shop}}
spec:
  selector: {{istio: ingressgateway}}
  servers:
  - {{port: {{number: 443, name: https, protocol: HTTPS}}, hosts: [{name}.shop.test], tls: {{mode: SIMPLE, credentialName: shop-credential}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: {name}, namespace: shop}}
spec:
  hosts: [{name}.shop.test]
  gateways: [{name}]
  http: [{{route: [{{destination: {{host: httpbin, port: {{number: 8000}}}}}}]}}]
"
    )
}

#[test]
fn tls_ends_at_the_gateway_and_its_secret_is_replaced_without_a_drop() {
    let mesh = TRAFFIC.turn();
    let host = "tls.shop.test";
    let old = pair(host);
    let _secret = mesh.with(&old.secret);
    let _gateway = mesh.with(&https("tls"));
    let open = |root: &[u8]| Client::tls(mesh.https, host, root);
    let mut kept = eventually("TLS at the gateway", || open(&old.root).map_err(|error| error.to_string()));
    let seen = kept.send("GET", host, "/headers", &[]).unwrap();
    assert_eq!(seen.status, 200, "{seen:?}");
    assert_eq!(seen.json()["headers"]["x-forwarded-proto"][0], "https", "{seen:?}");

    // Old connections go on and new ones are opened while the certificate is replaced.
    let new = pair(host);
    let send = |client: &mut Client| client.send("GET", host, "/status/200", &[]);
    let reopen = |(): &mut ()| open(&old.root).or_else(|_| open(&new.root)).and_then(|mut client| send(&mut client));
    let served = under_load(
        &mesh,
        1,
        || open(&old.root),
        send,
        || {
            under_load(
                &mesh,
                1,
                || Ok(()),
                reopen,
                || {
                    mesh.apply(&new.secret);
                    eventually("the new certificate", || {
                        open(&new.root).map(|_| ()).map_err(|error| error.to_string())
                    });
                },
            );
        },
    );
    assert!(served > 5, "the load was on: {served}");
    assert!(open(&old.root).is_err(), "the old certificate is gone");
    assert_eq!(kept.send("GET", host, "/status/200", &[]).unwrap().status, 200, "the old connection goes on");
    assert!(Client::tls(mesh.https, "other.shop.test", &new.root).is_err(), "no chain for another server name");
}

/// The listener waits for the secret that it names now; until it came, the old one serves.
#[test]
fn another_credential_is_named_under_load_without_a_failed_handshake() {
    let mesh = TRAFFIC.turn();
    let host = "renamed.shop.test";
    let pairs = [0, 1].map(|number| {
        let pair = pair(host);
        Pair { secret: pair.secret.replace("shop-credential", &format!("renamed-{number}")), ..pair }
    });
    let gateway = |number: usize| https("renamed").replace("shop-credential", &format!("renamed-{number}"));
    let _objects = mesh.with(&format!("{}\n---\n{}\n---\n{}", pairs[0].secret, pairs[1].secret, gateway(0)));
    let open = |root: &[u8]| Client::tls(mesh.https, host, root);
    let shown = |number: usize| {
        eventually(&format!("certificate {number}"), || {
            open(&pairs[number].root).map(|_| ()).map_err(|error| error.to_string())
        });
    };
    shown(0);
    // Whichever of the two is shown.
    let any = TlsClient::new(&[], None);
    let ask = |(): &mut ()| {
        let stream = any.connect(TcpStream::connect(mesh.https)?, host)?;
        Client::over(stream).send("GET", host, "/status/200", &[])
    };
    let served = under_load(
        &mesh,
        1,
        || Ok(()),
        ask,
        || {
            for round in 1..=4 {
                mesh.apply(&gateway(round % 2));
                shown(round % 2);
            }
        },
    );
    assert!(served > 5, "the load was on: {served}");
}

/// A certificate for `host` that ends at this second since 1970, with its key.
fn until(host: &str, seconds: u64) -> Pair {
    let signer = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(vec![host.to_owned()]).unwrap();
    parameters.not_after = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds);
    let made = parameters.self_signed(&signer).unwrap();
    Pair { root: made.der().to_vec(), secret: credential(&made.pem(), &signer.serialize_pem()) }
}

/// A pair that cannot serve is named by `apply`, and the one before goes on serving.
#[test]
fn a_bad_key_pair_is_named_with_its_remedy_and_the_last_good_one_stays() {
    let mesh = TRAFFIC.turn();
    let host = "pair.shop.test";
    let good = pair(host);
    let _secret = mesh.with(&good.secret);
    let _gateway = mesh.with(&https("pair"));
    let open = |pair: &Pair| Client::tls(mesh.https, host, &pair.root).map_err(|error| error.to_string());
    eventually("TLS at the gateway", || open(&good));
    let said = |secret: &str| {
        let output = mesh.command(&["apply", "-f", "-"], secret);
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let (one, other) = (pair_parts(host), pair_parts(host));
    for (secret, words) in [
        (credential(&one.0, &other.1), ["stringData.tls.key", "does not belong to the certificate", "(put in the key"]),
        (credential(&one.0, "none"), ["stringData.tls.key", "private key", "(put in the certificate's private key"]),
        (credential("none", &one.1), ["stringData.tls.crt", "certificate chain", "(put in a certificate chain"]),
        (until(host, now - 60).secret, ["stringData.tls.crt", "has expired", "(renew it"]),
    ] {
        eventually("the finding", || {
            let said = said(&secret);
            let is_said = |word: &&str| said.contains(word);
            if words.iter().all(is_said) && said.contains("Secret istio-system/shop-credential") {
                Ok(())
            } else {
                Err(said)
            }
        });
        open(&good).expect("the last good pair stays");
    }

    // A pair that ends while nothing else happens is found as well.
    let short = until(host, now + 8);
    eventually("its end", || {
        let said = said(&short.secret);
        if said.contains("has expired") { Ok(()) } else { Err(said) }
    });
    let next = pair(host);
    mesh.apply(&next.secret);
    eventually("the new pair", || open(&next));
    assert!(!said(&next.secret).contains("LAT0501"));
}

fn pair_parts(host: &str) -> (String, String) {
    let made = rcgen::generate_simple_self_signed([host.to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// One certificate for two hosts of two servers: the handshake's name decides which one a connection
/// reaches, whatever its requests say.
#[test]
fn a_connection_reaches_only_the_hosts_of_its_server_name() {
    let mesh = TRAFFIC.turn();
    let pair = pair_of(&["first.sni.test", "second.sni.test"]);
    let _secret = mesh.with(&pair.secret);
    let server = |name: &str| {
        format!(
            "{{port: {{number: 443, name: https-{name}, protocol: HTTPS}}, hosts: [{name}.sni.test], tls: {{mode: SIMPLE, credentialName: shop-credential}}}}"
        )
    };
    let route = |name: &str| {
        format!(
            "---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: sni-{name}, namespace: shop}}
spec:
  hosts: [{name}.sni.test]
  gateways: [sni]
  http: [{{directResponse: {{status: 200, body: {{string: {name}}}}}}}]
"
        )
    };
    let gateway = "apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: sni, namespace: shop}\n";
    let servers = format!(
        "spec: {{selector: {{istio: ingressgateway}}, servers: [{}, {}]}}\n",
        server("first"),
        server("second")
    );
    let _objects = mesh.with(&[gateway, &servers, &route("first"), &route("second")].concat());
    for (name, other) in [("first", "second"), ("second", "first")] {
        let host = format!("{name}.sni.test");
        let mut client = eventually("TLS at the gateway", || {
            Client::tls(mesh.https, &host, &pair.root).map_err(|error| error.to_string())
        });
        assert_eq!(client.send("GET", &host, "/", &[]).unwrap().body, name);
        let strayed = client.send("GET", &format!("{other}.sni.test"), "/", &[]).unwrap();
        assert!(matches!(strayed.status, 404 | 421), "{strayed:?}");
    }
}

#[test]
pub(crate) fn http_is_redirected_to_https() {
    let mesh = TRAFFIC.turn();
    let _objects = mesh.with(
        "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: redirect, namespace: shop}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 80, name: http-redirect, protocol: HTTP}, hosts: [redirect.example], tls: {httpsRedirect: true}}]
",
    );
    let answer = mesh.get("redirect.example", "/a?b=c", &[]);
    assert_eq!((answer.status, answer.header("location")), (301, Some("https://redirect.example/a?b=c")), "{answer:?}");
    let with_port = mesh.get("redirect.example:8080", "/a", &[]);
    assert_eq!(with_port.header("location"), Some("https://redirect.example:8080/a"), "{with_port:?}");
    crate::causes::logged(&mesh, "istio-system/istio-ingressgateway", "/a?b=c", " 301 - direct_response ");
}

#[test]
fn pods_reach_the_gateway_by_its_service() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("inside", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    for whence in ["plain/curl", "shop/curl"] {
        let url = "http://istio-ingressgateway.istio-system/status/202";
        let answer = mesh.curl(whence, &["-H", "host: inside.shop.test", url]);
        assert_eq!(
            (answer.status, answer.header("server")),
            (202, Some(if whence == "plain/curl" { "istio-envoy" } else { "envoy" })),
            "{whence}: {answer:?}"
        );
        assert_eq!(mesh.curl(whence, &["-H", "host: nobody.example", url]).status, 404, "{whence}");
    }
}

#[test]
fn ambiguous_and_broken_requests_are_refused() {
    let mesh = TRAFFIC.turn();
    let _route =
        mesh.with(&virtual_service("hostile", "  - route: [{destination: {host: httpbin, port: {number: 8000}}}]"));
    let check = |what: &str, request: &str| {
        let mut client = Client::plain(mesh.http).unwrap();
        match client.raw(request.as_bytes(), false) {
            Ok(answer) => assert!((400..500).contains(&answer.status), "{what}: {answer:?}"),
            // Closed without an answer is as good.
            Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "{what}: no answer"),
        }
    };
    let host = "host: hostile.shop.test\r\n";
    check(
        "both lengths",
        &format!("POST /post HTTP/1.1\r\n{host}content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    );
    check("two lengths", &format!("POST /post HTTP/1.1\r\n{host}content-length: 4\r\ncontent-length: 5\r\n\r\nabcde"));
    check("odd coding", &format!("POST /post HTTP/1.1\r\n{host}transfer-encoding: xchunked\r\n\r\n0\r\n\r\n"));
    check("folded", &format!("GET /get HTTP/1.1\r\n{host}a: b\r\n c\r\n\r\n"));
    check("space before colon", &format!("GET /get HTTP/1.1\r\n{host}a : b\r\n\r\n"));
    check("no host", "GET /get HTTP/1.1\r\n\r\n");
    check("oversized", &format!("GET /get HTTP/1.1\r\n{host}a: {}\r\n\r\n", "x".repeat(100_000)));
    check("no HTTP", "\x16\x03\x01 hello\r\n\r\n");
    assert_eq!(mesh.get("hostile.shop.test", "/get", &[]).status, 200, "the gateway goes on");
}

fn named_credential(name: &str, certificate: &str, key: &str, ca: &str) -> String {
    serde_json::json!({
        "apiVersion": "v1", "kind": "Secret", "type": "generic",
        "metadata": {"name": name, "namespace": "istio-system"},
        "stringData": {"tls.crt": certificate, "tls.key": key, "ca.crt": ca},
    })
    .to_string()
}

/// Clients that take only one kind of signature find the certificate of that kind.
#[test]
fn a_server_has_an_rsa_and_an_ecdsa_certificate() {
    let mesh = TRAFFIC.turn();
    let host = "kinds.shop.test";
    let made = |key: rcgen::KeyPair| {
        let certificate = rcgen::CertificateParams::new(vec![host.to_owned()]).unwrap().self_signed(&key).unwrap();
        (certificate.der().to_vec(), certificate.pem(), key.serialize_pem())
    };
    let rsa = made(rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap());
    let ecdsa = made(rcgen::KeyPair::generate().unwrap());
    let gateway = https("kinds").replace("credentialName: shop-credential", "credentialNames: [kind-rsa, kind-ecdsa]");
    let secrets = [("kind-rsa", &rsa), ("kind-ecdsa", &ecdsa)]
        .map(|(name, (_, certificate, key))| named_credential(name, certificate, key, certificate));
    let _objects = mesh.with(&format!("{}\n---\n{}\n---\n{gateway}", secrets[0], secrets[1]));
    for (kind, own, other) in [("RSA", &rsa.0, &ecdsa.0), ("ECDSA", &ecdsa.0, &rsa.0)] {
        let mut client = eventually("TLS at the gateway", || {
            Client::tls_signed(mesh.https, host, own, kind).map_err(|error| format!("{kind}: {error}"))
        });
        assert_eq!(client.send("GET", host, "/status/200", &[]).unwrap().status, 200, "{kind}");
        assert!(Client::tls_signed(mesh.https, host, other, kind).is_err(), "{kind}");
    }
}

struct Authority(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        parameters.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        Self(rcgen::CertifiedIssuer::self_signed(parameters, rcgen::KeyPair::generate().unwrap()).unwrap())
    }

    /// A Secret with a certificate for `host`, which takes peers of `ca`.
    fn secret(&self, name: &str, host: &str, ca: &Self) -> String {
        let mut parameters = rcgen::CertificateParams::new(vec![host.to_owned()]).unwrap();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, host);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.0).unwrap();
        named_credential(name, &certificate.pem(), &key.serialize_pem(), &ca.0.pem())
    }

    /// A client with a certificate of this serial number.
    fn client(&self, serial: u64) -> TlsClient {
        let mut parameters = rcgen::CertificateParams::new(vec!["client.example".to_owned()]).unwrap();
        parameters.serial_number = Some(rcgen::SerialNumber::from(serial));
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.0).unwrap();
        TlsClient::new(&[], Some((&certificate.pem(), &key.serialize_pem())))
    }

    /// A list that revokes these serial numbers, in PEM.
    fn revokes(&self, serials: &[u64]) -> String {
        let from = SystemTime::now() - Duration::from_hours(1);
        let revoked = |serial: &u64| rcgen::RevokedCertParams {
            serial_number: rcgen::SerialNumber::from(*serial),
            revocation_time: from.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = rcgen::CertificateRevocationListParams {
            this_update: from.into(),
            next_update: (from + Duration::from_hours(48)).into(),
            crl_number: rcgen::SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        list.signed_by(&self.0).unwrap().pem().unwrap()
    }
}

/// `ca.crl` of the Secret counts for the next handshake, also when it is replaced.
#[test]
fn a_client_on_the_revocation_list_of_the_secret_is_refused() {
    let mesh = TRAFFIC.turn();
    let host = "revoked.shop.test";
    let (server, clients) = (pair(host), Authority::new());
    let credential = |revoked: Option<&[u64]>| {
        let mut secret: serde_json::Value = serde_json::from_str(&server.secret).unwrap();
        secret["stringData"]["ca.crt"] = clients.0.pem().into();
        if let Some(serials) = revoked {
            secret["stringData"]["ca.crl"] = clients.revokes(serials).into();
        }
        secret.to_string()
    };
    let gateway = https("revoked").replace("mode: SIMPLE", "mode: MUTUAL");
    let _objects = mesh.with(&format!("{}\n---\n{gateway}", credential(Some(&[66]))));
    let (good, bad) = (clients.client(1), clients.client(66));
    // In TLS 1.3 a client hears of a refusal when it reads.
    let ask = |client: &TlsClient| {
        let answer = client
            .connect(TcpStream::connect(mesh.https).unwrap(), host)
            .and_then(|stream| Client::over(stream).send("GET", host, "/status/200", &[]));
        answer.map(|answer| answer.status).map_err(|error| error.to_string())
    };
    let taken = |what: &str, client: &TlsClient| {
        eventually(what, || match ask(client) {
            Ok(200) => Ok(()),
            other => Err(format!("{other:?}")),
        });
    };
    let refused = |what: &str, client: &TlsClient| {
        eventually(what, || match ask(client) {
            Err(_) => Ok(()),
            Ok(status) => Err(status.to_string()),
        });
    };
    taken("the good client", &good);
    ask(&bad).expect_err("the revoked client");
    mesh.apply(&credential(Some(&[1])));
    refused("a client that is revoked now", &good);
    taken("a client that is not revoked any more", &bad);
    mesh.apply(&credential(None));
    taken("nobody is revoked", &good);
    taken("nobody is revoked", &bad);
}

/// A server of the egress gateway that wants a certificate, on the way to httpbin.
const SECURE: &str = "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: secure, namespace: shop}
spec:
  selector: {istio: egressgateway}
  servers:
  - {port: {number: 443, name: https, protocol: HTTPS}, hosts: [secure.shop.test], tls: {mode: MUTUAL, credentialName: called}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: secure, namespace: shop}
spec:
  hosts: [secure.shop.test]
  gateways: [secure]
  http: [{route: [{destination: {host: httpbin, port: {number: 8000}}}]}]
";

/// A gateway calls a server that wants a certificate: the rule's credential is a Secret beside the gateway.
#[test]
fn a_gateway_shows_the_credential_of_a_destination_rule() {
    let mesh = TRAFFIC.turn();
    let (servers, clients, strangers) = (Authority::new(), Authority::new(), Authority::new());
    let host = "secure.shop.test";
    let client = |by: &Authority, trusts: &Authority| by.secret("called-with", "caller.example", trusts);
    let rule = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: secure, namespace: istio-system}
spec:
  host: istio-egressgateway.istio-system.svc.cluster.local
  trafficPolicy:
    connectionPool: {http: {maxRequestsPerConnection: 1}}
    tls: {mode: MUTUAL, credentialName: called-with, sni: secure.shop.test, subjectAltNames: [secure.shop.test]}
---
";
    let route = virtual_service(
        "caller",
        "  - rewrite: {authority: secure.shop.test}
    route: [{destination: {host: istio-egressgateway.istio-system.svc.cluster.local, port: {number: 443}}}]",
    );
    let secrets = [servers.secret("called", host, &clients), client(&clients, &servers)].join("\n---\n");
    let _objects = mesh.with(&format!("{SECURE}---{rule}{route}\n---\n{secrets}"));
    let ask = || mesh.get("caller.shop.test", "/headers", &[]);
    let becomes = |what: &str, expect: u16| {
        eventually(what, || {
            let answer = ask();
            if answer.status == expect { Ok(answer) } else { Err(format!("{answer:?}")) }
        })
    };
    let seen = becomes("the server behind", 200);
    assert!(seen.body.contains("caller.example"), "who called is told: {seen:?}");
    mesh.apply(&client(&strangers, &servers));
    becomes("a certificate that the server does not know", 503);
    mesh.apply(&client(&clients, &strangers));
    becomes("a server that the credential does not know", 503);
    mesh.apply(&client(&clients, &servers));
    becomes("the first credential again", 200);
}

/// A sidecar shows one, too, where the rule selects it: a Secret of its own namespace.
#[test]
fn a_selected_sidecar_shows_the_credential_of_a_destination_rule() {
    let mesh = TRAFFIC.turn();
    let (servers, clients) = (Authority::new(), Authority::new());
    let credential = clients.secret("called-with", "sidecar.example", &servers);
    let credential = credential.replace("\"istio-system\"", "\"shop\"");
    let rule = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: secure, namespace: shop}
spec:
  host: istio-egressgateway.istio-system.svc.cluster.local
  workloadSelector: {matchLabels: {app: curl}}
  trafficPolicy:
    tls: {mode: MUTUAL, credentialName: called-with, sni: secure.shop.test, subjectAltNames: [secure.shop.test]}
---
";
    let server = servers.secret("called", "secure.shop.test", &clients);
    let _objects = mesh.with(&format!("{SECURE}---{rule}{server}\n---\n{credential}"));
    let url = "http://istio-egressgateway.istio-system:443/headers";
    let seen = eventually("the server behind", || {
        let answer = mesh.curl("shop/curl", &["-H", "host: secure.shop.test", url]);
        if answer.status == 200 { Ok(answer) } else { Err(format!("{answer:?}")) }
    });
    assert!(seen.body.contains("sidecar.example"), "who called is told: {seen:?}");
}
