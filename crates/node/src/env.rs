//! A container's environment and program.

use std::collections::BTreeMap;

use api::k8s::{Container, EnvVarSource, ObjectFieldSelector, Pod};
use api::{ConfigSet, Object, k8s};
use types::wellknown::annotations;

use crate::inject::PROXY;
use crate::spec::SELF_EXE;

/// Facts of a pod that its containers may ask for.
#[derive(Clone, Copy, Debug)]
pub struct PodFacts<'a> {
    /// The pod's object.
    pub object: &'a Object,
    /// Its typed part.
    pub pod: &'a Pod,
    /// Its address; empty before it has one.
    pub ip: &'a str,
    /// The switch's address.
    pub host_ip: &'a str,
    /// Name of the one node.
    pub node_name: &'a str,
}

/// Something that a pod needs is not there (yet).
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Missing(pub String);

/// The variables of `container`, with references resolved in the order of the list.
pub fn environment(
    container: &Container,
    facts: &PodFacts<'_>,
    objects: &ConfigSet,
) -> Result<BTreeMap<String, String>, Missing> {
    let namespace = &*facts.object.meta.namespace;
    let mut env = BTreeMap::new();
    env.insert("HOSTNAME".to_owned(), facts.object.meta.name.to_string());
    for source in &container.env_from {
        let found: Option<Vec<(String, String)>> = if let Some(of) = &source.config_map_ref {
            let map = objects
                .get::<k8s::ConfigMap>(namespace, &of.name)
                .map(|(_, map)| map.data.clone().into_iter().collect());
            require(map, of.optional, || format!("ConfigMap {namespace}/{} is not there", of.name))?
        } else if let Some(of) = &source.secret_ref {
            let secret = objects.get::<k8s::Secret>(namespace, &of.name).map(|(_, secret)| {
                secret
                    .keys()
                    .into_iter()
                    .filter_map(|key| Some((key.to_owned(), String::from_utf8(secret.value(key)?.to_vec()).ok()?)))
                    .collect()
            });
            require(secret, of.optional, || format!("Secret {namespace}/{} is not there", of.name))?
        } else {
            None
        };
        for (key, value) in found.into_iter().flatten() {
            env.insert(format!("{}{key}", source.prefix), value);
        }
    }
    for variable in &container.env {
        let value = match &variable.value_from {
            None => Some(expand(variable.value.as_deref().unwrap_or_default(), &env)),
            Some(source) => from_source(source, facts, objects)?,
        };
        if let Some(value) = value {
            env.insert(variable.name.clone(), value);
        }
    }
    Ok(env)
}

fn require<T>(value: Option<T>, optional: bool, message: impl FnOnce() -> String) -> Result<Option<T>, Missing> {
    if value.is_none() && !optional { Err(Missing(message())) } else { Ok(value) }
}

fn from_source(source: &EnvVarSource, facts: &PodFacts<'_>, objects: &ConfigSet) -> Result<Option<String>, Missing> {
    let namespace = &*facts.object.meta.namespace;
    if let Some(of) = &source.field_ref {
        return Ok(Some(field(of, facts)));
    }
    if let Some(of) = &source.config_map_key_ref {
        let value =
            objects.get::<k8s::ConfigMap>(namespace, &of.name).and_then(|(_, map)| map.data.get(&of.key).cloned());
        return require(value, of.optional, || format!("ConfigMap {namespace}/{} has no key {:?}", of.name, of.key));
    }
    if let Some(of) = &source.secret_key_ref {
        let value = objects
            .get::<k8s::Secret>(namespace, &of.name)
            .and_then(|(_, secret)| String::from_utf8(secret.value(&of.key)?.to_vec()).ok());
        return require(value, of.optional, || format!("Secret {namespace}/{} has no key {:?}", of.name, of.key));
    }
    // resourceFieldRef: there are no limits here, as on a node without them.
    Ok(source.resource_field_ref.as_ref().map(|_| "0".to_owned()))
}

/// The field that `fieldRef` names; maps as one `key="value"` a line, as the downward API writes them.
pub fn field(selector: &ObjectFieldSelector, facts: &PodFacts<'_>) -> String {
    let meta = &facts.object.meta;
    let quoted = |map: &BTreeMap<String, String>| {
        map.iter().map(|(key, value)| format!("{key}={value:?}\n")).collect::<String>()
    };
    let path = selector.field_path.as_str();
    let bracketed = |prefix: &str| path.strip_prefix(prefix)?.strip_prefix("['")?.strip_suffix("']").map(str::to_owned);
    if let Some(key) = bracketed("metadata.labels") {
        return meta.labels.get(&key).cloned().unwrap_or_default();
    }
    if let Some(key) = bracketed("metadata.annotations") {
        return meta.annotations.get(&key).cloned().unwrap_or_default();
    }
    match path {
        "metadata.name" => meta.name.to_string(),
        "metadata.namespace" => meta.namespace.to_string(),
        "metadata.uid" => meta.uid.to_string(),
        "metadata.labels" => quoted(&meta.labels),
        "metadata.annotations" => quoted(&meta.annotations),
        "spec.nodeName" => facts.node_name.to_owned(),
        "spec.serviceAccountName" => facts.pod.spec.account().to_owned(),
        "status.podIP" | "status.podIPs" => facts.ip.to_owned(),
        "status.hostIP" | "status.hostIPs" => facts.host_ip.to_owned(),
        _ => String::new(),
    }
}

/// Replaces `$(NAME)` by a variable that is known so far; `$$` is a dollar sign.
pub fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix("$(").and_then(|inner| inner.split_once(')')) {
            match env.get(name) {
                Some(value) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    out
}

/// An image that a program of this machine plays: `--image IMAGE=COMMAND`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageProgram {
    /// The image, with or without tag.
    pub image: String,
    /// The program and its arguments.
    pub argv: Vec<String>,
}

/// The program that plays a container: the pod's annotation, a mapped image, our stand-in for a
/// sample's image, or the container's own command.
pub fn program(
    container: &Container,
    pod_annotations: &BTreeMap<String, String>,
    app_containers: usize,
    images: &[ImageProgram],
    env: &BTreeMap<String, String>,
) -> Result<Vec<String>, NoProgram> {
    let hint = "write a program and its arguments, in quotes what belongs together";
    let no_program = |message: String| NoProgram { message, hint: hint.to_owned() };
    let arguments = |list: &[String]| list.iter().map(|word| expand(word, env)).collect::<Vec<_>>();
    if container.name == PROXY
        && container.command.is_empty()
        && container.args.first().is_some_and(|word| word == "proxy")
    {
        return Ok(std::iter::once(SELF_EXE.to_owned()).chain(arguments(&container.args)).collect());
    }
    let of_container = pod_annotations.get(&format!("{}.{}", annotations::COMMAND, container.name));
    let of_pod = pod_annotations.get(annotations::COMMAND).filter(|_| app_containers == 1);
    if let Some(line) = of_container.or(of_pod) {
        let mut argv = words(&expand(line, env)).map_err(no_program)?;
        argv.extend(arguments(&container.args));
        return own(argv)
            .ok_or_else(|| no_program(format!("the annotation {} names no program", annotations::COMMAND)));
    }
    let bare = |image: &str| {
        let end = image.rfind(':').filter(|at| !image[*at..].contains('/')).unwrap_or(image.len());
        image[..end].to_owned()
    };
    let image = container.image.as_str();
    if let Some(mapped) = images.iter().find(|mapped| mapped.image == image || mapped.image == bare(image)) {
        let mut argv = mapped.argv.clone();
        argv.extend(arguments(&container.args));
        return own(argv).ok_or_else(|| no_program(format!("--image {image}= names no program")));
    }
    if let Some(stand_in) = samples::stand_in(image, &arguments(&container.command), &arguments(&container.args)) {
        return Ok(std::iter::once(SELF_EXE.to_owned()).chain(stand_in).collect());
    }
    let mut argv = arguments(&container.command);
    if argv.is_empty() {
        let hint = format!(
            "set `command`, annotate the pod with {}.{}: PROGRAM, or pass --image {image}=PROGRAM",
            annotations::COMMAND,
            container.name
        );
        return Err(NoProgram { message: format!("no program of this machine plays the image {image:?}"), hint });
    }
    argv.extend(arguments(&container.args));
    own(argv).ok_or_else(|| no_program("command is empty".to_owned()))
}

/// Why no program plays a container.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct NoProgram {
    /// What is wrong.
    pub message: String,
    /// What to do about it; may be empty.
    pub hint: String,
}

/// `lateen` is the running binary, whatever its name.
fn own(mut argv: Vec<String>) -> Option<Vec<String>> {
    let first = argv.first_mut()?;
    if first == "lateen" {
        SELF_EXE.clone_into(first);
    }
    Some(argv)
}

/// Splits a command line at blanks; quotes and backslashes as in a shell, nothing else.
pub fn words(line: &str) -> Result<Vec<String>, String> {
    let (mut out, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if open == c => quote = None,
            (Some('\''), c) => word.get_or_insert_default().push(c),
            (_, '\\') => word.get_or_insert_default().push(chars.next().ok_or("command ends in a backslash")?),
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => out.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(format!("command {line:?} has an open quote"));
    }
    out.extend(word);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn objects() -> ConfigSet {
        let list = [
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m", "namespace": "shop"}, "data": {"a": "1"}}),
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "shop"}, "stringData": {"k": "v"}}),
        ];
        ConfigSet::new(list.iter().filter_map(|value| api::from_json(value).0))
    }

    fn resolve(env: &serde_json::Value, env_from: &serde_json::Value) -> Result<BTreeMap<String, String>, Missing> {
        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "namespace": "shop", "labels": {"app": "x"}},
            "spec": {"containers": [{"name": "c", "image": "i", "env": env, "envFrom": env_from}]}});
        let (object, findings) = api::from_json(&pod);
        let object = object.unwrap_or_else(|| panic!("{findings:?}"));
        let typed = object.typed::<Pod>().unwrap().clone();
        let facts = PodFacts { object: &object, pod: &typed, ip: "10.77.0.9", host_ip: "10.77.0.1", node_name: "n" };
        environment(&typed.spec.containers[0], &facts, &objects())
    }

    #[test]
    fn variables_come_from_everywhere() {
        let env = resolve(
            &json!([
                {"name": "A", "value": "x"},
                {"name": "B", "value": "$(A)-$(NONE)-$$(A)"},
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                {"name": "M", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "a"}}},
                {"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
                {"name": "O", "valueFrom": {"secretKeyRef": {"name": "none", "key": "k", "optional": true}}},
            ]),
            &json!([{"prefix": "M_", "configMapRef": {"name": "m"}}]),
        )
        .unwrap();
        for (name, value) in [
            ("A", "x"),
            ("B", "x-$(NONE)-$(A)"),
            ("IP", "10.77.0.9"),
            ("APP", "x"),
            ("M", "1"),
            ("S", "v"),
            ("M_a", "1"),
            ("HOSTNAME", "p"),
        ] {
            assert_eq!(env.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert!(!env.contains_key("O"));
        let missing =
            resolve(&json!([{"name": "M", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "z"}}}]), &json!([]));
        assert_eq!(missing.unwrap_err().0, "ConfigMap shop/m has no key \"z\"");
    }

    #[test]
    fn who_plays_a_container() {
        let none = BTreeMap::new();
        let container = |value: serde_json::Value| {
            let pod =
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [value]}});
            api::from_json(&pod).0.unwrap().typed::<Pod>().unwrap().spec.containers[0].clone()
        };
        let images = [ImageProgram { image: "example/web".into(), argv: vec!["/bin/web".into()] }];
        let run = |value: serde_json::Value, annotation: &str| {
            let annotations = match annotation.split_once('=') {
                Some((key, value)) => [(key.to_owned(), value.to_owned())].into(),
                None => BTreeMap::new(),
            };
            program(&container(value), &annotations, 1, &images, &none).map(|argv| argv.join("|"))
        };
        assert_eq!(
            run(json!({"name": "c", "image": "x", "command": ["sh", "-c"], "args": ["a b"]}), "").unwrap(),
            "sh|-c|a b"
        );
        assert_eq!(
            run(json!({"name": "c", "image": "x"}), "lateen.dev/command=python3 -m 'a b'").unwrap(),
            "python3|-m|a b"
        );
        assert_eq!(
            run(json!({"name": "c", "image": "x"}), "lateen.dev/command.c=lateen sample sleep").unwrap(),
            "/proc/self/exe|sample|sleep"
        );
        assert_eq!(run(json!({"name": "c", "image": "example/web:1.2", "args": ["-p"]}), "").unwrap(), "/bin/web|-p");
        assert!(
            run(json!({"name": "c", "image": "docker.io/istio/examples-bookinfo-reviews-v2:1.20"}), "")
                .unwrap()
                .starts_with("/proc/self/exe|sample|reviews")
        );
        let error = run(json!({"name": "c", "image": "unknown/thing:1"}), "").unwrap_err();
        assert!(error.hint.contains("--image unknown/thing:1=PROGRAM"), "{error:?}");
    }
}
