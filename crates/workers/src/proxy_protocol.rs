//! The PROXY protocol from clients, versions 1 and 2.
//!
//! The address that a preamble says the client wanted is the original destination, as a redirect's is.
//!
//! *Source*: the PROXY protocol's specification, sections 2.1 and 2.2; Envoy's "original destination"
//! service discovery, which takes redirects and preambles alike.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::{Buf, BytesMut};
use engine::facts::ConnFacts;
use tokio::io::AsyncReadExt as _;

use crate::detect::Seen;
use crate::io::Socket;

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// The longest line of version 1.
const LINE_MAX: usize = 107;

/// Reads a preamble into `facts`; what follows it stays in `buffer`. `false`: the connection is over.
pub(crate) async fn read(socket: &mut Socket, buffer: &mut BytesMut, optional: bool, facts: &mut ConnFacts) -> bool {
    loop {
        match parse(buffer) {
            Seen::Yes((length, addresses)) => {
                buffer.advance(length);
                if let Some((peer, local)) = addresses {
                    facts.peer = peer;
                    if facts.local != local {
                        facts.original_destination = Some(local);
                    }
                    facts.local = local;
                }
                return true;
            }
            // what began as a preamble is one, or nothing
            Seen::No => return optional && !begins(buffer),
            Seen::NeedMore => {}
        }
        buffer.reserve(512);
        match socket.read_buf(buffer).await {
            Ok(0) | Err(_) => return false,
            Ok(_) => {}
        }
    }
}

/// Whether the bytes begin as a preamble does.
fn begins(bytes: &[u8]) -> bool {
    bytes.starts_with(SIGNATURE) || bytes.starts_with(b"PROXY ")
}

type Addresses = Option<(SocketAddr, SocketAddr)>;

fn parse(bytes: &[u8]) -> Seen<(usize, Addresses)> {
    let n = bytes.len().min(SIGNATURE.len());
    if bytes[..n] == SIGNATURE[..n] {
        return if n < SIGNATURE.len() { Seen::NeedMore } else { parse_v2(bytes) };
    }
    let n = bytes.len().min(6);
    if bytes[..n] != b"PROXY "[..n] {
        return Seen::No;
    }
    let Some(end) = bytes.iter().take(LINE_MAX).position(|b| *b == b'\n') else {
        return if bytes.len() >= LINE_MAX { Seen::No } else { Seen::NeedMore };
    };
    let Some(line) = bytes[..end].strip_suffix(b"\r").and_then(|line| std::str::from_utf8(line).ok()) else {
        return Seen::No;
    };
    let mut parts = line.split(' ').skip(1);
    match parts.next() {
        Some("UNKNOWN") => Seen::Yes((end + 1, None)),
        Some(family @ ("TCP4" | "TCP6")) => {
            let (from, to) = (parts.next(), parts.next());
            let (from_port, to_port) = (parts.next(), parts.next());
            let address =
                |ip: Option<&str>, port: Option<&str>| Some(SocketAddr::new(ip?.parse().ok()?, port?.parse().ok()?));
            match (address(from, from_port), address(to, to_port), parts.next()) {
                (Some(from), Some(to), None)
                    if from.is_ipv4() == (family == "TCP4") && from.is_ipv4() == to.is_ipv4() =>
                {
                    Seen::Yes((end + 1, Some((from, to))))
                }
                _ => Seen::No,
            }
        }
        _ => Seen::No,
    }
}

fn parse_v2(bytes: &[u8]) -> Seen<(usize, Addresses)> {
    let Some(header) = bytes.get(12..16) else { return Seen::NeedMore };
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[0] >> 4 != 2 {
        return Seen::No;
    }
    let Some(body) = bytes.get(16..16 + length) else { return Seen::NeedMore };
    let total = 16 + length;
    let port = |at: usize| body.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    // the command: 0 local (health checks), 1 proxied
    match (header[0] & 15, header[1]) {
        (0, _) => Seen::Yes((total, None)),
        (1, 0x11) => {
            let ip = |at: usize| {
                body.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok()).map(|b| IpAddr::from(Ipv4Addr::from(b)))
            };
            both(total, ip(0), port(8), ip(4), port(10))
        }
        (1, 0x21) => {
            let ip = |at: usize| {
                body.get(at..at + 16)
                    .and_then(|b| <[u8; 16]>::try_from(b).ok())
                    .map(|b| IpAddr::from(Ipv6Addr::from(b)))
            };
            both(total, ip(0), port(32), ip(16), port(34))
        }
        (1, _) => Seen::Yes((total, None)),
        _ => Seen::No,
    }
}

fn both(
    total: usize,
    from: Option<IpAddr>,
    from_port: Option<u16>,
    to: Option<IpAddr>,
    to_port: Option<u16>,
) -> Seen<(usize, Addresses)> {
    match (from, from_port, to, to_port) {
        (Some(from), Some(from_port), Some(to), Some(to_port)) => {
            Seen::Yes((total, Some((SocketAddr::new(from, from_port), SocketAddr::new(to, to_port)))))
        }
        _ => Seen::No,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let line = b"PROXY TCP4 1.2.3.4 5.6.7.8 100 200\r\nGET";
        for n in 0..line.len() - 4 {
            assert_eq!(parse(&line[..n]), Seen::NeedMore, "{n}");
        }
        let addresses = Some(("1.2.3.4:100".parse().unwrap(), "5.6.7.8:200".parse().unwrap()));
        assert_eq!(parse(line), Seen::Yes((36, addresses)));
        assert_eq!(parse(b"PROXY UNKNOWN\r\n"), Seen::Yes((15, None)));
        for bad in
            ["GET /", "PROXY TCP4 1.2.3.4\r\n", "PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n", "PROXY TCP4 x 5.6.7.8 1 2\n"]
        {
            assert_eq!(parse(bad.as_bytes()), Seen::No, "{bad}");
        }
    }

    #[test]
    fn binary() {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([0x21, 0x11, 0, 12, 1, 2, 3, 4, 5, 6, 7, 8, 0, 100, 0, 200]);
        for n in 0..bytes.len() {
            assert_eq!(parse(&bytes[..n]), Seen::NeedMore, "{n}");
        }
        let addresses = Some(("1.2.3.4:100".parse().unwrap(), "5.6.7.8:200".parse().unwrap()));
        assert_eq!(parse(&bytes), Seen::Yes((28, addresses)));
        bytes[12] = 0x31;
        assert_eq!(parse(&bytes), Seen::No);
    }
}
