use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3 as pb;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use proto::any::pack;

use super::*;
use crate::config::NodeFacts;
use crate::record::NoRecord;
use crate::testing::{World, address, filter_of, number};

fn matching(name: &str, edit: impl FnOnce(&mut pb::FilterChainMatch)) -> pb::FilterChain {
    let mut of = pb::FilterChainMatch::default();
    edit(&mut of);
    pb::FilterChain {
        name: name.to_owned(),
        filter_chain_match: Some(of),
        filters: vec![filter_of(pack(&tcp::TcpProxy {
            stat_prefix: name.to_owned(),
            cluster_specifier: Some(tcp::tcp_proxy::ClusterSpecifier::Cluster("a".to_owned())),
            ..Default::default()
        }))],
        ..Default::default()
    }
}

fn listener(chains: Vec<pb::FilterChain>, default: Option<pb::FilterChain>) -> Arc<Listener> {
    let listener = pb::Listener {
        name: "l".to_owned(),
        address: Some(address("0.0.0.0", 15006)),
        filter_chains: chains,
        default_filter_chain: default,
        ..Default::default()
    };
    Arc::clone(World::new(&[listener], &[], NodeFacts::default()).config.listeners.get("l").unwrap())
}

fn conn(edit: impl FnOnce(&mut ConnFacts)) -> ConnFacts {
    let mut conn = ConnFacts::plaintext("l", "10.0.0.1:9080".parse().unwrap(), "10.0.0.2:5555".parse().unwrap());
    edit(&mut conn);
    conn
}

fn check(listener: &Listener, conn: &ConnFacts, expect: &str) {
    let found = select_chain(listener, conn, &mut NoRecord).map_or_else(|_| "none".to_owned(), |c| c.name.to_string());
    assert_eq!(found, expect, "{conn:?}");
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

/// A PERMISSIVE auto port of listener 15006, as istiod writes it.
#[test]
fn an_inbound_auto_port() {
    let http = ["istio-http/1.0", "istio-http/1.1", "istio-h2"];
    let plain = ["http/1.1", "h2c"];
    let port = |m: &mut pb::FilterChainMatch| m.destination_port = number(9080);
    let chains = vec![
        matching("blackhole", |m| m.destination_port = number(15006)),
        matching("catch-all", |m| m.transport_protocol = "raw_buffer".to_owned()),
        matching("tls http", |m| {
            port(m);
            m.transport_protocol = "tls".to_owned();
            m.application_protocols = texts(&http);
        }),
        matching("raw http", |m| {
            port(m);
            m.transport_protocol = "raw_buffer".to_owned();
            m.application_protocols = texts(&plain);
        }),
        matching("tls tcp", |m| {
            port(m);
            m.transport_protocol = "tls".to_owned();
            m.application_protocols = texts(&["istio-peer-exchange", "istio"]);
        }),
        matching("raw tcp", |m| {
            port(m);
            m.transport_protocol = "raw_buffer".to_owned();
        }),
        matching("foreign tls", |m| {
            port(m);
            m.transport_protocol = "tls".to_owned();
        }),
    ];
    let listener = listener(chains, None);
    let tls = |protocols: &[&str]| {
        let protocols: Vec<Box<str>> = protocols.iter().map(|p| (*p).into()).collect();
        conn(|c| {
            c.transport = Transport::Tls;
            c.protocols = protocols;
        })
    };
    check(&listener, &tls(&["istio-http/1.1", "istio", "http/1.1"]), "tls http");
    check(&listener, &tls(&["istio", "istio-http/1.1"]), "tls tcp");
    check(&listener, &tls(&["istio-peer-exchange"]), "tls tcp");
    check(&listener, &tls(&["h2"]), "foreign tls");
    check(&listener, &tls(&[]), "foreign tls");
    check(&listener, &conn(|c| c.protocols = vec!["http/1.1".into()]), "raw http");
    check(&listener, &conn(|c| c.protocols = vec!["http/1.0".into()]), "raw tcp");
    check(&listener, &conn(|_| ()), "raw tcp");
    check(&listener, &conn(|c| c.local.set_port(15006)), "blackhole");
    check(&listener, &conn(|c| c.local.set_port(1)), "catch-all");
    let mut unknown = tls(&[]);
    unknown.local.set_port(1);
    check(&listener, &unknown, "none");
}

#[test]
fn server_names() {
    let names = |name: &str, list: &[&str]| matching(name, |m| m.server_names = texts(list));
    let listener = listener(
        vec![names("exact", &["a.x.com"]), names("deep", &["*.x.com"]), names("wide", &["*.com"])],
        Some(matching("default", |_| ())),
    );
    let sni = |name: &str| conn(|c| c.server_name = Some(name.into()));
    check(&listener, &sni("a.x.com"), "exact");
    check(&listener, &sni("b.x.com"), "deep");
    check(&listener, &sni("c.b.x.com"), "deep");
    check(&listener, &sni("x.com"), "wide");
    check(&listener, &sni("com"), "default");
    check(&listener, &conn(|_| ()), "default");
}

#[test]
fn addresses_longest_first_and_no_way_back() {
    let range = |ip: &str, len: u32| core::CidrRange { address_prefix: ip.to_owned(), prefix_len: number(len) };
    let listener = listener(
        vec![
            matching("wide", |m| m.prefix_ranges = vec![range("10.0.0.0", 8)]),
            matching("narrow tls", |m| {
                m.prefix_ranges = vec![range("10.0.0.0", 24)];
                m.transport_protocol = "tls".to_owned();
            }),
        ],
        None,
    );
    check(&listener, &conn(|c| c.local = "10.9.0.1:1".parse().unwrap()), "wide");
    check(&listener, &conn(|c| c.transport = Transport::Tls), "narrow tls");
    check(&listener, &conn(|_| ()), "none");
}

#[test]
fn twins_are_refused() {
    let listener = pb::Listener {
        name: "l".to_owned(),
        address: Some(address("0.0.0.0", 1)),
        filter_chains: vec![matching("a", |_| ()), matching("b", |_| ())],
        ..Default::default()
    };
    let raw = crate::lower::Raw { name: "l".into(), body: pack(&listener) };
    let (table, rejected) = crate::lower::apply_listeners(&crate::config::Table::default(), &[raw], &[]);
    assert!(table.is_empty());
    assert_eq!(rejected[0].reason, "filter_chains[1].filter_chain_match has the same match as chain \"a\"");
}

#[test]
fn inspectors_are_switched_off_by_port() {
    let range = |from, to| PortPredicate::Range(from, to);
    let inspector = Inspector { disabled: Some(PortPredicate::Or(vec![range(15006, 15007), range(9001, 9002)])) };
    assert!(inspector.runs_on(9080) && inspector.runs_on(9002));
    assert!(!inspector.runs_on(15006) && !inspector.runs_on(9001));
    assert!(Inspector::default().runs_on(1));
}
