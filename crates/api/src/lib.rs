//! Istio's API and the part of Kubernetes' that a mesh needs: types, reader, checks.
//!
//! YAML or JSON flows in ([`parse_documents`], [`from_json`]); objects with typed specs and findings
//! with file, line and field flow out. [`ConfigSet`] holds the admitted objects of one moment.
//!
//! **Invariants.** No I/O, clock, randomness or environment. Only one object is looked at at a time:
//! what needs a second one (unknown hosts, conflicts) belongs to `mesh`. Text from users never
//! panics, and what it may cost is bounded ([`yaml::Limits`]). Nothing that was written is dropped
//! silently: it is decoded, refused, or named in a finding.
//!
//! Start reading at [`object::Object`], [`kind`], [`decode`], [`mod@validate`].

#[macro_use]
mod macros;

pub mod codes;
pub mod config_set;
pub mod decode;
pub mod injection;
pub mod k8s;
pub mod kind;
mod known;
pub mod mesh_config;
pub mod networking;
pub mod object;
pub mod operator;
pub mod reader;
pub mod regexes;
pub mod scalar;
pub mod security;
pub mod suggest;
pub mod telemetry;
pub mod validate;
pub mod watch;
pub mod yaml;

pub use config_set::{Change, ConfigSet};
pub use kind::Kind;
pub use mesh_config::MeshConfig;
pub use object::{Metadata, Object, Spec, Typed};
pub use reader::{
    Documents, ParsedObject, Positions, ReadOptions, Refused, from_json, from_json_in, parse_documents,
    parse_documents_with,
};
pub use validate::validate;
pub use yaml::to_yaml;
