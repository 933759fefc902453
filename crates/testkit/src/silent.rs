//! Servers that say nothing.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// A server that answers nothing, until it is dropped.
#[derive(Debug)]
pub struct Silent {
    /// Where it is.
    pub address: SocketAddr,
    _listener: TcpListener,
    _held: Vec<TcpStream>,
}

/// The kernel makes a connection to this machine at once, or drops its first packet: this is long enough to tell.
const MADE_MAX: Duration = Duration::from_millis(200);

impl Silent {
    /// One that connections are made to.
    pub fn listening() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("the loopback has a free port");
        let address = listener.local_addr().expect("it is bound");
        Self { address, _listener: listener, _held: Vec::new() }
    }

    /// One whose queue is full: connections to it are neither made nor refused.
    pub fn full() -> Self {
        let listener = short_queue().expect("the loopback has a free port");
        let address = listener.local_addr().expect("it is bound");
        let held = std::iter::from_fn(|| TcpStream::connect_timeout(&address, MADE_MAX).ok()).collect();
        Self { address, _listener: listener, _held: held }
    }
}

fn short_queue() -> io::Result<TcpListener> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let listener = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        socket.listen(1)
    })?;
    listener.into_std()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_one_makes_no_connection_and_refuses_none() {
        let silent = Silent::full();
        let error = TcpStream::connect_timeout(&silent.address, MADE_MAX).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let gone = Silent::listening().address;
        assert!(TcpStream::connect(gone).is_err(), "one that was dropped is gone");
    }
}
