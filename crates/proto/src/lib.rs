//! Messages of Istio that Envoy's API lacks, wire compatible, and a few helpers around `Any`.
//!
//! Holds generated code: the certificate service that agents call, the name table of a proxy's
//! DNS, and the settings of the filters of Istio's own build; and Envoy's messages as JSON ([`json`]). Sources are in `protos/`,
//! `cargo xtask` writes `src/generated`. `google.protobuf` is [`envoy_types`]' own, so that there
//! is one `Any` in the tree.
//!
//! **Invariants.** No I/O, no behaviour; field numbers never change.
//!
//! Start reading at [`any`] and `protos/ca.proto`.

pub mod any;
pub mod json;

/// The certificate service (`istio.v1.auth`).
pub mod ca {
    pub use crate::generated::ca::*;
}

/// The table of a proxy's DNS (`istio.networking.nds.v1`).
pub mod nds {
    pub use crate::generated::nds::*;
}

/// Settings of the filters of Istio's own build.
pub mod filters {
    /// `istio.alpn`: `istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig`.
    pub mod alpn {
        pub use crate::generated::alpn::*;
    }
    /// `istio.stats`: `stats.PluginConfig`.
    pub mod stats {
        pub use crate::generated::stats::*;
    }
    /// `istio.metadata_exchange` as a network filter: `envoy.tcp.metadataexchange.config.MetadataExchange`.
    pub mod metadata_exchange {
        pub use crate::generated::metadata_exchange::*;
    }
    /// `istio.metadata_exchange` as an HTTP filter: `io.istio.http.peer_metadata.Config`.
    pub mod peer_metadata {
        pub use crate::generated::peer_metadata::*;
    }
}

#[expect(
    missing_docs,
    unused_qualifications,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
#[rustfmt::skip]
mod generated {
    #[path = "istio.v1.auth.rs"]
    pub(super) mod ca;
    #[path = "istio.networking.nds.v1.rs"]
    pub(super) mod nds;
    #[path = "istio.envoy.config.filter.http.alpn.v2alpha1.rs"]
    pub(super) mod alpn;
    #[path = "stats.rs"]
    pub(super) mod stats;
    #[path = "envoy.tcp.metadataexchange.config.rs"]
    pub(super) mod metadata_exchange;
    #[path = "io.istio.http.peer_metadata.rs"]
    pub(super) mod peer_metadata;
}
