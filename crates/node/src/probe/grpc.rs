//! The health protocol of gRPC.
//!
//! Its two messages have one field each, so they are read and written here:
//! `HealthCheckRequest {string service = 1}`, `HealthCheckResponse {ServingStatus status = 1}`.

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};

const ANSWER_BYTES_MAX: usize = 4096;
/// The tag of field 1 as a string, and as a number.
const SERVICE: u8 = 0x0a;
const STATUS: u8 = 0x08;
const SERVING: u8 = 1;
/// `UNIMPLEMENTED`
const NO_SUCH_METHOD: &str = "12";

/// Asks whether `service` is well.
pub(super) async fn check<Stream>(stream: Stream, authority: &str, service: &str) -> Result<(), String>
where
    Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
    let asking = async {
        let request = Request::post(format!("http://{authority}/grpc.health.v1.Health/Check"))
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers")
            .header(header::USER_AGENT, super::USER_AGENT)
            .body(Full::new(question(service)))
            .map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let (head, body) = response.into_parts();
        if head.status != http::StatusCode::OK {
            return Err(format!("the answer is not gRPC: status {}", head.status));
        }
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|error| error.to_string())?;
        // A call without messages has its trailers in the head.
        let trailers = body.trailers().cloned().unwrap_or(head.headers);
        verdict(&trailers, &body.to_bytes())
    };
    tokio::pin!(asking);
    // Order does not matter: when the connection ends first, the answer is there or will never be.
    tokio::select! {
        answer = &mut asking => answer,
        _ = connection => asking.await,
    }
}

/// The request in gRPC's frame.
fn question(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(SERVICE);
        put_number(&mut message, service.len());
        message.put_slice(service.as_bytes());
    }
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(&message);
    frame.freeze()
}

/// Seven bits a byte, the low ones first; all but the last byte have the high bit.
fn put_number(out: &mut BytesMut, mut number: usize) {
    while number >= 0x80 {
        out.put_u8(u8::try_from(number & 0x7f).unwrap_or_default() | 0x80);
        number >>= 7;
    }
    out.put_u8(u8::try_from(number).unwrap_or_default());
}

fn verdict(trailers: &HeaderMap, body: &[u8]) -> Result<(), String> {
    let text = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status") {
        Some("0") => {}
        Some(NO_SUCH_METHOD) => return Err("the server does not know grpc.health.v1.Health".to_owned()),
        Some(code) => return Err(format!("gRPC status {code}: {}", text("grpc-message").unwrap_or_default())),
        None => return Err("the answer is not gRPC: it has no status".to_owned()),
    }
    // Frame, then the one field; without it the status is 0, unknown.
    match body.get(5..) {
        Some([STATUS, SERVING, ..]) => Ok(()),
        Some([STATUS, status, ..]) => Err(format!("the service is not serving: status {status}")),
        _ => Err("the service is not serving: its status is unknown".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_framed() {
        assert_eq!(question(""), [0, 0, 0, 0, 0].as_slice());
        assert_eq!(question("ab"), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b'].as_slice());
        let long = question(&"x".repeat(300));
        assert_eq!(long[..8], [0, 0, 0, 1, 47, 0x0a, 0xac, 2]);
    }

    #[test]
    fn only_serving_is_well() {
        let of = |status: &str, body: &[u8]| {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", status.parse().unwrap());
            verdict(&trailers, body)
        };
        assert_eq!(of("0", &[0, 0, 0, 0, 2, 8, 1]), Ok(()));
        assert!(of("0", &[0, 0, 0, 0, 2, 8, 2]).unwrap_err().contains("status 2"));
        assert!(of("0", &[0, 0, 0, 0, 0]).unwrap_err().contains("unknown"));
        assert!(of("0", &[]).is_err());
        assert!(of("12", &[]).unwrap_err().contains("does not know"));
        assert!(of("5", &[]).unwrap_err().contains("gRPC status 5"));
        assert!(verdict(&HeaderMap::new(), &[0, 0, 0, 0, 2, 8, 1]).is_err());
    }
}
