//! What one proxy is told.

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use types::Finding;
use types::wellknown::type_urls;

use crate::wire::NameTable;

/// Everything that one proxy is told, typed.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Resources {
    /// By name.
    pub clusters: Vec<Cluster>,
    /// Endpoints of EDS clusters, by cluster.
    pub endpoints: Vec<ClusterLoadAssignment>,
    /// By name; `virtualOutbound` and `virtualInbound` last.
    pub listeners: Vec<Listener>,
    /// Tables that listeners name, by name.
    pub routes: Vec<RouteConfiguration>,
    /// Secrets that come over the stream, by name; only those that exist. Never workload keys.
    pub secrets: Vec<Secret>,
    /// For proxies that answer DNS; none for routers.
    pub name_table: Option<NameTable>,
    /// What does not work as written, as this proxy sees it.
    pub findings: Vec<Finding>,
}

/// One resource, packed.
#[derive(Clone, PartialEq, Debug)]
pub struct Resource {
    /// Its type.
    pub type_url: &'static str,
    /// Its name; empty for the name table.
    pub name: String,
    /// The message.
    pub any: Any,
}

impl Resources {
    /// All resources packed, by type in the order of a push, then as listed.
    pub fn packed(&self) -> Vec<Resource> {
        fn pack<'a, M: Message + Name + 'a>(
            type_url: &'static str,
            of: &'a [M],
            name: impl Fn(&'a M) -> &'a str + 'a,
        ) -> impl Iterator<Item = Resource> + 'a {
            of.iter().map(move |message| Resource {
                type_url,
                name: name(message).to_owned(),
                any: Any { type_url: type_url.to_owned(), value: message.encode_to_vec() },
            })
        }
        let table = self.name_table.iter().map(|table| Resource {
            type_url: type_urls::NAME_TABLE,
            name: String::new(),
            any: table.pack(),
        });
        pack(type_urls::CLUSTER, &self.clusters, |of| &of.name)
            .chain(pack(type_urls::ENDPOINT, &self.endpoints, |of| &of.cluster_name))
            .chain(pack(type_urls::LISTENER, &self.listeners, |of| &of.name))
            .chain(pack(type_urls::ROUTE, &self.routes, |of| &of.name))
            .chain(pack(type_urls::SECRET, &self.secrets, |of| &of.name))
            .chain(table)
            .collect()
    }
}
