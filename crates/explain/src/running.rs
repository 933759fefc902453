//! What a running proxy says of itself through its admin interface: the configuration it serves
//! with, and what it knows of its hosts from experience.

use std::collections::{BTreeMap, BTreeSet};

use compile::View;
use engine::cluster::Address;
use engine::lower::Raw;
use serde_json::Value;
use thiserror::Error;
use types::wellknown::type_urls;

/// A dump that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum InvalidDump {
    /// Not what `/config_dump?include_eds` says.
    #[error("no config dump: {0}")]
    Form(&'static str),
    /// A message that does not fit.
    #[error("the config dump's {kind} {name:?}: {reason}")]
    Resource {
        /// `listener`, `cluster`, …
        kind: &'static str,
        /// Its name.
        name: String,
        /// What does not fit.
        reason: String,
    },
    /// The node is none of a mesh's.
    #[error("the config dump's node: {0}")]
    Node(String),
}

/// One resource as the proxy serves it.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) raw: Raw,
    /// As in the dump: what is compared.
    pub(crate) json: Value,
    /// Why its newest version was refused.
    pub(crate) refused: Option<String>,
}

/// What a proxy knows of a host.
#[derive(Clone, Debug)]
pub(crate) struct HostState {
    pub(crate) address: Address,
    pub(crate) ejected: bool,
    pub(crate) connections: u32,
    pub(crate) requests: u32,
}

/// What a proxy knows of a cluster.
#[derive(Clone, Debug, Default)]
pub(crate) struct ClusterState {
    pub(crate) hosts: Vec<HostState>,
    pub(crate) pending: u32,
}

/// A running proxy.
///
/// *Source*: Envoy's admin interface: `/config_dump?include_eds`, `/clusters?format=json`, and
/// Lateen's `/lateen/state`.
#[derive(Clone, Debug)]
pub struct Running {
    /// Facts by which the control plane compiles for it; `None` for a proxy of no mesh.
    pub(crate) view: Option<View>,
    pub(crate) resources: BTreeMap<&'static str, BTreeMap<String, Served>>,
    pub(crate) clusters: BTreeMap<String, ClusterState>,
    pub(crate) secrets: BTreeSet<String>,
    /// It takes new connections and means to go on.
    pub(crate) is_live: bool,
}

/// Kind, type, list of the dump, entry's state, resource. Static route tables are those inside of
/// listeners, which come with them.
const LISTS: [(&str, &str, &str, &str, &str); 7] = [
    ("cluster", type_urls::CLUSTER, "static_clusters", "", "cluster"),
    ("cluster", type_urls::CLUSTER, "dynamic_active_clusters", "", "cluster"),
    ("endpoints", type_urls::ENDPOINT, "static_endpoint_configs", "", "endpoint_config"),
    ("endpoints", type_urls::ENDPOINT, "dynamic_endpoint_configs", "", "endpoint_config"),
    ("listener", type_urls::LISTENER, "static_listeners", "", "listener"),
    ("listener", type_urls::LISTENER, "dynamic_listeners", "active_state", "listener"),
    ("route table", type_urls::ROUTE, "dynamic_route_configs", "", "route_config"),
];

impl Running {
    /// Reads `/config_dump?include_eds`, `/clusters?format=json` and `/lateen/state`; of the last
    /// two, what is absent counts as at rest.
    ///
    /// *Errors*: a resource that is no message of its type: then nothing is known for sure.
    pub fn read(dump: &Value, clusters: &Value, state: &Value) -> Result<Self, InvalidDump> {
        let configs = dump["configs"].as_array().ok_or(InvalidDump::Form("there is no `configs` in it"))?;
        let mut read = Self {
            view: None,
            resources: BTreeMap::new(),
            clusters: BTreeMap::new(),
            secrets: BTreeSet::new(),
            is_live: state["live"].as_bool().unwrap_or(true),
        };
        for config in configs {
            read.node(&config["bootstrap"]["node"])?;
            for (kind, url, list, state, field) in LISTS {
                for entry in config[list].as_array().into_iter().flatten() {
                    let json = if state.is_empty() { &entry[field] } else { &entry[state][field] };
                    if !json.is_null() {
                        read.resource(kind, url, json, entry["error_state"]["details"].as_str())?;
                    }
                }
            }
            for list in ["static_secrets", "dynamic_active_secrets"] {
                let names = config[list].as_array().into_iter().flatten().filter_map(|entry| entry["name"].as_str());
                read.secrets.extend(names.map(str::to_owned));
            }
        }
        read.hosts(clusters, state);
        Ok(read)
    }

    fn node(&mut self, json: &Value) -> Result<(), InvalidDump> {
        if !json.is_object() {
            return Ok(());
        }
        let id = json["id"].as_str().unwrap_or_default();
        if !id.contains('~') {
            return Ok(());
        }
        let bytes = proto::json::from_json("envoy.config.core.v3.Node", json.clone()).map_err(InvalidDump::Node)?;
        self.view = Some(View::from_encoded_node(&bytes).map_err(|error| InvalidDump::Node(error.to_string()))?);
        Ok(())
    }

    fn resource(
        &mut self,
        kind: &'static str,
        url: &'static str,
        json: &Value,
        refused: Option<&str>,
    ) -> Result<(), InvalidDump> {
        let field = if url == type_urls::ENDPOINT { "cluster_name" } else { "name" };
        let name = json[field].as_str().unwrap_or_default().to_owned();
        let mut typed = json.clone();
        typed["@type"] = url.into();
        let body = proto::json::any_from_json(typed.clone()).map_err(|reason| InvalidDump::Resource {
            kind,
            name: name.clone(),
            reason,
        })?;
        let raw = Raw { name: name.as_str().into(), body };
        let served = Served { raw, json: typed, refused: refused.map(str::to_owned) };
        self.resources.entry(url).or_default().insert(name, served);
        Ok(())
    }

    fn hosts(&mut self, clusters: &Value, state: &Value) {
        for cluster in clusters["cluster_statuses"].as_array().into_iter().flatten() {
            let Some(name) = cluster["name"].as_str() else { continue };
            let hosts = cluster["host_statuses"].as_array().into_iter().flatten().filter_map(host_state).collect();
            let pending = count(&state["clusters"][name]["pending"]);
            self.clusters.insert(name.to_owned(), ClusterState { hosts, pending });
        }
    }

    /// The resources of a type.
    pub(crate) fn raws(&self, url: &str) -> Vec<Raw> {
        self.resources.get(url).into_iter().flat_map(BTreeMap::values).map(|served| served.raw.clone()).collect()
    }
}

/// Numbers are strings in canonical JSON where they have 64 bits.
fn count(value: &Value) -> u32 {
    let number = value.as_u64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
    number.and_then(|number| u32::try_from(number).ok()).unwrap_or(0)
}

fn host_state(host: &Value) -> Option<HostState> {
    let at = &host["address"]["socket_address"];
    let address = match host["address"]["pipe"]["path"].as_str() {
        Some(path) => Address::Unix(path.into()),
        None => {
            let port = u16::try_from(at["port_value"].as_u64()?).ok()?;
            Address::Ip(std::net::SocketAddr::new(at["address"].as_str()?.parse().ok()?, port))
        }
    };
    let stat = |name: &str| {
        let stats = host["stats"].as_array().into_iter().flatten();
        stats.filter(|stat| stat["name"] == name).map(|stat| count(&stat["value"])).sum()
    };
    Some(HostState {
        address,
        ejected: host["health_status"]["failed_outlier_check"] == true,
        connections: stat("cx_active"),
        requests: stat("rq_active"),
    })
}
