//! What one subscriber wants, has and answered; without I/O.
//!
//! ```text
//!             request                next()                 ack                 update / request
//!  (unknown) ─────────► Fresh ──────────────► Sent{nonce} ─────► Acked ──────────────────────► next()
//!                                                  │ nack
//!                                                  └────────► Nacked ── only when content changes ──► next()
//! ```
//!
//! **Order.** A push goes out in [`type_urls::PUSH_ORDER`]; a type that waits for an answer holds
//! the later ones back if it has more to send, but never the answer to a new subscription (a client
//! may need endpoints before it acknowledges clusters).
//!
//! **Make before break.** A cluster, and its endpoints, are taken away only when no listener or
//! route of the old push is left unanswered or refused, and a route only when no listener is; until then they stay as
//! they were.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3 as pb;
use types::wellknown::type_urls;

use crate::client::Protocol;
use crate::resources::{Resource, ResourceSet, Table, is_whole, placeholder};

/// Types one stream may subscribe to.
const TYPES_MAX: usize = 32;
/// Names one stream may subscribe to, of one type. Above the 10 000 services aimed at, times ports.
const NAMES_MAX: usize = 200_000;
/// Bytes of one name.
const NAME_BYTES_MAX: usize = 4096;

/// A response to send.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// The type.
    pub type_url: Box<str>,
    /// Of the set that it comes from.
    pub version: Box<str>,
    /// Unique within the stream.
    pub nonce: Box<str>,
    /// New and changed resources; in the state of the world, all of a whole type.
    pub resources: Vec<Arc<Resource>>,
    /// Names that are gone (delta only).
    pub removed: Vec<Box<str>>,
}

/// An ack or nack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answered {
    /// The type.
    pub type_url: Box<str>,
    /// Which response.
    pub nonce: Box<str>,
    /// Why it was refused; `None` for an ack.
    pub refused: Option<Box<str>>,
}

/// Where a stream stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Progress {
    /// The newest set that the session was given; 0 before the first.
    pub generation: u64,
    /// The client answered everything of `generation`, and nothing is left to send.
    pub settled: bool,
    /// Types whose last answer was a refusal.
    pub refused: Vec<Box<str>>,
}

/// Why a request ends the stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refused {
    /// Without a type.
    NoType,
    /// Too many types.
    Types,
    /// Too many names of one type.
    Names(Box<str>),
    /// A name is too long.
    NameLength(Box<str>),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoType => f.write_str("the request names no type_url"),
            Self::Types => write!(f, "more than {TYPES_MAX} types on one stream"),
            Self::Names(type_url) => write!(f, "more than {NAMES_MAX} names of {type_url} on one stream"),
            Self::NameLength(type_url) => write!(f, "a name of {type_url} is longer than {NAME_BYTES_MAX} bytes"),
        }
    }
}

impl std::error::Error for Refused {}

/// One stream's subscriptions and what was sent for them.
#[derive(Debug)]
pub struct Session {
    protocol: Protocol,
    watches: BTreeMap<Box<str>, Watch>,
    desired: Arc<ResourceSet>,
    nonces: u64,
}

#[derive(Debug, Default)]
struct Watch {
    /// Everything of the type.
    all: bool,
    /// Names asked for.
    names: BTreeSet<Box<str>>,
    /// What the client was sent, by name.
    held: BTreeMap<Box<str>, Held>,
    exchange: Exchange,
    /// A response is owed even if nothing changed.
    owed: bool,
    /// Names to send whatever the client has (delta: it asked for them again).
    asked: BTreeSet<Box<str>>,
    /// State of the world: every subscribed name is owed, since the client waits for it again.
    owed_all: bool,
    /// State of the world: the next ack counts as a question for all names (see `next`).
    resend_on_ack: bool,
    /// Nothing is due, and neither what is wanted nor what is desired changed since that was seen:
    /// most updates change one table, and looking through the others costs as much as they hold.
    is_idle: Cell<bool>,
}

#[derive(Debug, Clone)]
struct Held {
    version: Box<str>,
    /// Kept to send again while it must not break; `None` when the client had it from another stream.
    resource: Option<Arc<Resource>>,
}

#[derive(Debug, Default, PartialEq)]
enum Exchange {
    /// Nothing was sent.
    #[default]
    Fresh,
    /// `nonce` is unanswered.
    Sent { nonce: Box<str> },
    /// The client runs what it was sent.
    Acked { nonce: Box<str> },
    /// The client refused what it was sent and keeps what it had.
    Nacked { nonce: Box<str> },
}

/// What a response would hold.
#[derive(Default)]
struct Plan {
    resources: Vec<Arc<Resource>>,
    removed: Vec<Box<str>>,
}

impl Session {
    /// A session without subscriptions or resources.
    pub fn new(protocol: Protocol) -> Self {
        Self { protocol, watches: BTreeMap::new(), desired: Arc::new(ResourceSet::default()), nonces: 0 }
    }

    /// Gives the session what the proxy should have from now on.
    pub fn update(&mut self, desired: Arc<ResourceSet>) {
        for (type_url, watch) in &self.watches {
            if !desired.shares_table(&self.desired, type_url) {
                watch.is_idle.set(false);
            }
        }
        self.desired = desired;
    }

    /// The names that the client asks for, of all types.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.watches.values().flat_map(|watch| watch.names.iter().map(|name| &**name))
    }

    /// Where the stream stands.
    pub fn progress(&self) -> Progress {
        let refused = self
            .watches
            .iter()
            .filter(|(_, watch)| matches!(watch.exchange, Exchange::Nacked { .. }))
            .map(|(type_url, _)| type_url.clone())
            .collect();
        let settled = self.desired.generation > 0
            && !self.watches.is_empty()
            && self.watches.iter().all(|(type_url, watch)| !watch.is_waiting() && self.plan(type_url, watch).is_none());
        Progress { generation: self.desired.generation, settled, refused }
    }

    /// Takes a state-of-the-world request; tells whether it was an answer.
    pub fn world_request(&mut self, request: &pb::DiscoveryRequest) -> Result<Option<Answered>, Refused> {
        let names = checked(&request.type_url, &request.resource_names)?;
        let (watch, is_new) = self.watch(&request.type_url)?;
        watch.is_idle.set(false);
        let answered = watch.answer(&request.type_url, &request.response_nonce, request.error_detail.as_ref());
        match &watch.exchange {
            // The client will ask again when it answers the response that is on its way.
            Exchange::Sent { nonce } if **nonce != *request.response_nonce => return Ok(None),
            _ => {}
        }
        let star = names.iter().any(|name| &**name == "*");
        let all = star || (names.is_empty() && is_whole(&request.type_url) && (is_new || watch.all));
        let listed: BTreeSet<Box<str>> = names.into_iter().filter(|name| &**name != "*").collect();
        let grew = (all && !watch.all) || listed.iter().any(|name| !watch.names.contains(name));
        let same = all == watch.all && listed == watch.names;
        watch.held.retain(|name, _| all || listed.contains(name));
        watch.all = all;
        watch.names = listed;
        if is_new {
            watch.owed = true;
        } else {
            let acked = answered.as_ref().is_some_and(|answered| answered.refused.is_none());
            // A request that answers nothing and changes nothing asks again: a warming cluster
            // waits for endpoints that the client already had.
            let again = answered.is_none() && (same || grew);
            if again || (acked && std::mem::take(&mut watch.resend_on_ack)) {
                watch.owed_all = true;
            }
        }
        Ok(answered)
    }

    /// Takes a delta request; tells whether it held an answer.
    pub fn delta_request(&mut self, request: pb::DeltaDiscoveryRequest) -> Result<Option<Answered>, Refused> {
        let subscribe = checked(&request.type_url, &request.resource_names_subscribe)?;
        if request.initial_resource_versions.len() > NAMES_MAX {
            return Err(Refused::Names(request.type_url.into()));
        }
        let type_url = request.type_url;
        let (watch, is_new) = self.watch(&type_url)?;
        let wants_other = is_new || !subscribe.is_empty() || !request.resource_names_unsubscribe.is_empty();
        let answered = watch.answer(&type_url, &request.response_nonce, request.error_detail.as_ref());
        if is_new {
            watch.owed = true;
            watch.all = subscribe.is_empty() && is_whole(&type_url);
            let held = request.initial_resource_versions.into_iter().map(|(name, version)| {
                (name.into_boxed_str(), Held { version: version.into_boxed_str(), resource: None })
            });
            watch.held = held.collect();
        }
        for name in subscribe {
            if &*name == "*" {
                watch.owed |= !watch.all;
                watch.all = true;
                continue;
            }
            // What the client says it has from another stream need not come again.
            if !(is_new && watch.held.contains_key(&name)) {
                watch.asked.insert(name.clone());
            }
            watch.names.insert(name);
        }
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                watch.all = false;
            } else {
                watch.names.remove(name.as_str());
                watch.asked.remove(name.as_str());
            }
        }
        if watch.names.len() > NAMES_MAX {
            return Err(Refused::Names(type_url.into()));
        }
        if wants_other {
            watch.is_idle.set(false);
            let Watch { all, names, held, .. } = watch;
            held.retain(|name, _| *all || names.contains(name));
        }
        Ok(answered)
    }

    /// The next response to send, if one is due.
    #[expect(clippy::should_implement_trait, reason = "there is no end: later calls may give more")]
    pub fn next(&mut self) -> Option<Outgoing> {
        if self.desired.generation == 0 {
            return None;
        }
        let others = self.watches.keys().filter(|url| !type_urls::PUSH_ORDER.contains(&&***url)).cloned();
        let order: Vec<Box<str>> = type_urls::PUSH_ORDER.iter().map(|url| (*url).into()).chain(others).collect();
        let mut held_back = false;
        for type_url in order {
            let Some(watch) = self.watches.get(&type_url) else { continue };
            let plan = self.plan(&type_url, watch);
            if watch.is_waiting() {
                held_back |= plan.is_some();
                continue;
            }
            let Some(plan) = plan else { continue };
            if held_back && !watch.is_asking() {
                continue;
            }
            return Some(self.send(type_url, plan));
        }
        None
    }

    fn watch(&mut self, type_url: &str) -> Result<(&mut Watch, bool), Refused> {
        if type_url.is_empty() {
            return Err(Refused::NoType);
        }
        let is_new = !self.watches.contains_key(type_url);
        if is_new && self.watches.len() >= TYPES_MAX {
            return Err(Refused::Types);
        }
        Ok((self.watches.entry(type_url.into()).or_default(), is_new))
    }

    fn send(&mut self, type_url: Box<str>, plan: Plan) -> Outgoing {
        self.nonces += 1;
        let nonce: Box<str> = format!("{}-{}", self.desired.generation, self.nonces).into();
        let is_changed = |resource: &Arc<Resource>| {
            let held = self.watches.get(&type_url).and_then(|watch| watch.held.get(&resource.name));
            held.map(|held| held.version != resource.version)
        };
        // A changed cluster or listener warms and waits for its endpoints or routes again, even
        // when these did not change.
        match self.protocol {
            Protocol::Delta if *type_url == *type_urls::CLUSTER => {
                // Envoy does not ask again for what it is subscribed to.
                let changed = plan.resources.iter().filter(|resource| is_changed(resource) == Some(true));
                let names: Vec<Box<str>> = changed.map(|resource| resource.name.clone()).collect();
                if let Some(endpoints) = self.watches.get_mut(type_urls::ENDPOINT) {
                    let wanted =
                        names.into_iter().filter(|name| endpoints.wants(name) && endpoints.held.contains_key(name));
                    let wanted: Vec<_> = wanted.collect();
                    endpoints.asked.extend(wanted);
                }
            }
            Protocol::StateOfTheWorld if plan.resources.iter().any(|resource| is_changed(resource) != Some(false)) => {
                // The question may come inside the ack of an earlier response.
                let waits = match &*type_url {
                    type_urls::CLUSTER => Some(type_urls::ENDPOINT),
                    type_urls::LISTENER => Some(type_urls::ROUTE),
                    _ => None,
                };
                if let Some(later) = waits.and_then(|waits| self.watches.get_mut(waits)) {
                    later.resend_on_ack = later.is_waiting();
                }
            }
            Protocol::Delta | Protocol::StateOfTheWorld => {}
        }
        for watch in self.watches.values() {
            watch.is_idle.set(false);
        }
        let whole = self.protocol == Protocol::StateOfTheWorld && is_whole(&type_url);
        if let Some(watch) = self.watches.get_mut(&type_url) {
            if whole {
                watch.held.clear();
            }
            for resource in &plan.resources {
                let held = Held { version: resource.version.clone(), resource: Some(Arc::clone(resource)) };
                watch.held.insert(resource.name.clone(), held);
            }
            for name in &plan.removed {
                watch.held.remove(name);
            }
            watch.owed = false;
            watch.owed_all = false;
            watch.asked.clear();
            watch.exchange = Exchange::Sent { nonce: nonce.clone() };
        }
        Outgoing {
            type_url,
            version: self.desired.version.clone(),
            nonce,
            resources: plan.resources,
            removed: plan.removed,
        }
    }

    /// What a response for a type would hold now; `None` when none is due.
    fn plan(&self, type_url: &str, watch: &Watch) -> Option<Plan> {
        if watch.is_idle.get() {
            return None;
        }
        let empty = Table::new();
        let table = self.desired.table(type_url).unwrap_or(&empty);
        let keep = self.keeps(type_url);
        let plan = match self.protocol {
            Protocol::Delta => watch.plan_delta(type_url, table, keep),
            Protocol::StateOfTheWorld if is_whole(type_url) => watch.plan_whole(table, keep),
            Protocol::StateOfTheWorld => watch.plan_named(type_url, table, keep),
        };
        // What is kept for now may be due later, without any change of this type.
        watch.is_idle.set(plan.is_none() && !keep);
        plan
    }

    /// Whether resources that are gone from the desired set stay with the client for now.
    fn keeps(&self, type_url: &str) -> bool {
        let open = |type_url: &str| {
            self.watches.get(type_url).is_some_and(|watch| {
                watch.is_waiting()
                    || matches!(watch.exchange, Exchange::Nacked { .. })
                    || self.plan(type_url, watch).is_some()
            })
        };
        match type_url {
            type_urls::ROUTE => open(type_urls::LISTENER),
            type_urls::CLUSTER => open(type_urls::LISTENER) || open(type_urls::ROUTE),
            type_urls::ENDPOINT => open(type_urls::CLUSTER) || open(type_urls::LISTENER) || open(type_urls::ROUTE),
            // Istio keeps serving a secret that was deleted: what is open would break for nothing.
            type_urls::SECRET => true,
            _ => false,
        }
    }
}

impl Watch {
    fn is_waiting(&self) -> bool {
        matches!(self.exchange, Exchange::Sent { .. })
    }

    /// The client asked for something it was not sent yet.
    fn is_asking(&self) -> bool {
        self.owed
            || self.owed_all
            || !self.asked.is_empty()
            || self.names.iter().any(|name| !self.held.contains_key(name))
    }

    fn wants(&self, name: &str) -> bool {
        self.all || self.names.contains(name)
    }

    fn answer(
        &mut self,
        type_url: &str,
        nonce: &str,
        error: Option<&envoy_types::pb::google::rpc::Status>,
    ) -> Option<Answered> {
        let Exchange::Sent { nonce: sent } = &self.exchange else { return None };
        if **sent != *nonce {
            return None;
        }
        let nonce = sent.clone();
        self.exchange = match error {
            None => Exchange::Acked { nonce: nonce.clone() },
            Some(_) => Exchange::Nacked { nonce: nonce.clone() },
        };
        let refused = error.map(|status| status.message.as_str().into());
        Some(Answered { type_url: type_url.into(), nonce, refused })
    }

    /// Whether the client should be sent this resource.
    fn lacks(&self, resource: &Resource) -> bool {
        self.owed_all
            || self.asked.contains(&resource.name)
            || self.held.get(&resource.name).is_none_or(|held| held.version != resource.version)
    }

    /// Wanted resources, and stand-ins for wanted names that do not exist.
    fn wanted<'a>(
        &'a self,
        type_url: &'a str,
        table: &'a Table,
        keep: bool,
    ) -> impl Iterator<Item = Arc<Resource>> + 'a {
        let all = table.values().filter(|_| self.all).cloned();
        let named = self.names.iter().filter(|_| !self.all).filter_map(|name| table.get(name)).cloned();
        let absent = self.names.iter().filter(move |name| {
            let stays = keep && self.held.contains_key(*name) && !self.asked.contains(*name);
            !stays && !table.contains_key(*name)
        });
        let absent = absent.filter_map(|name| placeholder(type_url, name)).map(Arc::new);
        all.chain(named).chain(absent)
    }

    fn plan_delta(&self, type_url: &str, table: &Table, keep: bool) -> Option<Plan> {
        let resources: Vec<_> = self.wanted(type_url, table, keep).filter(|resource| self.lacks(resource)).collect();
        let has_placeholder = |name: &str| self.names.contains(name) && placeholder(type_url, name).is_some();
        let mut removed: Vec<Box<str>> = Vec::new();
        if !keep {
            let gone = self.held.keys().filter(|name| !table.contains_key(*name) && !has_placeholder(name));
            removed.extend(gone.cloned());
        }
        if type_url != type_urls::SECRET {
            // A name that was asked for and does not exist is answered so.
            let unknown = self.asked.iter().filter(|name| {
                self.wants(name)
                    && !table.contains_key(*name)
                    && !has_placeholder(name)
                    && !self.held.contains_key(*name)
            });
            removed.extend(unknown.cloned());
        }
        // An empty answer tells "nothing" of a whole type; of others it would only puzzle clients.
        let due = (self.owed && is_whole(type_url)) || !resources.is_empty() || !removed.is_empty();
        due.then_some(Plan { resources, removed })
    }

    fn plan_whole(&self, table: &Table, keep: bool) -> Option<Plan> {
        let mut resources: Vec<_> = table.values().filter(|resource| self.wants(&resource.name)).cloned().collect();
        let mut due = self.owed || resources.iter().any(|resource| self.lacks(resource));
        for (name, held) in &self.held {
            if table.contains_key(name) {
                continue;
            }
            match &held.resource {
                Some(resource) if keep => resources.push(Arc::clone(resource)),
                _ => due = true,
            }
        }
        due.then_some(Plan { resources, removed: Vec::new() })
    }

    fn plan_named(&self, type_url: &str, table: &Table, keep: bool) -> Option<Plan> {
        let resources: Vec<_> = self.wanted(type_url, table, keep).filter(|resource| self.lacks(resource)).collect();
        (!resources.is_empty()).then_some(Plan { resources, removed: Vec::new() })
    }
}

fn checked(type_url: &str, names: &[String]) -> Result<Vec<Box<str>>, Refused> {
    if names.len() > NAMES_MAX {
        return Err(Refused::Names(type_url.into()));
    }
    if names.iter().any(|name| name.len() > NAME_BYTES_MAX) {
        return Err(Refused::NameLength(type_url.into()));
    }
    Ok(names.iter().map(|name| name.as_str().into()).collect())
}

#[cfg(test)]
mod tests;
