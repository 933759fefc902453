//! The whole proxy over real sockets of the loopback interface.

mod admin;
mod backends;
pub(crate) mod bed;
mod bytes;
mod garbage;
mod hostile;
mod hostile_h2;
mod http;
mod mesh;
mod mirrors;
mod plane;
mod pools;
mod tunnels;
