//! Which outbound listeners there are, and which service owns what of them.
//!
//! Services come oldest first, so that the older keeps an address or a match that two claim.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::networking as net;
use mesh::{EgressScope, EndpointAddress, Health, Protocol, Service, ServiceAddress, ServicePort};
use types::wellknown::ports;

use super::tcp::{self, TcpChain};
use crate::context::Context;
use crate::view::Interception;

/// Ports on which no listener is shared by services: the proxy has its own there.
const RESERVED: [u16; 4] = [ports::OUTBOUND, ports::INBOUND, ports::READINESS, ports::PROXY_METRICS];

/// Whether connections are handed over by `virtualOutbound` or dialled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Binding {
    /// Handed over.
    Captured,
    /// Dialled by applications.
    Bound,
}

/// Requests on a listener.
pub(super) struct HttpPart {
    /// The route table.
    pub(super) table: String,
    /// Set when the table is one service's own.
    pub(super) private: Option<(Arc<Service>, ServicePort)>,
    /// Some service speaks gRPC-Web.
    pub(super) has_grpc_web: bool,
}

/// One listener.
pub(super) struct Planned {
    pub(super) address: String,
    pub(super) port: u16,
    pub(super) binding: Binding,
    /// For all addresses: what no chain takes passes through.
    pub(super) is_wildcard: bool,
    /// Which egress listener of the scope it belongs to.
    pub(super) egress: usize,
    pub(super) http: Option<HttpPart>,
    pub(super) tcp: Vec<TcpChain>,
}

/// All listeners, by address and port.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) listeners: BTreeMap<(String, u16), Planned>,
}

impl Plan {
    pub(super) fn of(context: &Context<'_>) -> Self {
        let mut plan = Self::default();
        for (index, egress) in context.scope.egress.iter().enumerate() {
            match &egress.port {
                Some(port) => plan.explicit(context, index, egress, port),
                None => plan.implicit(context, index, egress),
            }
        }
        plan
    }

    /// An egress listener with its own port.
    fn explicit(&mut self, context: &Context<'_>, egress: usize, of: &EgressScope, port: &net::Port) {
        if of.services.is_empty() {
            return;
        }
        let is_bound = of.capture == net::CaptureMode::None || context.view.interception == Interception::None;
        let address = match (&*of.bind, is_bound) {
            ("", true) => Some("127.0.0.1".to_owned()),
            ("", false) => None,
            (bind, _) => Some(bind.to_owned()),
        };
        let binding = if is_bound { Binding::Bound } else { Binding::Captured };
        let protocol = Protocol::parse(&port.protocol).unwrap_or(Protocol::Auto);
        for service in &of.services {
            let Some(service_port) = service.port(port.number) else {
                continue;
            };
            match &address {
                // One address serves all hosts of the entry, as the entry's protocol says.
                Some(address) => {
                    let at = Place { address: address.clone(), is_wildcard: false, binding, egress };
                    if protocol.is_http() || (protocol.is_auto() && service_port.protocol.is_http()) {
                        self.add_http(&at, port.number, service_port.protocol);
                    } else {
                        let chains = tcp::chains(context, of, service, service_port, &[], true);
                        self.add_tcp(&at, port.number, chains);
                    }
                }
                None => self.service_port(context, egress, of, service, service_port),
            }
        }
    }

    /// The listeners of every service's ports.
    fn implicit(&mut self, context: &Context<'_>, egress: usize, of: &EgressScope) {
        for service in &of.services {
            for port in &service.ports {
                self.service_port(context, egress, of, service, port);
            }
        }
    }

    fn service_port(
        &mut self,
        context: &Context<'_>,
        egress: usize,
        of: &EgressScope,
        service: &Arc<Service>,
        port: &ServicePort,
    ) {
        let is_bound = context.view.interception == Interception::None;
        let binding = if is_bound { Binding::Bound } else { Binding::Captured };
        let any = if is_bound { "127.0.0.1" } else { "0.0.0.0" };
        let shared = Place { address: any.to_owned(), is_wildcard: !is_bound, binding, egress };
        if port.protocol.is_http() {
            if !RESERVED.contains(&port.number) {
                self.add_http(&shared, port.number, port.protocol);
            }
            return;
        }
        let addresses = service.addresses_for(context.view.captures_dns);
        let mut own: Vec<String> = addresses
            .iter()
            .filter_map(|address| match address {
                ServiceAddress::Ip(ip) if !ip.is_unspecified() => Some(ip.to_string()),
                ServiceAddress::Ip(_) | ServiceAddress::Range(_) => None,
            })
            .collect();
        let ranges: Vec<_> = addresses
            .iter()
            .filter_map(|address| match address {
                ServiceAddress::Range(range) => Some(*range),
                ServiceAddress::Ip(_) => None,
            })
            .collect();
        if service.is_headless {
            own = pod_addresses(context, service, port);
        }
        for address in &own {
            let at = Place { address: address.clone(), is_wildcard: false, binding, egress };
            self.add_own(context, &at, of, service, port);
        }
        let has_no_address = own.is_empty() && ranges.is_empty() && !service.is_headless;
        if (has_no_address || !ranges.is_empty()) && !RESERVED.contains(&port.number) {
            if port.protocol.is_auto() && has_no_address {
                self.add_http(&shared, port.number, port.protocol);
            }
            let chains = tcp::chains(context, of, service, port, &ranges, false);
            self.add_tcp(&shared, port.number, chains);
        }
    }

    /// A listener on an address of one service.
    fn add_own(
        &mut self,
        context: &Context<'_>,
        at: &Place,
        of: &EgressScope,
        service: &Arc<Service>,
        port: &ServicePort,
    ) {
        let key = (at.address.clone(), port.number);
        if self.listeners.contains_key(&key) {
            context.warn(
                "LAT0320",
                &service.object,
                "spec.ports",
                format!(
                    "an older service already has {}:{}, so this one gets no listener there",
                    at.address, port.number
                ),
                "give it another address",
            );
            return;
        }
        let http = port.protocol.is_auto().then(|| HttpPart {
            table: format!("{}:{}", service.host, port.number),
            private: Some((Arc::clone(service), port.clone())),
            has_grpc_web: false,
        });
        self.listeners.insert(
            key,
            Planned { http, tcp: tcp::chains(context, of, service, port, &[], true), ..at.planned(port.number) },
        );
    }

    fn add_http(&mut self, at: &Place, port: u16, protocol: Protocol) {
        let planned = self.listeners.entry((at.address.clone(), port)).or_insert_with(|| at.planned(port));
        let http = planned.http.get_or_insert_with(|| HttpPart {
            table: port.to_string(),
            private: None,
            has_grpc_web: false,
        });
        http.has_grpc_web |= protocol == Protocol::GrpcWeb;
    }

    /// Adds chains whose match nobody has yet.
    fn add_tcp(&mut self, at: &Place, port: u16, chains: Vec<TcpChain>) {
        let planned = self.listeners.entry((at.address.clone(), port)).or_insert_with(|| at.planned(port));
        for chain in chains {
            let taken = planned
                .tcp
                .iter()
                .any(|other| other.server_names == chain.server_names && other.ranges == chain.ranges);
            if !taken {
                planned.tcp.push(chain);
            }
        }
    }
}

struct Place {
    address: String,
    is_wildcard: bool,
    binding: Binding,
    egress: usize,
}

impl Place {
    fn planned(&self, port: u16) -> Planned {
        Planned {
            address: self.address.clone(),
            port,
            binding: self.binding,
            is_wildcard: self.is_wildcard,
            egress: self.egress,
            http: None,
            tcp: Vec::new(),
        }
    }
}

/// Pods behind a headless service, but not the proxy's own: that one is not captured.
fn pod_addresses(context: &Context<'_>, service: &Service, port: &ServicePort) -> Vec<String> {
    let set = context.snapshot.endpoints(&service.key());
    let mut out: Vec<String> = set
        .port(port.number)
        .iter()
        .filter(|endpoint| endpoint.health != Health::NotReady)
        .filter_map(|endpoint| match &endpoint.address {
            EndpointAddress::Ip(ip) if !context.view.ips.contains(ip) => Some(ip.to_string()),
            _ => None,
        })
        .collect();
    out.dedup();
    out
}
