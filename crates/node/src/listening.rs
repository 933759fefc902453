//! Who listens where: the sockets of a pod's network, and what they are for.
//!
//! *Source*: `/proc/PID/net/tcp` and `tcp6`, which show the network of the process, whoever asks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use api::k8s;
use types::wellknown::ports;

/// State `LISTEN` in the kernel's table.
const LISTEN: &str = "0A";

/// TCP addresses that the network of a process listens at, in order; none when it is gone.
pub(crate) fn addresses(pid: u32) -> Vec<SocketAddr> {
    let table = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
    let mut found: Vec<SocketAddr> = [table("tcp"), table("tcp6")].iter().flat_map(|text| parse(text)).collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn parse(table: &str) -> Vec<SocketAddr> {
    let row = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (local, state) = (words.next()?, words.nth(1)?);
        let (ip, port) = local.split_once(':')?;
        (state == LISTEN).then_some(SocketAddr::new(address(ip)?, u16::from_str_radix(port, 16).ok()?))
    };
    table.lines().skip(1).filter_map(row).collect()
}

/// Words of 32 bits as the machine holds them, in hexadecimal.
fn address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| Some(u32::from_str_radix(hex.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let octets = [word(0)?, word(8)?, word(16)?, word(24)?].concat();
            Some(Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?).into())
        }
        _ => None,
    }
}

/// What a port of a pod is for: Istio's fixed ports by their meaning, others by the name that the
/// pod gives them.
pub(crate) fn role(port: u16, pod: &k8s::Pod) -> String {
    let fixed = match port {
        ports::PROXY_ADMIN => "proxy-admin",
        ports::OUTBOUND => "outbound",
        ports::INBOUND => "inbound",
        ports::HBONE => "hbone",
        ports::XDS | ports::XDS_PLAINTEXT => "xds",
        ports::CONTROL_METRICS => "control-plane-metrics",
        ports::MERGED_METRICS => "merged-metrics",
        ports::READINESS => "readiness",
        ports::DNS => "dns",
        ports::PROXY_METRICS => "proxy-metrics",
        53 => "cluster-dns",
        _ => {
            let mut named = pod.spec.containers.iter().flat_map(|container| &container.ports);
            let name = named.find(|named| named.container_port == port).map(|named| named.name.as_str());
            return name.filter(|name| !name.is_empty()).unwrap_or("application").to_owned();
        }
    };
    fixed.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_rows_are_read() {
        let host = |ip: Ipv4Addr| format!("{:08X}", u32::from_ne_bytes(ip.octets()));
        let loopback6 = format!("{:08X}{:08X}{:08X}{:08X}", 0, 0, 0, u32::from_ne_bytes([0, 0, 0, 1]));
        let table = format!(
            "  sl  local_address rem_address   st\n   0: {}:3A98 00000000:0000 0A 0\n   1: {}:0050 {}:1234 01 0\n   2: {loopback6}:0051 x 0A 0\nnonsense\n",
            host(Ipv4Addr::LOCALHOST),
            host(Ipv4Addr::new(10, 77, 0, 9)),
            host(Ipv4Addr::new(10, 77, 0, 10)),
        );
        let found: Vec<String> = parse(&table).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["127.0.0.1:15000", "[::1]:81"]);
    }

    #[test]
    fn our_own_sockets_are_found() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(addresses(std::process::id()).contains(&socket.local_addr().unwrap()));
        assert!(addresses(u32::MAX).is_empty());
    }
}
