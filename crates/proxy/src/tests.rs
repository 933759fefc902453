//! The whole proxy over real sockets of the loopback interface.

mod bed;
mod bytes;
mod http;
