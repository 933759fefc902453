//! Route tables.
#![expect(deprecated, reason = "istiod writes the older fields")]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as pb;
use envoy_types::pb::google::protobuf::Any;

use super::cluster::optional_duration;
use super::common::{fingerprint, nothing_left, provenance};
use crate::authz::Rbac;
use crate::config::Name;
use crate::cors::CorsPolicy;
use crate::fault::Fault;
use crate::header_mutation::Mutations;
use crate::headers::HeaderEdits;
use crate::matcher::{HeaderMatcher, MetadataMatcher, QueryMatcher, UriTemplate};
use crate::regex::{Regex, Rewrite};
use crate::retry::RetryPolicy;
use crate::route::{
    Action, Direct, Edits, Forward, Fraction, HashPolicy, HashSource, HostIndex, HostRewrite, MirrorPolicy, Override,
    Overrides, PathMatch, PathRewrite, Redirect, RedirectPath, RequireTls, Route, RouteMatch, RouteTable,
    StreamDuration, Target, VirtualHost, WeightedCluster,
};
use crate::unsupported::{Unsupported, Within, each, type_name, unpack};

/// Envoy's route time-out where none is set.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

pub(super) fn lower_any(any: &Any) -> Result<(Name, RouteTable), Unsupported> {
    let proto: pb::RouteConfiguration = unpack(any, "")?;
    if proto.name.is_empty() {
        return Err(Unsupported::missing("name"));
    }
    let table = lower(proto, fingerprint(any))?;
    Ok((table.name.clone(), table))
}

pub(super) fn lower(mut proto: pb::RouteConfiguration, fingerprint: u64) -> Result<RouteTable, Unsupported> {
    let mut hosts = HostIndex::default();
    let body_max = proto.max_direct_response_body_size_bytes.take().map_or(4096, |value| value.value);
    let mut virtual_hosts = Vec::with_capacity(proto.virtual_hosts.len());
    for (index, host) in std::mem::take(&mut proto.virtual_hosts).into_iter().enumerate() {
        let lowered = virtual_host(host, body_max as usize).within_item("virtual_hosts", index)?;
        for domain in &lowered.domains {
            hosts.insert(domain, index).map_err(|bad| {
                Unsupported::new(
                    format!("virtual_hosts[{index}].domains"),
                    format!("{:?} stands twice or is empty", bad.0),
                )
            })?;
        }
        virtual_hosts.push(lowered);
    }
    let edits = edits(
        &std::mem::take(&mut proto.request_headers_to_add),
        &std::mem::take(&mut proto.request_headers_to_remove),
        &std::mem::take(&mut proto.response_headers_to_add),
        &std::mem::take(&mut proto.response_headers_to_remove),
    )?;
    let overrides = overrides(std::mem::take(&mut proto.typed_per_filter_config))?;
    let mirrors = mirrors(std::mem::take(&mut proto.request_mirror_policies))?;
    let metadata = proto.metadata.take();
    let table = RouteTable {
        name: std::mem::take(&mut proto.name).into(),
        virtual_hosts,
        hosts,
        ignore_port: std::mem::take(&mut proto.ignore_port_in_host_matching),
        edits,
        most_specific_wins: std::mem::take(&mut proto.most_specific_header_mutations_wins),
        overrides,
        internal_only_headers: std::mem::take(&mut proto.internal_only_headers)
            .into_iter()
            .map(|name| name.to_ascii_lowercase().into())
            .collect(),
        mirrors,
        provenance: provenance(metadata.as_ref()),
        fingerprint,
    };
    proto.validate_clusters = None;
    nothing_left(&proto)?;
    Ok(table)
}

fn edits(
    request_add: &[core::HeaderValueOption],
    request_remove: &[String],
    response_add: &[core::HeaderValueOption],
    response_remove: &[String],
) -> Result<Edits, Unsupported> {
    Ok(Edits {
        request: HeaderEdits::lower(request_add, request_remove).within("request_headers_to_add")?,
        response: HeaderEdits::lower(response_add, response_remove).within("response_headers_to_add")?,
    })
}

fn virtual_host(mut proto: pb::VirtualHost, body_max: usize) -> Result<VirtualHost, Unsupported> {
    let mut routes = Vec::with_capacity(proto.routes.len());
    for (index, route) in std::mem::take(&mut proto.routes).into_iter().enumerate() {
        routes.push(lower_route(route, body_max).within_item("routes", index)?);
    }
    if proto.domains.is_empty() {
        return Err(Unsupported::missing("domains"));
    }
    let require_tls = match pb::virtual_host::TlsRequirementType::try_from(std::mem::take(&mut proto.require_tls)) {
        Ok(pb::virtual_host::TlsRequirementType::None) => RequireTls::None,
        Ok(pb::virtual_host::TlsRequirementType::ExternalOnly) => RequireTls::ExternalOnly,
        Ok(pb::virtual_host::TlsRequirementType::All) => RequireTls::All,
        Err(_) => return Err(Unsupported::new("require_tls", "is not known")),
    };
    let edits = edits(
        &std::mem::take(&mut proto.request_headers_to_add),
        &std::mem::take(&mut proto.request_headers_to_remove),
        &std::mem::take(&mut proto.response_headers_to_add),
        &std::mem::take(&mut proto.response_headers_to_remove),
    )?;
    let retry = retry(proto.retry_policy.take().as_ref())?;
    let metadata = proto.metadata.take();
    let host = VirtualHost {
        name: std::mem::take(&mut proto.name).into(),
        domains: std::mem::take(&mut proto.domains).into_iter().map(|d| d.to_ascii_lowercase().into()).collect(),
        routes,
        require_tls,
        edits,
        overrides: overrides(std::mem::take(&mut proto.typed_per_filter_config))?,
        attempt_count: std::mem::take(&mut proto.include_request_attempt_count),
        attempt_count_in_response: std::mem::take(&mut proto.include_attempt_count_in_response),
        retry,
        replay_bytes_max: buffer_limit(
            proto.request_body_buffer_limit.take(),
            &mut proto.per_request_buffer_limit_bytes,
        ),
        mirrors: mirrors(std::mem::take(&mut proto.request_mirror_policies))?,
        provenance: provenance(metadata.as_ref()),
    };
    nothing_left(&proto)?;
    Ok(host)
}

type U32 = envoy_types::pb::google::protobuf::UInt32Value;
type U64 = envoy_types::pb::google::protobuf::UInt64Value;

fn buffer_limit(newer: Option<U64>, older: &mut Option<U32>) -> Option<u32> {
    let older = older.take().map(|value| value.value);
    newer.map(|value| u32::try_from(value.value).unwrap_or(u32::MAX)).or(older)
}

fn retry(proto: Option<&pb::RetryPolicy>) -> Result<Option<Arc<RetryPolicy>>, Unsupported> {
    let lowered = proto.map(RetryPolicy::lower).transpose().within("retry_policy")?;
    Ok(lowered.map(Arc::new))
}

fn lower_route(mut proto: pb::Route, body_max: usize) -> Result<Route, Unsupported> {
    let matches = proto.r#match.take().ok_or_else(|| Unsupported::missing("match"))?;
    let matches = route_match(matches).within("match")?;
    let action = match proto.action.take() {
        Some(pb::route::Action::Route(action)) => Action::Forward(Box::new(forward(action).within("route")?)),
        Some(pb::route::Action::Redirect(action)) => Action::Redirect(Box::new(redirect(action).within("redirect")?)),
        Some(pb::route::Action::DirectResponse(action)) => {
            Action::Direct(direct(action, body_max).within("direct_response")?)
        }
        Some(pb::route::Action::FilterAction(_)) => return Err(Unsupported::not_built("filter_action")),
        Some(pb::route::Action::NonForwardingAction(_)) => return Err(Unsupported::not_built("non_forwarding_action")),
        None => return Err(Unsupported::missing("action")),
    };
    let edits = edits(
        &std::mem::take(&mut proto.request_headers_to_add),
        &std::mem::take(&mut proto.request_headers_to_remove),
        &std::mem::take(&mut proto.response_headers_to_add),
        &std::mem::take(&mut proto.response_headers_to_remove),
    )?;
    let operation = proto.decorator.take().map(|decorator| Name::from(decorator.operation.as_str()));
    let metadata = proto.metadata.take();
    proto.stat_prefix.clear();
    let route = Route {
        name: std::mem::take(&mut proto.name).into(),
        matches,
        action,
        edits,
        overrides: overrides(std::mem::take(&mut proto.typed_per_filter_config))?,
        operation: operation.filter(|operation| !operation.is_empty()),
        replay_bytes_max: buffer_limit(
            proto.request_body_buffer_limit.take(),
            &mut proto.per_request_buffer_limit_bytes,
        ),
        provenance: provenance(metadata.as_ref()),
    };
    nothing_left(&proto)?;
    Ok(route)
}

fn route_match(mut proto: pb::RouteMatch) -> Result<RouteMatch, Unsupported> {
    use pb::route_match::PathSpecifier;
    let case_sensitive = proto.case_sensitive.take().is_none_or(|value| value.value);
    let bytes = |text: String| -> Box<[u8]> { text.into_bytes().into() };
    let path = match (proto.path_specifier.take(), case_sensitive) {
        (Some(PathSpecifier::Prefix(prefix)), true) => PathMatch::Prefix(bytes(prefix)),
        (Some(PathSpecifier::Prefix(prefix)), false) => PathMatch::PrefixIgnoreCase(bytes(prefix)),
        (Some(PathSpecifier::Path(path)), true) => PathMatch::Exact(bytes(path)),
        (Some(PathSpecifier::Path(path)), false) => PathMatch::ExactIgnoreCase(bytes(path)),
        (Some(PathSpecifier::PathSeparatedPrefix(prefix)), case) => {
            PathMatch::Separated(bytes(prefix.trim_end_matches('/').to_owned()), case)
        }
        (Some(PathSpecifier::SafeRegex(regex)), _) => PathMatch::Regex(Regex::lower(&regex).within("safe_regex")?),
        (Some(PathSpecifier::PathMatchPolicy(policy)), _) => {
            PathMatch::Template(UriTemplate::lower(&policy).within("path_match_policy")?)
        }
        (Some(PathSpecifier::ConnectMatcher(_)), _) => PathMatch::Connect,
        (None, _) => return Err(Unsupported::missing("path_specifier")),
    };
    let lowered = RouteMatch {
        path,
        headers: each(&std::mem::take(&mut proto.headers), "headers", HeaderMatcher::lower)?,
        query: each(&std::mem::take(&mut proto.query_parameters), "query_parameters", QueryMatcher::lower)?,
        metadata: each(&std::mem::take(&mut proto.dynamic_metadata), "dynamic_metadata", MetadataMatcher::lower)?,
        fraction: proto.runtime_fraction.take().map(|f| runtime_fraction(&f)).transpose().within("runtime_fraction")?,
        grpc: proto.grpc.take().is_some(),
    };
    nothing_left(&proto)?;
    Ok(lowered)
}

/// Runtime keys have no layer here: the default counts.
fn runtime_fraction(proto: &core::RuntimeFractionalPercent) -> Result<Fraction, Unsupported> {
    let share = proto.default_value.as_ref().ok_or_else(|| Unsupported::missing("default_value"))?;
    Fraction::lower(share).within("default_value")
}

fn forward(mut proto: pb::RouteAction) -> Result<Forward, Unsupported> {
    use pb::route_action::{ClusterSpecifier, HostRewriteSpecifier};
    let target = match proto.cluster_specifier.take() {
        Some(ClusterSpecifier::Cluster(name)) if !name.is_empty() => Target::Cluster(name.into()),
        Some(ClusterSpecifier::ClusterHeader(header)) => Target::Header(header.to_ascii_lowercase().into()),
        Some(ClusterSpecifier::WeightedClusters(weighted)) => {
            weighted_clusters(weighted).within("weighted_clusters")?
        }
        Some(ClusterSpecifier::ClusterSpecifierPlugin(_) | ClusterSpecifier::InlineClusterSpecifierPlugin(_)) => {
            return Err(Unsupported::not_built("cluster_specifier_plugin"));
        }
        _ => return Err(Unsupported::missing("cluster")),
    };
    let host = match proto.host_rewrite_specifier.take() {
        None => HostRewrite::Keep,
        Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => HostRewrite::Literal(host.into()),
        Some(HostRewriteSpecifier::AutoHostRewrite(auto)) if auto.value => HostRewrite::Auto,
        Some(HostRewriteSpecifier::AutoHostRewrite(_)) => HostRewrite::Keep,
        Some(HostRewriteSpecifier::HostRewriteHeader(name)) => HostRewrite::Header(name.to_ascii_lowercase().into()),
        Some(_) => return Err(Unsupported::not_built("host_rewrite_path_regex")),
    };
    let prefix = std::mem::take(&mut proto.prefix_rewrite);
    let path = match proto.regex_rewrite.take() {
        Some(_) if !prefix.is_empty() => return Err(Unsupported::new("regex_rewrite", "excludes prefix_rewrite")),
        Some(rewrite) => PathRewrite::Regex(Rewrite::lower(&rewrite).within("regex_rewrite")?),
        None if prefix.is_empty() => PathRewrite::Keep,
        None => PathRewrite::Prefix(prefix.into()),
    };
    let not_found_status = match std::mem::take(&mut proto.cluster_not_found_response_code) {
        0 => 503,
        1 => 404,
        2 => 500,
        _ => return Err(Unsupported::new("cluster_not_found_response_code", "is not known")),
    };
    let non_zero = |duration: Duration| (!duration.is_zero()).then_some(duration);
    let timeout = optional_duration(proto.timeout.take(), "timeout")?.map_or(Some(DEFAULT_TIMEOUT), non_zero);
    let idle_timeout = optional_duration(proto.idle_timeout.take(), "idle_timeout")?.map(non_zero);
    let grpc_timeout_max = optional_duration(proto.max_grpc_timeout.take(), "max_grpc_timeout")?;
    let stream_duration = proto.max_stream_duration.take().map(stream_duration).transpose();
    let stream_duration = stream_duration.within("max_stream_duration")?;
    let upgrades = std::mem::take(&mut proto.upgrade_configs).into_iter().map(|mut upgrade| {
        let enabled = upgrade.enabled.take().is_none_or(|value| value.value);
        let kind = std::mem::take(&mut upgrade.upgrade_type).to_ascii_lowercase();
        nothing_left(&upgrade)?;
        Ok((kind.into(), enabled))
    });
    let upgrades = upgrades.collect::<Result<Vec<_>, Unsupported>>().within("upgrade_configs")?;
    let lowered = Forward {
        target,
        not_found_status,
        path,
        host,
        append_x_forwarded_host: std::mem::take(&mut proto.append_x_forwarded_host),
        timeout,
        idle_timeout,
        grpc_timeout_max,
        stream_duration,
        retry: retry(proto.retry_policy.take().as_ref())?,
        mirrors: mirrors(std::mem::take(&mut proto.request_mirror_policies))?,
        hash: each(&std::mem::take(&mut proto.hash_policy), "hash_policy", hash_policy)?,
        upgrades,
    };
    nothing_left(&proto)?;
    Ok(lowered)
}

fn stream_duration(mut proto: pb::route_action::MaxStreamDuration) -> Result<StreamDuration, Unsupported> {
    let max = optional_duration(proto.max_stream_duration.take(), "max_stream_duration")?;
    let grpc_timeout_max = optional_duration(proto.grpc_timeout_header_max.take(), "grpc_timeout_header_max")?;
    nothing_left(&proto)?;
    Ok(StreamDuration { max: max.filter(|max| !max.is_zero()), grpc_timeout_max })
}

fn weighted_clusters(mut proto: pb::WeightedCluster) -> Result<Target, Unsupported> {
    let mut clusters = Vec::with_capacity(proto.clusters.len());
    for (index, cluster) in std::mem::take(&mut proto.clusters).into_iter().enumerate() {
        clusters.push(weighted_cluster(cluster).within_item("clusters", index)?);
    }
    // The sum counts; `total_weight` is deprecated and must agree where it is set.
    let total: u64 = clusters.iter().map(|cluster| u64::from(cluster.weight)).sum();
    if proto.total_weight.take().is_some_and(|weight| u64::from(weight.value) != total) {
        return Err(Unsupported::new("total_weight", "differs from the sum of the weights"));
    }
    proto.runtime_key_prefix.clear();
    nothing_left(&proto)?;
    if total == 0 || total > u64::from(u32::MAX) {
        return Err(Unsupported::new("clusters", "weights must sum to 1 up to 4294967295"));
    }
    Ok(Target::Weighted { clusters, total })
}

fn weighted_cluster(mut proto: pb::weighted_cluster::ClusterWeight) -> Result<WeightedCluster, Unsupported> {
    use pb::weighted_cluster::cluster_weight::HostRewriteSpecifier;
    if proto.name.is_empty() {
        return Err(Unsupported::missing("name"));
    }
    let edits = edits(
        &std::mem::take(&mut proto.request_headers_to_add),
        &std::mem::take(&mut proto.request_headers_to_remove),
        &std::mem::take(&mut proto.response_headers_to_add),
        &std::mem::take(&mut proto.response_headers_to_remove),
    )?;
    let host = proto.host_rewrite_specifier.take().map(|HostRewriteSpecifier::HostRewriteLiteral(host)| host.into());
    let lowered = WeightedCluster {
        name: std::mem::take(&mut proto.name).into(),
        weight: proto.weight.take().map_or(0, |weight| weight.value),
        edits,
        overrides: overrides(std::mem::take(&mut proto.typed_per_filter_config))?,
        host,
    };
    nothing_left(&proto)?;
    Ok(lowered)
}

fn mirrors(policies: Vec<pb::route_action::RequestMirrorPolicy>) -> Result<Vec<MirrorPolicy>, Unsupported> {
    let mut lowered = Vec::with_capacity(policies.len());
    for (index, mut proto) in policies.into_iter().enumerate() {
        let mut one = || {
            if proto.cluster.is_empty() {
                return Err(Unsupported::missing("cluster"));
            }
            let fraction = proto.runtime_fraction.take().map(|f| runtime_fraction(&f)).transpose();
            // Copies carry the trace of the request whatever this says: sampling is decided once.
            proto.trace_sampled = None;
            let policy = MirrorPolicy {
                cluster: std::mem::take(&mut proto.cluster).into(),
                fraction: fraction.within("runtime_fraction")?,
                shadow_suffix: !std::mem::take(&mut proto.disable_shadow_host_suffix_append),
            };
            nothing_left(&proto)?;
            Ok(policy)
        };
        lowered.push(one().within_item("request_mirror_policies", index)?);
    }
    Ok(lowered)
}

fn hash_policy(proto: &pb::route_action::HashPolicy) -> Result<HashPolicy, Unsupported> {
    use pb::route_action::hash_policy::PolicySpecifier;
    let source = match &proto.policy_specifier {
        Some(PolicySpecifier::Header(header)) if header.regex_rewrite.is_none() => {
            HashSource::Header(header.header_name.to_ascii_lowercase().into())
        }
        Some(PolicySpecifier::Header(_)) => return Err(Unsupported::not_built("header.regex_rewrite")),
        Some(PolicySpecifier::Cookie(cookie)) => HashSource::Cookie {
            name: cookie.name.as_str().into(),
            ttl: optional_duration(cookie.ttl, "cookie.ttl")?,
            path: cookie.path.as_str().into(),
            attributes: cookie
                .attributes
                .iter()
                .map(|attribute| (attribute.name.as_str().into(), attribute.value.as_str().into()))
                .collect(),
        },
        Some(PolicySpecifier::ConnectionProperties(properties)) if properties.source_ip => HashSource::SourceIp,
        Some(PolicySpecifier::QueryParameter(query)) => HashSource::Query(query.name.as_str().into()),
        _ => return Err(Unsupported::not_built("policy_specifier")),
    };
    Ok(HashPolicy { source, terminal: proto.terminal })
}

fn redirect(mut proto: pb::RedirectAction) -> Result<Redirect, Unsupported> {
    use pb::redirect_action::{PathRewriteSpecifier, RedirectResponseCode as Code, SchemeRewriteSpecifier};
    let status = match Code::try_from(std::mem::take(&mut proto.response_code)) {
        Ok(Code::MovedPermanently) => 301,
        Ok(Code::Found) => 302,
        Ok(Code::SeeOther) => 303,
        Ok(Code::TemporaryRedirect) => 307,
        Ok(Code::PermanentRedirect) => 308,
        Err(_) => return Err(Unsupported::new("response_code", "is not known")),
    };
    let scheme = match proto.scheme_rewrite_specifier.take() {
        None | Some(SchemeRewriteSpecifier::HttpsRedirect(false)) => None,
        Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => Some("https".into()),
        Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) if scheme.is_empty() => None,
        Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => Some(scheme.into()),
    };
    let path = match proto.path_rewrite_specifier.take() {
        None => RedirectPath::Keep,
        Some(PathRewriteSpecifier::PathRedirect(path)) if path.is_empty() => RedirectPath::Keep,
        Some(PathRewriteSpecifier::PathRedirect(path)) => RedirectPath::Path(path.into()),
        Some(PathRewriteSpecifier::PrefixRewrite(prefix)) => RedirectPath::Prefix(prefix.into()),
        Some(PathRewriteSpecifier::RegexRewrite(rewrite)) => {
            RedirectPath::Regex(Rewrite::lower(&rewrite).within("regex_rewrite")?)
        }
        Some(PathRewriteSpecifier::PathRewrite(_)) => return Err(Unsupported::not_built("path_rewrite")),
    };
    let port = u16::try_from(std::mem::take(&mut proto.port_redirect))
        .map_err(|_| Unsupported::new("port_redirect", "is not a port"))?;
    let lowered = Redirect {
        status,
        scheme,
        host: std::mem::take(&mut proto.host_redirect).into(),
        port,
        path,
        strip_query: std::mem::take(&mut proto.strip_query),
    };
    nothing_left(&proto)?;
    Ok(lowered)
}

fn direct(mut proto: pb::DirectResponseAction, body_max: usize) -> Result<Direct, Unsupported> {
    use core::data_source::Specifier;
    let status = u16::try_from(std::mem::take(&mut proto.status)).unwrap_or_default();
    if !(200..600).contains(&status) {
        return Err(Unsupported::new("status", "must be 200 to 599"));
    }
    let body = match proto.body.take().and_then(|body| body.specifier) {
        None => Bytes::new(),
        Some(Specifier::InlineBytes(bytes)) => bytes.into(),
        Some(Specifier::InlineString(text)) => text.into_bytes().into(),
        Some(_) => return Err(Unsupported::not_built("body.filename")),
    };
    if body.len() > body_max {
        return Err(Unsupported::new("body", format!("is larger than {body_max} bytes")));
    }
    nothing_left(&proto)?;
    Ok(Direct { status, body })
}

fn overrides(settings: HashMap<String, Any>) -> Result<Overrides, Unsupported> {
    let mut settings: Vec<_> = settings.into_iter().collect();
    settings.sort_by(|a, b| a.0.cmp(&b.0));
    let mut lowered = Vec::with_capacity(settings.len());
    for (name, any) in settings {
        let setting = override_of(&any).within(&format!("typed_per_filter_config[{name:?}]"))?;
        lowered.push((name.into(), setting));
    }
    Ok(Overrides(lowered))
}

fn override_of(any: &Any) -> Result<Override, Unsupported> {
    Ok(match type_name(&any.type_url) {
        "envoy.config.route.v3.FilterConfig" => {
            let mut config: pb::FilterConfig = unpack(any, "")?;
            if std::mem::take(&mut config.disabled) {
                return Ok(Override::Disabled);
            }
            config.is_optional = false;
            let inner = config.config.take();
            nothing_left(&config)?;
            match inner {
                // An empty `Any` in the wrapper switches a filter on that the list has switched off.
                None => Override::Enabled,
                Some(inner) if inner.type_url.is_empty() => Override::Enabled,
                Some(inner) => override_of(&inner)?,
            }
        }
        "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
            Override::Fault(Box::new(Fault::lower(&unpack(any, "")?)?))
        }
        "envoy.extensions.filters.http.cors.v3.CorsPolicy" => {
            Override::Cors(Box::new(CorsPolicy::lower(&unpack(any, "")?)?))
        }
        "envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig" => {
            Override::Jwt(crate::jwt::PerRoute::lower(&unpack(any, "")?)?)
        }
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute" => {
            Override::ExtAuthz(crate::ext_authz::PerRoute::lower(&unpack(any, "")?)?)
        }
        "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute" => {
            Override::HeaderMutation(Box::new(Mutations::lower_per_route(&unpack(any, "")?)?))
        }
        "envoy.extensions.filters.http.rbac.v3.RBACPerRoute" => {
            Override::Rbac(Rbac::lower_per_route(&unpack(any, "")?)?.map(Box::new))
        }
        other => return Err(Unsupported::new("", format!("{other} is not supported"))),
    })
}
