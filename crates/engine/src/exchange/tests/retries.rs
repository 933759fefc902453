//! What is tried again, where, and what it says.

use super::*;

#[test]
fn failures_are_retried_elsewhere_and_said_so() {
    let one = with(to("/", "a"), |action| action.retry_policy = Some(retries("connect-failure,refused-stream", 2)));
    let mut hosts = host(&["*"], vec![one]);
    hosts.include_request_attempt_count = true;
    let world = Http::new(vec![hosts], vec![cluster("a", &[1, 2, 3])]).build();
    let mut call = world.start(get("a", "/"));
    let mut seen = Vec::new();
    for number in 1..=3 {
        let attempt = call.attempt();
        assert_eq!(attempt.number, number);
        assert_eq!(call.head.fields.get_str("x-envoy-attempt-count"), Some(number.to_string().as_str()));
        assert_eq!(attempt.replay_bytes_max > 0, number < 3);
        seen.push(attempt.picked.host.address.to_string());
        drop(attempt);
        let detail = "delayed connect error: Connection refused";
        call.fail(Failure { cause: Cause::ConnectFailed, detail: detail.into(), request_sent: false });
        if number < 3 {
            let wait = call.wait();
            assert!(wait < Duration::from_millis(25 << number), "{wait:?}");
            call.pass(wait);
            call.elapsed();
        }
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3, "every host once");
    let reply = call.reply();
    assert_eq!(reply.head.status, 503);
    assert_eq!(
        std::str::from_utf8(&reply.body).unwrap(),
        "upstream connect error or disconnect/reset before headers. retried and the latest reset reason: remote \
         connection failure"
    );
    assert!(call.exchange.info().details.as_str().contains("Connection_refused"), "the log has the reason");
    assert_eq!(call.flags(), "URX,UF");
    assert_eq!(call.exchange.info().attempts, 3);
}

#[test]
fn an_unreplayable_body_is_not_retried() {
    let one = with(to("/", "a"), |action| action.retry_policy = Some(retries("5xx", 2)));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1, 2])]).build();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    call.exchange.set_replayable(false);
    let response = call.upstream(ResponseHead::new(503));
    assert!(matches!(call.step(), Step::Respond));
    assert_eq!(response.status, 503);
}

#[test]
fn responses_are_retried_by_status() {
    let one = with(to("/", "a"), |action| action.retry_policy = Some(retries("5xx", 1)));
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1, 2])]).build();
    let mut call = world.start(get("a", "/"));
    let first = call.attempt().picked.host.address.clone();
    call.upstream(ResponseHead::new(500));
    let wait = call.wait();
    call.pass(wait);
    call.elapsed();
    assert_ne!(call.attempt().picked.host.address, first);
    call.upstream(ResponseHead::new(500));
    assert!(matches!(call.step(), Step::Respond));
    assert_eq!(call.flags(), "URX");
}

#[test]
fn no_policy_no_retry() {
    let world = Http::simple().build();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    call.fail(Failure { cause: Cause::UpstreamClosed, detail: "".into(), request_sent: true });
    let reply = call.reply();
    assert_eq!(
        &*reply.body,
        b"upstream connect error or disconnect/reset before headers. reset reason: connection termination"
    );
    assert_eq!(call.flags(), "UC");
    let details = call.exchange.info().details.as_str().to_owned();
    assert_eq!(details, "upstream_reset_before_response_started{connection_termination}");
}

#[test]
fn a_retry_tells_what_time_is_left() {
    let one = with(to("/", "a"), |action| {
        action.timeout = secs(2);
        action.retry_policy = Some(retries("5xx", 1));
    });
    let world = Http::new(vec![host(&["*"], vec![one])], vec![cluster("a", &[1, 2])]).build();
    let mut call = world.start(get("a", "/"));
    drop(call.attempt());
    let told = |call: &Call<'_>| {
        let text = call.head.fields.get_str("x-envoy-expected-rq-timeout-ms").map(str::to_owned);
        text.and_then(|text| text.parse::<u64>().ok()).map(Duration::from_millis)
    };
    assert_eq!(told(&call), Some(Duration::from_secs(2)));
    call.pass(Duration::from_millis(500));
    call.upstream(ResponseHead::new(503));
    let wait = call.wait();
    call.pass(wait);
    call.elapsed();
    drop(call.attempt());
    let left = Duration::from_millis(1500).saturating_sub(wait);
    assert!(told(&call).is_some_and(|told| told <= left && left.abs_diff(told) < Duration::from_millis(1)), "{left:?}");
}
