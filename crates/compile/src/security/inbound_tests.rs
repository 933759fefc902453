use super::*;
use crate::security::test_mesh;
use crate::view::ProxyKind;

const SERVICE: &str = r"
apiVersion: v1
kind: Service
metadata: {name: mixed, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: mixed}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: http-again, port: 88, targetPort: 8080}
  - {name: tcp-db, port: 9001}
  - {name: something, port: 8002}
  - {name: grpc, port: 7071}
  - {name: https, port: 8443}
";

fn chains(policies: &str) -> (Vec<String>, Listener) {
    let snapshot = test_mesh::snapshot(&format!("{SERVICE}{policies}"));
    let view = test_mesh::view(ProxyKind::Sidecar, "shop", &["app=mixed"]);
    let context = Context::new(&snapshot, &view);
    let listener = listener(&context);
    (listener.filter_chains.iter().map(test_mesh::chain).collect(), listener)
}

fn peer_authentication(namespace: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

/// Chains of one port, without the TLS details, and the listener filters.
fn check(mode: &str, port: u16, expect: &[&str]) {
    let (chains, _) = chains(&peer_authentication("istio-system", &format!("{{mtls: {{mode: {mode}}}}}")));
    let of_port: Vec<String> = chains
        .iter()
        .filter(|chain| chain.contains(&format!(" :{port} ")))
        .map(|chain| {
            let (head, tls) = chain.split_once(" TLS(").map_or((chain.as_str(), ""), |(head, _)| (head, " TLS"));
            let head = head.replace(&format!("0.0.0.0_{port} :{port} "), "");
            let head = head.split('(').next().unwrap();
            format!("{head}{tls}")
        })
        .collect();
    assert_eq!(of_port, expect, "{mode} {port}");
}

// `docs/parity.md`, Security 7.2

#[test]
fn permissive() {
    let any = "tls[istio,istio-peer-exchange,istio-http/1.0,istio-http/1.1,istio-h2]";
    check("PERMISSIVE", 8080, &[&format!("{any} -> HTTP TLS"), "raw_buffer -> HTTP"]);
    check("PERMISSIVE", 7071, &[&format!("{any} -> HTTP TLS"), "raw_buffer -> HTTP"]);
    let tcp = [&*format!("{any} -> TCP TLS"), "tls -> TCP", "raw_buffer -> TCP"];
    check("PERMISSIVE", 9001, &tcp);
    check("PERMISSIVE", 8443, &tcp);
    check(
        "PERMISSIVE",
        8002,
        &[
            "tls[istio-http/1.0,istio-http/1.1,istio-h2] -> HTTP TLS",
            "raw_buffer[http/1.1,h2c] -> HTTP",
            "tls[istio-peer-exchange,istio] -> TCP TLS",
            "raw_buffer -> TCP",
            "tls -> TCP",
        ],
    );
}

#[test]
fn strict_takes_nothing_but_tls() {
    for (port, expect) in [
        (8080, &["tls -> HTTP TLS"][..]),
        (7071, &["tls -> HTTP TLS"]),
        (9001, &["tls -> TCP TLS"]),
        (8443, &["tls -> TCP TLS"]),
        (8002, &["tls[istio-http/1.0,istio-http/1.1,istio-h2] -> HTTP TLS", "tls -> TCP TLS"]),
    ] {
        check("STRICT", port, expect);
    }
    let (chains, _) = chains(&peer_authentication("istio-system", "{mtls: {mode: STRICT}}"));
    for chain in chains.iter().filter(|chain| !chain.starts_with("virtualInbound-blackhole")) {
        assert!(
            chain.contains(" tls") && chain.contains("TLS(default requires=ROOTCA san=spiffe://cluster.local/*"),
            "{chain}"
        );
    }
}

#[test]
fn who_cannot_exchange_metadata_does_not_offer_to() {
    let snapshot =
        test_mesh::snapshot(&format!("{SERVICE}{}", peer_authentication("istio-system", "{mtls: {mode: STRICT}}")));
    let mut view = test_mesh::view(ProxyKind::Sidecar, "shop", &["app=mixed"]);
    view.capabilities = crate::view::Capabilities::NONE;
    let offered: BTreeSet<String> = listener(&Context::new(&snapshot, &view))
        .filter_chains
        .iter()
        .map(test_mesh::chain)
        .filter_map(|chain| Some(chain.strip_suffix(')')?.rsplit_once(" suites ")?.1.to_owned()))
        .collect();
    assert_eq!(offered, BTreeSet::from(["h2,http/1.1".to_owned(), "istio,h2,http/1.1".to_owned()]));
}

#[test]
fn disable_takes_plaintext() {
    check("DISABLE", 8080, &["raw_buffer -> HTTP"]);
    check("DISABLE", 9001, &["raw_buffer -> TCP"]);
    check("DISABLE", 8002, &["raw_buffer[http/1.1,h2c] -> HTTP", "raw_buffer -> TCP"]);
}

#[test]
fn whole_listener() {
    let (chains, listener) = chains("");
    let tls = |alpn: &str| format!("TLS(default requires=ROOTCA san=spiffe://cluster.local/* 3..4 6 suites {alpn})");
    let http = tls("h2,http/1.1");
    let tcp = tls("istio-peer-exchange,h2,http/1.1");
    let all = chains.iter().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(
        all[..8],
        [
            "virtualInbound-blackhole :15006 -> TCP(BlackHoleCluster)",
            &format!(
                "virtualInbound-catchall-http tls[istio-http/1.0,istio-http/1.1,istio-h2] -> HTTP(InboundPassthroughCluster :0/*) {http}"
            ),
            "virtualInbound-catchall-http raw_buffer[http/1.1,h2c] -> HTTP(InboundPassthroughCluster :0/*)",
            &format!("virtualInbound tls[istio-peer-exchange,istio] -> TCP(InboundPassthroughCluster) {tcp}"),
            "virtualInbound raw_buffer -> TCP(InboundPassthroughCluster)",
            "virtualInbound tls -> TCP(InboundPassthroughCluster)",
            &format!(
                "0.0.0.0_7071 :7071 tls[istio,istio-peer-exchange,istio-http/1.0,istio-http/1.1,istio-h2] -> HTTP(inbound|7071|| mixed.shop.svc.cluster.local:7071/*) {http}"
            ),
            "0.0.0.0_7071 :7071 raw_buffer -> HTTP(inbound|7071|| mixed.shop.svc.cluster.local:7071/*)",
        ]
    );
    // Two service ports with one target port: the first one names it.
    assert!(
        all.contains(&"0.0.0.0_8080 :8080 raw_buffer -> HTTP(inbound|8080|| mixed.shop.svc.cluster.local:80/*)"),
        "{all:#?}"
    );
    let ports: Vec<_> = all[6..].iter().map(|chain| chain.split_whitespace().nth(1).unwrap()).collect();
    assert_eq!(
        ports,
        [
            ":7071", ":7071", ":8002", ":8002", ":8002", ":8002", ":8002", ":8080", ":8080", ":8443", ":8443", ":8443",
            ":9001", ":9001", ":9001"
        ]
    );
    assert_eq!(
        inspectors(&listener),
        ["original_dst", "tls_inspector but 15006", "http_inspector but 7071 8080 8443 9001 15006",]
    );
}

fn inspectors(listener: &Listener) -> Vec<String> {
    let range = |of: &ListenerFilterChainMatchPredicate| match of.rule.as_ref().unwrap() {
        predicate::Rule::DestinationPortRange(range) => {
            assert_eq!(range.end, range.start + 1);
            range.start.to_string()
        }
        other => panic!("{other:?}"),
    };
    let mut out = Vec::new();
    for filter in &listener.listener_filters {
        let name = filter.name.rsplit('.').next().unwrap();
        let but = match &filter.filter_disabled {
            None => String::new(),
            Some(of) => match of.rule.as_ref().unwrap() {
                predicate::Rule::OrMatch(set) => {
                    format!(" but {}", set.rules.iter().map(range).collect::<Vec<_>>().join(" "))
                }
                _ => format!(" but {}", range(of)),
            },
        };
        out.push(format!("{name}{but}"));
    }
    out
}

#[test]
fn inspectors_run_only_where_needed() {
    let (_, listener) = chains(&peer_authentication("istio-system", "{mtls: {mode: STRICT}}"));
    assert_eq!(inspectors(&listener), ["original_dst", "tls_inspector but 15006"]);
    let (_, listener) = chains(&peer_authentication("istio-system", "{mtls: {mode: DISABLE}}"));
    assert_eq!(inspectors(&listener), ["original_dst", "http_inspector but 7071 8080 8443 9001 15006"]);
}

// `docs/parity.md`, Security 7.1

#[test]
fn ports_have_modes_of_their_own() {
    let policy = peer_authentication(
        "shop",
        "{selector: {matchLabels: {app: mixed}}, portLevelMtls: {8080: {mode: STRICT}, 8002: {mode: DISABLE}, 7777: {mode: STRICT}}}",
    );
    let (chains, listener) = chains(&policy);
    let short: Vec<_> = chains.iter().map(|chain| chain.split(" ->").next().unwrap()).collect();
    assert_eq!(
        short[6..8],
        ["virtualInbound-catchall-http :7777 tls[istio-http/1.0,istio-http/1.1,istio-h2]", "virtualInbound :7777 tls",]
    );
    let of = |port: &str| short.iter().filter(|chain| chain.contains(port)).copied().collect::<Vec<_>>();
    assert_eq!(of(":8080"), ["0.0.0.0_8080 :8080 tls"]);
    assert_eq!(of(":8002"), ["0.0.0.0_8002 :8002 raw_buffer[http/1.1,h2c]", "0.0.0.0_8002 :8002 raw_buffer"]);
    assert_eq!(
        inspectors(&listener),
        ["original_dst", "tls_inspector but 8002 15006", "http_inspector but 7071 7777 8080 8443 9001 15006",]
    );
}

#[test]
fn a_strict_port_beside_a_disabled_rest_keeps_other_tls_opaque() {
    let (chains, _) = chains(&peer_authentication(
        "shop",
        "{selector: {matchLabels: {app: mixed}}, mtls: {mode: DISABLE}, portLevelMtls: {8080: {mode: STRICT}}}",
    ));
    let catch_all: Vec<_> =
        chains.iter().filter(|chain| chain.starts_with("virtualInbound")).map(String::as_str).collect();
    assert_eq!(
        catch_all[1..],
        [
            "virtualInbound-catchall-http raw_buffer[http/1.1,h2c] -> HTTP(InboundPassthroughCluster :0/*)",
            "virtualInbound raw_buffer -> TCP(InboundPassthroughCluster)",
            "virtualInbound tls -> TCP(InboundPassthroughCluster)",
        ]
    );
}

#[test]
fn policies_stand_in_every_chain_but_the_black_hole() {
    let (chains, _) = chains(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: nothing, namespace: shop}\nspec: {}\n",
    );
    for chain in &chains {
        let has = chain.contains(" rbac");
        let relays = chain.contains(" TCP(") && !chain.contains("BlackHole");
        assert_eq!(has, relays, "{chain}");
    }
}

#[test]
fn ingress_of_a_sidecar_replaces_the_services_ports() {
    let (chains, _) = chains(
        r"
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: own, namespace: shop}
spec:
  workloadSelector: {labels: {app: mixed}}
  ingress:
  - port: {number: 9001, protocol: TCP, name: tcp}
    defaultEndpoint: 127.0.0.1:19000
  - port: {number: 8085, protocol: HTTP, name: http}
    defaultEndpoint: 127.0.0.1:8086
  egress:
  - hosts: ['./*']
",
    );
    let short: Vec<_> = chains[6..].iter().map(|chain| chain.split(" TLS(").next().unwrap()).collect();
    let any = "tls[istio,istio-peer-exchange,istio-http/1.0,istio-http/1.1,istio-h2]";
    assert_eq!(
        short,
        [
            &format!("10.0.0.1_8085 :8085 {any} -> HTTP(inbound|8085|| own.shop:8085/*)"),
            "10.0.0.1_8085 :8085 raw_buffer -> HTTP(inbound|8085|| own.shop:8085/*)",
            &format!("10.0.0.1_9001 :9001 {any} -> TCP(inbound|9001||)"),
            "10.0.0.1_9001 :9001 tls -> TCP(inbound|9001||)",
            "10.0.0.1_9001 :9001 raw_buffer -> TCP(inbound|9001||)",
        ]
    );
}

#[test]
fn what_an_application_was_never_sent_is_tried_again_unless_it_is_grpc() {
    let retries = |is_grpc: bool| {
        let target = Target { is_grpc, ..Target::passthrough(Some(80), MtlsMode::Permissive) };
        let Some(route::Action::Route(action)) = table(&target).virtual_hosts[0].routes[0].action.clone() else {
            panic!("a route")
        };
        action.retry_policy.map(|policy| (policy.retry_on, policy.num_retries.map(|count| count.value)))
    };
    assert_eq!(retries(false), Some(("reset-before-request".to_owned(), Some(2))));
    assert_eq!(retries(true), None);
}
