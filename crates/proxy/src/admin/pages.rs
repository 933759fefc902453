//! Pages of the admin interface that are text or small JSON.

use std::fmt::Write as _;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use engine::regex::Regex;
use engine::unsupported::Unsupported;
use percent_encoding::percent_decode_str;
use serde_json::json;
use telemetry::text;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use types::wellknown::type_urls;

use super::Context;
use crate::control::Inspection;
use workers::secrets::{Secret, SecretStore};

/// Prometheus text.
pub(super) fn metrics(context: &Context) -> String {
    filtered(context, None)
}

/// What of names is shown: those in which an expression is found.
///
/// *Source*: Envoy, `/stats?filter=REGEX`.
pub(super) struct Filter(Regex);

impl Filter {
    /// *Errors*: what is no expression.
    pub(super) fn new(query: &str) -> Result<Self, Unsupported> {
        let text = percent_decode_str(query).decode_utf8_lossy();
        Regex::new(&text)?;
        Regex::new(&format!(".*(?:{text}).*")).map(Self)
    }

    fn lets_through(&self, name: &str) -> bool {
        self.0.is_match(name.as_bytes())
    }
}

/// Prometheus text of the metrics whose dotted names a filter lets through, with the labels of all.
pub(super) fn filtered(context: &Context, filter: Option<&Filter>) -> String {
    let all = all_metrics(context);
    if filter.is_none() && context.stats_tags.is_empty() {
        return all;
    }
    let mut out = String::new();
    let mut kind = "";
    for line in all.lines() {
        let Some(sample) = text::Sample::read(line) else {
            kind = line;
            continue;
        };
        if filter.is_some_and(|filter| !filter.lets_through(&sample.dotted())) {
            continue;
        }
        if !kind.is_empty() {
            _ = writeln!(out, "{}", std::mem::take(&mut kind));
        }
        let comma = if sample.labels.is_empty() || context.stats_tags.is_empty() { "" } else { "," };
        text::sample(&mut out, sample.name, &format!("{}{comma}{}", context.stats_tags, sample.labels), sample.value);
    }
    out
}

fn all_metrics(context: &Context) -> String {
    let mut out = String::new();
    context.shared.metrics.render(&mut out);
    super::clusters::render(&mut out, context);
    let state = *context.state.borrow();
    _ = writeln!(out, "# TYPE envoy_server_live gauge\nenvoy_server_live {}", u8::from(state.is_ready()));
    _ = writeln!(out, "# TYPE lateen_config_generation gauge\nlateen_config_generation {}", state.generation);
    expiry(&mut out, ends(&context.shared.secrets.load()));
    let dropped = context.shared.sinks.dropped();
    _ = writeln!(
        out,
        "# TYPE lateen_access_log_lines_dropped_total counter\nlateen_access_log_lines_dropped_total {dropped}"
    );
    out
}

/// When each secret ends, by name.
fn ends(secrets: &SecretStore) -> Vec<(String, SystemTime)> {
    let end = |secret: &Secret| match secret {
        Secret::Certificate(keys) => keys.facts().ok().map(|facts| facts.not_after),
        Secret::Roots(trust) => trust.roots.not_after(),
    };
    secrets.sorted().into_iter().filter_map(|(name, secret)| Some((name.to_string(), end(secret)?))).collect()
}

/// What is left of certificates, by name; below zero once they have ended.
pub(crate) fn expiry(out: &mut String, ends: Vec<(String, SystemTime)>) {
    const NAME: &str = "istio_agent_cert_expiry_seconds";
    if ends.is_empty() {
        return;
    }
    let now = SystemTime::now();
    text::type_line(out, NAME, "gauge");
    for (name, end) in ends {
        let left =
            end.duration_since(now).map_or_else(|past| -past.duration().as_secs_f64(), |left| left.as_secs_f64());
        text::sample(out, NAME, &text::labels([("resource_name", name.as_str())]), left);
    }
}

/// Envoy's plain form: `cluster.NAME.upstream_rq_total: value`.
pub(super) fn stats(context: &Context, filter: Option<&Filter>) -> String {
    let mut out = String::new();
    for sample in all_metrics(context).lines().filter_map(text::Sample::read) {
        let name = sample.dotted();
        if filter.is_none_or(|filter| filter.lets_through(&name)) {
            _ = writeln!(out, "{name}: {}", sample.value);
        }
    }
    out
}

/// The application's own metrics; empty if they cannot be had in time.
pub(crate) async fn scrape(port: u16, path: &str) -> String {
    let fetching = async {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: localhost:{port}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(16 << 20).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let Ok(Ok(answer)) = tokio::time::timeout(Duration::from_secs(5), fetching).await else { return String::new() };
    let answer = String::from_utf8_lossy(&answer);
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.") && head.contains(" 200") => body.to_owned(),
        _ => String::new(),
    }
}

pub(super) fn server_info(context: &Context) -> String {
    let state = *context.state.borrow();
    let word = if state.is_ready() {
        "LIVE"
    } else if state.configured {
        "DRAINING"
    } else {
        "PRE_INITIALIZING"
    };
    let version = format!("lateen/{}", env!("CARGO_PKG_VERSION"));
    let zone = context.node.locality.as_ref().map_or("", |locality| &locality.zone);
    let uptime = format!("{}s", context.started.elapsed().as_secs());
    json!({
        "version": version,
        "state": word,
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
        "hot_restart_version": "disabled",
        "command_line_options": {
            "concurrency": context.concurrency,
            "drain_time": format!("{}s", context.shared.drain_time.as_secs()),
            "service_node": context.node.id,
            "service_cluster": context.node.cluster,
            "service_zone": zone,
        },
        "node": { "id": context.node.id, "cluster": context.node.cluster, "locality": { "zone": zone } },
    })
    .to_string()
}

pub(super) fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.trim().strip_suffix(" kB")).and_then(|kb| kb.trim().parse::<u64>().ok()).unwrap_or(0)
            * 1024
    };
    json!({ "allocated": of("VmRSS:").to_string(), "heap_size": of("VmData:").to_string(), "total_physical_bytes": of("VmRSS:").to_string() })
        .to_string()
}

pub(super) fn certs(context: &Context) -> String {
    let store = context.shared.secrets.load();
    let list: Vec<_> = store
        .sorted()
        .into_iter()
        .filter_map(|(name, secret)| match secret {
            Secret::Certificate(keys) => keys.facts().ok().map(|facts| (name, facts)),
            Secret::Roots(_) => None,
        })
        .map(|(name, facts)| {
            let seconds =
                |time: SystemTime| time.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
            json!({
                "name": &**name,
                "cert_chain": [{
                    "serial_number": facts.serial,
                    "subject_alt_names": facts.uris.iter().map(|uri| json!({ "uri": uri })).collect::<Vec<_>>(),
                    "valid_from_seconds": seconds(facts.not_before),
                    "expiration_seconds": seconds(facts.not_after),
                }],
            })
        })
        .collect();
    json!({ "certificates": list }).to_string()
}

/// What Envoy's pages have no place for: `{live, generation, clusters: {NAME: {connections, pending,
/// requests, retries, ejected}}}`. Clusters at rest are left out.
pub(super) fn state(context: &Context) -> String {
    let state = *context.state.borrow();
    let busy = context.shared.hosts.clusters().into_iter().filter_map(|cluster| {
        let counts = [
            ("connections", cluster.connections.get()),
            ("pending", cluster.pending.get()),
            ("requests", cluster.requests.get()),
            ("retries", cluster.retries.get()),
            ("ejected", cluster.ejected.get()),
        ];
        let value: serde_json::Map<_, _> =
            counts.into_iter().map(|(name, count)| (name.to_owned(), count.into())).collect();
        counts.iter().any(|(_, count)| *count > 0).then(|| (cluster.name.to_string(), value.into()))
    });
    let clusters: serde_json::Map<String, serde_json::Value> = busy.collect();
    json!({ "live": state.is_ready(), "generation": state.generation, "clusters": clusters }).to_string()
}

/// Envoy's lines: `cluster::address::key::value`.
pub(super) fn clusters(context: &Context, inspection: &Inspection) -> String {
    let mut out = String::new();
    for (name, cluster) in inspection.config.clusters.iter() {
        let limits = &cluster.limits;
        _ = writeln!(out, "{name}::observability_name::{name}");
        for (key, value) in [
            ("max_connections", limits.connections_max),
            ("max_pending_requests", limits.pending_max),
            ("max_requests", limits.requests_max),
            ("max_retries", limits.retries_max),
        ] {
            _ = writeln!(out, "{name}::default_priority::{key}::{value}");
        }
        let shared = context.shared.hosts.clusters().into_iter().find(|shared| shared.name == *name);
        let Some(set) = inspection.config.endpoints_of(cluster) else { continue };
        for locality in &set.localities {
            for endpoint in &locality.endpoints {
                let at = &endpoint.address;
                let host =
                    shared.as_ref().and_then(|shared| shared.hosts().into_iter().find(|host| host.address == *at));
                let (connections, requests, ejected) = host.map_or((0, 0, false), |host| {
                    (host.connections.get(), host.requests.get(), host.ejected.load(Relaxed))
                });
                let health = match (endpoint.health, ejected) {
                    (_, true) => "/failed_outlier_check",
                    (engine::cluster::Health::Unhealthy, _) => "/failed_eds_health",
                    (engine::cluster::Health::Degraded, _) => "/degraded_eds_health",
                    (engine::cluster::Health::Healthy, _) => "healthy",
                };
                _ = writeln!(out, "{name}::{at}::cx_active::{connections}");
                _ = writeln!(out, "{name}::{at}::rq_active::{requests}");
                _ = writeln!(out, "{name}::{at}::health_flags::{health}");
                _ = writeln!(out, "{name}::{at}::weight::{}", endpoint.weight);
                _ = writeln!(out, "{name}::{at}::region::{}", locality.locality.region);
                _ = writeln!(out, "{name}::{at}::zone::{}", locality.locality.zone);
                _ = writeln!(out, "{name}::{at}::sub_zone::{}", locality.locality.sub_zone);
                _ = writeln!(out, "{name}::{at}::priority::{}", locality.priority);
            }
        }
    }
    out
}

pub(super) fn clusters_json(context: &Context, inspection: &Inspection) -> String {
    let shared = context.shared.hosts.clusters();
    let fixed: std::collections::BTreeSet<&str> =
        inspection.raw.of(type_urls::CLUSTER).filter(|(_, kept)| kept.is_static).map(|(name, _)| &**name).collect();
    let list: Vec<_> = inspection
        .config
        .clusters
        .iter()
        .map(|(name, cluster)| {
            let known = shared.iter().find(|shared| shared.name == *name);
            let hosts: Vec<_> = inspection
                .config
                .endpoints_of(cluster)
                .into_iter()
                .flat_map(|set| &set.localities)
                .flat_map(|locality| locality.endpoints.iter().map(move |endpoint| (locality, endpoint)))
                .map(|(locality, endpoint)| {
                    let host = known.and_then(|known| known.hosts().into_iter().find(|host| host.address == endpoint.address));
                    let ejected = host.as_ref().is_some_and(|host| host.is_ejected());
                    let eds = match endpoint.health {
                        engine::cluster::Health::Healthy => "HEALTHY",
                        engine::cluster::Health::Degraded => "DEGRADED",
                        engine::cluster::Health::Unhealthy => "UNHEALTHY",
                    };
                    let address = match endpoint.address.ip() {
                        Some(ip) => json!({ "socket_address": { "address": ip.ip().to_string(), "port_value": ip.port() } }),
                        None => json!({ "pipe": { "path": endpoint.address.to_string() } }),
                    };
                    json!({
                        "address": address,
                        "health_status": { "eds_health_status": eds, "failed_outlier_check": ejected },
                        "weight": endpoint.weight,
                        "priority": locality.priority,
                        "locality": { "region": locality.locality.region, "zone": locality.locality.zone, "sub_zone": locality.locality.sub_zone },
                        "stats": [
                            { "name": "cx_active", "type": "GAUGE", "value": host.as_ref().map_or(0, |host| host.connections.get()).to_string() },
                            { "name": "rq_active", "type": "GAUGE", "value": host.as_ref().map_or(0, |host| host.requests.get()).to_string() },
                        ],
                    })
                })
                .collect();
            json!({ "name": &**name, "observability_name": &**name, "added_via_api": !fixed.contains(&**name), "host_statuses": hosts })
        })
        .collect();
    json!({ "cluster_statuses": list }).to_string()
}

pub(super) fn listeners(inspection: &Inspection) -> String {
    tracing::trace!(connections = inspection.live, "listeners shown");
    inspection.bound.iter().fold(String::new(), |mut out, (name, address)| {
        _ = writeln!(out, "{name}::{address}");
        out
    })
}

pub(super) fn listeners_json(inspection: &Inspection) -> String {
    let list: Vec<_> = inspection
        .bound
        .iter()
        .map(|(name, address)| {
            json!({
                "name": name,
                "local_address": { "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } },
            })
        })
        .collect();
    json!({ "listener_statuses": list }).to_string()
}
