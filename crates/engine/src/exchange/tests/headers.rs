//! Headers: edits, those of strangers, who the client is.

use super::*;

#[test]
fn edits_run_from_specific_to_general() {
    let mut one = to("/", "a");
    one.request_headers_to_add = vec![header("x-a", "route", true)];
    one.request_headers_to_remove = vec!["x-gone".to_owned()];
    let mut hosts = host(&["*"], vec![one]);
    hosts.request_headers_to_add = vec![header("x-a", "host", true)];
    hosts.include_request_attempt_count = true;
    let mut http = Http::new(vec![hosts], vec![cluster("a", &[80])]);
    http.table.request_headers_to_add = vec![header("x-a", "table", true)];
    let world = http.build();
    let mut head = get("a", "/");
    head.fields.push("x-gone", b"1");
    let mut call = world.start(head);
    call.attempt();
    assert_eq!(&*call.head.fields.joined("x-a").unwrap(), b"route,host,table");
    assert!(!call.head.fields.contains("x-gone"));
    assert_eq!(call.head.fields.get("x-envoy-attempt-count"), Some(&b"1"[..]));
}

#[test]
fn header_mutations_of_every_level_run_in_order() {
    use envoy_types::pb::envoy::config::common::mutation_rules::v3 as rules;
    use envoy_types::pb::envoy::extensions::filters::http::header_mutation::v3 as mutation;
    let add = |value: &str| mutation::Mutations {
        request_mutations: vec![rules::HeaderMutation {
            action: Some(rules::header_mutation::Action::Append(header("x", value, true))),
        }],
        response_mutations: vec![rules::HeaderMutation {
            action: Some(rules::header_mutation::Action::Append(header("y", value, true))),
        }],
        ..Default::default()
    };
    let per_route = |value: &str| pack(&mutation::HeaderMutationPerRoute { mutations: Some(add(value)) });
    for (wins, expect) in [(false, ["own", "route", "host", "table"]), (true, ["own", "table", "host", "route"])] {
        let mut one = to("/", "a");
        one.typed_per_filter_config.insert("mutation".to_owned(), per_route("route"));
        let mut hosts = host(&["*"], vec![one]);
        hosts.typed_per_filter_config.insert("mutation".to_owned(), per_route("host"));
        let mut http = Http::new(vec![hosts], vec![cluster("a", &[1])]);
        http.table.typed_per_filter_config.insert("mutation".to_owned(), per_route("table"));
        let own = mutation::HeaderMutation { mutations: Some(add("own")), most_specific_header_mutations_wins: wins };
        let world = http.filter("mutation", pack(&own)).build();
        let mut call = world.start(get("a", "/"));
        drop(call.attempt());
        let seen: Vec<_> = call.head.fields.get_all("x").collect();
        assert_eq!(seen, expect.map(str::as_bytes));
        let response = call.upstream(ResponseHead::new(200));
        assert_eq!(response.fields.get_all("y").collect::<Vec<_>>(), expect.map(str::as_bytes));
    }
}

#[test]
fn control_headers_of_strangers_are_removed() {
    let mut http = Http::simple();
    http.hcm.use_remote_address = yes();
    let world = http.build();
    let mut head = get("a", "/");
    for name in [
        "x-envoy-retry-on",
        "x-envoy-max-retries",
        "x-envoy-upstream-rq-timeout-ms",
        "x-envoy-decorator-operation",
        "x-envoy-internal",
        "x-envoy-original-path",
        "x-forwarded-client-cert",
    ] {
        head.fields.push(name, b"evil");
    }
    head.fields.push("x-request-id", b"mine");
    head.fields.push("x-forwarded-proto", b"https");
    head.fields.push("x-forwarded-for", b"1.1.1.1");
    let mut call = world.start(head);
    call.attempt();
    let evil = call.head.fields.iter().any(|(_, value)| value == b"evil");
    assert!(!evil, "{:?}", call.head);
    assert_ne!(call.head.fields.get("x-request-id"), Some(&b"mine"[..]));
    assert_eq!(call.head.fields.get("x-forwarded-proto"), Some(&b"http"[..]));
    assert_eq!(call.head.fields.get("x-forwarded-for"), Some(&b"1.1.1.1,192.0.2.7"[..]));
    assert_eq!(call.head.fields.get("x-envoy-external-address"), Some(&b"192.0.2.7"[..]));
    assert_eq!(call.exchange.info().client_address.unwrap().ip().to_string(), "192.0.2.7");
}

const STEERS: [&str; 4] = [
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-retry-on",
    "x-envoy-max-retries",
];

#[test]
fn internal_callers_steer_time_outs_and_retries() {
    use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::InternalAddressConfig;
    let range = |prefix: &str| core::CidrRange { address_prefix: prefix.to_owned(), prefix_len: number(24) };
    for (inside, expect) in [(true, 3), (false, 1)] {
        let mut http = Http::simple();
        http.hcm.use_remote_address = yes();
        let ranges = vec![range(if inside { "192.0.2.0" } else { "10.9.9.0" })];
        http.hcm.internal_address_config = Some(InternalAddressConfig { cidr_ranges: ranges, ..Default::default() });
        let world = http.build();
        let mut head = get("a", "/");
        for (name, value) in [
            ("x-envoy-upstream-rq-timeout-ms", "1500"),
            ("x-envoy-upstream-rq-per-try-timeout-ms", "700"),
            ("x-envoy-retry-on", "5xx"),
            ("x-envoy-max-retries", "2"),
        ] {
            head.fields.push(name, value.as_bytes());
        }
        let mut call = world.start(head);
        let attempt = call.attempt();
        assert_eq!(attempt.per_try_timeout, inside.then_some(Duration::from_millis(700)));
        let left: Vec<_> = call.head.fields.iter().map(|(name, _)| name).filter(|name| STEERS.contains(name)).collect();
        assert_eq!(left, [""; 0], "they end here");
        let expected = call.head.fields.get_str("x-envoy-expected-rq-timeout-ms");
        assert_eq!(expected, inside.then_some("700"));
        drop(attempt);
        let mut attempts = 1;
        loop {
            call.upstream(ResponseHead::new(500));
            match call.step() {
                Step::Wait(wait) => {
                    call.pass(wait);
                    call.elapsed();
                    drop(call.attempt());
                    attempts += 1;
                }
                _ => break,
            }
        }
        assert_eq!(attempts, expect);
    }
}

#[test]
fn trusted_hops_count_from_the_right() {
    let mut http = Http::simple();
    http.hcm.use_remote_address = yes();
    http.hcm.xff_num_trusted_hops = 1;
    let world = http.build();
    let mut head = get("a", "/");
    head.fields.push("x-forwarded-for", b"1.1.1.1, 2.2.2.2");
    head.fields.push("x-forwarded-proto", b"https");
    let call = world.start(head);
    assert_eq!(call.exchange.info().client_address.unwrap().ip().to_string(), "2.2.2.2");
    assert_eq!(call.head.fields.get("x-forwarded-proto"), Some(&b"https"[..]));
}

#[test]
fn client_certificates_are_told_by_us_alone() {
    use crate::facts::{PeerCertificate, TlsFacts};
    let mut http = Http::simple();
    http.hcm.forward_client_cert_details = 2;
    http.hcm.set_current_client_cert_details =
        Some(envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::SetCurrentClientCertDetails {
            subject: yes(),
            uri: true,
            dns: true,
            ..Default::default()
        });
    let mut world = http.build();
    let mut head = get("a", "/");
    head.fields.push("x-forwarded-client-cert", b"By=x");
    let call = world.start(head.clone());
    assert!(!call.head.fields.contains("x-forwarded-client-cert"), "plaintext proves nothing");
    drop(call);
    let mut conn = (*world.conn).clone();
    conn.tls = Some(Arc::new(TlsFacts {
        local_uri_san: Some("spiffe://td/ns/b/sa/b".into()),
        peer: Some(PeerCertificate {
            uri_sans: vec!["spiffe://td/ns/a/sa/a".into()],
            sha256: "abcd".into(),
            ..Default::default()
        }),
        ..Default::default()
    }));
    world.conn = Arc::new(conn);
    let call = world.start(head);
    let expect = "By=x,By=spiffe://td/ns/b/sa/b;Hash=abcd;Subject=\"\";URI=spiffe://td/ns/a/sa/a";
    assert_eq!(call.head.fields.get_str("x-forwarded-client-cert"), Some(expect));
    assert_eq!(call.head.fields.get("x-forwarded-proto"), Some(&b"https"[..]));
}

#[test]
fn what_becomes_of_xfcc() {
    use crate::facts::{PeerCertificate, TlsFacts};
    use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::SetCurrentClientCertDetails;
    let check = |mode: i32, mutual: bool, expect: Option<&str>| {
        let mut http = Http::simple();
        http.hcm.forward_client_cert_details = mode;
        http.hcm.set_current_client_cert_details =
            Some(SetCurrentClientCertDetails { cert: true, chain: true, uri: true, ..Default::default() });
        let mut world = http.build();
        if mutual {
            let mut conn = (*world.conn).clone();
            conn.tls = Some(Arc::new(TlsFacts {
                peer: Some(PeerCertificate {
                    uri_sans: vec!["u".into()],
                    sha256: "h".into(),
                    url_encoded_pem: "leaf".into(),
                    url_encoded_chain: "leafroot".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }));
            world.conn = Arc::new(conn);
        }
        let mut head = get("a", "/");
        head.fields.push("x-forwarded-client-cert", b"Hash=1");
        let call = world.start(head);
        assert_eq!(call.head.fields.get_str("x-forwarded-client-cert"), expect, "{mode} {mutual}");
    };
    let ours = "Hash=h;Cert=\"leaf\";Chain=\"leafroot\";URI=u";
    let both = format!("Hash=1,{ours}");
    for (mode, plain, mutual) in [
        (0, None, None),
        (1, None, Some("Hash=1")),
        (2, None, Some(both.as_str())),
        (3, None, Some(ours)),
        (4, Some("Hash=1"), Some("Hash=1")),
    ] {
        check(mode, false, plain);
        check(mode, true, mutual);
    }
}

#[test]
fn names_with_underscores() {
    use envoy_types::pb::envoy::config::core::v3::HttpProtocolOptions;
    let world = |action: i32| {
        let mut http = Http::simple();
        http.hcm.common_http_protocol_options =
            Some(HttpProtocolOptions { headers_with_underscores_action: action, ..Default::default() });
        http.build()
    };
    let mut head = get("a", "/");
    head.fields.push("x_y", b"1");
    assert!(world(0).start(head.clone()).head.fields.contains("x_y"));
    assert_eq!(world(1).start(head.clone()).reply().head.status, 400);
    assert!(!world(2).start(head).head.fields.contains("x_y"));
}

#[test]
fn peers_exchange_who_they_are() {
    use proto::filters::peer_metadata as pm;
    let discovery = pm::config::DiscoveryMethod {
        method_specifier: Some(pm::config::discovery_method::MethodSpecifier::IstioHeaders(
            pm::config::IstioHeaders::default(),
        )),
    };
    let propagation = pm::config::PropagationMethod {
        method_specifier: Some(pm::config::propagation_method::MethodSpecifier::IstioHeaders(
            pm::config::IstioHeaders::default(),
        )),
    };
    let config = pm::Config {
        downstream_discovery: vec![discovery],
        downstream_propagation: vec![propagation],
        upstream_discovery: vec![discovery],
        upstream_propagation: vec![propagation],
        ..Default::default()
    };
    let mut http = Http::simple().filter("istio.metadata_exchange", pack(&config));
    http.node = NodeFacts { id: "me".into(), peer_metadata: "bWU=".into() };
    let world = http.build();
    let mut head = get("a", "/");
    head.fields.push("x-envoy-peer-metadata", b"client");
    head.fields.push("x-envoy-peer-metadata-id", b"client-id");
    let mut call = world.start(head);
    drop(call.attempt());
    assert_eq!(call.head.fields.get("x-envoy-peer-metadata"), Some(&b"bWU="[..]));
    let mut answer = ResponseHead::new(200);
    answer.fields.push("x-envoy-peer-metadata", b"server");
    let response = call.upstream(answer);
    assert_eq!(response.fields.get("x-envoy-peer-metadata"), Some(&b"bWU="[..]));
    assert_eq!(call.exchange.info().downstream_peer.as_deref(), Some(&b"client"[..]));
    assert_eq!(call.exchange.info().upstream_peer.as_deref(), Some(&b"server"[..]));
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    let response = call.upstream(ResponseHead::new(200));
    assert!(!response.fields.contains("x-envoy-peer-metadata"), "who does not ask is not told");
}

#[test]
fn a_request_over_tls_says_its_protocol() {
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
    use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
    use envoy_types::pb::envoy::extensions::upstreams::http::v3::{
        HttpProtocolOptions, http_protocol_options as options,
    };
    let offered = |alpn: &[&str], upstream: options::UpstreamProtocolOptions| {
        let context = tls::UpstreamTlsContext {
            common_tls_context: Some(tls::CommonTlsContext {
                alpn_protocols: alpn.iter().map(|name| (*name).to_owned()).collect(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let http = HttpProtocolOptions { upstream_protocol_options: Some(upstream), ..Default::default() };
        let mut to_tls = cluster("a", &[8001]);
        to_tls.transport_socket = Some(core::TransportSocket {
            name: "tls".to_owned(),
            config_type: Some(core::transport_socket::ConfigType::TypedConfig(pack(&context))),
        });
        to_tls.typed_extension_protocol_options =
            [("envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned(), pack(&http))].into();
        let world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![to_tls]).build();
        let mut call = world.start(get("a", "/"));
        let attempt = call.attempt();
        attempt.alpn.list(&attempt.transport).join(",")
    };
    let explicit = |config| {
        options::UpstreamProtocolOptions::ExplicitHttpConfig(options::ExplicitHttpConfig {
            protocol_config: Some(config),
        })
    };
    let http1 = || explicit(ProtocolConfig::HttpProtocolOptions(core::Http1ProtocolOptions::default()));
    let http2 = || explicit(ProtocolConfig::Http2ProtocolOptions(core::Http2ProtocolOptions::default()));
    let auto = options::UpstreamProtocolOptions::AutoConfig(options::AutoHttpConfig::default());
    assert_eq!(offered(&[], http1()), "http/1.1");
    assert_eq!(offered(&[], http2()), "h2");
    assert_eq!(offered(&[], auto), "h2,http/1.1");
    assert_eq!(offered(&["own"], http2()), "own");
}
