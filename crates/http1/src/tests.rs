//! Bytes and what they mean: tables, any split, and there-and-back.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use types::{Fields, RequestHead, ResponseHead, Version};

use crate::{
    BodyEncoder, Decoded, Framing, InvalidMessage, Limits, RequestDecoder, RequestKind, ResponseDecoder,
    encode_request, encode_response,
};

/// What came out of a stream of requests, readable: heads, joined bodies, trailers, the error.
fn requests(pieces: &[&[u8]]) -> Vec<String> {
    let mut decoder = RequestDecoder::new(Limits::default());
    let (mut buf, mut head, mut out) = (BytesMut::new(), RequestHead::default(), Vec::new());
    let mut body: Option<Vec<u8>> = None;
    for piece in pieces {
        buf.extend_from_slice(piece);
        loop {
            if let Some(data) = &mut body {
                match decoder.decode_body(&mut buf) {
                    Ok(Decoded::NeedMore) => break,
                    Ok(Decoded::Data(more)) => data.extend_from_slice(&more),
                    Ok(Decoded::End(trailers)) => {
                        let text = String::from_utf8_lossy(data).into_owned();
                        out.push(match trailers {
                            Some(trailers) => format!("{text:?} {trailers:?}"),
                            None => format!("{text:?}"),
                        });
                        body = None;
                    }
                    Err(error) => {
                        out.push(format!("{error:?}"));
                        return out;
                    }
                }
            } else {
                match decoder.decode_head(&mut buf, &mut head) {
                    Ok(None) => break,
                    Ok(Some(meta)) => {
                        out.push(format!(
                            "{} {} {} {:?}{}",
                            head.method(),
                            head.authority_str(),
                            String::from_utf8_lossy(head.path()),
                            meta.framing,
                            if meta.keep_alive { "" } else { " close" }
                        ));
                        body = Some(Vec::new());
                    }
                    Err(error) => {
                        out.push(format!("{error:?}"));
                        return out;
                    }
                }
            }
        }
    }
    out
}

fn check(bytes: &str, expect: &[&str]) {
    let whole = requests(&[bytes.as_bytes()]);
    assert_eq!(whole, expect, "{bytes:?}");
    let singly: Vec<&[u8]> = bytes.as_bytes().chunks(1).collect();
    assert_eq!(requests(&singly), whole, "byte by byte: {bytes:?}");
}

#[test]
fn an_upgrade_beside_a_body_is_not_taken() {
    let protocol = |more: &str| {
        let text = format!("POST / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n{more}\r\n");
        let mut head = RequestHead::default();
        let mut buf = BytesMut::from(text.as_bytes());
        let meta = RequestDecoder::new(Limits::default()).decode_head(&mut buf, &mut head).unwrap().unwrap();
        assert_eq!(meta.kind == RequestKind::Upgrade, head.protocol().is_some());
        head.protocol().is_some()
    };
    assert!(protocol("") && protocol("Content-Length: 0\r\n"));
    assert!(!protocol("Content-Length: 5\r\n") && !protocol("Transfer-Encoding: chunked\r\n"));
}

#[test]
fn connect_and_an_upgrade_are_never_one() {
    let mut head = RequestHead::default();
    let mut buf =
        BytesMut::from(&b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"[..]);
    let meta = RequestDecoder::new(Limits::default()).decode_head(&mut buf, &mut head).unwrap().unwrap();
    assert_eq!((meta.kind, head.protocol()), (RequestKind::Connect, None));
    // nor can one be written
    let mut head = RequestHead::new("CONNECT", "a", "/path");
    head.set_protocol(Some(b"websocket"));
    let mut out = BytesMut::new();
    assert!(encode_request(&mut out, &head, Framing::None).is_err() && out.is_empty());
    head.set_method("GET");
    encode_request(&mut out, &head, Framing::None).unwrap();
    assert_eq!(out, "GET /path HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n");
}

#[test]
fn requests_that_are_understood() {
    check("GET / HTTP/1.1\r\nHost: a\r\n\r\n", &["GET a / None", "\"\""]);
    check("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", &["GET a / None", "\"\""]);
    check("GET /x HTTP/1.1\r\nhost: a:80\r\nConnection: close\r\n\r\n", &["GET a:80 /x None close", "\"\""]);
    check("GET http://b/y?z HTTP/1.1\r\nHost: a\r\n\r\n", &["GET b /y?z None", "\"\""]);
    check("GET http://b HTTP/1.1\r\nHost: a\r\n\r\n", &["GET b / None", "\"\""]);
    check("GET http://b?q HTTP/1.1\r\nHost: a\r\n\r\n", &["GET b /?q None", "\"\""]);
    check("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", &["OPTIONS a * None", "\"\""]);
    check("CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", &["CONNECT a:443  None", "\"\""]);
    check("GET / HTTP/1.0\r\n\r\n", &["GET  / None close", "\"\""]);
    check("GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n", &["GET a / None", "\"\""]);
    check(
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: b\r\n\r\n",
        &["POST a / Length(3)", "\"abc\"", "GET b / None", "\"\""],
    );
    check(
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n0a;x=\"y\"\r\n0123456789\r\n000\r\n\r\n",
        &["POST a / Chunked", "\"abc0123456789\""],
    );
    check(
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: 1\r\nContent-Length: 9\r\nHost: evil\r\n\r\n",
        &["POST a / Chunked", "\"\" {\"x\": \"1\"}"],
    );
}

#[test]
fn requests_that_are_refused() {
    let long = "a".repeat(70_000);
    let head = |rest: &str| format!("GET / HTTP/1.1\r\nHost: a\r\n{rest}\r\n");
    let many: String = (0..101).map(|n| format!("h{n}: x\r\n")).collect();
    let cases: Vec<(String, InvalidMessage)> = vec![
        ("GET / HTTP/1.1\nHost: a\r\n\r\n".into(), InvalidMessage::LineEnd),
        ("GET / HTTP/1.1\r\nHost: a\n\r\n".into(), InvalidMessage::LineEnd),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n".into(), InvalidMessage::Field),
        ("\rGET / HTTP/1.1\r\nHost: a\r\n\r\n".into(), InvalidMessage::LineEnd),
        ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n".into(), InvalidMessage::StartLine),
        ("GET / x HTTP/1.1\r\nHost: a\r\n\r\n".into(), InvalidMessage::Version),
        ("GET / HTTP/1.2\r\nHost: a\r\n\r\n".into(), InvalidMessage::Version),
        ("GET / HTTP/2.0\r\nHost: a\r\n\r\n".into(), InvalidMessage::Version),
        ("GET /\r\nHost: a\r\n\r\n".into(), InvalidMessage::StartLine),
        ("G(T / HTTP/1.1\r\nHost: a\r\n\r\n".into(), InvalidMessage::StartLine),
        ("GET x HTTP/1.1\r\nHost: a\r\n\r\n".into(), InvalidMessage::Target),
        ("GET * HTTP/1.1\r\nHost: a\r\n\r\n".into(), InvalidMessage::Target),
        ("GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n".into(), InvalidMessage::Target),
        ("GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n".into(), InvalidMessage::Target),
        ("GET /\u{e9} HTTP/1.1\r\nHost: a\r\n\r\n".into(), InvalidMessage::Target),
        ("CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n".into(), InvalidMessage::Target),
        ("GET / HTTP/1.1\r\n\r\n".into(), InvalidMessage::HostMissing),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n".into(), InvalidMessage::HostMissing),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n".into(), InvalidMessage::Host),
        ("GET / HTTP/1.1\r\nHost: a, b\r\n\r\n".into(), InvalidMessage::Host),
        ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".into(), InvalidMessage::Host),
        (head("Content-Length : 0\r\n"), InvalidMessage::Field),
        (head(" X: 1\r\n"), InvalidMessage::Field),
        (head("X: a\r\n folded\r\n"), InvalidMessage::Field),
        (head("X: a\0b\r\n"), InvalidMessage::Field),
        (head(": a\r\n"), InvalidMessage::Field),
        (head("Content-Length: 1\r\nContent-Length: 1\r\n"), InvalidMessage::ContentLength),
        (head("Content-Length: 1, 1\r\n"), InvalidMessage::ContentLength),
        (head("Content-Length: +1\r\n"), InvalidMessage::ContentLength),
        (head("Content-Length: 0x1\r\n"), InvalidMessage::ContentLength),
        (head("Content-Length:\r\n"), InvalidMessage::ContentLength),
        (head("Content-Length: 99999999999999999999\r\n"), InvalidMessage::ContentLength),
        (head("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"), InvalidMessage::AmbiguousLength),
        (head("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n"), InvalidMessage::AmbiguousLength),
        (head("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"), InvalidMessage::TransferEncoding),
        (head("Transfer-Encoding: gzip, chunked\r\n"), InvalidMessage::TransferEncoding),
        (head("Transfer-Encoding: identity\r\n"), InvalidMessage::TransferEncoding),
        (head("Transfer-Encoding: xchunked\r\n"), InvalidMessage::TransferEncoding),
        (head("Transfer-Encoding: \"chunked\"\r\n"), InvalidMessage::TransferEncoding),
        ("POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".into(), InvalidMessage::TransferEncoding),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 1\r\n\r\n".into(), InvalidMessage::UnexpectedBody),
        (head(&format!("X: {long}\r\n")), InvalidMessage::HeadTooLarge),
        (head(&many), InvalidMessage::TooManyFields),
    ];
    for (bytes, error) in cases {
        check(&bytes, &[&format!("{error:?}")]);
    }
}

#[test]
fn chunks_that_are_refused() {
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for bad in [
        "x\r\n",
        "\r\n",
        "-1\r\n",
        "0x1\r\na\r\n",
        "1 \r\na\r\n",
        " 1\r\na\r\n",
        "1\na\r\n",
        "1\r\nab\r\n",
        "1\r\na\n",
        "1\r\naX\r\n",
        "1;a\nb\r\n",
        "1;\u{1}\r\n",
        "11111111111111111\r\n",
        "ffffffffffffffff\r\n",
    ] {
        let got = requests(&[format!("{head}{bad}").as_bytes()]);
        assert_eq!(got.last().map(String::as_str), Some("Chunk"), "{bad:?}: {got:?}");
    }
    for bad in ["0\r\nX: 1\n\r\n", "0\r\n X: 1\r\n\r\n", "0\r\nX : 1\r\n\r\n", "0\r\nX\r\n\r\n"] {
        let got = requests(&[format!("{head}{bad}").as_bytes()]);
        assert_eq!(got.last().map(String::as_str), Some("Trailers"), "{bad:?}: {got:?}");
    }
    let extensions = format!("{head}1;{}\r\na\r\n", "x".repeat(5000));
    assert_eq!(requests(&[extensions.as_bytes()]).last().map(String::as_str), Some("Chunk"));
}

fn response(bytes: &str, kind: RequestKind) -> String {
    let mut decoder = ResponseDecoder::new(Limits::default());
    let mut head = ResponseHead::default();
    match decoder.decode_head(&mut BytesMut::from(bytes), kind, &mut head) {
        Ok(None) => "more".into(),
        Ok(Some(meta)) => {
            let interim = if meta.interim { " interim" } else { "" };
            format!("{} {:?}{}{interim}", head.status, meta.framing, if meta.keep_alive { "" } else { " close" })
        }
        Err(error) => format!("{error:?}"),
    }
}

#[test]
fn responses() {
    use RequestKind::{Connect, Head, Plain, Upgrade};
    for (bytes, kind, expect) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", Plain, "200 Length(3)"),
        ("HTTP/1.1 200\r\nContent-Length: 3\r\n\r\n", Plain, "200 Length(3)"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", Plain, "200 Chunked"),
        ("HTTP/1.1 200 OK\r\n\r\n", Plain, "200 UntilClose close"),
        ("HTTP/1.0 200 OK\r\nContent-Length: 3\r\nConnection: keep-alive\r\n\r\n", Plain, "200 Length(3) close"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\n", Plain, "200 Length(3) close"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", Head, "200 None"),
        ("HTTP/1.1 204 No\r\n\r\n", Plain, "204 None"),
        ("HTTP/1.1 304 Not\r\nContent-Length: 3\r\n\r\n", Plain, "304 None"),
        ("HTTP/1.1 100 Continue\r\n\r\n", Plain, "100 None interim"),
        ("HTTP/1.1 101 Up\r\nUpgrade: websocket\r\n\r\n", Upgrade, "101 Tunnel close"),
        ("HTTP/1.1 101 Up\r\nUpgrade: websocket\r\n\r\n", Plain, "UnexpectedBody"),
        ("HTTP/1.1 200 OK\r\n\r\n", Connect, "200 Tunnel close"),
        ("HTTP/1.1 204 No\r\nContent-Length: 3\r\n\r\n", Plain, "UnexpectedBody"),
        ("HTTP/1.1 103 Hints\r\nTransfer-Encoding: chunked\r\n\r\n", Plain, "UnexpectedBody"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", Plain, "AmbiguousLength"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n", Plain, "ContentLength"),
        ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", Plain, "TransferEncoding"),
        ("HTTP/1.1 099 X\r\n\r\n", Plain, "StartLine"),
        ("HTTP/1.1  200 OK\r\n\r\n", Plain, "StartLine"),
        ("HTTP/1.1 2000 OK\r\n\r\n", Plain, "StartLine"),
        ("HTTP/1.1 200 OK\nX: 1\r\n\r\n", Plain, "LineEnd"),
        ("ICY 200 OK\r\n\r\n", Plain, "Version"),
        ("HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n", Plain, "Field"),
    ] {
        assert_eq!(response(bytes, kind), expect, "{bytes:?}");
    }
}

#[test]
fn an_end_of_input_ends_only_what_may_end_so() {
    for (bytes, ends) in [
        ("HTTP/1.1 200 OK\r\n\r\nabc", true),
        ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc", false),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", false),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", true),
    ] {
        let mut decoder = ResponseDecoder::new(Limits::default());
        let mut buf = BytesMut::from(bytes);
        decoder.decode_head(&mut buf, RequestKind::Plain, &mut ResponseHead::default()).unwrap().unwrap();
        while let Decoded::Data(_) = decoder.decode_body(&mut buf).unwrap() {}
        assert_eq!(decoder.end_of_input().is_ok(), ends, "{bytes:?}");
    }
}

#[test]
fn heads_that_cannot_be_written() {
    let good = || RequestHead::new("GET", "a", "/");
    let mut cases: Vec<RequestHead> = vec![
        RequestHead::new("G T", "a", "/"),
        RequestHead::new("GET", "a b", "/"),
        RequestHead::new("GET", "", "/"),
        RequestHead::new("GET", "a", "/ HTTP/1.1\r\nX: 1"),
        RequestHead::new("GET", "a", ""),
        RequestHead::new("GET", "a", "x"),
    ];
    for (name, value) in [("x", &b"a\r\nb: c"[..]), ("x", b"a\0"), ("x y", b"1"), ("x:", b"1"), ("", b"1")] {
        let mut head = good();
        head.fields.push(name, value);
        cases.push(head);
    }
    for head in cases {
        let mut out = BytesMut::new();
        assert!(encode_request(&mut out, &head, Framing::None).is_err(), "{head:?}");
        assert!(out.is_empty());
    }
}

#[test]
fn responses_are_written_so() {
    let write = |status, framing, keep_alive, fields: &[(&str, &str)]| {
        let mut head = ResponseHead::new(status);
        for (name, value) in fields {
            head.fields.push(name, value.as_bytes());
        }
        let mut out = BytesMut::new();
        encode_response(&mut out, &head, framing, keep_alive).unwrap();
        String::from_utf8(out.to_vec()).unwrap()
    };
    assert_eq!(
        write(200, Framing::Length(12), true, &[("x", "1")]),
        "HTTP/1.1 200 OK\r\nx: 1\r\ncontent-length: 12\r\n\r\n"
    );
    assert_eq!(
        write(200, Framing::Chunked, false, &[("content-length", "5"), ("connection", "x")]),
        "HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    // of a request it would be the authority
    assert_eq!(write(204, Framing::None, true, &[("host", "a")]), "HTTP/1.1 204 No Content\r\nhost: a\r\n\r\n");
    assert_eq!(
        write(304, Framing::None, true, &[("content-length", "5")]),
        "HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n"
    );
    assert_eq!(
        write(101, Framing::Tunnel, false, &[("upgrade", "websocket")]),
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    );
}

fn token() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9-]{0,12}".prop_filter("framing and hop-by-hop fields are the codec's", |name| {
        !crate::rules::is_hop_by_hop(name) && !matches!(name.as_str(), "host" | "te" | "content-length" | "expect")
    })
}

proptest! {
    /// Any split of the input gives the same events, whatever the bytes are.
    #[test]
    fn splits_do_not_matter(bytes in prop_oneof![
        "(GET|POST) /[a-z]{0,3} HTTP/1\\.[01]\r\n(Host: [a-z,]{0,3}\r\n){0,2}(Content-Length: [0-9]{1,2}\r\n)?(Transfer-Encoding: chunked\r\n)?\r\n[0-9a-f\r\n;x]{0,40}",
        ".{0,60}",
    ], cuts in prop::collection::vec(0usize..120, 0..6)) {
        let bytes = bytes.as_bytes();
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
        cuts.sort_unstable();
        let mut pieces = Vec::new();
        let mut from = 0;
        for cut in cuts {
            pieces.push(&bytes[from..cut]);
            from = cut;
        }
        pieces.push(&bytes[from..]);
        prop_assert_eq!(requests(&pieces), requests(&[bytes]));
    }

    /// What is written is read back as the same message.
    #[test]
    fn there_and_back(
        method in "[A-Z]{1,8}", path in "/[!-~&&[^#]]{0,20}", authority in "[a-z]{1,8}(:[0-9]{1,5})?",
        fields in prop::collection::vec((token(), "[!-~]{0,3}([ \t!-~\u{80}-\u{ff}]{0,10}[!-~])?"), 0..8),
        body in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..5), chunked in any::<bool>(),
    ) {
        prop_assume!(method != "CONNECT");
        let mut head = RequestHead::new(&method, &authority, &path);
        for (name, value) in &fields {
            head.fields.push(name, value.as_bytes());
        }
        let whole: Vec<u8> = body.concat();
        let framing = if chunked { Framing::Chunked } else { Framing::Length(whole.len() as u64) };
        let mut out = BytesMut::new();
        encode_request(&mut out, &head, framing).unwrap();
        let mut encoder = BodyEncoder::new(framing);
        for piece in &body {
            prop_assert!(encoder.before_data(&mut out, piece.len()));
            out.extend_from_slice(piece);
            encoder.after_data(&mut out);
        }
        prop_assert!(encoder.end(&mut out, None));
        let mut decoder = RequestDecoder::new(Limits::default());
        let mut back = RequestHead::default();
        let meta = decoder.decode_head(&mut out, &mut back).unwrap().unwrap();
        prop_assert_eq!(meta.framing, framing);
        prop_assert_eq!((back.method(), back.authority(), back.path()), (head.method(), head.authority(), head.path()));
        let strip = |fields: &Fields| fields.iter().filter(|(name, _)| *name != "content-length" && *name != "transfer-encoding")
            .map(|(name, value)| (name.to_owned(), value.trim_ascii().to_vec())).collect::<Vec<_>>();
        prop_assert_eq!(strip(&back.fields), strip(&head.fields));
        let mut got = Vec::new();
        loop {
            match decoder.decode_body(&mut out).unwrap() {
                Decoded::Data(data) => got.extend_from_slice(&data),
                Decoded::End(_) => break,
                Decoded::NeedMore => prop_assert!(false, "incomplete"),
            }
        }
        prop_assert_eq!(got, whole);
        prop_assert!(out.is_empty());
    }
}

#[test]
fn a_body_may_not_be_longer_or_shorter_than_announced() {
    let mut out = BytesMut::new();
    let mut encoder = BodyEncoder::new(Framing::Length(3));
    assert!(encoder.before_data(&mut out, 2));
    assert!(!encoder.before_data(&mut out, 2));
    assert!(!encoder.end(&mut out, None));
    assert_eq!(Bytes::from(out), Bytes::new());
    assert_eq!(Version::default(), Version::Http11);
}
