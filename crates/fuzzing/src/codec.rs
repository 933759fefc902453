//! The HTTP/1 codec: however a stream of bytes is cut, it means the same; what is written means
//! what was read.

use bytes::BytesMut;
use http1::{Decoded, Framing, Limits, RequestDecoder, RequestKind, ResponseDecoder, encode_request, encode_response};
use types::{Fields, RequestHead, ResponseHead};

use crate::mutate::{self, Random};

/// The first byte says what the rest is: requests, or responses to requests of some kind.
const KINDS: [Option<RequestKind>; 5] =
    [None, Some(RequestKind::Plain), Some(RequestKind::Head), Some(RequestKind::Upgrade), Some(RequestKind::Connect)];

const LIMITS: Limits = Limits { head_bytes_max: 4096, fields_max: 20, trailer_bytes_max: 512, extension_bytes_max: 64 };

pub(crate) fn run(data: &[u8]) -> u64 {
    let Some((first, bytes)) = data.split_first() else { return 0 };
    let kind = KINDS[usize::from(*first) % KINDS.len()];
    let whole = events(kind, bytes, usize::MAX);
    for size in [1, 2, 3, 7, 64] {
        let cut = events(kind, bytes, size);
        assert_eq!(cut, whole, "pieces of {size}: {:?}", String::from_utf8_lossy(bytes));
    }
    crate::signature(&whole)
}

/// What a stream of bytes means, in pieces of `size`.
fn events(kind: Option<RequestKind>, bytes: &[u8], size: usize) -> Vec<String> {
    let pieces = bytes.chunks(size.min(bytes.len().max(1)));
    match kind {
        None => requests(pieces),
        Some(kind) => responses(kind, pieces),
    }
}

fn requests<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<String> {
    let mut decoder = RequestDecoder::new(LIMITS);
    let (mut buf, mut head, mut out) = (BytesMut::new(), RequestHead::default(), Vec::new());
    let mut body: Option<Vec<u8>> = None;
    for piece in pieces {
        buf.extend_from_slice(piece);
        loop {
            match &mut body {
                Some(data) => match decoder.decode_body(&mut buf) {
                    Ok(Decoded::NeedMore) => break,
                    Ok(Decoded::Data(more)) => {
                        assert!(!more.is_empty(), "an empty piece of a body");
                        data.extend_from_slice(&more);
                    }
                    Ok(Decoded::End(trailers)) => {
                        check_trailers(trailers.as_ref());
                        out.push(format!("end {:?} {trailers:?}", String::from_utf8_lossy(data)));
                        body = None;
                    }
                    Err(error) => return ended(out, error),
                },
                None => match decoder.decode_head(&mut buf, &mut head) {
                    Ok(None) => break,
                    Ok(Some(meta)) => {
                        assert!(!matches!(meta.framing, Framing::UntilClose | Framing::Tunnel));
                        request_comes_back(&head, meta.framing);
                        out.push(format!("{head:?} {meta:?}"));
                        body = Some(Vec::new());
                    }
                    Err(error) => return ended(out, error),
                },
            }
        }
    }
    out
}

fn responses<'a>(kind: RequestKind, pieces: impl Iterator<Item = &'a [u8]>) -> Vec<String> {
    let mut decoder = ResponseDecoder::new(LIMITS);
    let (mut buf, mut head, mut out) = (BytesMut::new(), ResponseHead::default(), Vec::new());
    let mut body: Option<Vec<u8>> = None;
    for piece in pieces {
        buf.extend_from_slice(piece);
        loop {
            match &mut body {
                Some(data) => match decoder.decode_body(&mut buf) {
                    Ok(Decoded::NeedMore) => break,
                    Ok(Decoded::Data(more)) => data.extend_from_slice(&more),
                    Ok(Decoded::End(trailers)) => {
                        check_trailers(trailers.as_ref());
                        out.push(format!("end {:?} {trailers:?}", String::from_utf8_lossy(data)));
                        body = None;
                    }
                    Err(error) => return ended(out, error),
                },
                None => match decoder.decode_head(&mut buf, kind, &mut head) {
                    Ok(None) => break,
                    Ok(Some(meta)) => {
                        response_comes_back(kind, &head, meta.framing);
                        out.push(format!("{head:?} {meta:?}"));
                        if !meta.interim {
                            body = Some(Vec::new());
                        }
                    }
                    Err(error) => return ended(out, error),
                },
            }
        }
    }
    if let Some(data) = body {
        let end = decoder.end_of_input();
        out.push(format!("closed {:?} {end:?}", String::from_utf8_lossy(&data)));
    }
    out
}

fn ended(mut out: Vec<String>, error: http1::InvalidMessage) -> Vec<String> {
    out.push(format!("{error:?}"));
    out
}

fn check_trailers(trailers: Option<&Fields>) {
    for (name, value) in trailers.into_iter().flat_map(Fields::iter) {
        assert!(!http1::rules::is_forbidden_trailer(name), "trailer {name:?}");
        assert!(http1::rules::is_token(name.as_bytes()) && http1::rules::is_value(value), "trailer {name:?}");
    }
}

/// Without what the encoder writes itself.
fn bare(fields: &Fields) -> Vec<(String, Vec<u8>)> {
    let own = |name: &str| matches!(name, "content-length" | "upgrade");
    fields.iter().filter(|(name, _)| !own(name)).map(|(name, value)| (name.to_owned(), value.to_vec())).collect()
}

/// A request that was read can be written, and is the same when read again.
fn request_comes_back(head: &RequestHead, framing: Framing) {
    let mut out = BytesMut::new();
    if head.authority().is_empty() {
        // HTTP/1.0 without Host: it never goes out so
        assert!(encode_request(&mut out, head, framing).is_err() && out.is_empty());
        return;
    }
    encode_request(&mut out, head, framing).expect("what was read can be written");
    let mut again = RequestHead::default();
    let limits = Limits { head_bytes_max: 64 * 1024, fields_max: 100, ..LIMITS };
    let meta = RequestDecoder::new(limits).decode_head(&mut out, &mut again);
    let meta = meta.expect("what was written can be read").expect("it is whole");
    assert!(out.is_empty(), "bytes are left over");
    assert_eq!(meta.framing, framing);
    assert_eq!((again.method(), again.path(), again.authority()), (head.method(), head.path(), head.authority()));
    assert_eq!(again.protocol(), head.protocol());
    assert_eq!(bare(&again.fields), bare(&head.fields));
}

fn response_comes_back(kind: RequestKind, head: &ResponseHead, framing: Framing) {
    let mut out = BytesMut::new();
    encode_response(&mut out, head, framing, true).expect("what was read can be written");
    let mut again = ResponseHead::default();
    let limits = Limits { head_bytes_max: 64 * 1024, fields_max: 100, ..LIMITS };
    let meta = ResponseDecoder::new(limits).decode_head(&mut out, kind, &mut again);
    let meta = meta.expect("what was written can be read").expect("it is whole");
    assert!(out.is_empty(), "bytes are left over");
    assert_eq!((again.status, meta.framing), (head.status, framing));
    assert_eq!(bare(&again.fields), bare(&head.fields));
}

const WORDS: [&str; 40] = [
    "\r\n",
    "\r\n\r\n",
    "\n",
    "\r",
    "\0",
    ": ",
    " ",
    "\t",
    "GET ",
    "HEAD ",
    "POST ",
    "CONNECT ",
    "OPTIONS * ",
    "/",
    "http://a",
    " HTTP/1.1\r\n",
    " HTTP/1.0\r\n",
    "HTTP/1.1 200 OK\r\n",
    "HTTP/1.1 100 Continue\r\n\r\n",
    "HTTP/1.1 101 X\r\n",
    "HTTP/1.1 204 X\r\n",
    "HTTP/1.1 304 X\r\n",
    "Host: a\r\n",
    "Content-Length: ",
    "Content-Length: 5\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: ",
    "chunked",
    "Connection: close\r\n",
    "Connection: upgrade\r\n",
    "Connection: x, keep-alive\r\n",
    "Upgrade: websocket\r\n",
    "TE: trailers\r\n",
    "Expect: 100-continue\r\n",
    "5\r\nhello\r\n",
    "5;a=b\r\nhello\r\n",
    "0\r\n\r\n",
    "0\r\nx: 1\r\n\r\n",
    "ffffffffffffffff\r\n",
    "hello",
];

pub(crate) fn mutated(input: &[u8], random: &mut Random) -> Vec<u8> {
    mutate::bytes(input, &WORDS, random)
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        "\0GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n\r\nGET /b HTTP/1.1\r\nHost: a\r\n\r\n",
        "\0POST /p?q HTTP/1.1\r\nHost: a:80\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
        "\0POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nx: 1\r\n\r\n",
        "\0GET http://b/c HTTP/1.1\r\nHost: a\r\n\r\nCONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
        "\0GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        "\0GET / HTTP/1.0\r\n\r\nOPTIONS * HTTP/1.1\r\nHost: [::1]:8\r\n\r\n",
        "\x01HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 204 No\r\n\r\n",
        "\x01HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        "\x01HTTP/1.0 200 OK\r\n\r\nuntil the end",
        "\x01HTTP/1.1 200 OK\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
        "\x02HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
        "\x03HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nbytes",
        "\x04HTTP/1.1 200 OK\r\n\r\nbytes",
    ]
    .map(|seed| seed.as_bytes().to_vec())
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_hold() {
        for seed in seeds() {
            run(&seed);
        }
    }
}
