//! What gRPC needs of the way between a client and `lateen sample grpc-echo`, call by call.
//!
//! Each function fails with the name of the `way` it was asked over.

use crate::{Client2, Stream2, eventually};

/// What ends a call that went well.
fn ok() -> [(String, String); 1] {
    [("grpc-status".to_owned(), "0".to_owned())]
}

/// One message each way: the answer, its trailers, a failure after the message and one instead of it.
#[track_caller]
pub fn unary(way: &str, client: &Client2, host: &str) {
    let call = |method: &str, headers: &[(&str, &str)]| {
        client.unary(host, method, headers, b"hello").unwrap_or_else(|error| panic!("{way}: {method}: {error}"))
    };
    let answer = call("/echo.Echo/Unary", &[("x-echo-trailer", "kept")]);
    assert_eq!(answer.status, 200, "{way}");
    assert!(answer.body.ends_with("hello"), "{way}: {answer:?}");
    assert_eq!(answer.trailers.len(), 2, "{way}: {answer:?}");
    assert_eq!((answer.trailer("grpc-status"), answer.trailer("x-echo-trailer")), (Some("0"), Some("kept")), "{way}");
    let late = call("/echo.Echo/Unary", &[("x-echo-status", "13")]);
    assert_eq!((late.status, late.trailer("grpc-status")), (200, Some("13")), "{way}: {late:?}");
    let failed = call("/echo.Echo/Fail", &[]);
    assert_eq!(
        (failed.header("grpc-status"), failed.header("grpc-message")),
        (Some("7"), Some("told to fail")),
        "{way}: {failed:?}"
    );
}

/// Many messages there, one back.
#[track_caller]
pub fn client_stream(way: &str, client: &Client2, host: &str) {
    let mut call = client.call(host, "/echo.Echo/Collect", &[]).expect(way);
    for part in ["a", "bc", "def"] {
        call.say(part.as_bytes()).expect(way);
    }
    call.end().expect(way);
    assert_eq!(call.hear().expect(way).as_deref(), Some(&b"abcdef"[..]), "{way}");
    assert_eq!(call.hear().expect(way), None, "{way}");
    assert_eq!(call.trailers().expect(way), ok(), "{way}");
}

/// One message there, many back: more than every buffer on the way holds.
#[track_caller]
pub fn server_stream(way: &str, client: &Client2, host: &str) {
    // The end comes with the message: an answer that is over before it would be reset by an Envoy.
    repeated(way, client, host, |call, message| call.say_last(message).expect(way));
}

/// [`server_stream`], where the request is not over when the answer is. An Envoy resets such a call.
#[track_caller]
pub fn early_server_stream(way: &str, client: &Client2, host: &str) {
    repeated(way, client, host, |call, message| call.say(message).expect(way));
}

fn repeated(way: &str, client: &Client2, host: &str, ask: impl FnOnce(&mut Stream2<'_>, &[u8])) {
    let message = vec![b'x'; 10_000];
    let mut call = client.call(host, "/echo.Echo/Repeat", &[("x-echo-repeat", "300")]).expect(way);
    ask(&mut call, &message);
    for _ in 0..300 {
        assert_eq!(call.hear().expect(way).as_deref(), Some(&message[..]), "{way}");
    }
    assert_eq!(call.hear().expect(way), None, "{way}");
    assert_eq!(call.trailers().expect(way), ok(), "{way}");
}

/// Messages both ways: each answer is heard before the next message is said.
#[track_caller]
pub fn both_streams(way: &str, client: &Client2, host: &str) {
    let mut call = client.call(host, "/echo.Echo/Chat", &[("x-echo-trailer", "kept")]).expect(way);
    for turn in 0..20 {
        let text = format!("message {turn}");
        call.say(text.as_bytes()).expect(way);
        assert_eq!(call.hear().expect(way).as_deref(), Some(text.as_bytes()), "{way}");
    }
    call.end().expect(way);
    assert_eq!(call.hear().expect(way), None, "{way}");
    let mut trailers = call.trailers().expect(way);
    trailers.sort();
    assert_eq!(trailers, [&ok()[..], &[("x-echo-trailer".to_owned(), "kept".to_owned())]].concat(), "{way}");
}

/// The server learns that a client gave up, before the response's head and in the midst of both streams.
#[track_caller]
pub fn cancellation(way: &str, client: &Client2, host: &str) {
    let told = |method: &str| {
        let answer = client.unary(host, method, &[], b"").expect(way);
        answer.body.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().expect(way)
    };
    let cancelled = || told("/echo.Echo/Cancelled");
    let before = cancelled();
    let mut asked = told("/echo.Echo/Begun");
    let early = client.call(host, "/echo.Echo/Chat", &[("x-echo-delay-ms", "50000")]).expect(way);
    eventually("the call to arrive", || {
        // The question itself counts, too.
        asked += 1;
        let begun = told("/echo.Echo/Begun");
        if begun > asked { Ok(()) } else { Err(format!("{way}: {begun}")) }
    });
    let mut late = client.call(host, "/echo.Echo/Chat", &[]).expect(way);
    late.say(b"begun").expect(way);
    late.hear().expect(way);
    early.cancel();
    late.cancel();
    eventually("the server to know", || match cancelled() - before {
        2 => Ok(()),
        other => Err(format!("{way}: {other}")),
    });
}
