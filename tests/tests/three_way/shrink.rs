//! The smallest case that still shows a disagreement. All candidates of a round run in one
//! configuration, each apart from the others.

use serde_json::Value;

use crate::bed::Bed;
use crate::random::Case;
use crate::round::Disagreement;

/// Rounds at most; each takes one thing away.
const ROUNDS_MAX: usize = 60;

/// What can be made smaller.
pub(crate) trait Shrinks: Clone {
    /// Candidates of a round, at most.
    const CANDIDATES_MAX: usize;

    /// Every way to take one thing away that leaves a case.
    fn candidates(&self) -> Vec<Self>;
}

/// The smallest case that shows `wanted`, with all that it shows. `ask` says what each of several cases shows.
pub(crate) fn shrink<C: Shrinks>(
    case: &C,
    wanted: &str,
    mut ask: impl FnMut(&[C]) -> Vec<Vec<Disagreement>>,
) -> (C, Vec<Disagreement>) {
    let mut shows = |cases: &[C]| -> Option<(C, Vec<Disagreement>)> {
        let found = cases.iter().cloned().zip(ask(cases));
        found.into_iter().find(|(_, found)| found.iter().any(|one| one.kind == wanted))
    };
    let Some(mut smallest) = shows(std::slice::from_ref(case)) else {
        let text = "it does not show alone".to_owned();
        return (case.clone(), vec![Disagreement { kind: wanted.to_owned(), text }]);
    };
    for _ in 0..ROUNDS_MAX {
        let mut smaller = smallest.0.candidates();
        smaller.truncate(C::CANDIDATES_MAX);
        match shows(&smaller) {
            Some(found) => smallest = found,
            None => break,
        }
    }
    smallest
}

impl Shrinks for Case {
    const CANDIDATES_MAX: usize = 400;

    fn candidates(&self) -> Vec<Self> {
        candidates(self).into_iter().filter(Bed::is_valid).collect()
    }
}

fn candidates(case: &Case) -> Vec<Case> {
    let mut out = Vec::new();
    // The first object is what gives the host a meaning.
    let smaller = without_objects(&case.objects, 1).into_iter().chain(with_less(&case.objects, is_apart));
    out.extend(smaller.map(|objects| Case { objects, ..case.clone() }));
    for at in 0..case.request.headers.len() {
        let mut less = case.clone();
        less.request.headers.remove(at);
        out.push(less);
    }
    if let Some((path, _)) = case.request.path.split_once('?') {
        let mut less = case.clone();
        less.request.path = path.to_owned();
        out.push(less);
    }
    if case.request.port != 80 {
        let mut less = case.clone();
        less.request.port = 80;
        out.push(less);
    }
    if case.request.is_http2 {
        let mut less = case.clone();
        less.request.is_http2 = false;
        out.push(less);
    }
    if case.request.is_shouting {
        let mut less = case.clone();
        less.request.is_shouting = false;
        out.push(less);
    }
    for (method, path, suffix) in
        [("GET", None, None), (&*case.request.method, Some("/"), None), (&*case.request.method, None, Some(""))]
    {
        let mut less = case.clone();
        method.clone_into(&mut less.request.method);
        path.unwrap_or(&case.request.path).clone_into(&mut less.request.path);
        suffix.unwrap_or(&case.request.host_suffix).clone_into(&mut less.request.host_suffix);
        if less != *case {
            out.push(less);
        }
    }
    out
}

/// The objects without one of those from `first` on.
pub(crate) fn without_objects(objects: &[Value], first: usize) -> Vec<Vec<Value>> {
    let without = |at: usize| [&objects[..at], &objects[at + 1..]].concat();
    (first..objects.len()).map(without).collect()
}

/// The objects with one of their specs smaller, where that one is still `good`.
pub(crate) fn with_less(objects: &[Value], good: impl Fn(&Value) -> bool) -> Vec<Vec<Value>> {
    let mut out = Vec::new();
    for at in 0..objects.len() {
        for spec in without_one(&objects[at]["spec"]) {
            let mut less = objects.to_vec();
            less[at]["spec"] = spec;
            if good(&less[at]) {
                out.push(less);
            }
        }
    }
    out
}

/// Whether an object still concerns its own host only.
fn is_apart(object: &Value) -> bool {
    let names_host = |value: &Value| value.to_string().contains("@HOST@");
    match object["kind"].as_str() {
        Some("AuthorizationPolicy") => {
            let rules = object["spec"]["rules"].as_array();
            object["spec"]["selector"].is_object()
                && rules.is_some_and(|rules| {
                    rules.iter().all(|rule| rule["to"].as_array().is_some_and(|to| to.iter().all(names_host)))
                })
        }
        _ => names_host(&object["spec"]["hosts"]) && object["spec"]["gateways"].is_array(),
    }
}

/// The value with one field or element less, at any depth, the outermost first.
fn without_one(value: &Value) -> Vec<Value> {
    let mut out = Vec::new();
    match value {
        Value::Object(fields) => {
            for name in fields.keys() {
                let mut less = fields.clone();
                less.remove(name);
                out.push(less.into());
            }
            for (name, field) in fields {
                for smaller in without_one(field) {
                    let mut less = fields.clone();
                    less[name] = smaller;
                    out.push(less.into());
                }
            }
        }
        Value::Array(items) => {
            for at in 0..items.len() {
                let mut less = items.clone();
                less.remove(at);
                out.push(less.into());
            }
            for (at, item) in items.iter().enumerate() {
                for smaller in without_one(item) {
                    let mut less = items.clone();
                    less[at] = smaller;
                    out.push(less.into());
                }
            }
        }
        _ => {}
    }
    out
}

/// A disagreement that is planted: somebody does not know a fault where a header comes.
#[test]
fn a_planted_disagreement_shrinks_to_what_it_needs() {
    let rule = |fault: bool| {
        let mut rule = serde_json::json!({
            "match": [{ "uri": { "prefix": "/" }, "headers": { "x-b": { "exact": "1" } } }, { "uri": { "prefix": "/a" } }],
            "route": [{ "destination": { "host": "echo", "subset": "v1" }, "headers": { "request": { "set": { "x-c": "1" } } } }],
            "timeout": "5s",
        });
        if fault {
            rule["fault"] = serde_json::json!({ "abort": { "httpStatus": 555, "percentage": { "value": 100 } } });
        }
        rule
    };
    let object = |kind: &str, spec: Value| {
        let group = if kind == "VirtualService" { "networking" } else { "security" };
        serde_json::json!({ "apiVersion": format!("{group}.istio.io/v1"), "kind": kind, "metadata": { "name": "@NAME@", "namespace": "shop" }, "spec": spec })
    };
    let hosts = serde_json::json!(["@HOST@"]);
    let case = Case {
        class: "open".to_owned(),
        objects: vec![
            object(
                "VirtualService",
                serde_json::json!({ "hosts": hosts, "gateways": ["gateway"], "http": [rule(false), rule(true)] }),
            ),
            object(
                "AuthorizationPolicy",
                serde_json::json!({ "selector": { "matchLabels": { "a": "b" } }, "action": "DENY", "rules": [{ "to": [{ "operation": { "hosts": hosts, "paths": ["/b"] } }] }] }),
            ),
        ],
        request: crate::random::Request {
            port: 81,
            method: "POST".to_owned(),
            path: "/a?q=1".to_owned(),
            host_suffix: ":80".to_owned(),
            is_shouting: true,
            headers: [("x-a", "1"), ("x-b", "2")].map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            is_http2: true,
        },
    };
    let mut asked = 0;
    let planted = |cases: &[Case]| -> Vec<Vec<Disagreement>> {
        asked += 1;
        let shows = |case: &Case| {
            let is_faulty = case.objects[0]["spec"]["http"]
                .as_array()
                .is_some_and(|rules| rules.iter().any(|rule| !rule["fault"]["abort"]["httpStatus"].is_null()));
            is_faulty && case.request.headers.iter().any(|(name, _)| name == "x-b")
        };
        let found = |case: &Case| {
            let one = |kind: &str| Disagreement { kind: kind.to_owned(), text: String::new() };
            if shows(case) { vec![one("other"), one("status")] } else { vec![one("other")] }
        };
        cases.iter().map(found).collect()
    };
    let (smallest, found) = shrink(&case, "status", planted);
    assert!(asked < ROUNDS_MAX, "it ends by itself");
    assert_eq!(found.len(), 2, "with all that it shows");
    let [object] = &smallest.objects[..] else { panic!("{smallest:#?}") };
    let bare = |rule: &Value| {
        rule["fault"]["abort"]["httpStatus"] == 555 && rule.as_object().is_some_and(|fields| fields.len() == 2)
    };
    let rules = object["spec"]["http"].as_array().unwrap();
    assert!(rules.len() == 1 && bare(&rules[0]) && rules[0]["route"].is_array(), "{smallest:#?}");
    assert_eq!(smallest.request.headers, [("x-b".to_owned(), "2".to_owned())]);
    let rest =
        (smallest.request.port, &*smallest.request.method, &*smallest.request.path, &*smallest.request.host_suffix);
    assert_eq!(rest, (80, "GET", "/", ""));
    assert!(!smallest.request.is_shouting && !smallest.request.is_http2);
}
