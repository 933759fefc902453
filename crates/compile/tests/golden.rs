//! What a sidecar is told, as short text: one mesh, one proxy, one rendering per case.

#![expect(clippy::unwrap_used, reason = "a test may fail here")]

use std::fmt::Write as _;
use std::net::IpAddr;

use compile::{Capabilities, Resources, View, check};
use engine::config::Table;
use engine::lower::{self, Raw};
use envoy_types::pb::envoy::config::cluster::v3::{Cluster, cluster};
use envoy_types::pb::envoy::config::listener::v3::{FilterChain, Listener, filter};
use envoy_types::pb::envoy::config::route::v3::{Route, RouteConfiguration, route, route_action, route_match};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, http_connection_manager as hcm,
};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy};
use expect_test::{Expect, expect};
use mesh::MeshSnapshot;
use prost::Message as _;
use types::wellknown::type_urls;

#[path = "golden/policies.rs"]
mod policies;
#[path = "golden/services.rs"]
mod services;

/// Two HTTP services, one of bytes, one of unknown protocol; the client is a pod of `shop`.
const MESH: &str = r"
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Service
metadata: {name: ratings, namespace: shop}
spec: {clusterIP: 10.96.0.2, selector: {app: ratings}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: other}
spec: {clusterIP: 10.96.0.3, selector: {app: echo}, ports: [{name: tcp, port: 9000}, {name: x, port: 9001}]}
---
apiVersion: v1
kind: Pod
metadata: {name: reviews-v1, namespace: shop, labels: {app: reviews, version: v1, security.istio.io/tlsMode: istio}}
spec: {serviceAccountName: reviews, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.1, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: reviews-v2, namespace: shop, labels: {app: reviews, version: v2}}
spec: {serviceAccountName: reviews, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.2, conditions: [{type: Ready, status: 'False'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.9, conditions: [{type: Ready, status: 'True'}]}
";

fn snapshot(yaml: &str) -> MeshSnapshot {
    let documents = api::parse_documents("case.yaml", &format!("{MESH}\n---\n{yaml}"));
    assert!(documents.refused.is_empty(), "{:?}", documents.findings);
    MeshSnapshot::next(None, &api::ConfigSet::new(documents.one_after_another())).0
}

fn client() -> View {
    let mut view = View::sidecar("shop", "client", IpAddr::from([10, 1, 0, 9]));
    view.labels = [("app".to_owned(), "client".to_owned())].into();
    view
}

/// Compiles for the client and checks what must hold of any set of resources.
fn compiled(yaml: &str) -> Resources {
    let mesh = snapshot(yaml);
    let resources = compile::compile(&mesh, &client());
    assert_eq!(check::check(&resources).broken, Vec::<String>::new());
    assert!(resources.packed() == compile::compile(&mesh, &client()).packed(), "equal inputs give equal bytes");
    let mut plain = client();
    plain.capabilities = Capabilities::NONE;
    for resource in compile::compile(&mesh, &plain).packed() {
        let bytes = String::from_utf8_lossy(&resource.any.value).into_owned();
        for own in ["istio.alpn", "istio.stats", "istio.metadata_exchange", "TypedStruct"] {
            assert!(!bytes.contains(own), "{} has {own}, which a plain Envoy refuses", resource.name);
        }
    }
    assert_eq!(refused(&resources), Vec::<String>::new());
    for resource in resources.packed() {
        let shown = proto::json::to_json(&resource.any);
        // A type that is not described: alone, or inside of another message.
        let hides = shown["value"].is_string() || shown.to_string().contains("\"base64\":");
        assert!(!hides, "a dump hides a part of {shown}");
        let back = proto::json::any_from_json(shown.clone()).unwrap_or_else(|error| panic!("{error}: {shown}"));
        // Byte for byte but for the order of maps.
        let is_whole = back.value.len() == resource.any.value.len() && proto::json::to_json(&back) == shown;
        assert!(is_whole, "JSON and back is not the same: {shown}");
    }
    resources
}

/// What our own proxy would refuse.
fn refused(resources: &Resources) -> Vec<String> {
    let packed = resources.packed();
    let raws = |url: &str| -> Vec<Raw> {
        let of_type = packed.iter().filter(|resource| resource.type_url == url);
        of_type.map(|resource| Raw { name: resource.name.as_str().into(), body: resource.any.clone() }).collect()
    };
    let lists = [
        lower::apply_clusters(&Table::default(), &raws(type_urls::CLUSTER), &[]).1,
        lower::apply_endpoints(&Table::default(), &raws(type_urls::ENDPOINT), &[]).1,
        lower::apply_routes(&Table::default(), &raws(type_urls::ROUTE), &[]).1,
        lower::apply_listeners(&Table::default(), &raws(type_urls::LISTENER), &[]).1,
    ];
    lists.iter().flatten().map(|rejected| format!("{}: {}", rejected.name, rejected.reason)).collect()
}

fn routes(of: &RouteConfiguration) -> String {
    let mut out = format!("table {}\n", of.name);
    for host in &of.virtual_hosts {
        writeln!(out, "  {} [{}]", host.name, host.domains.join(" ")).unwrap();
        for route in &host.routes {
            writeln!(out, "    {}", one_route(route)).unwrap();
        }
    }
    out
}

fn one_route(of: &Route) -> String {
    let found = of.r#match.clone().unwrap_or_default();
    let mut out = match found.path_specifier {
        Some(route_match::PathSpecifier::Prefix(prefix)) => format!("{prefix}*"),
        Some(route_match::PathSpecifier::Path(path)) => path,
        Some(route_match::PathSpecifier::SafeRegex(regex)) => format!("~{}", regex.regex),
        _ => "?".into(),
    };
    for header in &found.headers {
        write!(out, " {}{}", if header.invert_match { "!" } else { "" }, header.name).unwrap();
    }
    match &of.action {
        Some(route::Action::Route(action)) => {
            match &action.cluster_specifier {
                Some(route_action::ClusterSpecifier::Cluster(name)) => {
                    write!(out, " -> {name}").unwrap();
                }
                Some(route_action::ClusterSpecifier::WeightedClusters(all)) => {
                    for of in &all.clusters {
                        write!(out, " -> {}% {}", of.weight.map_or(0, |weight| weight.value), of.name).unwrap();
                    }
                }
                _ => out.push_str(" -> nowhere"),
            }
            let timeout = action.timeout.map_or(-1, |timeout| timeout.seconds);
            let retries =
                action.retry_policy.as_ref().map_or(0, |policy| policy.num_retries.map_or(1, |count| count.value));
            write!(out, " timeout={timeout}s retries={retries}").unwrap();
            for mirror in &action.request_mirror_policies {
                write!(out, " mirror={}", mirror.cluster).unwrap();
            }
        }
        Some(route::Action::Redirect(_)) => out.push_str(" -> redirect"),
        Some(route::Action::DirectResponse(direct)) => {
            write!(out, " -> {}", direct.status).unwrap();
        }
        _ => out.push_str(" -> nothing"),
    }
    let mut filters: Vec<&str> = of.typed_per_filter_config.keys().map(String::as_str).collect();
    filters.sort_unstable();
    for name in filters {
        write!(out, " {}", name.trim_start_matches("envoy.filters.http.")).unwrap();
    }
    out
}

fn chain(of: &FilterChain) -> String {
    let found = of.filter_chain_match.clone().unwrap_or_default();
    let mut out = String::new();
    if let Some(port) = found.destination_port {
        write!(out, ":{} ", port.value).unwrap();
    }
    for range in &found.prefix_ranges {
        write!(out, "{}/{} ", range.address_prefix, range.prefix_len.map_or(0, |len| len.value)).unwrap();
    }
    write!(out, "{} {}", found.transport_protocol, found.server_names.join(",")).unwrap();
    let Some(last) = of.filters.last() else { return out };
    let Some(filter::ConfigType::TypedConfig(any)) = &last.config_type else { return out };
    if last.name == "envoy.filters.network.tcp_proxy" {
        let proxy = TcpProxy::decode(any.value.as_slice()).unwrap();
        match proxy.cluster_specifier {
            Some(tcp_proxy::ClusterSpecifier::Cluster(name)) => write!(out, " -> {name}").unwrap(),
            Some(tcp_proxy::ClusterSpecifier::WeightedClusters(all)) => {
                for of in all.clusters {
                    write!(out, " -> {}% {}", of.weight, of.name).unwrap();
                }
            }
            None => out.push_str(" -> nowhere"),
        }
    } else {
        let manager = HttpConnectionManager::decode(any.value.as_slice()).unwrap();
        if let Some(hcm::RouteSpecifier::Rds(rds)) = manager.route_specifier {
            write!(out, " -> table {}", rds.route_config_name).unwrap();
        }
    }
    out.trim().to_owned()
}

fn listener(of: &Listener) -> String {
    let mut out = format!("{}\n", of.name);
    for one in &of.filter_chains {
        writeln!(out, "  {}", chain(one)).unwrap();
    }
    if let Some(one) = &of.default_filter_chain {
        writeln!(out, "  default {}", chain(one)).unwrap();
    }
    out
}

fn cluster_line(of: &Cluster) -> String {
    let kind = match &of.cluster_discovery_type {
        Some(cluster::ClusterDiscoveryType::Type(kind)) => {
            cluster::DiscoveryType::try_from(*kind).unwrap().as_str_name().to_owned()
        }
        _ => "dynamic".to_owned(),
    };
    let balancing = cluster::LbPolicy::try_from(of.lb_policy).unwrap().as_str_name();
    let sockets: Vec<&str> = of
        .transport_socket_matches
        .iter()
        .map(|of| of.name.as_str())
        .chain(of.transport_socket.iter().map(|of| of.name.trim_start_matches("envoy.transport_sockets.")))
        .collect();
    format!("{} {kind} {balancing} [{}]", of.name, sockets.join(" "))
}

fn check_table(yaml: &str, table: &str, expect: &Expect) {
    let resources = compiled(yaml);
    let found = resources.routes.iter().find(|of| of.name == table).expect("the table is there");
    expect.assert_eq(&routes(found));
}

fn check_listeners(yaml: &str, expect: &Expect) {
    let resources = compiled(yaml);
    let all: String = resources.listeners.iter().filter(|of| of.name != "virtualInbound").map(listener).collect();
    expect.assert_eq(&all);
}

fn check_clusters(yaml: &str, part: &str, expect: &Expect) {
    let resources = compiled(yaml);
    let all: Vec<String> = resources.clusters.iter().filter(|of| of.name.contains(part)).map(cluster_line).collect();
    expect.assert_eq(&(all.join("\n") + "\n"));
}

#[test]
fn services_alone() {
    check_listeners(
        "",
        &expect![[r"
        0.0.0.0_9080
          raw_buffer  -> table 9080
          default -> PassthroughCluster
        10.96.0.3_9000
          -> outbound|9000||echo.other.svc.cluster.local
        10.96.0.3_9001
          raw_buffer  -> table echo.other.svc.cluster.local:9001
          default -> outbound|9001||echo.other.svc.cluster.local
        virtualOutbound
          :15001   -> BlackHoleCluster
          -> PassthroughCluster
    "]],
    );
    check_table(
        "",
        "9080",
        &expect![[r"
        table 9080
          ratings.shop.svc.cluster.local:9080 [ratings.shop.svc.cluster.local ratings.shop.svc.cluster.local. ratings ratings.shop.svc ratings.shop 10.96.0.2]
            /* -> outbound|9080||ratings.shop.svc.cluster.local timeout=0s retries=2
          reviews.shop.svc.cluster.local:9080 [reviews.shop.svc.cluster.local reviews.shop.svc.cluster.local. reviews reviews.shop.svc reviews.shop 10.96.0.1]
            /* -> outbound|9080||reviews.shop.svc.cluster.local timeout=0s retries=2
          allow_any [*]
            /* -> PassthroughCluster timeout=0s retries=0
    "]],
    );
    check_table(
        "",
        "echo.other.svc.cluster.local:9001",
        &expect![[r"
        table echo.other.svc.cluster.local:9001
          echo.other.svc.cluster.local:9001 [*]
            /* -> outbound|9001||echo.other.svc.cluster.local timeout=0s retries=2
    "]],
    );
    check_clusters(
        "",
        "|",
        &expect![[r"
        outbound|9000||echo.other.svc.cluster.local EDS LEAST_REQUEST [tlsMode-istio tlsMode-disabled]
        outbound|9001||echo.other.svc.cluster.local EDS LEAST_REQUEST [tlsMode-istio tlsMode-disabled]
        outbound|9080||ratings.shop.svc.cluster.local EDS LEAST_REQUEST [tlsMode-istio tlsMode-disabled]
        outbound|9080||reviews.shop.svc.cluster.local EDS LEAST_REQUEST [tlsMode-istio tlsMode-disabled]
    "]],
    );
}

#[test]
fn unready_endpoints_are_sent_as_unhealthy_and_only_capable_ones_get_mtls() {
    let resources = compiled("");
    let found = resources
        .endpoints
        .iter()
        .find(|of| of.cluster_name == "outbound|9080||reviews.shop.svc.cluster.local")
        .unwrap();
    let lines: Vec<String> = found
        .endpoints
        .iter()
        .flat_map(|of| &of.lb_endpoints)
        .map(|of| {
            let metadata = of.metadata.as_ref().unwrap();
            format!("{} {}", of.health_status, metadata.filter_metadata.contains_key("envoy.transport_socket_match"))
        })
        .collect();
    assert_eq!(lines, ["1 true", "2 false"]);
}

const SUBSETS: &str = r"
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: shop}
spec:
  host: reviews
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}, trafficPolicy: {tls: {mode: DISABLE}, loadBalancer: {simple: RANDOM}}}]
---
";

#[test]
fn weights_matches_and_zero() {
    let routes = r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec:
  hosts: [reviews]
  http:
  - match: [{uri: {prefix: /a}, headers: {x: {exact: '1'}}, withoutHeaders: {absent: {}}}, {sourceLabels: {app: nobody}}, {port: 1}]
    route:
    - {destination: {host: reviews, subset: v1}, weight: 90}
    - {destination: {host: reviews, subset: v2}, weight: 10}
    - {destination: {host: ratings}, weight: 0}
    timeout: 3s
    retries: {attempts: 5}
    mirror: {host: ratings}
  - match: [{uri: {exact: /gone}}]
    directResponse: {status: 410}
  - match: [{uri: {regex: '/r/.*'}}]
    redirect: {uri: /}
  - fault: {abort: {httpStatus: 500, percentage: {value: 1}}}
    corsPolicy: {allowOrigins: [{exact: '*'}]}
    retries: {attempts: 0}
    route: [{destination: {host: reviews, subset: v1}, weight: 0}]
  - route: [{destination: {host: ratings}}]
";
    check_table(
        &format!("{SUBSETS}{routes}"),
        "9080",
        &expect![[r"
        table 9080
          ratings.shop.svc.cluster.local:9080 [ratings.shop.svc.cluster.local ratings.shop.svc.cluster.local. ratings ratings.shop.svc ratings.shop 10.96.0.2]
            /* -> outbound|9080||ratings.shop.svc.cluster.local timeout=0s retries=2
          reviews.shop.svc.cluster.local:9080 [reviews.shop.svc.cluster.local reviews.shop.svc.cluster.local. reviews reviews.shop.svc reviews.shop 10.96.0.1]
            /a* !absent x -> 90% outbound|9080|v1|reviews.shop.svc.cluster.local -> 10% outbound|9080|v2|reviews.shop.svc.cluster.local timeout=3s retries=5 mirror=outbound|9080||ratings.shop.svc.cluster.local
            /gone -> 410
            ~/r/.* -> redirect
            /* -> outbound|9080|v1|reviews.shop.svc.cluster.local timeout=0s retries=0 cors fault
          allow_any [*]
            /* -> PassthroughCluster timeout=0s retries=0
    "]],
    );
    check_clusters(
        &format!("{SUBSETS}{routes}"),
        "reviews",
        &expect![[r"
        outbound|9080|v1|reviews.shop.svc.cluster.local EDS LEAST_REQUEST [tlsMode-istio tlsMode-disabled]
        outbound|9080|v2|reviews.shop.svc.cluster.local EDS RANDOM []
        outbound|9080||reviews.shop.svc.cluster.local EDS LEAST_REQUEST [tlsMode-istio tlsMode-disabled]
    "]],
    );
}

#[test]
fn the_oldest_wins_whole_and_delegates_narrow() {
    let yaml = r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: old, namespace: shop}
spec:
  hosts: [reviews]
  http:
  - {match: [{uri: {prefix: /d}}], delegate: {name: child}, timeout: 4s}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: young, namespace: shop}
spec: {hosts: [reviews], http: [{route: [{destination: {host: ratings}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: child, namespace: shop}
spec:
  http:
  - {match: [{uri: {exact: /d/x}}], route: [{destination: {host: ratings}}]}
  - {match: [{uri: {exact: /other}}], route: [{destination: {host: ratings}}]}
";
    check_table(
        yaml,
        "9080",
        &expect![[r"
        table 9080
          ratings.shop.svc.cluster.local:9080 [ratings.shop.svc.cluster.local ratings.shop.svc.cluster.local. ratings ratings.shop.svc ratings.shop 10.96.0.2]
            /* -> outbound|9080||ratings.shop.svc.cluster.local timeout=0s retries=2
          reviews.shop.svc.cluster.local:9080 [reviews.shop.svc.cluster.local reviews.shop.svc.cluster.local. reviews reviews.shop.svc reviews.shop 10.96.0.1]
            /d/x -> outbound|9080||ratings.shop.svc.cluster.local timeout=4s retries=2
          allow_any [*]
            /* -> PassthroughCluster timeout=0s retries=0
    "]],
    );
}

/// [`compiled`] looks at every case; these have kinds of messages that no other has.
#[test]
fn dumps_hide_nothing_of_any_message() {
    let yaml = r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: dynamic, namespace: shop}
spec: {hosts: ['*.dyn.example.com'], resolution: DYNAMIC_DNS, ports: [{number: 80, name: http, protocol: HTTP}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: dns, namespace: shop}
spec: {hosts: [api.example.com], resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec: {hosts: [reviews], http: [{route: [{destination: {host: reviews}}], retries: {attempts: 3, retryOn: 5xx, retryIgnorePreviousHosts: false}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: ratings, namespace: shop}
spec: {hosts: [ratings], http: [{route: [{destination: {host: ratings}}], retries: {attempts: 3, retryOn: 5xx, retryRemoteLocalities: true}}]}
";
    let resources = compiled(yaml);
    let kinds = ["dynamic_forward_proxy.v3", "cares.v3", "previous_priorities.v3"];
    let bytes: Vec<u8> = resources.packed().iter().flat_map(|resource| resource.any.value.clone()).collect();
    let text = String::from_utf8_lossy(&bytes);
    for kind in kinds {
        assert!(text.contains(kind), "the case has {kind}");
    }
    assert!(resources.name_table.is_some_and(|table| !table.table.is_empty()));
}

#[test]
fn service_entries_of_each_resolution() {
    let yaml = r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: dns, namespace: shop}
spec: {hosts: [api.example.com], resolution: DNS, ports: [{number: 443, name: tls, protocol: TLS}, {number: 80, name: http, protocol: HTTP, targetPort: 443}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: wild, namespace: shop}
spec: {hosts: ['*.wild.example.com'], resolution: NONE, ports: [{number: 443, name: tls, protocol: TLS}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: range, namespace: shop}
spec: {hosts: [range.example.com], addresses: [203.0.113.0/24], resolution: NONE, ports: [{number: 6000, name: tcp, protocol: TCP}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: api, namespace: shop}
spec: {host: api.example.com, trafficPolicy: {portLevelSettings: [{port: {number: 80}, tls: {mode: SIMPLE}}]}}
";
    check_listeners(
        yaml,
        &expect![[r"
        0.0.0.0_443
          api.example.com -> outbound|443||api.example.com
          *.wild.example.com -> outbound|443||*.wild.example.com
          default -> PassthroughCluster
        0.0.0.0_6000
          203.0.113.0/24   -> outbound|6000||range.example.com
          default -> PassthroughCluster
        0.0.0.0_80
          raw_buffer  -> table 80
          default -> PassthroughCluster
        0.0.0.0_9080
          raw_buffer  -> table 9080
          default -> PassthroughCluster
        10.96.0.3_9000
          -> outbound|9000||echo.other.svc.cluster.local
        10.96.0.3_9001
          raw_buffer  -> table echo.other.svc.cluster.local:9001
          default -> outbound|9001||echo.other.svc.cluster.local
        virtualOutbound
          :15001   -> BlackHoleCluster
          -> PassthroughCluster
    "]],
    );
    check_clusters(
        yaml,
        "example.com",
        &expect![[r"
        outbound|443||*.wild.example.com ORIGINAL_DST CLUSTER_PROVIDED []
        outbound|443||api.example.com STRICT_DNS LEAST_REQUEST []
        outbound|6000||range.example.com ORIGINAL_DST CLUSTER_PROVIDED []
        outbound|80||api.example.com STRICT_DNS LEAST_REQUEST [tls]
    "]],
    );
}

#[test]
fn bytes_by_weight_and_by_sni() {
    let yaml = r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: other}
spec:
  hosts: [echo]
  tcp:
  - match: [{port: 9000}]
    route:
    - {destination: {host: echo, port: {number: 9000}, subset: a}, weight: 80}
    - {destination: {host: echo, port: {number: 9000}}, weight: 20}
";
    check_listeners(
        yaml,
        &expect![[r"
        0.0.0.0_9080
          raw_buffer  -> table 9080
          default -> PassthroughCluster
        10.96.0.3_9000
          -> 80% outbound|9000|a|echo.other.svc.cluster.local -> 20% outbound|9000||echo.other.svc.cluster.local
        10.96.0.3_9001
          raw_buffer  -> table echo.other.svc.cluster.local:9001
          default -> outbound|9001||echo.other.svc.cluster.local
        virtualOutbound
          :15001   -> BlackHoleCluster
          -> PassthroughCluster
    "]],
    );
}

#[test]
fn a_sidecar_narrows_and_registry_only_refuses() {
    let yaml = r"
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: shop}
spec:
  outboundTrafficPolicy: {mode: REGISTRY_ONLY}
  egress:
  - {port: {number: 9080, protocol: HTTP, name: h}, hosts: ['./ratings.shop.svc.cluster.local']}
  - {hosts: ['other/*']}
";
    check_listeners(
        yaml,
        &expect![[r"
        0.0.0.0_9080
          raw_buffer  -> table 9080
          default -> BlackHoleCluster
        10.96.0.3_9000
          -> outbound|9000||echo.other.svc.cluster.local
        10.96.0.3_9001
          raw_buffer  -> table echo.other.svc.cluster.local:9001
          default -> outbound|9001||echo.other.svc.cluster.local
        virtualOutbound
          :15001   -> BlackHoleCluster
          -> BlackHoleCluster
    "]],
    );
    check_table(
        yaml,
        "9080",
        &expect![[r"
        table 9080
          ratings.shop.svc.cluster.local:9080 [ratings.shop.svc.cluster.local ratings.shop.svc.cluster.local. ratings ratings.shop.svc ratings.shop 10.96.0.2]
            /* -> outbound|9080||ratings.shop.svc.cluster.local timeout=0s retries=2
          block_all [*]
            /* -> 502
    "]],
    );
}

#[test]
fn provenance_is_istios_text_and_our_list() {
    let resources = compiled(&format!(
        "{SUBSETS}{}",
        r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: r, namespace: shop}
spec: {hosts: [reviews], http: [{route: [{destination: {host: reviews, subset: v1}}]}]}
"
    ));
    let table = resources.routes.iter().find(|of| of.name == "9080").unwrap();
    let host = table.virtual_hosts.iter().find(|of| of.name.starts_with("reviews")).unwrap();
    let metadata = format!("{:?}", host.routes[0].metadata);
    assert!(metadata.contains("/apis/networking.istio.io/v1/namespaces/shop/virtual-service/r"), "{metadata}");
    assert!(metadata.contains("VirtualService shop/r spec.http[0]"), "{metadata}");
}

#[test]
fn a_plain_envoy_offers_what_the_server_needs_to_tell_http() {
    let mut view = client();
    view.capabilities = Capabilities::NONE;
    let resources = compile::compile(&snapshot(""), &view);
    let alpn = |name: &str| {
        let found = resources.clusters.iter().find(|of| of.name.contains(name)).unwrap();
        let text = String::from_utf8_lossy(&found.encode_to_vec()).into_owned();
        ["istio-http/1.1", "istio-h2", "istio-peer-exchange"]
            .into_iter()
            .filter(|of| text.contains(of))
            .collect::<Vec<_>>()
    };
    assert_eq!(alpn("9080||reviews"), ["istio-http/1.1"]);
    assert_eq!(alpn("9000||echo"), Vec::<&str>::new());
}
