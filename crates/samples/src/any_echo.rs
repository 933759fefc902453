//! One port for everything: HTTP/1 as httpbin, HTTP/2 as the gRPC echo, other bytes as tcp-echo.
//!
//! It shows what a proxy made of a port that does not say its protocol.

use std::convert::Infallible;
use std::rc::Rc;

use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

use crate::http_app::{self, DRAIN, listen};
use crate::{Options, SampleError, grpc_echo, httpbin, plain};

/// Serves on `--port`, 9000 by default, until told to stop; then finishes what is in flight.
pub(crate) async fn serve(options: &Options) -> Result<(), SampleError> {
    let listener = listen(if options.port == 0 { 9000 } else { options.port }).await?;
    tokio::task::LocalSet::new().run_until(accept(listener)).await;
    Ok(())
}

async fn accept(listener: tokio::net::TcpListener) {
    let (stop, stopping) = watch::channel(false);
    let (alive, mut ended) = mpsc::channel::<Infallible>(1);
    let calls: Rc<grpc_echo::Calls> = Rc::default();
    let told = plain::until_told_to_stop();
    tokio::pin!(told);
    loop {
        let stream = tokio::select! {
            () = &mut told => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // Out of descriptors: let others finish first.
                Err(_) => { tokio::time::sleep(crate::ACCEPT_AGAIN).await; continue }
            },
        };
        let (stopping, alive, calls) = (stopping.clone(), alive.clone(), Rc::clone(&calls));
        tokio::task::spawn_local(async move {
            match kind(&stream).await {
                Some(Kind::Http1) => http_app::connection(stream, httpbin::app, stopping).await,
                Some(Kind::Http2) => grpc_echo::connection(stream, stopping, &alive, &calls).await,
                Some(Kind::Other) => {
                    // Nothing in its bytes says when it is over.
                    drop(alive);
                    plain::echo(stream, "bytes".into()).await;
                }
                None => {}
            }
        });
    }
    drop((listener, alive));
    _ = stop.send(true);
    _ = tokio::time::timeout(DRAIN, ended.recv()).await;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Http1,
    Http2,
    Other,
}

/// What the first bytes are: they are few, but come in one segment from every client there is.
async fn kind(stream: &TcpStream) -> Option<Kind> {
    let mut first = [0; 16];
    match stream.peek(&mut first).await {
        Ok(read @ 1..) => Some(kind_of(&first[..read])),
        _ => None,
    }
}

fn kind_of(first: &[u8]) -> Kind {
    let method = first.split(|byte| *byte == b' ').next().unwrap_or_default();
    if first.starts_with(b"PRI * HTTP/2") {
        Kind::Http2
    } else if method.len() < first.len() && !method.is_empty() && method.iter().all(u8::is_ascii_uppercase) {
        Kind::Http1
    } else {
        Kind::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes() {
        assert_eq!(kind_of(b"PRI * HTTP/2.0\r\n"), Kind::Http2);
        assert_eq!(kind_of(b"GET / HTTP/1.1\r\n"), Kind::Http1);
        assert_eq!(kind_of(b"hi\n"), Kind::Other);
        assert_eq!(kind_of(b"HELLO"), Kind::Other);
        assert_eq!(kind_of(&[22, 3, 1, 32]), Kind::Other);
    }
}
