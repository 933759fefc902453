//! Protocol selection.
//!
//! *Source*: `docs/parity.md`, Traffic 1.1.

/// What a port speaks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Protocol {
    /// HTTP/1.1 upstream.
    Http,
    /// HTTP/2 upstream.
    Http2,
    /// HTTP proxying.
    HttpProxy,
    /// gRPC.
    Grpc,
    /// gRPC-Web.
    GrpcWeb,
    /// TLS that carries HTTP.
    Https,
    /// TLS.
    Tls,
    /// Bytes.
    Tcp,
    /// MongoDB's wire protocol.
    Mongo,
    /// Redis' wire protocol.
    Redis,
    /// MySQL's wire protocol.
    MySql,
    /// Not proxied.
    Udp,
    /// Found out per connection.
    Auto,
}

impl Protocol {
    /// Parses one word of Istio's vocabulary, any case. `None` for other words.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word.to_ascii_lowercase().as_str() {
            "http" => Self::Http,
            "http2" => Self::Http2,
            "http_proxy" => Self::HttpProxy,
            "grpc" => Self::Grpc,
            "grpc-web" => Self::GrpcWeb,
            "https" => Self::Https,
            "tls" => Self::Tls,
            "tcp" => Self::Tcp,
            "mongo" => Self::Mongo,
            "redis" => Self::Redis,
            "mysql" => Self::MySql,
            "udp" => Self::Udp,
            _ => return None,
        })
    }

    /// The protocol of a Kubernetes Service's port.
    pub fn of_service_port(port: u16, name: &str, transport: &str, app_protocol: Option<&str>) -> Self {
        if transport.eq_ignore_ascii_case("UDP") || transport.eq_ignore_ascii_case("SCTP") {
            return Self::Udp;
        }
        if let Some(app) = app_protocol {
            return match app {
                "kubernetes.io/h2c" => Self::Http2,
                "kubernetes.io/ws" => Self::Http,
                "kubernetes.io/wss" => Self::Https,
                other => Self::parse(other).unwrap_or_else(|| Self::by_number(port)),
            };
        }
        Self::of_name(name).unwrap_or_else(|| Self::by_number(port))
    }

    /// The protocol that a port's name says; `None` if it says none.
    pub fn of_name(name: &str) -> Option<Self> {
        let lower = name.to_ascii_lowercase();
        if lower.starts_with("grpc-web") {
            return Some(Self::GrpcWeb);
        }
        let word = lower.split_once('-').map_or(lower.as_str(), |(head, _)| head);
        match Self::parse(word) {
            // The transport decides about UDP, not a name.
            Some(Self::Udp) => None,
            found => found,
        }
    }

    fn by_number(port: u16) -> Self {
        match port {
            25 | 53 | 3306 | 27017 => Self::Tcp,
            _ => Self::Auto,
        }
    }

    /// Requests can be routed.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::HttpProxy | Self::Grpc | Self::GrpcWeb)
    }

    /// The server speaks HTTP/2 whatever the client speaks.
    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// gRPC in either form.
    pub fn is_grpc(self) -> bool {
        matches!(self, Self::Grpc | Self::GrpcWeb)
    }

    /// Connections can be routed by SNI.
    pub fn is_tls(self) -> bool {
        matches!(self, Self::Https | Self::Tls)
    }

    /// Bytes, TLS or not.
    pub fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp | Self::Https | Self::Tls | Self::Mongo | Self::Redis | Self::MySql)
    }

    /// Found out per connection.
    pub fn is_auto(self) -> bool {
        self == Self::Auto
    }

    /// Requests may be routed: declared HTTP, or found out.
    pub fn is_http_or_auto(self) -> bool {
        self.is_http() || self.is_auto()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selection() {
        for (port, name, transport, app, expect) in [
            (80, "http", "TCP", None, Protocol::Http),
            (80, "HTTP-web", "TCP", None, Protocol::Http),
            (80, "httpfoo", "TCP", None, Protocol::Auto),
            (80, "foo-http", "TCP", None, Protocol::Auto),
            (80, "grpc-web", "TCP", None, Protocol::GrpcWeb),
            (80, "grpc-webx", "TCP", None, Protocol::GrpcWeb),
            (80, "grpc", "TCP", None, Protocol::Grpc),
            (80, "http-proxy", "TCP", None, Protocol::Http),
            (80, "http_proxy", "TCP", None, Protocol::HttpProxy),
            (80, "", "TCP", None, Protocol::Auto),
            (25, "smtp", "TCP", None, Protocol::Tcp),
            (53, "dns", "TCP", None, Protocol::Tcp),
            (3306, "db", "TCP", None, Protocol::Tcp),
            (27017, "http-3306", "TCP", None, Protocol::Http),
            (80, "http", "UDP", None, Protocol::Udp),
            (80, "http", "TCP", Some("bogus"), Protocol::Auto),
            (80, "tcp", "TCP", Some("kubernetes.io/h2c"), Protocol::Http2),
            (80, "tcp", "TCP", Some("kubernetes.io/ws"), Protocol::Http),
            (80, "tcp", "TCP", Some("kubernetes.io/wss"), Protocol::Https),
            (80, "tcp", "TCP", Some("grpc"), Protocol::Grpc),
            (80, "tls-a", "TCP", None, Protocol::Tls),
            (80, "mongo", "TCP", None, Protocol::Mongo),
            (80, "udp-x", "TCP", None, Protocol::Auto),
        ] {
            assert_eq!(
                Protocol::of_service_port(port, name, transport, app),
                expect,
                "{port} {name} {transport} {app:?}"
            );
        }
    }
}
