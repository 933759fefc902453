//! Every time-out, and what it ends.

use super::*;

#[test]
fn the_route_time_out_begins_with_the_end_of_the_request() {
    let one = with(to("/", "a"), |action| action.timeout = secs(2));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])]).build();
    let mut call = world.start_seeded(get("a", "/"), 1, false);
    drop(call.attempt());
    assert_eq!(call.head.fields.get("x-envoy-expected-rq-timeout-ms"), Some(&b"2000"[..]));
    assert_eq!(call.exchange.deadline(), None, "the request is still coming");
    call.pass(Duration::from_secs(5));
    call.exchange.request_complete(call.now.mono);
    assert_eq!(call.exchange.deadline(), Some(call.now.mono + Duration::from_secs(2)));
    call.pass(Duration::from_secs(1));
    call.elapsed();
    assert_eq!(call.wait(), Duration::from_secs(1), "too early: wait on");
    call.pass(Duration::from_secs(1));
    call.elapsed();
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body), (504, &b"upstream request timeout"[..]));
    assert_eq!((call.flags().as_str(), call.exchange.info().details.as_str()), ("UT", "response_timeout"));
}

#[test]
fn a_tunnel_outlasts_the_route_time_out_once_it_is_open() {
    let check = |head: RequestHead, status: u16, opens: bool| {
        let one = with(to("/", "a"), |action| {
            action.timeout = secs(1);
            let websocket =
                route::route_action::UpgradeConfig { upgrade_type: "websocket".into(), ..Default::default() };
            action.upgrade_configs = vec![websocket];
        });
        let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])]).build();
        let mut call = world.start(head);
        drop(call.attempt());
        assert!(call.exchange.deadline().is_some(), "the answer is waited for");
        let mut head = ResponseHead::new(status);
        call.answer(Answer::Upstream { head: &mut head, ended: false });
        assert!(matches!(call.step(), Step::Respond));
        assert_eq!(call.exchange.deadline().is_none(), opens, "{status}");
    };
    let mut upgrade = get("a", "/");
    upgrade.set_protocol(Some(b"websocket"));
    check(upgrade.clone(), 101, true);
    check(upgrade, 200, false);
    check(get("a", "/"), 200, false);
}

#[test]
fn a_response_that_takes_too_long_is_cut() {
    let one = with(to("/", "a"), |action| action.timeout = secs(1));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])]).build();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    let mut head = ResponseHead::new(200);
    call.answer(Answer::Upstream { head: &mut head, ended: false });
    assert!(matches!(call.step(), Step::Respond));
    call.pass(Duration::from_secs(1));
    call.elapsed();
    assert!(matches!(call.step(), Step::Abort(Cause::RequestTimeout)));
}

#[test]
fn per_try_time_outs() {
    let check = |on: &str, expect_retry: bool| {
        let one = with(to("/", "a"), |action| {
            let mut policy = retries(on, 1);
            policy.per_try_timeout = secs(1);
            action.retry_policy = Some(policy);
        });
        let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1, 2])]).build();
        let mut call = world.start(get("a", "/"));
        assert_eq!(call.attempt().per_try_timeout, Some(Duration::from_secs(1)));
        call.pass(Duration::from_secs(1));
        call.elapsed();
        if expect_retry {
            let wait = call.wait();
            call.pass(wait);
            call.elapsed();
            drop(call.attempt());
            call.pass(Duration::from_secs(1));
            call.elapsed();
        }
        let reply = call.reply();
        assert_eq!((reply.head.status, reply.cause), (504, Cause::PerTryTimeout));
        assert_eq!(call.flags(), if expect_retry { "URX,UT" } else { "UT" });
    };
    check("connect-failure,refused-stream", false);
    check("5xx", true);
}

#[test]
fn an_attempt_on_which_nothing_moves_is_tried_again() {
    let one = with(to("/", "a"), |action| {
        let mut policy = retries("5xx", 1);
        policy.per_try_idle_timeout = secs(1);
        action.retry_policy = Some(policy);
    });
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1, 2])]).build();
    let mut call = world.start(get("a", "/"));
    let first = call.attempt().picked.host.address.clone();
    assert_eq!(call.exchange.idle_timeout(), Some(Duration::from_secs(1)));
    call.pass(Duration::from_secs(1));
    call.answer(Answer::Idle);
    let wait = call.wait();
    call.pass(wait);
    call.elapsed();
    assert_ne!(call.attempt().picked.host.address, first);
    call.pass(Duration::from_secs(1));
    call.answer(Answer::Idle);
    let reply = call.reply();
    assert_eq!((reply.head.status, call.flags().as_str()), (504, "URX,UT"));
    assert_eq!(call.exchange.info().details.as_str(), "upstream_per_try_idle_timeout");
}

#[test]
fn a_request_must_be_whole_in_time() {
    let mut http = Http::simple();
    http.hcm.request_timeout = secs(3);
    let world = http.build();
    let mut call = world.start_seeded(get("a", "/"), 1, false);
    drop(call.attempt());
    assert_eq!(call.exchange.deadline(), Some(call.now.mono + Duration::from_secs(3)));
    call.pass(Duration::from_secs(3));
    call.elapsed();
    let reply = call.reply();
    assert_eq!((reply.head.status, reply.cause), (408, Cause::RequestReceiveTimeout));
    // once it is whole, the limit is over
    let mut call = world.start_seeded(get("a", "/"), 1, false);
    drop(call.attempt());
    call.exchange.request_complete(call.now.mono);
    assert_eq!(call.exchange.deadline(), None);
}

#[test]
fn grpc_deadlines_and_replies() {
    let grpc = |timeout: &str| {
        let mut head = RequestHead::new("POST", "a", "/p.S/M");
        head.fields.push("content-type", b"application/grpc");
        if !timeout.is_empty() {
            head.fields.push("grpc-timeout", timeout.as_bytes());
        }
        head
    };
    let check = |max: Option<i64>, timeout: &str, expect: Option<u64>| {
        let one = with(to("/", "a"), |action| {
            action.timeout = max.and_then(secs);
            #[expect(deprecated, reason = "what istiod writes")]
            {
                action.max_grpc_timeout = max.and_then(secs);
            }
        });
        let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])]).build();
        let mut call = world.start(grpc(timeout));
        drop(call.attempt());
        let left = call.exchange.deadline().map(|at| at.saturating_duration_since(call.now.mono).as_secs());
        assert_eq!(left, expect, "{max:?} {timeout}");
    };
    check(Some(0), "", None);
    check(Some(0), "7S", Some(7));
    check(Some(3), "7S", Some(3));
    check(Some(3), "1S", Some(1));
    check(Some(3), "", Some(3));
    let world = Http::new(vec![host(&["*"], vec![to("/", "empty")])], vec![cluster("empty", &[])]).build();
    let mut call = world.start(grpc(""));
    let reply = call.reply();
    assert_eq!((reply.head.status, &*reply.body), (200, &b""[..]));
    assert_eq!(reply.head.fields.get("grpc-status"), Some(&b"14"[..]));
    assert_eq!(reply.head.fields.get("grpc-message"), Some(&b"no healthy upstream"[..]));
    assert_eq!(call.flags(), "UH");
}

#[test]
fn streams_end_at_their_limits() {
    let one = with(to("/", "a"), |action| {
        action.max_stream_duration =
            Some(route::route_action::MaxStreamDuration { max_stream_duration: secs(3), ..Default::default() });
        action.idle_timeout = secs(9);
    });
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1])]).build();
    // Who is waited for: the client, or the upstream that has the whole request.
    for (is_whole, status) in [(false, 408), (true, 504)] {
        let mut call = world.start_seeded(get("a", "/"), 1, is_whole);
        drop(call.attempt());
        if is_whole {
            let now = call.now.mono;
            call.exchange.request_complete(now);
        }
        assert_eq!(call.exchange.idle_timeout(), Some(Duration::from_secs(9)));
        call.pass(Duration::from_secs(3));
        call.elapsed();
        let reply = call.reply();
        assert_eq!((reply.head.status, &*reply.body), (status, &b"downstream duration timeout"[..]));
        assert_eq!(call.flags(), "DT");
        let mut call = world.start_seeded(get("a", "/"), 1, is_whole);
        drop(call.attempt());
        if is_whole {
            let now = call.now.mono;
            call.exchange.request_complete(now);
        }
        call.answer(Answer::Idle);
        let reply = call.reply();
        let told = (reply.head.status, &*reply.body, reply.cause);
        assert_eq!(told, (status, &b"stream timeout"[..], Cause::StreamIdleTimeout));
    }
}
