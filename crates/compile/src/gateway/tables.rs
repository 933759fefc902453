//! Route tables of gateways.
//!
//! Source: `docs/parity.md`, Traffic 4.2.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::route::v3::{
    Route, RouteConfiguration, VirtualHost, virtual_host::TlsRequirementType,
};
use mesh::host;

use super::listener::bound;
use super::servers::{OpenPort, OpenServer, Serving};
use crate::context::Context;
use crate::route::http;
use crate::wire;

/// What gathers under one host before it is a virtual host.
struct Gathered {
    /// The port of the server that named it first.
    number: u16,
    routes: Vec<Route>,
    redirects: bool,
    /// VirtualService and gateway whose routes are in.
    from: Vec<(types::ObjectRef, String)>,
}

/// The tables of one port: one for all plaintext servers, one for each HTTPS server.
pub(crate) fn build(context: &Context<'_>, port: &OpenPort) -> Vec<RouteConfiguration> {
    let plain: Vec<&OpenServer> = port.servers.iter().filter(|server| server.serving == Serving::Http).collect();
    let mut tables = Vec::new();
    if let Some(first) = plain.first() {
        tables.push(table(context, &first.table, &plain, first.number));
    }
    for server in port.servers.iter().filter(|server| server.serving == Serving::Https) {
        tables.push(table(context, &server.table, &[server], server.number));
    }
    tables
}

fn table(context: &Context<'_>, name: &str, servers: &[&OpenServer], number: u16) -> RouteConfiguration {
    let mut gathered: BTreeMap<Box<str>, Gathered> = BTreeMap::new();
    for server in servers {
        let key = server.gateway_key();
        for (service, hosts) in bound(context, server) {
            let from = (service.object.clone(), key.clone());
            let routes = http::routes(&http::Inputs {
                context,
                virtual_service: &service,
                gateways: &[&key],
                port: server.number,
                place: http::Place::Gateway { is_tls: server.serving == Serving::Https },
            });
            for host in hosts {
                let entry = gathered.entry(host).or_insert_with(|| Gathered::new(server.number));
                entry.redirects |= server.redirects();
                if !entry.from.contains(&from) && !routes.is_empty() {
                    entry.add(&routes);
                    entry.from.push(from.clone());
                }
            }
        }
        if server.redirects() {
            for host in &server.hosts {
                gathered.entry(host.name.clone()).or_insert_with(|| Gathered::new(server.number)).redirects = true;
            }
        }
    }
    gathered.retain(|_, entry| entry.redirects || !entry.routes.is_empty());
    let mut virtual_hosts = collapse(gathered);
    for host in &mut virtual_hosts {
        host.include_request_attempt_count = context.counts_attempts();
    }
    if virtual_hosts.is_empty() {
        virtual_hosts.push(VirtualHost {
            name: format!("blackhole:{number}"),
            domains: vec!["*".to_owned()],
            ..VirtualHost::default()
        });
    }
    RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts,
        validate_clusters: wire::boolean(false),
        max_direct_response_body_size_bytes: wire::uint(1_048_576),
        ignore_port_in_host_matching: true,
        ..RouteConfiguration::default()
    }
}

impl Gathered {
    fn new(number: u16) -> Self {
        Self { number, routes: Vec::new(), redirects: false, from: Vec::new() }
    }

    /// Appends the routes of one more VirtualService; what takes everything goes last, in order.
    fn add(&mut self, more: &[Route]) {
        if self.routes.is_empty() {
            self.routes = more.to_vec();
            return;
        }
        self.routes.extend_from_slice(more);
        self.routes.sort_by_key(http::is_catch_all);
    }
}

/// Hosts with equal routes and TLS requirement share one virtual host, named by the most specific.
fn collapse(gathered: BTreeMap<Box<str>, Gathered>) -> Vec<VirtualHost> {
    let mut hosts: Vec<(Box<str>, Gathered)> = gathered.into_iter().collect();
    hosts.sort_by(|(a, _), (b, _)| host::specificity(b).cmp(&host::specificity(a)).then_with(|| a.cmp(b)));
    let mut out: Vec<VirtualHost> = Vec::new();
    for (host, entry) in hosts {
        let require_tls = if entry.redirects { TlsRequirementType::All } else { TlsRequirementType::None };
        let twin =
            out.iter_mut().find(|other| other.require_tls == i32::from(require_tls) && other.routes == entry.routes);
        if let Some(twin) = twin {
            twin.domains.push(host.into());
            continue;
        }
        out.push(VirtualHost {
            name: format!("{host}:{}", entry.number),
            domains: vec![host.into()],
            routes: entry.routes,
            require_tls: require_tls.into(),
            ..VirtualHost::default()
        });
    }
    // A virtual host for everything goes last.
    out.sort_by(|a, b| {
        let is_last = |of: &VirtualHost| of.domains.iter().any(|domain| domain == "*");
        is_last(a).cmp(&is_last(b)).then_with(|| a.name.cmp(&b.name))
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use envoy_types::pb::envoy::config::route::v3::{RouteMatch, route_match};

    fn route(name: &str, path: route_match::PathSpecifier) -> Route {
        Route {
            name: name.to_owned(),
            r#match: Some(RouteMatch { path_specifier: Some(path), ..RouteMatch::default() }),
            ..Route::default()
        }
    }

    fn prefix(path: &str) -> Route {
        route(path, route_match::PathSpecifier::Prefix(path.to_owned()))
    }

    fn names(routes: &[Route]) -> Vec<&str> {
        routes.iter().map(|route| route.name.as_str()).collect()
    }

    #[test]
    fn what_takes_everything_goes_last_only_when_merged() {
        let mut one = Gathered::new(80);
        one.add(&[prefix("/a"), prefix("/"), prefix("/b")]);
        assert_eq!(names(&one.routes), ["/a", "/", "/b"]);
        one.add(&[prefix("/c")]);
        assert_eq!(names(&one.routes), ["/a", "/b", "/c", "/"]);
    }

    #[test]
    fn equal_hosts_collapse() {
        let entry = |path: &str, redirects| Gathered {
            redirects,
            ..{
                let mut entry = Gathered::new(80);
                entry.add(&[prefix(path)]);
                entry
            }
        };
        let hosts = collapse(BTreeMap::from([
            ("a.opt.example.com".into(), entry("/x", false)),
            ("absent.example.com".into(), entry("/x", false)),
            ("mesh.example.com".into(), entry("/x", false)),
            ("tls.example.com".into(), entry("/x", true)),
            ("*".into(), entry("/y", false)),
            ("shop.example.com".into(), entry("/y", false)),
        ]));
        let text: Vec<_> = hosts.iter().map(|host| format!("{} {:?}", host.name, host.domains)).collect();
        assert_eq!(
            text,
            [
                r#"absent.example.com:80 ["absent.example.com", "a.opt.example.com", "mesh.example.com"]"#,
                r#"tls.example.com:80 ["tls.example.com"]"#,
                r#"shop.example.com:80 ["shop.example.com", "*"]"#,
            ]
        );
    }
}
