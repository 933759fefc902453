//! Metadata and the Kubernetes kinds.

use std::collections::{BTreeMap, BTreeSet};

use super::virtual_service::labels;
use super::{Check, rules};
use crate::k8s::{
    ConfigMap, Container, Deployment, EndpointSlice, EnvVar, IntOrString, PodSpec, Probe, Secret, Service, Volume,
};
use crate::kind::{Kind, Support};

pub(super) fn metadata(check: &mut Check<'_>) {
    let object = check.object;
    let name = &*object.meta.name;
    let fits = match object.kind {
        Kind::Namespace => rules::is_dns_label(name),
        Kind::Service => rules::is_dns_label(name) && !name.starts_with(|c: char| c.is_ascii_digit()),
        // Names of RBAC objects are paths.
        _ if object.kind.info().group == "rbac.authorization.k8s.io" => !name.contains('/'),
        _ => rules::is_dns_subdomain(name),
    };
    if !fits {
        let hint = "use lower-case letters, digits and `-`, beginning and ending with a letter or digit";
        check.error("metadata.name", format!("{name:?} is not a name of a {}", object.kind), hint);
    }
    if object.kind.is_namespaced() && !rules::is_dns_label(&object.meta.namespace) {
        check.error("metadata.namespace", format!("{:?} is not a namespace", object.meta.namespace), "");
    }
    labels(check, "metadata.labels", &object.meta.labels);
    for key in object.meta.annotations.keys() {
        if !rules::is_label_key(key) {
            check.error("metadata.annotations", format!("{key:?} is not an annotation's key"), "");
        }
    }
    if object.kind.info().support == Support::Recognised {
        return;
    }
    if let Some(value) = object.meta.labels.get(types::wellknown::labels::INJECT)
        && !matches!(value.as_str(), "true" | "false")
    {
        check.warn(
            "metadata.labels",
            format!("sidecar.istio.io/inject is {value:?} and counts as unset"),
            "write \"true\" or \"false\"",
        );
    }
}

pub(super) fn service(check: &mut Check<'_>, service: &Service) {
    let spec = &service.spec;
    match spec.kind.as_str() {
        "" | "ClusterIP" => {}
        "NodePort" | "LoadBalancer" => check.add(
            crate::codes::NOT_EFFECTIVE,
            types::Severity::Info,
            "spec.type",
            format!("type {} acts as ClusterIP here", spec.kind),
            "",
        ),
        "ExternalName" => {
            rules::host(check, "spec.externalName", &spec.external_name);
        }
        other => check.error("spec.type", format!("{other:?} is not a type of service"), "use ClusterIP"),
    }
    if spec.ports.is_empty() && !spec.is_headless() && spec.kind != "ExternalName" {
        check.error("spec.ports", "at least one port is needed", "");
    }
    if !spec.cluster_ip.is_empty() && !spec.is_headless() && spec.cluster_ip.parse::<std::net::IpAddr>().is_err() {
        check.error("spec.clusterIP", format!("{:?} is neither an address nor None", spec.cluster_ip), "leave it out");
    }
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in spec.ports.iter().enumerate() {
        let at = format!("spec.ports[{index}]");
        rules::port_number(check, &format!("{at}.port"), port.port);
        if spec.ports.len() > 1 && port.name.is_empty() {
            check.error(&format!("{at}.name"), "ports need names when there are several", "");
        }
        if !port.name.is_empty() && !rules::is_dns_label(&port.name) {
            check.error(&format!("{at}.name"), format!("{:?} is not the name of a port", port.name), "");
        }
        if !port.name.is_empty() && !names.insert(&port.name) {
            check.error(&format!("{at}.name"), format!("port name {:?} is used twice", port.name), "");
        }
        if !numbers.insert((port.port, protocol(&port.protocol))) {
            check.error(&format!("{at}.port"), format!("port {} is listed twice", port.port), "");
        }
        if !matches!(protocol(&port.protocol), "TCP" | "UDP" | "SCTP") {
            check.error(
                &format!("{at}.protocol"),
                format!("{:?} is not TCP, UDP or SCTP", port.protocol),
                "the protocol above goes into appProtocol",
            );
        }
        if port.target_port == Some(IntOrString::Int(0)) {
            check.error(&format!("{at}.targetPort"), "port must be between 1 and 65535", "");
        }
    }
    labels(check, "spec.selector", &spec.selector);
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
            ("In" | "NotIn", true) => check.error(&at, "values are needed", ""),
            ("Exists" | "DoesNotExist", false) => check.error(&at, "values are not allowed", ""),
            (other, _) => {
                check.error(&at, format!("{other:?} is not an operator"), "use In, NotIn, Exists or DoesNotExist");
            }
        }
    }
    match spec.strategy.kind.as_str() {
        "" | "RollingUpdate" => {}
        "Recreate" if spec.strategy.rolling_update.is_some() => {
            check.error("spec.strategy.rollingUpdate", "Recreate takes no rollingUpdate", "");
        }
        "Recreate" => {}
        other => check.error("spec.strategy.type", format!("{other:?} is neither RollingUpdate nor Recreate"), ""),
    }
    labels(check, "spec.template.metadata.labels", &spec.template.metadata.labels);
    proxy_config(check, "spec.template.metadata.annotations", &spec.template.metadata.annotations);
    pod(check, &spec.template.spec, "spec.template.spec");
    if !matches!(spec.template.spec.restart_policy.as_str(), "" | "Always") {
        check.error("spec.template.spec.restartPolicy", "a Deployment needs restartPolicy Always", "");
    }
}

/// The annotation that sets up a pod's own proxy.
pub(super) fn proxy_config(check: &mut Check<'_>, at: &str, annotations: &BTreeMap<String, String>) {
    let name = types::wellknown::annotations::PROXY_CONFIG;
    let Some(text) = annotations.get(name) else { return };
    let why = match serde_saphyr::from_str(text) {
        Ok(fields @ serde_json::Value::Object(_)) => {
            let server = fields.pointer("/proxyHeaders/server/value").and_then(serde_json::Value::as_str);
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
        check.error(&format!("{at}.containers"), "at least one container is needed", "");
    }
    if !matches!(spec.restart_policy.as_str(), "" | "Always" | "OnFailure" | "Never") {
        check.error(
            &format!("{at}.restartPolicy"),
            format!("{:?} is not Always, OnFailure or Never", spec.restart_policy),
            "",
        );
    }
    let mut volumes = BTreeSet::new();
    for (index, volume) in spec.volumes.iter().enumerate() {
        let at = format!("{at}.volumes[{index}]");
        if !rules::is_dns_label(&volume.name) {
            check.error(&format!("{at}.name"), format!("{:?} is not the name of a volume", volume.name), "");
        }
        if !volumes.insert(volume.name.as_str()) {
            check.error(&format!("{at}.name"), format!("volume {:?} is defined twice", volume.name), "");
        }
        self::volume(check, &at, volume);
    }
    let mut names = BTreeSet::new();
    for (list, containers) in [("initContainers", &spec.init_containers), ("containers", &spec.containers)] {
        for (index, container) in containers.iter().enumerate() {
            let at = format!("{at}.{list}[{index}]");
            if !rules::is_dns_label(&container.name) {
                check.error(&format!("{at}.name"), format!("{:?} is not the name of a container", container.name), "");
            }
            if !names.insert(container.name.as_str()) {
                check.error(&format!("{at}.name"), format!("container {:?} is defined twice", container.name), "");
            }
            self::container(check, &at, container, &volumes);
        }
    }
    check.unbuilt_if(spec.host_network, format!("{at}.hostNetwork"));
    check.unbuilt_if(spec.dns_config.is_some(), format!("{at}.dnsConfig"));
    check.unbuilt_if(spec.share_process_namespace == Some(true), format!("{at}.shareProcessNamespace"));
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
        check.error(at, "a volume has one source", "");
    }
    for (name, set, is_built) in sources {
        check.unbuilt_if(set && !is_built, format!("{at}.{name}"));
    }
    if volume.config_map.as_ref().is_some_and(|source| source.name.is_empty()) {
        check.error(&format!("{at}.configMap.name"), "name is needed", "");
    }
    if volume.secret.as_ref().is_some_and(|source| source.secret_name.is_empty()) {
        check.error(&format!("{at}.secret.secretName"), "secretName is needed", "");
    }
    let items = volume
        .config_map
        .iter()
        .flat_map(|source| &source.items)
        .chain(volume.secret.iter().flat_map(|source| &source.items));
    for item in items {
        if item.path.is_empty() || item.path.starts_with('/') || item.path.split('/').any(|part| part == "..") {
            check.error(
                at,
                format!("{:?} is not a path below the volume", item.path),
                "write a relative path without `..`",
            );
        }
    }
}

fn container(check: &mut Check<'_>, at: &str, container: &Container, volumes: &BTreeSet<&str>) {
    for (index, variable) in container.env.iter().enumerate() {
        env(check, &format!("{at}.env[{index}]"), variable);
    }
    for (index, source) in container.env_from.iter().enumerate() {
        if source.config_map_ref.is_some() == source.secret_ref.is_some() {
            check.error(&format!("{at}.envFrom[{index}]"), "one of configMapRef and secretRef is needed", "");
        }
    }
    let mut names = BTreeSet::new();
    for (index, port) in container.ports.iter().enumerate() {
        let at = format!("{at}.ports[{index}]");
        rules::port_number(check, &format!("{at}.containerPort"), port.container_port);
        if !port.name.is_empty() && !names.insert(port.name.as_str()) {
            check.error(&format!("{at}.name"), format!("port name {:?} is used twice", port.name), "");
        }
        check.unbuilt_if(port.host_port != 0, format!("{at}.hostPort"));
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
            check.error(&format!("{at}.mountPath"), format!("{:?} is not an absolute path", mount.mount_path), "");
        }
        if !paths.insert(mount.mount_path.as_str()) {
            check.error(&format!("{at}.mountPath"), format!("{:?} is mounted twice", mount.mount_path), "");
        }
        if mount.sub_path.starts_with('/') || mount.sub_path.split('/').any(|part| part == "..") {
            check.error(&format!("{at}.subPath"), "not a path below the volume", "");
        }
        check.unbuilt_if(!mount.sub_path_expr.is_empty(), format!("{at}.subPathExpr"));
    }
}

fn env(check: &mut Check<'_>, at: &str, variable: &EnvVar) {
    let fits = !variable.name.is_empty() && !variable.name.contains(['=', '\0']);
    if !fits {
        check.error(&format!("{at}.name"), format!("{:?} is not the name of a variable", variable.name), "");
    }
    if variable.value.as_ref().is_some_and(|value| value.contains('\0')) {
        check.error(&format!("{at}.value"), "value holds a zero byte", "");
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
        check.error(&at, "exactly one source is needed, and no value beside it", "");
    }
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
                "",
            );
        }
    }
}

fn probe(check: &mut Check<'_>, at: &str, probe: &Probe, container: &Container) {
    let handlers = [probe.http_get.is_some(), probe.tcp_socket.is_some(), probe.exec.is_some(), probe.grpc.is_some()];
    if handlers.iter().filter(|set| **set).count() != 1 {
        check.error(at, "exactly one of httpGet, tcpSocket, exec, grpc is needed", "");
    }
    let ports = [
        ("httpGet.port", probe.http_get.as_ref().map(|action| action.port.as_ref())),
        ("tcpSocket.port", probe.tcp_socket.as_ref().map(|action| action.port.as_ref())),
    ];
    for (name, port) in ports {
        let Some(port) = port else { continue };
        let field = format!("{at}.{name}");
        match port {
            None | Some(IntOrString::Int(0)) => check.error(&field, "port is needed", ""),
            Some(IntOrString::Int(_)) => {}
            Some(IntOrString::Name(name)) if container.ports.iter().any(|port| port.name == *name) => {}
            Some(IntOrString::Name(name)) => {
                check.error(&field, format!("the container has no port {name:?}"), "name one of its ports");
            }
        }
    }
    if probe.exec.as_ref().is_some_and(|action| action.command.is_empty()) {
        check.error(&format!("{at}.exec.command"), "command is needed", "");
    }
}

pub(super) fn endpoint_slice(check: &mut Check<'_>, slice: &EndpointSlice) {
    if !matches!(slice.address_type.as_str(), "IPv4" | "IPv6" | "FQDN") {
        check.error("addressType", format!("{:?} is not IPv4, IPv6 or FQDN", slice.address_type), "");
    }
    for (index, endpoint) in slice.endpoints.iter().enumerate() {
        if endpoint.addresses.is_empty() {
            check.error(&format!("endpoints[{index}].addresses"), "at least one address is needed", "");
        }
        for address in &endpoint.addresses {
            if slice.address_type.starts_with("IP") && address.parse::<std::net::IpAddr>().is_err() {
                check.error(&format!("endpoints[{index}].addresses"), format!("{address:?} is not an address"), "");
            }
        }
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
        check.error("binaryData", format!("key {key:?} is also in data"), "");
    }
}

pub(super) fn secret(check: &mut Check<'_>, secret: &Secret) {
    keys(check, secret.data.keys().chain(secret.string_data.keys()));
    if secret.kind == "kubernetes.io/tls" {
        for key in ["tls.crt", "tls.key"] {
            if secret.value(key).is_none() {
                check.error("data", format!("a secret of type kubernetes.io/tls needs {key}"), "");
            }
        }
    }
}
