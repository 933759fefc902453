//! A snapshot made from the one before is the one made from nothing; and who is not reached by a
//! change is told the same as before, but for the clusters that are named.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use api::{Change, ConfigSet, Object};
use compile::{ProxyKind, Resources, View};
use mesh::{MeshSnapshot, Reach, Reached};
use proptest::prelude::*;
use types::Finding;

const VOCABULARY: &str = include_str!("vocabulary.yaml");

fn vocabulary() -> Vec<Arc<Object>> {
    let parsed = api::parse_documents("vocabulary.yaml", VOCABULARY);
    assert!(parsed.refused.is_empty(), "{:?}", parsed.findings);
    parsed.one_after_another().map(Arc::new).collect()
}

fn views() -> Vec<View> {
    let view = |kind, namespace: &str, name: &str, last: u8, label: (&str, &str)| View {
        kind,
        labels: [(label.0.to_owned(), label.1.to_owned())].into(),
        ..View::sidecar(namespace, name, [10, 1, 0, last].into())
    };
    vec![
        view(ProxyKind::Sidecar, "one", "a", 1, ("app", "a")),
        view(ProxyKind::Sidecar, "two", "b", 2, ("app", "b")),
        view(ProxyKind::Sidecar, "two", "loner", 3, ("app", "loner")),
        view(ProxyKind::Sidecar, "three", "stranger", 9, ("app", "stranger")),
        view(ProxyKind::Router, "one", "gateway", 4, ("istio", "gateway")),
        view(ProxyKind::Router, "three", "other", 8, ("istio", "gateway")),
    ]
}

fn reaches(reach: &Reach, view: &View) -> bool {
    let is_router = view.kind == ProxyKind::Router;
    reach.includes(Reached { is_router, namespace: &view.namespace, name: &view.name, ips: &view.ips })
}

/// All that a proxy has, and what is wrong for it.
#[derive(PartialEq)]
struct Told {
    resources: BTreeMap<(&'static str, String), Vec<u8>>,
    findings: Vec<Finding>,
}

impl Told {
    fn of(snapshot: &MeshSnapshot, view: &View) -> Self {
        let compiled = compile::compile(snapshot, view);
        let mut told = Self { resources: BTreeMap::new(), findings: compiled.findings.clone() };
        told.replace(&compiled);
        told
    }

    fn replace(&mut self, compiled: &Resources) {
        let packed = compiled.packed().into_iter();
        self.resources.extend(packed.map(|resource| ((resource.type_url, resource.name), resource.any.value)));
    }

    /// Names of what is not the same on both sides.
    fn differs_from<'a>(&'a self, other: &'a Self) -> BTreeSet<&'a str> {
        let keys = self.resources.keys().chain(other.resources.keys());
        let differing = keys.filter(|key| self.resources.get(*key) != other.resources.get(*key));
        let findings = (self.findings != other.findings).then_some("findings");
        differing.map(|(_, name)| name.as_str()).chain(findings).collect()
    }
}

#[test]
fn every_word_of_the_vocabulary_is_read() {
    assert!(vocabulary().len() >= 41, "{}", vocabulary().len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn incremental_is_from_nothing_and_the_unreached_are_told_the_same(
        at_first in prop::collection::vec(any::<bool>(), 64),
        steps in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..12),
    ) {
        let (words, views) = (vocabulary(), views());
        let mut set = ConfigSet::default();
        for (word, _) in words.iter().zip(at_first).filter(|(_, is_there)| *is_there) {
            set.apply(&Change::Upsert(Arc::clone(word)));
        }
        let (mut snapshot, _) = MeshSnapshot::next(None, &set);
        let mut before: Vec<Told> = views.iter().map(|view| Told::of(&snapshot, view)).collect();
        for (index, comes) in steps {
            let word = index.get(&words);
            if comes {
                set.apply(&Change::Upsert(Arc::clone(word)));
            } else {
                set.apply(&Change::Delete(word.reference()));
            }
            let (next, findings) = MeshSnapshot::next(Some(&snapshot), &set);
            let (fresh, fresh_findings) = MeshSnapshot::next(None, &set);
            prop_assert_eq!(findings, fresh_findings);
            prop_assert_eq!(next.effects(), fresh.effects());
            let reach = next.reach_since(&snapshot);
            for (view, told) in views.iter().zip(&mut before) {
                let now = Told::of(&fresh, view);
                let whole = Told::of(&next, view);
                prop_assert!(whole == now, "{} of one built from nothing: {:?}", view.name, whole.differs_from(&now));
                if !reaches(&reach, view) {
                    told.replace(&compile::clusters_of(&next, view, reach.clusters_of()));
                    let differing = told.differs_from(&now);
                    prop_assert!(differing.is_empty(), "{} by {}: {differing:?}", view.name, word.key());
                }
                *told = now;
            }
            snapshot = next;
        }
    }
}

/// The snapshot of the words that are chosen.
fn mesh_of(words: &[Arc<Object>], choose: impl Fn(&Object) -> bool) -> (ConfigSet, MeshSnapshot) {
    let mut set = ConfigSet::default();
    for word in words.iter().filter(|word| choose(word)) {
        set.apply(&Change::Upsert(Arc::clone(word)));
    }
    let snapshot = MeshSnapshot::next(None, &set).0;
    (set, snapshot)
}

/// Names of the proxies that are reached as a whole, and hosts whose clusters the others are told.
fn reached_by(word: &Arc<Object>, set: &ConfigSet, before: &MeshSnapshot) -> (Vec<String>, Vec<String>) {
    let mut set = set.clone();
    set.apply(&Change::Upsert(Arc::clone(word)));
    let (after, _) = MeshSnapshot::next(Some(before), &set);
    let reach = after.reach_since(before);
    let names = views().into_iter().filter(|view| reaches(&reach, view)).map(|view| view.name.to_string());
    (names.collect(), reach.clusters_of().iter().map(|key| key.host.to_string()).collect())
}

#[test]
fn what_concerns_nobody_reaches_nobody() {
    let words = vocabulary();
    let (set, before) = mesh_of(&words, |word| word.kind.name() == "Service" && *word.meta.name != *"headless");
    let of = |kind: &str, name: &str, namespace: &str| {
        let word = words
            .iter()
            .find(|word| word.kind.name() == kind && *word.meta.name == *name && *word.meta.namespace == *namespace);
        reached_by(word.unwrap(), &set, &before).0
    };
    assert_eq!(of("Deployment", "a", "one"), Vec::<String>::new());
    assert_eq!(of("Secret", "cert", "one"), ["gateway"]);
    assert_eq!(of("Gateway", "gw", "two"), ["gateway", "other"]);
    assert_eq!(of("AuthorizationPolicy", "own", "two"), ["b", "loner"]);
    assert_eq!(of("Pod", "loner", "two"), ["loner"]);
    assert_eq!(of("AuthorizationPolicy", "all", "istio-system").len(), views().len());
    assert_eq!(of("DestinationRule", "a", "one").len(), views().len());
}

#[test]
fn an_endpoint_concerns_the_clusters_of_its_service_and_its_own_proxy() {
    let words = vocabulary();
    let pod = words.iter().find(|word| word.kind.name() == "Pod" && *word.meta.name == *"a").unwrap();
    let (set, before) = mesh_of(&words, |word| word.kind.name() == "Service" && *word.meta.name != *"headless");
    let (whole, clusters) = reached_by(pod, &set, &before);
    assert_eq!((whole, clusters), (vec!["a".to_owned()], vec!["a.one.svc.cluster.local".to_owned()]));
    // The addresses of pods of a headless service are listeners and names of everybody.
    let (set, before) = mesh_of(&words, |word| word.kind.name() == "Service");
    assert_eq!(reached_by(pod, &set, &before).0.len(), views().len());
}
