//! The local mesh's API server without its HTTP: admission, versions, watches.
//!
//! Users' objects come from files and the API; controllers add pods and endpoint slices. Admission
//! is what an API server would do: a bad object or edit is refused with findings, and the last good
//! version stays; a new pod gets its proxy. Users' objects are saved before they count, so that they
//! survive a restart.
//!
//! **Invariants.** The set only holds objects that passed `api`'s checks. Versions only grow. A
//! watcher that falls behind is cut off, never waited for.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value, json};
use tokio::sync::{broadcast, watch};

use api::watch::{Event, EventKind};
use api::{Change, ConfigSet, Kind, Object, Spec};
use types::{Finding, NamespacedName, ObjectRef, Severity};

use crate::state::{StateDir, StateError};

/// Events that a slow watcher may be behind before it is cut off.
const EVENTS_MAX: usize = 4096;
/// Services get addresses of 10.96.1.0/24 and up; the first 256 are for fixed ones (DNS).
const SERVICE_NET: u32 = 0x0a60_0000;
const FIRST_SERVICE: u32 = 256;
const LAST_SERVICE: u32 = 65_534;
/// Pods that one deployment may ask of one machine.
const REPLICAS_MAX: u32 = 1000;
/// Namespaces that stay whatever is deleted, as in Kubernetes.
const PERMANENT: [&str; 2] = ["default", "kube-system"];

/// Where an object came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// A manifest that is watched: gone from it, gone from the mesh.
    File(Arc<str>),
    /// `lateen apply` and the like.
    Api,
    /// Made by the mesh itself; not saved.
    Controller,
}

/// What became of one object of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It is new.
    Created,
    /// It changed.
    Configured,
    /// It is as it was.
    Unchanged,
    /// It is gone, or going.
    Deleted,
    /// It was not admitted; the last good version, if any, stays.
    Refused,
}

/// What became of one object of a request, and what there is to say.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// Which; `None` when the document did not say.
    pub object: Option<ObjectRef>,
    /// What became of it.
    pub action: Action,
    /// Warnings, or why it was refused.
    pub findings: Vec<Finding>,
}

/// How a document is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// As `kubectl apply`: fields that others set stay.
    Apply,
    /// The document is the whole object.
    Replace,
}

/// One event of a watch.
#[derive(Clone, Debug)]
pub struct StoreEvent {
    /// Added, modified or deleted.
    pub kind: EventKind,
    /// The object, its last state when deleted.
    pub object: Arc<Object>,
}

impl StoreEvent {
    /// The event as it crosses the wire.
    pub fn to_wire(&self) -> Event {
        Event::new(self.kind, Arc::clone(&self.object.raw))
    }
}

/// All objects at one moment, and what happens next.
#[derive(Debug)]
pub struct Subscription {
    /// The objects at the moment of subscribing.
    pub objects: ConfigSet,
    /// The version they are at.
    pub version: u64,
    /// What happens from then on, without a gap; lags when the subscriber is too slow.
    pub events: broadcast::Receiver<StoreEvent>,
}

type Applied = BTreeMap<(Kind, NamespacedName), (Arc<Value>, Origin)>;

#[derive(Clone, Default, Debug)]
struct Inner {
    objects: ConfigSet,
    /// The last applied document of users' objects, and its origin.
    applied: Arc<Applied>,
    version: u64,
}

/// The objects of the mesh.
#[derive(Debug)]
pub struct Store {
    inner: Mutex<Inner>,
    state: Option<StateDir>,
    events: broadcast::Sender<StoreEvent>,
    version: watch::Sender<u64>,
}

impl Store {
    /// A store without a folder: nothing survives it.
    pub fn in_memory() -> Self {
        Self::with(Inner::default(), None)
    }

    /// The store of a folder, with what was saved in it. Findings name what is no longer admitted.
    pub fn open(state: StateDir) -> Result<(Self, Vec<Finding>), StateError> {
        let mut inner = Inner::default();
        let mut findings = Vec::new();
        if let Some(saved) = state.load()? {
            let list = saved.get("objects").and_then(Value::as_array).cloned().unwrap_or_default();
            inner.version = saved.get("version").and_then(Value::as_u64).unwrap_or_default();
            for mut entry in list {
                // What ran then does not run now.
                set_or_remove(&mut entry["live"], "status", None);
                let (object, said) = api::from_json(&entry["live"]);
                findings.extend(said.into_iter().filter(|finding| finding.severity == Severity::Error));
                let Some(object) = object else { continue };
                let origin = match entry["file"].as_str() {
                    Some(file) => Origin::File(file.into()),
                    None => Origin::Api,
                };
                let applied = Arc::new(entry["applied"].clone());
                Arc::make_mut(&mut inner.applied).insert((object.kind, object.key()), (applied, origin));
                inner.objects.apply(&Change::Upsert(Arc::new(object)));
            }
        }
        Ok((Self::with(inner, Some(state)), findings))
    }

    fn with(inner: Inner, state: Option<StateDir>) -> Self {
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let (version, _) = watch::channel(inner.version);
        Self { inner: Mutex::new(inner), state, events, version }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All objects now.
    pub fn objects(&self) -> ConfigSet {
        self.lock().objects.clone()
    }

    /// All objects now and every change after.
    pub fn subscribe(&self) -> Subscription {
        let inner = self.lock();
        Subscription { objects: inner.objects.clone(), version: inner.version, events: self.events.subscribe() }
    }

    /// Wakes with every change.
    pub fn version(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// The file an object came from, if it came from one.
    pub fn file_of(&self, kind: Kind, key: &NamespacedName) -> Option<Arc<str>> {
        match self.lock().applied.get(&(kind, key.clone())) {
            Some((_, Origin::File(file))) => Some(Arc::clone(file)),
            _ => None,
        }
    }

    /// Objects that came from files.
    pub fn of_files(&self) -> Vec<(Kind, NamespacedName, Arc<str>)> {
        let inner = self.lock();
        let files = inner.applied.iter().filter_map(|((kind, key), (_, origin))| match origin {
            Origin::File(file) => Some((*kind, key.clone(), Arc::clone(file))),
            _ => None,
        });
        files.collect()
    }

    /// Takes documents one by one, as an API server would; all or none are saved. Those that decide how
    /// others are admitted come first, wherever they stand; outcomes are in the order of `documents`.
    pub fn apply(
        &self,
        documents: Vec<(Value, Origin)>,
        mode: Mode,
        dry_run: bool,
    ) -> Result<Vec<Outcome>, StateError> {
        let mut inner = self.lock();
        let mut draft = Draft { next: inner.clone(), events: Vec::new(), is_saved: false };
        let mut numbered: Vec<_> = documents.into_iter().enumerate().collect();
        numbered.sort_by_key(|(_, (document, _))| !steers_admission(document));
        let take = |(at, (document, origin)): (usize, (Value, Origin))| (at, draft.take(&document, origin, mode));
        let mut outcomes: Vec<(usize, Outcome)> = numbered.into_iter().map(take).collect();
        outcomes.sort_by_key(|(at, _)| *at);
        if !dry_run {
            self.commit(&mut inner, draft)?;
        }
        Ok(outcomes.into_iter().map(|(_, outcome)| outcome).collect())
    }

    /// Removes an object; a pod is marked and goes when its containers ended. A namespace takes
    /// everything in it along, but for those that [are permanent](is_permanent): they only lose what
    /// the user wrote about them.
    pub fn delete(&self, kind: Kind, key: &NamespacedName) -> Result<Action, StateError> {
        let mut inner = self.lock();
        let mut draft = Draft { next: inner.clone(), events: Vec::new(), is_saved: false };
        let action = draft.delete(kind, key);
        self.commit(&mut inner, draft)?;
        Ok(action)
    }

    /// [Removes](Self::delete) several objects as one change: all or none.
    pub fn delete_all(&self, wanted: &[(Kind, NamespacedName)]) -> Result<(), StateError> {
        let mut inner = self.lock();
        let mut draft = Draft { next: inner.clone(), events: Vec::new(), is_saved: false };
        for (kind, key) in wanted {
            draft.delete(*kind, key);
        }
        self.commit(&mut inner, draft)
    }

    /// Removes a pod that has ended.
    pub fn remove_pod(&self, key: &NamespacedName) {
        let mut inner = self.lock();
        let mut draft = Draft { next: inner.clone(), events: Vec::new(), is_saved: false };
        draft.remove(Kind::Pod, key);
        // Controllers' objects are not saved, so nothing can fail.
        drop(self.commit(&mut inner, draft));
    }

    /// Writes an object of a controller. Returns whether anything changed.
    pub fn put(&self, document: &Value) -> Result<bool, Vec<Finding>> {
        let mut inner = self.lock();
        let mut draft = Draft { next: inner.clone(), events: Vec::new(), is_saved: false };
        let outcome = draft.take(document, Origin::Controller, Mode::Replace);
        if outcome.action == Action::Refused {
            return Err(outcome.findings);
        }
        drop(self.commit(&mut inner, draft));
        Ok(outcome.action != Action::Unchanged)
    }

    /// Changes a live object in place (status, scale, labels). `None` when there is no such object.
    pub fn patch(
        &self,
        kind: Kind,
        key: &NamespacedName,
        change: impl FnOnce(&mut Value),
    ) -> Result<Option<Outcome>, StateError> {
        let mut inner = self.lock();
        let Some(live) = inner.objects.find(kind, key) else { return Ok(None) };
        let mut document = (*live.raw).clone();
        change(&mut document);
        if document == *live.raw {
            let outcome = Outcome { object: Some(live.reference()), action: Action::Unchanged, findings: Vec::new() };
            return Ok(Some(outcome));
        }
        let mut draft = Draft { next: inner.clone(), events: Vec::new(), is_saved: false };
        let outcome = draft.patch(kind, key, document);
        self.commit(&mut inner, draft)?;
        Ok(Some(outcome))
    }

    fn commit(&self, inner: &mut Inner, draft: Draft) -> Result<(), StateError> {
        if draft.events.is_empty() && !draft.is_saved {
            return Ok(());
        }
        if draft.is_saved
            && let Some(state) = &self.state
        {
            state.save(&draft.next.to_saved())?;
        }
        *inner = draft.next;
        for event in draft.events {
            // Nobody listening is fine.
            drop(self.events.send(event));
        }
        self.version.send_replace(inner.version);
        Ok(())
    }
}

impl Inner {
    fn to_saved(&self) -> Value {
        let of_users = self.applied.iter().filter_map(|((kind, key), (applied, origin))| {
            let live = self.objects.find(*kind, key)?;
            let file = match origin {
                Origin::File(file) => Some(&**file),
                Origin::Api => None,
                Origin::Controller => return None,
            };
            Some(json!({"live": &*live.raw, "applied": applied, "file": file}))
        });
        json!({"version": self.version, "objects": of_users.collect::<Vec<_>>()})
    }
}

/// The next state, not yet committed.
struct Draft {
    next: Inner,
    events: Vec<StoreEvent>,
    /// Whether users' objects changed.
    is_saved: bool,
}

impl Draft {
    fn take(&mut self, document: &Value, origin: Origin, mode: Mode) -> Outcome {
        let (object, mut findings) = api::from_json(document);
        let Some(object) = object else {
            let object = findings.iter().find_map(|finding| finding.object.clone());
            return Outcome { object, action: Action::Refused, findings };
        };
        let (kind, key, reference) = (object.kind, object.key(), object.reference());
        let from_user = origin != Origin::Controller;
        if from_user && kind.is_namespaced() {
            self.ensure_namespace(&key.namespace);
        }
        let live = self.next.objects.find(kind, &key).cloned();
        if kind == Kind::Pod && from_user && live.as_ref().is_some_and(|live| live.meta.deleted) {
            let message = "the pod of this name is still ending".to_owned();
            findings.push(*refusal(&object, "", message, "apply it again once it is gone; files do so by themselves"));
            return Outcome { object: Some(reference), action: Action::Refused, findings };
        }
        let before = self.next.applied.get(&(kind, key.clone()));
        if live.is_some()
            && matches!(&origin, Origin::File(_))
            && before.is_some_and(|(doc, from)| **doc == *object.raw && *from == origin)
        {
            // The file says what it said before: what was scaled or labelled since stays.
            return Outcome { object: Some(reference), action: Action::Unchanged, findings };
        }
        let last = before.map(|(applied, _)| Arc::clone(applied));
        // A pod that nothing runs of yet is made anew with what is asked for now.
        let live = live.filter(|live| {
            kind != Kind::Pod || !live.raw["status"].is_null() || keeps_spec(&object, live, last.as_deref())
        });
        let mut next = match (&live, mode) {
            (Some(live), Mode::Apply) => merge(last.as_deref().unwrap_or(&Value::Null), &object.raw, &live.raw),
            _ => (*object.raw).clone(),
        };
        if from_user {
            let status = live.as_ref().and_then(|live| live.raw.get("status").cloned());
            set_or_remove(&mut next, "status", status);
        }
        let filled = match kind {
            Kind::Service => self.fill_service(&object, live.as_deref(), &mut next),
            Kind::Pod => self.fill_pod(&object, live.as_deref(), last.as_deref(), &mut next),
            Kind::Deployment => fits_the_machine(&object),
            Kind::ConfigMap | Kind::Secret => live.as_deref().map_or(Ok(()), |live| keeps_contents(live, &next)),
            _ => Ok(()),
        };
        if let Err(finding) = filled {
            findings.push(*finding);
            return Outcome { object: Some(reference), action: Action::Refused, findings };
        }
        if from_user {
            let entry = (Arc::clone(&object.raw), origin);
            let changed = self.next.applied.get(&(kind, key.clone())) != Some(&entry);
            self.is_saved |= changed;
            if changed {
                Arc::make_mut(&mut self.next.applied).insert((kind, key), entry);
            }
        }
        match self.admit(kind, live.as_deref(), next) {
            Ok(action) => Outcome { object: Some(reference), action, findings },
            Err(said) => Outcome { object: Some(reference), action: Action::Refused, findings: said },
        }
    }

    fn patch(&mut self, kind: Kind, key: &NamespacedName, document: Value) -> Outcome {
        let live = self.next.objects.find(kind, key).cloned();
        let reference = live.as_ref().map(|live| live.reference());
        let of_user = self.next.applied.contains_key(&(kind, key.clone()));
        match self.admit(kind, live.as_deref(), document) {
            Ok(action) => {
                self.is_saved |= of_user && action != Action::Unchanged;
                Outcome { object: reference, action, findings: Vec::new() }
            }
            Err(findings) => Outcome { object: reference, action: Action::Refused, findings },
        }
    }

    /// Checks the whole object once more, as it will be, and gives it its versions.
    fn admit(&mut self, kind: Kind, live: Option<&Object>, mut next: Value) -> Result<Action, Vec<Finding>> {
        let Some(meta) = next.get_mut("metadata").and_then(Value::as_object_mut) else {
            return Err(Vec::new());
        };
        match live {
            Some(live) => {
                for name in ["uid", "creationTimestamp", "resourceVersion", "generation"] {
                    match live.raw["metadata"].get(name) {
                        Some(value) => drop(meta.insert(name.to_owned(), value.clone())),
                        None => drop(meta.remove(name)),
                    }
                }
                if next == *live.raw {
                    return Ok(Action::Unchanged);
                }
                let spec_changed =
                    without(&next, &["metadata", "status"]) != without(&live.raw, &["metadata", "status"]);
                let generation = live.meta.generation + u64::from(spec_changed);
                next["metadata"]["generation"] = generation.into();
            }
            None => {
                meta.insert("uid".to_owned(), uid().into());
                meta.insert("creationTimestamp".to_owned(), now().into());
                meta.insert("generation".to_owned(), 1.into());
            }
        }
        self.next.version += 1;
        next["metadata"]["resourceVersion"] = self.next.version.to_string().into();
        let (object, findings) = api::from_json(&next);
        let Some(object) = object else {
            return Err(findings);
        };
        debug_assert_eq!(object.kind, kind);
        fits_the_machine(&object).map_err(|finding| vec![*finding])?;
        let object = Arc::new(object);
        self.next.objects.apply(&Change::Upsert(Arc::clone(&object)));
        let (kind, action) = match live {
            Some(_) => (EventKind::Modified, Action::Configured),
            None => (EventKind::Added, Action::Created),
        };
        self.events.push(StoreEvent { kind, object });
        Ok(action)
    }

    fn ensure_namespace(&mut self, name: &str) {
        if self.next.objects.find(Kind::Namespace, &NamespacedName::new("", name)).is_some() {
            return;
        }
        let document = plain_namespace(name);
        if self.admit(Kind::Namespace, None, document.clone()).is_ok() {
            let key = (Kind::Namespace, NamespacedName::new("", name));
            Arc::make_mut(&mut self.next.applied).insert(key, (Arc::new(document), Origin::Api));
            self.is_saved = true;
        }
    }

    /// Gives a new pod its proxy; a pod that is there keeps what it runs.
    ///
    /// *Source*: Kubernetes refuses edits of a pod's `spec`, but for a few fields that no local program
    /// knows; Istio's webhook is asked when a pod is made and never again.
    fn fill_pod(
        &self,
        object: &Object,
        live: Option<&Object>,
        last: Option<&Value>,
        next: &mut Value,
    ) -> Result<(), Box<Finding>> {
        let Some(live) = live else {
            *next = crate::inject::admitted(object, &self.next.objects);
            // Account and node, as Kubernetes' admission and scheduler write them.
            if let (Some(spec), Spec::Pod(pod)) = (next["spec"].as_object_mut(), &object.spec) {
                spec.insert("serviceAccountName".to_owned(), pod.spec.account().into());
                spec.insert("nodeName".to_owned(), crate::controller::NODE_NAME.into());
            }
            return Ok(());
        };
        if !keeps_spec(object, live, last) {
            let message = "the spec of a pod cannot be changed".to_owned();
            return Err(refusal(object, "spec", message, "delete the pod first, or let a Deployment replace it"));
        }
        set_or_remove(next, "spec", live.raw.get("spec").cloned());
        Ok(())
    }

    /// Gives a service its address; keeps the one it has.
    fn fill_service(&self, object: &Object, live: Option<&Object>, next: &mut Value) -> Result<(), Box<Finding>> {
        let Spec::Service(service) = &object.spec else { return Ok(()) };
        if service.spec.is_headless() || service.spec.kind == "ExternalName" {
            return Ok(());
        }
        let had =
            live.and_then(|live| live.raw["spec"]["clusterIP"].as_str()).filter(|ip| !ip.is_empty() && *ip != "None");
        let wanted = Some(service.spec.cluster_ip.as_str()).filter(|ip| !ip.is_empty());
        let taken: Vec<(&str, NamespacedName)> = self
            .next
            .objects
            .all::<api::k8s::Service>()
            .filter(|(other, _)| other.key() != object.key())
            .map(|(other, service)| (service.spec.cluster_ip.as_str(), other.key()))
            .collect();
        let refuse = |message: String, hint: &str| refusal(object, "spec.clusterIP", message, hint);
        let ip = match (wanted, had) {
            (Some(wanted), Some(had)) if wanted != had => {
                return Err(refuse(
                    format!("the address {had} cannot be changed"),
                    "delete the service first, or leave clusterIP out",
                ));
            }
            (Some(wanted), _) => {
                if let Some((_, owner)) = taken.iter().find(|(ip, _)| *ip == wanted) {
                    return Err(refuse(
                        format!("the address {wanted} belongs to Service {owner}"),
                        "leave clusterIP out",
                    ));
                }
                wanted.to_owned()
            }
            (None, Some(had)) => had.to_owned(),
            (None, None) => {
                // Spread by name, so that a service usually has the same address in every run.
                let seed = object
                    .key()
                    .to_string()
                    .bytes()
                    .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
                let room = LAST_SERVICE - FIRST_SERVICE;
                let free = (0..room)
                    .map(|step| Ipv4Addr::from(SERVICE_NET + FIRST_SERVICE + (seed % room + step) % room).to_string())
                    .find(|ip| !taken.iter().any(|(other, _)| other == ip));
                free.ok_or_else(|| refuse("no service address is free".to_owned(), "delete services"))?
            }
        };
        next["spec"]["clusterIP"] = ip.clone().into();
        next["spec"]["clusterIPs"] = json!([ip]);
        Ok(())
    }

    fn delete(&mut self, kind: Kind, key: &NamespacedName) -> Action {
        let Some(live) = self.next.objects.find(kind, key).cloned() else { return Action::Unchanged };
        match kind {
            Kind::Pod => {
                if !live.meta.deleted {
                    let mut document = (*live.raw).clone();
                    document["metadata"]["deletionTimestamp"] = now().into();
                    self.forget(kind, key);
                    self.patch(kind, key, document);
                }
            }
            Kind::Namespace if is_permanent(kind, &key.name) => {
                self.forget(kind, key);
                drop(self.admit(kind, Some(&*live), plain_namespace(&key.name)));
                return Action::Configured;
            }
            Kind::Namespace => {
                let inside: Vec<(Kind, NamespacedName)> = self
                    .next
                    .objects
                    .iter()
                    .filter(|o| o.meta.namespace == key.name)
                    .map(|o| (o.kind, o.key()))
                    .collect();
                for (kind, key) in inside {
                    self.delete(kind, &key);
                }
                self.remove(kind, key);
            }
            _ => self.remove(kind, key),
        }
        Action::Deleted
    }

    /// A user's object is no longer wanted.
    fn forget(&mut self, kind: Kind, key: &NamespacedName) {
        let entry = (kind, key.clone());
        if self.next.applied.contains_key(&entry) {
            Arc::make_mut(&mut self.next.applied).remove(&entry);
            self.is_saved = true;
        }
    }

    fn remove(&mut self, kind: Kind, key: &NamespacedName) {
        self.forget(kind, key);
        let Some(live) = self.next.objects.find(kind, key).cloned() else { return };
        self.next.version += 1;
        self.next.objects.apply(&Change::Delete(live.reference()));
        // The last state under the number of the deletion, as an API server sends it: a watcher that
        // waits for a version sees it pass.
        let mut last = (*live.raw).clone();
        last["metadata"]["resourceVersion"] = self.next.version.to_string().into();
        let object = Arc::new(Object { raw: Arc::new(last), ..(*live).clone() });
        self.events.push(StoreEvent { kind: EventKind::Deleted, object });
    }
}

/// What is `immutable` stays as it is until it is deleted.
fn keeps_contents(live: &Object, next: &Value) -> Result<(), Box<Finding>> {
    if live.raw["immutable"] != true {
        return Ok(());
    }
    let mut fields = ["data", "binaryData", "stringData", "immutable"].into_iter();
    let Some(changed) = fields.find(|field| live.raw[field] != next[field]) else { return Ok(()) };
    let message = format!("{changed} cannot be changed: the object is immutable");
    Err(refusal(live, changed, message, "delete it first, or write another one of another name"))
}

/// A cluster would leave the pods that no machine has room for waiting; this one machine would make them.
fn fits_the_machine(object: &Object) -> Result<(), Box<Finding>> {
    let Spec::Deployment(deployment) = &object.spec else { return Ok(()) };
    if deployment.spec.replicas.is_none_or(|replicas| replicas <= REPLICAS_MAX) {
        return Ok(());
    }
    let message = format!("one machine runs at most {REPLICAS_MAX} pods of a deployment");
    Err(refusal(object, "spec.replicas", message, ""))
}

/// Whether this is a namespace that nobody can delete.
///
/// *Source*: Kubernetes' admission `NamespaceLifecycle`.
pub fn is_permanent(kind: Kind, name: &str) -> bool {
    kind == Kind::Namespace && PERMANENT.contains(&name)
}

fn plain_namespace(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}}})
}

fn refusal(object: &Object, field: &str, message: String, hint: &str) -> Box<Finding> {
    Box::new(Finding {
        code: api::codes::SCHEMA.into(),
        severity: Severity::Error,
        object: Some(object.reference()),
        field: field.into(),
        position: None,
        message: message.into(),
        hint: hint.into(),
    })
}

/// Whether a pod is asked to be what it was asked to be before: what the user wrote then is in `last`,
/// and the pod itself carries more since it was admitted.
fn keeps_spec(object: &Object, live: &Object, last: Option<&Value>) -> bool {
    object.raw["spec"] == last.unwrap_or(&live.raw)["spec"]
}

/// Whether admission of other objects looks at this one: what a namespace and the mesh's settings say
/// about injection.
fn steers_admission(document: &Value) -> bool {
    let kind = document["kind"].as_str().and_then(Kind::parse);
    matches!(kind, Some(Kind::Namespace | Kind::IstioOperator))
}

/// Three-way merge of maps: what `last` had and `next` has not goes, what others set stays. Lists
/// are replaced whole.
fn merge(last: &Value, next: &Value, live: &Value) -> Value {
    let (Value::Object(next), Value::Object(live)) = (next, live) else { return next.clone() };
    let empty = Map::new();
    let last = last.as_object().unwrap_or(&empty);
    let mut merged = live.clone();
    for key in last.keys().filter(|key| !next.contains_key(*key)) {
        merged.remove(key);
    }
    for (key, value) in next {
        let value = merge(last.get(key).unwrap_or(&Value::Null), value, live.get(key).unwrap_or(&Value::Null));
        merged.insert(key.clone(), value);
    }
    Value::Object(merged)
}

fn without(value: &Value, keys: &[&str]) -> Value {
    let mut value = value.clone();
    if let Some(map) = value.as_object_mut() {
        map.retain(|key, _| !keys.contains(&key.as_str()));
    }
    value
}

fn set_or_remove(value: &mut Value, key: &str, set: Option<Value>) {
    if let Some(map) = value.as_object_mut() {
        match set {
            Some(set) => drop(map.insert(key.to_owned(), set)),
            None => drop(map.remove(key)),
        }
    }
}

/// The time as objects carry it: whole seconds, UTC.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system's random numbers are there");
    bytes
}

fn uid() -> String {
    let mut bytes: [u8; 16] = random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(text: &str) -> Vec<(Value, Origin)> {
        let read = api::parse_documents("t.yaml", text);
        assert!(!read.has_errors(), "{:?}", read.findings);
        read.objects.into_iter().map(|o| ((*o.object.raw).clone(), Origin::Api)).collect()
    }

    fn apply(store: &Store, text: &str) -> Vec<Action> {
        store.apply(documents(text), Mode::Apply, false).unwrap().into_iter().map(|o| o.action).collect()
    }

    const SERVICE: &str =
        "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: shop}\nspec: {ports: [{port: 80}]}\n";

    #[test]
    fn some_namespaces_stay() {
        let store = Store::in_memory();
        apply(&store, "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {a: b}}\n");
        apply(&store, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\n");
        let key = NamespacedName::new("", "default");
        let labels = || store.objects().find(Kind::Namespace, &key).map(|namespace| namespace.meta.labels.len());
        assert_eq!(store.delete(Kind::Namespace, &key).unwrap(), Action::Configured);
        assert_eq!(labels(), Some(1), "only what the user wrote is gone");
        assert!(store.objects().find(Kind::ConfigMap, &NamespacedName::new("default", "c")).is_some());
    }

    #[test]
    fn a_deployment_asks_for_what_a_machine_can_run() {
        let store = Store::in_memory();
        let with = |replicas: u32| {
            format!(
                "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: d}}\nspec: {{replicas: {replicas}, selector: {{matchLabels: {{a: b}}}}, template: {{metadata: {{labels: {{a: b}}}}, spec: {{containers: [{{name: c, image: i}}]}}}}}}\n"
            )
        };
        assert_eq!(apply(&store, &with(1001)), [Action::Refused]);
        assert_eq!(apply(&store, &with(1000)), [Action::Created]);
        let key = NamespacedName::new("default", "d");
        let scaled = store.patch(Kind::Deployment, &key, |raw| raw["spec"]["replicas"] = json!(4_000_000_000_u32));
        let scaled = scaled.unwrap().unwrap();
        assert_eq!(scaled.action, Action::Refused);
        assert!(scaled.findings[0].message.contains("at most 1000 pods"), "{:?}", scaled.findings);
    }

    #[test]
    fn what_is_immutable_stays_until_it_is_deleted() {
        for kind in ["ConfigMap", "Secret"] {
            let store = Store::in_memory();
            let with = |value: &str, more: &str| {
                format!(
                    "apiVersion: v1\nkind: {kind}\nmetadata: {{name: c, labels: {{l: {value}}}}}\ndata: {{k: {value}}}\n{more}"
                )
            };
            assert_eq!(apply(&store, &with("aaaa", "")), [Action::Created]);
            assert_eq!(apply(&store, &with("bbbb", "immutable: true")), [Action::Configured]);
            let refused = store.apply(documents(&with("cccc", "immutable: true")), Mode::Apply, false).unwrap();
            assert_eq!(refused[0].action, Action::Refused);
            assert_eq!(&*refused[0].findings[0].field, "data");
            assert_eq!(apply(&store, &with("bbbb", "")), [Action::Refused], "for good");
            assert_eq!(apply(&store, &with("cccc", "immutable: true")), [Action::Refused], "and again");
            let key = NamespacedName::new("default", "c");
            let found = Kind::parse(kind).unwrap();
            assert_eq!(store.objects().find(found, &key).unwrap().raw["data"]["k"], "bbbb");
            let relabelled = with("bbbb", "immutable: true").replace("{l: bbbb}", "{l: other}");
            assert_eq!(apply(&store, &relabelled), [Action::Configured]);
            store.delete(found, &key).unwrap();
            assert_eq!(apply(&store, &with("cccc", "immutable: true")), [Action::Created]);
        }
    }

    #[test]
    fn services_get_an_address_once() {
        let store = Store::in_memory();
        assert_eq!(apply(&store, SERVICE), [Action::Created]);
        let ip =
            |store: &Store| store.objects().get::<api::k8s::Service>("shop", "a").unwrap().1.spec.cluster_ip.clone();
        let first = ip(&store);
        assert!(first.starts_with("10.96."), "{first}");
        assert_eq!(apply(&store, SERVICE), [Action::Unchanged]);
        assert_eq!(apply(&store, &SERVICE.replace("80", "81")), [Action::Configured]);
        assert_eq!(ip(&store), first);
        let taken = SERVICE.replace("name: a", "name: b").replace("spec: {", &format!("spec: {{clusterIP: {first}, "));
        assert_eq!(apply(&store, &taken), [Action::Refused]);
        assert!(store.objects().find(Kind::Namespace, &NamespacedName::new("", "shop")).is_some());
    }

    #[test]
    fn what_others_set_stays_what_the_file_drops_goes() {
        let store = Store::in_memory();
        let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, labels: {a: b, c: d}}\nspec: {selector: {matchLabels: {x: z}}, template: {metadata: {labels: {x: z}}, spec: {containers: [{name: c, image: i}]}}}\n";
        apply(&store, deployment);
        let key = NamespacedName::new("default", "d");
        store.patch(Kind::Deployment, &key, |d| d["spec"]["replicas"] = 3.into()).unwrap().unwrap();
        assert_eq!(apply(&store, &deployment.replace(", c: d", "")), [Action::Configured]);
        let live = store.objects().find(Kind::Deployment, &key).cloned().unwrap();
        assert_eq!(live.raw["spec"]["replicas"], 3);
        assert!(!live.meta.labels.contains_key("c"));
        assert_eq!(live.meta.generation, 2);
    }

    #[test]
    fn a_bad_edit_leaves_the_last_good_version() {
        let store = Store::in_memory();
        apply(&store, SERVICE);
        let mut bad = documents(SERVICE);
        bad[0].0["spec"]["ports"] = json!("x");
        let outcome = store.apply(bad, Mode::Apply, false).unwrap().remove(0);
        assert_eq!(outcome.action, Action::Refused);
        assert!(outcome.findings[0].message.contains("expected a list"));
        assert!(store.objects().get::<api::k8s::Service>("shop", "a").is_some());
        let dry = store.apply(documents(&SERVICE.replace("80", "99")), Mode::Apply, true).unwrap().remove(0);
        assert_eq!(dry.action, Action::Configured);
        assert_eq!(store.objects().get::<api::k8s::Service>("shop", "a").unwrap().1.spec.ports[0].port, 80);
    }

    #[test]
    fn objects_survive_a_restart_and_a_full_disk_refuses() {
        let folder = std::env::temp_dir().join(format!("lateen-store-{}", std::process::id()));
        drop(std::fs::remove_dir_all(&folder));
        let (store, findings) = Store::open(StateDir::open(&folder).unwrap()).unwrap();
        assert!(findings.is_empty());
        apply(&store, SERVICE);
        let before = store.objects();
        drop(store);
        let (store, _) = Store::open(StateDir::open(&folder).unwrap()).unwrap();
        let service = |set: &ConfigSet| set.get::<api::k8s::Service>("shop", "a").unwrap().0.raw.clone();
        assert_eq!(service(&store.objects()), service(&before));
        // A folder in the place of the file beside makes writing fail for everyone, root too.
        std::fs::create_dir(folder.join("objects.json.new")).unwrap();
        let error = store.apply(documents(&SERVICE.replace("80", "99")), Mode::Apply, false).unwrap_err();
        assert!(error.to_string().contains("nothing was changed"), "{error}");
        assert_eq!(service(&store.objects()), service(&before));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop}\nspec: {containers: [{name: app, image: i}]}\n";
    const INJECTED: &str =
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio-injection: enabled}}\n";

    fn containers(store: &Store) -> Vec<String> {
        let objects = store.objects();
        let (_, pod) = objects.get::<api::k8s::Pod>("shop", "p").unwrap();
        pod.spec.containers.iter().map(|container| container.name.clone()).collect()
    }

    #[test]
    fn a_new_pod_gets_its_proxy_and_keeps_what_it_runs() {
        let store = Store::in_memory();
        // The namespace counts wherever it stands.
        let made = store.apply(documents(&format!("{POD}---\n{INJECTED}")), Mode::Apply, false).unwrap();
        assert_eq!(made[0].object.as_ref().unwrap().kind.as_ref(), "Pod", "in the order of the documents");
        assert_eq!(containers(&store), ["app", "istio-proxy"]);
        let spec = store.objects().find(Kind::Pod, &NamespacedName::new("shop", "p")).unwrap().raw["spec"].clone();
        assert_eq!((&spec["serviceAccountName"], &spec["nodeName"]), (&json!("default"), &json!("lateen")));
        let key = NamespacedName::new("shop", "p");
        store.patch(Kind::Pod, &key, |pod| pod["status"] = json!({"phase": "Running"})).unwrap();
        assert_eq!(apply(&store, POD), [Action::Unchanged]);
        let labelled = POD.replace("namespace: shop", "namespace: shop, labels: {a: b}");
        assert_eq!(apply(&store, &labelled), [Action::Configured]);
        assert_eq!(containers(&store), ["app", "istio-proxy"]);
        let live = store.objects().find(Kind::Pod, &key).cloned().unwrap();
        assert_eq!(
            (live.meta.labels["a"].as_str(), live.meta.labels["security.istio.io/tlsMode"].as_str()),
            ("b", "istio")
        );
        let refused = store.apply(documents(&labelled.replace("image: i", "image: j")), Mode::Apply, false).unwrap();
        assert_eq!((refused[0].action, &*refused[0].findings[0].field), (Action::Refused, "spec"));
        // The label of the namespace is asked when a pod is made, not later.
        apply(&store, &INJECTED.replace("enabled", "disabled"));
        assert_eq!(
            apply(&store, &POD.replace("namespace: shop", "namespace: shop, labels: {c: d}")),
            [Action::Configured]
        );
        assert_eq!(containers(&store), ["app", "istio-proxy"]);
    }

    #[test]
    fn a_pod_of_an_earlier_run_may_change() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Store::open(StateDir::open(folder.path()).unwrap()).unwrap().0;
        let store = open();
        apply(&store, POD);
        let key = NamespacedName::new("shop", "p");
        store.patch(Kind::Pod, &key, |pod| pod["status"] = json!({"phase": "Running"})).unwrap();
        drop(store);
        let store = open();
        let uid = |store: &Store| {
            let pod = store.objects().find(Kind::Pod, &key).cloned().unwrap();
            assert!(pod.raw["status"].is_null(), "nothing runs yet");
            pod.meta.uid.clone()
        };
        let first = uid(&store);
        apply(&store, &POD.replace("image: i", "image: j"));
        assert_ne!(uid(&store), first, "another pod of that name");
    }

    #[test]
    fn a_file_that_says_the_same_changes_nothing() {
        let store = Store::in_memory();
        let of_file = || vec![(documents(SERVICE).remove(0).0, Origin::File("a.yaml".into()))];
        store.apply(of_file(), Mode::Apply, false).unwrap();
        let key = NamespacedName::new("shop", "a");
        store.patch(Kind::Service, &key, |service| service["spec"]["ports"][0]["port"] = 90.into()).unwrap();
        assert_eq!(store.apply(of_file(), Mode::Apply, false).unwrap()[0].action, Action::Unchanged);
        assert_eq!(store.objects().get::<api::k8s::Service>("shop", "a").unwrap().1.spec.ports[0].port, 90);
    }

    #[test]
    fn a_deletion_has_a_version_of_its_own() {
        let store = Store::in_memory();
        apply(&store, SERVICE);
        let mut subscription = store.subscribe();
        assert_eq!(subscription.version, *store.version().borrow());
        store.delete(Kind::Service, &NamespacedName::new("shop", "a")).unwrap();
        let event = subscription.events.try_recv().unwrap();
        let version = *store.version().borrow();
        assert_eq!(version, subscription.version + 1);
        assert_eq!(event.object.raw["metadata"]["resourceVersion"], version.to_string());
    }

    #[test]
    fn watchers_see_everything_once() {
        let store = Store::in_memory();
        apply(&store, SERVICE);
        let mut subscription = store.subscribe();
        apply(&store, &SERVICE.replace("80", "81"));
        store.delete(Kind::Service, &NamespacedName::new("shop", "a")).unwrap();
        let kinds: Vec<EventKind> =
            std::iter::from_fn(|| subscription.events.try_recv().ok()).map(|e| e.kind).collect();
        assert_eq!(kinds, [EventKind::Modified, EventKind::Deleted]);
    }
}
