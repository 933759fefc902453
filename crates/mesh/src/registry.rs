//! Services and endpoints, from Kubernetes' objects and ServiceEntries.
//!
//! *Source*: `docs/parity.md`, Traffic 1.1, 1.7, 5.1, 5.2.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use api::k8s;
use api::networking as net;
use ipnet::IpNet;
use types::{Finding, Labels, NamespacedName, Selector, Severity};

use crate::config::Config;
use crate::protocol::Protocol;
use crate::service::{
    Age, Endpoint, EndpointAddress, EndpointSet, Health, Registry, Resolution, Service, ServiceAddress, ServiceKey,
    ServicePort, TargetPort, TrafficDistribution, Workload,
};
use crate::virtual_service::NameSettings;
use crate::visibility::Visibility;

/// Annotation of a Service: `exportTo`, comma-separated.
const EXPORT_TO: &str = "networking.istio.io/exportTo";
/// Annotation of a Service or Namespace: preference for near endpoints.
const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";
/// Label of a ServiceEntry that opts out of an automatic address with `false`.
const AUTO_ALLOCATE: &str = "networking.istio.io/enable-autoallocate-ip";

/// What the registry is built from.
pub(crate) struct Inputs<'a> {
    pub(crate) services: &'a [Config<k8s::Service>],
    pub(crate) slices: &'a [Config<k8s::EndpointSlice>],
    /// By `namespace/name`.
    pub(crate) workloads: &'a BTreeMap<NamespacedName, Arc<Workload>>,
    pub(crate) service_entries: &'a [Config<net::ServiceEntry>],
    pub(crate) workload_entries: &'a [Config<net::WorkloadEntry>],
    pub(crate) namespace_annotations: &'a BTreeMap<Box<str>, Labels>,
    pub(crate) names: NameSettings<'a>,
}

impl Inputs<'_> {
    /// The pods of a namespace. *Cost*: theirs, not those of all.
    fn workloads_in<'b>(&'b self, namespace: &'b str) -> impl Iterator<Item = &'b Arc<Workload>> {
        let from = self.workloads.range(NamespacedName::new(namespace, "")..);
        from.take_while(move |(key, _)| *key.namespace == *namespace).map(|(_, workload)| workload)
    }
}

/// Everything the mesh knows as a destination.
#[derive(Default, Debug)]
pub(crate) struct Built {
    /// Oldest first.
    pub(crate) services: Vec<Service>,
    pub(crate) endpoints: BTreeMap<ServiceKey, EndpointSet>,
}

pub(crate) fn build(inputs: &Inputs<'_>, findings: &mut Vec<Finding>) -> Built {
    let mut built = Built::default();
    let mut external_names = Vec::new();
    let mut slices: BTreeMap<(&str, &str), Vec<&Config<k8s::EndpointSlice>>> = BTreeMap::new();
    for slice in inputs.slices {
        if let Some(service) = slice.labels.get(types::wellknown::labels::SERVICE_NAME) {
            slices.entry((slice.namespace(), service.as_str())).or_default().push(slice);
        }
    }
    for config in inputs.services {
        if config.spec.spec.kind == "ExternalName" {
            external_names.push(config);
            continue;
        }
        let service = of_kubernetes(config, inputs);
        let own = slices.get(&(config.namespace(), config.name())).map_or(&[][..], Vec::as_slice);
        let endpoints = if own.is_empty() { by_selector(&service, inputs) } else { by_slices(&service, own, inputs) };
        built.endpoints.insert(service.key(), endpoints);
        built.services.push(service);
    }
    for config in inputs.service_entries {
        for service in of_entry(config, inputs, findings) {
            let endpoints = entry_endpoints(config, &service, inputs);
            // The same host twice in one namespace: the older one stays.
            if built.endpoints.contains_key(&service.key()) {
                findings.push(Finding {
                    code: "LAT0210".into(),
                    severity: Severity::Warning,
                    object: Some(config.object.clone()),
                    field: "spec.hosts".into(),
                    position: None,
                    message: format!(
                        "host {} is already declared in namespace {} by an older object",
                        service.host, service.namespace
                    )
                    .into(),
                    hint: "declare each host once".into(),
                });
                continue;
            }
            built.endpoints.insert(service.key(), endpoints);
            built.services.push(service);
        }
    }
    built.services.sort_by(|a, b| a.age.cmp(&b.age));
    give_addresses(&mut built.services);
    resolve_aliases(&mut built.services, &external_names, inputs.names.domain);
    built
}

fn of_kubernetes(config: &Config<k8s::Service>, inputs: &Inputs<'_>) -> Service {
    let spec = &config.spec.spec;
    let namespace = config.namespace();
    let is_headless = spec.is_headless();
    let ports = spec
        .ports
        .iter()
        .filter_map(|port| {
            let protocol =
                Protocol::of_service_port(port.port, &port.name, &port.protocol, port.app_protocol.as_deref());
            (protocol != Protocol::Udp).then(|| ServicePort {
                number: port.port,
                name: port.name.as_str().into(),
                protocol,
                target: match &port.target_port {
                    None | Some(k8s::IntOrString::Int(0)) => TargetPort::Number(port.port),
                    Some(k8s::IntOrString::Int(number)) => TargetPort::Number(*number),
                    Some(k8s::IntOrString::Name(name)) => TargetPort::Name(name.as_str().into()),
                },
            })
        })
        .collect();
    let addresses = if is_headless {
        Vec::new()
    } else {
        spec.addresses().iter().filter_map(|text| text.parse().ok()).map(ServiceAddress::Ip).collect()
    };
    let export_to = config.annotations.get(EXPORT_TO).map(String::as_str).unwrap_or_default();
    let default = Visibility::of_mesh(inputs.names.default_export_to, namespace);
    Service {
        host: format!("{}.{namespace}.svc.{}", config.name(), inputs.names.domain).into(),
        name: config.name().into(),
        namespace: namespace.into(),
        object: config.object.clone(),
        age: config.age.clone(),
        registry: Registry::Kubernetes,
        is_external: false,
        resolution: if is_headless { Resolution::Original } else { Resolution::Endpoints },
        is_headless,
        addresses,
        auto_address: None,
        ports,
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        selector: (!spec.selector.is_empty()).then(|| Selector(spec.selector.clone())),
        visibility: Visibility::parse(export_to.split(','), namespace, &default),
        subject_alt_names: Vec::new(),
        aliases: Vec::new(),
        traffic_distribution: distribution(
            Some(spec.traffic_distribution.as_str()),
            &config.annotations,
            inputs.namespace_annotations.get(namespace),
        ),
        publishes_not_ready: spec.publish_not_ready_addresses,
        is_internal_traffic_local: spec.internal_traffic_policy == "Local",
    }
}

fn distribution(spec: Option<&str>, own: &Labels, namespace: Option<&Labels>) -> Option<TrafficDistribution> {
    let text = spec
        .filter(|text| !text.is_empty())
        .or_else(|| own.get(TRAFFIC_DISTRIBUTION).map(String::as_str))
        .or_else(|| namespace.and_then(|labels| labels.get(TRAFFIC_DISTRIBUTION)).map(String::as_str))?;
    match text {
        "PreferClose" | "PreferSameZone" => Some(TrafficDistribution::SameZone),
        "PreferSameNode" => Some(TrafficDistribution::SameNode),
        _ => None,
    }
}

fn by_slices(service: &Service, slices: &[&Config<k8s::EndpointSlice>], inputs: &Inputs<'_>) -> EndpointSet {
    let mut set = EndpointSet::default();
    for slice in slices {
        for port in &service.ports {
            let in_slice = slice.spec.ports.iter().find(|candidate| *candidate.name == *port.name);
            let Some(in_slice) = in_slice.filter(|found| found.port != 0) else {
                continue;
            };
            for endpoint in &slice.spec.endpoints {
                if endpoint.conditions.terminating.unwrap_or(false) {
                    continue;
                }
                let is_ready = endpoint.conditions.ready.unwrap_or(true) || service.publishes_not_ready;
                let workload = endpoint.target_ref.as_ref().filter(|target| target.kind == "Pod").and_then(|target| {
                    let namespace = if target.namespace.is_empty() { slice.namespace() } else { &target.namespace };
                    inputs.workloads.get(&NamespacedName::new(namespace, &target.name)).cloned()
                });
                for address in &endpoint.addresses {
                    let Ok(ip) = address.parse::<IpAddr>() else {
                        continue;
                    };
                    let workload = workload.clone().or_else(|| by_ip(inputs, ip));
                    push(&mut set, port.number, pod_endpoint(ip, in_slice.port, is_ready, workload));
                }
            }
        }
    }
    sort(&mut set);
    set
}

fn by_ip(inputs: &Inputs<'_>, ip: IpAddr) -> Option<Arc<Workload>> {
    inputs.workloads.values().find(|workload| workload.ips.contains(&ip)).cloned()
}

/// Without slices (a file that was never in a cluster): ready pods that the selector picks.
fn by_selector(service: &Service, inputs: &Inputs<'_>) -> EndpointSet {
    let mut set = EndpointSet::default();
    let Some(selector) = &service.selector else {
        return set;
    };
    for workload in inputs.workloads_in(&service.namespace).filter(|workload| selector.matches(&workload.labels)) {
        for port in &service.ports {
            let Some(number) = target_number(&port.target, workload) else {
                continue;
            };
            let Some(ip) = workload.ips.first() else {
                continue;
            };
            let is_ready = workload.is_ready || service.publishes_not_ready;
            push(&mut set, port.number, pod_endpoint(*ip, number, is_ready, Some(Arc::clone(workload))));
        }
    }
    add_workload_entries(&mut set, service, &selector.0, Health::Ready, inputs);
    sort(&mut set);
    set
}

fn pod_endpoint(ip: IpAddr, port: u16, is_ready: bool, workload: Option<Arc<Workload>>) -> Endpoint {
    Endpoint {
        address: EndpointAddress::Ip(ip),
        port,
        health: if is_ready { Health::Ready } else { Health::NotReady },
        weight: 1,
        locality: workload.as_ref().map(|workload| workload.locality.clone()).unwrap_or_default(),
        labels: workload.as_ref().map(|workload| workload.labels.clone()).unwrap_or_default(),
        workload,
    }
}

/// The workload's port behind a target; `None` if it has no port of that name.
pub fn target_number(target: &TargetPort, workload: &Workload) -> Option<u16> {
    match target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => workload.ports.get(name).copied(),
    }
}

fn push(set: &mut EndpointSet, port: u16, endpoint: Endpoint) {
    let list = set.by_port.entry(port).or_default();
    if !list.iter().any(|other| other.address == endpoint.address && other.port == endpoint.port) {
        list.push(endpoint);
    }
}

fn sort(set: &mut EndpointSet) {
    for list in set.by_port.values_mut() {
        list.sort_by(|a, b| (&a.address, a.port).cmp(&(&b.address, b.port)));
    }
}

// --- ServiceEntry ---

fn of_entry(config: &Config<net::ServiceEntry>, inputs: &Inputs<'_>, findings: &mut Vec<Finding>) -> Vec<Service> {
    let spec = &*config.spec;
    let namespace = config.namespace();
    let ports: Vec<_> = spec
        .ports
        .iter()
        .filter_map(|port| {
            let protocol = Protocol::parse(&port.protocol).unwrap_or(Protocol::Auto);
            (protocol != Protocol::Udp).then(|| ServicePort {
                number: port.number,
                name: port.name.as_str().into(),
                protocol,
                target: TargetPort::Number(if port.target_port == 0 { port.number } else { port.target_port }),
            })
        })
        .collect();
    let mut addresses = Vec::new();
    for (index, text) in spec.addresses.iter().enumerate() {
        match parse_address(text) {
            Some(address) => addresses.push(address),
            None => findings.push(Finding {
                code: "LAT0211".into(),
                severity: Severity::Error,
                object: Some(config.object.clone()),
                field: format!("spec.addresses[{index}]").into(),
                position: None,
                message: format!("{text:?} is neither an IP nor a CIDR; it is left out").into(),
                hint: "write an address such as 192.0.2.10 or 192.0.2.0/24".into(),
            }),
        }
    }
    let is_external = spec.location == net::Location::MeshExternal;
    spec.hosts
        .iter()
        .map(|host| {
            let host: Box<str> = host.trim_end_matches('.').to_ascii_lowercase().into();
            Service {
                name: host.clone(),
                namespace: namespace.into(),
                object: config.object.clone(),
                age: Age { name: host.clone(), ..config.age.clone() },
                registry: Registry::External,
                is_external,
                resolution: match spec.resolution {
                    net::Resolution::None => Resolution::Original,
                    net::Resolution::Static => Resolution::Endpoints,
                    net::Resolution::Dns => Resolution::Dns,
                    net::Resolution::DnsRoundRobin => Resolution::DnsRoundRobin,
                    net::Resolution::DynamicDns => Resolution::DynamicDns,
                },
                is_headless: false,
                addresses: addresses.clone(),
                auto_address: None,
                ports: ports.clone(),
                labels: config.labels.clone(),
                annotations: config.annotations.clone(),
                selector: spec.workload_selector.as_ref().map(|selector| Selector(selector.labels.clone())),
                visibility: inputs.names.visibility(&spec.export_to, namespace),
                subject_alt_names: spec.subject_alt_names.clone(),
                aliases: Vec::new(),
                traffic_distribution: distribution(
                    None,
                    &config.annotations,
                    inputs.namespace_annotations.get(namespace),
                ),
                publishes_not_ready: false,
                is_internal_traffic_local: false,
                host,
            }
        })
        .collect()
}

/// An address or a range; a range of one address is that address.
pub(crate) fn parse_address(text: &str) -> Option<ServiceAddress> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(ServiceAddress::Ip(ip));
    }
    let net: IpNet = text.parse().ok()?;
    if net.prefix_len() == net.max_prefix_len() {
        return Some(ServiceAddress::Ip(net.addr()));
    }
    Some(ServiceAddress::Range(net.trunc()))
}

fn entry_endpoints(config: &Config<net::ServiceEntry>, service: &Service, inputs: &Inputs<'_>) -> EndpointSet {
    let spec = &*config.spec;
    let mut set = EndpointSet::default();
    if matches!(service.resolution, Resolution::Original | Resolution::DynamicDns) {
        return set;
    }
    for (index, entry) in spec.endpoints.iter().enumerate() {
        let workload =
            crate::workload::of_entry(&format!("{}-{index}", config.name()), config.namespace(), entry, &Labels::new());
        add_entry(&mut set, service, entry, &Arc::new(workload), Health::Unchecked);
    }
    if let Some(selector) = &service.selector {
        add_workload_entries(&mut set, service, &selector.0, Health::Unchecked, inputs);
        for workload in inputs.workloads_in(&service.namespace).filter(|workload| selector.matches(&workload.labels)) {
            for port in &service.ports {
                if let (Some(ip), Some(number)) = (workload.ips.first(), target_number(&port.target, workload)) {
                    push(
                        &mut set,
                        port.number,
                        pod_endpoint(*ip, number, workload.is_ready, Some(Arc::clone(workload))),
                    );
                }
            }
        }
    }
    let resolves_itself = matches!(service.resolution, Resolution::Dns | Resolution::DnsRoundRobin)
        && spec.endpoints.is_empty()
        && service.selector.is_none();
    if resolves_itself {
        let entry = net::WorkloadEntry { address: service.host.to_string(), ..Default::default() };
        let workload = Arc::new(crate::workload::of_entry(config.name(), config.namespace(), &entry, &Labels::new()));
        add_entry(&mut set, service, &entry, &workload, Health::Unchecked);
    }
    // Declared endpoints keep their order; only selected ones are sorted.
    if spec.endpoints.is_empty() {
        sort(&mut set);
    }
    set
}

fn add_workload_entries(
    set: &mut EndpointSet,
    service: &Service,
    selector: &Labels,
    health: Health,
    inputs: &Inputs<'_>,
) {
    for config in inputs.workload_entries {
        if *config.object.namespace != *service.namespace {
            continue;
        }
        let workload = crate::workload::of_entry(config.name(), config.namespace(), &config.spec, &Labels::new());
        if selector.iter().all(|(key, value)| workload.labels.get(key) == Some(value)) {
            add_entry(set, service, &config.spec, &Arc::new(workload), health);
        }
    }
}

fn add_entry(
    set: &mut EndpointSet,
    service: &Service,
    entry: &net::WorkloadEntry,
    workload: &Arc<Workload>,
    health: Health,
) {
    let unix = entry.address.strip_prefix("unix://");
    let address = match (unix, entry.address.parse::<IpAddr>()) {
        (Some(path), _) => EndpointAddress::Unix(path.into()),
        (None, Ok(ip)) => EndpointAddress::Ip(ip),
        (None, Err(_)) => EndpointAddress::Name(entry.address.to_ascii_lowercase().into()),
    };
    if matches!(address, EndpointAddress::Name(_))
        && !matches!(service.resolution, Resolution::Dns | Resolution::DnsRoundRobin)
    {
        return;
    }
    for port in &service.ports {
        let number = match (unix, entry.ports.get(&*port.name)) {
            (Some(_), _) => 0,
            (None, Some(number)) => *number,
            (None, None) => match &port.target {
                TargetPort::Number(number) => *number,
                TargetPort::Name(name) => match workload.ports.get(name) {
                    Some(number) => *number,
                    None => port.number,
                },
            },
        };
        push(
            set,
            port.number,
            Endpoint {
                address: address.clone(),
                port: number,
                health,
                weight: entry.weight.max(1),
                locality: workload.locality.clone(),
                labels: workload.labels.clone(),
                workload: Some(Arc::clone(workload)),
            },
        );
    }
}

// --- automatic addresses, aliases ---

/// Gives every address-less ServiceEntry host one of `240.240.0.0/16`, found by the host's hash, so
/// that it stays when others come and go.
fn give_addresses(services: &mut [Service]) {
    let mut taken = BTreeSet::new();
    for service in services {
        let wants = service.registry == Registry::External
            && service.resolution != Resolution::Original
            && service.addresses.is_empty()
            && service.labels.get(AUTO_ALLOCATE).is_none_or(|value| value != "false");
        if !wants {
            continue;
        }
        // 0 is the network's address, the last is its broadcast address.
        let slots = 65_534_u32;
        let mut slot = fnv1a(&service.host) % slots;
        for _ in 0..slots {
            if taken.insert(slot) {
                let [_, _, high, low] = (slot + 1).to_be_bytes();
                service.auto_address = Some(IpAddr::V4(Ipv4Addr::new(240, 240, high, low)));
                break;
            }
            slot = (slot + 1) % slots;
        }
    }
}

fn fnv1a(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Names of ExternalName Services become further names of the service they lead to; chains are
/// followed, loops dropped.
fn resolve_aliases(services: &mut [Service], external_names: &[&Config<k8s::Service>], domain: &str) {
    let targets: BTreeMap<String, String> = external_names
        .iter()
        .map(|config| {
            let host = format!("{}.{}.svc.{domain}", config.name(), config.namespace());
            (host, config.spec.spec.external_name.trim_end_matches('.').to_ascii_lowercase())
        })
        .collect();
    for host in targets.keys() {
        let mut seen = BTreeSet::new();
        let mut at = host.as_str();
        while let Some(next) = targets.get(at) {
            if !seen.insert(at) {
                break;
            }
            at = next;
        }
        if targets.contains_key(at) {
            continue;
        }
        for service in services.iter_mut().filter(|service| *service.host == *at) {
            service.aliases.push(host.as_str().into());
        }
    }
    for service in services {
        service.aliases.sort();
    }
}

/// The alias map of a snapshot: ExternalName host to the host it finally leads to.
pub(crate) fn alias_targets(services: &[Arc<Service>]) -> BTreeMap<Box<str>, Box<str>> {
    services
        .iter()
        .flat_map(|service| service.aliases.iter().map(move |alias| (alias.clone(), service.host.clone())))
        .collect()
}
