//! What can be wrong with a message.

use thiserror::Error;
use types::Cause;

/// Why bytes from a peer are not a message. The connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InvalidMessage {
    /// The head is longer than allowed.
    #[error("the head is too large")]
    HeadTooLarge,
    /// More fields than allowed.
    #[error("too many fields")]
    TooManyFields,
    /// A line does not end in CR LF, or CR, LF or NUL stands where it must not.
    #[error("a line does not end in CR LF")]
    LineEnd,
    /// The request or status line is malformed.
    #[error("the start line is malformed")]
    StartLine,
    /// A version other than 1.0 and 1.1.
    #[error("the version is not HTTP/1.0 or HTTP/1.1")]
    Version,
    /// The request target is malformed or of the wrong form for its method.
    #[error("the request target is malformed")]
    Target,
    /// A field name or value is malformed (folding, space before the colon, control bytes).
    #[error("a field is malformed")]
    Field,
    /// No `Host`.
    #[error("no Host")]
    HostMissing,
    /// More than one `Host`, or one that is no authority.
    #[error("Host is doubled or not an authority")]
    Host,
    /// `Content-Length` is doubled or not a number.
    #[error("Content-Length is doubled or not a number")]
    ContentLength,
    /// `Transfer-Encoding` is anything but exactly `chunked`.
    #[error("Transfer-Encoding is not exactly chunked")]
    TransferEncoding,
    /// Both `Content-Length` and `Transfer-Encoding`.
    #[error("both Content-Length and Transfer-Encoding")]
    AmbiguousLength,
    /// A body where the status or method allows none, or a tunnel nobody asked for.
    #[error("a body or tunnel where none may be")]
    UnexpectedBody,
    /// A chunk breaks the grammar.
    #[error("a chunk is malformed")]
    Chunk,
    /// The trailer section is malformed or too large.
    #[error("the trailer section is malformed or too large")]
    Trailers,
    /// The connection ended inside a message.
    #[error("the connection ended inside a message")]
    Truncated,
}

impl InvalidMessage {
    /// The cause of the local reply when a client sent this.
    pub fn cause(self) -> Cause {
        match self {
            Self::HeadTooLarge | Self::TooManyFields => Cause::HeadersTooLarge,
            Self::HostMissing => Cause::MissingHost,
            _ => Cause::BadRequest,
        }
    }
}

/// Why a head cannot be written as HTTP/1 without changing its meaning (property 4).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum UnsafeHead {
    /// The method is no token.
    #[error("the method is not a token")]
    Method,
    /// The path is empty or holds a space or control byte.
    #[error("the path holds a byte that HTTP/1 does not allow")]
    Path,
    /// The authority is empty or malformed.
    #[error("the authority is not valid")]
    Authority,
    /// A field's name or value holds a byte that is not allowed.
    #[error("field {0:?} holds a byte that HTTP/1 does not allow")]
    Field(String),
}
