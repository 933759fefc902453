//! The whole proxy over real sockets of the loopback interface.

pub(crate) mod bed;
mod bytes;
mod http;
mod mesh;
