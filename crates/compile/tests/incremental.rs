//! A snapshot made from the one before is the one made from nothing, and who is not reached by a
//! change is told the same as before.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::sync::Arc;

use api::{Change, ConfigSet, Object};
use compile::{ProxyKind, View};
use mesh::MeshSnapshot;
use proptest::prelude::*;

/// Objects that come, change and go. Two of one name are versions of one object.
const VOCABULARY: &str = r"
apiVersion: v1
kind: Service
metadata: {name: a, namespace: one}
spec: {clusterIP: 10.96.0.1, selector: {app: a}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: a, namespace: one}
spec: {clusterIP: 10.96.0.1, selector: {app: a}, ports: [{name: tcp, port: 80}, {name: http, port: 81}]}
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: two, annotations: {networking.istio.io/exportTo: .}}
spec: {clusterIP: 10.96.0.2, selector: {app: b}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: gateway, namespace: one}
spec: {clusterIP: 10.96.0.3, selector: {istio: gateway}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: one, labels: {app: a, security.istio.io/tlsMode: istio}}
spec: {serviceAccountName: a, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.1, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: one, labels: {app: a, security.istio.io/tlsMode: istio}}
spec: {serviceAccountName: other, containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.1, conditions: [{type: Ready, status: 'False'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: two, labels: {app: b}}
spec: {containers: [{name: a, image: a, ports: [{name: more, containerPort: 8080}]}]}
status: {phase: Running, podIP: 10.1.0.2, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: loner, namespace: two, labels: {app: loner}}
spec: {containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.3, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: gateway, namespace: one, labels: {istio: gateway}}
spec: {containers: [{name: a, image: a}]}
status: {phase: Running, podIP: 10.1.0.4, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: one, annotations: {networking.istio.io/traffic-distribution: PreferClose}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: a, namespace: one}
spec: {selector: {matchLabels: {app: a}}, template: {metadata: {labels: {app: a}}, spec: {containers: [{name: a, image: a}]}}}
---
apiVersion: v1
kind: Secret
metadata: {name: cert, namespace: one}
stringData: {tls.crt: '-----BEGIN CERTIFICATE----- -----END CERTIFICATE-----', tls.key: '-----BEGIN PRIVATE KEY----- -----END PRIVATE KEY-----'}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: gw, namespace: two}
spec:
  selector: {istio: gateway}
  servers:
  - {hosts: ['*'], port: {number: 80, name: http, protocol: HTTP}}
  - {hosts: [a.example.com], port: {number: 443, name: https, protocol: HTTPS}, tls: {mode: SIMPLE, credentialName: cert}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: outside, namespace: two}
spec: {hosts: [a.example.com], gateways: [gw], http: [{route: [{destination: {host: a.one.svc.cluster.local}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: inside, namespace: one}
spec: {hosts: [a], http: [{match: [{uri: {prefix: /d}}], delegate: {name: part}}, {fault: {abort: {httpStatus: 500, percentage: {value: 1}}}, route: [{destination: {host: a, subset: v}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: part, namespace: one}
spec: {http: [{route: [{destination: {host: b.two.svc.cluster.local}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: both, namespace: one}
spec: {hosts: [a, b.example.com], gateways: [two/gw], http: [{match: [{gateways: [mesh], uri: {prefix: /m}}, {gateways: [two/gw]}], route: [{destination: {host: a}}]}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: a, namespace: one}
spec: {host: a, subsets: [{name: v, labels: {app: a}}], trafficPolicy: {loadBalancer: {simple: RANDOM}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: far, namespace: two}
spec: {hosts: [far.example.com], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}], endpoints: [{address: 192.0.2.1}]}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: narrow, namespace: two}
spec: {egress: [{hosts: ['one/*']}]}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: istio-system}
spec: {outboundTrafficPolicy: {mode: REGISTRY_ONLY}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: one}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: port, namespace: one}
spec: {selector: {matchLabels: {app: a}}, portLevelMtls: {80: {mode: DISABLE}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: own, namespace: two}
spec: {rules: [{to: [{operation: {methods: [GET]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: all, namespace: istio-system}
spec: {action: DENY, rules: [{to: [{operation: {methods: [DELETE]}}]}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: own, namespace: one}
spec: {jwtRules: [{issuer: a, jwks: '{bad'}]}
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: own, namespace: two}
spec: {accessLogging: [{disabled: true}]}
---
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: mesh, namespace: istio-system}
spec: {meshConfig: {accessLogFile: /dev/stdout, trustDomainAliases: [old]}}
";

fn vocabulary() -> Vec<Arc<Object>> {
    let parts = VOCABULARY.split("---\n").flat_map(|text| api::parse_documents("case.yaml", text).objects);
    let aged = parts.enumerate().map(|(created, parsed)| {
        let mut object = parsed.object;
        object.meta.created = i64::try_from(created).unwrap();
        Arc::new(object)
    });
    aged.collect()
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

type Told = (Vec<compile::Resource>, Vec<types::Finding>);

fn told(snapshot: &MeshSnapshot, view: &View) -> Told {
    let compiled = compile::compile(snapshot, view);
    (compiled.packed(), compiled.findings)
}

#[test]
fn every_word_of_the_vocabulary_is_read() {
    assert!(vocabulary().len() >= 27, "{}", vocabulary().len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn incremental_is_from_nothing_and_the_unreached_are_told_the_same(
        steps in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..14),
    ) {
        let (words, views) = (vocabulary(), views());
        let mut set = ConfigSet::default();
        let (mut snapshot, _) = MeshSnapshot::next(None, &set, &[]);
        let mut before: Vec<Told> = views.iter().map(|view| told(&snapshot, view)).collect();
        for (index, comes) in steps {
            let word = index.get(&words);
            if comes {
                set.apply(&Change::Upsert(Arc::clone(word)));
            } else {
                set.apply(&Change::Delete(word.reference()));
            }
            let (next, findings) = MeshSnapshot::next(Some(&snapshot), &set, &[]);
            let (fresh, fresh_findings) = MeshSnapshot::next(None, &set, &[]);
            prop_assert_eq!(findings, fresh_findings);
            prop_assert_eq!(next.effects(), fresh.effects());
            let reach = next.reach_since(&snapshot);
            for (view, before) in views.iter().zip(&mut before) {
                let now = told(&next, view);
                prop_assert!(now == told(&fresh, view), "{} differs from one built from nothing", view.name);
                let is_reached = reach.includes(view.kind == ProxyKind::Router, &view.namespace);
                prop_assert!(is_reached || now == *before, "{} is told something new by {}", view.name, word.key());
                *before = now;
            }
            snapshot = next;
        }
    }
}

#[test]
fn what_concerns_nobody_reaches_nobody() {
    let words = vocabulary();
    let (first, rest): (Vec<_>, Vec<_>) = words.into_iter().partition(|word| word.kind.name() == "Service");
    let mut set = ConfigSet::default();
    for word in &first {
        set.apply(&Change::Upsert(Arc::clone(word)));
    }
    let (before, _) = MeshSnapshot::next(None, &set, &[]);
    let reached = |word: &Arc<Object>| {
        let mut set = set.clone();
        set.apply(&Change::Upsert(Arc::clone(word)));
        let (after, _) = MeshSnapshot::next(Some(&before), &set, &[]);
        let reach = after.reach_since(&before);
        let names = views().into_iter().filter(|view| reach.includes(view.kind == ProxyKind::Router, &view.namespace));
        names.map(|view| view.name.to_string()).collect::<Vec<_>>()
    };
    let of = |kind: &str, name: &str, namespace: &str| {
        let word = rest
            .iter()
            .find(|word| word.kind.name() == kind && *word.meta.name == *name && *word.meta.namespace == *namespace);
        reached(word.unwrap())
    };
    assert_eq!(of("Deployment", "a", "one"), Vec::<String>::new());
    assert_eq!(of("Secret", "cert", "one"), ["gateway"]);
    assert_eq!(of("Gateway", "gw", "two"), ["gateway", "other"]);
    assert_eq!(of("AuthorizationPolicy", "own", "two"), ["b", "loner"]);
    assert_eq!(of("Pod", "loner", "two"), ["b", "loner"]);
    assert_eq!(of("AuthorizationPolicy", "all", "istio-system").len(), views().len());
    assert_eq!(of("DestinationRule", "a", "one").len(), views().len());
}
