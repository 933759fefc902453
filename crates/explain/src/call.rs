//! A call as a person writes it.

use std::net::IpAddr;

use engine::Now;
use mesh::{MeshSnapshot, Workload};
use thiserror::Error;
use types::{NamespacedName, RequestHead, Version};

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The application in this pod.
    Workload(NamespacedName),
    /// A client outside of the mesh, at this gateway's pod.
    Outside(NamespacedName),
}

/// Where the call is addressed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `http`, `https` or `tcp`.
    pub scheme: Box<str>,
    /// A name or an address, lower case.
    pub host: Box<str>,
    /// The port dialled.
    pub port: u16,
    /// Path and query.
    pub path: Box<str>,
}

/// One call.
#[derive(Clone, Debug)]
pub struct Call {
    /// Who.
    pub from: Caller,
    /// `GET`, …
    pub method: Box<str>,
    /// Where to.
    pub target: Target,
    /// Headers; `host` replaces the authority.
    pub headers: Vec<(String, String)>,
    /// The application speaks HTTP/2.
    pub is_http2: bool,
    /// Address of a client outside; `None`: one of a documentation range.
    pub client: Option<IpAddr>,
    /// When, for tokens.
    pub now: Now,
}

/// A call that cannot be asked about.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum InvalidCall {
    /// Not `scheme://host[:port][/path]`.
    #[error("{url:?} is not a URL of the form http://host[:port][/path], https://… or tcp://host:port: {reason}")]
    Url {
        /// As given.
        url: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// No word of the letters that methods have.
    #[error("{0:?} is not a method")]
    Method(String),
    /// Not `name: value`.
    #[error("{0:?} is not a header of the form 'name: value'")]
    Header(String),
    /// Nobody of that name.
    #[error("no pod or deployment {name:?} in namespace {namespace:?} (give -n): there are {known}")]
    Caller {
        /// As given.
        name: String,
        /// Where it was looked for.
        namespace: String,
        /// Who is there.
        known: String,
    },
    /// No gateway runs.
    #[error("no gateway {0:?} is there: no pod has the labels that a Gateway's selector asks for")]
    Gateway(String),
}

impl Target {
    /// Parses a URL; without a scheme it is `http`.
    pub fn parse(url: &str) -> Result<Self, InvalidCall> {
        let bad = |reason| InvalidCall::Url { url: url.to_owned(), reason };
        if url.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(bad("there is a space or a control character in it"));
        }
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        let default = match scheme {
            "http" => Some(80),
            "https" => Some(443),
            "tcp" => None,
            _ => return Err(bad("the scheme is none of http, https, tcp")),
        };
        let at = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(at);
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') && !port.is_empty() => {
                (host, Some(port.parse::<u16>().map_err(|_| bad("the port is not a number from 1 to 65535"))?))
            }
            _ => (authority, None),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        if host.is_empty() {
            return Err(bad("there is no host"));
        }
        let port = port.or(default).filter(|port| *port != 0).ok_or_else(|| bad("a port is needed"))?;
        let path = match path {
            "" => "/".to_owned(),
            query if query.starts_with('?') => format!("/{query}"),
            path => path.split('#').next().unwrap_or(path).to_owned(),
        };
        Ok(Self { scheme: scheme.into(), host: host.into(), port, path: path.into() })
    }

    /// Whether requests are visible to proxies between.
    pub fn is_http(&self) -> bool {
        &*self.scheme == "http"
    }

    /// Host and port as a client writes them into `host`.
    pub fn authority(&self) -> String {
        let host = if self.host.parse::<std::net::Ipv6Addr>().is_ok() {
            format!("[{}]", self.host)
        } else {
            self.host.to_string()
        };
        match (&*self.scheme, self.port) {
            ("http", 80) | ("https", 443) => host,
            (_, port) => format!("{host}:{port}"),
        }
    }
}

impl Caller {
    /// Finds a caller: `deploy/NAME`, `pod/NAME`, `NAME` (pod or deployment), `NAME.NAMESPACE`, or
    /// `gateway` for the ingress gateway. A gateway's pod stands for clients outside.
    pub fn find(snapshot: &MeshSnapshot, namespace: &str, text: &str) -> Result<Self, InvalidCall> {
        if matches!(text, "gateway" | "ingress" | "outside") {
            return ingress(snapshot).map(Self::Outside).ok_or_else(|| InvalidCall::Gateway(text.to_owned()));
        }
        let (kind, name) = text.split_once('/').unwrap_or(("", text));
        let is_deployment = kind.starts_with("deploy");
        let fits = |workload: &Workload, name: &str| {
            let by_deployment = *workload.workload_name == *name;
            let by_pod = *workload.name == *name;
            if is_deployment {
                by_deployment
            } else if kind.is_empty() {
                by_pod || by_deployment
            } else {
                by_pod
            }
        };
        let in_namespace = |namespace: &str, name: &str| {
            snapshot
                .workloads()
                .values()
                .find(|workload| *workload.namespace == *namespace && fits(workload, name))
                .cloned()
        };
        let found = in_namespace(namespace, name)
            .or_else(|| name.rsplit_once('.').and_then(|(name, namespace)| in_namespace(namespace, name)))
            // A gateway lives where nobody else does.
            .or_else(|| in_namespace(snapshot.root_namespace(), name).filter(|workload| is_router(snapshot, workload)));
        let Some(workload) = found else {
            let mut known: Vec<String> = snapshot
                .workloads()
                .values()
                .filter(|workload| *workload.namespace == *namespace || fits(workload, name))
                .map(|workload| format!("deploy/{} in {}", workload.workload_name, workload.namespace))
                .collect();
            known.dedup();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(InvalidCall::Caller { name: text.to_owned(), namespace: namespace.to_owned(), known });
        };
        let key = workload.key();
        Ok(if is_router(snapshot, &workload) { Self::Outside(key) } else { Self::Workload(key) })
    }
}

/// Whether a pod is a gateway's: some Gateway selects it by a label, or it is labelled as Istio's own.
pub(crate) fn is_router(snapshot: &MeshSnapshot, workload: &Workload) -> bool {
    workload.labels.get("istio").is_some_and(|value| value.ends_with("gateway"))
        || snapshot.gateways_for(&workload.labels).any(|gateway| !gateway.spec.selector.is_empty())
}

fn ingress(snapshot: &MeshSnapshot) -> Option<NamespacedName> {
    let routers = || snapshot.workloads().values().filter(|workload| is_router(snapshot, workload));
    let named = routers().find(|workload| workload.labels.get("istio").is_some_and(|value| value == "ingressgateway"));
    named.or_else(|| routers().next()).map(|workload| workload.key())
}

impl Call {
    /// Parses what a person wrote.
    pub fn parse(from: Caller, method: &str, url: &str, headers: &[String], now: Now) -> Result<Self, InvalidCall> {
        Ok(Self {
            from,
            method: parse_method(method)?,
            target: Target::parse(url)?,
            headers: headers.iter().map(|text| parse_header(text)).collect::<Result<_, _>>()?,
            is_http2: false,
            client: None,
            now,
        })
    }

    /// The request as the application sends it; `None` for bytes.
    pub(crate) fn head(&self) -> Option<RequestHead> {
        if &*self.target.scheme == "tcp" {
            return None;
        }
        let host = self.headers.iter().find(|(name, _)| name == "host" || name == ":authority");
        let authority = host.map_or_else(|| self.target.authority(), |(_, value)| value.clone());
        let mut head = RequestHead::new(&self.method, &authority, &self.target.path);
        for (name, value) in self.headers.iter().filter(|(name, _)| name != "host" && !name.starts_with(':')) {
            head.fields.push(name, value.as_bytes());
        }
        if self.is_http2 {
            head.version = Version::Http2;
            // a cookie in several fields is one, as the codec hands it to the proxy
            let cookies: Vec<&[u8]> = head.fields.get_all("cookie").collect();
            if cookies.len() > 1 {
                let cookie = cookies.join(&b"; "[..]);
                head.fields.set("cookie", &cookie);
            }
        } else {
            // as the codec hands it to the proxy
            http1::rules::strip_hop_by_hop(&mut head.fields);
        }
        Some(head)
    }

    /// The name that a TLS client asks for.
    pub(crate) fn server_name(&self) -> Option<String> {
        let head = self.head()?;
        let host = String::from_utf8_lossy(engine::route::without_port(head.authority())).into_owned();
        host.parse::<IpAddr>().is_err().then_some(host.to_ascii_lowercase())
    }
}

fn parse_method(text: &str) -> Result<Box<str>, InvalidCall> {
    if is_token(text) { Ok(text.to_ascii_uppercase().into()) } else { Err(InvalidCall::Method(text.to_owned())) }
}

fn parse_header(text: &str) -> Result<(String, String), InvalidCall> {
    let (name, value) = text.split_once(':').ok_or_else(|| InvalidCall::Header(text.to_owned()))?;
    let (name, value) = (name.trim().to_ascii_lowercase(), value.trim());
    let is_one_line = !value.contains(|c: char| c.is_control() && c != '\t');
    if is_token(&name) && is_one_line {
        Ok((name, value.to_owned()))
    } else {
        Err(InvalidCall::Header(text.to_owned()))
    }
}

/// *Source*: RFC 9110, 5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(url: &str, expect: &str) {
        let got = match Target::parse(url) {
            Ok(target) => {
                format!("{} {} {} {} {}", target.scheme, target.host, target.port, target.path, target.authority())
            }
            Err(InvalidCall::Url { reason, .. }) => reason.to_owned(),
            Err(other) => other.to_string(),
        };
        assert_eq!(got, expect, "{url}");
    }

    #[test]
    fn urls() {
        check("http://reviews:9080/x?y=1#z", "http reviews 9080 /x?y=1 reviews:9080");
        check("reviews", "http reviews 80 / reviews");
        check("http://reviews?a=b", "http reviews 80 /?a=b reviews");
        check("https://A.Example.com", "https a.example.com 443 / a.example.com");
        check("http://[::1]:80/", "http ::1 80 / [::1]");
        check("tcp://echo:9000", "tcp echo 9000 / echo:9000");
        check("tcp://echo", "a port is needed");
        check("http://x:70000", "the port is not a number from 1 to 65535");
        check("ftp://x", "the scheme is none of http, https, tcp");
        check("http:///x", "there is no host");
        check("http://x/a b", "there is a space or a control character in it");
        check("http://x/a\nb", "there is a space or a control character in it");
    }

    #[test]
    fn what_no_client_could_send_is_not_asked_about() {
        assert_eq!(parse_method("get").as_deref(), Ok("GET"));
        assert_eq!(parse_method("G ET").unwrap_err().to_string(), "\"G ET\" is not a method");
        assert_eq!(parse_header("A: b\tc"), Ok(("a".to_owned(), "b\tc".to_owned())));
        for bad in ["a", ": b", "a b: c", "a: b\nc: d", "a: \u{1b}"] {
            assert!(parse_header(bad).unwrap_err().to_string().contains("is not a header"), "{bad:?}");
        }
    }
}
