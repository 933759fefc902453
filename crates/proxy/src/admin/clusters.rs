//! Metrics of clusters, with Envoy's names and meaning.
//!
//! *Source*: Envoy, cluster manager statistics. A mesh's proxies know thousands of clusters and use a few: they
//! show those that they have used; a proxy of a bootstrap shows all, as Envoy does.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use engine::cluster::{Cluster, Health};
use engine::config::RuntimeConfig;
use engine::shared::{GrpcTally, SharedCluster, Tally};
use telemetry::text;

use super::Context;

const LABEL: &str = "envoy_cluster_name";

/// One cluster: its name as Envoy writes it, and what there is to say.
struct Row {
    name: String,
    labels: String,
    shared: Option<Arc<SharedCluster>>,
    members: u64,
    healthy: u64,
}

impl Row {
    fn new(config: &RuntimeConfig, cluster: &Arc<Cluster>, shared: Option<Arc<SharedCluster>>) -> Self {
        // Envoy's separators are not part of names, nor is the end that Istio gives them for its own tags
        let name = cluster.shown_name.trim_end_matches(';').replace(':', "_");
        let hosts = shared.as_ref().map(|shared| shared.hosts()).unwrap_or_default();
        let ejected: Vec<_> = hosts.iter().filter(|host| host.is_ejected()).map(|host| &host.address).collect();
        let (mut members, mut healthy) = (0, 0);
        for endpoint in config.endpoints_of(cluster).into_iter().flat_map(|set| set.iter()) {
            members += 1;
            healthy += u64::from(endpoint.health == Health::Healthy && !ejected.contains(&&endpoint.address));
        }
        Self { labels: text::labels([(LABEL, name.as_str())]), name, shared, members, healthy }
    }

    fn tally(&self, of: fn(&SharedCluster) -> &Tally) -> u64 {
        self.shared.as_ref().map_or(0, |shared| of(shared).get())
    }

    fn now(&self, of: fn(&SharedCluster) -> u32) -> u64 {
        self.shared.as_ref().map_or(0, |shared| of(shared).into())
    }
}

/// Writes the metrics of all clusters.
pub(super) fn render(out: &mut String, context: &Context) {
    type Read = fn(&Row) -> u64;
    let config = context.shared.published.load();
    let mut met: HashMap<_, _> =
        context.shared.hosts.clusters().into_iter().map(|shared| (Arc::clone(&shared.name), shared)).collect();
    let rows: Vec<Row> = config
        .clusters
        .iter()
        .map(|(name, cluster)| (cluster, met.remove(name)))
        .filter(|(_, shared)| shared.is_some() || context.shared.is_standalone)
        .map(|(cluster, shared)| Row::new(&config, cluster, shared))
        .collect();
    let families: [(&str, &str, Read); 13] = [
        ("upstream_cx_total", "counter", |row| row.tally(|of| &of.tallies.connections)),
        ("upstream_cx_connect_fail", "counter", |row| row.tally(|of| &of.tallies.connect_failures)),
        ("upstream_cx_active", "gauge", |row| row.now(|of| of.connections.get())),
        ("upstream_rq_total", "counter", |row| row.tally(|of| &of.tallies.requests)),
        ("upstream_rq_active", "gauge", |row| row.now(|of| of.requests.get())),
        ("upstream_rq_pending_active", "gauge", |row| row.now(|of| of.pending.get())),
        ("upstream_rq_pending_overflow", "counter", |row| row.tally(|of| &of.tallies.overflows)),
        ("upstream_rq_retry", "counter", |row| row.tally(|of| &of.tallies.retries)),
        ("upstream_rq_retry_overflow", "counter", |row| row.tally(|of| &of.tallies.retry_overflows)),
        ("upstream_rq_timeout", "counter", |row| row.tally(|of| &of.tallies.timeouts)),
        ("outlier_detection_ejections_active", "gauge", |row| row.now(|of| of.ejected.get())),
        ("membership_total", "gauge", |row| row.members),
        ("membership_healthy", "gauge", |row| row.healthy),
    ];
    for (name, kind, read) in families {
        let name = format!("envoy_cluster_{name}");
        text::type_line(out, &name, kind);
        // clusters may share a name, as those of passed-through connections do: then they are one
        let mut sums = BTreeMap::<&str, u64>::new();
        for row in &rows {
            *sums.entry(&row.labels).or_default() += read(row);
        }
        for (labels, sum) in sums {
            text::sample(out, &name, labels, sum);
        }
    }
    let mut classes = BTreeMap::<&str, [u64; 5]>::new();
    for row in &rows {
        let Some(shared) = &row.shared else { continue };
        let sums = classes.entry(&row.name).or_default();
        for (sum, tally) in sums.iter_mut().zip(&shared.tallies.classes) {
            *sum += tally.get();
        }
    }
    let classes = classes.into_iter().map(|(name, counts)| ((LABEL, name), counts));
    text::classes(out, "envoy_cluster_upstream_rq_xx", classes);
    grpc(out, &rows);
}

/// What calls of gRPC came to; only of what there was.
///
/// *Source*: Envoy, `grpc_stats`: `cluster.NAME.grpc.[SERVICE.METHOD.]WHAT`, and the labels of its default tags.
fn grpc(out: &mut String, rows: &[Row]) {
    // by family, each with one line of its type
    let mut samples = Samples::new();
    for row in rows {
        let Some(shared) = &row.shared else { continue };
        if let Some(all) = shared.grpc.met() {
            grpc_samples(&mut samples, "", &row.labels, all);
        }
        for ((service, method), tally) in shared.grpc.methods() {
            let (name, labels) = tagged(&row.name, &service, &method);
            grpc_samples(&mut samples, &name, &labels, &tally);
        }
    }
    let mut last = String::new();
    for ((name, labels), value) in samples {
        let name = format!("envoy_cluster_grpc_{name}");
        if name != last {
            text::type_line(out, &name, "counter");
            last.clone_from(&name);
        }
        text::sample(out, &name, &labels, value);
    }
}

/// Values by name and labels.
type Samples = BTreeMap<(String, String), u64>;

/// What Envoy's default tags make of `SERVICE.METHOD`: the first two words are labels, and what follows them stays in
/// the name. Only of a service without dots these are the service and the method.
fn tagged(cluster: &str, service: &str, method: &str) -> (String, String) {
    let whole = format!("{service}.{method}");
    let mut words = whole.splitn(3, '.');
    let labels = text::labels([
        ("envoy_grpc_bridge_service", words.next().unwrap_or_default()),
        ("envoy_grpc_bridge_method", words.next().unwrap_or_default()),
        (LABEL, cluster),
    ]);
    let rest = words.next().unwrap_or_default();
    let mut name = rest.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    if !name.is_empty() {
        name.push('_');
    }
    (name, labels)
}

fn grpc_samples(into: &mut Samples, prefix: &str, labels: &str, tally: &GrpcTally) {
    let counts = tally.statuses.each_ref().map(Tally::get);
    let (named, other) = counts.split_at(counts.len() - 1);
    let success = named[0];
    let failure = named[1..].iter().chain(other).sum::<u64>();
    let numbers = named.iter().enumerate().map(|(status, count)| (status.to_string(), *count));
    let words = [
        ("success", success),
        ("failure", failure),
        ("total", success + failure),
        ("request_message_count", tally.request_messages.get()),
        ("response_message_count", tally.response_messages.get()),
    ];
    let words = words.map(|(name, count)| (name.to_owned(), count));
    for (name, count) in numbers.chain(words).filter(|(_, count)| *count > 0) {
        *into.entry((format!("{prefix}{name}"), labels.to_owned())).or_default() += count;
    }
}
