//! Where would this call go, and why: the mesh's own compiler and the proxy's own evaluator, asked
//! without sending anything.
//!
//! ```text
//!  MeshSnapshot ─► compile, for the proxy of each hop ─┬► engine::assembly (lower) ─► RuntimeConfig
//!  a running proxy's own config dump and host state ───┘
//!  Call ──────────► listener, chain ─► Exchange or Stream, recorded ─► Explanation ─► text, JSON
//! ```
//!
//! [`explain()`] walks a call from its caller's proxy to the application that would answer it, one
//! [`Hop`] after the other, and says at each decision which objects made it and what lost. What is
//! drawn at random (weights, faults in percent) becomes several [`Path`]s with their shares.
//! [`explain_running()`] does the same with what each running proxy says of itself ([`Running`]): one
//! that is behind answers by what it has, and the explanation says that it is behind.
//! [`assume()`] fills in what manifests alone do not have: pods, their addresses, ClusterIPs.
//! [`vet()`] lowers everything compiled for a proxy and reports what our proxy would refuse.
//!
//! **Invariants.** Pure. There is no second implementation of routing or policy here: every verdict
//! is the engine's. What could not be known (an authorizer's answer, an address outside) is assumed
//! and said among the notes.
//!
//! Start reading at [`Call`], then `walk`.

mod assume;
mod call;
mod reasons;
mod report;
mod run;
mod running;
mod vet;
mod walk;
mod world;

pub use assume::{Assumed, assume};
pub use call::{Call, Caller, InvalidCall, Target};
pub use report::{Because, Decision, End, EndKind, Explanation, Hop, Lost, Path, Request, Side};
pub use running::{InvalidDump, Running};
pub use vet::{Refusal, refusal, refused, vet, vet_packed};
pub use walk::{Explainer, explain, explain_running};
