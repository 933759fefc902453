use std::time::Duration;

use envoy_types::pb::envoy::config::cluster::v3 as cluster_pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::rbac::v3 as rbac_pb;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::cors::v3 as cors_pb;
use envoy_types::pb::envoy::extensions::filters::http::fault::v3 as fault_pb;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3 as rbac_http;
use envoy_types::pb::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use proto::any::pack;
use types::{Cause, RequestHead, ResponseHead};

use super::*;
use crate::config::NodeFacts;
use crate::record::Stage;
use crate::testing::*;

mod authorization;
mod filters;
mod hashing;
mod headers;
mod limits;
mod replies;
mod retries;
mod routes;
mod time_outs;

fn header(name: &str, value: &str, append: bool) -> core::HeaderValueOption {
    core::HeaderValueOption {
        header: Some(core::HeaderValue { key: name.to_owned(), value: value.to_owned(), ..Default::default() }),
        append_action: i32::from(!append) * 2,
        ..Default::default()
    }
}

fn retries(on: &str, retries: u32) -> route::RetryPolicy {
    route::RetryPolicy {
        retry_on: on.to_owned(),
        num_retries: number(retries),
        retry_host_predicate: vec![route::retry_policy::RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
            config_type: Some(route::retry_policy::retry_host_predicate::ConfigType::TypedConfig(pack(
                &PreviousHostsPredicate::default(),
            ))),
        }],
        host_selection_retry_max_attempts: 5,
        ..Default::default()
    }
}

#[test]
fn a_request_goes_through() {
    let world = Http::simple().build();
    let mut call = world.start(get("example.com", "/x?y=1"));
    let attempt = call.attempt();
    assert_eq!(&*attempt.cluster.name, "a");
    assert_eq!(attempt.picked.host.address.to_string(), "10.0.0.1:8001");
    assert_eq!(attempt.protocol, UpstreamProtocol::Http1);
    assert_eq!((attempt.shared.requests.get(), attempt.picked.host.requests.get()), (1, 1));
    assert_eq!(call.head.fields.get("x-forwarded-proto"), Some(&b"http"[..]));
    assert_eq!(call.head.fields.get("x-request-id").map(<[u8]>::len), Some(36));
    assert!(!call.head.fields.contains("x-forwarded-for"));
    call.pass(Duration::from_millis(12));
    let response = call.upstream(ResponseHead::new(200));
    assert!(matches!(call.step(), Step::Respond));
    assert_eq!(response.fields.get("server"), Some(&b"envoy"[..]));
    assert_eq!(response.fields.get("date"), Some(&b"Tue, 14 Nov 2023 22:13:20 GMT"[..]));
    assert_eq!(response.fields.get("x-envoy-upstream-service-time"), Some(&b"12"[..]));
    assert_eq!(call.exchange.info().details.as_str(), "via_upstream");
    assert_eq!(call.flags(), "-");
    let shared = Arc::clone(&attempt.shared);
    drop(attempt);
    assert_eq!(shared.requests.get(), 0, "places are given back");
    assert_eq!(call.record.outcome(Stage::Route), Some("to-a"));
    assert_eq!(call.record.outcome(Stage::Cluster), Some("a"));
}

#[test]
fn refused_before_anything() {
    let check = |head: RequestHead, cause: Cause, status: u16| {
        let world = Http::simple().build();
        let mut call = world.start(head);
        let reply = call.reply();
        assert_eq!((reply.cause, reply.head.status), (cause, status));
        assert!(!reply.head.fields.contains("x-envoy-upstream-service-time"));
        assert_eq!(reply.head.fields.get("server"), Some(&b"envoy"[..]));
    };
    let mut old = get("a", "/");
    old.version = types::Version::Http10;
    check(old, Cause::UpgradeRequired, 426);
    check(get("", "/"), Cause::MissingHost, 400);
    check(RequestHead::new("CONNECT", "a:443", ""), Cause::UpgradeRefused, 403);
    let mut upgrade = get("a", "/");
    upgrade.set_protocol(Some(b"weird"));
    check(upgrade, Cause::UpgradeRefused, 403);
}

#[test]
fn a_missing_cluster_and_an_empty_one() {
    let hosts = vec![host(&["*"], vec![to("/gone", "gone"), to("/", "empty")])];
    let world = Http::new(hosts, vec![cluster("empty", &[])]).build();
    let mut call = world.start(get("a", "/gone"));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body, call.flags().as_str()), (503, &b""[..], "NC"));
    let mut call = world.start(get("a", "/"));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body, call.flags().as_str()), (503, &b"no healthy upstream"[..], "UH"));
}

#[test]
fn what_is_not_built_is_refused_by_name_and_path() {
    use envoy_types::pb::envoy::extensions::filters::http::{lua, ratelimit};
    use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
    let check = |edit: &dyn Fn(&mut Http), words: &[&str]| {
        let mut http = Http::simple();
        edit(&mut http);
        let refused = http.refused();
        for word in words {
            assert!(refused.contains(word), "{word}: {refused}");
        }
    };
    let filter = |name: &'static str, any: envoy_types::pb::google::protobuf::Any| {
        move |http: &mut Http| http.filters.push(http_filter(name, any.clone()))
    };
    let limit = pack(&ratelimit::v3::RateLimit { domain: "d".to_owned(), ..Default::default() });
    check(
        &filter("limits", limit),
        &[
            "filter_chains[0]",
            "http_filters[0] \"limits\"",
            "envoy.extensions.filters.http.ratelimit.v3.RateLimit is not supported",
        ],
    );
    let script = pack(&lua::v3::Lua::default());
    check(&filter("script", script.clone()), &["http_filters[0] \"script\"", "lua.v3.Lua is not supported"]);
    // optional or not: nothing is skipped
    check(
        &move |http| {
            http.filters.push(hcm::HttpFilter { is_optional: true, ..http_filter("script", script.clone()) });
        },
        &["lua.v3.Lua is not supported"],
    );
    check(&|http| http.hcm.codec_type = 3, &["codec_type is not supported"]);
    check(&|http| http.hcm.represent_ipv4_remote_address_as_ipv4_mapped_ipv6 = true, &["represent_ipv4"]);
    check(
        &|http| {
            http.hcm.http_protocol_options = Some(core::Http1ProtocolOptions {
                header_key_format: Some(core::http1_protocol_options::HeaderKeyFormat::default()),
                ..Default::default()
            });
        },
        &["http_protocol_options.header_key_format is not supported"],
    );
    check(
        &|http| {
            let limit = route::RateLimit::default();
            http.table.virtual_hosts[0].rate_limits.push(limit);
        },
        &["route_config.virtual_hosts[0].rate_limits is not supported"],
    );
    check(
        &|http| {
            let setting = pack(&ratelimit::v3::RateLimitPerRoute::default());
            http.table.virtual_hosts[0].routes[0].typed_per_filter_config.insert("limits".to_owned(), setting);
        },
        &["virtual_hosts[0].routes[0].typed_per_filter_config[\"limits\"]", "RateLimitPerRoute is not supported"],
    );
}

#[test]
fn every_failure_has_its_flag_and_words() {
    let check = |cause: Cause, flag: &str, status: u16, reason: &str| {
        let world = Http::simple().build();
        let mut call = world.start(get("a", "/"));
        drop(call.attempt());
        call.fail(Failure { cause, detail: "".into(), request_sent: true });
        let reply = call.reply();
        assert_eq!((call.flags().as_str(), reply.head.status), (flag, status), "{cause:?}");
        assert!(reply.body.ends_with(reason.as_bytes()), "{:?}", reply.body);
    };
    check(Cause::ConnectFailed, "UF", 503, "remote connection failure");
    check(Cause::ConnectTimeout, "UF", 503, "connection timeout");
    check(Cause::UpstreamTlsFailed, "UF", 503, "remote connection failure");
    check(Cause::UpstreamReset, "UR", 503, "remote reset");
    check(Cause::UpstreamRefusedStream, "UR", 503, "remote refused stream reset");
    check(Cause::UpstreamProtocolError, "UPE", 502, "protocol error");
    check(Cause::LocalReset, "LR", 503, "local reset");
    check(Cause::UpstreamOverflow, "UO", 503, "overflow");
}

#[test]
fn a_client_that_breaks_the_protocol_is_told_in_its_own_form() {
    let world = Http::simple().build();
    for grpc in [false, true] {
        let mut head = get("a", "/");
        if grpc {
            head.fields.push("content-type", b"application/grpc");
        }
        let mut call = world.start_seeded(head, 1, false);
        drop(call.attempt());
        let env = world.env();
        let Step::Reply(reply) =
            call.exchange.refuse(&env, Cause::BadRequest, &call.head, &mut crate::record::NoRecord)
        else {
            panic!("no reply");
        };
        assert_eq!(reply.head.status, if grpc { 200 } else { 400 });
        assert_eq!(reply.head.fields.get_str("grpc-status"), grpc.then_some("13"));
        assert!(reply.close);
    }
}

#[test]
fn original_destinations() {
    let mut direct = cluster("a", &[]);
    direct.load_assignment = None;
    direct.lb_policy = 6;
    direct.cluster_discovery_type = Some(cluster_pb::cluster::ClusterDiscoveryType::Type(4));
    let mut world = Http::new(vec![host(&["*"], vec![to("/", "a")])], vec![direct]).build();
    let mut call = world.start(get("a", "/"));
    assert_eq!(call.reply().cause, Cause::NoHealthyUpstream, "nothing was redirected");
    drop(call);
    let mut conn = (*world.conn).clone();
    conn.original_destination = Some("203.0.113.5:8080".parse().unwrap());
    world.conn = Arc::new(conn);
    let mut call = world.start(get("a", "/"));
    assert_eq!(call.attempt().picked.host.address.to_string(), "203.0.113.5:8080");
}

#[test]
fn answers_nobody_asked_for_do_no_harm() {
    let world = Http::simple().build();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    call.answer(Answer::Resolved(Ok(vec![])));
    assert_eq!(call.reply().cause, Cause::Internal);
    call.elapsed();
    assert!(matches!(call.step(), Step::Abort(Cause::Internal)));
}
