//! Picks an endpoint and everything an attempt needs.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock};

use smallvec::SmallVec;
use types::{Cause, RequestHead, Version};
use xxhash_rust::xxh64::xxh64;

use super::{AlpnList, Attempt, Env, HeldPlaces, Picked, UpstreamProtocol};
use crate::balance::Choice;
use crate::cluster::{Address, Cluster, Discovery, HttpChoice};
use crate::draw::Draw;
use crate::facts::ConnFacts;
use crate::hcm::AlpnOverrides;
use crate::record::{Recorder, Stage, note};
use crate::route::{HashPolicy, HashSource};
use crate::shared::{Held, Resource, SharedHost};
use crate::worker::LiveCluster;

/// What an attempt is made from.
pub(crate) struct Plan<'a> {
    pub(crate) conn: &'a ConnFacts,
    pub(crate) draw: Draw,
    /// 1 for the first.
    pub(crate) number: u32,
    /// Of the request; `None` for streams of bytes.
    pub(crate) head: Option<&'a RequestHead>,
    pub(crate) hash: Option<u64>,
    pub(crate) avoid: &'a [Arc<SharedHost>],
    pub(crate) repicks_max: u32,
    pub(crate) avoid_priorities: &'a [u32],
    /// Resolved addresses (dynamic forwarding).
    pub(crate) resolved: Option<SocketAddr>,
    pub(crate) alpn: Option<&'a AlpnOverrides>,
    pub(crate) upgrade: bool,
}

/// Makes an attempt on `live`; the error is the reply's cause. Returns the priority picked, too.
pub(crate) fn make(
    env: &Env<'_>,
    live: &LiveCluster,
    plan: Plan<'_>,
    recorder: &mut dyn Recorder,
) -> Result<(Attempt, u32), Cause> {
    let cluster = &live.cluster;
    let Some(request) = crate::limit::take(&cluster.limits, &live.shared, Resource::Request) else {
        return Err(Cause::UpstreamOverflow);
    };
    let (picked, priority) = pick(env, live, &plan)?;
    note(recorder, Stage::Host, None, || {
        let workload = picked.endpoint.as_ref().map(|endpoint| endpoint.workload.to_string()).unwrap_or_default();
        (picked.host.address.to_string(), workload)
    });
    // A socket without conditions always stands last.
    let transport = cluster.transport_for(picked.endpoint.as_deref()).cloned().ok_or(Cause::Internal)?;
    let protocol = match (cluster.http.choice, plan.head.map(|head| head.version)) {
        (HttpChoice::Http1, _) => UpstreamProtocol::Http1,
        (HttpChoice::Http2, _) | (HttpChoice::Downstream, Some(Version::Http2)) => UpstreamProtocol::Http2,
        (HttpChoice::Downstream, _) => UpstreamProtocol::Http1,
        (HttpChoice::Auto, _) => {
            if transport.tls.is_some() {
                UpstreamProtocol::Auto
            } else {
                UpstreamProtocol::Http1
            }
        }
    };
    let alpn = alpn(&plan, cluster, &transport, protocol);
    note(recorder, Stage::Transport, None, || {
        let name = if transport.tls.is_some() { "tls" } else { "plaintext" };
        (name.to_owned(), transport.name.to_string())
    });
    let (sni, required_san) = names(cluster, &transport, plan.head);
    let attempt = Attempt {
        number: plan.number,
        cluster: Arc::clone(cluster),
        shared: Arc::clone(&live.shared),
        held: HeldPlaces { request: Some(request), host: Some(Held::enter(&picked.host)) },
        picked,
        transport,
        protocol,
        sni,
        required_san,
        alpn,
        per_try_timeout: None,
        upgrade: plan.upgrade,
        replay_bytes_max: 0,
        mirrors: Vec::new(),
    };
    Ok((attempt, priority))
}

/// The ALPN list to offer: what `istio.alpn` says of the request, else the transport's own. Where that
/// is empty, a request's protocol is said all the same, so that the server need not guess it.
///
/// *Source*: Envoy's HTTP connection pools (`applicationProtocolFallback`).
fn alpn(
    plan: &Plan<'_>,
    cluster: &Cluster,
    transport: &crate::cluster::TransportSocket,
    protocol: UpstreamProtocol,
) -> AlpnList {
    static HTTP1: LazyLock<Arc<[Box<str>]>> = LazyLock::new(|| Arc::from([Box::from("http/1.1")]));
    static HTTP2: LazyLock<Arc<[Box<str>]>> = LazyLock::new(|| Arc::from([Box::from("h2")]));
    static EITHER: LazyLock<Arc<[Box<str>]>> = LazyLock::new(|| Arc::from([Box::from("h2"), Box::from("http/1.1")]));
    let (Some(tls), Some(head)) = (&transport.tls, plan.head) else { return AlpnList::Transport };
    let overridden = plan.alpn.filter(|_| !cluster.keep_alpn).map(|overrides| match protocol {
        UpstreamProtocol::Http1 if head.version == Version::Http10 => &overrides.http10,
        UpstreamProtocol::Http1 => &overrides.http11,
        UpstreamProtocol::Http2 | UpstreamProtocol::Auto => &overrides.http2,
    });
    let fallback = match protocol {
        UpstreamProtocol::Http1 => &HTTP1,
        UpstreamProtocol::Http2 => &HTTP2,
        UpstreamProtocol::Auto => &EITHER,
    };
    match overridden {
        Some(list) if !list.is_empty() => AlpnList::Override(Arc::clone(list)),
        _ if tls.alpn.is_empty() => AlpnList::Override(Arc::clone(fallback)),
        _ => AlpnList::Transport,
    }
}

/// Server name and name to verify.
fn names(
    cluster: &Cluster,
    transport: &crate::cluster::TransportSocket,
    head: Option<&RequestHead>,
) -> (Option<Arc<str>>, Option<Arc<str>>) {
    let Some(tls) = &transport.tls else { return (None, None) };
    let host = head.map(|head| crate::route::without_port(head.authority()));
    let host = host.and_then(|host| std::str::from_utf8(host).ok()).filter(|host| !host.is_empty());
    let is_ip = host.is_some_and(|host| host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok());
    let sni = match host {
        Some(host) if cluster.http.auto_sni && !is_ip => Some(host),
        _ => (!tls.sni.is_empty()).then_some(&*tls.sni),
    };
    let san = host.filter(|_| cluster.http.auto_san_validation);
    (sni.map(Arc::from), san.map(|san| san.trim_matches(['[', ']']).into()))
}

fn pick(env: &Env<'_>, live: &LiveCluster, plan: &Plan<'_>) -> Result<(Picked, u32), Cause> {
    let fixed = match &live.cluster.discovery {
        Discovery::OriginalDst { port_override } => {
            // Never without interception, and never back to where the connection was taken.
            let to = plan.conn.original_destination.ok_or(Cause::NoHealthyUpstream)?;
            Some(SocketAddr::new(to.ip(), port_override.unwrap_or(to.port())))
        }
        Discovery::DynamicForward { .. } => Some(plan.resolved.ok_or(Cause::DnsFailed)?),
        Discovery::Eds { .. } | Discovery::Static | Discovery::Dns(_) => None,
    };
    if let Some(address) = fixed {
        let host = live.shared.host(&Address::Ip(address), env.now.mono);
        return Ok((Picked { host, endpoint: None }, 0));
    }
    let balancer = live.balancer.as_ref().ok_or(Cause::NoHealthyUpstream)?;
    let mut balancer = balancer.borrow_mut();
    let choice = Choice {
        draw: plan.draw,
        attempt: plan.number,
        hash: plan.hash,
        avoid: plan.avoid,
        repicks_max: plan.repicks_max,
        avoid_priorities: plan.avoid_priorities,
        now: env.now.mono,
    };
    let pick = balancer.pick(&choice).ok_or(Cause::NoHealthyUpstream)?;
    let picked = Picked { host: Arc::clone(pick.host), endpoint: Some(Arc::clone(pick.endpoint)) };
    Ok((picked, pick.priority))
}

/// A cookie to set on the response, made for a hash policy.
pub(super) type MadeCookie = Box<str>;

/// The hash of a request, as it goes upstream, under a list of policies, and a cookie that had to be
/// made. `client` is the trusted address of the client.
///
/// *Source*: Envoy's `HashPolicyImpl`: hashes are combined by rotating the old one by one bit.
pub(super) fn hash(
    policies: &[HashPolicy],
    client: IpAddr,
    head: &RequestHead,
    draw: Draw,
) -> (Option<u64>, Option<MadeCookie>) {
    let mut hash: Option<u64> = None;
    let mut made = None;
    for policy in policies {
        let one = match &policy.source {
            HashSource::Header(name) => header_hash(head, name),
            HashSource::Query(name) => head
                .query()
                .and_then(|query| crate::matcher::query_values(query, name.as_bytes()).next())
                .map(|value| xxh64(value, 0)),
            HashSource::SourceIp => Some(xxh64(client.to_canonical().to_string().as_bytes(), 0)),
            HashSource::Cookie { name, ttl, path, attributes } => match cookie(head, name) {
                Some(value) => Some(xxh64(value, 0)),
                None => ttl.map(|ttl| {
                    let value = format!("\"{:016x}\"", draw.named("hash_cookie"));
                    let hash = xxh64(value.trim_matches('"').as_bytes(), 0);
                    let mut text = format!("{name}={value}");
                    if !ttl.is_zero() {
                        text += "; Max-Age=";
                        text += &ttl.as_secs().to_string();
                    }
                    if !path.is_empty() {
                        text += "; Path=";
                        text += path;
                    }
                    for (name, value) in attributes {
                        for part in ["; ", name] {
                            text += part;
                        }
                        if !value.is_empty() {
                            text += "=";
                            text += value;
                        }
                    }
                    text.push_str("; HttpOnly");
                    made = Some(text.into());
                    hash
                }),
            },
        };
        if let Some(one) = one {
            hash = Some(hash.map_or(one, |old| old.rotate_left(1) ^ one));
            if policy.terminal {
                break;
            }
        }
    }
    (hash, made)
}

fn header_hash(head: &RequestHead, name: &str) -> Option<u64> {
    if name.starts_with(':') {
        return head.header(name).map(|value| xxh64(&value, 0));
    }
    let mut values: SmallVec<[&[u8]; 4]> = head.fields.get_all(name).collect();
    if values.is_empty() {
        return None;
    }
    // The order in which equal names arrive does not count.
    values.sort_unstable();
    Some(values.iter().fold(0, |seed, value| xxh64(value, seed)))
}

fn cookie<'a>(head: &'a RequestHead, name: &str) -> Option<&'a [u8]> {
    head.fields.get_all("cookie").flat_map(|line| line.split(|b| *b == b';')).find_map(|pair| {
        let pair = pair.trim_ascii();
        let at = pair.iter().position(|b| *b == b'=')?;
        let value = &pair[at + 1..];
        let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
        (&pair[..at] == name.as_bytes()).then_some(value)
    })
}
