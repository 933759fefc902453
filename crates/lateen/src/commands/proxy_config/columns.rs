//! From a config dump in Envoy's form to istioctl's columns. Pure.
//!
//! *Source*: `istioctl proxy-config`. Both spellings of field names are read, so that a
//! dump of an Envoy does as well.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// Rows under a heading.
#[derive(Debug, PartialEq)]
pub(super) struct Table {
    pub(super) head: Vec<&'static str>,
    pub(super) rows: Vec<Vec<String>>,
}

/// Which rows are wanted; absent fits all.
#[derive(Clone, Debug, Default)]
pub(super) struct Filter {
    pub(super) fqdn: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) subset: Option<String>,
    pub(super) direction: Option<String>,
    pub(super) address: Option<String>,
    pub(super) cluster: Option<String>,
    pub(super) status: Option<String>,
    pub(super) table: Option<String>,
}

fn fits(wanted: Option<&str>, found: &str) -> bool {
    wanted.is_none_or(|wanted| wanted.eq_ignore_ascii_case(found))
}

/// A field in either spelling.
fn field<'a>(of: &'a Value, name: &str) -> &'a Value {
    let snake = &of[name];
    if !snake.is_null() {
        return snake;
    }
    let mut camel = String::new();
    let mut upper = false;
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if upper => {
                camel.extend(c.to_uppercase());
                upper = false;
            }
            c => camel.push(c),
        }
    }
    &of[camel.as_str()]
}

/// A field of a field.
fn at<'a>(of: &'a Value, path: &[&str]) -> &'a Value {
    path.iter().fold(of, |of, name| field(of, name))
}

fn items(of: &Value) -> impl Iterator<Item = &Value> {
    of.as_array().into_iter().flatten()
}

fn text(of: &Value) -> &str {
    of.as_str().unwrap_or_default()
}

fn number(of: &Value) -> Option<u64> {
    of.as_u64().or_else(|| of.as_str()?.parse().ok())
}

/// All messages under `key`, wherever the dump has them: static and dynamic, active and warming.
fn collect<'a>(of: &'a Value, key: &str, found: &mut Vec<&'a Value>) {
    match of {
        Value::Array(list) => list.iter().for_each(|item| collect(item, key, found)),
        Value::Object(_) => {
            let here = field(of, key);
            if here.is_object() {
                found.push(here);
                return;
            }
            for list in [
                "static_clusters",
                "dynamic_active_clusters",
                "dynamic_warming_clusters",
                "static_listeners",
                "dynamic_listeners",
                "active_state",
                "warming_state",
                "static_route_configs",
                "dynamic_route_configs",
                "static_endpoint_configs",
                "dynamic_endpoint_configs",
                "static_secrets",
                "dynamic_active_secrets",
                "dynamic_warming_secrets",
            ] {
                collect(field(of, list), key, found);
            }
        }
        _ => {}
    }
}

fn all<'a>(dump: &'a Value, key: &str) -> Vec<&'a Value> {
    let mut found = Vec::new();
    collect(&dump["configs"], key, &mut found);
    found
}

/// The messages themselves, as a list: those that the table of the section would show.
pub(super) fn resources(dump: &Value, key: &str, filter: &Filter) -> Value {
    let wanted = |message: &&&Value| match key {
        "cluster" => cluster_fits(message, filter),
        "listener" => listener_fits(message, filter),
        "route_config" => fits(filter.table.as_deref(), text(&message["name"])),
        _ => true,
    };
    Value::Array(all(dump, key).iter().filter(wanted).map(|message| (*message).clone()).collect())
}

/// The assignments of the dump with the endpoints that are wanted; those without any are left out.
pub(super) fn assignments(dump: &Value, filter: &Filter) -> Value {
    let narrowed = all(dump, "endpoint_config").into_iter().filter_map(|assignment| {
        let name = text(field(assignment, "cluster_name"));
        let mut assignment = assignment.clone();
        let mut count = 0;
        for place in assignment["endpoints"].as_array_mut()? {
            for list in ["lb_endpoints", "lbEndpoints"] {
                if let Some(endpoints) = place.get_mut(list).and_then(Value::as_array_mut) {
                    endpoints.retain(|endpoint| filter.takes(&Endpoint::of_assignment(endpoint), name));
                    count += endpoints.len();
                }
            }
        }
        (count > 0).then_some(assignment)
    });
    Value::Array(narrowed.collect())
}

/// The clusters of `/clusters?format=json` with the hosts that are wanted; those without any are left out.
pub(super) fn statuses(health: &Value, filter: &Filter) -> Value {
    let narrowed = items(field(health, "cluster_statuses")).filter_map(|cluster| {
        let name = text(&cluster["name"]);
        let mut cluster = cluster.clone();
        let key = if cluster.get("host_statuses").is_some() { "host_statuses" } else { "hostStatuses" };
        let hosts = cluster[key].as_array_mut()?;
        hosts.retain(|host| filter.takes(&Endpoint::of_status(host), name));
        (!hosts.is_empty()).then_some(cluster)
    });
    Value::Array(narrowed.collect())
}

/// `name.namespace` of the object of `kind` (`virtual-service`) that Istio's metadata names.
fn istio_object(of: &Value, kind: &str) -> Option<String> {
    let path = text(at(of, &["metadata", "filter_metadata", "istio", "config"]));
    let rest = path.split_once("/namespaces/")?.1;
    let mut parts = rest.split('/');
    let (namespace, found, name) = (parts.next()?, parts.next()?, parts.next()?);
    (found == kind).then(|| format!("{name}.{namespace}"))
}

fn dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// A cluster's name in parts: direction, port, subset, host.
fn parts(cluster: &Value) -> (&str, &str, &str, &str) {
    let name = text(&cluster["name"]);
    match name.split('|').collect::<Vec<_>>()[..] {
        [direction, port, subset, fqdn] => (direction, port, subset, fqdn),
        _ => ("", "", "", name),
    }
}

fn cluster_fits(cluster: &Value, filter: &Filter) -> bool {
    let (direction, port, subset, fqdn) = parts(cluster);
    fits(filter.fqdn.as_deref(), fqdn)
        && filter.port.is_none_or(|wanted| port == wanted.to_string())
        && fits(filter.subset.as_deref(), subset)
        && fits(filter.direction.as_deref(), direction)
}

/// `SERVICE FQDN, PORT, SUBSET, DIRECTION, TYPE, DESTINATION RULE`
pub(super) fn clusters(dump: &Value, filter: &Filter) -> Table {
    let mut rows: Vec<(String, String, u64, String, Vec<String>)> = Vec::new();
    for cluster in all(dump, "cluster").into_iter().filter(|cluster| cluster_fits(cluster, filter)) {
        let (direction, port, subset, fqdn) = parts(cluster);
        let kind = match (text(field(cluster, "type")), text(at(cluster, &["cluster_type", "name"]))) {
            ("", "") => "STATIC",
            ("", custom) => custom.rsplit('.').next().unwrap_or(custom),
            (kind, _) => kind,
        };
        let row = vec![
            fqdn.to_owned(),
            dash(port),
            dash(subset),
            dash(direction),
            kind.to_owned(),
            istio_object(cluster, "destination-rule").unwrap_or_default(),
        ];
        rows.push((fqdn.to_owned(), subset.to_owned(), port.parse().unwrap_or(0), direction.to_owned(), row));
    }
    rows.sort();
    Table {
        head: vec!["SERVICE FQDN", "PORT", "SUBSET", "DIRECTION", "TYPE", "DESTINATION RULE"],
        rows: rows.into_iter().map(|row| row.4).collect(),
    }
}

fn socket(address: &Value) -> (String, u64) {
    let socket = field(address, "socket_address");
    (text(&socket["address"]).to_owned(), number(field(socket, "port_value")).unwrap_or(0))
}

fn listener_fits(listener: &Value, filter: &Filter) -> bool {
    let (address, port) = socket(&listener["address"]);
    fits(filter.address.as_deref(), &address) && filter.port.is_none_or(|wanted| u64::from(wanted) == port)
}

/// `ADDRESSES PORT MATCH DESTINATION`
pub(super) fn listeners(dump: &Value, filter: &Filter) -> Table {
    let mut rows: Vec<(u64, String, Vec<Vec<String>>)> = Vec::new();
    for listener in all(dump, "listener").into_iter().filter(|listener| listener_fits(listener, filter)) {
        let (address, port) = socket(&listener["address"]);
        let extra = items(field(listener, "additional_addresses")).map(|more| socket(&more["address"]).0);
        let addresses: Vec<String> = std::iter::once(address.clone()).chain(extra).collect();
        let chains = items(field(listener, "filter_chains")).map(|chain| (chain_match(chain), chain));
        let default = field(listener, "default_filter_chain");
        let default = default.is_object().then(|| ("ALL".to_owned(), default));
        let of_listener = chains
            .chain(default)
            .map(|(matches, chain)| vec![addresses.join(","), port.to_string(), matches, destination(chain)])
            .collect();
        rows.push((port, address, of_listener));
    }
    rows.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
    Table {
        head: vec!["ADDRESSES", "PORT", "MATCH", "DESTINATION"],
        rows: rows.into_iter().flat_map(|row| row.2).collect(),
    }
}

fn chain_match(chain: &Value) -> String {
    let of = field(chain, "filter_chain_match");
    let list = |name: &str| items(field(of, name)).map(text).collect::<Vec<_>>().join(",");
    let mut parts = Vec::new();
    let names = list("server_names");
    if !names.is_empty() {
        parts.push(format!("SNI: {names}"));
    }
    let transport = text(field(of, "transport_protocol"));
    if !transport.is_empty() {
        parts.push(format!("Trans: {transport}"));
    }
    let protocols = list("application_protocols");
    if !protocols.is_empty() {
        parts.push(format!("App: {protocols}"));
    }
    let port = number(field(of, "destination_port")).map(|port| format!(":{port}")).unwrap_or_default();
    let ranges: Vec<String> = items(field(of, "prefix_ranges"))
        .map(|range| {
            let address = text(field(range, "address_prefix"));
            let whole = if address.contains(':') { 128 } else { 32 };
            match number(field(range, "prefix_len")) {
                Some(length) if length != whole => format!("{address}/{length}"),
                _ => address.to_owned(),
            }
        })
        .collect();
    if !ranges.is_empty() {
        parts.push(format!("Addr: {}{port}", ranges.join(",")));
    } else if !port.is_empty() {
        parts.push(format!("Addr: *{port}"));
    }
    if parts.is_empty() { "ALL".to_owned() } else { parts.join("; ") }
}

fn cluster_word(name: &str) -> String {
    // Istio's own clusters of fixed names say what they are.
    if name.contains("Cluster") { name.to_owned() } else { format!("Cluster: {name}") }
}

fn destination(chain: &Value) -> String {
    let Some(last) = items(&chain["filters"]).last() else { return "Non-HTTP/Non-TCP".to_owned() };
    let config = field(last, "typed_config");
    let kind = text(&config["@type"]);
    if kind.ends_with("HttpConnectionManager") {
        let table = text(at(config, &["rds", "route_config_name"]));
        if !table.is_empty() {
            return format!("Route: {table}");
        }
        let hosts = items(at(config, &["route_config", "virtual_hosts"]));
        let mut paths: Vec<String> = hosts.flat_map(|host| items(&host["routes"])).map(route_match).collect();
        paths.dedup();
        return format!("Inline Route: {}", paths.join(", "));
    }
    if kind.ends_with("TcpProxy") {
        let name = text(&config["cluster"]);
        if !name.is_empty() {
            return cluster_word(name);
        }
        let weighted: Vec<String> = items(at(config, &["weighted_clusters", "clusters"]))
            .map(|one| format!("{}({})", text(&one["name"]), number(&one["weight"]).unwrap_or(0)))
            .collect();
        return format!("Cluster: {}", weighted.join(", "));
    }
    "Non-HTTP/Non-TCP".to_owned()
}

fn route_match(route: &Value) -> String {
    let of = &route["match"];
    let mut shown = if let Some(prefix) = field(of, "prefix").as_str() {
        format!("{prefix}*")
    } else if let Some(prefix) = field(of, "path_separated_prefix").as_str() {
        format!("PathPrefix:{prefix}")
    } else if let Some(path) = field(of, "path").as_str() {
        path.to_owned()
    } else if let Some(regex) = at(of, &["safe_regex", "regex"]).as_str() {
        format!("regex {regex}")
    } else {
        "/*".to_owned()
    };
    if items(&of["headers"]).next().is_some() {
        let names: Vec<&str> = items(&of["headers"]).map(|header| text(&header["name"])).collect();
        shown = format!("{shown} headers {}", names.join(","));
    }
    shown
}

fn domains(of: &Value) -> String {
    let all: Vec<&str> = items(&of["domains"]).map(text).collect();
    if let [only] = all[..] {
        return only.to_owned();
    }
    let bare: Vec<&str> = all.iter().copied().filter(|domain| !domain.contains(':') || domain.ends_with(']')).collect();
    match bare.len() {
        0..=2 => bare.join(", "),
        more => format!("{} + {} more...", bare[..2].join(", "), more - 2),
    }
}

/// `NAME, VHOST NAME, DOMAINS, MATCH, VIRTUAL SERVICE`
pub(super) fn routes(dump: &Value, filter: &Filter) -> Table {
    let mut tables = all(dump, "route_config");
    tables.retain(|table| fits(filter.table.as_deref(), text(&table["name"])));
    // Tables that are a port's come in the order of ports.
    tables.sort_by_key(|table| {
        let name = text(&table["name"]);
        (name.parse::<u32>().unwrap_or(u32::MAX), name.to_owned())
    });
    let mut rows = Vec::new();
    for table in tables {
        for host in items(field(table, "virtual_hosts")) {
            let row = |matches: String, service: String| {
                vec![text(&table["name"]).to_owned(), text(&host["name"]).to_owned(), domains(host), matches, service]
            };
            let before = rows.len();
            for route in items(&host["routes"]) {
                let service = istio_object(route, "virtual-service").unwrap_or_default();
                rows.push(row(route_match(route), service));
            }
            if rows.len() == before {
                rows.push(row(String::new(), "404".to_owned()));
            }
        }
    }
    Table { head: vec!["NAME", "VHOST NAME", "DOMAINS", "MATCH", "VIRTUAL SERVICE"], rows }
}

fn host_address(address: &Value) -> String {
    let pipe = text(at(address, &["pipe", "path"]));
    if !pipe.is_empty() {
        return format!("unix://{pipe}");
    }
    let (ip, port) = socket(address);
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

/// What the table says of an endpoint.
struct Endpoint {
    address: String,
    status: String,
    is_ejected: bool,
}

impl Endpoint {
    /// As `/clusters?format=json` has it.
    fn of_status(host: &Value) -> Self {
        let state = field(host, "health_status");
        let status = text(field(state, "eds_health_status"));
        Self {
            address: host_address(&host["address"]),
            status: if status.is_empty() { "HEALTHY" } else { status }.to_owned(),
            is_ejected: field(state, "failed_outlier_check").as_bool() == Some(true),
        }
    }

    /// As the control plane assigned it.
    fn of_assignment(endpoint: &Value) -> Self {
        let status = match text(field(endpoint, "health_status")) {
            "" | "UNKNOWN" => "HEALTHY",
            other => other,
        };
        Self {
            address: host_address(at(endpoint, &["endpoint", "address"])),
            status: status.to_owned(),
            is_ejected: false,
        }
    }
}

impl Filter {
    fn takes(&self, endpoint: &Endpoint, cluster: &str) -> bool {
        let (ip, port) = endpoint.address.rsplit_once(':').unwrap_or((&endpoint.address, ""));
        fits(self.cluster.as_deref(), cluster)
            && fits(self.status.as_deref(), &endpoint.status)
            && fits(self.address.as_deref(), ip)
            && self.port.is_none_or(|wanted| port == wanted.to_string())
    }
}

/// `ENDPOINT, STATUS, OUTLIER CHECK, CLUSTER`; `health` is `/clusters?format=json`, without it the
/// dump's endpoints stand with what the control plane said.
pub(super) fn endpoints(dump: &Value, health: Option<&Value>, filter: &Filter) -> Table {
    let mut rows = Vec::new();
    let mut push = |endpoint: Endpoint, cluster: &str| {
        if filter.takes(&endpoint, cluster) {
            let outlier = if endpoint.is_ejected { "FAILED" } else { "OK" };
            rows.push(vec![endpoint.address, endpoint.status, outlier.to_owned(), cluster.to_owned()]);
        }
    };
    if let Some(health) = health {
        for cluster in items(field(health, "cluster_statuses")) {
            for host in items(field(cluster, "host_statuses")) {
                push(Endpoint::of_status(host), text(&cluster["name"]));
            }
        }
    } else {
        for assignment in all(dump, "endpoint_config") {
            for endpoint in items(&assignment["endpoints"]).flat_map(|place| items(field(place, "lb_endpoints"))) {
                push(Endpoint::of_assignment(endpoint), text(field(assignment, "cluster_name")));
            }
        }
    }
    rows.sort_by(|a, b| (&a[3], &a[0]).cmp(&(&b[3], &b[0])));
    Table { head: vec!["ENDPOINT", "STATUS", "OUTLIER CHECK", "CLUSTER"], rows }
}

fn stamp(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let stamp = jiff::Timestamp::from_second(i64::try_from(seconds).unwrap_or(i64::MAX)).unwrap_or_default();
    stamp.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn decode(base64: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let (mut held, mut bits) = (0_u32, 0);
    for byte in base64.bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => continue,
        };
        held = held << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            out.push(u8::try_from(held >> bits & 0xff).unwrap_or(0));
        }
    }
    out
}

/// `RESOURCE NAME, TYPE, STATUS, VALID CERT, SERIAL NUMBER, NOT AFTER, NOT BEFORE, TRUST DOMAIN`
pub(super) fn secrets(dump: &Value, now: SystemTime) -> Table {
    let mut rows = Vec::new();
    for secret in all(dump, "secret") {
        let chain = at(secret, &["tls_certificate", "certificate_chain", "inline_bytes"]);
        let roots = at(secret, &["validation_context", "trusted_ca", "inline_bytes"]);
        let (kind, data) = if chain.is_string() { ("Cert Chain", chain) } else { ("CA", roots) };
        let name = text(&secret["name"]).to_owned();
        let certificates = identity::pem::certificates(&decode(text(data))).unwrap_or_default();
        if certificates.is_empty() {
            rows.push(vec![name.clone(), kind.to_owned(), "WARMING".to_owned(), "false".to_owned()]);
        }
        for certificate in certificates {
            let Ok(facts) = identity::peer::PeerFacts::read(&certificate) else { continue };
            let valid = facts.not_before <= now && now <= facts.not_after;
            let domain = facts.uris.iter().find_map(|uri| uri.strip_prefix("spiffe://")?.split('/').next());
            rows.push(vec![
                name.clone(),
                kind.to_owned(),
                "ACTIVE".to_owned(),
                valid.to_string(),
                facts.serial.clone(),
                stamp(facts.not_after),
                stamp(facts.not_before),
                domain.unwrap_or_default().to_owned(),
            ]);
        }
    }
    Table {
        head: vec![
            "RESOURCE NAME",
            "TYPE",
            "STATUS",
            "VALID CERT",
            "SERIAL NUMBER",
            "NOT AFTER",
            "NOT BEFORE",
            "TRUST DOMAIN",
        ],
        rows,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Both spellings, static and dynamic parts.
    fn dump() -> Value {
        let hcm =
            "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
        let tcp = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
        json!({ "configs": [
            { "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump",
              "dynamic_active_clusters": [
                { "cluster": { "name": "outbound|9080|v1|reviews.shop.svc.cluster.local", "type": "EDS",
                    "metadata": { "filter_metadata": { "istio": { "config": "/apis/networking.istio.io/v1/namespaces/shop/destination-rule/reviews" } } } } },
                { "cluster": { "name": "outbound|80||a.shop.svc.cluster.local", "type": "EDS" } },
                { "cluster": { "name": "inbound|9080||", "type": "ORIGINAL_DST" } } ],
              "staticClusters": [ { "cluster": { "name": "BlackHoleCluster" } } ] },
            { "@type": "type.googleapis.com/envoy.admin.v3.ListenersConfigDump",
              "dynamic_listeners": [
                { "name": "virtualInbound", "active_state": { "listener": {
                    "name": "virtualInbound",
                    "address": { "socket_address": { "address": "0.0.0.0", "port_value": 15006 } },
                    "filter_chains": [
                      { "filter_chain_match": { "destination_port": 9080, "transport_protocol": "tls", "application_protocols": ["istio"] },
                        "filters": [{ "typed_config": { "@type": hcm, "route_config": { "virtual_hosts": [{ "routes": [{ "match": { "prefix": "/" } }] }] } } }] },
                      { "filter_chain_match": { "prefix_ranges": [{ "address_prefix": "0.0.0.0", "prefix_len": 0 }] },
                        "filters": [{ "typed_config": { "@type": tcp, "cluster": "InboundPassthroughCluster" } }] } ] } } },
                { "name": "0.0.0.0_80", "activeState": { "listener": {
                    "name": "0.0.0.0_80",
                    "address": { "socketAddress": { "address": "0.0.0.0", "portValue": 80 } },
                    "filterChains": [{ "filters": [{ "typedConfig": { "@type": hcm, "rds": { "routeConfigName": "80" } } }] }],
                    "defaultFilterChain": { "filters": [{ "typedConfig": { "@type": tcp,
                        "weightedClusters": { "clusters": [{ "name": "a", "weight": 90 }, { "name": "b", "weight": 10 }] } } }] } } } } ] },
            { "@type": "type.googleapis.com/envoy.admin.v3.RoutesConfigDump",
              "dynamic_route_configs": [ { "route_config": { "name": "9080", "virtual_hosts": [
                { "name": "reviews.shop.svc.cluster.local:9080",
                  "domains": ["reviews.shop.svc.cluster.local", "reviews.shop.svc.cluster.local:9080", "reviews", "reviews.shop.svc", "reviews.shop"],
                  "routes": [
                    { "match": { "path": "/x", "headers": [{ "name": "end-user" }] },
                      "metadata": { "filter_metadata": { "istio": { "config": "/apis/networking.istio.io/v1/namespaces/shop/virtual-service/reviews" } } } },
                    { "match": { "safe_regex": { "regex": "/a.*" } } } ] },
                { "name": "block_all", "domains": ["*"], "routes": [] } ] } } ] },
            { "@type": "type.googleapis.com/envoy.admin.v3.EndpointsConfigDump",
              "dynamic_endpoint_configs": [ { "endpoint_config": { "cluster_name": "outbound|80||a.shop.svc.cluster.local",
                "endpoints": [{ "lb_endpoints": [
                  { "endpoint": { "address": { "socket_address": { "address": "10.0.0.2", "port_value": 8080 } } }, "health_status": "UNHEALTHY" },
                  { "endpoint": { "address": { "socket_address": { "address": "10.0.0.1", "port_value": 8080 } } } } ] }] } } ] },
        ] })
    }

    fn check(got: &Table, expect: &[&str]) {
        let rows: Vec<String> = got.rows.iter().map(|row| row.join(" ~ ")).collect();
        assert_eq!(rows, expect);
        assert!(got.rows.iter().all(|row| row.len() <= got.head.len()));
    }

    #[test]
    fn clusters_by_host() {
        check(
            &clusters(&dump(), &Filter::default()),
            &[
                " ~ 9080 ~ - ~ inbound ~ ORIGINAL_DST ~ ",
                "BlackHoleCluster ~ - ~ - ~ - ~ STATIC ~ ",
                "a.shop.svc.cluster.local ~ 80 ~ - ~ outbound ~ EDS ~ ",
                "reviews.shop.svc.cluster.local ~ 9080 ~ v1 ~ outbound ~ EDS ~ reviews.shop",
            ],
        );
        let filter = Filter { port: Some(9080), direction: Some("outbound".into()), ..Filter::default() };
        check(
            &clusters(&dump(), &filter),
            &["reviews.shop.svc.cluster.local ~ 9080 ~ v1 ~ outbound ~ EDS ~ reviews.shop"],
        );
    }

    #[test]
    fn listeners_by_port() {
        check(
            &listeners(&dump(), &Filter::default()),
            &[
                "0.0.0.0 ~ 80 ~ ALL ~ Route: 80",
                "0.0.0.0 ~ 80 ~ ALL ~ Cluster: a(90), b(10)",
                "0.0.0.0 ~ 15006 ~ Trans: tls; App: istio; Addr: *:9080 ~ Inline Route: /*",
                "0.0.0.0 ~ 15006 ~ Addr: 0.0.0.0/0 ~ InboundPassthroughCluster",
            ],
        );
    }

    #[test]
    fn routes_in_order() {
        let host = "9080 ~ reviews.shop.svc.cluster.local:9080 ~ reviews.shop.svc.cluster.local, reviews + 2 more...";
        check(
            &routes(&dump(), &Filter::default()),
            &[
                &format!("{host} ~ /x headers end-user ~ reviews.shop"),
                &format!("{host} ~ regex /a.* ~ "),
                "9080 ~ block_all ~ * ~  ~ 404",
            ],
        );
        check(&routes(&dump(), &Filter { table: Some("80".into()), ..Filter::default() }), &[]);
    }

    #[test]
    fn endpoints_with_and_without_health() {
        check(
            &endpoints(&dump(), None, &Filter::default()),
            &[
                "10.0.0.1:8080 ~ HEALTHY ~ OK ~ outbound|80||a.shop.svc.cluster.local",
                "10.0.0.2:8080 ~ UNHEALTHY ~ OK ~ outbound|80||a.shop.svc.cluster.local",
            ],
        );
        let health = json!({ "cluster_statuses": [{ "name": "c", "host_statuses": [
            { "address": { "socket_address": { "address": "::1", "port_value": 80 } },
              "health_status": { "eds_health_status": "HEALTHY", "failed_outlier_check": true } },
            { "address": { "pipe": { "path": "/run/x" } }, "health_status": {} } ] }] });
        check(
            &endpoints(&dump(), Some(&health), &Filter::default()),
            &["[::1]:80 ~ HEALTHY ~ FAILED ~ c", "unix:///run/x ~ HEALTHY ~ OK ~ c"],
        );
        let at_80 = Filter { port: Some(80), ..Filter::default() };
        let of_80 = statuses(&health, &at_80);
        assert_eq!(of_80[0]["host_statuses"], json!([health["cluster_statuses"][0]["host_statuses"][0]]));
        let elsewhere = Filter { cluster: Some("d".into()), ..Filter::default() };
        assert_eq!(statuses(&health, &elsewhere), json!([]));
    }

    #[test]
    fn messages_are_filtered_as_rows_are() {
        let names = |key: &str, filter: Filter| {
            let found = resources(&dump(), key, &filter);
            found.as_array().unwrap().iter().map(|message| text(&message["name"]).to_owned()).collect::<Vec<_>>()
        };
        let subset = Filter { subset: Some("v1".into()), ..Filter::default() };
        assert_eq!(names("cluster", subset), ["outbound|9080|v1|reviews.shop.svc.cluster.local"]);
        let at_80 = || Filter { port: Some(80), ..Filter::default() };
        assert_eq!(names("listener", at_80()), ["0.0.0.0_80"]);
        assert_eq!(names("route_config", Filter { table: Some("9080".into()), ..Filter::default() }), ["9080"]);
        assert!(names("route_config", Filter { table: Some("80".into()), ..Filter::default() }).is_empty());
        let unwell = Filter { status: Some("unhealthy".into()), ..Filter::default() };
        let left = assignments(&dump(), &unwell);
        assert_eq!(left[0]["endpoints"][0]["lb_endpoints"].as_array().unwrap().len(), 1, "{left}");
        assert_eq!(assignments(&dump(), &at_80()), json!([]));
    }

    #[test]
    fn secrets_show_validity() {
        let made = rcgen::generate_simple_self_signed(vec!["x.example.com".to_owned()]).unwrap();
        let pem: Vec<u8> = made.cert.pem().into_bytes();
        let encoded = encode(&pem);
        assert_eq!(decode(&encoded), pem);
        let dump = json!({ "configs": [{ "dynamic_active_secrets": [
            { "name": "default", "secret": { "name": "default", "tls_certificate": { "certificate_chain": { "inline_bytes": encoded } } } },
            { "name": "ROOTCA", "secret": { "name": "ROOTCA", "validation_context": { "trusted_ca": { "inline_bytes": "" } } } },
        ] }] });
        let table = secrets(&dump, SystemTime::now());
        assert_eq!(table.rows[0][..4], ["default", "Cert Chain", "ACTIVE", "true"]);
        assert_eq!(table.rows[1], ["ROOTCA", "CA", "WARMING", "false"]);
        assert_eq!(secrets(&dump, UNIX_EPOCH).rows[0][3], "false");
    }

    fn encode(bytes: &[u8]) -> String {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut out = String::new();
        for chunk in bytes.chunks(3) {
            let held = chunk.iter().fold(0_u32, |held, byte| held << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
            for at in 0..=chunk.len() {
                out.push(char::from(ALPHABET[(held >> (18 - 6 * at) & 63) as usize]));
            }
        }
        out
    }
}
