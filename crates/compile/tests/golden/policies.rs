//! VirtualServices, DestinationRules and Sidecars: which of them hold, and what they make of clusters.
//! Source: `docs/parity.md`, Traffic 2.1, 2.3, 2.7, 3.1, 3.4, 5.3.

use envoy_types::pb::envoy::config::core::v3::TcpKeepalive;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::{HttpProtocolOptions, http_protocol_options as http};

use super::*;

fn found<'a>(resources: &'a Resources, name: &str) -> &'a Cluster {
    resources.clusters.iter().find(|of| of.name == name).unwrap_or_else(|| panic!("no cluster {name}"))
}

fn options(cluster: &Cluster) -> HttpProtocolOptions {
    cluster
        .typed_extension_protocol_options
        .values()
        .next()
        .map_or_else(Default::default, |any| HttpProtocolOptions::decode(any.value.as_slice()).unwrap())
}

/// What connections to a cluster's endpoints speak.
fn speaks(cluster: &Cluster) -> &'static str {
    use http::explicit_http_config::ProtocolConfig;
    match options(cluster).upstream_protocol_options {
        Some(http::UpstreamProtocolOptions::UseDownstreamProtocolConfig(_)) => "as the client",
        Some(http::UpstreamProtocolOptions::ExplicitHttpConfig(config)) => match config.protocol_config {
            Some(ProtocolConfig::Http2ProtocolOptions(_)) => "HTTP/2",
            _ => "HTTP/1.1",
        },
        _ => "HTTP/1.1",
    }
}

const REVIEWS: &str = "outbound|9080||reviews.shop.svc.cluster.local";

fn rule(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n"
    )
}

fn mesh_config(settings: &str) -> String {
    format!(
        "---\napiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nmetadata: {{name: mesh, namespace: istio-system}}\nspec: {{meshConfig: {{{settings}}}}}\n"
    )
}

#[test]
fn hosts_without_a_service_and_destinations_with_routes_of_their_own() {
    let yaml = r"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.8, selector: {app: web}, ports: [{name: http, port: 80}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: nowhere, namespace: shop}
spec: {hosts: [made.up.example], http: [{route: [{destination: {host: ratings, port: {number: 9080}}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: ratings, namespace: shop}
spec: {hosts: [ratings], http: [{directResponse: {status: 410}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec: {hosts: [reviews], http: [{route: [{destination: {host: ratings}}]}]}
";
    check_table(
        yaml,
        "80",
        &expect![[r#"
        table 80
          made.up.example:80 [made.up.example]
            /* -> outbound|9080||ratings.shop.svc.cluster.local timeout=0s retries=2
          ratings.shop.svc.cluster.local:80 [ratings.shop.svc.cluster.local]
            /* -> 410
          reviews.shop.svc.cluster.local:80 [reviews.shop.svc.cluster.local]
            /* -> outbound|80||ratings.shop.svc.cluster.local timeout=0s retries=2
          web.shop.svc.cluster.local:80 [web.shop.svc.cluster.local web.shop.svc.cluster.local. web web.shop.svc web.shop 10.96.0.8]
            /* -> outbound|80||web.shop.svc.cluster.local timeout=0s retries=2
          allow_any [*]
            /* -> PassthroughCluster timeout=0s retries=0
    "#]],
    );
    check_table(
        yaml,
        "9080",
        &expect![[r#"
        table 9080
          ratings.shop.svc.cluster.local:9080 [ratings.shop.svc.cluster.local ratings.shop.svc.cluster.local. ratings ratings.shop.svc ratings.shop 10.96.0.2]
            /* -> 410
          reviews.shop.svc.cluster.local:9080 [reviews.shop.svc.cluster.local reviews.shop.svc.cluster.local. reviews reviews.shop.svc reviews.shop 10.96.0.1]
            /* -> outbound|9080||ratings.shop.svc.cluster.local timeout=0s retries=2
          allow_any [*]
            /* -> PassthroughCluster timeout=0s retries=0
    "#]],
    );
}

#[test]
fn a_delegate_that_is_missing_takes_its_entry_along() {
    let yaml = r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: root, namespace: shop}
spec:
  hosts: [reviews]
  http:
  - {match: [{uri: {prefix: /missing}}], delegate: {name: missing}}
  - {match: [{uri: {prefix: /has-hosts}}], delegate: {name: whole}}
  - {match: [{uri: {prefix: /child}}], delegate: {name: child}}
  - {match: [{uri: {prefix: /rest}}], route: [{destination: {host: reviews}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: whole, namespace: shop}
spec: {hosts: [elsewhere.example], http: [{route: [{destination: {host: ratings}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: child, namespace: shop}
spec:
  http:
  - {match: [{uri: {prefix: /child/flat}}], route: [{destination: {host: ratings}}]}
";
    check_table(
        yaml,
        "9080",
        &expect![[r#"
        table 9080
          ratings.shop.svc.cluster.local:9080 [ratings.shop.svc.cluster.local ratings.shop.svc.cluster.local. ratings ratings.shop.svc ratings.shop 10.96.0.2]
            /* -> outbound|9080||ratings.shop.svc.cluster.local timeout=0s retries=2
          reviews.shop.svc.cluster.local:9080 [reviews.shop.svc.cluster.local reviews.shop.svc.cluster.local. reviews reviews.shop.svc reviews.shop 10.96.0.1]
            /child/flat* -> outbound|9080||ratings.shop.svc.cluster.local timeout=0s retries=2
            /rest* -> outbound|9080||reviews.shop.svc.cluster.local timeout=0s retries=2
          allow_any [*]
            /* -> PassthroughCluster timeout=0s retries=0
    "#]],
    );
}

#[test]
fn a_rule_may_be_for_some_clients_only() {
    let rules = rule("all", "host: reviews, trafficPolicy: {loadBalancer: {simple: RANDOM}}")
        + &rule(
            "some",
            "host: reviews, workloadSelector: {matchLabels: {tier: gold}}, trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}",
        );
    let mesh = snapshot(&rules);
    let balancing = |labels: &[(&str, &str)]| {
        let mut view = client();
        view.labels.extend(labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let resources = compile::compile(&mesh, &view);
        cluster::LbPolicy::try_from(found(&resources, REVIEWS).lb_policy).unwrap()
    };
    assert_eq!(balancing(&[]), cluster::LbPolicy::Random);
    assert_eq!(balancing(&[("tier", "gold")]), cluster::LbPolicy::RoundRobin, "the one that selects goes first");
}

#[test]
fn new_endpoints_may_be_warmed_up() {
    let warms = |balancer: &str| {
        let spec = format!("host: reviews, trafficPolicy: {{loadBalancer: {{{balancer}}}}}");
        let resources = compiled(&rule("reviews", &spec));
        let slow = match found(&resources, REVIEWS).lb_config.clone() {
            Some(cluster::LbConfig::RoundRobinLbConfig(config)) => config.slow_start_config,
            Some(cluster::LbConfig::LeastRequestLbConfig(config)) => config.slow_start_config,
            _ => None,
        };
        slow.map(|slow| {
            let window = slow.slow_start_window.map_or(0, |window| window.seconds);
            let aggression = slow.aggression.map_or(1.0, |aggression| aggression.default_value);
            (window, slow.min_weight_percent.map_or(10.0, |percent| percent.value), aggression)
        })
    };
    let warmup = "warmup: {duration: 30s, minimumPercent: 25, aggression: 2.0}";
    assert_eq!(warms(warmup), Some((30, 25.0, 2.0)));
    assert_eq!(warms(&format!("simple: ROUND_ROBIN, {warmup}")), Some((30, 25.0, 2.0)));
    assert_eq!(warms("warmupDurationSecs: 20s"), Some((20, 10.0, 1.0)), "the older form");
    assert_eq!(warms(&format!("simple: RANDOM, {warmup}")), None);
}

#[test]
fn keep_alive_is_the_meshs_with_the_rules_fields_over_it() {
    let keepalive = |yaml: &str| {
        let resources = compiled(yaml);
        let options = found(&resources, REVIEWS).upstream_connection_options;
        options.and_then(|options| options.tcp_keepalive).map(|of| {
            let TcpKeepalive { keepalive_probes, keepalive_time, keepalive_interval } = of;
            [keepalive_probes, keepalive_time, keepalive_interval].map(|of| of.map(|of| of.value))
        })
    };
    let of_mesh = mesh_config("tcpKeepalive: {probes: 3, time: 10s}");
    let of_rule = |settings: &str| {
        rule(
            "reviews",
            &format!("host: reviews, trafficPolicy: {{connectionPool: {{tcp: {{tcpKeepalive: {settings}}}}}}}"),
        )
    };
    assert_eq!(keepalive(""), None);
    assert_eq!(keepalive(&of_mesh), Some([Some(3), Some(10), None]));
    assert_eq!(keepalive(&of_rule("{}")), Some([None; 3]), "on, with the system's values");
    assert_eq!(keepalive(&(of_mesh + &of_rule("{time: 20s, interval: 5s}"))), Some([Some(3), Some(20), Some(5)]));
}

#[test]
fn which_protocol_upstream_connections_speak() {
    let unnamed = "outbound|9001||echo.other.svc.cluster.local";
    let bytes = "outbound|9000||echo.other.svc.cluster.local";
    let all = |yaml: &str| {
        let resources = compiled(yaml);
        [REVIEWS, unnamed, bytes].map(|name| speaks(found(&resources, name)))
    };
    let pool = |host: &str, settings: &str| {
        rule("one", &format!("host: {host}, trafficPolicy: {{connectionPool: {{http: {{{settings}}}}}}}"))
    };
    assert_eq!(all(""), ["HTTP/1.1", "as the client", "HTTP/1.1"]);
    assert_eq!(all(&pool("reviews", "h2UpgradePolicy: UPGRADE")), ["HTTP/2", "as the client", "HTTP/1.1"]);
    assert_eq!(all(&pool("reviews", "useClientProtocol: true")), ["as the client", "as the client", "HTTP/1.1"]);
    let of_mesh = mesh_config("h2UpgradePolicy: UPGRADE");
    assert_eq!(all(&of_mesh), ["HTTP/2", "as the client", "HTTP/1.1"], "only ports that say HTTP");
    assert_eq!(
        all(&(of_mesh + &pool("reviews", "h2UpgradePolicy: DO_NOT_UPGRADE"))),
        ["HTTP/1.1", "as the client", "HTTP/1.1"]
    );
}

#[test]
fn http2_connections_have_limits_and_are_kept_alive() {
    let pool = "connectionPool: {http: {maxConcurrentStreams: 7, maxRequestsPerConnection: 9, http2KeepAlive: {interval: 10s, timeout: 3s}}}";
    let resources = compiled(&rule(
        "reviews",
        &format!("host: reviews, trafficPolicy: {{{}}}", pool.replace("http: {", "http: {h2UpgradePolicy: UPGRADE, ")),
    ));
    let of = options(found(&resources, REVIEWS));
    let requests = of.common_http_protocol_options.and_then(|common| common.max_requests_per_connection);
    assert_eq!(requests.map(|requests| requests.value), Some(9));
    let Some(http::UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) = of.upstream_protocol_options else {
        panic!()
    };
    let Some(http::explicit_http_config::ProtocolConfig::Http2ProtocolOptions(http2)) = explicit.protocol_config else {
        panic!("it speaks HTTP/2")
    };
    assert_eq!(http2.max_concurrent_streams.map(|streams| streams.value), Some(7));
    let keepalive = http2.connection_keepalive.unwrap();
    assert_eq!((keepalive.interval.unwrap().seconds, keepalive.timeout.unwrap().seconds), (10, 3));
}

#[test]
fn outlier_detection_may_name_the_statuses_that_are_failures() {
    for codes in ["429", "429, 503"] {
        let spec = format!(
            "host: reviews, trafficPolicy: {{outlierDetection: {{outlierDetectionHttpErrorCodes: [{codes}]}}}}"
        );
        let resources = compiled(&rule("reviews", &spec));
        let matcher = options(found(&resources, REVIEWS)).outlier_detection.unwrap().error_matcher.unwrap();
        let lowered =
            resources.packed().iter().find(|of| of.name == REVIEWS && of.type_url == type_urls::CLUSTER).map(|of| {
                let raw = Raw { name: of.name.as_str().into(), body: of.any.clone() };
                lower::apply_clusters(&Table::default(), &[raw], &[]).0
            });
        let table = lowered.unwrap();
        let failures = table.get(REVIEWS).unwrap().outlier.as_ref().unwrap().failures.clone().unwrap();
        assert_eq!(failures.iter().map(u16::to_string).collect::<Vec<_>>().join(", "), codes, "{matcher:?}");
    }
}

#[test]
#[expect(deprecated, reason = "istiod writes names of certificates in the older field")]
fn tls_towards_servers_outside_by_credential_and_by_the_entrys_names() {
    use envoy_types::pb::envoy::config::core::v3::transport_socket;
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{UpstreamTlsContext, common_tls_context};
    let entry = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: api, namespace: shop}
spec:
  hosts: [api.example.com]
  resolution: STATIC
  subjectAltNames: [spiffe://elsewhere/api]
  endpoints: [{address: 192.0.2.1}]
  ports: [{number: 80, name: http, protocol: HTTP}]
";
    // The socket of the client's cluster: its secrets and the names it takes.
    let socket = |selector: &str, tls: &str| {
        let rule = rule("api", &format!("host: api.example.com, {selector}trafficPolicy: {{tls: {{{tls}}}}}"));
        let resources = compiled(&format!("{entry}{rule}"));
        let socket = found(&resources, "outbound|80||api.example.com").transport_socket.clone()?;
        let Some(transport_socket::ConfigType::TypedConfig(any)) = socket.config_type else { panic!("a context") };
        let common = UpstreamTlsContext::decode(any.value.as_slice()).unwrap().common_tls_context.unwrap();
        let Some(common_tls_context::ValidationContextType::CombinedValidationContext(checks)) =
            common.validation_context_type
        else {
            panic!("it verifies")
        };
        let secrets = common.tls_certificate_sds_secret_configs.into_iter();
        let secrets = secrets.chain(checks.validation_context_sds_secret_config.clone()).map(|secret| secret.name);
        let names = &checks.default_validation_context.as_ref().unwrap().match_subject_alt_names;
        Some((secrets.collect::<Vec<_>>(), format!("{names:?}")))
    };
    let selects = "workloadSelector: {matchLabels: {app: client}}, ";
    let mutual = "mode: MUTUAL, credentialName: keys";
    assert_eq!(socket("", mutual), None, "without a selector a sidecar goes on in plaintext");
    let (secrets, names) = socket(selects, mutual).unwrap();
    assert_eq!(secrets, ["kubernetes://keys", "kubernetes://keys-cacert"]);
    assert!(names.contains("spiffe://elsewhere/api"), "{names}");
    let (_, names) = socket("", "mode: SIMPLE").unwrap();
    assert!(names.contains("spiffe://elsewhere/api"), "{names}");
    let (_, names) = socket("", "mode: SIMPLE, subjectAltNames: [other.example]").unwrap();
    assert!(names.contains("other.example") && !names.contains("elsewhere"), "the rule's own win: {names}");
}

/// Connection managers of a listener.
fn managers(resources: &Resources, listener: &str) -> Vec<HttpConnectionManager> {
    let found = resources.listeners.iter().find(|of| of.name == listener).unwrap();
    let filters = found.filter_chains.iter().flat_map(|chain| &chain.filters);
    let configs = filters.filter_map(|of| match &of.config_type {
        Some(filter::ConfigType::TypedConfig(any)) if of.name.ends_with("http_connection_manager") => Some(any),
        _ => None,
    });
    configs.map(|any| HttpConnectionManager::decode(any.value.as_slice()).unwrap()).collect()
}

#[test]
fn a_proxy_writes_the_headers_it_is_told_to() {
    let yaml = r"
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: mesh, namespace: istio-system}
spec: {meshConfig: {defaultConfig: {proxyHeaders: {HEADERS}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec: {hosts: [reviews], http: [{rewrite: {authority: other.example}, route: [{destination: {host: reviews}}]}]}
";
    let told = |headers: &str| {
        let resources = compiled(&yaml.replace("HEADERS", headers));
        let manager = managers(&resources, "0.0.0.0_9080").remove(0);
        let table = resources.routes.iter().find(|of| of.name == "9080").unwrap();
        let host = table.virtual_hosts.iter().find(|of| of.name.starts_with("reviews")).unwrap();
        let Some(route::Action::Route(action)) = &host.routes[0].action else { panic!("a route") };
        let makes_ids = manager.generate_request_id.is_none_or(|makes| makes.value);
        format!(
            "{:?} {} id={makes_ids} port={} attempts={} host={}",
            manager.server_name,
            manager.server_header_transformation().as_str_name(),
            manager.append_x_forwarded_port,
            host.include_request_attempt_count,
            action.append_x_forwarded_host
        )
    };
    let usual = r#""" OVERWRITE id=true port=false attempts=true host=false"#;
    assert_eq!(told(""), usual);
    assert_eq!(told("requestId: {disabled: false}, attemptCount: {disabled: false}"), usual);
    assert_eq!(
        told("server: {disabled: true}, requestId: {disabled: true}, attemptCount: {disabled: true}"),
        r#""" PASS_THROUGH id=false port=false attempts=false host=false"#
    );
    assert_eq!(
        told("server: {value: mine}, xForwardedHost: {enabled: true}, xForwardedPort: {enabled: true}"),
        r#""mine" OVERWRITE id=true port=true attempts=true host=true"#
    );
}

/// `maxConnections` of the clients' clusters and of the server's own.
#[test]
fn a_pool_bounds_the_servers_own_proxy_too_unless_its_sidecar_says_otherwise() {
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: client, namespace: shop}\nspec: {clusterIP: 10.96.0.8, selector: {app: client}, ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp, port: 81, targetPort: 8081}]}\n";
    let inbound = |more: &str| {
        let resources = compiled(&format!("{service}{more}"));
        ["inbound|8080||", "inbound|8081||"].map(|name| {
            let breakers = found(&resources, name).circuit_breakers.clone().unwrap();
            breakers.thresholds[0].max_connections.unwrap().value
        })
    };
    let unlimited = u32::MAX;
    let pool = |max: u32| format!("connectionPool: {{tcp: {{maxConnections: {max}}}}}");
    let of_rule = rule(
        "client",
        &format!(
            "host: client, trafficPolicy: {{{}, portLevelSettings: [{{port: {{number: 81}}, {}}}]}}",
            pool(1),
            pool(2)
        ),
    );
    let sidecar = |spec: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: s, namespace: shop}}\nspec: {{{spec}}}\n"
        )
    };
    let of_sidecar = "inboundConnectionPool: {tcp: {maxConnections: 3}}";
    let ingress = format!(
        "{of_sidecar}, ingress: [{{port: {{number: 8080, protocol: HTTP, name: h}}, {}}}, {{port: {{number: 8081, protocol: TCP, name: t}}}}]",
        pool(4)
    );
    assert_eq!(inbound(""), [unlimited, unlimited]);
    assert_eq!(inbound(&of_rule), [1, 2]);
    assert_eq!(inbound(&(of_rule.clone() + &sidecar(of_sidecar))), [3, 3]);
    assert_eq!(inbound(&(of_rule + &sidecar(&ingress))), [4, 3]);
}

#[test]
fn one_sidecar_holds_the_one_that_selects_then_the_namespaces_then_the_roots() {
    let sidecar = |namespace: &str, name: &str, selector: &str, hosts: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{selector}egress: [{{hosts: ['{hosts}']}}]}}\n"
        )
    };
    let sees = |yaml: &str| -> Vec<String> {
        let resources = compiled(yaml);
        let names = resources.clusters.iter().filter_map(|of| of.name.strip_prefix("outbound|"));
        let mut hosts: Vec<String> =
            names.filter_map(|name| name.rsplit('|').next()?.split('.').next().map(str::to_owned)).collect();
        hosts.dedup();
        hosts
    };
    let root = sidecar("istio-system", "root", "", "*/echo.other.svc.cluster.local");
    let own = sidecar("shop", "own", "", "./ratings.shop.svc.cluster.local");
    let selecting = |label: &str, host: &str, name: &str| {
        sidecar("shop", name, &format!("workloadSelector: {{labels: {{app: {label}}}}}, "), host)
    };
    assert_eq!(sees(""), ["echo", "ratings", "reviews"]);
    assert_eq!(sees(&root), ["echo"]);
    assert_eq!(sees(&(root.clone() + &own)), ["ratings"]);
    let chosen = selecting("client", "./reviews.shop.svc.cluster.local", "a");
    assert_eq!(sees(&(root.clone() + &own + &chosen)), ["reviews"]);
    let others = selecting("nobody", "./reviews.shop.svc.cluster.local", "b");
    assert_eq!(sees(&(root + &own + &others)), ["ratings"]);
    let younger = selecting("client", "~/*", "z");
    assert_eq!(sees(&(chosen + &younger)), ["reviews"], "of two that select, the older");
}

#[test]
fn what_a_known_virtual_service_leads_to_is_known_and_a_sidecar_may_bind() {
    let yaml = r"
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: shop}
spec:
  egress:
  - {port: {number: 9000, protocol: TCP, name: t}, bind: 127.0.0.9, captureMode: NONE, hosts: ['other/*']}
  - {hosts: ['./reviews.shop.svc.cluster.local']}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec: {hosts: [reviews], http: [{route: [{destination: {host: ratings}}]}]}
";
    check_listeners(
        yaml,
        &expect![[r#"
        0.0.0.0_9080
          raw_buffer  -> table 9080
          default -> PassthroughCluster
        127.0.0.9_9000
          -> outbound|9000||echo.other.svc.cluster.local
        virtualOutbound
          :15001   -> BlackHoleCluster
          -> PassthroughCluster
    "#]],
    );
    check_clusters(
        yaml,
        "|",
        &expect![[r#"
        outbound|9000||echo.other.svc.cluster.local EDS LEAST_REQUEST [tlsMode-istio tlsMode-disabled]
        outbound|9080||ratings.shop.svc.cluster.local EDS LEAST_REQUEST [tlsMode-istio tlsMode-disabled]
        outbound|9080||reviews.shop.svc.cluster.local EDS LEAST_REQUEST [tlsMode-istio tlsMode-disabled]
    "#]],
    );
}
