//! The table from which a proxy answers its application's DNS.
//!
//! *Source*: `docs/parity.md`, Traffic 5.7.

use std::collections::BTreeMap;

use mesh::{EndpointAddress, Health, Registry, Resolution, ServiceAddress};
use proto::nds::name_table::NameInfo;

use crate::context::Context;
use crate::wire::NameTable;

/// Names and addresses of everything the proxy sees.
pub(crate) fn name_table(context: &Context<'_>) -> NameTable {
    let mut table = BTreeMap::new();
    for service in &context.scope.services {
        let is_kubernetes = service.registry == Registry::Kubernetes;
        let info = |ips: Vec<String>, shortname: &str| NameInfo {
            ips,
            registry: if is_kubernetes { "Kubernetes" } else { "External" }.into(),
            shortname: if is_kubernetes { shortname.to_owned() } else { String::new() },
            namespace: if is_kubernetes { service.namespace.to_string() } else { String::new() },
            ..NameInfo::default()
        };
        let mut ips: Vec<String> = service
            .addresses_for(context.view.captures_dns)
            .into_iter()
            .filter_map(|address| match address {
                ServiceAddress::Ip(ip) => Some(ip.to_string()),
                ServiceAddress::Range(_) => None,
            })
            .collect();
        if service.is_headless {
            let set = context.snapshot.endpoints(&service.key());
            let mut pods: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for endpoint in set.by_port.values().flatten() {
                let EndpointAddress::Ip(ip) = &endpoint.address else {
                    continue;
                };
                if endpoint.health == Health::NotReady {
                    continue;
                }
                let ip = ip.to_string();
                if !ips.contains(&ip) {
                    ips.push(ip.clone());
                }
                if let Some(workload) = endpoint.workload.as_ref().filter(|workload| !workload.hostname.is_empty()) {
                    let own = pods.entry(workload.hostname.to_string()).or_default();
                    if !own.contains(&ip) {
                        own.push(ip);
                    }
                }
            }
            for (hostname, ips) in pods {
                let shortname = format!("{hostname}.{}", service.name);
                table.insert(format!("{hostname}.{}", service.host), info(ips, &shortname));
            }
        }
        if ips.is_empty()
            || (service.resolution == Resolution::Original && !service.is_headless && service.addresses.is_empty())
        {
            continue;
        }
        ips.sort();
        for name in std::iter::once(&service.host).chain(&service.aliases) {
            table.insert(name.to_string(), info(ips.clone(), &service.name));
        }
    }
    NameTable { table }
}
