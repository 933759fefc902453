//! A call that another server answers: message by message both ways, trailers and cancellation with it.
//!
//! What comes back has `x-echo-via`, the name of the pod that passed it on.

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::net::TcpStream;

use super::{Gone, send};
use crate::plain::hostname;

/// How long a connection may take to say its last words.
const FAREWELL_MAX: Duration = Duration::from_secs(5);

/// Passes a call on to `to`, on a connection of its own; `UNAVAILABLE` where there is none.
pub(super) async fn call(
    to: &str,
    head: &http::request::Parts,
    body: RecvStream,
    mut respond: SendResponse<Bytes>,
) -> Result<(), Gone> {
    let opened = async { h2::client::handshake(TcpStream::connect(to).await.ok()?).await.ok() };
    let Some((sender, connection)) = opened.await else {
        let mut response = Response::new(());
        response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        response.headers_mut().insert("grpc-status", HeaderValue::from_static("14"));
        respond.send_response(response, true)?;
        return Ok(());
    };
    let mut connection = pin!(connection);
    let passed = tokio::select! {
        passed = pass(sender, to, head, body, respond) => passed,
        _ = &mut connection => return Err(Gone),
    };
    // a call that was given up is reset there, which is still to be written
    _ = tokio::time::timeout(FAREWELL_MAX, connection).await;
    passed
}

async fn pass(
    sender: h2::client::SendRequest<Bytes>,
    to: &str,
    head: &http::request::Parts,
    mut body: RecvStream,
    mut respond: SendResponse<Bytes>,
) -> Result<(), Gone> {
    let mut request = Request::new(());
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = format!("http://{to}{}", head.uri.path()).parse().map_err(|_| Gone)?;
    *request.headers_mut() = head.headers.clone();
    request.headers_mut().remove("x-echo-forward");
    let (answer, mut there) = sender.ready().await?.send_request(request, body.is_end_stream())?;
    let uploading = async {
        while let Some(chunk) = body.data().await.transpose()? {
            body.flow_control().release_capacity(chunk.len())?;
            // the answer may be complete without the rest
            if send(&mut there, chunk).await.is_err() {
                return Ok(());
            }
        }
        let trailers = body.trailers().await?;
        _ = end(&mut there, trailers);
        Ok::<(), Gone>(())
    };
    let downloading = async {
        let (mut parts, mut from) = answer.await?.into_parts();
        if let Ok(via) = HeaderValue::from_str(&hostname()) {
            parts.headers.insert("x-echo-via", via);
        }
        let is_whole = from.is_end_stream();
        let mut back = respond.send_response(Response::from_parts(parts, ()), is_whole)?;
        if is_whole {
            return Ok(());
        }
        while let Some(chunk) = from.data().await.transpose()? {
            from.flow_control().release_capacity(chunk.len())?;
            send(&mut back, chunk).await?;
        }
        end(&mut back, from.trailers().await?)
    };
    tokio::pin!(uploading, downloading);
    // an answer that is complete ends the call; a client that is gone does too
    tokio::select! {
        uploaded = &mut uploading => { uploaded?; downloading.await }
        downloaded = &mut downloading => downloaded,
    }
}

fn end(stream: &mut SendStream<Bytes>, trailers: Option<HeaderMap>) -> Result<(), Gone> {
    match trailers {
        Some(trailers) => stream.send_trailers(trailers)?,
        None => stream.send_data(Bytes::new(), true)?,
    }
    Ok(())
}
