//! Small meshes written as YAML, for tests of this module and of gateways.

use std::fmt::Write as _;

use engine::config::Table;
use engine::lower::{self, Raw};
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, filter};
use envoy_types::pb::envoy::config::rbac::v3 as rbac;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::{ExtAuthz, ext_authz};
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::{
    JwtAuthentication, JwtRequirement, jwt_provider, jwt_requirement, requirement_rule,
};
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, http_connection_manager, http_filter,
};
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as NetworkRbac;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::DownstreamTlsContext;
use envoy_types::pb::google::protobuf::Any;
use mesh::MeshSnapshot;
use prost::Message as _;
use types::wellknown::type_urls;

use super::render;
use crate::view::{ProxyKind, View};

/// The snapshot of a YAML text; every object must be admitted, and our proxy must take whatever is
/// compiled from it, as a sidecar of each namespace and as the gateway.
pub(crate) fn snapshot(yaml: &str) -> MeshSnapshot {
    let documents = api::parse_documents("test.yaml", yaml);
    assert!(!documents.has_errors(), "{:#?}", documents.findings);
    let objects: Vec<_> = documents.one_after_another().collect();
    let mut views = vec![view(ProxyKind::Router, "istio-system", &["istio=ingressgateway"])];
    for object in objects.iter().filter(|object| !object.meta.namespace.is_empty()) {
        let mut sidecar = view(ProxyKind::Sidecar, &object.meta.namespace, &[]);
        views.push(sidecar.clone());
        if let Some(labels) = object.raw["spec"]["selector"]["matchLabels"].as_object() {
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            sidecar.labels = labels.iter().map(|(key, value)| (key.clone(), text(value))).collect();
            views.push(sidecar);
        }
    }
    let snapshot = MeshSnapshot::next(None, &api::ConfigSet::new(objects)).0;
    for view in views {
        let resources = crate::compile(&snapshot, &view);
        assert_eq!(refused(&resources), Vec::<String>::new(), "{:?} of {}", view.kind, view.namespace);
    }
    snapshot
}

/// What our own proxy would refuse.
fn refused(resources: &crate::Resources) -> Vec<String> {
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

/// A proxy of `namespace` with labels written `key=value`.
pub(crate) fn view(kind: ProxyKind, namespace: &str, labels: &[&str]) -> View {
    let mut view = View::sidecar(namespace, "pod", "10.0.0.1".parse().unwrap());
    view.kind = kind;
    view.labels = labels
        .iter()
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap();
            (key.to_owned(), value.to_owned())
        })
        .collect();
    view
}

fn config(filter: &Filter) -> &Any {
    let Some(filter::ConfigType::TypedConfig(config)) = &filter.config_type else { panic!("{}", filter.name) };
    config
}

fn http_config(filter: &HttpFilter) -> &Any {
    let Some(http_filter::ConfigType::TypedConfig(config)) = &filter.config_type else { panic!("{}", filter.name) };
    config
}

/// `name match -> filters TLS[alpn]`
pub(crate) fn chain(chain: &FilterChain) -> String {
    let mut text = chain.name.clone();
    if let Some(of) = &chain.filter_chain_match {
        if let Some(port) = of.destination_port {
            write!(text, " :{}", port.value).unwrap();
        }
        if !of.server_names.is_empty() {
            write!(text, " {}", of.server_names.join(",")).unwrap();
        }
        if !of.transport_protocol.is_empty() {
            write!(text, " {}", of.transport_protocol).unwrap();
        }
        if !of.application_protocols.is_empty() {
            write!(text, "[{}]", of.application_protocols.join(",")).unwrap();
        }
    }
    text += " ->";
    for filter in &chain.filters {
        let shown = match filter.name.rsplit('.').next().unwrap() {
            "http_connection_manager" => {
                let manager = HttpConnectionManager::decode(config(filter).value.as_slice()).unwrap();
                let routes = match manager.route_specifier.as_ref().unwrap() {
                    http_connection_manager::RouteSpecifier::ScopedRoutes(_) => panic!("scoped routes"),
                    http_connection_manager::RouteSpecifier::Rds(rds) => rds.route_config_name.clone(),
                    http_connection_manager::RouteSpecifier::RouteConfig(table) => {
                        let decorator = table.virtual_hosts[0].routes[0].decorator.as_ref().unwrap();
                        format!("{} {}", table.name, decorator.operation)
                    }
                };
                format!(" HTTP({routes})")
            }
            "tcp_proxy" => {
                let proxy = TcpProxy::decode(config(filter).value.as_slice()).unwrap();
                match proxy.cluster_specifier.unwrap() {
                    tcp_proxy::ClusterSpecifier::Cluster(name) => format!(" TCP({name})"),
                    tcp_proxy::ClusterSpecifier::WeightedClusters(all) => {
                        let parts: Vec<_> =
                            all.clusters.iter().map(|of| format!("{} {}", of.weight, of.name)).collect();
                        format!(" TCP({}: {})", proxy.stat_prefix, parts.join(", "))
                    }
                }
            }
            "stats" | "metadata_exchange" => String::new(),
            other => format!(" {other}"),
        };
        text.push_str(&shown);
    }
    if let Some(socket) = &chain.transport_socket {
        let Some(envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType::TypedConfig(any)) =
            &socket.config_type
        else {
            panic!("no TLS context")
        };
        let tls = DownstreamTlsContext::decode(any.value.as_slice()).unwrap();
        text += &context(&tls);
    }
    text
}

fn context(tls: &DownstreamTlsContext) -> String {
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
    let common = tls.common_tls_context.as_ref().unwrap();
    let names: Vec<_> = common.tls_certificate_sds_secret_configs.iter().map(|of| of.name.as_str()).collect();
    let mut text = format!(" TLS({}", names.join(" "));
    if let Some(ValidationContextType::CombinedValidationContext(validation)) = &common.validation_context_type {
        let requires = tls.require_client_certificate.is_some_and(|of| of.value);
        let roots = &validation.validation_context_sds_secret_config.as_ref().unwrap().name;
        write!(text, " {}={roots}", if requires { "requires" } else { "accepts" }).unwrap();
        #[expect(deprecated, reason = "Istio sends the older field")]
        let names = &validation.default_validation_context.as_ref().unwrap().match_subject_alt_names;
        for name in names {
            write!(text, " san{}", render::string(name)).unwrap();
        }
    }
    if let Some(parameters) = &common.tls_params {
        write!(
            text,
            " {}..{} {} suites",
            parameters.tls_minimum_protocol_version,
            parameters.tls_maximum_protocol_version,
            parameters.cipher_suites.len()
        )
        .unwrap();
        for curve in &parameters.ecdh_curves {
            write!(text, " {curve}").unwrap();
        }
    }
    text + &format!(" {})", common.alpn_protocols.join(","))
}

fn rules(word: &str, rules: Option<&rbac::Rbac>, out: &mut Vec<String>) {
    let Some(rules) = rules else { return };
    let action = if rules.action == 0 { "ALLOW" } else { "DENY" };
    if rules.policies.is_empty() {
        out.push(format!("{word}{action} nothing"));
    }
    let mut names: Vec<_> = rules.policies.keys().collect();
    names.sort();
    for name in names {
        out.push(format!("{word}{action} {name}: {}", render::policy(&rules.policies[name])));
    }
}

/// The HTTP filters of policies, one line a rule, provider or requirement.
pub(crate) fn http_filters(filters: &[HttpFilter]) -> Vec<String> {
    let mut out = Vec::new();
    for filter in filters {
        let bytes = http_config(filter).value.as_slice();
        match filter.name.as_str() {
            "envoy.filters.http.rbac" => {
                let filter = Rbac::decode(bytes).unwrap();
                rules("", filter.rules.as_ref(), &mut out);
                rules(&format!("[{}] ", filter.shadow_rules_stat_prefix), filter.shadow_rules.as_ref(), &mut out);
            }
            "envoy.filters.http.ext_authz" => {
                let filter = ExtAuthz::decode(bytes).unwrap();
                let target = match filter.services.as_ref().unwrap() {
                    ext_authz::Services::HttpService(http) => {
                        let uri = http.server_uri.as_ref().unwrap();
                        format!("{} {}", uri.uri, http.path_prefix)
                    }
                    ext_authz::Services::GrpcService(_) => "grpc".to_owned(),
                };
                out.push(format!("ask {target} open={}", filter.failure_mode_allow));
            }
            "envoy.filters.http.jwt_authn" | "lateen.filters.http.every_token" => {
                tokens(&JwtAuthentication::decode(bytes).unwrap(), &mut out);
            }
            other => panic!("{other}"),
        }
    }
    out
}

/// The network filters of policies, one line a rule.
pub(crate) fn tcp_filters(filters: &[Filter]) -> Vec<String> {
    let mut out = Vec::new();
    for filter in filters {
        match filter.name.as_str() {
            "envoy.filters.network.rbac" => {
                let filter = NetworkRbac::decode(config(filter).value.as_slice()).unwrap();
                rules("", filter.rules.as_ref(), &mut out);
                rules(&format!("[{}] ", filter.shadow_rules_stat_prefix), filter.shadow_rules.as_ref(), &mut out);
            }
            "envoy.filters.network.ext_authz" => out.push("ask grpc".to_owned()),
            other => panic!("{other}"),
        }
    }
    out
}

fn tokens(filter: &JwtAuthentication, out: &mut Vec<String>) {
    let mut names: Vec<_> = filter.providers.keys().collect();
    names.sort();
    for name in names {
        let of = &filter.providers[name];
        let keys = match of.jwks_source_specifier.as_ref().unwrap() {
            jwt_provider::JwksSourceSpecifier::LocalJwks(source) => match source.specifier.as_ref().unwrap() {
                envoy_types::pb::envoy::config::core::v3::data_source::Specifier::InlineString(text) => text.clone(),
                other => panic!("{other:?}"),
            },
            jwt_provider::JwksSourceSpecifier::RemoteJwks(_) => panic!("fetched by the proxy"),
        };
        let mut line = format!("{name}: iss={} keys={keys}", of.issuer);
        let headers: Vec<_> = of.from_headers.iter().map(|h| format!("{}:{}", h.name, h.value_prefix)).collect();
        for (word, list) in
            [("aud", &of.audiences), ("header", &headers), ("param", &of.from_params), ("cookie", &of.from_cookies)]
        {
            if !list.is_empty() {
                write!(line, " {word}={}", list.join("|")).unwrap();
            }
        }
        for claim in &of.claim_to_headers {
            write!(line, " {}->{}", claim.claim_name, claim.header_name).unwrap();
        }
        if !of.forward_payload_header.is_empty() {
            write!(line, " payload->{}", of.forward_payload_header).unwrap();
        }
        for (word, flag) in [("forward", of.forward), ("reroute", of.clear_route_cache)] {
            if flag {
                write!(line, " {word}").unwrap();
            }
        }
        out.push(line);
    }
    for rule in &filter.rules {
        let Some(requirement_rule::RequirementType::Requires(requirement)) = &rule.requirement_type else {
            panic!("no requirement")
        };
        out.push(format!("requires {}", self::requirement(requirement)));
    }
    assert!(filter.bypass_cors_preflight);
}

fn requirement(of: &JwtRequirement) -> String {
    use jwt_requirement::RequiresType;
    let join = |list: &[JwtRequirement]| list.iter().map(requirement).collect::<Vec<_>>().join(", ");
    match of.requires_type.as_ref().unwrap() {
        RequiresType::ProviderName(name) => name.clone(),
        RequiresType::RequiresAny(list) => format!("any({})", join(&list.requirements)),
        RequiresType::RequiresAll(list) => format!("all({})", join(&list.requirements)),
        RequiresType::AllowMissing(_) => "none".to_owned(),
        other => panic!("{other:?}"),
    }
}
