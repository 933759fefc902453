//! Which servers a gateway opens, on which ports, and which of them share a listener.
//!
//! Source: `docs/parity.md`, Traffic 4.1, 4.2.

use std::collections::{BTreeMap, BTreeSet};

use api::networking::{self as net, ServerTlsMode};
use mesh::{Config, Protocol, TargetPort};
use types::{Finding, ObjectRef, Severity};

use crate::context::Context;

/// A host of a server, and whose VirtualServices may bind it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ServerHost {
    /// Lower case; `*` and `*.suffix` allowed.
    pub(crate) name: Box<str>,
    /// `None`: VirtualServices of any namespace.
    pub(crate) namespace: Option<Box<str>>,
}

impl ServerHost {
    /// Reads `host`, `*/host`, `./host`, `ns/host` of a Gateway in `namespace`.
    pub(crate) fn parse(text: &str, namespace: &str) -> Self {
        let (scope, name) = match text.split_once('/') {
            None | Some(("*", _)) => (None, text.rsplit('/').next().unwrap_or(text)),
            Some((".", name)) => (Some(Box::from(namespace)), name),
            Some((scope, name)) => (Some(Box::from(scope)), name),
        };
        Self { name: name.trim_end_matches('.').to_ascii_lowercase().into(), namespace: scope }
    }

    /// Whether a VirtualService of `namespace` may bind it.
    pub(crate) fn admits(&self, namespace: &str) -> bool {
        self.namespace.as_deref().is_none_or(|own| own == namespace)
    }
}

/// How a server serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Serving {
    /// Requests in plaintext.
    Http,
    /// Requests, after TLS ends here.
    Https,
    /// Bytes, after TLS ends here.
    TlsTerminated,
    /// TLS that ends behind the gateway.
    Passthrough,
    /// Bytes.
    Tcp,
}

/// One server that holds.
#[derive(Clone, Debug)]
pub(crate) struct OpenServer {
    /// The Gateway object.
    pub(crate) gateway: ObjectRef,
    /// Its place: `spec.servers[0]`.
    pub(crate) field: String,
    /// As written.
    pub(crate) number: u16,
    /// Its port's name.
    pub(crate) port_name: Box<str>,
    pub(crate) serving: Serving,
    pub(crate) protocol: Protocol,
    pub(crate) hosts: Vec<ServerHost>,
    pub(crate) tls: Option<net::ServerTlsSettings>,
    /// Name of its route table, for servers with requests.
    pub(crate) table: String,
}

impl OpenServer {
    /// `namespace/name` of the Gateway, as VirtualServices name it.
    pub(crate) fn gateway_key(&self) -> String {
        format!("{}/{}", self.gateway.namespace, self.gateway.name)
    }

    /// Plaintext requests are sent to HTTPS.
    pub(crate) fn redirects(&self) -> bool {
        self.serving == Serving::Http && self.tls.as_ref().is_some_and(|tls| tls.https_redirect)
    }

    /// Names by which clients choose it in TLS; empty when any will do.
    pub(crate) fn server_names(&self) -> Vec<String> {
        if self.hosts.iter().any(|host| &*host.name == "*") {
            return Vec::new();
        }
        let mut names: Vec<String> = Vec::new();
        for host in &self.hosts {
            if !names.iter().any(|name| **name == *host.name) {
                names.push(host.name.to_string());
            }
        }
        names
    }
}

/// All servers of one address and port. Of one kind: plaintext HTTP, TLS of all sorts, or one TCP.
#[derive(Clone, Debug)]
pub(crate) struct OpenPort {
    /// `0.0.0.0` unless a server binds elsewhere.
    pub(crate) bind: Box<str>,
    /// The port that is opened: the target port of the gateway's Service.
    pub(crate) number: u16,
    /// Oldest Gateway first, in the order written.
    pub(crate) servers: Vec<OpenServer>,
}

impl OpenPort {
    /// `0.0.0.0_8080`
    pub(crate) fn name(&self) -> String {
        format!("{}_{}", self.bind, self.number)
    }
}

/// Kinds of servers that can share a port.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Http,
    Tls,
    Tcp,
}

fn kind(serving: Serving) -> Kind {
    match serving {
        Serving::Http => Kind::Http,
        Serving::Https | Serving::TlsTerminated | Serving::Passthrough => Kind::Tls,
        Serving::Tcp => Kind::Tcp,
    }
}

/// Everything the proxy opens, by port.
pub(crate) fn opened(context: &Context<'_>) -> Vec<OpenPort> {
    let targets = Targets::of(context);
    let mut ports: BTreeMap<(Box<str>, u16), OpenPort> = BTreeMap::new();
    for gateway in context.snapshot.gateways_for(&context.view.labels) {
        for (index, server) in gateway.spec.servers.iter().enumerate() {
            let field = format!("spec.servers[{index}]");
            let server = match open(gateway, server, &field) {
                Ok(server) => server,
                Err(finding) => {
                    context.find(*finding);
                    continue;
                }
            };
            let written = &gateway.spec.servers[index];
            let bind: Box<str> = if written.bind.is_empty() { "0.0.0.0".into() } else { written.bind.as_str().into() };
            for number in targets.of_port(server.number) {
                if context.view.is_unprivileged && number < 1024 {
                    let what = format!(
                        "port {number} cannot be opened by a gateway without privileges, so this server is not opened"
                    );
                    let hint = "select the gateway's pods with a Service that leads this port to one above 1023";
                    context.find(finding(&server, "port.number", "LAT0402", &what, hint));
                    continue;
                }
                add(context, &mut ports, bind.clone(), number, server.clone());
            }
        }
    }
    ports.into_values().collect()
}

/// Reads one server.
fn open(gateway: &Config<net::Gateway>, server: &net::Server, field: &str) -> Result<OpenServer, Box<Finding>> {
    let bad = |field: &str, what: String, hint: &str| {
        Box::new(Finding {
            code: "LAT0401".into(),
            severity: Severity::Error,
            object: Some(gateway.object.clone()),
            field: field.into(),
            position: None,
            message: format!("{what}, so this server is not opened").into(),
            hint: hint.into(),
        })
    };
    let Some(port) = server.port.as_ref().filter(|port| port.number != 0) else {
        return Err(bad(&format!("{field}.port"), "the server has no port number".into(), "set port.number"));
    };
    let protocol = Protocol::parse(&port.protocol).ok_or_else(|| {
        let hint = "use HTTP, HTTPS, HTTP2, GRPC, GRPC-WEB, TLS, TCP, MONGO, REDIS or MYSQL";
        bad(&format!("{field}.port.protocol"), format!("{:?} is not a protocol of servers", port.protocol), hint)
    })?;
    let mode = server.tls.as_ref().map(|tls| tls.mode);
    let serving = match (protocol, mode) {
        (Protocol::Udp | Protocol::Auto | Protocol::HttpProxy, _) => {
            let what = format!("{:?} is not a protocol of servers", port.protocol);
            return Err(bad(&format!("{field}.port.protocol"), what, "use HTTP, HTTPS, TLS or TCP"));
        }
        (Protocol::Https | Protocol::Tls, None) => {
            let what = format!("protocol {} needs TLS settings", port.protocol);
            return Err(bad(&format!("{field}.tls"), what, "set tls.mode"));
        }
        (_, Some(ServerTlsMode::AutoPassthrough)) => {
            let what = "AUTO_PASSTHROUGH is not yet effective".to_owned();
            return Err(bad(&format!("{field}.tls.mode"), what, "use PASSTHROUGH with a VirtualService"));
        }
        (Protocol::Https | Protocol::Tls, Some(ServerTlsMode::Passthrough)) => Serving::Passthrough,
        (Protocol::Https, Some(_)) => Serving::Https,
        (Protocol::Tls, Some(_)) => Serving::TlsTerminated,
        (protocol, _) if protocol.is_http() => Serving::Http,
        _ => Serving::Tcp,
    };
    let hosts: Vec<_> = server.hosts.iter().map(|host| ServerHost::parse(host, gateway.namespace())).collect();
    if let Some(host) = hosts.iter().find(|host| !is_server_name(&host.name)) {
        let what = format!("{:?} is not a host: `*` stands alone or for whole labels at the start", host.name);
        return Err(bad(&format!("{field}.hosts"), what, "write a host, *.suffix, or *"));
    }
    if hosts.is_empty() {
        return Err(bad(
            &format!("{field}.hosts"),
            "the server has no hosts".into(),
            "list the hosts it serves, or \"*\"",
        ));
    }
    Ok(OpenServer {
        gateway: gateway.object.clone(),
        field: field.to_owned(),
        number: port.number,
        port_name: port.name.as_str().into(),
        serving,
        protocol,
        hosts,
        tls: server.tls.clone(),
        table: String::new(),
    })
}

/// Whether a chain can be chosen by this name: exact, `*.suffix`, or `*`.
pub(crate) fn is_server_name(name: &str) -> bool {
    name == "*" || !name.strip_prefix("*.").unwrap_or(name).contains('*')
}

/// Puts a server beside those that opened its port first, unless they exclude it.
fn add(
    context: &Context<'_>,
    ports: &mut BTreeMap<(Box<str>, u16), OpenPort>,
    bind: Box<str>,
    number: u16,
    mut server: OpenServer,
) {
    let suffix = if &*bind == "0.0.0.0" { String::new() } else { format!(".{bind}") };
    server.table = match server.serving {
        Serving::Http => format!("http.{number}{suffix}"),
        Serving::Https => format!(
            "https.{}.{}.{}.{}{suffix}",
            server.number, server.port_name, server.gateway.name, server.gateway.namespace
        ),
        Serving::TlsTerminated | Serving::Passthrough | Serving::Tcp => String::new(),
    };
    let port = ports.entry((bind.clone(), number)).or_insert_with(|| OpenPort { bind, number, servers: Vec::new() });
    let Some(first) = port.servers.first() else {
        port.servers.push(server);
        return;
    };
    if kind(first.serving) != kind(server.serving) || server.serving == Serving::Tcp {
        let what = format!(
            "{} {} has opened the port for another protocol, so this server is not opened",
            first.gateway, first.field
        );
        context.find(finding(&server, "port", "IST0145", &what, "use another port"));
        return;
    }
    let clash = port.servers.iter().find(|other| {
        kind(server.serving) == Kind::Tls
            && (shares_a_name(other, &server) || (!server.table.is_empty() && other.table == server.table))
    });
    if let Some(other) = clash {
        let what = if shares_a_name(other, &server) {
            format!(
                "{} {} already serves one of these hosts on the port, so this server is not opened",
                other.gateway, other.field
            )
        } else {
            format!("{} has the same port name, so this server is not opened", other.field)
        };
        context.find(finding(
            &server,
            "hosts",
            "IST0145",
            &what,
            "serve each host once a port, under port names of their own",
        ));
        return;
    }
    port.servers.push(server);
}

/// Whether a client's server name could mean both. For passthrough the VirtualServices decide, so
/// two of those may name the same hosts.
fn shares_a_name(a: &OpenServer, b: &OpenServer) -> bool {
    if a.serving == Serving::Passthrough && b.serving == Serving::Passthrough {
        return false;
    }
    let (ours, theirs) = (a.server_names(), b.server_names());
    if ours.is_empty() || theirs.is_empty() {
        return ours.is_empty() && theirs.is_empty();
    }
    ours.iter().any(|name| theirs.contains(name))
}

pub(crate) fn finding(server: &OpenServer, field: &str, code: &str, message: &str, hint: &str) -> Finding {
    Finding {
        code: code.into(),
        severity: Severity::Warning,
        object: Some(server.gateway.clone()),
        field: format!("{}.{field}", server.field).into(),
        position: None,
        message: message.into(),
        hint: hint.into(),
    }
}

const NO_TRANSLATION: &str = "experimental.istio.io/disable-gateway-port-translation";

/// Where the ports of the gateway's own Services lead.
struct Targets {
    by_port: BTreeMap<u16, BTreeSet<u16>>,
}

impl Targets {
    fn of(context: &Context<'_>) -> Self {
        let view = context.view;
        let workload = context.snapshot.workload(&view.namespace, &view.name);
        let mut by_port: BTreeMap<u16, BTreeSet<u16>> = BTreeMap::new();
        for service in context.snapshot.services() {
            let selects = *service.namespace == *view.namespace
                && service
                    .selector
                    .as_ref()
                    .is_some_and(|selector| !selector.is_empty() && selector.matches(&view.labels));
            if !selects || service.labels.get(NO_TRANSLATION).is_some_and(|value| value == "true") {
                continue;
            }
            for port in service.ports.iter().filter(|port| port.protocol != Protocol::Udp) {
                let target = match (&port.target, workload) {
                    (target, Some(workload)) => mesh::target_number(target, workload),
                    (TargetPort::Number(number), None) => Some(*number),
                    (TargetPort::Name(_), None) => None,
                };
                by_port.entry(port.number).or_default().extend(target);
            }
        }
        Self { by_port }
    }

    /// The ports to open for a server's port: where Services lead it, else itself.
    fn of_port(&self, number: u16) -> Vec<u16> {
        match self.by_port.get(&number) {
            Some(targets) if !targets.is_empty() => targets.iter().copied().collect(),
            _ => vec![number],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_say_who_may_bind() {
        for (text, name, admits_own, admits_other) in [
            ("a.com", "a.com", true, true),
            ("*/A.com", "a.com", true, true),
            ("./a.com", "a.com", true, false),
            ("other/*.com.", "*.com", false, true),
            ("*", "*", true, true),
            ("./*", "*", true, false),
        ] {
            let host = ServerHost::parse(text, "own");
            let got = (&*host.name, host.admits("own"), host.admits("other"));
            assert_eq!(got, (name, admits_own, admits_other), "{text}");
        }
    }
}
