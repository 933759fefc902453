use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::google::rpc;
use proptest::prelude::*;
use prost::Message as _;

use super::*;

/// A resource as these tests make it: a name, some content, and the clusters it refers to.
#[derive(Clone, PartialEq, prost::Message)]
struct Toy {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint32, tag = "2")]
    content: u32,
    #[prost(string, repeated, tag = "3")]
    refers_to: Vec<String>,
}

fn toy(type_url: &str, name: &str, content: u32, refers_to: &[String]) -> Any {
    let value = Toy { name: name.to_owned(), content, refers_to: refers_to.to_vec() }.encode_to_vec();
    Any { type_url: type_url.to_owned(), value }
}

/// A set of `clusters` (name, content), endpoints for each, and one listener with one route to all.
fn set(generation: u64, clusters: &[(&str, u32)]) -> Arc<ResourceSet> {
    let mut set = ResourceSet::new(generation, &format!("v{generation}"));
    let names: Vec<String> = clusters.iter().map(|(name, _)| (*name).to_owned()).collect();
    for (name, content) in clusters {
        set.insert(name, toy(type_urls::CLUSTER, name, *content, &[]));
        set.insert(name, toy(type_urls::ENDPOINT, name, *content, &[]));
    }
    set.insert("80", toy(type_urls::LISTENER, "80", 0, &[]));
    set.insert("80", toy(type_urls::ROUTE, "80", 0, &names));
    Arc::new(set)
}

type Tables = BTreeMap<Box<str>, BTreeMap<String, Vec<u8>>>;

/// A client as Envoy is one: it asks for the endpoints of its clusters and the routes of its
/// listeners, and answers when told to.
struct Client {
    session: Session,
    protocol: Protocol,
    tables: Tables,
    asked: BTreeMap<Box<str>, BTreeSet<String>>,
    nonces: BTreeMap<Box<str>, Box<str>>,
    unanswered: Vec<Outgoing>,
    trace: Vec<String>,
}

impl Client {
    fn new(protocol: Protocol) -> Self {
        let mut client = Self {
            session: Session::new(protocol),
            protocol,
            tables: Tables::new(),
            asked: BTreeMap::new(),
            nonces: BTreeMap::new(),
            unanswered: Vec::new(),
            trace: Vec::new(),
        };
        for type_url in [type_urls::CLUSTER, type_urls::LISTENER] {
            client.request(type_url, &[], &[], None);
        }
        client
    }

    fn request(
        &mut self,
        type_url: &str,
        subscribe: &[String],
        unsubscribe: &[String],
        answer: Option<(&str, Option<&str>)>,
    ) {
        let error_detail = answer.and_then(|(_, error)| error).map(|message| rpc::Status {
            code: 3,
            message: message.to_owned(),
            details: Vec::new(),
        });
        let nonce = answer.map(|(nonce, _)| nonce.to_owned());
        match self.protocol {
            Protocol::Delta => {
                let request = pb::DeltaDiscoveryRequest {
                    type_url: type_url.to_owned(),
                    resource_names_subscribe: subscribe.to_vec(),
                    resource_names_unsubscribe: unsubscribe.to_vec(),
                    response_nonce: nonce.unwrap_or_default(),
                    error_detail,
                    ..Default::default()
                };
                self.session.delta_request(request).unwrap();
            }
            Protocol::StateOfTheWorld => {
                let last = self.nonces.get(type_url).cloned().unwrap_or_default();
                let request = pb::DiscoveryRequest {
                    type_url: type_url.to_owned(),
                    resource_names: self.asked.get(type_url).into_iter().flatten().cloned().collect(),
                    response_nonce: nonce.unwrap_or_else(|| last.into()),
                    error_detail,
                    ..Default::default()
                };
                self.session.world_request(&request).unwrap();
            }
        }
    }

    /// Subscribes to what the tables refer to.
    fn resubscribe(&mut self, of: &str, to: &str) {
        let wanted: BTreeSet<String> = self.tables.get(of).into_iter().flat_map(BTreeMap::keys).cloned().collect();
        let had = self.asked.get(to).cloned().unwrap_or_default();
        if wanted == had {
            return;
        }
        self.asked.insert(to.into(), wanted.clone());
        let new: Vec<String> = wanted.difference(&had).cloned().collect();
        let gone: Vec<String> = had.difference(&wanted).cloned().collect();
        if let Some(table) = self.tables.get_mut(to) {
            table.retain(|name, _| wanted.contains(name));
        }
        self.request(to, &new, &gone, None);
    }

    /// Takes one response, if one is due.
    fn receive(&mut self) -> bool {
        let Some(outgoing) = self.session.next() else { return false };
        let short = type_urls::short(&outgoing.type_url);
        let names: Vec<&str> = outgoing.resources.iter().map(|resource| &*resource.name).collect();
        self.trace.push(format!("{short} +{names:?} -{:?}", outgoing.removed));
        let table = self.tables.entry(outgoing.type_url.clone()).or_default();
        if self.protocol == Protocol::StateOfTheWorld && is_whole(&outgoing.type_url) {
            table.clear();
        }
        for resource in &outgoing.resources {
            table.insert(resource.name.to_string(), resource.any.value.clone());
        }
        for name in &outgoing.removed {
            table.remove(&**name);
        }
        self.nonces.insert(outgoing.type_url.clone(), outgoing.nonce.clone());
        self.unanswered.push(outgoing);
        self.resubscribe(type_urls::CLUSTER, type_urls::ENDPOINT);
        self.resubscribe(type_urls::LISTENER, type_urls::ROUTE);
        true
    }

    fn answer(&mut self, index: usize, error: Option<&str>) {
        let outgoing = self.unanswered.remove(index);
        self.request(&outgoing.type_url, &[], &[], Some((&outgoing.nonce, error)));
    }

    /// Receives and acknowledges until nothing is left.
    fn settle(&mut self) {
        loop {
            let received = self.receive();
            if !self.unanswered.is_empty() {
                self.answer(0, None);
            } else if !received {
                break;
            }
        }
        assert!(self.session.progress().settled);
    }

    /// Routes only name clusters that are there.
    fn assert_nothing_dangles(&self) {
        let clusters = self.tables.get(type_urls::CLUSTER);
        for route in self.tables.get(type_urls::ROUTE).into_iter().flat_map(BTreeMap::values) {
            for name in Toy::decode(route.as_slice()).unwrap().refers_to {
                assert!(clusters.is_some_and(|table| table.contains_key(&name)), "no cluster {name}: {:?}", self.trace);
            }
        }
    }
}

fn both(check: impl Fn(Client)) {
    for protocol in [Protocol::Delta, Protocol::StateOfTheWorld] {
        check(Client::new(protocol));
    }
}

#[test]
fn only_changes_are_sent() {
    let mut client = Client::new(Protocol::Delta);
    client.session.update(set(1, &[("a", 1), ("b", 1)]));
    client.settle();
    client.trace.clear();
    client.session.update(set(2, &[("a", 1), ("b", 2)]));
    client.settle();
    assert_eq!(client.trace, ["CDS +[\"b\"] -[]", "EDS +[\"b\"] -[]"]);
    client.trace.clear();
    client.session.update(set(3, &[("a", 1), ("b", 2)]));
    assert!(client.session.progress().settled, "an equal set needs no push");
    assert!(!client.receive());
}

#[test]
fn a_changed_cluster_gets_its_endpoints_again() {
    let with = |generation: u64, content: u32| {
        let mut set = ResourceSet::clone(&set(generation, &[("a", 1), ("b", 1)]));
        set.insert("a", toy(type_urls::CLUSTER, "a", content, &[]));
        Arc::new(set)
    };
    let mut client = Client::new(Protocol::Delta);
    client.session.update(with(1, 1));
    client.settle();
    client.trace.clear();
    client.session.update(with(2, 2));
    client.settle();
    // An Envoy does not ask again for what it is subscribed to, and yet waits for it.
    assert_eq!(client.trace, ["CDS +[\"a\"] -[]", "EDS +[\"a\"] -[]"]);
}

#[test]
fn clusters_go_last() {
    both(|mut client| {
        client.session.update(set(1, &[("a", 1), ("b", 1)]));
        client.settle();
        client.trace.clear();
        client.session.update(set(2, &[("a", 1), ("c", 1)]));
        loop {
            let received = client.receive();
            client.assert_nothing_dangles();
            if !client.unanswered.is_empty() {
                client.answer(0, None);
            } else if !received {
                break;
            }
        }
        let order: Vec<&str> = client.trace.iter().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(order[..2], ["CDS", "EDS"], "{:?}", client.trace);
        assert!(order[2..].starts_with(&["RDS", "CDS"]), "{:?}", client.trace);
        assert!(!client.tables[type_urls::CLUSTER].contains_key("b"));
        assert!(!client.tables[type_urls::ENDPOINT].contains_key("b"));
    });
}

#[test]
fn a_refused_listener_keeps_its_routes() {
    both(|mut client| {
        client.session.update(set(1, &[("a", 1)]));
        client.settle();
        let before = client.tables[type_urls::ROUTE].clone();
        let mut next = ResourceSet::new(2, "v2");
        next.insert("a", toy(type_urls::CLUSTER, "a", 1, &[]));
        next.insert("a", toy(type_urls::ENDPOINT, "a", 1, &[]));
        next.insert("80", toy(type_urls::LISTENER, "80", 1, &[]));
        client.session.update(Arc::new(next));
        while client.receive() {
            let refuses = *client.unanswered[0].type_url == *type_urls::LISTENER;
            client.answer(0, refuses.then_some("no"));
        }
        assert_eq!(client.tables[type_urls::ROUTE], before, "{:?}", client.trace);
    });
}

#[test]
fn a_refusal_is_not_repeated_until_the_content_changes() {
    both(|mut client| {
        client.session.update(set(1, &[("a", 1)]));
        assert!(client.receive());
        client.answer(0, Some("no"));
        while client.receive() {
            client.answer(0, None);
        }
        let progress = client.session.progress();
        assert_eq!((progress.settled, progress.refused.as_slice()), (true, &[type_urls::CLUSTER.into()][..]));
        client.session.update(set(2, &[("a", 2)]));
        assert!(!client.session.progress().settled);
        client.settle();
        assert!(client.session.progress().refused.is_empty());
    });
}

#[test]
fn nothing_more_of_a_type_while_it_is_unanswered() {
    both(|mut client| {
        client.session.update(set(1, &[("a", 1)]));
        while client.receive() {}
        assert_eq!(client.unanswered.len(), 4);
        client.session.update(set(2, &[("a", 2)]));
        client.session.update(set(3, &[("a", 3)]));
        assert!(!client.receive());
        client.settle();
        let content = |type_url: &str| Toy::decode(client.tables[type_url]["a"].as_slice()).unwrap().content;
        assert_eq!((content(type_urls::CLUSTER), content(type_urls::ENDPOINT)), (3, 3), "the second set was skipped");
    });
}

#[test]
fn endpoints_come_before_clusters_are_acknowledged() {
    both(|mut client| {
        client.session.update(set(1, &[("a", 1)]));
        assert!(client.receive());
        client.session.update(set(2, &[("a", 1), ("b", 1)]));
        assert!(client.receive(), "the client waits for endpoints before it answers");
        assert!(client.trace[1].starts_with("EDS"), "{:?}", client.trace);
    });
}

#[test]
fn unknown_names_are_answered() {
    let mut session = Session::new(Protocol::Delta);
    session.update(set(1, &[("a", 1)]));
    let request = |type_url: &str, name: &str| pb::DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        resource_names_subscribe: vec![name.to_owned()],
        ..Default::default()
    };
    session.delta_request(request(type_urls::ENDPOINT, "nobody")).unwrap();
    let answer = session.next().unwrap();
    assert_eq!(&*answer.resources[0].name, "nobody");
    session.delta_request(request(type_urls::CLUSTER, "nobody")).unwrap();
    assert_eq!(*session.next().unwrap().removed, ["nobody".into()]);
    // A missing secret is waited for.
    session.delta_request(request(type_urls::SECRET, "kubernetes://nobody")).unwrap();
    assert!(session.next().is_none());
}

#[test]
fn a_client_that_comes_back_gets_differences() {
    let desired = set(7, &[("a", 1), ("b", 1)]);
    let version = |name: &str| desired.get(type_urls::CLUSTER, name).unwrap().version.to_string();
    let mut session = Session::new(Protocol::Delta);
    session.update(Arc::clone(&desired));
    session
        .delta_request(pb::DeltaDiscoveryRequest {
            type_url: type_urls::CLUSTER.to_owned(),
            initial_resource_versions: [
                ("a".to_owned(), version("a")),
                ("b".to_owned(), "old".to_owned()),
                ("gone".to_owned(), "old".to_owned()),
            ]
            .into(),
            ..Default::default()
        })
        .unwrap();
    let answer = session.next().unwrap();
    assert_eq!(answer.resources.iter().map(|resource| &*resource.name).collect::<Vec<_>>(), ["b"]);
    assert_eq!(*answer.removed, ["gone".into()]);
}

#[test]
fn asking_again_is_answered_again() {
    let mut client = Client::new(Protocol::StateOfTheWorld);
    client.session.update(set(1, &[("a", 1)]));
    client.settle();
    client.trace.clear();
    // A warming cluster waits for endpoints that did not change.
    client.request(type_urls::ENDPOINT, &[], &[], None);
    assert!(client.receive());
    assert_eq!(client.trace, ["EDS +[\"a\"] -[]"]);
    client.settle();

    let mut client = Client::new(Protocol::Delta);
    client.session.update(set(1, &[("a", 1)]));
    client.settle();
    client.trace.clear();
    client.request(type_urls::ENDPOINT, &["a".to_owned()], &[], None);
    assert!(client.receive());
    assert_eq!(client.trace, ["EDS +[\"a\"] -[]"]);
}

#[test]
fn a_stale_answer_answers_nothing() {
    let mut client = Client::new(Protocol::Delta);
    client.session.update(set(1, &[("a", 1)]));
    assert!(client.receive());
    client.request(type_urls::CLUSTER, &[], &[], Some(("0-0", None)));
    client.session.update(set(2, &[("a", 2)]));
    while client.receive() {}
    assert_eq!(client.trace.iter().filter(|line| line.starts_with("CDS")).count(), 1);
}

#[test]
fn greedy_subscribers_are_refused() {
    let mut session = Session::new(Protocol::Delta);
    let request = |type_url: String, names: Vec<String>| pb::DeltaDiscoveryRequest {
        type_url,
        resource_names_subscribe: names,
        ..Default::default()
    };
    assert_eq!(session.delta_request(request(String::new(), vec![])), Err(Refused::NoType));
    let long = "x".repeat(NAME_BYTES_MAX + 1);
    assert!(matches!(session.delta_request(request("t".to_owned(), vec![long])), Err(Refused::NameLength(_))));
    let many = vec!["x".to_owned(); NAMES_MAX + 1];
    assert!(matches!(session.delta_request(request("t".to_owned(), many)), Err(Refused::Names(_))));
    for index in 0..TYPES_MAX {
        assert!(session.delta_request(request(format!("t{index}"), vec![])).is_ok());
    }
    assert_eq!(session.delta_request(request("one more".to_owned(), vec![])), Err(Refused::Types));
}

#[derive(Clone, Debug)]
enum Action {
    Update(Vec<(usize, u32)>),
    Receive,
    Ack(usize),
    Nack(usize),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        2 => prop::collection::vec((0..5_usize, 0..3_u32), 0..5).prop_map(Action::Update),
        4 => Just(Action::Receive),
        3 => (0..4_usize).prop_map(Action::Ack),
        1 => (0..4_usize).prop_map(Action::Nack),
    ];
    prop::collection::vec(action, 1..40)
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

fn run(client: &mut Client, actions: &[Action]) -> Arc<ResourceSet> {
    let mut last = set(1, &[("a", 0)]);
    client.session.update(Arc::clone(&last));
    for (index, action) in actions.iter().enumerate() {
        match action {
            Action::Update(clusters) => {
                let clusters: BTreeMap<&str, u32> =
                    clusters.iter().map(|(name, content)| (NAMES[*name], *content)).collect();
                last = set(index as u64 + 2, &clusters.into_iter().collect::<Vec<_>>());
                client.session.update(Arc::clone(&last));
            }
            Action::Receive => {
                client.receive();
            }
            Action::Ack(which) if !client.unanswered.is_empty() => {
                client.answer(which % client.unanswered.len(), None);
            }
            Action::Nack(which) if !client.unanswered.is_empty() => {
                client.answer(which % client.unanswered.len(), Some("no"));
            }
            Action::Ack(_) | Action::Nack(_) => {}
        }
    }
    // One more change of everything ends refusals, so that both can be compared with the set.
    let mut end = ResourceSet::new(1000, "end");
    for (type_url, table) in last.tables() {
        for (name, resource) in table {
            let mut changed = Toy::decode(resource.any.value.as_slice()).unwrap();
            changed.content += 100;
            end.insert(name, Any { type_url: type_url.to_owned(), value: changed.encode_to_vec() });
        }
    }
    let end = Arc::new(end);
    client.session.update(Arc::clone(&end));
    client.settle();
    end
}

proptest! {
    #[test]
    fn delta_equals_the_state_of_the_world(actions in actions()) {
        let mut delta = Client::new(Protocol::Delta);
        let mut world = Client::new(Protocol::StateOfTheWorld);
        let end = run(&mut delta, &actions);
        run(&mut world, &actions);
        prop_assert_eq!(&delta.tables, &world.tables);
        for (type_url, table) in end.tables() {
            let expect: BTreeMap<String, Vec<u8>> =
                table.iter().map(|(name, resource)| (name.to_string(), resource.any.value.clone())).collect();
            prop_assert_eq!(&delta.tables[type_url], &expect, "{}", type_url);
        }
    }

    #[test]
    fn nothing_breaks_on_the_way(updates in prop::collection::vec(prop::collection::vec((0..5_usize, 0..3_u32), 0..5), 1..8)) {
        for protocol in [Protocol::Delta, Protocol::StateOfTheWorld] {
            let mut client = Client::new(protocol);
            for (index, clusters) in updates.iter().enumerate() {
                let clusters: BTreeMap<&str, u32> = clusters.iter().map(|(name, content)| (NAMES[*name], *content)).collect();
                client.session.update(set(index as u64 + 1, &clusters.into_iter().collect::<Vec<_>>()));
                loop {
                    let received = client.receive();
                    client.assert_nothing_dangles();
                    if !client.unanswered.is_empty() {
                        client.answer(0, None);
                    } else if !received {
                        break;
                    }
                }
            }
        }
    }
}
