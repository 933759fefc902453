//! Text or JSON into checked objects.

use std::sync::Arc;

use serde_json::Value;

use types::{Finding, ObjectRef, Position, Severity};

use crate::decode::{InvalidValue, Notes, UnknownField, decode};
use crate::k8s::ObjectMeta;
use crate::kind::{KINDS, Kind, Support, UnknownKind};
use crate::object::{DecodeSpec, Metadata, Object, Typed, decode_spec};
use crate::yaml::{InvalidYaml, Limits, Node, Tree, read};
use crate::{
    codes, known, scalar,
    suggest::nearest,
    validate::{may_be_named, validate},
};

/// Where an object and its fields were written.
#[derive(Clone, Debug)]
pub struct Positions {
    file: Arc<str>,
    root: Arc<Node>,
}

impl Positions {
    /// Where the field at `path` was written; the nearest parent of a field that is not there.
    pub fn at(&self, path: &str) -> Position {
        let (line, column) = self.root.locate(path);
        Position { file: Arc::clone(&self.file), line, column }
    }

    /// Where the object begins.
    pub fn start(&self) -> Position {
        self.at("")
    }
}

/// An object that may be admitted, and where it was written.
#[derive(Clone, Debug)]
pub struct ParsedObject {
    /// The object.
    pub object: Object,
    /// Where its fields were written.
    pub positions: Positions,
}

/// An object that may not be admitted, but is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// Its kind, which a name alone does not always tell.
    pub kind: Kind,
    /// Its kind's name, namespace and name.
    pub object: ObjectRef,
}

/// What a text holds.
#[derive(Clone, Debug, Default)]
pub struct Documents {
    /// Objects that decoded and passed their checks, in the order of the text.
    pub objects: Vec<ParsedObject>,
    /// Objects that cannot be admitted, but are known by kind, namespace and name; `findings` says why.
    /// Their last admitted version stays.
    pub refused: Vec<Refused>,
    /// Everything there is to say, in the order of the text.
    pub findings: Vec<Finding>,
    /// Whether a document does not tell for certain which object it is about (no YAML, an unknown kind or version
    /// of a group that is ours, looks like one of ours or is Istio's, a slip in the metadata): what it held is
    /// unknown, so nothing may be taken as deleted.
    pub is_incomplete: bool,
}

impl Documents {
    /// Whether anything was refused.
    pub fn has_errors(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Error)
    }

    /// The objects, each made after the one before: a text tells no dates, and conflicts go to the
    /// older. Creation counts from 1.
    pub fn one_after_another(self) -> impl Iterator<Item = Object> {
        self.objects.into_iter().zip(1..).map(|(parsed, created)| {
            let mut object = parsed.object;
            object.meta.created = created;
            object
        })
    }
}

/// How to read.
#[derive(Clone, Copy, Debug)]
pub struct ReadOptions<'a> {
    /// The namespace of namespaced objects that name none.
    pub default_namespace: &'a str,
    /// What one text may cost.
    pub limits: Limits,
}

impl Default for ReadOptions<'_> {
    fn default() -> Self {
        Self { default_namespace: "default", limits: Limits::default() }
    }
}

/// Reads all objects of a YAML or JSON text, decodes and checks them one by one.
pub fn parse_documents(file_name: &str, text: &str) -> Documents {
    parse_documents_with(file_name, text, ReadOptions::default())
}

/// [`parse_documents`] with options.
pub fn parse_documents_with(file_name: &str, text: &str, options: ReadOptions<'_>) -> Documents {
    let file: Arc<str> = file_name.into();
    let mut out = Documents::default();
    for document in read(text, options.limits) {
        match document {
            Ok(node) => take(node, &file, options, &mut out),
            Err(InvalidYaml { message, hint, line, column }) => {
                out.is_incomplete = true;
                out.findings.push(Finding {
                    code: codes::SYNTAX.into(),
                    severity: Severity::Error,
                    object: None,
                    field: "".into(),
                    position: Some(Position { file: Arc::clone(&file), line, column }),
                    message: message.into(),
                    hint: hint.into(),
                });
            }
        }
    }
    out
}

/// Takes one document, or the items of a list.
fn take(node: Node, file: &Arc<str>, options: ReadOptions<'_>, out: &mut Documents) {
    if node.get("kind").and_then(Node::as_text) == Some("List") {
        return take_list(node, file, options, out);
    }
    let positions = Positions { file: Arc::clone(file), root: Arc::new(node) };
    let read = read_object(&positions.root, options.default_namespace);
    for mut finding in read.findings {
        finding.position = match finding.position {
            Some(Position { line, column, .. }) if line != 0 => Some(Position { file: Arc::clone(file), line, column }),
            _ => Some(positions.at(&finding.field)),
        };
        out.findings.push(finding);
    }
    match (read.object, read.refused) {
        (Some(object), _) => out.objects.push(ParsedObject { object, positions }),
        (None, Some(refused)) => out.refused.push(refused),
        (None, None) => out.is_incomplete |= !read.is_stranger,
    }
}

/// Takes the items of a `List`; null is none, as in what kubectl writes.
fn take_list(node: Node, file: &Arc<str>, options: ReadOptions<'_>, out: &mut Documents) {
    let (line, column) = node.locate("items");
    let entries = if let Tree::Map(entries) = node.tree { entries } else { Vec::new() };
    match entries.into_iter().find(|entry| entry.key == "items").map(|entry| entry.value.tree) {
        Some(Tree::List(items)) => {
            for item in items {
                take(item, file, options, out);
            }
        }
        Some(Tree::Null) => {}
        other => {
            out.is_incomplete = true;
            let message = if other.is_some() { "it is not a list" } else { "items is missing" };
            out.findings.push(Finding {
                code: codes::SCHEMA.into(),
                severity: Severity::Error,
                object: None,
                field: "items".into(),
                position: Some(Position { file: Arc::clone(file), line, column }),
                message: message.into(),
                hint: "write a list of objects, each with apiVersion, kind and metadata".into(),
            });
        }
    }
}

/// Decodes and checks one object that came as JSON. The findings are warnings when there is an
/// object, and say why when there is none.
pub fn from_json(value: &Value) -> (Option<Object>, Vec<Finding>) {
    from_json_in(value, "default")
}

/// [`from_json`], with the namespace of an object that names none.
pub fn from_json_in(value: &Value, default_namespace: &str) -> (Option<Object>, Vec<Finding>) {
    let Some(node) = Node::from_json(value, Limits::default().depth_max) else {
        let finding = Finding {
            code: codes::SYNTAX.into(),
            severity: Severity::Error,
            object: None,
            field: "".into(),
            position: None,
            message: format!("nested deeper than {} levels", Limits::default().depth_max).into(),
            hint: "move some of it into an object of its own".into(),
        };
        return (None, vec![finding]);
    };
    let mut read = read_object(&node, default_namespace);
    for finding in &mut read.findings {
        finding.position = None;
    }
    (read.object, read.findings)
}

struct Read {
    object: Option<Object>,
    /// Without an object: which one the text is about, if it tells for certain.
    refused: Option<Refused>,
    /// It is about nothing that a mesh has, and meant so.
    is_stranger: bool,
    findings: Vec<Finding>,
}

fn read_object(node: &Node, default_namespace: &str) -> Read {
    let mut report = Report {
        reference: None,
        kind: None,
        is_certain: true,
        is_stranger: false,
        is_security: false,
        findings: Vec::new(),
    };
    let object = decode_object(node, default_namespace, &mut report);
    let object = object.filter(|_| !report.has_errors()).and_then(|object| {
        report.findings.extend(validate(&object));
        (!report.has_errors()).then_some(object)
    });
    let known = report.kind.zip(report.reference).filter(|_| report.is_certain && object.is_none());
    let refused = known.map(|(kind, object)| Refused { kind, object });
    Read { object, refused, is_stranger: report.is_stranger, findings: report.findings }
}

struct Report {
    reference: Option<ObjectRef>,
    kind: Option<Kind>,
    /// Whether metadata hold no slip that could make another object of it.
    is_certain: bool,
    is_stranger: bool,
    is_security: bool,
    findings: Vec<Finding>,
}

impl Report {
    fn has_errors(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Error)
    }

    fn add(&mut self, code: &str, severity: Severity, field: &str, at: (u32, u32), message: String, hint: &str) {
        self.findings.push(Finding {
            code: code.into(),
            severity,
            object: self.reference.clone(),
            field: field.into(),
            position: Some(Position { file: "".into(), line: at.0, column: at.1 }),
            message: message.into(),
            hint: hint.into(),
        });
    }

    fn invalid(&mut self, error: &InvalidValue) {
        let at = (error.line, error.column);
        self.add(codes::SCHEMA, Severity::Error, &error.path, at, error.message.clone(), &error.hint);
    }

    fn unknown(&mut self, field: &UnknownField) {
        let at = (field.line, field.column);
        if known::is_known(field.owner, &field.key) {
            let severity = if self.is_security { Severity::Error } else { Severity::Warning };
            let message = format!("field {:?} is not yet effective", field.key);
            self.add(codes::NOT_EFFECTIVE, severity, &field.path, at, message, "remove it, or go on without it");
            return;
        }
        let hint = match field.near {
            Some(near) => format!("did you mean {near:?}?"),
            None => "remove it, or check where it belongs".to_owned(),
        };
        self.add(
            codes::UNKNOWN_FIELD,
            Severity::Error,
            &field.path,
            at,
            format!("unknown field {:?}", field.key),
            &hint,
        );
    }
}

/// The name of an IstioOperator that has none, which is the one that istioctl gives it in a cluster.
const NAME_OF_SETTINGS: &str = "installed-state";

fn decode_object(node: &Node, default_namespace: &str, report: &mut Report) -> Option<Object> {
    let Tree::Map(entries) = &node.tree else {
        report.add(
            codes::SYNTAX,
            Severity::Error,
            "",
            (node.line, node.column),
            "a document must be an object with apiVersion, kind and metadata".to_owned(),
            "divide documents by a line `---`",
        );
        return None;
    };
    let text = |key: &str| node.get(key).and_then(Node::as_text).unwrap_or_default();
    let (api_version, kind_name) = (text("apiVersion"), text("kind"));
    let metadata = node.get("metadata");
    let named = |key: &str| metadata.and_then(|m| m.get(key)).and_then(Node::as_text).unwrap_or_default();
    let name = named("name");
    let missing: Vec<&str> = [("apiVersion", api_version), ("kind", kind_name)]
        .iter()
        .filter(|(_, v)| v.is_empty())
        .map(|(k, _)| *k)
        .collect();
    if !missing.is_empty() {
        let message = format!("{} is missing", missing.join(" and "));
        let hint = "every object needs apiVersion, kind and metadata.name";
        report.add(codes::SCHEMA, Severity::Error, "", (node.line, node.column), message, hint);
        return None;
    }
    let namespace = match named("namespace") {
        "" => default_namespace,
        namespace => namespace,
    };
    let kind = match Kind::find(api_version, kind_name) {
        Ok(kind) => kind,
        Err(unknown) => {
            report.reference = Some(ObjectRef::new(kind_name, namespace, name));
            // A ServiceMonitor among the manifests is no slip; what is of a group of ours, or of one that looks like
            // it or claims to be Istio's, may be one.
            let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
            let mut groups = KINDS.iter().map(|info| info.group);
            let near = nearest(group, groups.clone().filter(|known| !known.is_empty()));
            report.is_stranger = !group.ends_with("istio.io") && near.is_none() && groups.all(|known| known != group);
            let (field, hint) = match &unknown {
                UnknownKind::Name { near: Some(near), .. } => ("kind", format!("did you mean {near:?}?")),
                UnknownKind::Name { .. } => {
                    ("kind", "it is neither Istio's nor a part of Kubernetes that a mesh needs".to_owned())
                }
                UnknownKind::Version { versions, .. } => ("apiVersion", format!("use one of {versions}")),
            };
            report.add(codes::UNKNOWN_KIND, Severity::Error, field, node.locate(field), unknown.to_string(), &hint);
            return None;
        }
    };
    let namespace = if kind.is_namespaced() { namespace } else { "" };
    // istioctl takes a file without a name.
    let name = if name.is_empty() && kind == Kind::IstioOperator { NAME_OF_SETTINGS } else { name };
    report.reference = Some(ObjectRef::new(kind.name(), namespace, name));
    report.kind = Some(kind);
    report.is_security = kind.is_security();
    let info = kind.info();

    let notes = Notes::default();
    let absent = Node { tree: Tree::Null, line: node.line, column: node.column };
    let meta: Option<ObjectMeta> = match decode(metadata.unwrap_or(&absent), "metadata", &[], &notes) {
        Ok(meta) => Some(meta),
        Err(error) => {
            report.invalid(&error);
            None
        }
    };
    for field in notes.into_unknown() {
        report.unknown(&field);
    }
    // What was meant may be `namespace`.
    report.is_certain = !report.has_errors() && may_be_named(kind, namespace, name);
    if name.is_empty() && meta.is_some() {
        let hint = match meta.as_ref().map(|meta| meta.generate_name.is_empty()) {
            Some(false) => "generateName is not supported: write a fixed name",
            _ => "every object needs metadata.name",
        };
        report.add(
            codes::SCHEMA,
            Severity::Error,
            "metadata.name",
            node.locate("metadata"),
            "name is missing".to_owned(),
            hint,
        );
        report.reference = None;
    }

    let is_istio = info.group.ends_with("istio.io");
    let mut fields = SpecDecoder { node, is_istio, report };
    let spec = decode_spec(kind, &mut fields);
    if is_istio {
        let strangers = entries
            .iter()
            .filter(|entry| !matches!(entry.key.as_str(), "apiVersion" | "kind" | "metadata" | "spec" | "status"));
        for entry in strangers {
            let fields = ["apiVersion", "kind", "metadata", "spec", "status"];
            report.unknown(&UnknownField {
                owner: "",
                path: entry.key.clone(),
                key: entry.key.clone(),
                line: entry.line,
                column: entry.column,
                near: nearest(&entry.key, fields),
            });
        }
    }
    let (meta, spec) = (meta?, spec?);
    if name.is_empty() {
        return None;
    }
    if info.support == Support::Recognised {
        report.add(
            codes::NOT_EFFECTIVE,
            Severity::Warning,
            "",
            (node.line, node.column),
            format!("kind {} is recognised, but not yet effective", info.name),
            "remove it, or go on without it",
        );
    }
    let raw = filled(node, name, namespace, kind);
    let created = meta.creation_timestamp.as_deref().and_then(scalar::parse_time).unwrap_or_default();
    let meta = Metadata {
        name: name.into(),
        namespace: namespace.into(),
        labels: meta.labels,
        annotations: meta.annotations,
        uid: meta.uid.into(),
        generation: meta.generation,
        resource_version: meta.resource_version.into(),
        created,
        deleted: meta.deletion_timestamp.is_some(),
        owners: meta.owner_references,
    };
    Some(Object { kind, meta, spec, raw: Arc::new(raw) })
}

/// The object as JSON, with its name and namespace.
fn filled(node: &Node, name: &str, namespace: &str, kind: Kind) -> Value {
    let mut raw = node.to_json();
    if !raw["metadata"].is_object() {
        raw["metadata"] = Value::Object(serde_json::Map::new());
    }
    if let Some(meta) = raw.get_mut("metadata").and_then(Value::as_object_mut) {
        meta.insert("name".to_owned(), name.into());
        if kind.is_namespaced() {
            meta.insert("namespace".to_owned(), namespace.into());
        } else {
            meta.remove("namespace");
        }
    }
    raw
}

struct SpecDecoder<'a> {
    node: &'a Node,
    is_istio: bool,
    report: &'a mut Report,
}

impl DecodeSpec for SpecDecoder<'_> {
    fn decode<T: serde::de::DeserializeOwned + Typed>(&mut self) -> Option<T> {
        let notes = Notes::default();
        let absent = Node { tree: Tree::Null, line: self.node.line, column: self.node.column };
        let result = if self.is_istio {
            decode(self.node.get("spec").unwrap_or(&absent), "spec", &[], &notes)
        } else {
            decode(self.node, "", &["apiVersion", "kind", "metadata"], &notes)
        };
        for field in notes.into_unknown() {
            self.report.unknown(&field);
        }
        match result {
            Ok(typed) => Some(typed),
            Err(error) => {
                self.report.invalid(&error);
                None
            }
        }
    }
}
