//! The redirect rules of a pod with a proxy.
//!
//! What the application sends goes to the proxy's outbound port, what arrives goes to its inbound
//! port. The proxy's own connections carry a mark, because uid and cgroup cannot tell the two apart
//! in a user namespace of one user.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use types::wellknown::{marks, ports};

use crate::error::{CaptureError, Step};
use crate::link::LO;
use crate::netlink::Socket;
use crate::nft::{Batch, Hook, Verdict};

const TABLE: &str = "lateen_capture";
const TCP: u8 = 6;
const UDP: u8 = 17;
/// `dstnat`
const PRIORITY: i32 = -100;

/// Which traffic of a pod its proxy gets.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Redirect {
    /// Whether connections that arrive go to the proxy.
    pub inbound: Inbound,
    /// Inbound ports that bypass the proxy, beside the mesh's own.
    pub exclude_inbound_ports: Vec<u16>,
    /// Outbound ports that bypass the proxy.
    pub exclude_outbound_ports: Vec<u16>,
    /// Destinations that the proxy gets; empty = all.
    pub include_outbound_ranges: Vec<(IpAddr, u8)>,
    /// Destinations that bypass the proxy.
    pub exclude_outbound_ranges: Vec<(IpAddr, u8)>,
    /// Outbound ports that the proxy gets whatever the address.
    pub include_outbound_ports: Vec<u16>,
    /// Whether DNS queries go to the proxy.
    pub dns: bool,
}

/// Inbound ports that the proxy gets.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Inbound {
    /// All but the excluded (`*`).
    All,
    /// These; none at all when empty.
    Only(Vec<u16>),
}

impl Default for Redirect {
    /// Everything, DNS too.
    fn default() -> Self {
        Self {
            inbound: Inbound::All,
            exclude_inbound_ports: Vec::new(),
            exclude_outbound_ports: Vec::new(),
            include_outbound_ranges: Vec::new(),
            exclude_outbound_ranges: Vec::new(),
            include_outbound_ports: Vec::new(),
            dns: true,
        }
    }
}

impl Redirect {
    /// Loads the rules in the calling thread's network namespace, replacing those of an earlier call.
    pub fn install(&self) -> Result<(), CaptureError> {
        let explain = |errno| CaptureError::explain(Step::Rules, errno);
        let socket = Socket::netfilter().map_err(explain)?;
        let mut batch = Batch::new(TABLE);
        // Replacing: make sure it is there, remove it, make it anew, in one transaction.
        batch.table().delete_table().table();
        self.output(&mut batch);
        self.prerouting(&mut batch);
        batch.commit(&socket).map_err(explain)
    }

    /// Removes the rules from the calling thread's network namespace; without them it does nothing.
    pub fn remove() -> Result<(), CaptureError> {
        let explain = |errno| CaptureError::explain(Step::Rules, errno);
        let socket = Socket::netfilter().map_err(explain)?;
        Batch::new(TABLE).commit_removal(&socket).map_err(explain)
    }

    fn output(&self, batch: &mut Batch) {
        batch.hooked_chain("output", "nat", Hook::Output, PRIORITY);
        batch.rule("output", |rule| {
            rule.mark(marks::PROXY_TO_APP).verdict(Verdict::Accept);
        });
        // A proxy with one mark for all (an Envoy) shows by the source address that it calls its own
        // application.
        for v6 in [false, true] {
            batch.rule("output", |rule| {
                rule.mark(marks::PROXY).leaving_by(LO).family(v6).sent_from(to_app_source(v6)).verdict(Verdict::Accept);
            });
        }
        // The proxy calling a service whose endpoint is this very pod: in again by the inbound port.
        for v6 in [false, true] {
            let (loopback, length) = loopback(v6);
            batch.rule("output", |rule| {
                rule.mark(marks::PROXY).leaving_by(LO).family(v6).protocol(TCP).destined(loopback, length, false);
                rule.redirect(ports::INBOUND);
            });
        }
        batch.rule("output", |rule| {
            rule.mark(marks::PROXY).verdict(Verdict::Accept);
        });
        if self.dns {
            for protocol in [UDP, TCP] {
                batch.rule("output", |rule| {
                    rule.protocol(protocol).port(53).redirect(ports::DNS);
                });
            }
        }
        batch.rule("output", |rule| {
            rule.leaving_by(LO).verdict(Verdict::Accept);
        });
        for &port in &self.exclude_outbound_ports {
            batch.rule("output", |rule| {
                rule.protocol(TCP).port(port).verdict(Verdict::Accept);
            });
        }
        for &port in &self.include_outbound_ports {
            batch.rule("output", |rule| {
                rule.protocol(TCP).port(port).redirect(ports::OUTBOUND);
            });
        }
        for &(net, length) in &self.exclude_outbound_ranges {
            batch.rule("output", |rule| {
                rule.family(net.is_ipv6()).destined(net, length, true).verdict(Verdict::Accept);
            });
        }
        for &(net, length) in &self.include_outbound_ranges {
            batch.rule("output", |rule| {
                rule.family(net.is_ipv6()).protocol(TCP).destined(net, length, true).redirect(ports::OUTBOUND);
            });
        }
        if self.include_outbound_ranges.is_empty() {
            batch.rule("output", |rule| {
                rule.protocol(TCP).redirect(ports::OUTBOUND);
            });
        }
    }

    fn prerouting(&self, batch: &mut Batch) {
        batch.hooked_chain("prerouting", "nat", Hook::Prerouting, PRIORITY);
        batch.rule("prerouting", |rule| {
            rule.arriving_by(LO).verdict(Verdict::Accept);
        });
        let own = [ports::HBONE, ports::MERGED_METRICS, ports::READINESS, ports::PROXY_METRICS];
        for port in own.into_iter().chain(self.exclude_inbound_ports.iter().copied()) {
            batch.rule("prerouting", |rule| {
                rule.protocol(TCP).port(port).verdict(Verdict::Accept);
            });
        }
        match &self.inbound {
            Inbound::All => {
                batch.rule("prerouting", |rule| {
                    rule.protocol(TCP).redirect(ports::INBOUND);
                });
            }
            Inbound::Only(included) => {
                for &port in included {
                    batch.rule("prerouting", |rule| {
                        rule.protocol(TCP).port(port).redirect(ports::INBOUND);
                    });
                }
            }
        }
    }
}

/// Where inbound clusters send from. *Source*: Istio's 127.0.0.6 and `::6`.
fn to_app_source(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into() } else { Ipv4Addr::new(127, 0, 0, 6).into() }
}

fn loopback(v6: bool) -> (IpAddr, u8) {
    if v6 { (Ipv6Addr::LOCALHOST.into(), 128) } else { (Ipv4Addr::new(127, 0, 0, 0).into(), 8) }
}
