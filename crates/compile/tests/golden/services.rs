//! Services and ServiceEntries: listeners, names, endpoints. Source: `docs/parity.md`, Traffic 1.3, 1.4, 1.7, 2.8, 5.1.

use super::*;

fn endpoints(resources: &Resources, cluster: &str) -> Vec<String> {
    use envoy_types::pb::envoy::config::core::v3::{HealthStatus, address, socket_address::PortSpecifier};
    use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
    let found = resources.endpoints.iter().find(|of| of.cluster_name == cluster);
    let inline = || resources.clusters.iter().find(|of| of.name == cluster).and_then(|of| of.load_assignment.as_ref());
    let mut out = Vec::new();
    for group in found.or_else(inline).into_iter().flat_map(|of| &of.endpoints) {
        for endpoint in &group.lb_endpoints {
            let Some(HostIdentifier::Endpoint(host)) = &endpoint.host_identifier else { continue };
            let Some(address::Address::SocketAddress(socket)) =
                host.address.as_ref().and_then(|of| of.address.as_ref())
            else {
                continue;
            };
            let Some(PortSpecifier::PortValue(port)) = socket.port_specifier else { continue };
            let health = HealthStatus::try_from(endpoint.health_status).unwrap().as_str_name();
            out.push(format!("{} {}:{port} {health}", group.priority, socket.address));
        }
    }
    out
}

fn check_endpoints(yaml: &str, cluster: &str, expect: &[&str]) {
    assert_eq!(endpoints(&compiled(yaml), cluster), expect, "{cluster}");
}

const REVIEWS: &str = "outbound|9080||reviews.shop.svc.cluster.local";

#[test]
fn what_shares_a_port_shares_a_listener_and_the_older_one_keeps_a_match() {
    let yaml = r"
apiVersion: v1
kind: Service
metadata: {name: names, namespace: shop}
spec: {clusterIP: 10.96.0.53, selector: {app: x}, ports: [{name: u, port: 53, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: reserved, namespace: shop}
spec: {clusterIP: 10.96.0.90, selector: {app: x}, ports: [{name: http, port: 15090}, {name: http-i, port: 15006}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: bytes, namespace: shop}
spec: {hosts: [bytes.example.com], resolution: NONE, ports: [{number: 9080, name: tcp, protocol: TCP}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: older, namespace: shop, creationTimestamp: '2020-01-01T00:00:00Z'}
spec: {hosts: [older.example.com], resolution: NONE, ports: [{number: 7000, name: tcp, protocol: TCP}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: younger, namespace: shop, creationTimestamp: '2021-01-01T00:00:00Z'}
spec: {hosts: [younger.example.com], resolution: NONE, ports: [{number: 7000, name: tcp, protocol: TCP}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: mongo, namespace: shop}
spec: {hosts: [db.example.com], addresses: [10.96.7.7], resolution: STATIC, endpoints: [{address: 192.0.2.1}], ports: [{number: 27017, name: mongo, protocol: MONGO}, {number: 6379, name: redis, protocol: REDIS}, {number: 3306, name: mysql, protocol: MYSQL}]}
";
    check_listeners(
        yaml,
        &expect![[r#"
        0.0.0.0_7000
          -> outbound|7000||older.example.com
        0.0.0.0_9080
          raw_buffer  -> table 9080
          default -> outbound|9080||bytes.example.com
        10.96.0.3_9000
          -> outbound|9000||echo.other.svc.cluster.local
        10.96.0.3_9001
          raw_buffer  -> table echo.other.svc.cluster.local:9001
          default -> outbound|9001||echo.other.svc.cluster.local
        10.96.7.7_27017
          -> outbound|27017||db.example.com
        10.96.7.7_3306
          -> outbound|3306||db.example.com
        10.96.7.7_6379
          -> outbound|6379||db.example.com
        virtualOutbound
          :15001   -> BlackHoleCluster
          -> PassthroughCluster
    "#]],
    );
}

#[test]
fn the_bare_name_is_known_at_home_only() {
    let yaml = r"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: other}
spec: {clusterIP: 10.96.0.7, selector: {app: web}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Service
metadata: {name: each, namespace: shop}
spec: {clusterIP: None, selector: {app: each}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Service
metadata: {name: alias, namespace: shop}
spec: {type: ExternalName, externalName: ratings.shop.svc.cluster.local}
";
    let resources = compiled(yaml);
    let table = resources.routes.iter().find(|of| of.name == "9080").unwrap();
    let domains = |host: &str| -> Vec<&str> {
        let found = table.virtual_hosts.iter().find(|of| of.name == format!("{host}.svc.cluster.local:9080")).unwrap();
        found.domains.iter().map(String::as_str).collect()
    };
    let of_other = domains("web.other");
    assert!(of_other.contains(&"web.other") && !of_other.contains(&"web"), "{of_other:?}");
    let each = domains("each.shop");
    for name in ["each", "*.each.shop", "*.each.shop.svc.cluster.local"] {
        assert!(each.contains(&name), "names of single pods have the service's routes: {each:?}");
    }
    let ratings = domains("ratings.shop");
    assert!(ratings.contains(&"ratings") && ratings.contains(&"alias.shop.svc.cluster.local"), "{ratings:?}");
    assert!(!resources.clusters.iter().any(|of| of.name.contains("alias")), "an alias is no service of its own");
}

#[test]
fn unready_pods_are_left_out_or_taken_as_policies_and_services_say() {
    check_endpoints("", REVIEWS, &["0 10.1.0.1:9080 HEALTHY", "0 10.1.0.2:9080 UNHEALTHY"]);
    let rule = r"
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: shop}
spec: {host: reviews, trafficPolicy: {outlierDetection: {minHealthPercent: 50}}}
";
    check_endpoints(rule, REVIEWS, &["0 10.1.0.1:9080 HEALTHY"]);
    let publishes = r"
apiVersion: v1
kind: Service
metadata: {name: all, namespace: shop}
spec: {clusterIP: 10.96.0.8, selector: {app: reviews}, publishNotReadyAddresses: true, ports: [{name: http, port: 80, targetPort: 8080}]}
";
    let all = "outbound|80||all.shop.svc.cluster.local";
    check_endpoints(publishes, all, &["0 10.1.0.1:8080 HEALTHY", "0 10.1.0.2:8080 HEALTHY"]);
}

/// Pods of `far` in three places; the client is in `east/a` on node `one`.
const PLACES: &str = r"
apiVersion: v1
kind: Pod
metadata: {name: near, namespace: shop, labels: {app: far, topology.kubernetes.io/region: east, topology.kubernetes.io/zone: a, tier: gold}}
spec: {nodeName: one, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.1.1, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: beside, namespace: shop, labels: {app: far, topology.kubernetes.io/region: east, topology.kubernetes.io/zone: b}}
spec: {nodeName: two, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.1.2, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: away, namespace: shop, labels: {app: far, topology.kubernetes.io/region: west, topology.kubernetes.io/zone: a, tier: gold}}
spec: {nodeName: three, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.1.3, conditions: [{type: Ready, status: 'True'}]}
---
";

fn far(spec: &str, more: &str) -> Vec<String> {
    let service = format!(
        "{PLACES}apiVersion: v1\nkind: Service\nmetadata: {{name: far, namespace: shop}}\nspec: {{clusterIP: 10.96.0.8, selector: {{app: far}}, {spec}ports: [{{name: http, port: 80}}]}}\n---\n{more}"
    );
    let mut view = client();
    view.node = "one".into();
    view.locality = types::Locality::parse("east/a");
    view.labels.insert("tier".to_owned(), "gold".to_owned());
    let resources = compile::compile(&snapshot(&service), &view);
    assert_eq!(check::check(&resources).broken, Vec::<String>::new());
    let of_far = endpoints(&resources, "outbound|80||far.shop.svc.cluster.local");
    of_far.iter().map(|line| line.replace(":80 HEALTHY", "").replace("10.1.1.", "")).collect()
}

#[test]
fn a_service_keeps_traffic_close_where_it_says_so() {
    assert_eq!(far("", ""), ["0 1", "0 2", "0 3"], "without a word, everywhere");
    assert_eq!(far("trafficDistribution: PreferClose, ", ""), ["0 1", "1 2", "2 3"]);
    assert_eq!(far("trafficDistribution: PreferSameNode, ", ""), ["0 1", "1 2", "2 3"]);
    assert_eq!(far("internalTrafficPolicy: Local, ", ""), ["0 1"], "the client's node or none");
}

#[test]
fn a_rule_fails_over_by_the_labels_it_names() {
    let rule = |priority: &str, outlier: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: far, namespace: shop}}\nspec: {{host: far, trafficPolicy: {{{outlier}loadBalancer: {{localityLbSetting: {{failoverPriority: [{priority}]}}}}}}}}\n"
        )
    };
    let by_label = "tier, topology.kubernetes.io/region";
    assert_eq!(far("", &rule(by_label, "outlierDetection: {}, ")), ["0 1", "2 2", "1 3"], "as many keys as match");
    assert_eq!(far("", &rule("tier=silver", "outlierDetection: {}, ")), ["0 1", "0 2", "0 3"], "nobody is silver");
    assert_eq!(far("", &rule(by_label, "")), ["0 1", "0 2", "0 3"], "only where outliers are detected");
}

#[test]
fn endpoints_of_a_service_entry() {
    let yaml = r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: fixed, namespace: shop}
spec:
  hosts: [fixed.example.com]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}, {number: 81, name: more, protocol: HTTP, targetPort: 8081}]
  endpoints: [{address: 192.0.2.1}, {address: 192.0.2.2, ports: {http: 8080, more: 9090}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: chosen, namespace: shop}
spec:
  hosts: [chosen.example.com]
  resolution: STATIC
  workloadSelector: {labels: {app: reviews}}
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 9080}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: one-answer, namespace: shop}
spec: {hosts: [one.example.com], resolution: DNS_ROUND_ROBIN, ports: [{number: 80, name: http, protocol: HTTP}]}
";
    check_endpoints(yaml, "outbound|80||fixed.example.com", &["0 192.0.2.1:80 UNKNOWN", "0 192.0.2.2:8080 UNKNOWN"]);
    check_endpoints(yaml, "outbound|81||fixed.example.com", &["0 192.0.2.1:8081 UNKNOWN", "0 192.0.2.2:9090 UNKNOWN"]);
    check_endpoints(yaml, "outbound|80||chosen.example.com", &["0 10.1.0.1:9080 HEALTHY", "0 10.1.0.2:9080 UNHEALTHY"]);
    check_clusters(
        yaml,
        "one.example.com",
        &expect![[r#"
        outbound|80||one.example.com LOGICAL_DNS LEAST_REQUEST []
    "#]],
    );
}

#[test]
fn addresses_are_given_out_where_the_proxy_answers_names() {
    let yaml = r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: first, namespace: shop}
spec: {hosts: [first.example.com], resolution: STATIC, endpoints: [{address: 192.0.2.1}], ports: [{number: 9100, name: tcp, protocol: TCP}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: second, namespace: shop}
spec: {hosts: [second.example.com], resolution: STATIC, endpoints: [{address: 192.0.2.2}], ports: [{number: 9100, name: tcp, protocol: TCP}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: out, namespace: shop, labels: {networking.istio.io/enable-autoallocate-ip: 'false'}}
spec: {hosts: [out.example.com], resolution: STATIC, endpoints: [{address: 192.0.2.3}], ports: [{number: 9200, name: tcp, protocol: TCP}]}
";
    let listening = |captures_dns: bool| -> Vec<String> {
        let mut view = client();
        view.captures_dns = captures_dns;
        let resources = compile::compile(&snapshot(yaml), &view);
        assert_eq!(check::check(&resources).broken, Vec::<String>::new());
        let names = resources.listeners.iter().map(|of| of.name.clone());
        names.filter(|name| name.ends_with("_9100") || name.ends_with("_9200")).collect()
    };
    let own = listening(true);
    assert_eq!(own.iter().filter(|name| name.starts_with("240.240.") && name.ends_with("_9100")).count(), 2, "{own:?}");
    assert!(own.contains(&"0.0.0.0_9200".to_owned()) && own.len() == 3, "{own:?}");
    assert_eq!(listening(false), ["0.0.0.0_9100", "0.0.0.0_9200"], "nobody could dial them");
}

#[test]
fn bytes_are_routed_by_the_address_that_was_dialled() {
    let yaml = r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: range, namespace: shop}
spec: {hosts: [range.example.com], addresses: [203.0.113.0/24], resolution: NONE, ports: [{number: 6000, name: tcp, protocol: TCP}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: range, namespace: shop}
spec:
  hosts: [range.example.com]
  tcp:
  - {match: [{destinationSubnets: [203.0.113.128/25]}], route: [{destination: {host: echo.other.svc.cluster.local, port: {number: 9000}}}]}
  - {match: [{sourceLabels: {app: nobody}}], route: [{destination: {host: nobody.example.com, port: {number: 1}}}]}
";
    check_listeners(
        yaml,
        &expect![[r#"
        0.0.0.0_6000
          203.0.113.128/25   -> outbound|9000||echo.other.svc.cluster.local
          203.0.113.0/24   -> outbound|6000||range.example.com
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
    "#]],
    );
}

#[test]
fn a_listener_that_looks_into_connections_waits_as_long_as_the_mesh_says() {
    let waits = |more: &str| {
        let resources = compiled(more);
        let found = resources.listeners.iter().find(|of| of.name == "10.96.0.3_9001").unwrap();
        assert!(!found.listener_filters.is_empty() && found.continue_on_listener_filters_timeout);
        found.listener_filters_timeout.map(|time| (time.seconds, time.nanos))
    };
    assert_eq!(waits(""), Some((0, 0)), "for ever");
    let of_mesh = "
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: mesh, namespace: istio-system}
spec: {meshConfig: {protocolDetectionTimeout: 1s}}
";
    assert_eq!(waits(of_mesh), Some((1, 0)));
}

#[test]
fn the_mesh_may_lead_inbound_traffic_to_loopback() {
    let yaml = r"
apiVersion: v1
kind: Service
metadata: {name: client, namespace: shop}
spec: {clusterIP: 10.96.0.8, selector: {app: client}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: mesh, namespace: istio-system}
spec: {meshConfig: {inboundTrafficPolicy: {mode: MODE}}}
";
    let inbound = |mode: &str| {
        let resources = compiled(&yaml.replace("MODE", mode));
        let found = resources.clusters.iter().find(|of| of.name == "inbound|8080||").unwrap();
        (cluster_line(found), endpoints(&resources, "inbound|8080||"))
    };
    assert_eq!(inbound("PASSTHROUGH"), ("inbound|8080|| ORIGINAL_DST CLUSTER_PROVIDED []".to_owned(), vec![]));
    let to_loopback = ("inbound|8080|| STATIC ROUND_ROBIN []".to_owned(), vec!["0 127.0.0.1:8080 UNKNOWN".to_owned()]);
    assert_eq!(inbound("LOCALHOST"), to_loopback);
}
