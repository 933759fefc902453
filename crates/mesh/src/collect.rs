//! Objects of a [`api::ConfigSet`] sorted by what they are for.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::{
    ConfigSet, MeshConfig, Metadata, Typed, k8s, networking as net, operator::IstioOperator, security, telemetry,
};
use types::{Finding, Severity};

use crate::config::Config;
use crate::snapshot::Namespace;

pub(crate) struct Collected<'a> {
    pub(crate) mesh_config: MeshConfig,
    pub(crate) namespaces: BTreeMap<Box<str>, Namespace>,
    pub(crate) pods: Vec<(&'a Metadata, &'a Arc<k8s::Pod>)>,
    pub(crate) services: Vec<Config<k8s::Service>>,
    pub(crate) slices: Vec<Config<k8s::EndpointSlice>>,
    pub(crate) secrets: Vec<Config<k8s::Secret>>,
    pub(crate) config_maps: Vec<Config<k8s::ConfigMap>>,
    pub(crate) service_entries: Vec<Config<net::ServiceEntry>>,
    pub(crate) workload_entries: Vec<Config<net::WorkloadEntry>>,
    pub(crate) virtual_services: Vec<Config<net::VirtualService>>,
    pub(crate) destination_rules: Vec<Config<net::DestinationRule>>,
    pub(crate) gateways: Vec<Config<net::Gateway>>,
    pub(crate) sidecars: Vec<Config<net::Sidecar>>,
    pub(crate) peer_authentications: Vec<Config<security::PeerAuthentication>>,
    pub(crate) request_authentications: Vec<Config<security::RequestAuthentication>>,
    pub(crate) authorization_policies: Vec<Config<security::AuthorizationPolicy>>,
    pub(crate) telemetries: Vec<Config<telemetry::Telemetry>>,
}

fn all<T: Typed>(configs: &ConfigSet) -> Vec<Config<T>> {
    configs
        .all::<T>()
        .filter(|(object, _)| !object.meta.deleted)
        .map(|(object, spec)| Config::new(&object.meta, object.kind.name(), spec))
        .collect()
}

/// `meshConfig` as an installed Istio keeps it: YAML under `mesh` of the ConfigMap `istio`.
fn of_config_map(configs: &ConfigSet, findings: &mut Vec<Finding>) -> Option<MeshConfig> {
    let (object, map) = configs.get::<k8s::ConfigMap>(types::wellknown::DEFAULT_ROOT_NAMESPACE, "istio")?;
    let text = map.data.get("mesh")?;
    let mut bad = |message: String| {
        findings.push(Finding {
            code: "LAT0231".into(),
            severity: Severity::Error,
            object: Some(object.reference()),
            field: "data.mesh".into(),
            position: None,
            message: message.into(),
            hint: "write meshConfig as YAML".into(),
        });
    };
    let node = match api::yaml::read(text, api::yaml::Limits::default()).into_iter().next()? {
        Ok(node) => node,
        Err(invalid) => {
            bad(format!("line {}: {}", invalid.line, invalid.message));
            return None;
        }
    };
    // Decoded and checked as the same section of an IstioOperator.
    let operator = serde_json::json!({
        "apiVersion": "install.istio.io/v1alpha1",
        "kind": "IstioOperator",
        "metadata": {"name": "istio", "namespace": types::wellknown::DEFAULT_ROOT_NAMESPACE},
        "spec": {"meshConfig": node.to_json()},
    });
    let (read, said) = api::from_json(&operator);
    for finding in said {
        bad(format!("{}: {}", finding.field, finding.message));
    }
    read?.typed::<IstioOperator>()?.mesh_config.clone()
}

impl<'a> Collected<'a> {
    pub(crate) fn of(configs: &'a ConfigSet, findings: &mut Vec<Finding>) -> Self {
        let mesh_config = match configs.mesh_config() {
            None => of_config_map(configs, findings).unwrap_or_default(),
            Some((winner, config)) => {
                let others = configs.all::<IstioOperator>().filter(|(object, operator)| {
                    operator.mesh_config.is_some() && object.reference() != winner.reference()
                });
                findings.extend(others.map(|(object, _)| {
                    Finding {
                        code: "LAT0230".into(),
                        severity: Severity::Warning,
                        object: Some(object.reference()),
                        field: "spec.meshConfig".into(),
                        position: None,
                        message: format!(
                            "{} is older and its meshConfig holds, so this one changes nothing",
                            winner.reference()
                        )
                        .into(),
                        hint: "keep meshConfig in one IstioOperator".into(),
                    }
                }));
                config.clone()
            }
        };
        let namespaces = configs
            .all::<k8s::Namespace>()
            .map(|(object, _)| {
                let facts =
                    Namespace { labels: object.meta.labels.clone(), annotations: object.meta.annotations.clone() };
                (object.meta.name.clone(), facts)
            })
            .collect();
        Self {
            mesh_config,
            namespaces,
            pods: configs.all::<k8s::Pod>().filter(|(o, _)| !o.meta.deleted).map(|(o, pod)| (&o.meta, pod)).collect(),
            services: all(configs),
            slices: all(configs),
            secrets: all(configs),
            config_maps: all(configs),
            service_entries: all(configs),
            workload_entries: all(configs),
            virtual_services: all(configs),
            destination_rules: all(configs),
            gateways: all(configs),
            sidecars: all(configs),
            peer_authentications: all(configs),
            request_authentications: all(configs),
            authorization_policies: all(configs),
            telemetries: all(configs),
        }
    }
}
