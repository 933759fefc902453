use std::net::SocketAddr;

use types::Cause;

use super::*;
use crate::cel::Expression;
use crate::exchange::Details;

struct Sample {
    conn: ConnFacts,
    request: RequestHead,
    response: ResponseHead,
    info: StreamInfo,
}

fn sample() -> Sample {
    let address = |text: &str| -> SocketAddr { text.parse().unwrap() };
    let mut request = RequestHead::new("GET", "reviews:9080", "/x?y");
    request.fields.push("user-agent", b"curl \"x\"");
    let mut response = ResponseHead::new(503);
    response.fields.push("x-envoy-upstream-service-time", b"7");
    let mut info = StreamInfo { details: Details::Static("via_upstream"), ..StreamInfo::default() };
    info.causes.push(Cause::RetryLimitExceeded);
    info.causes.push(Cause::ConnectFailed);
    info.causes.push(Cause::ConnectFailed);
    info.route_name = Some("default".into());
    Sample { conn: ConnFacts::plaintext("l", address("10.0.0.1:80"), address("10.0.0.2:99")), request, response, info }
}

impl Sample {
    fn record(&self) -> LogRecord<'_> {
        LogRecord {
            conn: &self.conn,
            chain: "0.0.0.0_80",
            request: Some(&self.request),
            response: Some(&self.response),
            trailers: None,
            info: &self.info,
            start_nanos: 1_700_000_000_123_456_789,
            duration: Duration::from_millis(42),
            request_duration: None,
            response_duration: Some(Duration::from_millis(40)),
            bytes_received: 1,
            bytes_sent: 2,
            upstream_local: None,
            upstream_protocol: None,
            connection_id: 5,
            downstream_failure: "tlsv1_alert",
        }
    }
}

fn check(format: &str, expect: &str) {
    let sample = sample();
    let mut out = Vec::new();
    Template::compile(format).unwrap().text(&sample.record(), &mut out);
    assert_eq!(String::from_utf8(out).unwrap(), expect, "{format}");
}

#[test]
fn operators() {
    check("%FILTER_CHAIN_NAME% %CONNECTION_TERMINATION_DETAILS%", "0.0.0.0_80 -");
    check("[%START_TIME%]", "[2023-11-14T22:13:20.123Z]");
    check("%START_TIME(%Y/%m/%d %T.%6f %s)%", "2023/11/14 22:13:20.123456 1700000000");
    check("%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%", "GET /x?y HTTP/1.1");
    check("%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%", "503 URX,UF via_upstream");
    check("%BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESPONSE_TX_DURATION%", "1 2 42 2");
    check("%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% %RESP(NO)%", "7 -");
    check("%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "10.0.0.2:99 10.0.0.2");
    check("%DOWNSTREAM_LOCAL_ADDRESS%:%DOWNSTREAM_REMOTE_PORT%:%CONNECTION_ID%", "10.0.0.1:80:99:5");
    check("%START_TIME:10% %DOWNSTREAM_REMOTE_ADDRESS:4%", "2023-11-14 10.0");
    check("%REQ(USER-AGENT):4%|%ROUTE_NAME%|%UPSTREAM_HOST%|%UPSTREAM_CLUSTER%", "curl|default|-|-");
    check("100%% %FILTER_STATE(wasm.x:PLAIN)%", "100% -");
    check("%DOWNSTREAM_TRANSPORT_FAILURE_REASON%", "tlsv1_alert");
    for bad in ["%NOPE%", "%REQ%", "%REQ(x", "%REQ(x):y%", "50%"] {
        assert!(Template::compile(bad).is_err(), "{bad}");
    }
    assert!(Template::compile(DEFAULT_TEXT).is_ok());
}

#[test]
fn addresses_and_moments_are_written_as_the_library_writes_them() {
    let mut sample = sample();
    for address in ["255.1.0.100:65535", "[2001:db8::1]:443", "[::ffff:1.2.3.4]:0"] {
        sample.conn.local = address.parse().unwrap();
        let mut out = Vec::new();
        let template = Template::compile("%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%").unwrap();
        template.text(&sample.record(), &mut out);
        let expect = format!("{} {}", sample.conn.local, sample.conn.local.ip());
        assert_eq!(String::from_utf8(out).unwrap(), expect);
    }
    for nanos in [0, 999_999_999, 951_782_399_007_000_000, 4_102_444_800_000_000_000] {
        let record = LogRecord { start_nanos: nanos, ..sample.record() };
        let mut both = Vec::new();
        Template::compile("%START_TIME% %START_TIME(%FT%T.%3fZ)%").unwrap().text(&record, &mut both);
        let both = String::from_utf8(both).unwrap();
        let (plain, formatted) = both.split_once(' ').unwrap();
        assert_eq!(plain, formatted);
    }
}

#[test]
fn json_keeps_numbers_and_nulls() {
    let template = |text: &str| JsonValue::Template(Template::compile(text).unwrap());
    let members = vec![
        ("client".into(), template("%DOWNSTREAM_REMOTE_ADDRESS%")),
        ("code".into(), template("%RESPONSE_CODE%")),
        ("host".into(), template("%UPSTREAM_HOST%")),
        ("mixed".into(), template("c=%RESPONSE_CODE%")),
        ("ua".into(), template("%REQ(user-agent)%")),
    ];
    let log = AccessLog {
        path: "/dev/stdout".into(),
        format: Format::Json(JsonFormat { members, omit_empty: false }),
        filter: None,
    };
    let mut out = Vec::new();
    log.write(&sample().record(), &mut out);
    let expect =
        "{\"client\":\"10.0.0.2:99\",\"code\":503,\"host\":null,\"mixed\":\"c=503\",\"ua\":\"curl \\\"x\\\"\"}\n";
    assert_eq!(String::from_utf8(out).unwrap(), expect);
}

#[test]
fn filters() {
    let sample = sample();
    let record = sample.record();
    let check = |filter: LogFilter, expect: bool| assert_eq!(filter.holds(&record), expect, "{filter:?}");
    check(LogFilter::Status(Comparison::AtLeast(500)), true);
    check(LogFilter::Status(Comparison::AtMost(500)), false);
    check(LogFilter::Flags(vec!["NR".into(), "UF".into()]), true);
    check(LogFilter::Flags(vec!["NR".into()]), false);
    check(LogFilter::Flags(vec![]), true);
    check(LogFilter::And(vec![LogFilter::Always, LogFilter::Duration(Comparison::AtMost(1))]), false);
    check(LogFilter::Or(vec![LogFilter::Always, LogFilter::Duration(Comparison::AtMost(1))]), true);
}

#[test]
fn expressions() {
    let check = |text: &str, expect: bool| {
        let expression = Expression::compile(text).unwrap();
        assert_eq!(expression.holds(&sample().record()), expect, "{text}");
    };
    check("response.code >= 400", true);
    check("response.code >= 400 && request.method != \"GET\"", false);
    check("response.code < 400 || (request.url_path == '/x')", true);
    check("!has(request.headers['x-no'])", true);
    check("request.headers['user-agent'].startsWith('curl')", true);
    check("response.code in [200, 503]", true);
    check("request.headers['x-no'] == 'a'", false);
    check("connection.mtls == false", true);
    for bad in ["", "response.code >", "nope.x == 1", "response.code >= 1.5", "a(b)", "request.method == 'x", "(((("] {
        assert!(Expression::compile(bad).is_err(), "{bad}");
    }
    assert!(Expression::compile(&"!".repeat(500)).is_err(), "bounded");
}
