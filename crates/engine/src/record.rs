//! Decision records: why a connection or request went where it went.
//!
//! `explain` and tests pass a [`Record`]; the hot path passes [`NoRecord`], and nothing is formatted.

use std::sync::Arc;

/// The objects that made a resource, as its metadata or name tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Provenance {
    /// `filter_metadata["istio"].config`, as Istio writes it; empty if absent.
    pub istio_config: Box<str>,
    /// `filter_metadata["lateen"]`, as JSON; empty if absent.
    pub lateen: Box<str>,
}

impl Provenance {
    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.istio_config.is_empty() && self.lateen.is_empty()
    }
}

/// One decision.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What was decided.
    pub stage: Stage,
    /// The outcome: a name, an address, a verdict.
    pub outcome: String,
    /// More about it, for people; empty for none.
    pub detail: String,
    /// The objects behind it.
    pub provenance: Option<Arc<Provenance>>,
}

/// What a decision is about, in the order of a request's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Which listener.
    Listener,
    /// Which filter chain.
    Chain,
    /// Which route table.
    RouteTable,
    /// Which virtual host.
    VirtualHost,
    /// Which route.
    Route,
    /// A filter's verdict.
    Filter,
    /// Which cluster (a draw by weight included).
    Cluster,
    /// Which endpoint.
    Host,
    /// Which transport socket and protocol.
    Transport,
    /// A copy of the request is sent elsewhere.
    Mirror,
    /// A try failed and is tried again, or not.
    Retry,
    /// The mesh answered by itself.
    Reply,
}

/// Takes decisions.
pub trait Recorder {
    /// Whether anybody listens; when not, no text is made.
    fn wants(&self) -> bool;
    /// Takes one decision.
    fn record(&mut self, decision: Decision);
}

/// Nobody listens.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoRecord;

impl Recorder for NoRecord {
    fn wants(&self) -> bool {
        false
    }
    fn record(&mut self, _: Decision) {}
}

/// All decisions in order.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// What was decided.
    pub decisions: Vec<Decision>,
}

impl Recorder for Record {
    fn wants(&self) -> bool {
        true
    }
    fn record(&mut self, decision: Decision) {
        self.decisions.push(decision);
    }
}

impl Record {
    /// The last outcome of `stage`.
    pub fn outcome(&self, stage: Stage) -> Option<&str> {
        self.decisions.iter().rev().find(|decision| decision.stage == stage).map(|decision| decision.outcome.as_str())
    }
}

/// Records if somebody listens; `make` gives outcome and detail.
pub(crate) fn note(
    recorder: &mut dyn Recorder,
    stage: Stage,
    provenance: Option<&Arc<Provenance>>,
    make: impl FnOnce() -> (String, String),
) {
    if recorder.wants() {
        let (outcome, detail) = make();
        recorder.record(Decision { stage, outcome, detail, provenance: provenance.cloned() });
    }
}
