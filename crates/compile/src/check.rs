//! Invariants of any set of resources: names are unique, references lead somewhere, no domain or
//! chain is shadowed.
//!
//! Istio leaves some references dangling, and so do we: a route to a service or subset that does not
//! exist names its cluster all the same, so that requests get 503 with flag NC. [`Report::dangling`]
//! lists those apart from [`Report::broken`], which must be empty.

use std::collections::BTreeSet;

use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, filter};
use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, route, route_action};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, http_connection_manager as hcm,
};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy};
use prost::Message;

use crate::resources::Resources;

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Mistakes of the compiler: each breaks a proxy or makes it refuse a resource.
    pub broken: Vec<String>,
    /// Clusters that routes name and nobody has: requests there get 503 (NC).
    pub dangling: BTreeSet<String>,
}

/// Checks a set of resources.
pub fn check(resources: &Resources) -> Report {
    let mut report = Report::default();
    let clusters = unique("cluster", resources.clusters.iter().map(|of| of.name.as_str()), &mut report);
    let endpoints = unique("endpoints of", resources.endpoints.iter().map(|of| of.cluster_name.as_str()), &mut report);
    unique("listener", resources.listeners.iter().map(|of| of.name.as_str()), &mut report);
    let tables = unique("route table", resources.routes.iter().map(|of| of.name.as_str()), &mut report);
    unique("secret", resources.secrets.iter().map(|of| of.name.as_str()), &mut report);
    for cluster in &resources.clusters {
        let Some(eds) = &cluster.eds_cluster_config else {
            continue;
        };
        if !endpoints.contains(eds.service_name.as_str()) {
            report.broken.push(format!("cluster {} has no endpoints resource", cluster.name));
        }
    }
    for name in &endpoints {
        if !clusters.contains(name) {
            report.broken.push(format!("endpoints of {name} have no cluster"));
        }
    }
    let mut addresses = BTreeSet::new();
    let mut used_tables = BTreeSet::new();
    for listener in &resources.listeners {
        if !addresses.insert(format!("{:?}", listener.address)) {
            report.broken.push(format!("listener {} has the address of another", listener.name));
        }
        let chains: Vec<&FilterChain> = listener.filter_chains.iter().chain(&listener.default_filter_chain).collect();
        if chains.is_empty() {
            report.broken.push(format!("listener {} has no chain", listener.name));
        }
        let mut matches = BTreeSet::new();
        for chain in &listener.filter_chains {
            let key = chain.filter_chain_match.clone().unwrap_or_default();
            if !matches.insert(format!("{key:?}")) {
                report.broken.push(format!("listener {} has two chains with one match", listener.name));
            }
        }
        for chain in chains {
            if chain.filters.is_empty() {
                report.broken.push(format!("a chain of listener {} has no filter", listener.name));
            }
            for of in &chain.filters {
                filter_refers(of, &listener.name, &clusters, &tables, &mut used_tables, &mut report);
            }
        }
    }
    for table in &resources.routes {
        routes_refer(table, &clusters, &mut report);
        if !used_tables.contains(table.name.as_str()) {
            report.broken.push(format!("route table {} is named by no listener", table.name));
        }
    }
    report
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a str>, report: &mut Report) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    for name in names {
        if name.is_empty() {
            report.broken.push(format!("a {what} has no name"));
        }
        if !seen.insert(name) {
            report.broken.push(format!("{what} {name} is there twice"));
        }
    }
    seen
}

fn filter_refers(
    of: &Filter,
    listener: &str,
    clusters: &BTreeSet<&str>,
    tables: &BTreeSet<&str>,
    used_tables: &mut BTreeSet<String>,
    report: &mut Report,
) {
    let Some(filter::ConfigType::TypedConfig(any)) = &of.config_type else {
        report.broken.push(format!("filter {} of listener {listener} has no settings", of.name));
        return;
    };
    match of.name.as_str() {
        "envoy.filters.network.http_connection_manager" => {
            let Ok(manager) = HttpConnectionManager::decode(any.value.as_slice()) else {
                report.broken.push(format!("the connection manager of listener {listener} does not decode"));
                return;
            };
            match &manager.route_specifier {
                Some(hcm::RouteSpecifier::Rds(rds)) => {
                    if !tables.contains(rds.route_config_name.as_str()) {
                        report
                            .broken
                            .push(format!("listener {listener} names the missing table {}", rds.route_config_name));
                    }
                    used_tables.insert(rds.route_config_name.clone());
                }
                Some(hcm::RouteSpecifier::RouteConfig(table)) => routes_refer(table, clusters, report),
                _ => report.broken.push(format!("listener {listener} has no routes")),
            }
            if manager.http_filters.last().is_none_or(|last| last.name != "envoy.filters.http.router") {
                report.broken.push(format!("the filters of listener {listener} do not end with the router"));
            }
        }
        "envoy.filters.network.tcp_proxy" => {
            let Ok(proxy) = TcpProxy::decode(any.value.as_slice()) else {
                report.broken.push(format!("the TCP proxy of listener {listener} does not decode"));
                return;
            };
            match proxy.cluster_specifier {
                Some(tcp_proxy::ClusterSpecifier::Cluster(name)) => refer(&name, clusters, report),
                Some(tcp_proxy::ClusterSpecifier::WeightedClusters(all)) => {
                    for weighted in all.clusters {
                        refer(&weighted.name, clusters, report);
                    }
                }
                None => report.broken.push(format!("the TCP proxy of listener {listener} leads nowhere")),
            }
        }
        _ => {}
    }
}

fn refer(name: &str, clusters: &BTreeSet<&str>, report: &mut Report) {
    if !clusters.contains(name) {
        report.dangling.insert(name.to_owned());
    }
}

fn routes_refer(table: &RouteConfiguration, clusters: &BTreeSet<&str>, report: &mut Report) {
    let mut names = BTreeSet::new();
    let mut domains = BTreeSet::new();
    for host in &table.virtual_hosts {
        if !names.insert(&host.name) {
            report.broken.push(format!("table {} has virtual host {} twice", table.name, host.name));
        }
        if host.domains.is_empty() {
            report.broken.push(format!("virtual host {} of table {} has no domain", host.name, table.name));
        }
        for domain in &host.domains {
            if !domains.insert(domain.to_ascii_lowercase()) {
                report.broken.push(format!("table {} has domain {domain} twice", table.name));
            }
        }
        for of in &host.routes {
            let Some(action) = &of.action else {
                report
                    .broken
                    .push(format!("a route of virtual host {} in table {} does nothing", host.name, table.name));
                continue;
            };
            let route::Action::Route(action) = action else {
                continue;
            };
            match &action.cluster_specifier {
                Some(route_action::ClusterSpecifier::Cluster(name)) => refer(name, clusters, report),
                Some(route_action::ClusterSpecifier::WeightedClusters(all)) => {
                    if all.clusters.is_empty() {
                        report.broken.push(format!(
                            "a route of virtual host {} in table {} has no cluster",
                            host.name, table.name
                        ));
                    }
                    for weighted in &all.clusters {
                        refer(&weighted.name, clusters, report);
                    }
                }
                _ => report
                    .broken
                    .push(format!("a route of virtual host {} in table {} leads nowhere", host.name, table.name)),
            }
            for mirror in &action.request_mirror_policies {
                refer(&mirror.cluster, clusters, report);
            }
        }
    }
}
