//! Files of a pod's `/etc`: who it is and whom it asks for names.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use types::wellknown::DEFAULT_DOMAIN_SUFFIX;

use crate::spec::{DnsPolicy, PodRequest};

/// Host name of a pod: at most 63 bytes, as the kubelet cuts it.
pub(crate) fn hostname(request: &PodRequest) -> String {
    let wanted = if request.hostname.is_empty() { &request.name } else { &request.hostname };
    let cut = wanted.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|&end| end <= 63).last().unwrap_or(0);
    wanted[..cut].trim_end_matches(['-', '.']).to_owned()
}

/// Name and content of each file that differs from the machine's.
pub(crate) fn files(request: &PodRequest, ip: Ipv4Addr, ip6: Option<Ipv6Addr>) -> Vec<(String, String)> {
    let name = hostname(request);
    let mut files = vec![("hosts".into(), hosts(request, &name, ip, ip6)), ("hostname".into(), format!("{name}\n"))];
    if let Some(text) = resolv_conf(&request.dns, &request.namespace) {
        files.push(("resolv.conf".into(), text));
    }
    files
}

fn hosts(request: &PodRequest, name: &str, ip: Ipv4Addr, ip6: Option<Ipv6Addr>) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let full = request
        .subdomain
        .as_ref()
        .map(|subdomain| format!("{name}.{subdomain}.{}.svc.{DEFAULT_DOMAIN_SUFFIX}\t", request.namespace))
        .unwrap_or_default();
    for address in [Some(IpAddr::V4(ip)), ip6.map(IpAddr::V6)].into_iter().flatten() {
        writeln!(text, "{address}\t{full}{name}").expect("writing to a String cannot fail");
    }
    for (address, names) in &request.host_aliases {
        writeln!(text, "{address}\t{}", names.join("\t")).expect("writing to a String cannot fail");
    }
    text
}

fn resolv_conf(policy: &DnsPolicy, namespace: &str) -> Option<String> {
    let (nameservers, searches, options) = match policy {
        DnsPolicy::Host => return None,
        DnsPolicy::ClusterFirst => {
            let domain = DEFAULT_DOMAIN_SUFFIX;
            let searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
            (vec![capture::Network::LOCAL.dns.into()], searches, vec!["ndots:5".to_owned()])
        }
        DnsPolicy::Custom { nameservers, searches, options } => {
            (nameservers.clone(), searches.clone(), options.clone())
        }
    };
    let mut text = String::new();
    for server in nameservers {
        writeln!(text, "nameserver {server}").expect("writing to a String cannot fail");
    }
    if !searches.is_empty() {
        writeln!(text, "search {}", searches.join(" ")).expect("writing to a String cannot fail");
    }
    if !options.is_empty() {
        writeln!(text, "options {}", options.join(" ")).expect("writing to a String cannot fail");
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> PodRequest {
        PodRequest { namespace: "shop".into(), name: "reviews-v1-5d9c-x2x".into(), ..PodRequest::default() }
    }

    #[test]
    fn cluster_first_searches_the_namespace() {
        let files = files(&request(), Ipv4Addr::new(10, 77, 0, 12), None);
        let resolv = &files.iter().find(|(name, _)| name == "resolv.conf").unwrap().1;
        assert_eq!(
            resolv,
            "nameserver 10.96.0.10\nsearch shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
        );
    }

    #[test]
    fn a_subdomain_gives_the_full_name() {
        let request = PodRequest { hostname: "db-0".into(), subdomain: Some("db".into()), ..request() };
        let files = files(&request, Ipv4Addr::new(10, 77, 0, 12), None);
        assert!(files[0].1.contains("10.77.0.12\tdb-0.db.shop.svc.cluster.local\tdb-0\n"), "{}", files[0].1);
        assert_eq!(files[1].1, "db-0\n");
    }

    #[test]
    fn long_names_are_cut_without_a_trailing_dash() {
        let request = PodRequest { name: format!("{}-{}", "a".repeat(62), "b".repeat(9)), ..request() };
        assert_eq!(hostname(&request), "a".repeat(62));
    }
}
