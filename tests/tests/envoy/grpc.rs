//! gRPC where an Envoy is at one end of the mutual TLS at least: between sidecars of either kind, both
//! ways, and through gateways of either kind.

use testkit::{Client2, Mesh, grpc};

use crate::mesh::{PODS, object, turn, with};

const PORT: u16 = 7070;

/// Asks over every way: a client of its own for each.
fn over_every_way(check: fn(&str, &Client2, &str)) {
    let mesh = turn();
    for from in PODS {
        for to in PODS.into_iter().filter(|to| *to != from) {
            let client = dial(&mesh, &format!("foo/{from}"), to);
            check(&format!("{from} to {to}"), &client, &format!("{to}:{PORT}"));
        }
    }
    // From outside: the gateway's server is a sidecar of the other kind.
    for (gateway, to) in [("delta", "lateen"), ("world", "lateen"), ("lateen", "delta"), ("lateen", "world")] {
        let spec = format!(
            "{{hosts: [grpc.foo.test], gateways: [gateway], http: [{{route: [{{destination: {{host: {to}, port: {{number: {PORT}}}}}}}]}}]}}"
        );
        let _route = with(&mesh, &object("networking.istio.io", "VirtualService", "grpc", &spec));
        let client =
            Client2::over(mesh.dial("legacy/curl", &format!("gateway-{gateway}.istio-system"), 80)).expect("a pod");
        check(&format!("gateway {gateway} to {to}"), &client, "grpc.foo.test");
    }
}

fn dial(mesh: &Mesh, from: &str, to: &str) -> Client2 {
    Client2::over(mesh.dial(from, to, PORT)).unwrap_or_else(|error| panic!("{from} to {to}: {error}"))
}

#[test]
fn unary_calls_pass_envoys_with_their_trailers() {
    over_every_way(grpc::unary);
}

#[test]
fn client_streams_pass_envoys_message_by_message() {
    over_every_way(grpc::client_stream);
}

#[test]
fn server_streams_pass_envoys_message_by_message() {
    over_every_way(grpc::server_stream);
}

#[test]
fn both_streams_are_open_at_once_through_envoys() {
    over_every_way(grpc::both_streams);
}

#[test]
fn a_call_cancelled_behind_an_envoy_is_cancelled_at_the_server() {
    over_every_way(grpc::cancellation);
}
