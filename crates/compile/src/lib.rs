//! A snapshot of the mesh and the facts of one proxy, compiled to Envoy's v3 resources.
//!
//! [`compile`] takes a [`mesh::MeshSnapshot`] and a [`View`] and gives [`Resources`]: clusters,
//! endpoints, listeners, routes, secrets, the name table, and findings that only show for this proxy.
//! Names and shapes are Istio's, so that Istio's tools and proxies read them.
//!
//! **Invariants.** Pure: no I/O, clock, randomness, environment. Equal inputs give equal bytes: what
//! prost would write in hash order is written by small maps in order or by messages of our own
//! ([`wire`], `security::wire`). Workload keys never appear: `default` and `ROOTCA` are names that the
//! proxy's own agent answers. Filters of Istio's own build go only to clients that list them
//! ([`Capabilities`] has the table of fallbacks). Nothing refers to a name that is not there, except
//! what Istio leaves dangling on purpose ([`check`] says which).
//!
//! **Where provenance lives.**
//!
//! | thing | where |
//! |---|---|
//! | cluster, route, chain of a TCP or TLS route | `filter_metadata.istio.config` (first object), `filter_metadata.lateen.objects` (all, with fields) |
//! | authorization rule | policy name `ns[…]-policy[…]-rule[…]` |
//! | token provider | provider name `origins-<i>`, issuer |
//! | secret | name `kubernetes://<name>` |
//! | endpoint | `filter_metadata.istio.workload` |
//!
//! Start reading at [`compile`], then `cluster`, `listener`, `route`, `security`.

pub mod check;
mod cluster;
mod context;
mod endpoint;
mod filter;
mod gateway;
mod listener;
mod locality;
mod names;
mod nds;
mod resources;
mod route;
mod secrets;
mod security;
mod telemetry;
mod view;
mod wire;

pub use resources::{Resource, Resources};
pub use view::{Capabilities, Interception, InvalidNode, ProxyKind, View};
pub use wire::NameTable;

use std::collections::BTreeSet;

use context::Context;

/// Compiles everything that one proxy is told.
///
/// *Shape*: each list is in the order of names, but `virtualOutbound` and `virtualInbound` come last;
/// names are unique. Equal inputs give equal bytes.
///
/// *Cost*: proportional to the services that the proxy sees.
pub fn compile(snapshot: &mesh::MeshSnapshot, view: &View) -> Resources {
    let context = Context::new(snapshot, view);
    let mut out = Resources::default();
    (out.clusters, out.endpoints) = cluster::outbound(&context);
    out.clusters.extend(cluster::fixed(&context));
    match view.kind {
        ProxyKind::Sidecar => {
            let outbound = listener::outbound(&context);
            out.listeners = outbound.listeners;
            out.routes = outbound.routes;
            if view.interception != Interception::None {
                out.clusters.extend(cluster::inbound(&context, &security::inbound::ports(&context)));
                out.listeners.push(security::inbound::listener(&context));
            }
            out.name_table = Some(nds::name_table(&context));
        }
        ProxyKind::Router => {
            let compiled = gateway::compile(&context);
            out.listeners = compiled.listeners;
            out.routes = compiled.routes;
        }
    }
    out.secrets = secrets::answers(&context);
    sort_clusters(&mut out);
    out.findings = context.into_findings();
    out
}

/// Compiles the clusters of these services, with their endpoints; of services that the proxy does
/// not see, none.
///
/// Where [`mesh::Reach::clusters_of`] names them and [`mesh::Reach::includes`] does not reach the
/// proxy, these replace those of the same names, and nothing else of what [`compile`] gives differs
/// from before, its findings included.
///
/// *Cost*: proportional to the services named, and to the routes in the mesh.
pub fn clusters_of(snapshot: &mesh::MeshSnapshot, view: &View, services: &BTreeSet<mesh::ServiceKey>) -> Resources {
    let hosts = services.iter().map(|key| &*key.host).collect();
    let context = Context::of_hosts(snapshot, view, &hosts);
    let mut out = Resources::default();
    (out.clusters, out.endpoints) = cluster::outbound(&context);
    sort_clusters(&mut out);
    out
}

fn sort_clusters(of: &mut Resources) {
    of.clusters.sort_by(|a, b| a.name.cmp(&b.name));
    of.endpoints.sort_by(|a, b| a.cluster_name.cmp(&b.cluster_name));
}
