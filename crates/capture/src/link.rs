//! Links, addresses, routes and interface switches: the mesh's switch and the pods on it.
//!
//! The switch is a bridge that also routes. A pod's address is a /32 (a /128) whose only neighbour
//! is the switch, so every packet between pods passes the switch's rules: one table translates
//! service addresses for all of them ([`crate::services`]).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use crate::error::{CaptureError, Step};
use crate::netlink::{ACK, CREATE, EXCL, Messages, REPLACE, Socket};

const RTM_NEWLINK: u16 = 16;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;
const VETH_INFO_PEER: u16 = 1;
const IFF_UP: u32 = 1;

/// `IPV4_DEVCONF_*`: settable over netlink also where `/proc/sys` is read-only.
const DEVCONF_FORWARDING: u16 = 1;
const DEVCONF_SEND_REDIRECTS: u16 = 6;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// A bridge without a fixed address takes the lowest of its ports', so a new pod could change it under
/// the others, whose packets would then go nowhere until they ask again.
const BRIDGE_MAC: [u8; 6] = [0x02, 0x00, 10, 77, 0, 1];

/// `lo` is the first interface of every network namespace.
pub(crate) const LO: u32 = 1;

/// Addresses of the mesh's network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Network {
    /// The switch itself: gateway of every pod.
    pub switch: Ipv4Addr,
    /// The same for IPv6.
    pub switch6: Ipv6Addr,
    /// Stands for the loopback of the machine; the switch answers there and relays.
    pub host: Ipv4Addr,
    /// Pod addresses.
    pub pods: (Ipv4Addr, u8),
    /// Service addresses.
    pub services: (Ipv4Addr, u8),
    /// Everything of the mesh in IPv6.
    pub mesh6: (Ipv6Addr, u8),
    /// Cluster DNS.
    pub dns: Ipv4Addr,
    /// Addresses that Istio assigns to hosts of `ServiceEntry` objects; known to proxies only.
    pub auto_allocated: (Ipv4Addr, u8),
}

impl Network {
    /// The network every local mesh uses; meshes do not see each other's.
    pub const LOCAL: Self = Self {
        switch: Ipv4Addr::new(10, 77, 0, 1),
        switch6: Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1),
        host: Ipv4Addr::new(10, 77, 0, 2),
        pods: (Ipv4Addr::new(10, 77, 0, 0), 16),
        services: (Ipv4Addr::new(10, 96, 0, 0), 12),
        mesh6: (Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0), 48),
        dns: Ipv4Addr::new(10, 96, 0, 10),
        auto_allocated: (Ipv4Addr::new(240, 240, 0, 0), 16),
    };

    /// Whether an address is inside the mesh.
    pub fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => [self.pods, self.services, self.auto_allocated].iter().any(|&(net, length)| {
                let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
                u32::from(v4) & mask == u32::from(net) & mask
            }),
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.mesh6.1)).unwrap_or(0);
                u128::from(v6) & mask == u128::from(self.mesh6.0) & mask
            }
        }
    }

    /// The ranges of [`Self::contains`] as CIDRs, comma-separated.
    pub fn ranges(&self) -> String {
        let v4 = [self.pods, self.services, self.auto_allocated].map(|(net, length)| format!("{net}/{length}"));
        format!("{},{}/{}", v4.join(","), self.mesh6.0, self.mesh6.1)
    }
}

/// What an interface got beside IPv4.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extras {
    /// IPv6 works.
    pub ipv6: bool,
    /// Ports below 1024 are open to everyone in the namespace.
    pub low_ports: bool,
}

/// The switch of the calling thread's network namespace; later calls may come from any thread.
#[derive(Debug)]
pub struct Switch {
    socket: Socket,
    network: Network,
    bridge: u32,
    /// Ports must send frames back where they came from, see [`Self::create`].
    hairpin: bool,
    extras: Extras,
}

impl Switch {
    /// Makes the bridge with its addresses and routes in the calling thread's network namespace.
    pub fn create(name: &str, network: Network) -> Result<Self, CaptureError> {
        let socket = Socket::route().map_err(|errno| CaptureError::explain(Step::Netlink, errno))?;
        let failed = |step| move |errno| CaptureError::explain(step, errno);
        let low_ports = sysctl("net/ipv4/ip_unprivileged_port_start", "0");
        // Netlink does the same for one interface below; the sysctl covers kernels that inherit oddly.
        sysctl("net/ipv4/ip_forward", "1");
        sysctl("net/ipv4/conf/all/send_redirects", "0");
        // Nobody else hands out addresses here; looking for duplicates would make IPv6 wait two seconds.
        sysctl("net/ipv6/conf/default/accept_dad", "0");
        sysctl("net/ipv6/conf/default/dad_transmits", "0");
        let forwarding6 = sysctl("net/ipv6/conf/all/forwarding", "1");
        // Where the kernel filters bridged frames as packets (br_netfilter), addresses would be
        // translated before the switch routes, and a frame never leaves by the port it came in.
        let bridged_rules = std::path::Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables").exists();
        let hairpin = bridged_rules
            && !(sysctl("net/bridge/bridge-nf-call-iptables", "0")
                && sysctl("net/bridge/bridge-nf-call-ip6tables", "0"));
        link_up(&socket, LO).map_err(failed(Step::Loopback))?;
        let mut messages = Messages::new();
        messages
            .message(RTM_NEWLINK, ACK | CREATE | EXCL, &ifinfo(0, true))
            .text(IFLA_IFNAME, name)
            .bytes(IFLA_ADDRESS, &BRIDGE_MAC)
            .nest(IFLA_LINKINFO, |info| {
                info.bytes(IFLA_INFO_KIND, b"bridge");
            });
        socket.one(&mut messages).map_err(failed(Step::Bridge))?;
        let bridge = index_of(name).map_err(failed(Step::Bridge))?;
        devconf(&socket, bridge, &[(DEVCONF_FORWARDING, 1), (DEVCONF_SEND_REDIRECTS, 0)])
            .map_err(failed(Step::Bridge))?;
        address(&socket, bridge, network.switch.into(), network.pods.1).map_err(failed(Step::Address))?;
        address(&socket, bridge, network.dns.into(), 32).map_err(failed(Step::Address))?;
        let ipv6 = forwarding6 && address(&socket, bridge, network.switch6.into(), 64).is_ok();
        // Programs of the switch itself (the control plane) may name any address: the rules of the
        // output hook redirect or reject it, but only a packet that has a route gets there.
        route(&socket, Route { oif: LO, ..Route::default_v4() }).map_err(failed(Step::Route))?;
        if ipv6 {
            // Without it only the control plane's own IPv6 to the outside fails, with another error.
            tolerate(route(&socket, Route { oif: LO, ..Route::default_v6() }));
        }
        Ok(Self { socket, network, bridge, hairpin, extras: Extras { ipv6, low_ports } })
    }

    /// What the kernel gave.
    pub fn extras(&self) -> Extras {
        self.extras
    }

    /// The addresses in use.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Makes a pod's pair of interfaces, one end on the switch and the other, `eth0`, in `pod`.
    pub fn plug(&self, port: &str, pod: BorrowedFd<'_>) -> Result<(), CaptureError> {
        let pod = u32::try_from(pod.as_raw_fd()).expect("an open descriptor is not negative");
        let mut messages = Messages::new();
        messages
            .message(RTM_NEWLINK, ACK | CREATE | EXCL, &ifinfo(0, true))
            .text(IFLA_IFNAME, port)
            .native(IFLA_MASTER, self.bridge)
            .nest(IFLA_LINKINFO, |info| {
                info.bytes(IFLA_INFO_KIND, b"veth").nest(IFLA_INFO_DATA, |data| {
                    data.nest(VETH_INFO_PEER, |peer| {
                        // Up only later: here it would be ENOTCONN.
                        peer.raw(&ifinfo(0, false)).text(IFLA_IFNAME, "eth0").native(IFLA_NET_NS_FD, pod);
                    });
                });
            });
        let failed = |errno| CaptureError::explain(Step::Veth, errno);
        self.socket.one(&mut messages).map_err(failed)?;
        if self.hairpin {
            const INFO_SLAVE_KIND: u16 = 4;
            const INFO_SLAVE_DATA: u16 = 5;
            const BRPORT_MODE: u16 = 4;
            let mut messages = Messages::new();
            messages.message(RTM_NEWLINK, ACK, &ifinfo(0, false)).text(IFLA_IFNAME, port).nest(IFLA_LINKINFO, |info| {
                info.bytes(INFO_SLAVE_KIND, b"bridge").nest(INFO_SLAVE_DATA, |data| {
                    data.bytes(BRPORT_MODE, &[1]);
                });
            });
            self.socket.one(&mut messages).map_err(failed)?;
        }
        Ok(())
    }
}

/// Sets up `lo` and the plugged `eth0` in the calling thread's network namespace.
pub fn join(network: &Network, ip: Ipv4Addr, ip6: Option<Ipv6Addr>) -> Result<Extras, CaptureError> {
    let failed = |step| move |errno| CaptureError::explain(step, errno);
    let low_ports = sysctl("net/ipv4/ip_unprivileged_port_start", "0");
    for conf in ["all", "default", "eth0"] {
        sysctl(&format!("net/ipv4/conf/{conf}/accept_redirects"), "0");
        sysctl(&format!("net/ipv6/conf/{conf}/accept_redirects"), "0");
        sysctl(&format!("net/ipv6/conf/{conf}/accept_dad"), "0");
        sysctl(&format!("net/ipv6/conf/{conf}/dad_transmits"), "0");
    }
    let socket = Socket::route().map_err(failed(Step::Netlink))?;
    let eth0 = index_of("eth0").map_err(failed(Step::Veth))?;
    // The only neighbour is a few microseconds away: ask again soon when the first question got lost
    // because the port was not up yet.
    for family in ["ipv4", "ipv6"] {
        sysctl(&format!("net/{family}/neigh/eth0/retrans_time_ms"), "50");
    }
    link_up(&socket, LO).map_err(failed(Step::Loopback))?;
    link_up(&socket, eth0).map_err(failed(Step::Veth))?;
    address(&socket, eth0, ip.into(), 32).map_err(failed(Step::Address))?;
    let gateway = IpAddr::V4(network.switch);
    route(&socket, Route { to: Some((gateway, 32)), oif: eth0, link: true, ..Route::default_v4() })
        .map_err(failed(Step::Route))?;
    route(&socket, Route { gateway: Some(gateway), oif: eth0, ..Route::default_v4() }).map_err(failed(Step::Route))?;
    let ipv6 = ip6.is_some_and(|ip6| {
        let gateway = IpAddr::V6(network.switch6);
        address(&socket, eth0, ip6.into(), 128)
            .and_then(|()| route(&socket, Route { to: Some((gateway, 128)), oif: eth0, ..Route::default_v6() }))
            .and_then(|()| route(&socket, Route { gateway: Some(gateway), oif: eth0, ..Route::default_v6() }))
            .is_ok()
    });
    Ok(Extras { ipv6, low_ports })
}

/// For steps whose failure changes little; the call says what.
fn tolerate<T, E>(_result: Result<T, E>) {}

/// Sets a sysctl of the calling thread's network namespace; false where `/proc/sys` does not let us.
fn sysctl(name: &str, value: &str) -> bool {
    std::fs::write(format!("/proc/sys/{name}"), value).is_ok()
}

/// `struct ifinfomsg`
fn ifinfo(index: u32, up: bool) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    if up {
        header[8..12].copy_from_slice(&IFF_UP.to_ne_bytes());
        header[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    }
    header
}

fn link_up(socket: &Socket, index: u32) -> Result<(), Errno> {
    let mut messages = Messages::new();
    messages.message(RTM_NEWLINK, ACK, &ifinfo(index, true));
    socket.one(&mut messages)
}

fn devconf(socket: &Socket, index: u32, values: &[(u16, u32)]) -> Result<(), Errno> {
    let mut messages = Messages::new();
    messages.message(RTM_SETLINK, ACK, &ifinfo(index, false)).nest(IFLA_AF_SPEC, |spec| {
        spec.nest(u16::from(AF_INET), |inet| {
            inet.nest(IFLA_INET_CONF, |conf| {
                for &(key, value) in values {
                    conf.native(key, value);
                }
            });
        });
    });
    socket.one(&mut messages)
}

fn octets(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(v4) => (AF_INET, v4.octets().to_vec()),
        IpAddr::V6(v6) => (AF_INET6, v6.octets().to_vec()),
    }
}

fn address(socket: &Socket, index: u32, address: IpAddr, length: u8) -> Result<(), Errno> {
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    /// No duplicate address detection: nobody else hands out addresses here, and it takes a second.
    const IFA_F_NODAD: u8 = 2;
    let (family, bytes) = octets(address);
    let flags = if family == AF_INET6 { IFA_F_NODAD } else { 0 };
    let mut header = vec![family, length, flags, 0];
    header.extend(index.to_ne_bytes());
    let mut messages = Messages::new();
    messages.message(RTM_NEWADDR, ACK | CREATE | REPLACE, &header).bytes(IFA_LOCAL, &bytes).bytes(IFA_ADDRESS, &bytes);
    socket.one(&mut messages)
}

#[derive(Clone, Copy)]
struct Route {
    v6: bool,
    to: Option<(IpAddr, u8)>,
    gateway: Option<IpAddr>,
    oif: u32,
    /// The target is a neighbour.
    link: bool,
}

impl Route {
    fn default_v4() -> Self {
        Self { v6: false, to: None, gateway: None, oif: 0, link: false }
    }

    fn default_v6() -> Self {
        Self { v6: true, ..Self::default_v4() }
    }
}

fn route(socket: &Socket, route: Route) -> Result<(), Errno> {
    const RTA_DST: u16 = 1;
    const RTA_OIF: u16 = 4;
    const RTA_GATEWAY: u16 = 5;
    const TABLE_MAIN: u8 = 254;
    const PROTOCOL_STATIC: u8 = 4;
    const SCOPE_LINK: u8 = 253;
    const TYPE_UNICAST: u8 = 1;
    let family = if route.v6 { AF_INET6 } else { AF_INET };
    let scope = if route.link { SCOPE_LINK } else { 0 };
    let length = route.to.map_or(0, |(_, length)| length);
    let header = [family, length, 0, 0, TABLE_MAIN, PROTOCOL_STATIC, scope, TYPE_UNICAST, 0, 0, 0, 0];
    let mut messages = Messages::new();
    messages.message(RTM_NEWROUTE, ACK | CREATE | REPLACE, &header);
    if let Some((to, _)) = route.to {
        messages.bytes(RTA_DST, &octets(to).1);
    }
    if let Some(gateway) = route.gateway {
        messages.bytes(RTA_GATEWAY, &octets(gateway).1);
    }
    messages.native(RTA_OIF, route.oif);
    socket.one(&mut messages)
}

/// Index of an interface in the calling thread's network namespace.
fn index_of(name: &str) -> Result<u32, Errno> {
    let any = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::netdevice::name_to_index(&any, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mesh_knows_its_own_addresses() {
        let check = |address: &str, inside: bool| {
            assert_eq!(Network::LOCAL.contains(address.parse().unwrap()), inside, "{address}");
        };
        check("10.77.3.4", true);
        check("10.78.0.1", false);
        check("10.96.0.10", true);
        check("10.111.255.255", true);
        check("10.112.0.0", false);
        check("240.240.7.1", true);
        check("8.8.8.8", false);
        check("fd77::12", true);
        check("fd77:0:1::", false);
        assert_eq!(Network::LOCAL.ranges(), "10.77.0.0/16,10.96.0.0/12,240.240.0.0/16,fd77::/48");
    }
}
