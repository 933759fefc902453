//! Listeners and filter chains.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use envoy_types::pb::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3 as proxy_protocol;
use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use envoy_types::pb::google::protobuf::Any;
use prost::Message;

use super::cluster::{keepalive_of, optional_duration};
use super::common::{fingerprint, nothing_left, provenance, socket_address};
use super::{access_log, network, tls};
use crate::chain::{
    ChainMatch, Direction, FilterChain, Inspector, Listener, ListenerFilters, PortPredicate, ProxyProtocolIn,
    SourceType,
};
use crate::config::Name;
use crate::facts::Transport;
use crate::matcher::Cidr;
use crate::unsupported::{Unsupported, Within, each, type_name, unpack};

/// Envoy's wait of listener filters where none is set.
const DEFAULT_FILTERS_TIMEOUT: Duration = Duration::from_secs(15);

pub(super) fn lower(any: &Any) -> Result<(Name, Listener), Unsupported> {
    let mut proto: pb::Listener = unpack(any, "")?;
    let name = Name::from(std::mem::take(&mut proto.name).as_str());
    if name.is_empty() {
        return Err(Unsupported::missing("name"));
    }
    let address = proto.address.take().ok_or_else(|| Unsupported::missing("address"))?;
    let address = socket_address(&address).within("address")?;
    let additional_addresses =
        each(&std::mem::take(&mut proto.additional_addresses), "additional_addresses", |extra| {
            let address = extra.address.as_ref().ok_or_else(|| Unsupported::missing("address"))?;
            socket_address(address).within("address")
        })?;
    let direction = match std::mem::take(&mut proto.traffic_direction) {
        1 => Direction::Inbound,
        2 => Direction::Outbound,
        _ => Direction::Unspecified,
    };
    let filters = listener_filters(&mut proto)?;
    let mut chains = Vec::with_capacity(proto.filter_chains.len());
    for (index, chain) in std::mem::take(&mut proto.filter_chains).into_iter().enumerate() {
        let chain = lower_chain(&name, chain, direction).within_item("filter_chains", index)?;
        if let Some(twin) = chains.iter().find(|other: &&Arc<FilterChain>| other.matches == chain.matches) {
            let reason = format!("has the same match as chain {:?}", twin.name);
            return Err(Unsupported::new(format!("filter_chains[{index}].filter_chain_match"), reason));
        }
        chains.push(Arc::new(chain));
    }
    let default_chain = match proto.default_filter_chain.take() {
        None => None,
        Some(chain) => Some(Arc::new(lower_chain(&name, chain, direction).within("default_filter_chain")?)),
    };
    if chains.is_empty() && default_chain.is_none() {
        return Err(Unsupported::new("filter_chains", "holds no chain"));
    }
    let metadata = proto.metadata.take();
    let flag = |value: Option<envoy_types::pb::google::protobuf::BoolValue>| value.map(|value| value.value);
    #[expect(deprecated, reason = "istiod writes the older fields in places")]
    let (use_original_dst, bind_to_port) = (
        flag(proto.use_original_dst.take()).unwrap_or(false),
        flag(proto.bind_to_port.take()).unwrap_or(true)
            && proto.deprecated_v1.take().and_then(|v1| flag(v1.bind_to_port)).unwrap_or(true),
    );
    let listener = Listener {
        address,
        additional_addresses,
        bind_to_port,
        use_original_dst,
        transparent: flag(proto.transparent.take()).unwrap_or(false),
        filters,
        direction,
        chains,
        default_chain,
        access_log: access_log::lower(&std::mem::take(&mut proto.access_log)).within("access_log")?,
        buffer_max: proto.per_connection_buffer_limit_bytes.take().map_or(1 << 20, |value| value.value),
        keepalive: proto.tcp_keepalive.take().map(|keepalive| keepalive_of(&keepalive)),
        provenance: provenance(metadata.as_ref()),
        fingerprint: fingerprint(any),
        name: name.clone(),
    };
    harmless(&mut proto);
    nothing_left(&proto)?;
    Ok((name, listener))
}

#[expect(deprecated, reason = "older spellings are harmless too")]
fn harmless(proto: &mut pb::Listener) {
    proto.stat_prefix.clear();
    proto.stats_matcher = None;
    proto.drain_type = 0;
    proto.connection_balance_config = None;
    proto.reuse_port = false;
    proto.enable_reuse_port = None;
    proto.tcp_backlog_size = None;
    proto.tcp_fast_open_queue_length = None;
    proto.max_connections_to_accept_per_socket_event = None;
    proto.ignore_global_conn_limit = false;
    proto.bypass_overload_manager = false;
    proto.freebind = None;
}

fn listener_filters(proto: &mut pb::Listener) -> Result<ListenerFilters, Unsupported> {
    let timeout = optional_duration(proto.listener_filters_timeout.take(), "listener_filters_timeout")?;
    let timeout = timeout.unwrap_or(DEFAULT_FILTERS_TIMEOUT);
    let mut filters = ListenerFilters {
        timeout: (!timeout.is_zero()).then_some(timeout),
        continue_on_timeout: std::mem::take(&mut proto.continue_on_listener_filters_timeout),
        ..ListenerFilters::default()
    };
    for (index, filter) in std::mem::take(&mut proto.listener_filters).into_iter().enumerate() {
        listener_filter(&mut filters, filter).within_item("listener_filters", index)?;
    }
    Ok(filters)
}

fn listener_filter(filters: &mut ListenerFilters, mut proto: pb::ListenerFilter) -> Result<(), Unsupported> {
    let Some(pb::listener_filter::ConfigType::TypedConfig(any)) = proto.config_type.take() else {
        return Err(Unsupported::missing("typed_config"));
    };
    let disabled = proto.filter_disabled.take().map(predicate).transpose().within("filter_disabled")?;
    match type_name(&any.type_url) {
        "envoy.extensions.filters.listener.original_dst.v3.OriginalDst" if disabled.is_none() => {
            let _: OriginalDst = unpack(&any, "typed_config")?;
            filters.original_dst = true;
        }
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector" => {
            let mut config: TlsInspector = unpack(&any, "typed_config")?;
            // how much is read at a time
            config.initial_read_buffer_size = None;
            // they are not told; whoever wants to be is refused
            config.enable_ja3_fingerprinting = config.enable_ja3_fingerprinting.filter(|wanted| wanted.value);
            config.enable_ja4_fingerprinting = config.enable_ja4_fingerprinting.filter(|wanted| wanted.value);
            nothing_left(&config).within("typed_config")?;
            filters.tls_inspector = Some(Inspector { disabled });
        }
        "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector" => {
            let _: HttpInspector = unpack(&any, "typed_config")?;
            filters.http_inspector = Some(Inspector { disabled });
        }
        "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol" if disabled.is_none() => {
            let mut config: proxy_protocol::ProxyProtocol = unpack(&any, "typed_config")?;
            let optional = std::mem::take(&mut config.allow_requests_without_proxy_protocol);
            config.stat_prefix.clear();
            nothing_left(&config).within("typed_config")?;
            filters.proxy_protocol = Some(ProxyProtocolIn { optional });
        }
        other => return Err(Unsupported::new("typed_config", format!("{other} is not supported here"))),
    }
    Ok(())
}

fn predicate(proto: pb::ListenerFilterChainMatchPredicate) -> Result<PortPredicate, Unsupported> {
    use pb::listener_filter_chain_match_predicate::Rule;
    let set = |set: pb::listener_filter_chain_match_predicate::MatchSet| {
        set.rules.into_iter().map(predicate).collect::<Result<Vec<_>, _>>()
    };
    Ok(match proto.rule {
        Some(Rule::AnyMatch(true)) => PortPredicate::Any,
        Some(Rule::DestinationPortRange(range)) => PortPredicate::Range(
            u32::try_from(range.start).unwrap_or_default(),
            u32::try_from(range.end).unwrap_or_default(),
        ),
        Some(Rule::OrMatch(rules)) => PortPredicate::Or(set(rules)?),
        Some(Rule::AndMatch(rules)) => PortPredicate::And(set(rules)?),
        Some(Rule::NotMatch(rule)) => PortPredicate::Not(Box::new(predicate(*rule)?)),
        Some(Rule::AnyMatch(false)) | None => return Err(Unsupported::missing("rule")),
    })
}

fn lower_chain(listener: &Name, mut proto: pb::FilterChain, direction: Direction) -> Result<FilterChain, Unsupported> {
    let bytes = proto.encode_to_vec();
    let matched = proto.filter_chain_match.take();
    let place = matched.as_ref().map(Message::encode_to_vec).unwrap_or_default();
    let key = xxhash_rust::xxh64::xxh64(&place, xxhash_rust::xxh64::xxh64(proto.name.as_bytes(), 1));
    let matches = matched.map(chain_match).transpose().within("filter_chain_match")?.unwrap_or_default();
    let socket = proto.transport_socket.take();
    let tls = socket.as_ref().map(tls::downstream).transpose().within("transport_socket")?.flatten();
    let handshake_timeout =
        optional_duration(proto.transport_socket_connect_timeout.take(), "transport_socket_connect_timeout")?;
    let (filters, terminal) = network::chain(std::mem::take(&mut proto.filters), direction)?;
    let metadata = proto.metadata.take();
    let chain = FilterChain {
        name: std::mem::take(&mut proto.name).into(),
        matches,
        tls,
        handshake_timeout: handshake_timeout.filter(|timeout| !timeout.is_zero()),
        filters,
        terminal,
        provenance: provenance(metadata.as_ref()),
        key: key ^ xxhash_rust::xxh64::xxh64(listener.as_bytes(), 2),
        fingerprint: xxhash_rust::xxh64::xxh64(&bytes, 0),
    };
    nothing_left(&proto)?;
    Ok(chain)
}

fn chain_match(mut proto: pb::FilterChainMatch) -> Result<ChainMatch, Unsupported> {
    let port = |value: u32, path: &str| u16::try_from(value).map_err(|_| Unsupported::new(path, "is not a port"));
    let transport = match std::mem::take(&mut proto.transport_protocol).as_str() {
        "" => None,
        "raw_buffer" => Some(Transport::Raw),
        "tls" => Some(Transport::Tls),
        other => return Err(Unsupported::new("transport_protocol", format!("{other:?} is not known"))),
    };
    let source = match std::mem::take(&mut proto.source_type) {
        0 => SourceType::Any,
        1 => SourceType::Local,
        2 => SourceType::External,
        _ => return Err(Unsupported::new("source_type", "is not known")),
    };
    let mut server_names: Vec<Box<str>> = Vec::new();
    for name in std::mem::take(&mut proto.server_names) {
        let name = name.to_ascii_lowercase();
        if name != "*" && name.trim_start_matches("*.").contains('*') {
            return Err(Unsupported::new("server_names", format!("{name:?} has a wildcard inside")));
        }
        server_names.push(name.into());
    }
    let cidrs = |list: Vec<_>, path: &str| each(&list, path, Cidr::lower);
    let lowered = ChainMatch {
        destination_port: match proto.destination_port.take() {
            None => None,
            Some(value) => Some(port(value.value, "destination_port")?),
        },
        prefix_ranges: cidrs(std::mem::take(&mut proto.prefix_ranges), "prefix_ranges")?,
        server_names,
        transport,
        protocols: std::mem::take(&mut proto.application_protocols).into_iter().map(Into::into).collect(),
        direct_source_ranges: cidrs(
            std::mem::take(&mut proto.direct_source_prefix_ranges),
            "direct_source_prefix_ranges",
        )?,
        source,
        source_ranges: cidrs(std::mem::take(&mut proto.source_prefix_ranges), "source_prefix_ranges")?,
        source_ports: std::mem::take(&mut proto.source_ports)
            .into_iter()
            .map(|value| port(value, "source_ports"))
            .collect::<Result<_, _>>()?,
    };
    nothing_left(&proto)?;
    Ok(lowered)
}
