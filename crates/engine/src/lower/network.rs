//! Network filters and the filters that are both network and upstream filters.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::mongo_proxy::v3::MongoProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use envoy_types::pb::google::protobuf::{Any, Struct};
use prost::Message;
use proto::filters::metadata_exchange::MetadataExchange;
use serde_json::Value;

use super::cluster::optional_duration;
use super::common::{json_struct, nothing_left};
use crate::authz::Rbac;
use crate::chain::{Direction, Terminal};
use crate::hcm::Stats;
use crate::stream::{NetworkFilter, TcpProxy};
use crate::unsupported::{Unsupported, Within, type_name, unpack};

/// A message that may come wrapped in a `TypedStruct` (Istio writes its own filters so).
pub(super) enum Typed<'a> {
    /// As itself.
    Message(&'a Any),
    /// Type and JSON.
    Json(String, Value),
}

/// Unwraps a `TypedStruct` if it is one.
pub(super) fn unwrap(any: &Any) -> Result<Typed<'_>, Unsupported> {
    if !matches!(type_name(&any.type_url), "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct") {
        return Ok(Typed::Message(any));
    }
    let typed = TypedStruct::decode(any.value.as_slice())
        .map_err(|error| Unsupported::new("typed_config", format!("cannot be decoded: {error}")))?;
    Ok(Typed::Json(type_name(&typed.type_url).to_owned(), json_struct(&typed.value.unwrap_or_default())))
}

/// `udpa.type.v1.TypedStruct` and `xds.type.v3.TypedStruct`, which are alike.
#[derive(Clone, PartialEq, Message)]
struct TypedStruct {
    /// Type of the message that the value stands for.
    #[prost(string, tag = "1")]
    type_url: String,
    /// The message as JSON.
    #[prost(message, optional, tag = "2")]
    value: Option<Struct>,
}

impl Typed<'_> {
    /// The full name of the inner type.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Message(any) => type_name(&any.type_url),
            Self::Json(name, _) => name,
        }
    }
}

/// The protocol of `istio.metadata_exchange`, if the message is one.
pub(super) fn metadata_exchange(any: &Any) -> Result<Option<Box<str>>, Unsupported> {
    let typed = unwrap(any)?;
    if typed.name() != "envoy.tcp.metadataexchange.config.MetadataExchange" {
        return Ok(None);
    }
    let protocol = match typed {
        Typed::Message(any) => unpack::<MetadataExchange>(any, "typed_config")?.protocol,
        Typed::Json(_, value) => value.get("protocol").and_then(Value::as_str).unwrap_or_default().to_owned(),
    };
    Ok(Some(protocol.into()))
}

/// Lowers the network filters of a chain: all but the last, and the last.
pub(super) fn chain(
    filters: Vec<pb::Filter>,
    direction: Direction,
) -> Result<(Vec<NetworkFilter>, Terminal), Unsupported> {
    let mut before = Vec::new();
    let mut terminal = None;
    for (index, filter) in filters.into_iter().enumerate() {
        let path = format!("filters[{index}]");
        if terminal.is_some() {
            return Err(Unsupported::new(path, "stands behind the last filter"));
        }
        let Some(pb::filter::ConfigType::TypedConfig(any)) = filter.config_type else {
            return Err(Unsupported::missing(format!("{path}.typed_config")));
        };
        match one(&any, direction).within(&format!("{path}.typed_config"))? {
            Lowered::Before(filter) => before.push(filter),
            Lowered::Last(last) => terminal = Some(last),
        }
    }
    let terminal =
        terminal.ok_or_else(|| Unsupported::new("filters", "must end in a connection manager or a TCP proxy"))?;
    Ok((before, terminal))
}

enum Lowered {
    Before(NetworkFilter),
    Last(Terminal),
}

fn one(any: &Any, direction: Direction) -> Result<Lowered, Unsupported> {
    if let Some(protocol) = metadata_exchange(any)? {
        return Ok(Lowered::Before(NetworkFilter::MetadataExchange { protocol }));
    }
    let typed = unwrap(any)?;
    Ok(match typed.name() {
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => {
            Lowered::Last(Terminal::Http(Arc::new(super::hcm::lower(unpack(any, "")?, direction)?)))
        }
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy" => {
            Lowered::Last(Terminal::Tcp(Arc::new(tcp_proxy(unpack(any, "")?)?)))
        }
        "envoy.extensions.filters.network.rbac.v3.RBAC" => {
            Lowered::Before(NetworkFilter::Rbac(Box::new(Rbac::lower_network(&unpack(any, "")?)?)))
        }
        "stats.PluginConfig" => Lowered::Before(NetworkFilter::Stats(stats(&typed)?)),
        "envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy" => {
            let mut config: MongoProxy = unpack(any, "")?;
            // what it counts, and how deep it looks to count
            config.stat_prefix.clear();
            config.commands.clear();
            config.max_bson_depth = None;
            nothing_left(&config)?;
            Lowered::Before(NetworkFilter::MongoProxy)
        }
        other => return Err(Unsupported::new("", format!("{other} is not supported"))),
    })
}

/// `istio.stats`, as message or JSON. Overrides of metrics are taken without effect.
pub(super) fn stats(typed: &Typed<'_>) -> Result<Stats, Unsupported> {
    let disable_host_header_fallback = match typed {
        Typed::Message(any) => {
            let mut config: proto::filters::stats::PluginConfig = unpack(any, "")?;
            config.metrics.clear();
            let disabled = std::mem::take(&mut config.disable_host_header_fallback);
            // How often open connections are reported, and how long series are kept that nobody feeds.
            config.tcp_reporting_duration = None;
            config.rotation_interval = None;
            config.graceful_deletion_interval = None;
            nothing_left(&config)?;
            disabled
        }
        Typed::Json(_, value) => {
            let known = |key: &str| matches!(key, "disable_host_header_fallback" | "metrics");
            if let Some(unknown) = value.as_object().and_then(|fields| fields.keys().find(|key| !known(key))) {
                return Err(Unsupported::not_built(unknown));
            }
            value.get("disable_host_header_fallback").and_then(Value::as_bool).unwrap_or_default()
        }
    };
    Ok(Stats { disable_host_header_fallback })
}

fn tcp_proxy(mut proto: tcp::TcpProxy) -> Result<TcpProxy, Unsupported> {
    use envoy_types::pb::envoy::r#type::v3::hash_policy::PolicySpecifier;
    use tcp::tcp_proxy::ClusterSpecifier;
    let clusters = match proto.cluster_specifier.take() {
        Some(ClusterSpecifier::Cluster(name)) if !name.is_empty() => vec![(name.into(), 1)],
        Some(ClusterSpecifier::WeightedClusters(weighted)) => {
            let mut all = Vec::new();
            for (index, cluster) in weighted.clusters.into_iter().enumerate() {
                if cluster.metadata_match.is_some() || cluster.name.is_empty() {
                    return Err(Unsupported::not_built(format!("weighted_clusters.clusters[{index}]")));
                }
                all.push((cluster.name.into(), cluster.weight));
            }
            if all.iter().map(|(_, weight)| u64::from(*weight)).sum::<u64>() == 0 {
                return Err(Unsupported::new("weighted_clusters.clusters", "weights must sum to more than 0"));
            }
            all
        }
        _ => return Err(Unsupported::missing("cluster")),
    };
    let mut hash_source_ip = false;
    for policy in std::mem::take(&mut proto.hash_policy) {
        match policy.policy_specifier {
            Some(PolicySpecifier::SourceIp(_)) => hash_source_ip = true,
            _ => return Err(Unsupported::not_built("hash_policy")),
        }
    }
    let idle = optional_duration(proto.idle_timeout.take(), "idle_timeout")?.unwrap_or(Duration::from_hours(1));
    let duration_max =
        optional_duration(proto.max_downstream_connection_duration.take(), "max_downstream_connection_duration")?;
    let lowered = TcpProxy {
        stat_prefix: std::mem::take(&mut proto.stat_prefix).into(),
        clusters,
        idle_timeout: (!idle.is_zero()).then_some(idle),
        connect_attempts_max: proto.max_connect_attempts.take().map_or(1, |value| value.value.max(1)),
        connection_duration_max: duration_max,
        hash_source_ip,
        access_log: super::access_log::lower(&std::mem::take(&mut proto.access_log)).within("access_log")?,
    };
    nothing_left(&proto)?;
    Ok(lowered)
}
