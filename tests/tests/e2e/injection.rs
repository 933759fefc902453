//! Which pods get a proxy.

use std::fmt::Write as _;

use testkit::{Mesh, eventually};

use crate::apps::TRAFFIC;

/// A pod of the matrix: name, labels, annotations, rest of its spec.
type Candidate = (&'static str, &'static str, &'static str, &'static str);

const INJECT: &str = "sidecar.istio.io/inject";

const PODS: [Candidate; 9] = [
    ("none", "", "", ""),
    ("wants", "true", "", ""),
    ("refuses", "false", "", ""),
    ("other-word", "yes", "", ""),
    ("asks", "", "true", ""),
    ("declines", "", "false", ""),
    ("label-wins", "true", "false", ""),
    ("label-wins-too", "false", "true", ""),
    ("on-host", "true", "", "hostNetwork: true, "),
];

/// A namespace, its `istio-injection`, and which of [`PODS`] get a proxy there.
///
/// *Source*: Istio, sidecar injection: the namespace selects, a pod's label may decline or, where
/// the namespace says nothing, ask; the older annotation counts where there is no such label.
type Row = (&'static str, &'static str, &'static [&'static str]);

const MATRIX: [Row; 4] = [
    ("m-none", "", &["wants", "label-wins"]),
    ("m-enabled", "enabled", &["none", "wants", "other-word", "asks", "label-wins"]),
    ("m-disabled", "disabled", &[]),
    ("m-other", "perhaps", &[]),
];

/// With `enableNamespacesByDefault`: pods that say nothing get a proxy where the namespace says nothing.
const BY_DEFAULT: [Row; 2] =
    [("d-none", "", &["none", "wants", "asks", "label-wins"]), ("d-disabled", "disabled", &[])];

const SETTING: &str = "
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: by-default, namespace: istio-system}
spec: {values: {sidecarInjectorWebhook: {enableNamespacesByDefault: true}}}
";

#[test]
fn the_matrix_of_namespaces_and_pods() {
    let mesh = TRAFFIC.turn();
    let _pods = mesh.with(&candidates(&MATRIX));
    injects(&mesh, &MATRIX);
    // What has a proxy runs beside it, what has none runs alone.
    for (pod, ready) in [("wants", "2/2"), ("none", "1/1")] {
        eventually("a ready pod", || {
            let row = mesh.must(&["get", "pods", "-n", "m-none"], "");
            let line = row.lines().find(|line| line.starts_with(&format!("{pod} "))).unwrap_or_default();
            if line.contains(ready) { Ok(()) } else { Err(row) }
        });
    }
}

#[test]
fn pods_of_namespaces_that_say_nothing_get_a_proxy_where_the_mesh_says_so() {
    let mesh = TRAFFIC.turn();
    let _setting = mesh.with(SETTING);
    let _pods = mesh.with(&candidates(&BY_DEFAULT));
    injects(&mesh, &BY_DEFAULT);
}

#[test]
fn another_word_than_true_or_false_is_warned_about() {
    let mesh = TRAFFIC.turn();
    let words = |list: &str| {
        format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: word, namespace: plain}}\nspec:\n  replicas: 0\n  selector: {{matchLabels: {{app: word}}}}\n  template:\n    metadata:\n      {list}\n    spec: {{containers: [{{name: app, image: curlimages/curl}}]}}\n"
        )
    };
    for (list, field) in [
        (format!("labels: {{app: word, {INJECT}: \"yes\"}}"), "labels"),
        (format!("{{labels: {{app: word}}, annotations: {{{INJECT}: \"yes\"}}}}"), "annotations"),
    ] {
        let manifest = words(&list);
        let applied = mesh.command(&["apply", "-f", "-"], &manifest);
        let said = String::from_utf8_lossy(&applied.stderr).into_owned();
        mesh.must(&["delete", "-f", "-"], &manifest);
        assert!(applied.status.success(), "{said}");
        let field = format!("spec.template.metadata.{field}");
        for word in ["warning", "Deployment plain/word", &field, "counts as unset", "write \"true\" or \"false\""] {
            assert!(said.contains(word), "{word:?} is not in: {said}");
        }
    }
}

/// The namespaces of `matrix`, each with [`PODS`].
fn candidates(matrix: &[Row]) -> String {
    let mut all = String::new();
    for (namespace, label, _) in matrix {
        let labels = if label.is_empty() { String::new() } else { format!(", labels: {{istio-injection: {label}}}") };
        writeln!(all, "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}{labels}}}\n---").unwrap();
        for (name, label, annotation, spec) in PODS {
            let map = |key: &str, value: &str| {
                if value.is_empty() { String::new() } else { format!(", {key}: {{{INJECT}: \"{value}\"}}") }
            };
            writeln!(
                all,
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}{}{}}}\nspec: {{{spec}containers: [{{name: app, image: curlimages/curl}}]}}\n---",
                map("labels", label),
                map("annotations", annotation)
            )
            .unwrap();
        }
    }
    all
}

/// Which pods of `matrix` get a proxy.
#[track_caller]
fn injects(mesh: &Mesh, matrix: &[Row]) {
    for (namespace, _, expect) in matrix {
        let pods = eventually("the pods", || {
            let text = mesh.must(&["get", "pods", "-n", namespace, "-o", "json"], "");
            let list: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            let items = list["items"].as_array().cloned().unwrap_or_default();
            if items.len() == PODS.len() { Ok(items) } else { Err(text) }
        });
        let with_proxy: Vec<&str> = PODS
            .iter()
            .map(|(name, ..)| *name)
            .filter(|name| {
                let pod = pods.iter().find(|pod| pod["metadata"]["name"] == *name).unwrap_or_else(|| panic!("{name}"));
                let containers = pod["spec"]["containers"].as_array().unwrap();
                containers.iter().any(|container| container["name"] == "istio-proxy")
            })
            .collect();
        assert_eq!(with_proxy, *expect, "{namespace}");
    }
}

#[test]
fn a_pod_sets_up_its_own_proxy() {
    let mesh = TRAFFIC.turn();
    let _pod = mesh.with(
        "
apiVersion: v1
kind: Pod
metadata: {name: busy, namespace: shop, annotations: {proxy.istio.io/config: \"concurrency: 2\"}}
spec: {containers: [{name: app, image: curlimages/curl}]}
",
    );
    let text = mesh.must(&["get", "pod/busy", "-n", "shop", "-o", "json"], "");
    let pod: serde_json::Value = serde_json::from_str(&text).unwrap();
    let env = pod["spec"]["containers"][1]["env"].as_array().cloned().unwrap_or_default();
    let workers = env.iter().find(|variable| variable["name"] == "ISTIO_META_CONCURRENCY");
    assert_eq!(workers.map(|variable| &variable["value"]), Some(&"2".into()), "{text}");
    let refused = mesh.command(
        &["apply", "-f", "-"],
        "{apiVersion: v1, kind: Pod, metadata: {name: bad, namespace: shop, annotations: {proxy.istio.io/config: '['}}, spec: {containers: [{name: app, image: curlimages/curl}]}}",
    );
    let said = String::from_utf8_lossy(&refused.stderr).into_owned() + &String::from_utf8_lossy(&refused.stdout);
    assert!(!refused.status.success() && said.contains("proxy.istio.io/config"), "{said}");
}
