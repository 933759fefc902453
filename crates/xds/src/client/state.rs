//! What a client has subscribed to, runs and owes an answer for; without I/O.
//!
//! ```text
//!            connected                 receive                    answer
//!  (idle) ─────────────► request due ──────────► pending (nonce) ─────────► request due (ack/nack)
//!                             ▲                                                 │
//!                             └────────────── subscribe ────────────────────────┘
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use envoy_types::pb::envoy::service::discovery::v3 as pb;
use envoy_types::pb::google::protobuf::Any;
use prost::{Message as _, Name as _};
use types::wellknown::type_urls;

use super::Protocol;
use crate::resources::{is_whole, name_of};

/// What is wanted of one type.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Names {
    /// Everything the control plane has for us.
    All,
    /// These.
    Only(BTreeSet<String>),
}

impl Names {
    /// These names.
    pub fn only<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self::Only(names.into_iter().map(Into::into).collect())
    }
}

/// Names one update of one stream, for the answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UpdateId {
    /// The type.
    pub type_url: String,
    /// As the server counts.
    pub nonce: String,
    stream: u64,
}

/// Resources to apply.
#[derive(Clone, PartialEq, Debug)]
pub struct Update {
    /// To answer with.
    pub id: UpdateId,
    /// The server's version of the response.
    pub version: String,
    /// New or changed resources, and perhaps unchanged ones: name, version, message. The version is
    /// empty where the server gives none. No name comes twice.
    pub added: Vec<(String, String, Any)>,
    /// Names that are gone.
    pub removed: Vec<String>,
}

impl Update {
    /// The type.
    pub fn type_url(&self) -> &str {
        &self.id.type_url
    }
}

/// A resource that the consumer refuses; its last good value stays.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rejected {
    /// The resource.
    pub name: String,
    /// Why, for people.
    pub reason: String,
}

/// A response from the wire, of either protocol.
#[derive(Debug)]
pub(crate) struct ResponseIn {
    pub(crate) type_url: String,
    pub(crate) version: String,
    pub(crate) nonce: String,
    pub(crate) resources: Vec<ResourceIn>,
    pub(crate) removed: Vec<String>,
}

/// A resource from the wire; without a name in state-of-the-world responses.
#[derive(Debug)]
pub(crate) struct ResourceIn {
    pub(crate) name: Option<String>,
    pub(crate) version: String,
    pub(crate) any: Option<Any>,
}

/// A request for the wire, of either protocol: `names` and `version` are for the state of the
/// world, `subscribe`, `unsubscribe` and `running` for delta.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct RequestOut {
    pub(crate) type_url: String,
    pub(crate) nonce: String,
    pub(crate) error: Option<String>,
    pub(crate) version: String,
    pub(crate) names: Vec<String>,
    pub(crate) subscribe: Vec<String>,
    pub(crate) unsubscribe: Vec<String>,
    pub(crate) running: BTreeMap<String, String>,
}

#[derive(Debug)]
pub(crate) struct State {
    protocol: Protocol,
    /// Counts connections; 0 before the first.
    stream: u64,
    subscriptions: BTreeMap<String, Subscription>,
}

#[derive(Debug)]
struct Subscription {
    wanted: Names,
    /// What the server of this stream was told; `None` before the first request.
    asked: Option<Names>,
    /// Names that the server was asked for, and that were not wanted for a while since: wanted again, they are asked
    /// for again, or they would not come again.
    lapsed: BTreeSet<String>,
    /// Accepted resources and their versions.
    running: BTreeMap<String, String>,
    /// `version_info` of the last accepted response.
    accepted: String,
    /// The last nonce of this stream, which state-of-the-world requests repeat.
    nonce: String,
    /// Received and not yet answered, oldest first.
    pending: VecDeque<Pending>,
    /// The answer to send: nonce and error.
    answer: Option<(String, Option<String>)>,
}

#[derive(Debug)]
struct Pending {
    id: UpdateId,
    version: String,
    added: Vec<(String, String)>,
    removed: Vec<String>,
    /// Resources that were already refused here.
    faults: Vec<Rejected>,
}

impl State {
    pub(crate) fn new(protocol: Protocol) -> Self {
        Self { protocol, stream: 0, subscriptions: BTreeMap::new() }
    }

    pub(crate) fn subscribe(&mut self, type_url: &str, names: Names) {
        if let Some(subscription) = self.subscriptions.get_mut(type_url) {
            // What is no longer wanted does not count as running: asked for again, it must come.
            if let Names::Only(only) = &names {
                subscription.running.retain(|name, _| only.contains(name));
                if let Some(Names::Only(asked)) = &subscription.asked {
                    subscription.lapsed.extend(asked.difference(only).cloned());
                }
            }
            subscription.wanted = names;
            return;
        }
        let subscription = Subscription {
            wanted: names,
            asked: None,
            lapsed: BTreeSet::new(),
            running: BTreeMap::new(),
            accepted: String::new(),
            nonce: String::new(),
            pending: VecDeque::new(),
            answer: None,
        };
        self.subscriptions.insert(type_url.to_owned(), subscription);
    }

    /// A new stream: everything is asked for again.
    pub(crate) fn connected(&mut self) {
        self.stream += 1;
        for subscription in self.subscriptions.values_mut() {
            subscription.asked = None;
            subscription.lapsed.clear();
            subscription.nonce.clear();
            subscription.answer = None;
        }
    }

    /// The next request to send, if one is due. Types go out in push order, questions before answers.
    pub(crate) fn next_request(&mut self) -> Option<RequestOut> {
        let ordered = type_urls::PUSH_ORDER.iter().map(|url| (*url).to_owned());
        let others = self.subscriptions.keys().filter(|url| !type_urls::PUSH_ORDER.contains(&url.as_str())).cloned();
        let mut order: Vec<String> = ordered.chain(others).collect();
        // What is asked for anew goes before answers, so that nobody takes an answer for the last word on an update
        // that led to further questions.
        order.sort_by_key(|url| !self.subscriptions.get(url).is_some_and(Subscription::asks_anew));
        let protocol = self.protocol;
        order.into_iter().find_map(|type_url| {
            let subscription = self.subscriptions.get_mut(&type_url)?;
            subscription.next_request(protocol, type_url)
        })
    }

    /// Takes a response. `None` when nobody subscribed to its type.
    pub(crate) fn receive(&mut self, response: ResponseIn) -> Option<Update> {
        let subscription = self.subscriptions.get_mut(&response.type_url)?;
        let id = UpdateId { type_url: response.type_url, nonce: response.nonce, stream: self.stream };
        let mut added = BTreeMap::new();
        let mut faults = Vec::new();
        for resource in response.resources {
            match unwrap(resource, &id.type_url) {
                Ok((name, version, any)) => {
                    if added.insert(name.clone(), (version, any)).is_some() {
                        faults.push(Rejected { name, reason: "comes twice in one response".to_owned() });
                    }
                }
                Err(fault) => faults.push(fault),
            }
        }
        for fault in &faults {
            added.remove(&fault.name);
        }
        let removed = match self.protocol {
            Protocol::Delta => response.removed,
            Protocol::StateOfTheWorld if is_whole(&id.type_url) => {
                let refused = |name: &String| faults.iter().any(|fault| fault.name == *name);
                let known = subscription.known();
                known.into_iter().filter(|name| !added.contains_key(name) && !refused(name)).collect()
            }
            Protocol::StateOfTheWorld => Vec::new(),
        };
        subscription.nonce.clone_from(&id.nonce);
        subscription.pending.push_back(Pending {
            id: id.clone(),
            version: response.version.clone(),
            added: added.iter().map(|(name, (version, _))| (name.clone(), version.clone())).collect(),
            removed: removed.clone(),
            faults,
        });
        let added = added.into_iter().map(|(name, (version, any))| (name, version, any)).collect();
        Some(Update { id, version: response.version, added, removed })
    }

    pub(crate) fn answer(&mut self, id: &UpdateId, rejected: &[Rejected]) {
        let Some(subscription) = self.subscriptions.get_mut(&id.type_url) else { return };
        let Some(position) = subscription.pending.iter().position(|pending| pending.id == *id) else { return };
        let Some(pending) = subscription.pending.remove(position) else { return };
        let faults: Vec<&Rejected> = pending.faults.iter().chain(rejected).collect();
        for (name, version) in pending.added {
            if subscription.wants(&name) && !rejected.iter().any(|fault| fault.name == name) {
                subscription.running.insert(name, version);
            }
        }
        for name in &pending.removed {
            if !rejected.iter().any(|fault| fault.name == *name) {
                subscription.running.remove(name);
            }
        }
        let error = (!faults.is_empty()).then(|| {
            let lines: Vec<String> = faults.iter().map(|fault| format!("{:?}: {}", fault.name, fault.reason)).collect();
            lines.join("; ")
        });
        if id.stream == self.stream {
            if error.is_none() {
                subscription.accepted = pending.version;
            }
            subscription.answer = Some((id.nonce.clone(), error));
        }
    }

    pub(crate) fn running(&self, type_url: &str) -> Vec<(String, String)> {
        let running = self.subscriptions.get(type_url).map(|subscription| &subscription.running);
        running.into_iter().flatten().map(|(name, version)| (name.clone(), version.clone())).collect()
    }
}

impl Subscription {
    fn wants(&self, name: &str) -> bool {
        match &self.wanted {
            Names::All => true,
            Names::Only(only) => only.contains(name),
        }
    }

    /// Whether the server does not know yet what is wanted.
    fn asks_anew(&self) -> bool {
        !self.lapsed.is_empty() || self.asked.as_ref() != Some(&self.wanted)
    }

    /// Names the consumer runs or is about to.
    fn known(&self) -> BTreeSet<String> {
        let mut names: BTreeSet<String> = self.running.keys().cloned().collect();
        for pending in &self.pending {
            names.extend(pending.added.iter().map(|(name, _)| name.clone()));
            for name in &pending.removed {
                names.remove(name);
            }
        }
        names
    }

    fn next_request(&mut self, protocol: Protocol, type_url: String) -> Option<RequestOut> {
        if self.answer.is_none() && !self.asks_anew() {
            return None;
        }
        // What lapsed is left out this time, and asked for the next time if it is wanted.
        let wanted = match (&self.wanted, std::mem::take(&mut self.lapsed)) {
            (Names::Only(only), lapsed) if !lapsed.is_empty() => {
                Names::Only(only.difference(&lapsed).cloned().collect())
            }
            (wanted, _) => wanted.clone(),
        };
        if self.answer.is_none() && self.asked.as_ref() == Some(&wanted) {
            return None;
        }
        let first = self.asked.is_none();
        let mut request = RequestOut { type_url, ..RequestOut::default() };
        match protocol {
            Protocol::StateOfTheWorld => {
                // Nothing is asked for that was never asked for: the empty list would mean all.
                if first && wanted == Names::Only(BTreeSet::new()) {
                    self.answer = None;
                    return None;
                }
                let (nonce, error) = self.answer.take().unwrap_or_else(|| (self.nonce.clone(), None));
                request.nonce = nonce;
                request.error = error;
                request.version.clone_from(&self.accepted);
                request.names = match &wanted {
                    Names::All if is_whole(&request.type_url) => Vec::new(),
                    Names::All => vec!["*".to_owned()],
                    Names::Only(only) => only.iter().cloned().collect(),
                };
            }
            Protocol::Delta => {
                if first && wanted == Names::Only(BTreeSet::new()) {
                    self.answer = None;
                    return None;
                }
                if let Some((nonce, error)) = self.answer.take() {
                    request.nonce = nonce;
                    request.error = error;
                }
                let star = || vec!["*".to_owned()];
                (request.subscribe, request.unsubscribe) = match (&self.asked, &wanted) {
                    (None, Names::All) if is_whole(&request.type_url) => (Vec::new(), Vec::new()),
                    (None, Names::All) => (star(), Vec::new()),
                    (Some(Names::All), Names::All) => (Vec::new(), Vec::new()),
                    (Some(Names::Only(old)), Names::All) => (star(), old.iter().cloned().collect()),
                    (None, Names::Only(new)) => (new.iter().cloned().collect(), Vec::new()),
                    (Some(Names::All), Names::Only(new)) => (new.iter().cloned().collect(), star()),
                    (Some(Names::Only(old)), Names::Only(new)) => {
                        (new.difference(old).cloned().collect(), old.difference(new).cloned().collect())
                    }
                };
                if first {
                    request.running = self.running.clone();
                }
            }
        }
        self.asked = Some(wanted);
        Some(request)
    }
}

/// Takes a resource out of its wrapping and finds its name.
fn unwrap(resource: ResourceIn, type_url: &str) -> Result<(String, String, Any), Rejected> {
    let named = resource.name.clone().unwrap_or_default();
    let fault = |reason: String| Rejected { name: named.clone(), reason };
    let mut any = resource.any.ok_or_else(|| fault("carries no message".to_owned()))?;
    let mut name = resource.name;
    let mut version = resource.version;
    if any.type_url == pb::Resource::type_url() && type_url != any.type_url {
        let inner = pb::Resource::decode(any.value.as_slice()).map_err(|error| fault(error.to_string()))?;
        any = inner.resource.ok_or_else(|| fault("carries no message".to_owned()))?;
        name = Some(inner.name);
        version = inner.version;
    }
    if any.type_url != type_url {
        return Err(fault(format!("is a {:?} in a response for {type_url:?}", any.type_url)));
    }
    let inside = name_of(&any).map_err(|error| fault(error.to_string()))?;
    Ok((name.unwrap_or(inside), version, any))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(name: &str) -> Any {
        crate::resources::placeholder(type_urls::ENDPOINT, name).unwrap().any
    }

    fn delta(nonce: &str, added: &[(&str, &str)], removed: &[&str]) -> ResponseIn {
        ResponseIn {
            type_url: type_urls::ENDPOINT.to_owned(),
            version: "v".to_owned(),
            nonce: nonce.to_owned(),
            resources: added
                .iter()
                .map(|(name, version)| ResourceIn {
                    name: Some((*name).to_owned()),
                    version: (*version).to_owned(),
                    any: Some(any(name)),
                })
                .collect(),
            removed: removed.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    fn cluster_world(nonce: &str, names: &[&str]) -> ResponseIn {
        let resources = names.iter().map(|name| ResourceIn {
            name: None,
            version: String::new(),
            any: Some(Any { type_url: type_urls::CLUSTER.to_owned(), ..any(name) }),
        });
        ResponseIn {
            type_url: type_urls::CLUSTER.to_owned(),
            version: format!("v{nonce}"),
            nonce: nonce.to_owned(),
            resources: resources.collect(),
            removed: Vec::new(),
        }
    }

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn delta_tells_what_runs_when_it_connects_again() {
        let mut state = State::new(Protocol::Delta);
        state.subscribe(type_urls::ENDPOINT, Names::only(["a", "b"]));
        state.connected();
        assert_eq!(state.next_request().unwrap().subscribe, strings(&["a", "b"]));
        assert_eq!(state.next_request(), None);
        let update = state.receive(delta("1", &[("a", "1"), ("b", "1")], &[])).unwrap();
        let bad = Rejected { name: "b".to_owned(), reason: "no port".to_owned() };
        state.answer(&update.id, &[bad]);
        let nack = state.next_request().unwrap();
        assert_eq!((nack.nonce.as_str(), nack.error.as_deref()), ("1", Some("\"b\": no port")));
        state.connected();
        let again = state.next_request().unwrap();
        assert_eq!(again.running, BTreeMap::from([("a".to_owned(), "1".to_owned())]));
        assert_eq!(again.nonce, "");
    }

    #[test]
    fn an_answer_to_an_old_stream_is_kept_but_not_sent() {
        let mut state = State::new(Protocol::Delta);
        state.subscribe(type_urls::ENDPOINT, Names::only(["a"]));
        state.connected();
        state.next_request().unwrap();
        let update = state.receive(delta("1", &[("a", "7")], &[])).unwrap();
        state.connected();
        assert!(state.next_request().unwrap().running.is_empty());
        state.answer(&update.id, &[]);
        assert_eq!(state.next_request(), None);
        assert_eq!(state.running(type_urls::ENDPOINT), [("a".to_owned(), "7".to_owned())]);
    }

    #[test]
    fn changed_subscriptions_are_differences() {
        let mut state = State::new(Protocol::Delta);
        state.subscribe(type_urls::ENDPOINT, Names::only(["a", "b"]));
        state.connected();
        state.next_request().unwrap();
        state.subscribe(type_urls::ENDPOINT, Names::only(["b", "c"]));
        let request = state.next_request().unwrap();
        assert_eq!((request.subscribe, request.unsubscribe), (strings(&["c"]), strings(&["a"])));
        state.subscribe(type_urls::ENDPOINT, Names::Only(BTreeSet::new()));
        assert_eq!(state.next_request().unwrap().unsubscribe, strings(&["b", "c"]));
    }

    /// Though both changes come before the server heard of the first.
    #[test]
    fn a_name_that_is_wanted_again_is_asked_for_again() {
        for protocol in [Protocol::Delta, Protocol::StateOfTheWorld] {
            let mut state = State::new(protocol);
            state.subscribe(type_urls::ENDPOINT, Names::only(["a", "b"]));
            state.connected();
            state.next_request().unwrap();
            state.subscribe(type_urls::ENDPOINT, Names::only(["b"]));
            state.subscribe(type_urls::ENDPOINT, Names::only(["a", "b"]));
            let (first, second) = (state.next_request().unwrap(), state.next_request().unwrap());
            match protocol {
                Protocol::Delta => {
                    assert_eq!((first.subscribe, first.unsubscribe), (strings(&[]), strings(&["a"])));
                    assert_eq!((second.subscribe, second.unsubscribe), (strings(&["a"]), strings(&[])));
                }
                Protocol::StateOfTheWorld => {
                    assert_eq!((first.names, second.names), (strings(&["b"]), strings(&["a", "b"])));
                }
            }
            assert_eq!(state.next_request(), None, "{protocol:?}");
            // On another stream nothing was asked for before.
            state.subscribe(type_urls::ENDPOINT, Names::only(["b"]));
            state.subscribe(type_urls::ENDPOINT, Names::only(["a", "b"]));
            state.connected();
            state.next_request().unwrap();
            assert_eq!(state.next_request(), None, "{protocol:?}");
        }
    }

    #[test]
    fn what_is_absent_from_the_world_is_removed() {
        let mut state = State::new(Protocol::StateOfTheWorld);
        state.subscribe(type_urls::CLUSTER, Names::All);
        state.connected();
        assert_eq!(state.next_request().unwrap().names, strings(&[]));
        let first = state.receive(cluster_world("1", &["a", "b"])).unwrap();
        assert_eq!(first.added.len(), 2);
        // Even though the first is not answered yet.
        let second = state.receive(cluster_world("2", &["b"])).unwrap();
        assert_eq!(second.removed, strings(&["a"]));
        state.answer(&first.id, &[]);
        assert_eq!(state.next_request().unwrap().version, "v1");
        state.answer(&second.id, &[Rejected { name: "b".to_owned(), reason: "bad".to_owned() }]);
        let nack = state.next_request().unwrap();
        assert_eq!((nack.version.as_str(), nack.nonce.as_str()), ("v1", "2"));
        assert_eq!(state.running(type_urls::CLUSTER).len(), 1);
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_itself() {
        let mut state = State::new(Protocol::Delta);
        state.subscribe(type_urls::ENDPOINT, Names::only(["a", "b", "c"]));
        state.connected();
        state.next_request().unwrap();
        let mut response = delta("1", &[("a", "1"), ("b", "1"), ("b", "2")], &[]);
        response.resources.push(ResourceIn {
            name: Some("c".to_owned()),
            version: String::new(),
            any: Some(Any { type_url: "other".to_owned(), value: Vec::new() }),
        });
        let update = state.receive(response).unwrap();
        assert_eq!(update.added.iter().map(|added| added.0.as_str()).collect::<Vec<_>>(), ["a"]);
        state.answer(&update.id, &[]);
        let error = state.next_request().unwrap().error.unwrap();
        assert!(error.contains("twice") && error.contains("other"), "{error}");
    }

    #[test]
    fn nothing_wanted_is_nothing_asked() {
        for protocol in [Protocol::Delta, Protocol::StateOfTheWorld] {
            let mut state = State::new(protocol);
            state.subscribe(type_urls::CLUSTER, Names::Only(BTreeSet::new()));
            state.connected();
            assert_eq!(state.next_request(), None, "{protocol:?}");
        }
    }
}
