//! Gateways as their listeners, tables and secrets.

use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, route, route_action};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;

use super::*;
use crate::security::test_mesh;
use crate::view::ProxyKind;

const SERVICES: &str = r"
apiVersion: v1
kind: Service
metadata: {name: istio-ingressgateway, namespace: istio-system}
spec:
  clusterIP: 10.96.0.9
  selector: {istio: ingressgateway}
  ports: [{name: http2, port: 80, targetPort: 8080}, {name: https, port: 443, targetPort: 8443}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: web}
  ports: [{name: http, port: 9080}]
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: shop}
spec:
  clusterIP: 10.96.0.2
  selector: {app: echo}
  ports: [{name: tcp, port: 9000}, {name: tls, port: 8443}]
";

struct Got {
    compiled: Compiled,
    secrets: Vec<Secret>,
    findings: Vec<String>,
}

fn compiled(yaml: &str) -> Got {
    let snapshot = test_mesh::snapshot(&format!("{SERVICES}{yaml}"));
    let mut view = test_mesh::view(ProxyKind::Router, "istio-system", &["istio=ingressgateway"]);
    view.is_unprivileged = true;
    let context = Context::new(&snapshot, &view);
    let compiled = compile(&context);
    let secrets = crate::secrets::answers(&context);
    let findings = context.into_findings();
    Got { compiled, secrets, findings: findings.iter().map(ToString::to_string).collect() }
}

fn gateway(namespace: &str, name: &str, servers: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  selector: {{istio: ingressgateway}}\n  servers: [{servers}]\n"
    )
}

fn virtual_service(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn secret(name: &str, keys: &[&str]) -> String {
    let data: Vec<String> = keys
        .iter()
        .map(|key| {
            let label = match *key {
                "key" | "tls.key" => "PRIVATE KEY",
                "crl" | "ca.crl" => "X509 CRL",
                _ => "CERTIFICATE",
            };
            format!("  {key}: |\n    -----BEGIN {label}-----\n    AA==\n    -----END {label}-----\n")
        })
        .collect();
    format!(
        "---\napiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: istio-system}}\nstringData:\n{}",
        data.join("")
    )
}

/// `name: chain` for every chain.
fn listeners(got: &Got) -> Vec<String> {
    let all = got.compiled.listeners.iter();
    all.flat_map(|listener| {
        let inspected = if listener.listener_filters.is_empty() { "" } else { " tls_inspector" };
        listener
            .filter_chains
            .iter()
            .map(move |chain| format!("{}{inspected}:{}", listener.name, test_mesh::chain(chain)))
    })
    .collect()
}

/// Virtual hosts and the clusters of their routes.
fn table(table: &RouteConfiguration) -> Vec<String> {
    let mut out = vec![table.name.clone()];
    for host in &table.virtual_hosts {
        let tls = if host.require_tls == 0 { "" } else { " redirects" };
        let routes: Vec<_> = host
            .routes
            .iter()
            .map(|route| match route.action.as_ref().unwrap() {
                route::Action::Route(to) => match to.cluster_specifier.as_ref().unwrap() {
                    route_action::ClusterSpecifier::Cluster(name) => name.clone(),
                    other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            })
            .collect();
        out.push(format!("{} [{}]{tls} {}", host.name, host.domains.join(" "), routes.join(" ")).trim_end().to_owned());
    }
    out
}

fn tables(got: &Got) -> Vec<String> {
    got.compiled.routes.iter().flat_map(table).collect()
}

const WEB: &str = "outbound|9080||web.shop.svc.cluster.local";

#[test]
fn http_https_and_redirect() {
    let got = compiled(
        &(gateway(
            "shop",
            "mail",
            "{port: {number: 80, name: http, protocol: HTTP}, hosts: [plain.example.com]}, \
             {port: {number: 80, name: http-redirect, protocol: HTTP}, hosts: [tls.example.com], tls: {httpsRedirect: true}}, \
             {port: {number: 443, name: https, protocol: HTTPS}, hosts: [tls.example.com], tls: {mode: SIMPLE, credentialName: cert}}",
        ) + &virtual_service(
            "shop",
            "web",
            "{hosts: [tls.example.com, plain.example.com], gateways: [mail], http: [{route: [{destination: {host: web}}]}]}",
        ) + &secret("cert", &["tls.crt", "tls.key"])),
    );
    assert_eq!(
        listeners(&got),
        [
            "0.0.0.0_8080: -> HTTP(http.8080)",
            "0.0.0.0_8443 tls_inspector: tls.example.com -> HTTP(https.443.https.mail.shop) TLS(kubernetes://cert h2,http/1.1)",
        ]
    );
    assert_eq!(
        tables(&got),
        [
            "http.8080",
            &format!("plain.example.com:80 [plain.example.com] {WEB}"),
            &format!("tls.example.com:80 [tls.example.com] redirects {WEB}"),
            "https.443.https.mail.shop",
            &format!("tls.example.com:443 [tls.example.com] {WEB}"),
        ]
    );
    let names: Vec<_> = got.secrets.iter().map(|secret| secret.name.as_str()).collect();
    assert_eq!(names, ["kubernetes://cert"]);
    assert_eq!(got.findings, Vec::<String>::new());
}

#[test]
fn a_gateway_without_routes_answers_404() {
    let got = compiled(&gateway("shop", "g", "{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}"));
    assert_eq!(listeners(&got), ["0.0.0.0_8080: -> HTTP(http.8080)"]);
    assert_eq!(tables(&got), ["http.8080", "blackhole:80 [*]"]);
}

#[test]
fn a_redirect_needs_no_route() {
    let got = compiled(&gateway(
        "shop",
        "g",
        "{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*.example.com'], tls: {httpsRedirect: true}}",
    ));
    assert_eq!(tables(&got), ["http.8080", "*.example.com:80 [*.example.com] redirects"]);
}

fn tls_server(name: &str, hosts: &str, tls: &str) -> String {
    format!("{{port: {{number: 443, name: {name}, protocol: HTTPS}}, hosts: [{hosts}], tls: {{{tls}}}}}")
}

#[test]
fn tls_modes() {
    let servers = [
        tls_server(
            "mutual",
            "admin.example.com",
            "mode: MUTUAL, credentialName: admin, minProtocolVersion: TLSV1_3, subjectAltNames: [ops.example.com]",
        ),
        tls_server(
            "optional",
            "'*.opt.example.com'",
            "mode: OPTIONAL_MUTUAL, credentialName: admin, cipherSuites: [ECDHE-ECDSA-AES128-GCM-SHA256]",
        ),
        tls_server("mesh", "mesh.example.com", "mode: ISTIO_MUTUAL"),
        tls_server("absent", "absent.example.com", "mode: SIMPLE, credentialName: no-such-secret"),
    ];
    let got = compiled(
        &(gateway("istio-system", "modes", &servers.join(", ")) + &secret("admin", &["tls.crt", "tls.key", "ca.crt"])),
    );
    let prefix = "0.0.0.0_8443 tls_inspector:";
    assert_eq!(
        listeners(&got),
        [
            format!(
                "{prefix} admin.example.com -> HTTP(https.443.mutual.modes.istio-system) TLS(kubernetes://admin requires=kubernetes://admin-cacert san=ops.example.com 4..0 0 suites h2,http/1.1)"
            ),
            format!(
                "{prefix} *.opt.example.com -> HTTP(https.443.optional.modes.istio-system) TLS(kubernetes://admin accepts=kubernetes://admin-cacert 0..0 1 suites h2,http/1.1)"
            ),
            // Unlike Istio: the identity must be of the mesh's trust domains.
            format!(
                "{prefix} mesh.example.com -> HTTP(https.443.mesh.modes.istio-system) TLS(default requires=ROOTCA san=spiffe://cluster.local/* h2,http/1.1)"
            ),
            format!(
                "{prefix} absent.example.com -> HTTP(https.443.absent.modes.istio-system) TLS(kubernetes://no-such-secret h2,http/1.1)"
            ),
        ]
    );
    let names: Vec<_> = got.secrets.iter().map(|secret| secret.name.as_str()).collect();
    assert_eq!(names, ["kubernetes://admin", "kubernetes://admin-cacert"]);
    assert!(
        got.findings.iter().any(|finding| finding.contains("there is no Secret istio-system/no-such-secret")),
        "{:?}",
        got.findings
    );
}

/// `tlsDefaults` of the mesh; a server's own words go over them, and the mesh's own TLS knows nothing of them.
#[test]
fn defaults_of_the_mesh_hold_where_a_server_says_nothing() {
    let servers = [
        tls_server("silent", "a.com", "mode: SIMPLE, credentialName: c"),
        tls_server(
            "own",
            "b.com",
            "mode: SIMPLE, credentialName: c, minProtocolVersion: TLSV1_2, cipherSuites: [ECDHE-ECDSA-AES128-GCM-SHA256]",
        ),
        tls_server("mesh", "c.com", "mode: ISTIO_MUTUAL"),
    ];
    let got = compiled(
        &(TLS_DEFAULTS.to_owned() + &gateway("shop", "g", &servers.join(", ")) + &secret("c", &["tls.crt", "tls.key"])),
    );
    let prefix = "0.0.0.0_8443 tls_inspector:";
    assert_eq!(
        listeners(&got),
        [
            format!(
                "{prefix} a.com -> HTTP(https.443.silent.g.shop) TLS(kubernetes://c 4..0 2 suites P-384 h2,http/1.1)"
            ),
            format!("{prefix} b.com -> HTTP(https.443.own.g.shop) TLS(kubernetes://c 3..0 1 suites P-384 h2,http/1.1)"),
            format!(
                "{prefix} c.com -> HTTP(https.443.mesh.g.shop) TLS(default requires=ROOTCA san=spiffe://cluster.local/* h2,http/1.1)"
            ),
        ]
    );
}

const TLS_DEFAULTS: &str = "---
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: mesh, namespace: istio-system}
spec:
  meshConfig:
    tlsDefaults:
      minProtocolVersion: TLSV1_3
      cipherSuites: [ECDHE-ECDSA-AES256-GCM-SHA384, ECDHE-RSA-AES256-GCM-SHA384]
      ecdhCurves: [P-384]
";

#[test]
fn revoked_client_certificates_are_sent_along() {
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type;
    let server = tls_server("m", "a.com", "mode: MUTUAL, credentialName: a");
    let yaml = gateway("shop", "g", &server)
        + &secret("a", &["tls.crt", "tls.key"])
        + &secret("a-cacert", &["ca.crt", "ca.crl"]);
    let got = compiled(&yaml);
    let Some(Type::ValidationContext(context)) = &got.secrets[1].r#type else { panic!("no roots") };
    assert!(context.trusted_ca.is_some() && context.crl.is_some());
}

#[test]
fn secrets_are_of_the_gateways_own_namespace() {
    let yaml = gateway("shop", "g", &tls_server("a", "a.com", "mode: SIMPLE, credentialName: cert"))
        + &secret("cert", &["tls.crt", "tls.key"]).replace("namespace: istio-system", "namespace: shop");
    let got = compiled(&yaml);
    assert!(got.secrets.is_empty());
    assert!(got.findings[0].contains("there is no Secret istio-system/cert"), "{:?}", got.findings);
    let mut foreign =
        gateway("shop", "g", &tls_server("a", "a.com", "mode: SIMPLE, credentialName: 'kubernetes://shop/cert'"));
    foreign += &secret("cert", &["tls.crt", "tls.key"]).replace("namespace: istio-system", "namespace: shop");
    assert!(compiled(&foreign).secrets.is_empty());
}

#[test]
fn bytes_and_passed_on_tls() {
    let got = compiled(
        &(gateway(
            "istio-system",
            "modes",
            "{port: {number: 443, name: pass, protocol: TLS}, hosts: [pass.example.com], tls: {mode: PASSTHROUGH}}, \
             {port: {number: 9000, name: tcp, protocol: TCP}, hosts: ['*']}, \
             {port: {number: 9001, name: nowhere, protocol: TCP}, hosts: ['*']}",
        ) + &virtual_service(
            "shop",
            "raw",
            "{hosts: ['*'], gateways: [istio-system/modes], tcp: [{match: [{port: 9000}], route: [\
             {destination: {host: echo, port: {number: 9000}}, weight: 80}, {destination: {host: web}, weight: 20}]}]}",
        ) + &virtual_service(
            "shop",
            "pass",
            "{hosts: [pass.example.com], gateways: [istio-system/modes], tls: [{match: [{port: 443, sniHosts: [pass.example.com]}], \
             route: [{destination: {host: echo, port: {number: 8443}}}]}]}",
        )),
    );
    assert_eq!(
        listeners(&got),
        [
            "0.0.0.0_8443 tls_inspector: pass.example.com -> TCP(outbound|8443||echo.shop.svc.cluster.local)",
            &format!("0.0.0.0_9000: -> TCP(raw.shop: 80 outbound|9000||echo.shop.svc.cluster.local, 20 {WEB})"),
        ]
    );
    assert!(got.findings[0].contains("no VirtualService leads anywhere"), "{:?}", got.findings);
}

#[test]
fn virtual_services_are_merged_by_host_and_what_takes_everything_goes_last() {
    let server = "{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}";
    let to = |uri: &str, port: u16| {
        format!(
            "{{match: [{{uri: {{prefix: {uri}}}}}], route: [{{destination: {{host: web.shop.svc.cluster.local, port: {{number: {port}}}}}}}]}}"
        )
    };
    let rest = "{route: [{destination: {host: web.shop.svc.cluster.local, port: {number: 1}}}]}";
    let got = compiled(
        &(gateway("istio-system", "g", server)
            + &virtual_service(
                "istio-system",
                "a",
                &format!("{{hosts: [shop.example.com], gateways: [g], http: [{}, {rest}]}}", to("/reviews", 2)),
            )
            + &virtual_service(
                "shop",
                "b",
                &format!(
                    "{{hosts: [shop.example.com, x.example.com], gateways: [istio-system/g], http: [{}]}}",
                    to("/ratings", 3)
                ),
            )),
    );
    let web = |port: u16| format!("outbound|{port}||web.shop.svc.cluster.local");
    assert_eq!(
        tables(&got),
        [
            "http.8080",
            &format!("shop.example.com:80 [shop.example.com] {} {} {}", web(2), web(3), web(1)),
            &format!("x.example.com:80 [x.example.com] {}", web(3)),
        ]
    );
}

#[test]
fn hosts_and_namespaces_bound_who_may_bind() {
    let route = "http: [{route: [{destination: {host: web.shop.svc.cluster.local}}]}]";
    let vs = |namespace: &str, gateways: &str| {
        virtual_service(namespace, "vs", &format!("{{hosts: [a.example.com], gateways: [{gateways}], {route}}}"))
    };
    let served = |hosts: &str, vs: String| {
        let server = format!("{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: ['{hosts}']}}");
        !tables(&compiled(&(gateway("edge", "g", &server) + &vs)))[1].starts_with("blackhole")
    };
    for (hosts, expect) in [
        ("*", true),
        ("*.example.com", true),
        ("a.example.com", true),
        ("b.example.com", false),
        ("shop/*", true),
        ("*/a.example.com", true),
        ("./*", false),
        ("other/a.example.com", false),
    ] {
        assert_eq!(served(hosts, vs("shop", "edge/g")), expect, "{hosts}");
    }
    // A bare name is of the VirtualService's own namespace.
    assert!(!served("*", vs("shop", "g")));
    assert!(served("./*", vs("edge", "g")));
    let private = vs("shop", "edge/g").replace("spec: {", "spec: {exportTo: ['.'], ");
    assert!(!served("*", private));
}

#[test]
fn servers_that_exclude_each_other() {
    let got = compiled(
        &(gateway(
            "shop",
            "a",
            "{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}, {port: {number: 443, name: one, protocol: HTTPS}, hosts: [a.com], tls: {mode: ISTIO_MUTUAL}}",
        ) + &gateway(
            "shop",
            "b",
            "{port: {number: 80, name: tcp, protocol: TCP}, hosts: ['*']}, {port: {number: 443, name: two, protocol: HTTPS}, hosts: [a.com, b.com], tls: {mode: ISTIO_MUTUAL}}",
        )),
    );
    let names: Vec<_> = listeners(&got).iter().map(|line| line.split(" TLS").next().unwrap().to_owned()).collect();
    assert_eq!(
        names,
        ["0.0.0.0_8080: -> HTTP(http.8080)", "0.0.0.0_8443 tls_inspector: a.com -> HTTP(https.443.one.a.shop)"]
    );
    assert_eq!(got.findings.len(), 2, "{:?}", got.findings);
}

#[test]
fn ports_below_1024_need_a_service() {
    let got = compiled(&gateway("shop", "g", "{port: {number: 81, name: http, protocol: HTTP}, hosts: ['*']}"));
    assert!(got.compiled.listeners.is_empty());
    assert!(got.findings[0].contains("port 81 cannot be opened"), "{:?}", got.findings);
    let got = compiled(&gateway(
        "shop",
        "g",
        "{port: {number: 8081, name: http, protocol: HTTP}, hosts: ['*'], bind: 10.0.0.1}",
    ));
    assert_eq!(listeners(&got), ["10.0.0.1_8081: -> HTTP(http.8081.10.0.0.1)"]);
}

#[test]
fn policies_of_the_gateway_run_there() {
    let yaml = gateway("shop", "g", "{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}")
        + "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: edge, namespace: istio-system}\n\
           spec: {selector: {matchLabels: {istio: ingressgateway}}, action: DENY, rules: [{from: [{source: {remoteIpBlocks: [203.0.113.0/24]}}]}]}\n";
    let snapshot = test_mesh::snapshot(&format!("{SERVICES}{yaml}"));
    let view = test_mesh::view(ProxyKind::Router, "istio-system", &["istio=ingressgateway"]);
    let filters = crate::security::policy_filters(&Context::new(&snapshot, &view), crate::security::Place::Gateway);
    assert_eq!(
        test_mesh::http_filters(&filters.http),
        ["DENY ns[istio-system]-policy[edge]-rule[0]: any <- remote=203.0.113.0/24"]
    );
}

#[test]
fn routing_by_claims() {
    let got = compiled(
        &(gateway("shop", "g", "{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}")
            + &virtual_service(
                "shop",
                "vs",
                "{hosts: ['*'], gateways: [g], http: [{match: [{headers: {'@request.auth.claims.groups': {exact: admins}}, \
                 withoutHeaders: {'@request.auth.claims[org][name]': {exact: x}}}], route: [{destination: {host: web}}]}]}",
            )),
    );
    let of = got.compiled.routes[0].virtual_hosts[0].routes[0].r#match.as_ref().unwrap();
    assert!(of.headers.is_empty());
    let inverted: Vec<_> = of.dynamic_metadata.iter().map(|matcher| (matcher.path.len(), matcher.invert)).collect();
    assert_eq!(inverted, [(2, false), (3, true)]);
}

#[test]
fn a_server_shows_two_certificates_and_names_of_clients_go_to_the_first() {
    let server = tls_server("both", "both.example.com", "mode: MUTUAL, credentialNames: [rsa, ecdsa, more]");
    let secrets = ["rsa", "ecdsa", "more"].map(|name| secret(name, &["tls.crt", "tls.key", "ca.crt"])).concat();
    let got = compiled(&(gateway("shop", "g", &server) + &secrets));
    let all = listeners(&got);
    assert!(all[0].contains("kubernetes://rsa kubernetes://ecdsa") && !all[0].contains("more"), "{all:?}");
    assert!(all[0].contains("kubernetes://rsa-cacert"), "{all:?}");
}

/// The port that a redirect writes into its location.
fn redirected(port: u16, redirect: &str) -> u32 {
    let got = compiled(
        &(gateway("shop", "g", &format!("{{port: {{number: {port}, name: http, protocol: HTTP}}, hosts: ['*']}}"))
            + &virtual_service(
                "shop",
                "vs",
                &format!("{{hosts: ['*'], gateways: [g], http: [{{redirect: {redirect}}}]}}"),
            )),
    );
    match &got.compiled.routes[0].virtual_hosts[0].routes[0].action {
        Some(route::Action::Redirect(redirect)) => redirect.port_redirect,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_redirect_derives_its_port() {
    assert_eq!(redirected(8080, "{derivePort: FROM_REQUEST_PORT}"), 8080);
    assert_eq!(redirected(80, "{derivePort: FROM_REQUEST_PORT}"), 0, "the scheme's own port is not written");
    assert_eq!(redirected(80, "{scheme: https, derivePort: FROM_REQUEST_PORT}"), 80);
    assert_eq!(redirected(8080, "{scheme: https, derivePort: FROM_PROTOCOL_DEFAULT}"), 0);
    assert_eq!(redirected(8080, "{port: 8443}"), 8443);
}

#[test]
fn rules_of_a_gateways_own_namespace_and_http1_to_unnamed_ports() {
    let more = "---\napiVersion: v1\nkind: Service\nmetadata: {name: any, namespace: shop}\nspec: {clusterIP: 10.96.0.7, selector: {app: any}, ports: [{port: 9001}]}\n";
    let rule = |namespace: &str, simple: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: r, namespace: {namespace}}}\nspec: {{host: web.shop.svc.cluster.local, trafficPolicy: {{loadBalancer: {{simple: {simple}}}}}}}\n"
        )
    };
    let clusters = |yaml: &str| {
        let snapshot = test_mesh::snapshot(&format!("{SERVICES}{more}{yaml}"));
        let view = test_mesh::view(ProxyKind::Router, "edge", &["istio=ingressgateway"]);
        crate::compile(&snapshot, &view).clusters
    };
    let balancing = |yaml: &str| clusters(yaml).iter().find(|of| of.name == WEB).unwrap().lb_policy;
    let service = balancing(&rule("shop", "RANDOM"));
    let both = rule("shop", "RANDOM") + &rule("edge", "ROUND_ROBIN");
    assert_ne!(service, balancing(""), "the service's own rule holds");
    assert_eq!(balancing(&both), balancing(&rule("edge", "ROUND_ROBIN")), "the gateway's goes before it");
    assert_ne!(balancing(&both), service);
    let all = clusters("");
    let unnamed = all.iter().find(|of| of.name == "outbound|9001||any.shop.svc.cluster.local").unwrap();
    assert!(unnamed.typed_extension_protocol_options.is_empty(), "HTTP/1.1 with nothing special");
}

#[test]
fn whole_proxies_name_nothing_that_is_not_there_and_come_out_the_same() {
    let servers = [
        "{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}".to_owned(),
        tls_server("https", "a.example.com", "mode: MUTUAL, credentialName: admin"),
        "{port: {number: 443, name: pass, protocol: TLS}, hosts: [pass.example.com], tls: {mode: PASSTHROUGH}}"
            .to_owned(),
        "{port: {number: 9000, name: tcp, protocol: TCP}, hosts: ['*']}".to_owned(),
    ];
    let keys = r#"{"keys":[{"kty":"oct","k":"AQAB"}]}"#;
    let security = |kind: &str, name: &str, spec: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: istio-system}}\nspec: {spec}\n"
        )
    };
    let yaml = [
        SERVICES.to_owned(),
        gateway("istio-system", "g", &servers.join(", ")),
        virtual_service(
            "shop",
            "vs",
            "{hosts: ['*'], gateways: [istio-system/g], http: [{route: [{destination: {host: web}}]}], \
             tcp: [{route: [{destination: {host: echo, port: {number: 9000}}}]}], \
             tls: [{match: [{sniHosts: [pass.example.com]}], route: [{destination: {host: echo, port: {number: 8443}}}]}]}",
        ),
        secret("admin", &["tls.crt", "tls.key", "ca.crt"]),
        security("PeerAuthentication", "strict", "{mtls: {mode: STRICT}}"),
        security("RequestAuthentication", "tokens", &format!("{{jwtRules: [{{issuer: ia, jwks: '{keys}'}}, {{issuer: ib, jwks: '{keys}'}}]}}")),
        (0..7).map(|i| security("AuthorizationPolicy", &format!("p{i}"), "{rules: [{}, {to: [{operation: {ports: ['80']}}]}]}")).collect(),
    ]
    .concat();
    let snapshot = test_mesh::snapshot(&yaml);
    for (kind, namespace, label) in
        [(ProxyKind::Router, "istio-system", "istio=ingressgateway"), (ProxyKind::Sidecar, "shop", "app=echo")]
    {
        let view = test_mesh::view(kind, namespace, &[label]);
        let once = crate::compile(&snapshot, &view);
        let report = crate::check::check(&once);
        assert!(report.broken.is_empty(), "{:?}", report.broken);
        for _ in 0..3 {
            let again = crate::compile(&test_mesh::snapshot(&yaml), &view);
            assert!(once.packed() == again.packed());
        }
    }
}
