//! Generates `crates/proto/src/generated` from `crates/proto/protos`, and `crates/proto/descriptors/envoy.binpb`
//! from these and the sources that `envoy-types` ships.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use protox::file::{File, FileResolver, GoogleFileResolver};
use serde_json::Value;

/// Every source of ours, in the order they are compiled.
const SOURCES: &[&str] =
    &["ca.proto", "nds.proto", "stats.proto", "metadata_exchange.proto", "peer_metadata.proto", "alpn.proto"];

/// What a bootstrap, `/config_dump` and a control plane's dump may hold, beside what these import.
const DESCRIBED: &[&str] = &[
    "envoy/config/bootstrap/v3/bootstrap.proto",
    "envoy/admin/v3/config_dump.proto",
    "envoy/service/discovery/v3/discovery.proto",
    "envoy/config/route/v3/route.proto",
    "envoy/config/route/v3/scoped_route.proto",
    "envoy/config/trace/v3/zipkin.proto",
    "envoy/config/trace/v3/opentelemetry.proto",
    "envoy/config/common/matcher/v3/matcher.proto",
    "envoy/extensions/access_loggers/file/v3/file.proto",
    "envoy/extensions/access_loggers/stream/v3/stream.proto",
    "envoy/extensions/clusters/dynamic_forward_proxy/v3/cluster.proto",
    "envoy/extensions/filters/common/fault/v3/fault.proto",
    "envoy/extensions/filters/common/set_filter_state/v3/value.proto",
    "envoy/extensions/filters/http/cors/v3/cors.proto",
    "envoy/extensions/filters/http/dynamic_forward_proxy/v3/dynamic_forward_proxy.proto",
    "envoy/extensions/filters/http/ext_authz/v3/ext_authz.proto",
    "envoy/extensions/filters/http/fault/v3/fault.proto",
    "envoy/extensions/filters/http/grpc_stats/v3/config.proto",
    "envoy/extensions/filters/http/grpc_web/v3/grpc_web.proto",
    "envoy/extensions/filters/http/header_mutation/v3/header_mutation.proto",
    "envoy/extensions/filters/http/jwt_authn/v3/config.proto",
    "envoy/extensions/filters/http/rbac/v3/rbac.proto",
    "envoy/extensions/filters/http/router/v3/router.proto",
    "envoy/extensions/filters/listener/http_inspector/v3/http_inspector.proto",
    "envoy/extensions/filters/listener/original_dst/v3/original_dst.proto",
    "envoy/extensions/filters/listener/proxy_protocol/v3/proxy_protocol.proto",
    "envoy/extensions/filters/listener/tls_inspector/v3/tls_inspector.proto",
    "envoy/extensions/filters/network/http_connection_manager/v3/http_connection_manager.proto",
    "envoy/extensions/filters/network/mongo_proxy/v3/mongo_proxy.proto",
    "envoy/extensions/filters/network/rbac/v3/rbac.proto",
    "envoy/extensions/filters/network/set_filter_state/v3/set_filter_state.proto",
    "envoy/extensions/filters/network/tcp_proxy/v3/tcp_proxy.proto",
    "envoy/extensions/formatter/metadata/v3/metadata.proto",
    "envoy/extensions/formatter/req_without_query/v3/req_without_query.proto",
    "envoy/extensions/http/header_formatters/preserve_case/v3/preserve_case.proto",
    "envoy/extensions/internal_redirect/previous_routes/v3/previous_routes_config.proto",
    "envoy/extensions/load_balancing_policies/common/v3/common.proto",
    "envoy/extensions/load_balancing_policies/least_request/v3/least_request.proto",
    "envoy/extensions/load_balancing_policies/round_robin/v3/round_robin.proto",
    "envoy/extensions/network/dns_resolver/cares/v3/cares_dns_resolver.proto",
    "envoy/extensions/path/match/uri_template/v3/uri_template_match.proto",
    "envoy/extensions/path/rewrite/uri_template/v3/uri_template_rewrite.proto",
    "envoy/extensions/request_id/uuid/v3/uuid.proto",
    "envoy/extensions/resource_monitors/downstream_connections/v3/downstream_connections.proto",
    "envoy/extensions/retry/host/previous_hosts/v3/previous_hosts.proto",
    "envoy/extensions/retry/priority/previous_priorities/v3/previous_priorities_config.proto",
    "envoy/extensions/transport_sockets/proxy_protocol/v3/upstream_proxy_protocol.proto",
    "envoy/extensions/transport_sockets/raw_buffer/v3/raw_buffer.proto",
    "envoy/extensions/transport_sockets/tls/v3/secret.proto",
    "envoy/extensions/transport_sockets/tls/v3/tls.proto",
    "envoy/extensions/upstreams/http/v3/http_protocol_options.proto",
    "alpn.proto",
    "metadata_exchange.proto",
    "nds.proto",
    "peer_metadata.proto",
    "stats.proto",
];

/// The folders of `envoy-types`' sources, each the top of its own imports.
const SHIPPED: &[&str] = &[
    "data-plane-api",
    "xds",
    "protoc-gen-validate",
    "googleapis",
    "cel-spec/proto",
    "opentelemetry-proto",
    "client_model",
];

/// Where the set is kept.
const SET: &str = "crates/proto/descriptors/envoy.binpb";

/// Writes what is generated, or only says whether it is fresh.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    let set = describe(root)?;
    let place = root.join(SET);
    if check {
        if std::fs::read(&place).with_context(|| SET)? != set {
            bail!("{SET} is not what its sources give; run `cargo xtask proto`");
        }
        return Ok(());
    }
    std::fs::write(&place, set).with_context(|| SET)?;
    generate(root, &root.join("crates/proto/src/generated"))
}

/// The descriptor set, without comments.
fn describe(root: &Path) -> Result<Vec<u8>> {
    let shipped = envoy_types(root)?.join("proto");
    let mut folders: Vec<PathBuf> = SHIPPED.iter().map(|name| shipped.join(name)).collect();
    folders.push(root.join("crates/proto/protos"));
    let mut compiler = protox::Compiler::with_file_resolver(Sources(folders));
    compiler.include_imports(true).include_source_info(false);
    compiler.open_files(DESCRIBED).context("compile the described messages")?;
    Ok(compiler.encode_file_descriptor_set())
}

/// Files below these folders, in their order, then Google's own.
struct Sources(Vec<PathBuf>);

impl FileResolver for Sources {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        let Some(path) = self.0.iter().map(|folder| folder.join(name)).find(|path| path.exists()) else {
            return GoogleFileResolver::new().open_file(name);
        };
        let file = File::open(name, &path)?;
        // protox looks for a relative name in every package that exists, where protoc looks in those that are imported.
        match file.source() {
            Some(text) if text.contains(RELATIVE) => File::from_source(name, &text.replace(RELATIVE, ABSOLUTE)),
            _ => Ok(file),
        }
    }
}

const RELATIVE: &str = " common.dynamic_forward_proxy.v3.";
const ABSOLUTE: &str = " .envoy.extensions.common.dynamic_forward_proxy.v3.";

/// The folder of the `envoy-types` that the tree is locked to.
fn envoy_types(root: &Path) -> Result<PathBuf> {
    let output =
        Command::new("cargo").args(["metadata", "--format-version", "1", "--locked"]).current_dir(root).output()?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let manifest =
        packages.filter(|package| package["name"] == "envoy-types").find_map(|it| it["manifest_path"].as_str());
    let manifest = manifest.context("envoy-types is not in the tree")?;
    Path::new(manifest).parent().map(Path::to_owned).context("a manifest is in a folder")
}

/// Writes the Rust code of all messages into `out`, which must exist.
///
/// `google.protobuf` is envoy-types' own: there is one `Any` in the tree.
fn generate(root: &Path, out: &Path) -> Result<()> {
    let protos = root.join("crates/proto/protos");
    let descriptors = protox::compile(SOURCES, [&protos]).context("compile crates/proto/protos")?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "::envoy_types::pb::google::protobuf")
        .btree_map(".")
        .out_dir(out)
        .compile_fds_with_config(descriptors, {
            let mut config = tonic_prost_build::Config::new();
            config.enable_type_names().type_name_domain(["."], "type.googleapis.com");
            config
        })
        .context("generate crates/proto/src/generated")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_descriptor_set_is_fresh() {
        super::run(&crate::root(), true).expect("run `cargo xtask proto`");
    }
}
