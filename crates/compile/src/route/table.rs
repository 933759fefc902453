//! The tables of a sidecar: one per HTTP port, one per service with a port of unknown protocol.
//!
//! *Source*: `docs/parity.md`, Traffic 1.4, 1.5, 2.1.

use std::collections::BTreeSet;
use std::sync::Arc;

use api::networking as net;
use envoy_types::pb::envoy::config::route::v3::{
    DirectResponseAction, Route, RouteConfiguration, VirtualHost, route, route_action,
};
use mesh::{MESH_GATEWAY, Registry, Service, ServiceAddress, ServicePort, VirtualService, host};

use super::http::{self, Inputs, Place};
use super::{default_route, match_all};
use crate::context::Context;
use crate::names;
use crate::wire::{boolean, uint};

/// Which table.
pub(crate) enum Table<'a> {
    /// Of a port that services share, `<port>`.
    Shared(u16),
    /// Of one port of one service, `<host>:<port>`: every host is its own.
    Private(&'a Arc<Service>, &'a ServicePort),
}

/// What a table is made of.
pub(crate) struct Sources<'a> {
    pub(crate) services: &'a [Arc<Service>],
    pub(crate) virtual_services: &'a [Arc<VirtualService>],
}

/// Builds a table of a sidecar.
pub(crate) fn build(
    context: &Context<'_>,
    name: String,
    table: &Table<'_>,
    sources: &Sources<'_>,
) -> RouteConfiguration {
    let mut virtual_hosts = match table {
        Table::Shared(port) => shared(context, *port, sources),
        Table::Private(service, port) => vec![virtual_host(
            format!("{}:{}", service.host, port.number),
            vec!["*".into()],
            service_routes(context, service, port, sources),
        )],
    };
    for host in &mut virtual_hosts {
        host.include_request_attempt_count = context.counts_attempts();
    }
    RouteConfiguration {
        name,
        virtual_hosts,
        validate_clusters: boolean(false),
        max_direct_response_body_size_bytes: uint(1_048_576),
        ignore_port_in_host_matching: true,
        ..RouteConfiguration::default()
    }
}

fn virtual_host(name: String, domains: Vec<String>, routes: Vec<Route>) -> VirtualHost {
    VirtualHost { name, domains, routes, ..VirtualHost::default() }
}

/// The VirtualService that routes a host: the narrowest of its hosts decides, then the oldest.
pub(crate) fn routing<'a>(
    virtual_services: &'a [Arc<VirtualService>],
    service_host: &str,
) -> Option<&'a Arc<VirtualService>> {
    virtual_services
        .iter()
        .filter(|vs| !vs.http.is_empty() && vs.best_host_for(service_host).is_some())
        .rev()
        .max_by_key(|vs| vs.best_host_for(service_host).map(host::specificity))
}

fn translated(context: &Context<'_>, vs: &VirtualService, port: u16) -> Vec<Route> {
    http::routes(&Inputs { context, virtual_service: vs, gateways: &[MESH_GATEWAY], port, place: Place::Sidecar })
}

/// The routes of one service port: its VirtualService's, or the default.
fn service_routes(
    context: &Context<'_>,
    service: &Arc<Service>,
    port: &ServicePort,
    sources: &Sources<'_>,
) -> Vec<Route> {
    if let Some(vs) = routing(sources.virtual_services, &service.host) {
        let routes = translated(context, vs, port.number);
        if !routes.is_empty() {
            return routes;
        }
    }
    let cluster = names::cluster(port.number, "", &service.host);
    let operation = format!("{}:{}/*", service.host, port.number);
    vec![default_route(context, &cluster, operation, http::hash_policy(context, service, port.number, "", true))]
}

fn shared(context: &Context<'_>, port: u16, sources: &Sources<'_>) -> Vec<VirtualHost> {
    let in_table: Vec<(&Arc<Service>, &ServicePort)> = sources
        .services
        .iter()
        .filter_map(|service| Some((service, service.port(port).filter(|port| port.protocol.is_http_or_auto())?)))
        .collect();
    let mut hosts = Hosts::default();
    for (service, service_port) in &in_table {
        hosts.add(format!("{}:{port}", service.host), domains(context, service), || {
            service_routes(context, service, service_port, sources)
        });
    }
    // Hosts of a VirtualService that no service of this table carries: beside a sister host, and on 80.
    for vs in sources.virtual_services.iter().filter(|vs| !vs.http.is_empty()) {
        let serves = in_table.iter().any(|(service, _)| {
            routing(sources.virtual_services, &service.host).is_some_and(|best| Arc::ptr_eq(best, vs))
        });
        if !serves && port != 80 {
            continue;
        }
        for name in &vs.hosts {
            let carried = in_table.iter().any(|(service, _)| {
                if host::is_wildcard(name) { host::covers(name, &service.host) } else { *service.host == **name }
            });
            if carried {
                continue;
            }
            let routes = translated(context, vs, port);
            if !routes.is_empty() {
                hosts.add(format!("{name}:{port}"), vec![name.to_string()], || routes);
            }
        }
    }
    let mut all = hosts.list;
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all.push(catch_all(context));
    all
}

/// Virtual hosts whose names and domains are each used once; the first keeps a domain.
#[derive(Default)]
struct Hosts {
    list: Vec<VirtualHost>,
    names: BTreeSet<String>,
    domains: BTreeSet<String>,
}

impl Hosts {
    fn add(&mut self, name: String, domains: Vec<String>, routes: impl FnOnce() -> Vec<Route>) {
        if self.names.contains(&name) {
            return;
        }
        let free: Vec<String> =
            domains.into_iter().filter(|domain| self.domains.insert(domain.to_ascii_lowercase())).collect();
        if free.is_empty() {
            return;
        }
        self.names.insert(name.clone());
        self.list.push(virtual_host(name, free, routes()));
    }
}

/// Every name under which applications of the proxy's namespace write a service's host.
pub(crate) fn domains(context: &Context<'_>, service: &Service) -> Vec<String> {
    let mut out = Vec::new();
    let namespace = &*context.view.namespace;
    let suffix = format!(".svc.{}", context.snapshot.domain());
    let push = |host: &str, out: &mut Vec<String>| {
        out.push(host.to_owned());
        out.push(format!("{host}."));
        let Some((short, own_namespace)) = host
            .strip_suffix(&suffix)
            .and_then(|head| head.rsplit_once('.'))
            .filter(|_| service.registry == Registry::Kubernetes)
        else {
            return;
        };
        if own_namespace == namespace {
            out.push(short.to_owned());
            out.push(format!("{short}.{own_namespace}.svc"));
            out.push(format!("{short}.{own_namespace}"));
        } else {
            out.push(format!("{short}.{own_namespace}"));
            out.push(format!("{short}.{own_namespace}.svc"));
        }
    };
    push(&service.host, &mut out);
    for alias in &service.aliases {
        push(alias, &mut out);
    }
    if service.is_headless {
        // Names of single pods get the service's routes.
        let wild: Vec<String> = out.iter().map(|domain| format!("*.{domain}")).collect();
        out.extend(wild);
    }
    for address in service.addresses_for(context.view.captures_dns) {
        if let ServiceAddress::Ip(ip) = address {
            out.push(if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() });
        }
    }
    out
}

/// What hosts get that nothing declares.
fn catch_all(context: &Context<'_>) -> VirtualHost {
    if context.scope.outbound_mode == net::OutboundMode::RegistryOnly {
        let refuse = Route {
            name: "block_all".into(),
            r#match: Some(match_all()),
            action: Some(route::Action::DirectResponse(DirectResponseAction {
                status: 502,
                ..DirectResponseAction::default()
            })),
            ..Route::default()
        };
        return virtual_host("block_all".into(), vec!["*".into()], vec![refuse]);
    }
    let mut action = super::action(None);
    action.cluster_specifier = Some(route_action::ClusterSpecifier::Cluster(unknown_cluster(context)));
    let pass = Route {
        name: "allow_any".into(),
        r#match: Some(match_all()),
        action: Some(route::Action::Route(action)),
        ..Route::default()
    };
    virtual_host("allow_any".into(), vec!["*".into()], vec![pass])
}

/// The cluster of destinations that nothing declares.
pub(crate) fn unknown_cluster(context: &Context<'_>) -> String {
    if context.scope.outbound_mode == net::OutboundMode::RegistryOnly {
        return names::BLACK_HOLE.to_owned();
    }
    match &context.scope.egress_proxy {
        Some(proxy) => {
            let port = proxy.port.as_ref().map_or(0, |port| port.number);
            names::cluster(port, &proxy.subset, &proxy.host)
        }
        None => names::PASSTHROUGH.to_owned(),
    }
}
