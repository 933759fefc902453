//! The server side: sessions and their glue to gRPC.
