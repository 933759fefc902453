//! Service addresses, the way out and the refusals: the rules of the switch.
//!
//! ```text
//! from a pod ─► prerouting(nat)  service address? ─► chain of the service ─► one endpoint at random
//!                                outside or the machine, TCP? ─► relay port of the switch
//!               prerouting(filter) service address still? reset / unreachable; outside, not TCP? unreachable
//! from a program of the switch ─► output: the same
//! ```
//!
//! Services change one at a time: each has a chain of its own behind a map, so a change of endpoints
//! touches that chain only, in one transaction; connections made before keep their endpoint.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::error::{CaptureError, Step};
use crate::link::{LO, Network};
use crate::netlink::Socket;
use crate::nft::{Batch, Hook, Rule, Verdict};

const TABLE: &str = "lateen_switch";
const NAT: i32 = -100;
const AFTER_NAT: i32 = -90;
const SOURCE_NAT: i32 = 100;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// A write may hold twice `wmem_default`; stay well below.
const BATCH_BYTES: usize = 96 * 1024;

/// Transport protocol of a service port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// One address of a service and what answers there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServiceAddress {
    /// The ClusterIP.
    pub ip: IpAddr,
    /// Its ports.
    pub ports: Vec<ServicePort>,
}

/// One port of a service address.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServicePort {
    /// Port of the service.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Ready endpoints, in the address family of the service. None: connections are refused.
    pub endpoints: Vec<SocketAddr>,
}

type Key = (IpAddr, Protocol, u16);
/// Number of the chain, and endpoints.
type Known = (u32, Vec<SocketAddr>);

/// The switch's table; made in the calling thread's network namespace, usable from any thread.
#[derive(Debug)]
pub struct Services {
    socket: Socket,
    /// Chain number and endpoints of each service port in the kernel.
    known: BTreeMap<Key, Known>,
    chains_made: u32,
}

impl Services {
    /// Loads the fixed part. `relay` is the port of the switch that connections to the outside go to.
    pub fn install(network: &Network, relay: u16) -> Result<Self, CaptureError> {
        let explain = |errno| CaptureError::explain(Step::Rules, errno);
        let socket = Socket::netfilter().map_err(explain)?;
        let mut batch = Batch::new(TABLE);
        batch.table().delete_table().table();
        batch.verdict_map(map(false), 1, 12).verdict_map(map(true), 2, 24);
        batch.verdict_map(hairpin(false), 3, 8).verdict_map(hairpin(true), 4, 32);
        batch.hooked_chain("output", "nat", Hook::Output, NAT);
        batch.hooked_chain("prerouting", "nat", Hook::Prerouting, NAT);
        batch.rule("output", |rule| {
            rule.family(false).destined(Ipv4Addr::new(127, 0, 0, 0).into(), 8, true).verdict(Verdict::Accept);
        });
        for chain in ["prerouting", "output"] {
            for v6 in [false, true] {
                batch.rule(chain, |rule| {
                    rule.family(v6).service_lookup(v6, map(v6));
                });
            }
            batch.rule(chain, |rule| {
                rule.family(false).protocol(TCP).destined(network.host.into(), 32, true).redirect(relay);
            });
            for v6 in [false, true] {
                batch.rule(chain, |rule| {
                    outside(rule.family(v6).protocol(TCP), network, v6).redirect(relay);
                });
            }
        }
        // A pod that calls itself by a service would see its own address arrive from outside.
        batch.hooked_chain("postrouting", "nat", Hook::Postrouting, SOURCE_NAT);
        batch.chain("masquerade").rule("masquerade", |rule| {
            rule.masquerade();
        });
        for v6 in [false, true] {
            batch.rule("postrouting", |rule| {
                rule.family(v6).pair_lookup(v6, hairpin(v6));
            });
        }
        refusals(&mut batch, network);
        batch.commit(&socket).map_err(explain)?;
        Ok(Self { socket, known: BTreeMap::new(), chains_made: 0 })
    }

    /// Makes the kernel's services these. Each changes in one step; the first error ends the change
    /// with the rest as it was.
    pub fn set(&mut self, services: &[ServiceAddress]) -> Result<(), CaptureError> {
        let mut wanted: BTreeMap<Key, Vec<SocketAddr>> = BTreeMap::new();
        for service in services {
            for port in &service.ports {
                let endpoints = wanted.entry((service.ip, port.protocol, port.port)).or_default();
                endpoints.extend(port.endpoints.iter().filter(|to| to.is_ipv6() == service.ip.is_ipv6()));
            }
        }
        for endpoints in wanted.values_mut() {
            endpoints.sort_unstable();
            endpoints.dedup();
        }
        let gone: Vec<Key> = self.known.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        let changes =
            gone.into_iter().map(|key| (key, None)).chain(wanted.into_iter().map(|(key, to)| (key, Some(to))));
        let mut batch = Batch::new(TABLE);
        let mut after = Vec::new();
        for (key, endpoints) in changes {
            let before = self.known.get(&key);
            if let (Some((_, before)), Some(endpoints)) = (before, &endpoints)
                && before == endpoints
            {
                continue;
            }
            let number = before.map_or_else(
                || {
                    self.chains_made += 1;
                    self.chains_made
                },
                |&(number, _)| number,
            );
            change(&mut batch, key, number, before.is_some(), endpoints.as_deref());
            after.push((key, endpoints.map(|endpoints| (number, endpoints))));
            if batch.len() > BATCH_BYTES {
                self.commit(std::mem::replace(&mut batch, Batch::new(TABLE)), &mut after)?;
            }
        }
        if after.is_empty() { Ok(()) } else { self.commit(batch, &mut after) }
    }

    fn commit(&mut self, batch: Batch, after: &mut Vec<(Key, Option<Known>)>) -> Result<(), CaptureError> {
        batch.commit(&self.socket).map_err(|errno| CaptureError::explain(Step::Rules, errno))?;
        for (key, value) in after.drain(..) {
            match value {
                Some(value) => self.known.insert(key, value),
                None => self.known.remove(&key),
            };
        }
        Ok(())
    }
}

fn map(v6: bool) -> &'static str {
    if v6 { "services6" } else { "services4" }
}

fn hairpin(v6: bool) -> &'static str {
    if v6 { "hairpin6" } else { "hairpin4" }
}

fn number_of(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
    }
}

/// Address, protocol and port, each padded to four bytes, as the lookup concatenates them.
fn element((ip, protocol, port): Key) -> Vec<u8> {
    let mut key = match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    key.extend([number_of(protocol), 0, 0, 0]);
    key.extend(port.to_be_bytes());
    key.extend([0, 0]);
    key
}

fn change(batch: &mut Batch, key: Key, number: u32, known: bool, endpoints: Option<&[SocketAddr]>) {
    let chain = format!("svc{number}");
    let v6 = key.0.is_ipv6();
    let Some(endpoints) = endpoints else {
        batch.delete_element(map(v6), &element(key)).flush(&chain).delete_chain(&chain);
        return;
    };
    if known {
        batch.flush(&chain);
    } else {
        batch.chain(&chain);
    }
    let protocol = number_of(key.1);
    for to in endpoints {
        let address = match to.ip() {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        // Entries stay when an endpoint goes: they only say "from itself to itself".
        batch.add_element(hairpin(v6), &address.repeat(2), Verdict::Jump("masquerade"));
    }
    for (index, &to) in endpoints.iter().enumerate() {
        let left = u32::try_from(endpoints.len() - index).unwrap_or(u32::MAX);
        batch.rule(&chain, |rule| {
            // The kernel wants the transport protocol settled before it rewrites a port.
            rule.family(v6).protocol(protocol);
            if left > 1 {
                rule.one_in(left);
            }
            rule.destination(to);
        });
    }
    if !known {
        batch.add_element(map(v6), &element(key), Verdict::Goto(&chain));
    }
}

/// What nobody translated: refused at once instead of lost.
fn refusals(batch: &mut Batch, network: &Network) {
    batch.chain("refuse");
    batch.rule("refuse", |rule| {
        rule.family(false).destined(network.dns.into(), 32, true).verdict(Verdict::Accept);
    });
    batch.rule("refuse", |rule| {
        rule.protocol(TCP).reset();
    });
    batch.rule("refuse", |rule| {
        rule.unreachable();
    });
    batch.hooked_chain("refuse_in", "filter", Hook::Prerouting, AFTER_NAT);
    batch.hooked_chain("refuse_out", "filter", Hook::Output, AFTER_NAT);
    // Forwarding out of the interface a packet came in by makes the kernel recommend the short way,
    // which would bypass the translation. IPv6 has no switch for it.
    for (v6, protocol, kind) in [(false, ICMP, 5), (true, ICMPV6, 137)] {
        batch.rule("refuse_out", |rule| {
            rule.family(v6).protocol(protocol).first_byte(kind).verdict(Verdict::Drop);
        });
    }
    batch.rule("refuse_in", |rule| {
        rule.arriving_by(LO).verdict(Verdict::Accept);
    });
    batch.rule("refuse_out", |rule| {
        rule.family(false).destined(Ipv4Addr::new(127, 0, 0, 0).into(), 8, true).verdict(Verdict::Accept);
    });
    for chain in ["refuse_in", "refuse_out"] {
        let (net, length) = network.services;
        batch.rule(chain, |rule| {
            rule.family(false).destined(net.into(), length, true).verdict(Verdict::Jump("refuse"));
        });
        batch.rule(chain, |rule| {
            outside(rule.family(false).protocol(UDP), network, false).unreachable();
        });
        batch.rule(chain, |rule| {
            outside(rule.family(true).protocol(UDP), network, true).unreachable();
        });
    }
}

fn outside<'a, 'b>(rule: &'a mut Rule<'b>, network: &Network, v6: bool) -> &'a mut Rule<'b> {
    if v6 {
        let unicast_local = "fe80::".parse().expect("an address");
        let multicast = "ff00::".parse().expect("an address");
        let (net, length) = network.mesh6;
        rule.destined(net.into(), length, false)
            .destined(unicast_local, 10, false)
            .destined(multicast, 8, false)
            .destined(std::net::Ipv6Addr::LOCALHOST.into(), 128, false)
    } else {
        let (pods, pods_length) = network.pods;
        let (services, services_length) = network.services;
        rule.destined(pods.into(), pods_length, false)
            .destined(services.into(), services_length, false)
            .destined(Ipv4Addr::new(127, 0, 0, 0).into(), 8, false)
            .destined(Ipv4Addr::new(224, 0, 0, 0).into(), 4, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_key_is_padded_as_the_registers_are() {
        let key = ("10.96.1.2".parse().unwrap(), Protocol::Tcp, 9080);
        assert_eq!(element(key), [10, 96, 1, 2, 6, 0, 0, 0, 0x23, 0x78, 0, 0]);
        let key = ("fd77::1".parse().unwrap(), Protocol::Udp, 53);
        assert_eq!(element(key).len(), 24);
    }
}
