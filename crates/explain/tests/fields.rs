//! No field is silent: taking any field of a traffic or security object away changes what some
//! proxy is told, or a finding names the field. A field of a Kubernetes object is among those that the
//! node or the mesh reads, or a finding names it.
//!
//! `fields/<kind>.yaml` sets every field of its kind at least once; that it does is checked against
//! the decoded types themselves, so that a new field fails here until a case sets it.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::{Kind, MeshConfig, k8s, networking as net, security as sec};
use compile::{ProxyKind, View};
use mesh::MeshSnapshot;
use serde::de::value::{Error, StrDeserializer};
use serde::de::{self, DeserializeOwned, Deserializer, IntoDeserializer as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use types::{Finding, Severity};

const MESH: &str = include_str!("fields/mesh.yaml");
/// Objects with this annotation are taken apart; the others are there for them.
const WALKED: &str = "/metadata/annotations/case";

#[test]
fn virtual_service() {
    check::<net::VirtualService>("VirtualService", include_str!("fields/virtual-service.yaml"));
}

#[test]
fn destination_rule() {
    check::<net::DestinationRule>("DestinationRule", include_str!("fields/destination-rule.yaml"));
}

#[test]
fn gateway() {
    check::<net::Gateway>("Gateway", include_str!("fields/gateway.yaml"));
}

#[test]
fn service_entry() {
    check::<net::ServiceEntry>("ServiceEntry", include_str!("fields/service-entry.yaml"));
}

#[test]
fn sidecar() {
    check::<net::Sidecar>("Sidecar", include_str!("fields/sidecar.yaml"));
}

#[test]
fn peer_authentication() {
    check::<sec::PeerAuthentication>("PeerAuthentication", include_str!("fields/peer-authentication.yaml"));
}

#[test]
fn request_authentication() {
    check::<sec::RequestAuthentication>("RequestAuthentication", include_str!("fields/request-authentication.yaml"));
}

#[test]
fn authorization_policy() {
    check::<sec::AuthorizationPolicy>("AuthorizationPolicy", include_str!("fields/authorization-policy.yaml"));
}

#[test]
fn mesh_config() {
    let all = documents(include_str!("fields/mesh-config.yaml"));
    let (operators, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|object| object["kind"] == "IstioOperator");
    let mut walk = Walk::new("IstioOperator", "/spec/meshConfig");
    // The older of two would hold alone.
    for operator in operators {
        let objects: Vec<Value> = documents(MESH).into_iter().chain(others.clone()).chain([operator]).collect();
        walk.through::<MeshConfig>(&objects, &Outcome::of(&objects));
    }
    walk.finish();
}

#[test]
fn kubernetes() {
    let fields = RefCell::default();
    let (mut silent, mut unread) = (Vec::new(), NODE_READS.to_vec());
    for object in documents(include_str!("fields/kubernetes.yaml")) {
        record(&object, &fields);
        let (admitted, findings) = api::from_json(&object);
        assert!(admitted.is_some(), "{findings:#?}");
        let kind = object["kind"].as_str().unwrap();
        for path in leaves(&object) {
            let place = format!("{kind}{}", without_indices(&path));
            // Pods of deployments are pods, and what every object has is not this test's.
            let place = place.replace(".initContainers", ".containers");
            let about_all = [".apiVersion", ".kind", ".metadata", ".spec.template"];
            if about_all.iter().any(|part| place[kind.len()..].starts_with(part)) {
                continue;
            }
            let field = display(&path);
            let is_read = NODE_READS.iter().any(|read| is_inside(&place, read));
            unread.retain(|read| !is_inside(&place, read));
            if !is_read && !findings.iter().any(|finding| names(finding, &field[1..])) {
                silent.push(field);
            }
        }
    }
    assert_eq!(silent, Vec::<String>::new(), "fields that nobody reads and no finding names");
    assert_eq!(unread, Vec::<&str>::new(), "no such field in fields/kubernetes.yaml");
    let of_others =
        |owner: &str| owner.contains("Status") || owner.contains("State") || matches!(owner, "ObjectMeta" | "PodIp");
    let own = fields.take().into_iter().filter(|(owner, _)| !of_others(owner));
    let unset: Vec<String> =
        own.flat_map(|(owner, of)| of.unset(&owner)).filter(|field| !field.ends_with(".status")).collect();
    assert_eq!(unset, Vec::<String>::new(), "fields that fields/kubernetes.yaml does not set");
}

/// Notes which fields of its kind's types the object sets.
fn record(object: &Value, fields: &RefCell<BTreeMap<String, Fields>>) {
    fn of<Spec: DeserializeOwned>(recorder: Recorder<'_>) {
        Spec::deserialize(recorder).unwrap();
    }
    let recorder = Recorder { value: object, fields };
    match Kind::parse(object["kind"].as_str().unwrap()).unwrap() {
        Kind::Service => of::<k8s::Service>(recorder),
        Kind::EndpointSlice => of::<k8s::EndpointSlice>(recorder),
        Kind::ConfigMap => of::<k8s::ConfigMap>(recorder),
        Kind::Secret => of::<k8s::Secret>(recorder),
        Kind::ServiceAccount => of::<k8s::ServiceAccount>(recorder),
        Kind::Deployment => of::<k8s::Deployment>(recorder),
        Kind::Pod => of::<k8s::Pod>(recorder),
        other => panic!("{other}"),
    }
}

fn is_inside(place: &str, whole: &str) -> bool {
    place.strip_prefix(whole).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// What the node (`node/src/{controller,env,inject,probe,store,volume}.rs`), the registry of the mesh
/// (`mesh/src/{registry,workload}.rs`) or the commands read, with all that is in it.
const NODE_READS: [&str; 78] = [
    "Service.spec.type",
    "Service.spec.selector",
    "Service.spec.ports.name",
    "Service.spec.ports.protocol",
    "Service.spec.ports.appProtocol",
    "Service.spec.ports.port",
    "Service.spec.ports.targetPort",
    "Service.spec.clusterIP",
    "Service.spec.clusterIPs",
    "Service.spec.externalName",
    "Service.spec.publishNotReadyAddresses",
    "Service.spec.internalTrafficPolicy",
    "Service.spec.trafficDistribution",
    "EndpointSlice.addressType",
    "EndpointSlice.endpoints.addresses",
    "EndpointSlice.endpoints.conditions",
    "EndpointSlice.endpoints.hostname",
    "EndpointSlice.endpoints.targetRef",
    "EndpointSlice.ports",
    "ConfigMap.data",
    "ConfigMap.binaryData",
    "ConfigMap.immutable",
    "Secret.type",
    "Secret.data",
    "Secret.stringData",
    "Secret.immutable",
    "Deployment.spec.replicas",
    "Deployment.spec.selector",
    "Deployment.spec.strategy",
    "Deployment.spec.minReadySeconds",
    "Deployment.spec.paused",
    "Pod.spec.serviceAccountName",
    "Pod.spec.serviceAccount",
    "Pod.spec.automountServiceAccountToken",
    "Pod.spec.terminationGracePeriodSeconds",
    "Pod.spec.hostname",
    "Pod.spec.subdomain",
    "Pod.spec.restartPolicy",
    "Pod.spec.dnsPolicy",
    "Pod.spec.hostAliases",
    "Pod.spec.containers.name",
    "Pod.spec.containers.image",
    "Pod.spec.containers.command",
    "Pod.spec.containers.args",
    "Pod.spec.containers.workingDir",
    "Pod.spec.containers.restartPolicy",
    "Pod.spec.containers.env.name",
    "Pod.spec.containers.env.value",
    "Pod.spec.containers.env.valueFrom.fieldRef",
    "Pod.spec.containers.env.valueFrom.configMapKeyRef",
    "Pod.spec.containers.env.valueFrom.secretKeyRef",
    "Pod.spec.containers.envFrom",
    "Pod.spec.containers.ports.name",
    "Pod.spec.containers.ports.containerPort",
    // For people, in Kubernetes too.
    "Pod.spec.containers.ports.protocol",
    "Pod.spec.containers.readinessProbe",
    "Pod.spec.containers.livenessProbe",
    "Pod.spec.containers.startupProbe",
    "Pod.spec.containers.lifecycle",
    "Pod.spec.containers.volumeMounts.name",
    "Pod.spec.containers.volumeMounts.mountPath",
    "Pod.spec.containers.volumeMounts.readOnly",
    "Pod.spec.containers.volumeMounts.subPath",
    "Pod.spec.volumes.name",
    "Pod.spec.volumes.configMap",
    "Pod.spec.volumes.secret",
    "Pod.spec.volumes.downwardAPI.items.path",
    "Pod.spec.volumes.downwardAPI.items.fieldRef",
    "Pod.spec.volumes.downwardAPI.items.mode",
    "Pod.spec.volumes.downwardAPI.defaultMode",
    "Pod.spec.volumes.hostPath.path",
    "Pod.spec.volumes.projected.defaultMode",
    "Pod.spec.volumes.projected.sources.configMap",
    "Pod.spec.volumes.projected.sources.secret",
    "Pod.spec.volumes.projected.sources.downwardAPI.items.path",
    "Pod.spec.volumes.projected.sources.downwardAPI.items.fieldRef",
    "Pod.spec.volumes.projected.sources.downwardAPI.items.mode",
    "Pod.spec.volumes.projected.sources.serviceAccountToken",
];

/// Takes the fields of every walked object of `kind` away, one at a time.
fn check<Spec: DeserializeOwned>(kind: &'static str, yaml: &str) {
    let mut objects = documents(MESH);
    objects.extend(documents(yaml));
    let whole = Outcome::of(&objects);
    let mut walk = Walk::new(kind, "/spec");
    walk.through::<Spec>(&objects, &whole);
    walk.finish();
    refused_for_what_they_say(kind, &objects, &whole);
}

/// What taking fields away showed.
struct Walk {
    kind: &'static str,
    /// Pointer to what is taken apart in each object.
    section: &'static str,
    fields: RefCell<BTreeMap<String, Fields>>,
    silent: Vec<(String, String)>,
    effective: BTreeSet<String>,
}

impl Walk {
    fn new(kind: &'static str, section: &'static str) -> Self {
        Self { kind, section, fields: RefCell::default(), silent: Vec::new(), effective: BTreeSet::new() }
    }

    /// One mesh, and what it gives whole.
    fn through<Spec: DeserializeOwned>(&mut self, objects: &[Value], whole: &Outcome) {
        let kind = self.kind;
        let is_walked = |object: &Value| object["kind"] == kind && object.pointer(WALKED).is_some();
        for (index, object) in objects.iter().enumerate().filter(|(_, object)| is_walked(object)) {
            let section = object.pointer(self.section).unwrap();
            Spec::deserialize(Recorder { value: section, fields: &self.fields }).unwrap();
            let name = object["metadata"]["name"].as_str().unwrap();
            let findings: Vec<&Finding> = whole.findings_on(kind, name).collect();
            let is_refused = name == "refused";
            for path in leaves(section) {
                let field = format!("{}{}", self.section.trim_start_matches('/').replace('/', "."), display(&path));
                // Of a refused object only what it is refused for is of interest.
                let kind_of = without_indices(&path);
                let is_said = is_refused || findings.iter().any(|finding| names(finding, &field));
                if is_said || ELSEWHERE.contains(&&*kind_of) {
                    self.effective.insert(kind_of);
                    continue;
                }
                let mut without = objects.to_vec();
                remove(without[index].pointer_mut(self.section).unwrap(), &path);
                if Outcome::of(&without).told == whole.told {
                    self.silent.push((kind_of, format!("{name}: {field}")));
                } else {
                    self.effective.insert(kind_of);
                }
            }
        }
    }

    fn finish(mut self) {
        let kind = self.kind;
        // A value may happen to be what holds anyway; each field must have an effect at one place.
        self.silent.retain(|(kind_of, _)| !self.effective.contains(kind_of));
        assert_eq!(self.silent, [], "fields of {kind} without any effect or finding");
        let borrows = matches!(kind, "Sidecar" | "IstioOperator");
        let own = self.fields.take().into_iter().filter(|(owner, _)| !borrows || !BORROWED.contains(&&**owner));
        let unset: Vec<String> = own.flat_map(|(owner, of)| of.unset(&owner)).collect();
        assert_eq!(unset, Vec::<String>::new(), "fields of {kind} that fields/*.yaml does not set");
    }
}

/// A refused object names a field of its own as the reason, never just itself.
fn refused_for_what_they_say(kind: &str, objects: &[Value], whole: &Outcome) {
    for object in objects.iter().filter(|object| object["kind"] == kind && object.pointer(WALKED).is_some()) {
        let name = object["metadata"]["name"].as_str().unwrap();
        let errors: Vec<&Finding> =
            whole.findings_on(kind, name).filter(|finding| finding.severity == Severity::Error).collect();
        assert!(name != "refused" || !errors.is_empty(), "{kind} {name} is not refused");
        for path in leaves(&object["spec"]).into_iter().filter(|_| name == "refused") {
            let field = format!("spec{}", display(&path));
            let expected =
                ["targetRef", "caCrl", "verifyCertificate", "targetPort", "tlsCertificates[0].caCertificates"];
            if expected.iter().any(|part| field.contains(part)) {
                assert!(errors.iter().any(|finding| names(finding, &field)), "{kind} {name}: nothing about {field}");
            }
        }
    }
}

fn documents(yaml: &str) -> Vec<Value> {
    let parts = yaml.split("\n---\n");
    parts.map(|text| serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"))).collect()
}

/// A finding about a field is also one about what stands inside it.
fn names(finding: &Finding, field: &str) -> bool {
    let counts = finding.severity == Severity::Error || &*finding.code == "LAT0003";
    let inside = |rest: &str| rest.is_empty() || rest.starts_with(['.', '[']);
    counts && !finding.field.is_empty() && field.strip_prefix(&*finding.field).is_some_and(inside)
}

/// What every proxy is told, and what is said about the objects.
struct Outcome {
    told: Vec<Vec<(String, Vec<u8>)>>,
    findings: Vec<Finding>,
}

impl Outcome {
    fn of(objects: &[Value]) -> Self {
        let mut set = api::ConfigSet::default();
        let mut findings = Vec::new();
        for (index, value) in objects.iter().enumerate() {
            let (object, said) = api::from_json(value);
            findings.extend(said);
            if let Some(mut object) = object {
                object.meta.created = i64::try_from(index).unwrap();
                set.apply(&api::Change::Upsert(Arc::new(object)));
            }
        }
        let (snapshot, together) = MeshSnapshot::next(None, &set);
        findings.extend(together);
        let mut told = Vec::new();
        for view in views() {
            let compiled = compile::compile(&snapshot, &view);
            findings.extend(compiled.findings.iter().cloned());
            let packed = compiled.packed();
            let refused = explain::vet_packed(&view, &packed);
            assert_eq!(refused, [], "our own proxy takes all that is compiled");
            told.push(packed.into_iter().map(|resource| (resource.name, resource.any.value)).collect());
        }
        Self { told, findings }
    }

    fn findings_on<'a>(&'a self, kind: &'a str, name: &'a str) -> impl Iterator<Item = &'a Finding> {
        let is_it = move |object: &types::ObjectRef| &*object.kind == kind && &*object.name == name;
        self.findings.iter().filter(move |finding| finding.object.as_ref().is_some_and(is_it))
    }
}

fn views() -> Vec<View> {
    let sidecar = |namespace: &str, name: &str, ip: [u8; 4], labels: &[(&str, &str)]| {
        let mut view = View::sidecar(namespace, name, ip.into());
        view.labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        view.locality = mesh::locality_of(&view.labels);
        view
    };
    let gateway = sidecar("shop", "gateway", [10, 1, 0, 8], &[("istio", "ingressgateway")]);
    vec![
        sidecar("shop", "client", [10, 1, 0, 9], &[("app", "client"), ("istio-locality", "east.a.1")]),
        sidecar("shop", "reviews-v1", [10, 1, 0, 1], &[("app", "reviews"), ("version", "v1")]),
        sidecar("other", "stranger", [10, 1, 0, 7], &[("app", "stranger")]),
        View { kind: ProxyKind::Router, ..gateway },
    ]
}

#[derive(Clone, PartialEq)]
enum Step {
    Key(String),
    Index(usize),
}

fn display(path: &[Step]) -> String {
    path.iter()
        .map(|step| match step {
            Step::Key(key) => format!(".{key}"),
            Step::Index(index) => format!("[{index}]"),
        })
        .collect()
}

/// Fields whose effect is not in what proxies are told: those that only name what they stand in, how
/// long the control plane waits for keys, what injection gives to pods, where the control plane is
/// (the local mesh knows), and the metrics that every proxy has.
const ELSEWHERE: [&str; 13] = [
    ".egress.port.name",
    ".ingress.port.name",
    ".servers.name",
    ".jwtRules.timeout",
    ".defaultConfig.binaryPath",
    ".defaultConfig.concurrency",
    ".defaultConfig.discoveryAddress",
    ".defaultConfig.drainDuration",
    ".defaultConfig.holdApplicationUntilProxyStarts",
    ".defaultConfig.proxyMetadata.A",
    ".defaultConfig.terminationDrainDuration",
    ".defaultProviders.metrics",
    ".extensionProviders.prometheus",
];

/// Types in a Sidecar or in meshConfig that the cases of the other kinds set in full.
const BORROWED: [&str; 10] = [
    "HttpPoolSettings",
    "HttpRetry",
    "LabelSelector",
    "LocalityLbSetting",
    "OutlierDetection",
    "Port",
    "Selector",
    "ServerTlsSettings",
    "TcpKeepalive",
    "TcpPoolSettings",
];

fn without_indices(path: &[Step]) -> String {
    let keys = path.iter().filter_map(|step| match step {
        Step::Key(key) => Some(format!(".{key}")),
        Step::Index(_) => None,
    });
    keys.collect()
}

/// Paths of all fields that hold no further fields. A list of plain values is one.
fn leaves(value: &Value) -> Vec<Vec<Step>> {
    let below = |step: Step, value: &Value| -> Vec<Vec<Step>> {
        let with = |rest: Vec<Step>| [vec![step.clone()], rest].concat();
        leaves(value).into_iter().map(with).collect()
    };
    match value {
        Value::Object(entries) if !entries.is_empty() => {
            entries.iter().flat_map(|(key, value)| below(Step::Key(key.clone()), value)).collect()
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            items.iter().enumerate().flat_map(|(index, value)| below(Step::Index(index), value)).collect()
        }
        _ => vec![Vec::new()],
    }
}

fn remove(value: &mut Value, path: &[Step]) {
    match path {
        [Step::Key(last)] => drop(value.as_object_mut().unwrap().remove(last)),
        [Step::Key(key), rest @ ..] => remove(&mut value[key], rest),
        [Step::Index(index), rest @ ..] => remove(&mut value[index], rest),
        [] => {}
    }
}

/// Which fields a type has, and which of them were set.
#[derive(Default)]
struct Fields {
    all: BTreeSet<&'static str>,
    set: BTreeSet<String>,
}

impl Fields {
    fn unset(&self, owner: &str) -> Vec<String> {
        self.all.iter().filter(|field| !self.set.contains(**field)).map(|field| format!("{owner}.{field}")).collect()
    }
}

/// Decodes JSON, and notes each struct's fields.
#[derive(Clone, Copy)]
struct Recorder<'a> {
    value: &'a Value,
    fields: &'a RefCell<BTreeMap<String, Fields>>,
}

impl<'a> Recorder<'a> {
    fn at(self, value: &'a Value) -> Self {
        Self { value, ..self }
    }
}

impl<'de> Deserializer<'de> for Recorder<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(value), _) => visitor.visit_u64(value),
                (_, Some(value)) => visitor.visit_i64(value),
                _ => visitor.visit_f64(number.as_f64().unwrap_or_default()),
            },
            Value::String(text) => visitor.visit_str(text),
            Value::Array(items) => visitor.visit_seq(Items(items.iter(), self)),
            Value::Object(entries) => visitor.visit_map(Entries(entries.iter(), None, self)),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.value.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let text: StrDeserializer<'_, Error> = self.value.as_str().unwrap_or_default().into_deserializer();
        visitor.visit_enum(text)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        {
            let mut all = self.fields.borrow_mut();
            let of = all.entry(name.to_owned()).or_default();
            of.all.extend(fields);
            of.set.extend(self.value.as_object().into_iter().flat_map(|entries| entries.keys().cloned()));
        }
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

struct Items<'a>(std::slice::Iter<'a, Value>, Recorder<'a>);

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Error;

    fn next_element_seed<T: de::DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        let recorder = self.1;
        self.0.next().map(|value| seed.deserialize(recorder.at(value))).transpose()
    }
}

struct Entries<'a>(serde_json::map::Iter<'a>, Option<&'a Value>, Recorder<'a>);

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Error;

    fn next_key_seed<K: de::DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((key, value)) = self.0.next() else { return Ok(None) };
        self.1 = Some(value);
        seed.deserialize(Key(key)).map(Some)
    }

    fn next_value_seed<T: de::DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        let recorder = self.2;
        seed.deserialize(recorder.at(self.1.take().unwrap_or(&Value::Null)))
    }
}

/// A key of a map, which may be a number.
struct Key<'a>(&'a str);

impl<'de> Deserializer<'de> for Key<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.0)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(self.0.parse().map_err(de::Error::custom)?)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u32 u64 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any option newtype_struct enum struct
    }
}
