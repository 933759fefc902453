//! Sockets to the control plane: marked, so that the pod's own redirect rules let them pass.

use std::io;
use std::net::SocketAddr;

use identity::channel::{Connecting, DialTcp};
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use types::wellknown::marks;

/// Opens marked connections. Without the right to mark nothing is captured either, and the
/// connection is an ordinary one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MarkedTcp;

impl DialTcp for MarkedTcp {
    fn dial(&self, address: &str) -> Connecting {
        let address = address.to_owned();
        Box::pin(async move {
            let mut failed = io::Error::new(io::ErrorKind::NotFound, format!("{address} has no address"));
            for target in lookup_host(&address).await? {
                match connect(target).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => failed = error,
                }
            }
            Err(failed)
        })
    }
}

async fn connect(target: SocketAddr) -> io::Result<TcpStream> {
    let socket = if target.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Err(error) = SockRef::from(&socket).set_mark(marks::PROXY) {
        tracing::trace!(%error, "no socket mark");
    }
    socket.connect(target).await
}
