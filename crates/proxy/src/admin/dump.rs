//! `/config_dump`, in Envoy's form. Private keys are never in it.

use base64::Engine as _;
use engine::config::Name;
use envoy_types::pb::google::protobuf::Any;
use prost::Message as _;
use proto::json::to_json;
use serde_json::{Value, json};
use types::wellknown::type_urls;

use super::Context;
use crate::control::Inspection;
use crate::control::lowering::Kept;
use workers::secrets::Secret;

/// The dump as JSON; `resource` is one of its lists (`dynamic_active_clusters`, …).
pub(super) fn config(
    context: &Context,
    inspection: &Inspection,
    eds: bool,
    resource: Option<&str>,
) -> Result<String, String> {
    let mut configs =
        vec![bootstrap(context), clusters(inspection), listeners(inspection), routes(inspection), secrets(context)];
    if eds {
        configs.push(endpoints(inspection));
    }
    if let Some(resource) = resource {
        let found = configs.iter().find_map(|config| config.get(resource));
        let found = found.ok_or_else(|| format!("{resource} is not in the dump\n"))?;
        configs = match found {
            Value::Array(items) => items.clone(),
            other => vec![other.clone()],
        };
    }
    serde_json::to_string_pretty(&json!({ "configs": configs })).map_err(|error| error.to_string())
}

fn kind(name: &str) -> String {
    format!("type.googleapis.com/envoy.admin.v3.{name}")
}

fn time(nanos: u64) -> String {
    let stamp = jiff::Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or_default();
    stamp.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

fn version(inspection: &Inspection, url: &str) -> String {
    let found = inspection.versions.iter().find(|(known, _)| *known == url);
    found.map(|(_, version)| version.clone()).unwrap_or_default()
}

fn bootstrap(context: &Context) -> Value {
    let node =
        Any { type_url: "type.googleapis.com/envoy.config.core.v3.Node".into(), value: context.node.encode_to_vec() };
    let mut node = to_json(&node);
    if let Value::Object(fields) = &mut node {
        fields.remove("@type");
    }
    json!({ "@type": kind("BootstrapConfigDump"), "bootstrap": { "node": node } })
}

fn entry(kept: &Kept, version: &str, field: &str) -> Value {
    let mut entry = json!({ "last_updated": time(kept.updated_nanos) });
    entry["version_info"] = version.into();
    entry[field] = to_json(&kept.body);
    entry
}

fn entries<'a>(
    inspection: &'a Inspection,
    url: &'a str,
    field: &'a str,
) -> impl Iterator<Item = (&'a Name, &'a Kept, Value)> + 'a {
    let version = version(inspection, url);
    inspection.raw.of(url).map(move |(name, kept)| (name, kept, entry(kept, &version, field)))
}

fn failure(kept: &Kept) -> Option<Value> {
    kept.error.as_ref().map(|error| json!({ "details": error, "last_update_attempt": time(kept.updated_nanos) }))
}

/// Without what only those have that came by a version.
fn fixed(mut entry: Value) -> Value {
    if let Value::Object(fields) = &mut entry {
        fields.remove("version_info");
    }
    entry
}

fn with_failure((_, kept, mut entry): (&Name, &Kept, Value)) -> Value {
    if let Some(error) = failure(kept) {
        entry["error_state"] = error;
    }
    entry
}

fn clusters(inspection: &Inspection) -> Value {
    let (mut fixed_ones, mut active, mut warming) = (Vec::new(), Vec::new(), Vec::new());
    let version = version(inspection, type_urls::CLUSTER);
    for (name, kept, newest) in entries(inspection, type_urls::CLUSTER, "cluster") {
        let newest = with_failure((name, kept, newest));
        let serves = inspection.config.clusters.get(name).is_some();
        match inspection.raw.replaced(type_urls::CLUSTER, name) {
            _ if kept.is_static => fixed_ones.push(fixed(newest)),
            Some(serving) if serves => {
                active.push(entry(serving, &version, "cluster"));
                warming.push(newest);
            }
            None if serves => active.push(newest),
            _ => warming.push(newest),
        }
    }
    json!({
        "@type": kind("ClustersConfigDump"), "version_info": version, "static_clusters": fixed_ones,
        "dynamic_active_clusters": active, "dynamic_warming_clusters": warming,
    })
}

fn listeners(inspection: &Inspection) -> Value {
    let (mut fixed_ones, mut list) = (Vec::new(), Vec::new());
    let version = version(inspection, type_urls::LISTENER);
    for (name, kept, newest) in entries(inspection, type_urls::LISTENER, "listener") {
        if kept.is_static {
            fixed_ones.push(fixed(newest));
            continue;
        }
        let serves = inspection.config.listeners.get(name).is_some();
        let mut listener = json!({ "name": &**name });
        match inspection.raw.replaced(type_urls::LISTENER, name) {
            Some(serving) if serves => {
                listener["active_state"] = entry(serving, &version, "listener");
                listener["warming_state"] = newest;
            }
            None if serves => listener["active_state"] = newest,
            _ => listener["warming_state"] = newest,
        }
        if let Some(error) = failure(kept) {
            listener["error_state"] = error;
        }
        list.push(listener);
    }
    json!({
        "@type": kind("ListenersConfigDump"), "version_info": version,
        "static_listeners": fixed_ones, "dynamic_listeners": list,
    })
}

fn routes(inspection: &Inspection) -> Value {
    let list: Vec<Value> = entries(inspection, type_urls::ROUTE, "route_config").map(with_failure).collect();
    // Those written into a listener are what Envoy calls static, wherever the listener came from.
    let mut inline = Vec::new();
    for (_, _, entry) in entries(inspection, type_urls::LISTENER, "listener") {
        inline_routes(&entry["listener"], &entry["last_updated"], &mut inline);
    }
    json!({ "@type": kind("RoutesConfigDump"), "static_route_configs": inline, "dynamic_route_configs": list })
}

/// Route tables inside of connection managers.
fn inline_routes(value: &Value, updated: &Value, into: &mut Vec<Value>) {
    match value {
        Value::Object(fields) => {
            let is_manager = fields
                .get("@type")
                .and_then(Value::as_str)
                .is_some_and(|kind| kind.ends_with(".HttpConnectionManager"));
            if is_manager {
                if let Some(routes) = fields.get("route_config") {
                    let mut routes = routes.clone();
                    routes["@type"] = type_urls::ROUTE.into();
                    into.push(json!({ "route_config": routes, "last_updated": updated }));
                }
                return;
            }
            fields.values().for_each(|value| inline_routes(value, updated, into));
        }
        Value::Array(items) => items.iter().for_each(|item| inline_routes(item, updated, into)),
        _ => {}
    }
}

fn endpoints(inspection: &Inspection) -> Value {
    let list: Vec<Value> = entries(inspection, type_urls::ENDPOINT, "endpoint_config").map(with_failure).collect();
    json!({ "@type": kind("EndpointsConfigDump"), "dynamic_endpoint_configs": list })
}

fn secrets(context: &Context) -> Value {
    let store = context.shared.secrets.load();
    let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let list: Vec<Value> = store
        .sorted()
        .into_iter()
        .map(|(name, secret)| {
            let mut message = json!({ "@type": type_urls::SECRET, "name": &**name });
            match secret {
                Secret::Certificate(keys) => {
                    let chain: String = keys.chain().iter().map(identity::pem::encode).collect();
                    message["tls_certificate"] = json!({
                        "certificate_chain": { "inline_bytes": base64(chain.as_bytes()) },
                        "private_key": { "inline_bytes": base64(b"[redacted]") },
                    });
                }
                Secret::Roots(trust) => {
                    message["validation_context"] =
                        json!({ "trusted_ca": { "inline_bytes": base64(trust.roots.to_pem().as_bytes()) } });
                }
            }
            json!({ "name": &**name, "secret": message })
        })
        .collect();
    json!({ "@type": kind("SecretsConfigDump"), "dynamic_active_secrets": list })
}
