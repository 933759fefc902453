//! The smallest case that still shows a disagreement. All candidates of a round run in one
//! configuration, each under a host of its own.

use std::path::PathBuf;

use serde_json::Value;

use crate::bed::{self, Bed};
use crate::random::Case;
use crate::{Disagreement, ask, disagreements};

/// Rounds at most; each takes one thing away.
const ROUNDS_MAX: usize = 60;
/// Candidates of a round.
const CANDIDATES_MAX: usize = 400;

/// Shrinks and prints.
pub(crate) fn report(bed: &Bed, envoy: Option<&PathBuf>, case: &Case, wanted: &str) {
    let (smallest, found) = shrink(bed, envoy, case, wanted);
    let host = format!("c1.{}.test", smallest.class);
    println!("{}\n---\n# {:?}", bed::text(&smallest, &host, "c1", bed::SOME_PORTS), smallest.request);
    for found in found {
        println!("# {}: {}", found.kind, found.text);
    }
}

fn shrink(bed: &Bed, envoy: Option<&PathBuf>, case: &Case, wanted: &str) -> (Case, Vec<Disagreement>) {
    let shows = |cases: &[Case]| -> Option<(Case, Vec<Disagreement>)> {
        let said = ask(bed, envoy, cases);
        let found = cases.iter().zip(&said).map(|(case, said)| (case.clone(), disagreements(case, said)));
        found.into_iter().find(|(_, found)| found.iter().any(|one| one.kind == wanted))
    };
    let Some(mut smallest) = shows(std::slice::from_ref(case)) else {
        let text = "it does not show alone".to_owned();
        return (case.clone(), vec![Disagreement { kind: wanted.to_owned(), text }]);
    };
    for _ in 0..ROUNDS_MAX {
        let mut smaller: Vec<Case> = candidates(&smallest.0).into_iter().filter(Bed::is_valid).collect();
        smaller.truncate(CANDIDATES_MAX);
        match shows(&smaller) {
            Some(found) => smallest = found,
            None => break,
        }
    }
    smallest
}

/// Every way to take one thing away.
fn candidates(case: &Case) -> Vec<Case> {
    let mut out = Vec::new();
    for at in 1..case.objects.len() {
        let mut less = case.clone();
        less.objects.remove(at);
        out.push(less);
    }
    for at in 0..case.objects.len() {
        for spec in without_one(&case.objects[at]["spec"]) {
            let mut less = case.clone();
            less.objects[at]["spec"] = spec;
            if is_apart(&less.objects[at]) {
                out.push(less);
            }
        }
    }
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
