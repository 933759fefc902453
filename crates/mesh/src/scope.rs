//! What one proxy sees: services and VirtualServices, cut by `exportTo` and Sidecar.
//!
//! *Source*: `docs/parity.md`, Traffic 1.7 (one host in several namespaces), 1.8, 5.3.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::networking as net;
use types::Labels;

use crate::config::Config;
use crate::host;
use crate::service::{Registry, Service};
use crate::snapshot::MeshSnapshot;
use crate::virtual_service::VirtualService;

/// One egress listener of a Sidecar, or the implicit one that serves everything.
#[derive(Clone, Debug)]
pub struct EgressScope {
    /// Only this port; `None` serves the rest.
    pub port: Option<net::Port>,
    /// Address to bind, or empty.
    pub bind: Box<str>,
    /// How connections reach it.
    pub capture: net::CaptureMode,
    /// What it serves, oldest first; with a port, each service has only that port.
    pub services: Vec<Arc<Service>>,
    /// What routes there, oldest first.
    pub virtual_services: Vec<Arc<VirtualService>>,
}

/// Everything a sidecar may see.
#[derive(Clone, Debug)]
pub struct Scope {
    /// The Sidecar object that cuts, if one does.
    pub sidecar: Option<Config<net::Sidecar>>,
    /// Egress listeners in the order written; the one without a port is last.
    pub egress: Vec<EgressScope>,
    /// All services of all listeners, oldest first, each host once.
    pub services: Vec<Arc<Service>>,
    /// What unknown destinations get.
    pub outbound_mode: net::OutboundMode,
    /// Where unknown destinations go, when a Sidecar says so.
    pub egress_proxy: Option<net::Destination>,
}

impl Scope {
    /// The service of that host, if it is seen.
    pub fn service(&self, host: &str) -> Option<&Arc<Service>> {
        self.services.iter().find(|service| *service.host == *host)
    }
}

/// The services that proxies of `namespace` see, each host once: the namespace's own first, then
/// Kubernetes' over ServiceEntries, then the oldest. Oldest first.
///
/// *Shape*: of each host, `services` has all or none, oldest first.
pub(crate) fn visible_among<'a>(
    services: impl IntoIterator<Item = &'a Arc<Service>>,
    namespace: &str,
) -> Vec<Arc<Service>> {
    let mut best: BTreeMap<&str, &Arc<Service>> = BTreeMap::new();
    let rank = |service: &Service| (*service.namespace != *namespace, service.registry != Registry::Kubernetes);
    for service in services {
        if !service.visibility.is_visible_to(namespace) {
            continue;
        }
        best.entry(&*service.host)
            .and_modify(|current| {
                // Services come oldest first, so an equal rank keeps the older.
                if rank(service) < rank(current) {
                    *current = service;
                }
            })
            .or_insert(service);
    }
    let mut services: Vec<_> = best.into_values().cloned().collect();
    services.sort_by(|a, b| a.age.cmp(&b.age));
    services
}

/// The scope of a sidecar of `namespace` with `labels`, among what its namespace sees.
pub(crate) fn sidecar_scope(
    snapshot: &MeshSnapshot,
    namespace: &str,
    labels: &Labels,
    visible: Vec<Arc<Service>>,
) -> Scope {
    let mesh_policy = snapshot.mesh_config().outbound_traffic_policy.as_ref();
    let mesh_mode = snapshot.mesh_config().outbound_mode();
    let virtual_services: Vec<_> = snapshot.virtual_services().for_mesh(namespace).cloned().collect();
    let sidecar = choose(snapshot, namespace, labels);
    let policy = sidecar.and_then(|config| config.spec.outbound_traffic_policy.as_ref());
    let outbound_mode = policy.and_then(|policy| policy.mode).unwrap_or(mesh_mode);
    let egress_proxy = policy
        .or(mesh_policy)
        .filter(|_| outbound_mode == net::OutboundMode::AllowAny)
        .and_then(|policy| policy.egress_proxy.clone())
        .map(|mut destination| {
            destination.host = host::expand(&destination.host, namespace, snapshot.domain()).into();
            destination
        });
    let egress = match sidecar {
        Some(config) if !config.spec.egress.is_empty() => {
            config.spec.egress.iter().map(|listener| cut(listener, namespace, &visible, &virtual_services)).collect()
        }
        _ => vec![EgressScope {
            port: None,
            bind: "".into(),
            capture: net::CaptureMode::Default,
            services: visible.clone(),
            virtual_services,
        }],
    };
    let services = unite(&egress, &visible, egress_proxy.as_ref());
    Scope { sidecar: sidecar.cloned(), egress, services, outbound_mode, egress_proxy }
}

/// The one Sidecar that holds: by selector, then the namespace's, then the root namespace's.
fn choose<'a>(snapshot: &'a MeshSnapshot, namespace: &str, labels: &Labels) -> Option<&'a Config<net::Sidecar>> {
    let selector = |config: &'a Config<net::Sidecar>| {
        config.spec.workload_selector.as_ref().map(|selector| &selector.labels).filter(|pairs| !pairs.is_empty())
    };
    let own = snapshot.sidecars().of(namespace);
    own.iter()
        .find(|config| selector(config).is_some_and(|pairs| pairs.iter().all(|(k, v)| labels.get(k) == Some(v))))
        .or_else(|| own.iter().find(|config| selector(config).is_none()))
        .or_else(|| snapshot.sidecars().of(snapshot.root_namespace()).iter().find(|config| selector(config).is_none()))
}

struct HostFilter<'a> {
    namespace: &'a str,
    host: Box<str>,
    excludes: bool,
}

impl<'a> HostFilter<'a> {
    /// Reads `ns/host`; `.` is the proxy's own namespace; `~ns/host` excludes.
    fn parse(text: &'a str, proxy_namespace: &'a str) -> Option<Self> {
        let (namespace, host) = text.split_once('/').unwrap_or(("*", text));
        let (namespace, excludes) = match namespace {
            "~" => return None,
            other => match other.strip_prefix('~') {
                Some(rest) => (rest, true),
                None => (other, false),
            },
        };
        let namespace = if namespace == "." { proxy_namespace } else { namespace };
        Some(Self { namespace, host: host.to_ascii_lowercase().into(), excludes })
    }

    fn has_namespace(&self, namespace: &str) -> bool {
        self.namespace == "*" || self.namespace == namespace
    }
}

fn cut(
    listener: &net::IstioEgressListener,
    namespace: &str,
    visible: &[Arc<Service>],
    virtual_services: &[Arc<VirtualService>],
) -> EgressScope {
    let filters: Vec<_> = listener.hosts.iter().filter_map(|text| HostFilter::parse(text, namespace)).collect();
    let admits = |object_namespace: &str, hits: &dyn Fn(&str) -> bool| {
        let hit = |excludes: bool| {
            filters.iter().any(|filter| {
                filter.excludes == excludes && filter.has_namespace(object_namespace) && hits(&filter.host)
            })
        };
        hit(false) && !hit(true)
    };
    let mut services: Vec<Arc<Service>> = visible
        .iter()
        .filter(|service| admits(&service.namespace, &|pattern| host::covers(pattern, &service.host)))
        .cloned()
        .collect();
    let chosen: Vec<_> = virtual_services
        .iter()
        .filter(|vs| admits(&vs.object.namespace, &|pattern| vs.hosts.iter().any(|mine| host::overlaps(pattern, mine))))
        .cloned()
        .collect();
    // What a chosen VirtualService leads to is needed even when it is not listed.
    for destination in chosen.iter().flat_map(|vs| vs.destinations()) {
        if services.iter().all(|service| *service.host != *destination.host)
            && let Some(service) = visible.iter().find(|service| *service.host == *destination.host)
        {
            services.push(Arc::clone(service));
        }
    }
    let port = listener.port.clone().filter(|port| port.number != 0);
    if let Some(port) = &port {
        services = services.iter().filter_map(|service| with_only_port(service, port.number)).collect();
    }
    services.sort_by(|a, b| a.age.cmp(&b.age));
    EgressScope {
        port,
        bind: listener.bind.as_str().into(),
        capture: listener.capture_mode,
        services,
        virtual_services: chosen,
    }
}

fn with_only_port(service: &Arc<Service>, number: u16) -> Option<Arc<Service>> {
    let port = service.port(number)?;
    if service.ports.len() == 1 {
        return Some(Arc::clone(service));
    }
    Some(Arc::new(Service { ports: vec![port.clone()], ..Service::clone(service) }))
}

/// Every host once; a service that listeners see with different ports has all of them.
fn unite(
    egress: &[EgressScope],
    visible: &[Arc<Service>],
    egress_proxy: Option<&net::Destination>,
) -> Vec<Arc<Service>> {
    let mut by_host: BTreeMap<&str, Arc<Service>> = BTreeMap::new();
    for service in egress.iter().flat_map(|listener| &listener.services) {
        by_host
            .entry(&*service.host)
            .and_modify(|known| {
                let missing: Vec<_> =
                    service.ports.iter().filter(|port| known.port(port.number).is_none()).cloned().collect();
                if !missing.is_empty() {
                    Arc::make_mut(known).ports.extend(missing);
                }
            })
            .or_insert_with(|| Arc::clone(service));
    }
    if let Some(service) = egress_proxy.and_then(|proxy| visible.iter().find(|service| *service.host == *proxy.host)) {
        by_host.entry(&*service.host).or_insert_with(|| Arc::clone(service));
    }
    let mut services: Vec<_> = by_host.into_values().collect();
    services.sort_by(|a, b| a.age.cmp(&b.age));
    services
}
