//! Metadata and the Kubernetes kinds.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use types::{Labels, Severity};

use super::virtual_service::labels;
use super::{Check, rules};
use crate::codes;
use crate::k8s::{
    ConfigMap, Container, Deployment, DownwardApiVolume, EndpointSlice, EnvVar, ExecAction, HttpGetAction, IntOrString,
    KeyToPath, LifecycleHandler, NODE_NAME, PodSpec, Probe, Secret, Service, ServiceAccount, ServiceSpec,
    TcpSocketAction, Volume,
};
use crate::kind::{Kind, Support};

/// Whether an object of the kind may have this name.
pub(super) fn is_name(kind: Kind, name: &str) -> bool {
    match kind {
        Kind::Namespace => rules::is_dns_label(name),
        Kind::Service => rules::is_dns_label(name) && !name.starts_with(|c: char| c.is_ascii_digit()),
        // Names of RBAC objects are paths.
        _ if kind.info().group == "rbac.authorization.k8s.io" => !name.contains('/'),
        _ => rules::is_dns_subdomain(name),
    }
}

pub(super) fn metadata(check: &mut Check<'_>) {
    let object = check.object;
    let name = &*object.meta.name;
    if !is_name(object.kind, name) {
        let hint = "use lower-case letters, digits and `-`, beginning and ending with a letter or digit";
        check.error("metadata.name", format!("{name:?} is not a name of a {}", object.kind), hint);
    }
    if object.kind.is_namespaced() && !rules::is_dns_label(&object.meta.namespace) {
        check.error(
            "metadata.namespace",
            format!("{:?} is not a namespace", object.meta.namespace),
            "use at most 63 lower-case letters, digits and `-`",
        );
    }
    labels(check, "metadata.labels", &object.meta.labels);
    for key in object.meta.annotations.keys() {
        if !rules::is_label_key(key) {
            check.error(
                "metadata.annotations",
                format!("{key:?} is not an annotation's key"),
                "write `name` or `domain/name` with letters, digits, `-`, `_`, `.`",
            );
        }
    }
    if object.kind.info().support == Support::Recognised {
        return;
    }
    let finalizers = &object.raw["metadata"]["finalizers"];
    check.idle_if(holds_something(Some(finalizers)), "metadata.finalizers", "an object goes when it is deleted");
    injection(check, "metadata", &object.meta.labels, &object.meta.annotations);
}

/// *Source*: Istio, "Installing the Sidecar": any other word than the two is warned about and counts as unset.
fn injection(check: &mut Check<'_>, at: &str, labels: &Labels, annotations: &BTreeMap<String, String>) {
    use types::wellknown;
    for (list, value) in [
        ("labels", labels.get(wellknown::labels::INJECT)),
        ("annotations", annotations.get(wellknown::annotations::INJECT)),
    ] {
        let Some(value) = value.filter(|value| !matches!(value.as_str(), "true" | "false")) else { continue };
        let message = format!("sidecar.istio.io/inject is {value:?} and counts as unset");
        check.warn(&format!("{at}.{list}"), message, "write \"true\" or \"false\"");
    }
}

pub(super) fn service(check: &mut Check<'_>, service: &Service) {
    let spec = &service.spec;
    match spec.kind.as_str() {
        "" | "ClusterIP" => {}
        "NodePort" | "LoadBalancer" => check.add(
            codes::NOT_EFFECTIVE,
            Severity::Info,
            "spec.type",
            format!("type {} acts as ClusterIP here", spec.kind),
            "lead traffic into the mesh through a gateway",
        ),
        "ExternalName" => {
            rules::host(check, "spec.externalName", &spec.external_name);
        }
        other => check.error("spec.type", format!("{other:?} is not a type of service"), "use ClusterIP"),
    }
    if spec.ports.is_empty() && !spec.is_headless() && spec.kind != "ExternalName" {
        check.error("spec.ports", "at least one port is needed", "list a port, such as {name: http, port: 80}");
    }
    if !spec.cluster_ip.is_empty() && !spec.is_headless() && spec.cluster_ip.parse::<std::net::IpAddr>().is_err() {
        check.error("spec.clusterIP", format!("{:?} is neither an address nor None", spec.cluster_ip), "leave it out");
    }
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in spec.ports.iter().enumerate() {
        let at = format!("spec.ports[{index}]");
        rules::port_number(check, &format!("{at}.port"), port.port);
        if spec.ports.len() > 1 && port.name.is_empty() {
            check.error(&format!("{at}.name"), "ports need names when there are several", "name each, such as `http`");
        }
        if !port.name.is_empty() && !rules::is_dns_label(&port.name) {
            check.error(
                &format!("{at}.name"),
                format!("{:?} is not the name of a port", port.name),
                "use lower-case letters, digits and `-`",
            );
        }
        if !port.name.is_empty() && !names.insert(&port.name) {
            check.error(
                &format!("{at}.name"),
                format!("port name {:?} is used twice", port.name),
                "rename one of the two",
            );
        }
        if !numbers.insert((port.port, protocol(&port.protocol))) {
            check.error(
                &format!("{at}.port"),
                format!("port {} is listed twice", port.port),
                "remove or renumber one of the two",
            );
        }
        if !matches!(protocol(&port.protocol), "TCP" | "UDP" | "SCTP") {
            check.error(
                &format!("{at}.protocol"),
                format!("{:?} is not TCP, UDP or SCTP", port.protocol),
                "the protocol above goes into appProtocol",
            );
        }
        if port.target_port == Some(IntOrString::Int(0)) {
            check.error(&format!("{at}.targetPort"), "port must be between 1 and 65535", "write the number of a port");
        }
    }
    labels(check, "spec.selector", &spec.selector);
    without_effect_on_a_service(check, spec);
}

fn without_effect_on_a_service(check: &mut Check<'_>, spec: &ServiceSpec) {
    match spec.session_affinity.as_str() {
        "" | "None" => {}
        "ClientIP" => check.add(
            codes::NOT_EFFECTIVE,
            Severity::Warning,
            "spec.sessionAffinity",
            "sessionAffinity is not yet effective",
            "pods with a proxy: consistentHash: {useSourceIp: true} in a DestinationRule",
        ),
        other => {
            let message = format!("{other:?} is neither None nor ClientIP");
            check.error("spec.sessionAffinity", message, "leave it out");
        }
    }
    check.unbuilt_if(spec.session_affinity_config.is_some(), "spec.sessionAffinityConfig");
    check.unbuilt_if(!spec.external_ips.is_empty(), "spec.externalIPs");
    check.unbuilt_if(spec.ip_families.iter().any(|family| family != "IPv4"), "spec.ipFamilies");
    check.unbuilt_if(!matches!(spec.ip_family_policy.as_str(), "" | "SingleStack"), "spec.ipFamilyPolicy");
    let far = "all pods run on this machine";
    check.idle_if(spec.external_traffic_policy == "Local", "spec.externalTrafficPolicy", far);
    let alone = "no load balancer stands before the mesh";
    check.idle_if(!spec.load_balancer_ip.is_empty(), "spec.loadBalancerIP", alone);
    check.idle_if(!spec.load_balancer_source_ranges.is_empty(), "spec.loadBalancerSourceRanges", alone);
    check.idle_if(spec.load_balancer_class.is_some(), "spec.loadBalancerClass", alone);
    check.idle_if(spec.allocate_load_balancer_node_ports.is_some(), "spec.allocateLoadBalancerNodePorts", alone);
    check.idle_if(spec.health_check_node_port != 0, "spec.healthCheckNodePort", alone);
    for (index, port) in spec.ports.iter().enumerate() {
        let why = "no port of the machine leads to a service";
        check.idle_if(port.node_port != 0, format!("spec.ports[{index}].nodePort"), why);
    }
}

fn protocol(text: &str) -> &str {
    if text.is_empty() { "TCP" } else { text }
}

pub(super) fn deployment(check: &mut Check<'_>, deployment: &Deployment) {
    let spec = &deployment.spec;
    if spec.selector.match_labels.is_empty() && spec.selector.match_expressions.is_empty() {
        check.error("spec.selector", "selector is needed", "repeat the labels of the template under matchLabels");
    } else if !spec.selector.matches(&spec.template.metadata.labels) {
        let hint = "give the template the labels of the selector";
        check.error("spec.template.metadata.labels", "the template's labels do not match the selector", hint);
    }
    for (index, need) in spec.selector.match_expressions.iter().enumerate() {
        let at = format!("spec.selector.matchExpressions[{index}]");
        match (need.operator.as_str(), need.values.is_empty()) {
            ("In" | "NotIn", false) | ("Exists" | "DoesNotExist", true) => {}
            ("In" | "NotIn", true) => check.error(&at, "values are needed", "list values, or use Exists"),
            ("Exists" | "DoesNotExist", false) => check.error(&at, "values are not allowed", "remove them, or use In"),
            (other, _) => {
                check.error(&at, format!("{other:?} is not an operator"), "use In, NotIn, Exists or DoesNotExist");
            }
        }
    }
    match spec.strategy.kind.as_str() {
        "" | "RollingUpdate" => {}
        "Recreate" if spec.strategy.rolling_update.is_some() => {
            check.error(
                "spec.strategy.rollingUpdate",
                "Recreate takes no rollingUpdate",
                "remove it, or use RollingUpdate",
            );
        }
        "Recreate" => {}
        other => check.error(
            "spec.strategy.type",
            format!("{other:?} is neither RollingUpdate nor Recreate"),
            "use RollingUpdate or Recreate",
        ),
    }
    let meta = &spec.template.metadata;
    labels(check, "spec.template.metadata.labels", &meta.labels);
    injection(check, "spec.template.metadata", &meta.labels, &meta.annotations);
    proxy_config(check, "spec.template.metadata.annotations", &spec.template.metadata.annotations);
    pod(check, &spec.template.spec, "spec.template.spec");
    if !matches!(spec.template.spec.restart_policy.as_str(), "" | "Always") {
        check.error(
            "spec.template.spec.restartPolicy",
            "a Deployment needs restartPolicy Always",
            "leave it out, or run a Pod of its own",
        );
    }
    // What Kubernetes fills in says nothing.
    let is_set = |value: Option<u32>, default: u32| value.is_some_and(|value| value != default);
    check.unbuilt_if(is_set(spec.progress_deadline_seconds, 600), "spec.progressDeadlineSeconds");
    let why = "there are no earlier templates to go back to";
    check.idle_if(is_set(spec.revision_history_limit, 10), "spec.revisionHistoryLimit", why);
}

/// The annotation that sets up a pod's own proxy.
pub(super) fn proxy_config(check: &mut Check<'_>, at: &str, annotations: &BTreeMap<String, String>) {
    let name = types::wellknown::annotations::PROXY_CONFIG;
    let Some(text) = annotations.get(name) else { return };
    let why = match serde_saphyr::from_str(text) {
        Ok(fields @ Value::Object(_)) => {
            let server = fields.pointer("/proxyHeaders/server/value").and_then(Value::as_str);
            if server.is_none_or(rules::is_header_value) {
                return;
            }
            "proxyHeaders.server.value holds a control character".to_owned()
        }
        Ok(_) => "it is not a mapping".to_owned(),
        Err(error) => error.to_string(),
    };
    check.error(&format!("{at}.{name}"), why, "write the fields of meshConfig.defaultConfig as YAML");
}

pub(super) fn pod(check: &mut Check<'_>, spec: &PodSpec, at: &str) {
    if spec.containers.is_empty() {
        check.error(
            &format!("{at}.containers"),
            "at least one container is needed",
            "list a container with name and image",
        );
    }
    if !matches!(spec.restart_policy.as_str(), "" | "Always" | "OnFailure" | "Never") {
        check.error(
            &format!("{at}.restartPolicy"),
            format!("{:?} is not Always, OnFailure or Never", spec.restart_policy),
            "use Always, OnFailure or Never",
        );
    }
    let mut volumes = BTreeSet::new();
    for (index, volume) in spec.volumes.iter().enumerate() {
        let at = format!("{at}.volumes[{index}]");
        if !rules::is_dns_label(&volume.name) {
            check.error(
                &format!("{at}.name"),
                format!("{:?} is not the name of a volume", volume.name),
                "use lower-case letters, digits and `-`",
            );
        }
        if !volumes.insert(volume.name.as_str()) {
            check.error(
                &format!("{at}.name"),
                format!("volume {:?} is defined twice", volume.name),
                "rename one of the two",
            );
        }
        self::volume(check, &at, volume);
    }
    let mut names = BTreeSet::new();
    for (list, containers) in [("initContainers", &spec.init_containers), ("containers", &spec.containers)] {
        for (index, container) in containers.iter().enumerate() {
            let at = format!("{at}.{list}[{index}]");
            if !rules::is_dns_label(&container.name) {
                check.error(
                    &format!("{at}.name"),
                    format!("{:?} is not the name of a container", container.name),
                    "use lower-case letters, digits and `-`",
                );
            }
            if !names.insert(container.name.as_str()) {
                check.error(
                    &format!("{at}.name"),
                    format!("container {:?} is defined twice", container.name),
                    "rename one of the two",
                );
            }
            self::container(check, &at, container, &volumes);
            let restarts = container.restart_policy.as_str();
            let is_built = restarts.is_empty() || (list == "initContainers" && restarts == "Always");
            check.unbuilt_if(!is_built, format!("{at}.restartPolicy"));
        }
    }
    for (index, alias) in spec.host_aliases.iter().enumerate() {
        if alias.ip.parse::<std::net::IpAddr>().is_err() {
            check.error(
                &format!("{at}.hostAliases[{index}].ip"),
                format!("{:?} is not an address", alias.ip),
                "write an IP address",
            );
        }
    }
    if !matches!(spec.dns_policy.as_str(), "" | "ClusterFirst" | "ClusterFirstWithHostNet" | "Default" | "None") {
        check.error(
            &format!("{at}.dnsPolicy"),
            format!("{:?} is not a policy of DNS", spec.dns_policy),
            "use ClusterFirst, Default or None",
        );
    }
    without_effect_on_a_pod(check, spec, at);
}

fn without_effect_on_a_pod(check: &mut Check<'_>, spec: &PodSpec, at: &str) {
    security_context(check, &format!("{at}.securityContext"), spec.security_context.as_ref(), Severity::Warning);
    for (name, is_set) in [
        ("hostNetwork", spec.host_network),
        ("hostPID", spec.host_pid == Some(true)),
        ("hostIPC", spec.host_ipc == Some(true)),
        ("shareProcessNamespace", spec.share_process_namespace == Some(true)),
        ("dnsConfig", spec.dns_config.is_some()),
        ("enableServiceLinks", spec.enable_service_links == Some(true)),
        ("activeDeadlineSeconds", spec.active_deadline_seconds.is_some()),
        ("readinessGates", holds_something(spec.readiness_gates.as_ref())),
    ] {
        check.unbuilt_if(is_set, format!("{at}.{name}"));
    }
    for (name, is_set) in [
        ("nodeName", !matches!(spec.node_name.as_str(), "" | NODE_NAME)),
        ("nodeSelector", !spec.node_selector.is_empty()),
        ("affinity", holds_something(spec.affinity.as_ref())),
        ("tolerations", holds_something(spec.tolerations.as_ref())),
        ("topologySpreadConstraints", holds_something(spec.topology_spread_constraints.as_ref())),
        ("schedulerName", !matches!(spec.scheduler_name.as_str(), "" | "default-scheduler")),
        ("priorityClassName", !spec.priority_class_name.is_empty()),
        ("priority", spec.priority.is_some_and(|priority| priority != 0)),
        ("preemptionPolicy", !matches!(spec.preemption_policy.as_str(), "" | "PreemptLowerPriority")),
        ("runtimeClassName", spec.runtime_class_name.is_some()),
        ("overhead", holds_something(spec.overhead.as_ref())),
    ] {
        check.idle_if(is_set, format!("{at}.{name}"), "all pods run on this machine");
    }
    let why = "no image is pulled";
    check.idle_if(holds_something(spec.image_pull_secrets.as_ref()), format!("{at}.imagePullSecrets"), why);
}

/// What is empty asks for nothing.
fn holds_something(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Object(fields)) => !fields.is_empty(),
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    }
}

/// What a `securityContext` asks for and does not get.
///
/// Programs run as the user who runs the mesh, without capabilities, and may use low ports.
fn security_context(check: &mut Check<'_>, at: &str, context: Option<&Value>, severity: Severity) {
    let Some(Value::Object(fields)) = context else { return };
    let all = |value: &Value, name: Option<&str>, done: &str| {
        let of = |entry: &Value| name.map_or(entry, |name| &entry[name]) == done;
        value.as_array().is_none_or(|entries| entries.iter().all(of))
    };
    let is_done = |name: &str, value: &Value| match name {
        "privileged" | "readOnlyRootFilesystem" | "runAsNonRoot" => *value == false,
        // Nobody's capabilities can grow, and true is what holds without the field.
        "allowPrivilegeEscalation" => true,
        "capabilities" => all(&value["add"], None, "NET_BIND_SERVICE"),
        "sysctls" => all(value, Some("name"), "net.ipv4.ip_unprivileged_port_start"),
        "procMount" => *value == "Default",
        _ => !holds_something(Some(value)),
    };
    let missing: Vec<&str> =
        fields.iter().filter(|(name, value)| !is_done(name, value)).map(|(name, _)| name.as_str()).collect();
    if missing.is_empty() {
        return;
    }
    let message = format!("not yet effective: {}", missing.join(", "));
    let hint = "programs run as the user who runs the mesh, without capabilities";
    check.add(codes::NOT_EFFECTIVE, severity, at, message, hint);
}

pub(super) fn service_account(check: &mut Check<'_>, account: &ServiceAccount) {
    if account.automount_service_account_token == Some(false) {
        let message = "automountServiceAccountToken is not yet effective in a ServiceAccount";
        let hint = "set it in the pod's spec";
        check.add(codes::NOT_EFFECTIVE, Severity::Warning, "automountServiceAccountToken", message, hint);
    }
    check.idle_if(holds_something(account.secrets.as_ref()), "secrets", "a pod's token is minted for it alone");
    check.idle_if(holds_something(account.image_pull_secrets.as_ref()), "imagePullSecrets", "no image is pulled");
}

fn volume(check: &mut Check<'_>, at: &str, volume: &Volume) {
    let sources = [
        ("configMap", volume.config_map.is_some(), true),
        ("secret", volume.secret.is_some(), true),
        ("emptyDir", volume.empty_dir.is_some(), true),
        ("projected", volume.projected.is_some(), true),
        ("downwardAPI", volume.downward_api.is_some(), true),
        ("hostPath", volume.host_path.is_some(), true),
        ("persistentVolumeClaim", volume.persistent_volume_claim.is_some(), false),
        ("csi", volume.csi.is_some(), false),
        ("nfs", volume.nfs.is_some(), false),
        ("ephemeral", volume.ephemeral.is_some(), false),
        ("image", volume.image.is_some(), false),
    ];
    if sources.iter().filter(|(_, set, _)| *set).count() > 1 {
        check.error(at, "a volume has one source", "keep one of them");
    }
    for (name, set, is_built) in sources {
        check.unbuilt_if(set && !is_built, format!("{at}.{name}"));
    }
    if let Some(scratch) = &volume.empty_dir {
        check.idle_if(
            !scratch.medium.is_empty(),
            format!("{at}.emptyDir.medium"),
            "it is a folder of the state folder",
        );
        let why = "it may take what the disk has";
        check.idle_if(scratch.size_limit.is_some(), format!("{at}.emptyDir.sizeLimit"), why);
    }
    let asks_for_type =
        volume.host_path.as_ref().is_some_and(|path| path["type"].as_str().is_some_and(|t| !t.is_empty()));
    check.unbuilt_if(asks_for_type, format!("{at}.hostPath.type"));
    let of_projected = volume.projected.iter().flat_map(|projected| &projected.sources).enumerate();
    let projected = of_projected.filter_map(|(index, source)| {
        Some((format!("{at}.projected.sources[{index}].downwardAPI"), source.downward_api.as_ref()?))
    });
    for (at, files) in volume.downward_api.iter().map(|files| (format!("{at}.downwardAPI"), files)).chain(projected) {
        for (index, file) in files.items.iter().enumerate() {
            check.unbuilt_if(file.resource_field_ref.is_some(), format!("{at}.items[{index}].resourceFieldRef"));
        }
    }
    if volume.config_map.as_ref().is_some_and(|source| source.name.is_empty()) {
        check.error(&format!("{at}.configMap.name"), "name is needed", "name the ConfigMap");
    }
    if volume.secret.as_ref().is_some_and(|source| source.secret_name.is_empty()) {
        check.error(&format!("{at}.secret.secretName"), "secretName is needed", "name the Secret");
    }
    for (at, path) in paths(at, volume) {
        if path.is_empty() || path.starts_with('/') || path.split('/').any(|part| part == "..") {
            let message = format!("{path:?} is not a path below the volume");
            check.error(&at, message, "write a relative path without `..`");
        }
    }
}

/// All paths below a volume that its files are to have, with the fields that say so.
fn paths<'a>(at: &str, volume: &'a Volume) -> Vec<(String, &'a str)> {
    let mut out = Vec::new();
    let mut add = |at: String, paths: &mut dyn Iterator<Item = &'a str>| {
        out.extend(paths.enumerate().map(|(index, path)| (format!("{at}.items[{index}].path"), path)));
    };
    let of = |items: &'a [KeyToPath]| items.iter().map(|item| item.path.as_str());
    let of_pod = |files: &'a DownwardApiVolume| files.items.iter().map(|file| file.path.as_str());
    if let Some(source) = &volume.config_map {
        add(format!("{at}.configMap"), &mut of(&source.items));
    }
    if let Some(source) = &volume.secret {
        add(format!("{at}.secret"), &mut of(&source.items));
    }
    if let Some(files) = &volume.downward_api {
        add(format!("{at}.downwardAPI"), &mut of_pod(files));
    }
    let mut tokens = Vec::new();
    for (index, source) in volume.projected.iter().flat_map(|projected| &projected.sources).enumerate() {
        let at = format!("{at}.projected.sources[{index}]");
        if let Some(source) = &source.config_map {
            add(format!("{at}.configMap"), &mut of(&source.items));
        }
        if let Some(source) = &source.secret {
            add(format!("{at}.secret"), &mut of(&source.items));
        }
        if let Some(files) = &source.downward_api {
            add(format!("{at}.downwardAPI"), &mut of_pod(files));
        }
        // Without a path it is `token`.
        if let Some(token) = source.service_account_token.as_ref().filter(|token| !token.path.is_empty()) {
            tokens.push((format!("{at}.serviceAccountToken.path"), token.path.as_str()));
        }
    }
    out.extend(tokens);
    out
}

fn container(check: &mut Check<'_>, at: &str, container: &Container, volumes: &BTreeSet<&str>) {
    for (index, variable) in container.env.iter().enumerate() {
        env(check, &format!("{at}.env[{index}]"), variable);
    }
    for (index, source) in container.env_from.iter().enumerate() {
        if source.config_map_ref.is_some() == source.secret_ref.is_some() {
            check.error(
                &format!("{at}.envFrom[{index}]"),
                "one of configMapRef and secretRef is needed",
                "keep exactly one of the two",
            );
        }
    }
    let mut names = BTreeSet::new();
    for (index, port) in container.ports.iter().enumerate() {
        let at = format!("{at}.ports[{index}]");
        rules::port_number(check, &format!("{at}.containerPort"), port.container_port);
        if !port.name.is_empty() && !names.insert(port.name.as_str()) {
            check.error(
                &format!("{at}.name"),
                format!("port name {:?} is used twice", port.name),
                "rename one of the two",
            );
        }
        check.unbuilt_if(port.host_port != 0, format!("{at}.hostPort"));
        check.unbuilt_if(!port.host_ip.is_empty(), format!("{at}.hostIP"));
    }
    for (name, probe) in [
        ("readinessProbe", &container.readiness_probe),
        ("livenessProbe", &container.liveness_probe),
        ("startupProbe", &container.startup_probe),
    ] {
        if let Some(probe) = probe {
            self::probe(check, &format!("{at}.{name}"), probe, container);
        }
    }
    let lifecycle = container.lifecycle.as_ref();
    for (name, hook) in [
        ("postStart", lifecycle.and_then(|lifecycle| lifecycle.post_start.as_ref())),
        ("preStop", lifecycle.and_then(|lifecycle| lifecycle.pre_stop.as_ref())),
    ] {
        if let Some(hook) = hook {
            self::hook(check, &format!("{at}.lifecycle.{name}"), hook, container);
        }
    }
    let mut paths = BTreeSet::new();
    for (index, mount) in container.volume_mounts.iter().enumerate() {
        let at = format!("{at}.volumeMounts[{index}]");
        if !volumes.contains(mount.name.as_str()) {
            check.error(
                &format!("{at}.name"),
                format!("volume {:?} is not defined", mount.name),
                "add it to the pod's volumes",
            );
        }
        if !mount.mount_path.starts_with('/') {
            check.error(
                &format!("{at}.mountPath"),
                format!("{:?} is not an absolute path", mount.mount_path),
                "begin it with `/`",
            );
        }
        if !paths.insert(mount.mount_path.as_str()) {
            check.error(
                &format!("{at}.mountPath"),
                format!("{:?} is mounted twice", mount.mount_path),
                "mount one of the two elsewhere",
            );
        }
        if mount.sub_path.starts_with('/') || mount.sub_path.split('/').any(|part| part == "..") {
            check.error(&format!("{at}.subPath"), "not a path below the volume", "write a relative path without `..`");
        }
        check.unbuilt_if(!mount.sub_path_expr.is_empty(), format!("{at}.subPathExpr"));
        let is_set = |value: Option<&str>, default: &str| value.is_some_and(|value| value != default);
        check.unbuilt_if(is_set(mount.mount_propagation.as_deref(), "None"), format!("{at}.mountPropagation"));
        check.unbuilt_if(is_set(mount.recursive_read_only.as_deref(), "Disabled"), format!("{at}.recursiveReadOnly"));
    }
    without_effect_on_a_container(check, at, container);
}

fn without_effect_on_a_container(check: &mut Check<'_>, at: &str, container: &Container) {
    // The rights of the mesh's own proxy are the mesh's matter, whatever a template says.
    let severity = if container.name == "istio-proxy" { Severity::Info } else { Severity::Warning };
    security_context(check, &format!("{at}.securityContext"), container.security_context.as_ref(), severity);
    let path = container.termination_message_path.as_deref();
    let policy = container.termination_message_policy.as_deref();
    for (name, is_set) in [
        ("stdin", container.stdin == Some(true)),
        ("stdinOnce", container.stdin_once == Some(true)),
        ("tty", container.tty == Some(true)),
        ("terminationMessagePath", path.is_some_and(|path| path != "/dev/termination-log")),
        ("terminationMessagePolicy", policy.is_some_and(|policy| policy != "File")),
    ] {
        check.unbuilt_if(is_set, format!("{at}.{name}"));
    }
    let unlimited = "programs are not limited";
    check.idle_if(holds_something(container.resources.as_ref()), format!("{at}.resources"), unlimited);
    check.idle_if(holds_something(container.resize_policy.as_ref()), format!("{at}.resizePolicy"), unlimited);
    // IfNotPresent and Never ask for what is done.
    check.idle_if(container.image_pull_policy == "Always", format!("{at}.imagePullPolicy"), "no image is pulled");
}

fn env(check: &mut Check<'_>, at: &str, variable: &EnvVar) {
    let fits = !variable.name.is_empty() && !variable.name.contains(['=', '\0']);
    if !fits {
        check.error(
            &format!("{at}.name"),
            format!("{:?} is not the name of a variable", variable.name),
            "write letters, digits and `_`",
        );
    }
    if variable.value.as_ref().is_some_and(|value| value.contains('\0')) {
        check.error(
            &format!("{at}.value"),
            "value holds a zero byte",
            "remove it; a Secret in a volume holds any bytes",
        );
    }
    let Some(source) = &variable.value_from else { return };
    let at = format!("{at}.valueFrom");
    let set = [
        source.field_ref.is_some(),
        source.resource_field_ref.is_some(),
        source.config_map_key_ref.is_some(),
        source.secret_key_ref.is_some(),
    ];
    if set.iter().filter(|set| **set).count() != 1 || variable.value.as_ref().is_some_and(|value| !value.is_empty()) {
        check.error(
            &at,
            "exactly one source is needed, and no value beside it",
            "keep one of fieldRef, configMapKeyRef, secretKeyRef",
        );
    }
    let why = "programs are not limited, so that it is 0";
    check.idle_if(source.resource_field_ref.is_some(), format!("{at}.resourceFieldRef"), why);
    if let Some(field) = &source.field_ref {
        let path = field.field_path.as_str();
        let known = matches!(
            path,
            "metadata.name"
                | "metadata.namespace"
                | "metadata.uid"
                | "spec.nodeName"
                | "spec.serviceAccountName"
                | "status.hostIP"
                | "status.hostIPs"
                | "status.podIP"
                | "status.podIPs"
        ) || ((path.starts_with("metadata.labels['") || path.starts_with("metadata.annotations['"))
            && path.ends_with("']"));
        if !known {
            check.error(
                &format!("{at}.fieldRef.fieldPath"),
                format!("{path:?} is not a field that can be referred to"),
                "write metadata.name, metadata.labels['KEY'], status.podIP or the like",
            );
        }
    }
}

fn probe(check: &mut Check<'_>, at: &str, probe: &Probe, container: &Container) {
    let handlers = [probe.http_get.is_some(), probe.tcp_socket.is_some(), probe.exec.is_some(), probe.grpc.is_some()];
    if handlers.iter().filter(|set| **set).count() != 1 {
        check.error(at, "exactly one of httpGet, tcpSocket, exec, grpc is needed", "keep one of them");
    }
    actions(check, at, container, (probe.http_get.as_ref(), probe.tcp_socket.as_ref(), probe.exec.as_ref()));
}

fn hook(check: &mut Check<'_>, at: &str, hook: &LifecycleHandler, container: &Container) {
    let handlers = [hook.http_get.is_some(), hook.tcp_socket.is_some(), hook.exec.is_some(), hook.sleep.is_some()];
    if handlers.iter().filter(|set| **set).count() != 1 {
        check.error(at, "exactly one of httpGet, tcpSocket, exec, sleep is needed", "keep one of them");
    }
    actions(check, at, container, (hook.http_get.as_ref(), hook.tcp_socket.as_ref(), hook.exec.as_ref()));
}

type Actions<'a> = (Option<&'a HttpGetAction>, Option<&'a TcpSocketAction>, Option<&'a ExecAction>);

/// What a probe and a hook of a lifecycle may do.
fn actions(check: &mut Check<'_>, at: &str, container: &Container, (http, tcp, exec): Actions<'_>) {
    let ports = [
        ("httpGet.port", http.map(|action| action.port.as_ref())),
        ("tcpSocket.port", tcp.map(|action| action.port.as_ref())),
    ];
    for (name, port) in ports {
        let Some(port) = port else { continue };
        let field = format!("{at}.{name}");
        match port {
            None | Some(IntOrString::Int(0)) => {
                check.error(&field, "port is needed", "write the number, or a name among the container's ports");
            }
            Some(IntOrString::Int(_)) => {}
            Some(IntOrString::Name(name)) if container.ports.iter().any(|port| port.name == *name) => {}
            Some(IntOrString::Name(name)) => {
                check.warn(&field, format!("the container has no port {name:?}"), "name one of its ports");
            }
        }
    }
    if let Some(http) = http
        && !matches!(http.scheme.as_str(), "" | "HTTP" | "HTTPS")
    {
        let message = format!("{:?} is neither HTTP nor HTTPS", http.scheme);
        check.error(&format!("{at}.httpGet.scheme"), message, "use HTTP or HTTPS");
    }
    if exec.is_some_and(|action| action.command.is_empty()) {
        let hint = "write the program and its arguments as a list";
        check.error(&format!("{at}.exec.command"), "command is needed", hint);
    }
}

pub(super) fn endpoint_slice(check: &mut Check<'_>, slice: &EndpointSlice) {
    if !matches!(slice.address_type.as_str(), "IPv4" | "IPv6" | "FQDN") {
        check.error("addressType", format!("{:?} is not IPv4, IPv6 or FQDN", slice.address_type), "use IPv4");
    }
    for (index, endpoint) in slice.endpoints.iter().enumerate() {
        if endpoint.addresses.is_empty() {
            check.error(&format!("endpoints[{index}].addresses"), "at least one address is needed", "list an address");
        }
        for address in &endpoint.addresses {
            if slice.address_type.starts_with("IP") && address.parse::<std::net::IpAddr>().is_err() {
                check.error(
                    &format!("endpoints[{index}].addresses"),
                    format!("{address:?} is not an address"),
                    "write an IP address",
                );
            }
        }
        let near = "all pods run on this machine";
        check.idle_if(!endpoint.deprecated_topology.is_empty(), format!("endpoints[{index}].deprecatedTopology"), near);
        check.idle_if(holds_something(endpoint.hints.as_ref()), format!("endpoints[{index}].hints"), near);
        check.idle_if(!endpoint.zone.is_empty(), format!("endpoints[{index}].zone"), near);
        let elsewhere = !matches!(endpoint.node_name.as_str(), "" | NODE_NAME);
        check.idle_if(elsewhere, format!("endpoints[{index}].nodeName"), near);
    }
}

fn keys<'a>(check: &mut Check<'_>, keys: impl Iterator<Item = &'a String>) {
    for key in keys {
        let fits = !key.is_empty()
            && key.len() <= 253
            && key != "."
            && key != ".."
            && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        if !fits {
            check.error("data", format!("{key:?} is not a key"), "use letters, digits, `-`, `_`, `.`");
        }
    }
}

pub(super) fn config_map(check: &mut Check<'_>, map: &ConfigMap) {
    keys(check, map.data.keys().chain(map.binary_data.keys()));
    if let Some(key) = map.data.keys().find(|key| map.binary_data.contains_key(*key)) {
        check.error("binaryData", format!("key {key:?} is also in data"), "keep one of the two");
    }
}

pub(super) fn secret(check: &mut Check<'_>, secret: &Secret) {
    keys(check, secret.data.keys().chain(secret.string_data.keys()));
    if secret.kind == "kubernetes.io/tls" {
        for key in ["tls.crt", "tls.key"] {
            if secret.value(key).is_none() {
                check.error(
                    "data",
                    format!("a secret of type kubernetes.io/tls needs {key}"),
                    "add it, or make the type Opaque",
                );
            }
        }
    }
}
