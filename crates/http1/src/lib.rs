//! Our strict HTTP/1 codec: bytes in, heads and body events out, and back. No I/O.
//!
//! What flows in: a growing buffer of one connection. What flows out: a head of `types`, how its
//! body is framed, then data, trailers and the end. The other way, heads and body frames are
//! written into a buffer. The codec repairs nothing: a message whose length is not beyond doubt,
//! or with a byte where its grammar allows none, is an [`InvalidMessage`], and the connection is
//! over (properties 1 to 8).
//!
//! **Invariants.** No socket, clock or task. Memory is bounded by [`Limits`]. A decoder that has
//! returned an error never yields another event. What the encoder writes, the decoder reads back
//! as the same message; what it cannot write so, it refuses.
//!
//! Standards: RFC 9110 (fields, methods), RFC 9112 (messages).
//!
//! Start reading at [`RequestDecoder`].

mod body;
mod decode;
mod encode;
mod error;
mod head;
pub mod rules;
#[cfg(test)]
mod tests;

pub use body::{BodyDecoder, Decoded};
pub use decode::{RequestDecoder, ResponseDecoder};
pub use encode::{BodyEncoder, encode_request, encode_response, reason_phrase};
pub use error::{InvalidMessage, UnsafeHead};
pub use head::{HeadScanner, RequestMeta, ResponseMeta, parse_request, parse_response};

/// What a peer may make us hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a head, start line included.
    pub head_bytes_max: usize,
    /// Fields of a head, and of a trailer section.
    pub fields_max: usize,
    /// Bytes of a trailer section.
    pub trailer_bytes_max: usize,
    /// Bytes of chunk extensions of one message.
    pub extension_bytes_max: usize,
}

impl Default for Limits {
    /// Envoy's defaults: 60 KiB and 100 fields.
    fn default() -> Self {
        Self { head_bytes_max: 60 * 1024, fields_max: 100, trailer_bytes_max: 16 * 1024, extension_bytes_max: 4096 }
    }
}

/// How the end of a body is told.
///
/// *Source*: RFC 9112, section 6.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    None,
    /// This many bytes.
    Length(u64),
    /// Chunks, then perhaps trailers.
    Chunked,
    /// All until the connection closes (responses only).
    UntilClose,
    /// Not a body: the connection is a tunnel from here on.
    Tunnel,
}

impl Framing {
    /// Whether the message ends with its head.
    pub fn is_empty(self) -> bool {
        matches!(self, Self::None | Self::Length(0))
    }
}

/// What of the request decides how its response is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RequestKind {
    /// The response to `HEAD` has no body.
    Head,
    /// A 2xx response to `CONNECT` opens a tunnel.
    Connect,
    /// A 101 response opens a tunnel.
    Upgrade,
    /// Everything else; 101 is a protocol error.
    #[default]
    Plain,
}

impl RequestKind {
    /// The kind of a request by its method and whether it asks for an upgrade.
    pub fn of(method: &str, upgrade: bool) -> Self {
        match method {
            "HEAD" => Self::Head,
            "CONNECT" => Self::Connect,
            _ if upgrade => Self::Upgrade,
            _ => Self::Plain,
        }
    }
}
