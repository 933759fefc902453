//! The HTTP connection manager and its filters.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::trace::v3 as trace;
use envoy_types::pb::envoy::extensions::filters::http::grpc_stats::v3 as grpc_stats;
use envoy_types::pb::envoy::extensions::filters::http::router::v3 as router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as pb;
use envoy_types::pb::envoy::extensions::request_id::uuid::v3 as uuid;
use envoy_types::pb::envoy::r#type::tracing::v3 as tags;
use envoy_types::pb::google::protobuf::{Any, BoolValue, UInt32Value};
use prost::Message;
use proto::filters::{alpn, peer_metadata};
use serde_json::Value;

use super::cluster::optional_duration;
use super::common::{config_source, nothing_left};
use super::network::{Typed, stats, unwrap};
use crate::authz::Rbac;
use crate::chain::Direction;
use crate::hcm::{
    AlpnOverrides, ClientCertParts, Codec, CodecSettings, EscapedSlashes, Filter, FilterKind, ForwardClientCert,
    GrpcMethods, GrpcStats, Hcm, HttpTimeouts, MetadataExchange, RequestIds, RouteSource, Router, ServerHeader,
    StripPort, TagSource, TraceProvider, Tracing, Underscores,
};
use crate::header_mutation::HeaderMutation;
use crate::matcher::Cidr;
use crate::unsupported::{Unsupported, Within, each, type_name, unpack};

fn flag(value: Option<BoolValue>) -> Option<bool> {
    value.map(|value| value.value)
}

fn number(value: Option<UInt32Value>) -> Option<u32> {
    value.map(|value| value.value)
}

fn non_zero(duration: Duration) -> Option<Duration> {
    (!duration.is_zero()).then_some(duration)
}

pub(super) fn lower(mut proto: pb::HttpConnectionManager, direction: Direction) -> Result<Hcm, Unsupported> {
    use pb::http_connection_manager as hcm;
    let codec = match hcm::CodecType::try_from(std::mem::take(&mut proto.codec_type)) {
        Ok(hcm::CodecType::Auto) => Codec::Auto,
        Ok(hcm::CodecType::Http1) => Codec::Http1,
        Ok(hcm::CodecType::Http2) => Codec::Http2,
        _ => return Err(Unsupported::not_built("codec_type")),
    };
    let routes = match proto.route_specifier.take() {
        Some(hcm::RouteSpecifier::Rds(rds)) if !rds.route_config_name.is_empty() => {
            rds.config_source.as_ref().map_or(Ok(()), config_source).within("rds.config_source")?;
            RouteSource::Rds(rds.route_config_name.into())
        }
        Some(hcm::RouteSpecifier::RouteConfig(config)) => {
            let fingerprint = xxhash_rust::xxh64::xxh64(&config.encode_to_vec(), 0);
            RouteSource::Inline(Arc::new(super::route::lower(config, fingerprint).within("route_config")?))
        }
        Some(hcm::RouteSpecifier::ScopedRoutes(_)) => return Err(Unsupported::not_built("scoped_routes")),
        _ => return Err(Unsupported::missing("route_specifier")),
    };
    let mut filters = Vec::with_capacity(proto.http_filters.len());
    for (index, filter) in std::mem::take(&mut proto.http_filters).into_iter().enumerate() {
        let name = filter.name.clone();
        let lowered = http_filter(filter).within(&format!("http_filters[{index}] {name:?}"))?;
        filters.push(lowered);
    }
    match filters.split_last() {
        Some((last, rest))
            if matches!(last.kind, FilterKind::Router(_))
                && !rest.iter().any(|filter| matches!(filter.kind, FilterKind::Router(_))) => {}
        _ => return Err(Unsupported::new("http_filters", "must hold the router once, as the last one")),
    }
    let (settings, timeouts) = settings(&mut proto)?;
    let escaped_slashes = escaped_slashes(std::mem::take(&mut proto.path_with_escaped_slashes_action))?;
    let server_header = server_header(std::mem::take(&mut proto.server_header_transformation))?;
    let forward_client_cert = forward_client_cert(std::mem::take(&mut proto.forward_client_cert_details))?;
    let client_cert_parts = proto.set_current_client_cert_details.take().map(client_cert_parts).transpose();
    let client_cert_parts = client_cert_parts.within("set_current_client_cert_details")?.unwrap_or_default();
    let strip_port = match (std::mem::take(&mut proto.strip_matching_host_port), proto.strip_port_mode.take()) {
        (_, Some(hcm::StripPortMode::StripAnyHostPort(true))) => StripPort::Any,
        (true, _) => StripPort::Matching,
        (false, _) => StripPort::Keep,
    };
    let mut upgrades: Vec<Box<str>> = Vec::new();
    for upgrade in std::mem::take(&mut proto.upgrade_configs) {
        if !upgrade.filters.is_empty() {
            return Err(Unsupported::not_built("upgrade_configs.filters"));
        }
        if flag(upgrade.enabled).unwrap_or(true) {
            upgrades.push(upgrade.upgrade_type.to_ascii_lowercase().into());
        }
    }
    let internal_ranges = match proto.internal_address_config.take() {
        None => Vec::new(),
        Some(config) => each(&config.cidr_ranges, "internal_address_config.cidr_ranges", Cidr::lower)?,
    };
    let request_ids = proto.request_id_extension.take().map(request_ids).transpose().within("request_id_extension")?;
    if let Some(options) = proto.access_log_options.take() {
        nothing_left(&options).within("access_log_options")?;
    }
    if flag(proto.stream_error_on_invalid_http_message.take()).unwrap_or(false) {
        return Err(Unsupported::not_built("stream_error_on_invalid_http_message"));
    }
    let tracing = proto.tracing.take().map(tracing).transpose().within("tracing")?;
    let server_name = std::mem::take(&mut proto.server_name);
    if server_name.chars().any(|c| c.is_ascii_control() && c != '\t') {
        return Err(Unsupported::new("server_name", "holds a control character"));
    }
    let lowered = Hcm {
        stat_prefix: std::mem::take(&mut proto.stat_prefix).into(),
        direction,
        codec,
        settings,
        routes,
        filters,
        timeouts,
        server_name: if server_name.is_empty() { "envoy".into() } else { server_name.into() },
        server_header,
        use_remote_address: flag(proto.use_remote_address.take()).unwrap_or(false),
        xff_trusted_hops: std::mem::take(&mut proto.xff_num_trusted_hops),
        skip_xff_append: std::mem::take(&mut proto.skip_xff_append),
        internal_ranges,
        generate_request_id: flag(proto.generate_request_id.take()).unwrap_or(true),
        request_ids: request_ids.unwrap_or_default(),
        preserve_external_request_id: std::mem::take(&mut proto.preserve_external_request_id),
        request_id_in_response: std::mem::take(&mut proto.always_set_request_id_in_response),
        forward_client_cert,
        client_cert_parts,
        append_x_forwarded_port: std::mem::take(&mut proto.append_x_forwarded_port),
        normalize_path: flag(proto.normalize_path.take()).unwrap_or(false),
        merge_slashes: std::mem::take(&mut proto.merge_slashes),
        escaped_slashes,
        strip_port,
        strip_trailing_dot: std::mem::take(&mut proto.strip_trailing_host_dot),
        upgrades,
        access_log: super::access_log::lower(&std::mem::take(&mut proto.access_log)).within("access_log")?,
        tracing: tracing.map(Arc::new),
    };
    // A 100 of the application is passed on anyhow: whoever sent `expect` waits for it.
    proto.proxy_100_continue = false;
    proto.delayed_close_timeout = None;
    proto.drain_timeout_jitter = None;
    nothing_left(&proto)?;
    Ok(lowered)
}

fn escaped_slashes(action: i32) -> Result<EscapedSlashes, Unsupported> {
    use pb::http_connection_manager::PathWithEscapedSlashesAction as Action;
    Ok(match Action::try_from(action) {
        Ok(Action::ImplementationSpecificDefault | Action::KeepUnchanged) => EscapedSlashes::Keep,
        Ok(Action::RejectRequest) => EscapedSlashes::Reject,
        Ok(Action::UnescapeAndRedirect) => EscapedSlashes::UnescapeAndRedirect,
        Ok(Action::UnescapeAndForward) => EscapedSlashes::UnescapeAndForward,
        Err(_) => return Err(Unsupported::new("path_with_escaped_slashes_action", "is not known")),
    })
}

fn server_header(transformation: i32) -> Result<ServerHeader, Unsupported> {
    use pb::http_connection_manager::ServerHeaderTransformation as Transformation;
    Ok(match Transformation::try_from(transformation) {
        Ok(Transformation::Overwrite) => ServerHeader::Overwrite,
        Ok(Transformation::AppendIfAbsent) => ServerHeader::AppendIfAbsent,
        Ok(Transformation::PassThrough) => ServerHeader::PassThrough,
        Err(_) => return Err(Unsupported::new("server_header_transformation", "is not known")),
    })
}

fn forward_client_cert(details: i32) -> Result<ForwardClientCert, Unsupported> {
    use pb::http_connection_manager::ForwardClientCertDetails as Details;
    Ok(match Details::try_from(details) {
        Ok(Details::Sanitize) => ForwardClientCert::Sanitize,
        Ok(Details::ForwardOnly) => ForwardClientCert::ForwardOnly,
        Ok(Details::AppendForward) => ForwardClientCert::AppendForward,
        Ok(Details::SanitizeSet) => ForwardClientCert::SanitizeSet,
        Ok(Details::AlwaysForwardOnly) => ForwardClientCert::AlwaysForwardOnly,
        Err(_) => return Err(Unsupported::new("forward_client_cert_details", "is not known")),
    })
}

fn client_cert_parts(
    mut parts: pb::http_connection_manager::SetCurrentClientCertDetails,
) -> Result<ClientCertParts, Unsupported> {
    let lowered = ClientCertParts {
        subject: flag(parts.subject.take()).unwrap_or(false),
        cert: std::mem::take(&mut parts.cert),
        chain: std::mem::take(&mut parts.chain),
        dns: std::mem::take(&mut parts.dns),
        uri: std::mem::take(&mut parts.uri),
    };
    nothing_left(&parts)?;
    Ok(lowered)
}

fn underscores(action: i32) -> Result<Underscores, Unsupported> {
    use core::http_protocol_options::HeadersWithUnderscoresAction as Action;
    Ok(match Action::try_from(action) {
        Ok(Action::Allow) => Underscores::Allow,
        Ok(Action::RejectRequest) => Underscores::Reject,
        Ok(Action::DropHeader) => Underscores::Drop,
        Err(_) => return Err(Unsupported::new("headers_with_underscores_action", "is not known")),
    })
}

fn request_ids(extension: pb::RequestIdExtension) -> Result<RequestIds, Unsupported> {
    let any = extension.typed_config.ok_or_else(|| Unsupported::missing("typed_config"))?;
    let mut config: uuid::UuidRequestIdConfig = unpack(&any, "typed_config")?;
    let lowered = RequestIds {
        pack_trace_reason: flag(config.pack_trace_reason.take()).unwrap_or(true),
        decide_traces: flag(config.use_request_id_for_trace_sampling.take()).unwrap_or(true),
    };
    nothing_left(&config).within("typed_config")?;
    Ok(lowered)
}

fn settings(proto: &mut pb::HttpConnectionManager) -> Result<(CodecSettings, HttpTimeouts), Unsupported> {
    let mut settings = CodecSettings::default();
    let mut timeouts = HttpTimeouts {
        idle: Some(Duration::from_hours(1)),
        stream_idle: optional_duration(proto.stream_idle_timeout.take(), "stream_idle_timeout")?
            .map_or(Some(Duration::from_mins(5)), non_zero),
        request: optional_duration(proto.request_timeout.take(), "request_timeout")?.and_then(non_zero),
        request_headers: optional_duration(proto.request_headers_timeout.take(), "request_headers_timeout")?
            .and_then(non_zero),
        connection_duration_max: None,
        stream_duration_max: None,
        drain: optional_duration(proto.drain_timeout.take(), "drain_timeout")?.unwrap_or(Duration::from_secs(5)),
    };
    if let Some(kb) = number(proto.max_request_headers_kb.take()) {
        settings.header_bytes_max = kb.saturating_mul(1024);
    }
    if let Some(mut common) = proto.common_http_protocol_options.take() {
        if let Some(idle) = optional_duration(common.idle_timeout.take(), "common_http_protocol_options.idle_timeout")?
        {
            timeouts.idle = non_zero(idle);
        }
        timeouts.connection_duration_max =
            optional_duration(common.max_connection_duration.take(), "max_connection_duration")?.and_then(non_zero);
        timeouts.stream_duration_max =
            optional_duration(common.max_stream_duration.take(), "max_stream_duration")?.and_then(non_zero);
        if let Some(count) = number(common.max_headers_count.take()) {
            settings.headers_max = count;
        }
        settings.requests_per_connection_max = number(common.max_requests_per_connection.take()).filter(|n| *n > 0);
        settings.underscores = underscores(std::mem::take(&mut common.headers_with_underscores_action))?;
        nothing_left(&common).within("common_http_protocol_options")?;
    }
    if let Some(mut http1) = proto.http_protocol_options.take() {
        settings.accept_http10 = std::mem::take(&mut http1.accept_http_10);
        settings.default_host_http10 = std::mem::take(&mut http1.default_host_for_http_10).into();
        http1.enable_trailers = false;
        http1.allow_absolute_url = None;
        nothing_left(&http1).within("http_protocol_options")?;
    }
    if let Some(mut http2) = proto.http2_protocol_options.take() {
        let settings = &mut settings;
        let set = |target: &mut u32, value: Option<UInt32Value>| {
            if let Some(value) = value {
                *target = value.value;
            }
        };
        set(&mut settings.concurrent_streams_max, http2.max_concurrent_streams.take());
        set(&mut settings.stream_window, http2.initial_stream_window_size.take());
        set(&mut settings.connection_window, http2.initial_connection_window_size.take());
        settings.extended_connect = std::mem::take(&mut http2.allow_connect);
        http2.override_stream_error_on_invalid_http_message = None;
        nothing_left(&http2).within("http2_protocol_options")?;
    }
    Ok((settings, timeouts))
}

fn http_filter(mut proto: pb::HttpFilter) -> Result<Filter, Unsupported> {
    let name: Box<str> = std::mem::take(&mut proto.name).into();
    let disabled = std::mem::take(&mut proto.disabled);
    // An optional filter that is not built is refused all the same: nothing is skipped silently.
    proto.is_optional = false;
    let any = match proto.config_type.take() {
        Some(pb::http_filter::ConfigType::TypedConfig(any)) => any,
        Some(pb::http_filter::ConfigType::ConfigDiscovery(_)) => {
            return Err(Unsupported::not_built("config_discovery"));
        }
        None => return Err(Unsupported::missing("typed_config")),
    };
    nothing_left(&proto)?;
    let kind = filter_kind(&any)?;
    Ok(Filter { name, disabled, kind })
}

fn filter_kind(any: &Any) -> Result<FilterKind, Unsupported> {
    let typed = unwrap(any)?;
    Ok(match typed.name() {
        "io.istio.http.peer_metadata.Config" => FilterKind::MetadataExchange(peer_metadata_of(&typed)?),
        "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig" => FilterKind::Alpn(alpn_of(&typed)?),
        "stats.PluginConfig" => FilterKind::Stats(stats(&typed)?),
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig" => {
            FilterKind::GrpcStats(grpc_stats(unpack(any, "")?)?)
        }
        "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb" => FilterKind::GrpcWeb,
        "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
            FilterKind::Fault(Box::new(crate::fault::Fault::lower(&unpack(any, "")?)?))
        }
        "envoy.extensions.filters.http.cors.v3.Cors" => FilterKind::Cors,
        "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation" => {
            FilterKind::HeaderMutation(Box::new(HeaderMutation::lower(&unpack(any, "")?)?))
        }
        "envoy.extensions.filters.http.rbac.v3.RBAC" => FilterKind::Rbac(Box::new(Rbac::lower(&unpack(any, "")?)?)),
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz" => {
            FilterKind::ExtAuthz(Box::new(crate::ext_authz::ExtAuthz::lower(&unpack(any, "")?)?))
        }
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication" => {
            FilterKind::Jwt(Box::new(crate::jwt::JwtFilter::lower(&unpack(any, "")?)?))
        }
        "envoy.extensions.filters.http.router.v3.Router" => {
            let mut config: router::Router = unpack(any, "")?;
            let suppress_envoy_headers = std::mem::take(&mut config.suppress_envoy_headers);
            config.dynamic_stats = None;
            nothing_left(&config)?;
            FilterKind::Router(Router { suppress_envoy_headers })
        }
        other => return Err(Unsupported::new("", format!("{other} is not supported"))),
    })
}

fn grpc_stats(mut proto: grpc_stats::FilterConfig) -> Result<GrpcStats, Unsupported> {
    use grpc_stats::filter_config::PerMethodStatSpecifier as Specifier;
    // The counts of messages are known to whoever reports the request, without a detour.
    proto.emit_filter_state = false;
    let methods = match proto.per_method_stat_specifier.take() {
        None => GrpcMethods::None,
        Some(Specifier::StatsForAllMethods(all)) => {
            if all.value {
                GrpcMethods::All
            } else {
                GrpcMethods::None
            }
        }
        Some(Specifier::IndividualMethodStatsAllowlist(list)) => GrpcMethods::Listed(
            list.services
                .into_iter()
                .map(|service| (service.name.into(), service.method_names.into_iter().map(Into::into).collect()))
                .collect(),
        ),
    };
    let replaces_dots = std::mem::take(&mut proto.replace_dots_in_grpc_service_name);
    nothing_left(&proto)?;
    Ok(GrpcStats { methods, replaces_dots })
}

fn peer_metadata_of(typed: &Typed<'_>) -> Result<MetadataExchange, Unsupported> {
    let mut lowered = MetadataExchange::default();
    match typed {
        Typed::Message(any) => {
            use peer_metadata::config::{discovery_method, propagation_method};
            let config: peer_metadata::Config = unpack(any, "")?;
            let headers = |methods: &[peer_metadata::config::DiscoveryMethod]| {
                methods.iter().any(|method| {
                    matches!(method.method_specifier, Some(discovery_method::MethodSpecifier::IstioHeaders(_)))
                })
            };
            lowered.downstream_headers = headers(&config.downstream_discovery);
            lowered.upstream_headers = headers(&config.upstream_discovery);
            let propagates = |methods: &[peer_metadata::config::PropagationMethod]| {
                methods.iter().find_map(|method| {
                    let Some(propagation_method::MethodSpecifier::IstioHeaders(headers)) = &method.method_specifier
                    else {
                        return None;
                    };
                    Some(headers.skip_external_clusters)
                })
            };
            lowered.to_downstream = propagates(&config.downstream_propagation).is_some();
            let upstream = propagates(&config.upstream_propagation);
            lowered.to_upstream = upstream.is_some();
            lowered.skip_external = upstream.unwrap_or(false);
        }
        Typed::Json(_, value) => {
            let method = |list: &str| {
                let methods = value.get(list).and_then(Value::as_array);
                methods.into_iter().flatten().find_map(|method| method.get("istio_headers"))
            };
            lowered.downstream_headers = method("downstream_discovery").is_some();
            lowered.upstream_headers = method("upstream_discovery").is_some();
            lowered.to_downstream = method("downstream_propagation").is_some();
            let upstream = method("upstream_propagation");
            lowered.to_upstream = upstream.is_some();
            let skip = upstream.and_then(|headers| headers.get("skip_external_clusters")).and_then(Value::as_bool);
            lowered.skip_external = skip.unwrap_or(false);
        }
    }
    Ok(lowered)
}

fn alpn_of(typed: &Typed<'_>) -> Result<AlpnOverrides, Unsupported> {
    let mut lowered = AlpnOverrides::default();
    let mut set = |protocol: &str, list: Vec<Box<str>>| {
        match protocol {
            "HTTP10" => lowered.http10 = list.into(),
            "HTTP11" => lowered.http11 = list.into(),
            "HTTP2" => lowered.http2 = list.into(),
            other => return Err(Unsupported::new("upstream_protocol", format!("{other} is not known"))),
        }
        Ok(())
    };
    match typed {
        Typed::Message(any) => {
            use alpn::filter_config::Protocol;
            let config: alpn::FilterConfig = unpack(any, "")?;
            for entry in config.alpn_override {
                let protocol = match Protocol::try_from(entry.upstream_protocol) {
                    Ok(Protocol::Http10) => "HTTP10",
                    Ok(Protocol::Http11) => "HTTP11",
                    Ok(Protocol::Http2) => "HTTP2",
                    Err(_) => "an unknown number",
                };
                set(protocol, entry.alpn_override.into_iter().map(Into::into).collect())?;
            }
        }
        Typed::Json(_, value) => {
            for entry in value.get("alpn_override").and_then(Value::as_array).into_iter().flatten() {
                let list = entry.get("alpn_override").and_then(Value::as_array).into_iter().flatten();
                let list = list.filter_map(Value::as_str).map(Into::into).collect();
                set(entry.get("upstream_protocol").and_then(Value::as_str).unwrap_or("HTTP10"), list)?;
            }
        }
    }
    Ok(lowered)
}

fn tracing(mut proto: pb::http_connection_manager::Tracing) -> Result<Tracing, Unsupported> {
    let mut named = Vec::new();
    for (index, tag) in std::mem::take(&mut proto.custom_tags).into_iter().enumerate() {
        named.push(custom_tag(tag).within_item("custom_tags", index)?);
    }
    let provider = proto.provider.take().map(provider).transpose().within("provider")?;
    let lowered = Tracing {
        client_sampling: proto.client_sampling.take().map_or(100.0, |percent| percent.value),
        random_sampling: proto.random_sampling.take().map_or(100.0, |percent| percent.value),
        overall_sampling: proto.overall_sampling.take().map_or(100.0, |percent| percent.value),
        spawn_upstream_span: flag(proto.spawn_upstream_span.take()).unwrap_or(false),
        path_tag_max: number(proto.max_path_tag_length.take()).unwrap_or(256),
        tags: named,
        provider,
    };
    proto.verbose = false;
    nothing_left(&proto)?;
    Ok(lowered)
}

fn custom_tag(proto: tags::CustomTag) -> Result<(Box<str>, TagSource), Unsupported> {
    use envoy_types::pb::envoy::r#type::metadata::v3::metadata_key::path_segment::Segment;
    use envoy_types::pb::envoy::r#type::metadata::v3::metadata_kind::Kind;
    use tags::custom_tag::Type;
    let source = match proto.r#type {
        Some(Type::Literal(literal)) => TagSource::Literal(literal.value.into()),
        Some(Type::Environment(variable)) => {
            TagSource::Environment(variable.name.into(), variable.default_value.into())
        }
        Some(Type::RequestHeader(header)) => {
            TagSource::Header(header.name.to_ascii_lowercase().into(), header.default_value.into())
        }
        Some(Type::Metadata(metadata)) => {
            if !matches!(metadata.kind.and_then(|kind| kind.kind), None | Some(Kind::Request(_))) {
                return Err(Unsupported::not_built("metadata.kind"));
            }
            let key = metadata.metadata_key.ok_or_else(|| Unsupported::missing("metadata.metadata_key"))?;
            let path = key.path.into_iter().filter_map(|segment| match segment.segment {
                Some(Segment::Key(key)) => Some(key.into()),
                _ => None,
            });
            TagSource::Metadata(key.key.into(), path.collect(), metadata.default_value.into())
        }
        _ => return Err(Unsupported::not_built("type")),
    };
    Ok((proto.tag.into(), source))
}

fn provider(proto: trace::tracing::Http) -> Result<TraceProvider, Unsupported> {
    let Some(trace::tracing::http::ConfigType::TypedConfig(any)) = proto.config_type else {
        return Err(Unsupported::missing("typed_config"));
    };
    match type_name(&any.type_url) {
        "envoy.config.trace.v3.ZipkinConfig" => zipkin(unpack(&any, "typed_config")?).within("typed_config"),
        "envoy.config.trace.v3.OpenTelemetryConfig" => {
            let config: trace::OpenTelemetryConfig = unpack(&any, "typed_config")?;
            let service = config.grpc_service.ok_or_else(|| Unsupported::not_built("typed_config.http_service"))?;
            let Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(grpc)) = service.target_specifier else {
                return Err(Unsupported::not_built("typed_config.grpc_service"));
            };
            Ok(TraceProvider::OpenTelemetry {
                authority: if grpc.authority.is_empty() {
                    grpc.cluster_name.as_str().into()
                } else {
                    grpc.authority.into()
                },
                cluster: grpc.cluster_name.into(),
                service: config.service_name.into(),
            })
        }
        other => Err(Unsupported::new("typed_config", format!("{other} is not supported"))),
    }
}

fn zipkin(mut config: trace::ZipkinConfig) -> Result<TraceProvider, Unsupported> {
    use trace::zipkin_config::{CollectorEndpointVersion, TraceContextOption};
    let w3c = match TraceContextOption::try_from(std::mem::take(&mut config.trace_context_option)) {
        Ok(TraceContextOption::UseB3) => false,
        Ok(TraceContextOption::UseB3WithW3cPropagation) => true,
        Err(_) => return Err(Unsupported::new("trace_context_option", "is not known")),
    };
    match CollectorEndpointVersion::try_from(std::mem::take(&mut config.collector_endpoint_version)) {
        Ok(CollectorEndpointVersion::HttpJson) => {}
        Ok(other) => return Err(Unsupported::not_built(format!("collector_endpoint_version {}", other.as_str_name()))),
        Err(_) => return Err(Unsupported::new("collector_endpoint_version", "is not known")),
    }
    let cluster = std::mem::take(&mut config.collector_cluster);
    let endpoint = std::mem::take(&mut config.collector_endpoint);
    let hostname = std::mem::take(&mut config.collector_hostname);
    let (cluster, host, path): (Box<str>, Box<str>, Box<str>) = match config.collector_service.take() {
        Some(service) => collector(service).within("collector_service")?,
        None if cluster.is_empty() => return Err(Unsupported::missing("collector_cluster")),
        None => {
            let host = if hostname.is_empty() { cluster.clone() } else { hostname };
            (cluster.into(), host.into(), endpoint.into())
        }
    };
    let lowered = TraceProvider::Zipkin {
        cluster: cluster.into(),
        host,
        path,
        long_ids: std::mem::take(&mut config.trace_id_128bit),
        w3c,
        shared_spans: flag(config.shared_span_context.take()).unwrap_or(true),
    };
    nothing_left(&config)?;
    Ok(lowered)
}

/// Cluster, host and path of the calls.
fn collector(mut service: core::HttpService) -> Result<(Box<str>, Box<str>, Box<str>), Unsupported> {
    let mut uri = service.http_uri.take().ok_or_else(|| Unsupported::missing("http_uri"))?;
    nothing_left(&service)?;
    let Some(core::http_uri::HttpUpstreamType::Cluster(cluster)) = uri.http_upstream_type.take() else {
        return Err(Unsupported::missing("http_uri.cluster"));
    };
    let whole = std::mem::take(&mut uri.uri);
    // a call gets five seconds, which is Envoy's bound for them, too
    uri.timeout = None;
    nothing_left(&uri).within("http_uri")?;
    let rest = whole.split_once("://").map_or(whole.as_str(), |(_, rest)| rest);
    let (host, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    Ok((cluster.into(), host.into(), path.into()))
}
