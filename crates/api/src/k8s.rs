//! Kubernetes kinds, slim: the fields that have an effect here, and those that are accepted.
//!
//! A field that Kubernetes has and these types do not is accepted with a finding "not yet
//! effective" (`crate::known`); a field nobody knows is a mistake.

#![expect(missing_docs, reason = "a field is named and means what the Kubernetes API reference says")]

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde_json::Value;

use types::Labels;

/// Name of the one node of a local mesh.
pub const NODE_NAME: &str = "lateen";

// --- metadata ---

records! {
    /// `metadata` as written.
    pub struct ObjectMeta {
        pub name: String,
        pub generate_name: String,
        pub namespace: String,
        pub labels: Labels,
        pub annotations: BTreeMap<String, String>,
        pub uid: String,
        pub resource_version: String,
        pub generation: u64,
        /// RFC 3339.
        pub creation_timestamp: Option<String>,
        /// RFC 3339; set while the object is going away.
        pub deletion_timestamp: Option<String>,
        pub deletion_grace_period_seconds: Option<u64>,
        pub owner_references: Vec<OwnerReference>,
        pub finalizers: Vec<String>,
        pub managed_fields: Option<Value>,
        pub self_link: Option<String>,
    }

    /// Who made an object.
    pub struct OwnerReference {
        pub api_version: String,
        pub kind: String,
        pub name: String,
        pub uid: String,
        pub controller: bool,
        pub block_owner_deletion: bool,
    }

    /// `{matchLabels, matchExpressions}`
    pub struct Selector {
        pub match_labels: Labels,
        pub match_expressions: Vec<SelectorRequirement>,
    }

    /// One entry of `matchExpressions`.
    pub struct SelectorRequirement {
        pub key: String,
        /// `In`, `NotIn`, `Exists`, `DoesNotExist`
        pub operator: String,
        pub values: Vec<String>,
    }
}

impl Selector {
    /// Whether `labels` meet every pair and expression; an unknown operator meets nothing.
    pub fn matches(&self, labels: &Labels) -> bool {
        let pairs = self.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value));
        pairs
            && self.match_expressions.iter().all(|need| {
                let value = labels.get(&need.key);
                match need.operator.as_str() {
                    "In" => value.is_some_and(|value| need.values.contains(value)),
                    "NotIn" => value.is_none_or(|value| !need.values.contains(value)),
                    "Exists" => value.is_some(),
                    "DoesNotExist" => value.is_none(),
                    _ => false,
                }
            })
    }
}

// --- small kinds ---

records! {
    /// `Namespace`
    pub struct Namespace {
        pub spec: Option<Value>,
        pub status: Option<Value>,
    }

    /// `ServiceAccount`
    pub struct ServiceAccount {
        pub secrets: Option<Value>,
        pub image_pull_secrets: Option<Value>,
        pub automount_service_account_token: Option<bool>,
    }

    /// `ConfigMap`
    pub struct ConfigMap {
        pub data: BTreeMap<String, String>,
        /// Values are base64.
        pub binary_data: BTreeMap<String, Base64>,
        pub immutable: Option<bool>,
    }

    /// `Secret`
    pub struct Secret {
        /// `Opaque`, `kubernetes.io/tls`, …
        #[serde(rename = "type")]
        pub kind: String,
        /// Values are base64. [`Secret::value`] joins it with `string_data`.
        pub data: BTreeMap<String, Base64>,
        pub string_data: BTreeMap<String, String>,
        pub immutable: Option<bool>,
    }
}

impl Secret {
    /// The bytes under `key`; `stringData` wins, as in the API server.
    pub fn value(&self, key: &str) -> Option<&[u8]> {
        match self.string_data.get(key) {
            Some(text) => Some(text.as_bytes()),
            None => self.data.get(key).map(|bytes| &*bytes.0),
        }
    }

    /// The keys of both maps, sorted.
    pub fn keys(&self) -> Vec<&str> {
        let mut keys: Vec<&str> = self.data.keys().chain(self.string_data.keys()).map(String::as_str).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

/// Bytes written as standard base64 (white space allowed).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Base64(pub Vec<u8>);

impl fmt::Debug for Base64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use base64::Engine as _;
        let mut text = String::deserialize(deserializer)?;
        text.retain(|c| !c.is_ascii_whitespace());
        base64::engine::general_purpose::STANDARD.decode(text.as_bytes()).map(Self).map_err(|error| {
            serde::de::Error::custom(format_args!(
                "value is not base64: {error}; plain text goes into `stringData` of a Secret, `data` of a ConfigMap"
            ))
        })
    }
}

// --- Service, EndpointSlice ---

records! {
    /// `Service`
    pub struct Service {
        pub spec: ServiceSpec,
        pub status: Option<Value>,
    }

    /// `spec` of a Service.
    pub struct ServiceSpec {
        pub ports: Vec<ServicePort>,
        pub selector: Labels,
        /// Empty until allocated; `None` (the word) for a headless service.
        #[serde(rename = "clusterIP")]
        pub cluster_ip: String,
        #[serde(rename = "clusterIPs")]
        pub cluster_ips: Vec<String>,
        /// `ClusterIP` (also when empty), `NodePort`, `LoadBalancer`, `ExternalName`
        #[serde(rename = "type")]
        pub kind: String,
        pub external_name: String,
        #[serde(rename = "externalIPs")]
        pub external_ips: Vec<String>,
        pub publish_not_ready_addresses: bool,
        pub session_affinity: String,
        pub session_affinity_config: Option<Value>,
        pub internal_traffic_policy: String,
        pub external_traffic_policy: String,
        pub traffic_distribution: String,
        pub ip_families: Vec<String>,
        pub ip_family_policy: String,
        #[serde(rename = "loadBalancerIP")]
        pub load_balancer_ip: String,
        pub load_balancer_source_ranges: Vec<String>,
        pub load_balancer_class: Option<String>,
        pub allocate_load_balancer_node_ports: Option<bool>,
        pub health_check_node_port: u16,
    }

    /// A port of a Service.
    pub struct ServicePort {
        pub name: String,
        /// `TCP` (also when empty), `UDP`, `SCTP`
        pub protocol: String,
        pub app_protocol: Option<String>,
        pub port: u16,
        /// Absent: same as `port`.
        pub target_port: Option<IntOrString>,
        pub node_port: u16,
    }

    /// `EndpointSlice`
    pub struct EndpointSlice {
        pub address_type: String,
        pub endpoints: Vec<Endpoint>,
        pub ports: Vec<EndpointPort>,
    }

    /// One endpoint of a slice.
    pub struct Endpoint {
        pub addresses: Vec<String>,
        pub conditions: EndpointConditions,
        pub hostname: String,
        pub target_ref: Option<ObjectReference>,
        pub node_name: String,
        pub zone: String,
        pub deprecated_topology: Labels,
        pub hints: Option<Value>,
    }

    /// Absent `ready` and `serving` count as true.
    pub struct EndpointConditions {
        pub ready: Option<bool>,
        pub serving: Option<bool>,
        pub terminating: Option<bool>,
    }

    /// A port of a slice.
    pub struct EndpointPort {
        pub name: String,
        pub protocol: String,
        pub port: u16,
        pub app_protocol: Option<String>,
    }

    /// What an endpoint stands for.
    pub struct ObjectReference {
        pub api_version: String,
        pub kind: String,
        pub namespace: String,
        pub name: String,
        pub uid: String,
        pub resource_version: String,
        pub field_path: String,
    }
}

impl ServiceSpec {
    /// Whether `clusterIP: None`.
    pub fn is_headless(&self) -> bool {
        self.cluster_ip == "None"
    }

    /// Allocated addresses, in order; empty for headless and ExternalName services.
    pub fn addresses(&self) -> Vec<&str> {
        let one = std::iter::once(self.cluster_ip.as_str());
        let mut all: Vec<&str> = one
            .chain(self.cluster_ips.iter().map(String::as_str))
            .filter(|ip| !ip.is_empty() && *ip != "None")
            .collect();
        let mut seen = Vec::new();
        all.retain(|ip| {
            !seen.contains(ip) && {
                seen.push(*ip);
                true
            }
        });
        all
    }
}

/// A port by number or by name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IntOrString {
    Int(u16),
    Name(String),
}

impl<'de> Deserialize<'de> for IntOrString {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl serde::de::Visitor<'_> for V {
            type Value = IntOrString;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port number or name")
            }
            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<IntOrString, E> {
                u16::try_from(value)
                    .map(IntOrString::Int)
                    .map_err(|_| E::custom(format_args!("{value} is not a port (0 to 65535)")))
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<IntOrString, E> {
                u16::try_from(value)
                    .map(IntOrString::Int)
                    .map_err(|_| E::custom(format_args!("{value} is not a port (0 to 65535)")))
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<IntOrString, E> {
                Ok(value.parse().map_or_else(|_| IntOrString::Name(value.to_owned()), IntOrString::Int))
            }
        }
        deserializer.deserialize_any(V)
    }
}

/// A count or a percentage (`25%`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IntOrPercent {
    Int(u32),
    Percent(u32),
}

impl IntOrPercent {
    /// The count for `total`; a percentage rounds up or down as asked.
    pub fn of(self, total: u32, rounding: Rounding) -> u32 {
        match self {
            Self::Int(count) => count,
            Self::Percent(percent) => {
                let scaled = u64::from(total) * u64::from(percent);
                let whole = match rounding {
                    Rounding::Up => scaled.div_ceil(100),
                    Rounding::Down => scaled / 100,
                };
                u32::try_from(whole).unwrap_or(u32::MAX)
            }
        }
    }
}

/// Which way a percentage rounds: `maxSurge` up, `maxUnavailable` down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rounding {
    Up,
    Down,
}

impl<'de> Deserialize<'de> for IntOrPercent {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl serde::de::Visitor<'_> for V {
            type Value = IntOrPercent;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a count or a percentage such as 25%")
            }
            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<IntOrPercent, E> {
                u32::try_from(value).map(IntOrPercent::Int).map_err(|_| E::custom("count is too large"))
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<IntOrPercent, E> {
                u32::try_from(value).map(IntOrPercent::Int).map_err(|_| E::custom("count must not be negative"))
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<IntOrPercent, E> {
                let (digits, make): (&str, fn(u32) -> IntOrPercent) = match value.strip_suffix('%') {
                    Some(digits) => (digits, IntOrPercent::Percent),
                    None => (value, IntOrPercent::Int),
                };
                digits.parse().map(make).map_err(|_| {
                    E::custom(format_args!("{value:?} is neither a count nor a percentage such as \"25%\""))
                })
            }
        }
        deserializer.deserialize_any(V)
    }
}

// --- Deployment, Pod ---

records! {
    /// `Deployment`
    pub struct Deployment {
        pub spec: DeploymentSpec,
        pub status: Option<DeploymentStatus>,
    }

    /// `spec` of a Deployment.
    pub struct DeploymentSpec {
        /// Absent: 1.
        pub replicas: Option<u32>,
        pub selector: Selector,
        pub template: PodTemplateSpec,
        pub strategy: DeploymentStrategy,
        pub min_ready_seconds: u32,
        pub revision_history_limit: Option<u32>,
        pub paused: bool,
        pub progress_deadline_seconds: Option<u32>,
    }

    /// `strategy`
    pub struct DeploymentStrategy {
        /// `RollingUpdate` (also when empty), `Recreate`
        #[serde(rename = "type")]
        pub kind: String,
        pub rolling_update: Option<RollingUpdate>,
    }

    /// Absent values: 25%.
    pub struct RollingUpdate {
        pub max_surge: Option<IntOrPercent>,
        pub max_unavailable: Option<IntOrPercent>,
    }

    /// `status` of a Deployment, as the controller writes it.
    pub struct DeploymentStatus {
        pub observed_generation: u64,
        pub replicas: u32,
        pub updated_replicas: u32,
        pub ready_replicas: u32,
        pub available_replicas: u32,
        pub unavailable_replicas: u32,
        pub terminating_replicas: u32,
        pub collision_count: Option<u32>,
        pub conditions: Vec<StatusCondition>,
    }

    /// A condition in a status.
    pub struct StatusCondition {
        #[serde(rename = "type")]
        pub kind: String,
        /// `True`, `False`, `Unknown`
        pub status: String,
        pub reason: String,
        pub message: String,
        pub last_transition_time: Option<String>,
        pub last_update_time: Option<String>,
        pub last_probe_time: Option<String>,
        pub observed_generation: Option<u64>,
    }

    /// `template`
    pub struct PodTemplateSpec {
        pub metadata: ObjectMeta,
        pub spec: PodSpec,
    }

    /// `Pod`
    pub struct Pod {
        pub spec: PodSpec,
        pub status: PodStatus,
    }

    /// `spec` of a Pod.
    pub struct PodSpec {
        pub containers: Vec<Container>,
        pub init_containers: Vec<Container>,
        pub volumes: Vec<Volume>,
        /// Empty: `default`.
        pub service_account_name: String,
        /// Older name of `service_account_name`.
        pub service_account: String,
        pub automount_service_account_token: Option<bool>,
        /// Absent: 30.
        pub termination_grace_period_seconds: Option<u64>,
        pub hostname: String,
        pub subdomain: String,
        /// `Always` (also when empty), `OnFailure`, `Never`
        pub restart_policy: String,
        pub node_name: String,
        pub host_network: bool,
        pub dns_policy: String,
        pub dns_config: Option<Value>,
        pub host_aliases: Vec<HostAlias>,
        pub security_context: Option<Value>,
        pub image_pull_secrets: Option<Value>,
        pub node_selector: Labels,
        pub affinity: Option<Value>,
        pub tolerations: Option<Value>,
        pub topology_spread_constraints: Option<Value>,
        pub priority_class_name: String,
        pub priority: Option<i64>,
        pub scheduler_name: String,
        pub enable_service_links: Option<bool>,
        pub share_process_namespace: Option<bool>,
        #[serde(rename = "hostPID")]
        pub host_pid: Option<bool>,
        #[serde(rename = "hostIPC")]
        pub host_ipc: Option<bool>,
        pub active_deadline_seconds: Option<u64>,
        pub readiness_gates: Option<Value>,
        pub overhead: Option<Value>,
        pub preemption_policy: String,
        pub runtime_class_name: Option<String>,
    }

    /// Lines for `/etc/hosts`.
    pub struct HostAlias {
        pub ip: String,
        pub hostnames: Vec<String>,
    }

    /// A container.
    pub struct Container {
        pub name: String,
        pub image: String,
        pub image_pull_policy: String,
        pub command: Vec<String>,
        pub args: Vec<String>,
        pub working_dir: String,
        pub env: Vec<EnvVar>,
        pub env_from: Vec<EnvFromSource>,
        pub ports: Vec<ContainerPort>,
        pub readiness_probe: Option<Probe>,
        pub liveness_probe: Option<Probe>,
        pub startup_probe: Option<Probe>,
        pub volume_mounts: Vec<VolumeMount>,
        pub lifecycle: Option<Lifecycle>,
        pub resources: Option<Value>,
        pub security_context: Option<Value>,
        pub stdin: Option<bool>,
        pub stdin_once: Option<bool>,
        pub tty: Option<bool>,
        pub termination_message_path: Option<String>,
        pub termination_message_policy: Option<String>,
        /// `Always` on an init container makes it a sidecar.
        pub restart_policy: String,
        pub resize_policy: Option<Value>,
    }

    /// `lifecycle`
    pub struct Lifecycle {
        pub post_start: Option<LifecycleHandler>,
        pub pre_stop: Option<LifecycleHandler>,
    }

    /// What runs after start or before stop.
    pub struct LifecycleHandler {
        pub exec: Option<ExecAction>,
        pub http_get: Option<HttpGetAction>,
        pub tcp_socket: Option<TcpSocketAction>,
        pub sleep: Option<SleepAction>,
    }

    /// `sleep`
    pub struct SleepAction {
        pub seconds: u64,
    }

    /// A port of a container.
    pub struct ContainerPort {
        pub name: String,
        pub container_port: u16,
        pub protocol: String,
        pub host_port: u16,
        #[serde(rename = "hostIP")]
        pub host_ip: String,
    }

    /// One variable.
    pub struct EnvVar {
        pub name: String,
        pub value: Option<String>,
        pub value_from: Option<EnvVarSource>,
    }

    /// Where a variable's value comes from; exactly one is set.
    pub struct EnvVarSource {
        pub field_ref: Option<ObjectFieldSelector>,
        pub resource_field_ref: Option<Value>,
        pub config_map_key_ref: Option<KeySelector>,
        pub secret_key_ref: Option<KeySelector>,
    }

    /// `fieldRef`
    pub struct ObjectFieldSelector {
        pub api_version: String,
        pub field_path: String,
    }

    /// A key of a ConfigMap or Secret.
    pub struct KeySelector {
        pub name: String,
        pub key: String,
        pub optional: bool,
    }

    /// All keys of a ConfigMap or Secret.
    pub struct EnvFromSource {
        pub prefix: String,
        pub config_map_ref: Option<NameRef>,
        pub secret_ref: Option<NameRef>,
    }

    /// A named object that may be missing.
    pub struct NameRef {
        pub name: String,
        pub optional: bool,
    }

    /// A probe; zero periods and thresholds mean Kubernetes' defaults.
    pub struct Probe {
        pub http_get: Option<HttpGetAction>,
        pub tcp_socket: Option<TcpSocketAction>,
        pub exec: Option<ExecAction>,
        pub grpc: Option<GrpcAction>,
        pub initial_delay_seconds: u32,
        /// 0: 1.
        pub timeout_seconds: u32,
        /// 0: 10.
        pub period_seconds: u32,
        /// 0: 1.
        pub success_threshold: u32,
        /// 0: 3.
        pub failure_threshold: u32,
        pub termination_grace_period_seconds: Option<u64>,
    }

    /// `httpGet`
    pub struct HttpGetAction {
        pub path: String,
        pub port: Option<IntOrString>,
        pub host: String,
        pub scheme: String,
        pub http_headers: Vec<HttpHeader>,
    }

    /// A header of an HTTP probe.
    pub struct HttpHeader {
        pub name: String,
        pub value: String,
    }

    /// `tcpSocket`
    pub struct TcpSocketAction {
        pub port: Option<IntOrString>,
        pub host: String,
    }

    /// `exec`
    pub struct ExecAction {
        pub command: Vec<String>,
    }

    /// `grpc`
    pub struct GrpcAction {
        pub port: u16,
        pub service: String,
    }

    /// Where a volume appears in a container.
    pub struct VolumeMount {
        pub name: String,
        pub mount_path: String,
        pub read_only: bool,
        pub sub_path: String,
        pub sub_path_expr: String,
        pub mount_propagation: Option<String>,
        pub recursive_read_only: Option<String>,
    }

    /// A volume; exactly one source is set.
    pub struct Volume {
        pub name: String,
        pub config_map: Option<ConfigMapVolume>,
        pub secret: Option<SecretVolume>,
        pub empty_dir: Option<EmptyDirVolume>,
        pub projected: Option<ProjectedVolume>,
        #[serde(rename = "downwardAPI")]
        pub downward_api: Option<DownwardApiVolume>,
        pub host_path: Option<Value>,
        pub persistent_volume_claim: Option<Value>,
        pub csi: Option<Value>,
        pub nfs: Option<Value>,
        pub ephemeral: Option<Value>,
        pub image: Option<Value>,
    }

    /// `configMap` of a volume.
    pub struct ConfigMapVolume {
        pub name: String,
        pub items: Vec<KeyToPath>,
        pub default_mode: Option<u32>,
        pub optional: bool,
    }

    /// `secret` of a volume.
    pub struct SecretVolume {
        pub secret_name: String,
        pub items: Vec<KeyToPath>,
        pub default_mode: Option<u32>,
        pub optional: bool,
    }

    /// `emptyDir`
    pub struct EmptyDirVolume {
        /// `Memory` or empty.
        pub medium: String,
        pub size_limit: Option<Value>,
    }

    /// `projected`
    pub struct ProjectedVolume {
        pub sources: Vec<VolumeProjection>,
        pub default_mode: Option<u32>,
    }

    /// One source of a projected volume.
    pub struct VolumeProjection {
        pub config_map: Option<ConfigMapVolume>,
        /// Its name is under `name`.
        pub secret: Option<SecretProjection>,
        #[serde(rename = "downwardAPI")]
        pub downward_api: Option<DownwardApiVolume>,
        pub service_account_token: Option<ServiceAccountTokenProjection>,
    }

    /// `secret` of a projected volume.
    pub struct SecretProjection {
        pub name: String,
        pub items: Vec<KeyToPath>,
        pub optional: bool,
    }

    /// `serviceAccountToken`
    pub struct ServiceAccountTokenProjection {
        pub audience: String,
        pub expiration_seconds: Option<u64>,
        pub path: String,
    }

    /// `downwardAPI`
    pub struct DownwardApiVolume {
        pub items: Vec<DownwardApiFile>,
        pub default_mode: Option<u32>,
    }

    /// One file of the downward API.
    pub struct DownwardApiFile {
        pub path: String,
        pub field_ref: Option<ObjectFieldSelector>,
        pub resource_field_ref: Option<Value>,
        pub mode: Option<u32>,
    }

    /// One key as one file.
    pub struct KeyToPath {
        pub key: String,
        pub path: String,
        pub mode: Option<u32>,
    }

    /// `status` of a Pod, as the node writes it.
    pub struct PodStatus {
        /// `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown`
        pub phase: String,
        #[serde(rename = "podIP")]
        pub pod_ip: String,
        #[serde(rename = "podIPs")]
        pub pod_ips: Vec<PodIp>,
        #[serde(rename = "hostIP")]
        pub host_ip: String,
        #[serde(rename = "hostIPs")]
        pub host_ips: Vec<PodIp>,
        pub conditions: Vec<StatusCondition>,
        pub container_statuses: Vec<ContainerStatus>,
        pub init_container_statuses: Vec<ContainerStatus>,
        pub reason: String,
        pub message: String,
        pub start_time: Option<String>,
        pub qos_class: String,
        pub observed_generation: Option<u64>,
    }

    /// One address of a pod.
    pub struct PodIp {
        pub ip: String,
    }

    /// How a container does.
    pub struct ContainerStatus {
        pub name: String,
        pub ready: bool,
        pub started: Option<bool>,
        pub restart_count: u32,
        pub image: String,
        #[serde(rename = "imageID")]
        pub image_id: String,
        #[serde(rename = "containerID")]
        pub container_id: String,
        pub state: ContainerState,
        pub last_state: ContainerState,
    }

    /// One of three is set.
    pub struct ContainerState {
        pub waiting: Option<ContainerWaiting>,
        pub running: Option<ContainerRunning>,
        pub terminated: Option<ContainerTerminated>,
    }

    /// Not running, will be.
    pub struct ContainerWaiting {
        pub reason: String,
        pub message: String,
    }

    /// Running.
    pub struct ContainerRunning {
        pub started_at: Option<String>,
    }

    /// Ended.
    pub struct ContainerTerminated {
        pub exit_code: i32,
        pub signal: Option<i32>,
        pub reason: String,
        pub message: String,
        pub started_at: Option<String>,
        pub finished_at: Option<String>,
        #[serde(rename = "containerID")]
        pub container_id: String,
    }
}

impl PodSpec {
    /// The pod's service account, by either name; `default` when absent.
    pub fn account(&self) -> &str {
        match (self.service_account_name.as_str(), self.service_account.as_str()) {
            ("", "") => "default",
            ("", older) => older,
            (name, _) => name,
        }
    }
}

impl PodStatus {
    /// Whether the condition `Ready` is `True`.
    pub fn is_ready(&self) -> bool {
        self.conditions.iter().any(|c| c.kind == "Ready" && c.status == "True")
    }
}
