//! Generates `crates/proto/src/generated` from `crates/proto/protos`.

use std::path::Path;

use anyhow::{Context, Result};

/// Every source, in the order they are compiled.
const SOURCES: &[&str] =
    &["ca.proto", "nds.proto", "stats.proto", "metadata_exchange.proto", "peer_metadata.proto", "alpn.proto"];

/// Writes the Rust code of all messages into `out`, which must exist.
///
/// `google.protobuf` is envoy-types' own: there is one `Any` in the tree.
pub fn generate(root: &Path, out: &Path) -> Result<()> {
    let protos = root.join("crates/proto/protos");
    let descriptors = protox::compile(SOURCES, [&protos]).context("compile crates/proto/protos")?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "::envoy_types::pb::google::protobuf")
        .btree_map(".")
        .out_dir(out)
        .compile_fds_with_config(
            descriptors,
            {
                let mut config = tonic_prost_build::Config::new();
                config.enable_type_names().type_name_domain(["."], "type.googleapis.com");
                config
            },
        )
        .context("generate crates/proto/src/generated")
}
