//! ServiceEntry and WorkloadEntry.

use std::collections::BTreeSet;

use super::virtual_service::labels;
use super::{Check, rules};
use crate::networking::{Resolution, ServiceEntry, WorkloadEntry};

pub(super) fn check(check: &mut Check<'_>, spec: &ServiceEntry) {
    if spec.hosts.is_empty() {
        check.error("spec.hosts", "at least one host is needed", "name the hosts, such as api.example.com");
    }
    let mut has_wildcard = false;
    for (index, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{index}]");
        if host == "*" {
            check.error(&field, "`*` is not allowed", "name the hosts, or write `*.suffix`");
        } else {
            rules::host_with_wildcard(check, &field, host);
        }
        has_wildcard |= host.starts_with('*');
    }
    rules::export_to(check, &spec.export_to, true);
    let may_be_block = matches!(spec.resolution, Resolution::None | Resolution::Static);
    for (index, address) in spec.addresses.iter().enumerate() {
        let field = format!("spec.addresses[{index}]");
        rules::cidr(check, &field, address);
        if address.contains('/') && !may_be_block {
            check.error(
                &field,
                format!("a CIDR block needs resolution NONE or STATIC, not {}", spec.resolution),
                "set resolution: NONE or STATIC, or write single addresses",
            );
        }
    }
    ports(check, spec);
    if !spec.endpoints.is_empty() && spec.workload_selector.is_some() {
        check.error(
            "spec.workloadSelector",
            "endpoints and workloadSelector exclude each other",
            "keep one of the two",
        );
    }
    let names: BTreeSet<&str> = spec.ports.iter().map(|port| port.name.as_str()).collect();
    for (index, endpoint) in spec.endpoints.iter().enumerate() {
        let at = format!("spec.endpoints[{index}]");
        workload_entry(check, endpoint, &at);
        for name in endpoint.ports.keys() {
            if !names.contains(name.as_str()) {
                check.error(
                    &format!("{at}.ports"),
                    format!("port {name:?} is not among the entry's ports"),
                    "use a name under spec.ports",
                );
            }
        }
        if spec.resolution == Resolution::Static
            && endpoint.address.parse::<std::net::IpAddr>().is_err()
            && !endpoint.address.starts_with("unix://")
        {
            check.error(
                &format!("{at}.address"),
                format!("{:?} is not an address, which STATIC needs", endpoint.address),
                "use resolution DNS for names",
            );
        }
    }
    match spec.resolution {
        Resolution::None if !spec.endpoints.is_empty() => {
            check.error("spec.endpoints", "resolution NONE takes no endpoints", "set resolution: STATIC or DNS");
        }
        Resolution::None if spec.workload_selector.is_some() => {
            check.warn("spec.workloadSelector", "resolution NONE does not use the selector", "set resolution: STATIC");
        }
        Resolution::Dns if has_wildcard && spec.endpoints.is_empty() => {
            check.error("spec.hosts", "a wildcard host cannot be resolved", "give endpoints, or set resolution: NONE");
        }
        Resolution::DnsRoundRobin if spec.endpoints.len() > 1 => {
            check.error(
                "spec.endpoints",
                "DNS_ROUND_ROBIN takes one endpoint at most",
                "use resolution: DNS for several",
            );
        }
        Resolution::DynamicDns
            if spec.hosts.iter().any(|host| !host.starts_with('*'))
                || !spec.addresses.is_empty()
                || !spec.endpoints.is_empty() =>
        {
            let message = "DYNAMIC_DNS takes wildcard hosts only, no addresses and no endpoints";
            check.error("spec.resolution", message, "use resolution: DNS or STATIC");
        }
        _ => {}
    }
    // The engine dials addresses; names in endpoints come with the resolver.
    if matches!(spec.resolution, Resolution::DynamicDns) {
        check.unbuilt("spec.resolution");
    }
}

fn ports(check: &mut Check<'_>, spec: &ServiceEntry) {
    if spec.ports.is_empty() {
        check.error("spec.ports", "at least one port is needed", "list a port, such as {name: http, port: 80}");
    }
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in spec.ports.iter().enumerate() {
        let at = format!("spec.ports[{index}]");
        rules::port_number(check, &format!("{at}.number"), port.number);
        if port.name.is_empty() {
            check.error(&format!("{at}.name"), "port has no name", "give it a name, such as `http`");
        }
        if !port.name.is_empty() && !names.insert(&port.name) {
            check.error(
                &format!("{at}.name"),
                format!("port name {:?} is used twice", port.name),
                "rename one of the two",
            );
        }
        if !numbers.insert(port.number) {
            check.error(
                &format!("{at}.number"),
                format!("port {} is listed twice", port.number),
                "remove or renumber one of the two",
            );
        }
        if !port.protocol.is_empty() {
            rules::protocol(check, &format!("{at}.protocol"), &port.protocol);
        }
        let upper = port.protocol.to_ascii_uppercase();
        let by_name = matches!(upper.as_str(), "HTTP" | "HTTP2" | "HTTP_PROXY" | "GRPC" | "GRPC-WEB" | "HTTPS" | "TLS");
        if spec.hosts.len() > 1 && !by_name && spec.resolution != Resolution::None {
            check.error(
                &format!("{at}.protocol"),
                "several hosts need ports that tell them apart: HTTP or TLS",
                "split the entry",
            );
        }
    }
}

pub(super) fn workload_entry(check: &mut Check<'_>, entry: &WorkloadEntry, at: &str) {
    if entry.address.is_empty() {
        check.error(&format!("{at}.address"), "address is needed", "write the workload's IP address or host");
    } else if let Some(path) = entry.address.strip_prefix("unix://") {
        if !path.starts_with('/') {
            check.error(
                &format!("{at}.address"),
                "a Unix socket's path must be absolute",
                "write unix:///path/to/socket",
            );
        }
        check.unbuilt(&format!("{at}.address"));
    } else {
        rules::host(check, &format!("{at}.address"), &entry.address);
    }
    for (name, port) in &entry.ports {
        if *port == 0 {
            check.error(
                &format!("{at}.ports"),
                format!("port {name:?} must be between 1 and 65535"),
                "write the number of a port",
            );
        }
    }
    labels(check, &format!("{at}.labels"), &entry.labels);
    check.unbuilt_if(!entry.network.is_empty(), format!("{at}.network"));
}
