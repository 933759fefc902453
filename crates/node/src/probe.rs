//! Probes: is a container's port, page or program well?
//!
//! A pod's proxy takes what arrives from outside, and under STRICT refuses a plain probe. Istio lets
//! its agent ask the application; here the question is asked from within the container, by our own
//! binary in a hidden role, so that neither proxy nor rules see it. The proxy's own page, which is
//! never captured, is asked from the switch.
//!
//! *Source*: Kubernetes' kubelet: 200 to 399 is well; a certificate is taken as it is; a gRPC server
//! says `SERVING` to `grpc.health.v1.Health/Check`.

mod grpc;
mod tls;

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use api::k8s::{Container, HttpGetAction, IntOrString, Probe};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::runtime::{PodRuntime, RuntimeError};
use crate::spec::{PodId, SELF_EXE};

/// The hidden role.
pub(crate) const ASK: &str = "node-ask";
const HEAD_BYTES_MAX: usize = 8 * 1024;
const USER_AGENT: &str = "kube-probe/1.0";

/// A question over the network.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Question {
    /// An address, or a name that the pod can resolve.
    host: String,
    port: u16,
    what: What,
    timeout_ms: u64,
}

/// What is asked once there is a connection.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum What {
    /// Nothing: connecting is enough.
    Connect,
    Http {
        over_tls: bool,
        request: String,
    },
    /// The health of a service; of the whole server when it has no name.
    Grpc {
        service: String,
    },
}

/// Whom to ask.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    pub(crate) pod: PodId,
    pub(crate) ip: IpAddr,
    pub(crate) container: &'a Container,
    /// Ask from the switch, not from within.
    pub(crate) from_switch: bool,
}

/// Why there is no good answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The container is not well.
    #[error("{0}")]
    Unwell(String),
    /// It could not be asked, which says nothing about it.
    #[error("{0}")]
    Unasked(String),
}

/// What it means that no program could be run in a container.
///
/// *Source*: Kubernetes' kubelet throws the result away when the prober itself fails; a program that is not
/// there is the container's fault.
fn not_run(error: &RuntimeError) -> Failure {
    match error {
        RuntimeError::Program { .. } => Failure::Unwell(error.to_string()),
        _ => Failure::Unasked(error.to_string()),
    }
}

/// What it means that there is no connection: nobody took it, or none could be made here.
fn not_dialed(error: &RuntimeError) -> Failure {
    match error {
        RuntimeError::Io(io) if !matches!(io.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            Failure::Unwell(error.to_string())
        }
        _ => Failure::Unasked(error.to_string()),
    }
}

/// Asks once.
pub(crate) async fn ask(probe: &Probe, target: Target<'_>, runtime: &PodRuntime) -> Result<(), Failure> {
    let limit = Duration::from_secs(u64::from(probe.timeout_seconds.max(1)));
    if let Some(exec) = &probe.exec {
        let run = runtime.run_in_container(target.pod, &target.container.name, exec.command.clone(), limit).await;
        return match run {
            Ok(result) => match result.code {
                Some(0) => Ok(()),
                Some(code) => {
                    let said = String::from_utf8_lossy(&result.output);
                    Err(Failure::Unwell(format!("command ended with {code}: {}", said.trim())))
                }
                None => Err(Failure::Unwell("command ran out of time".to_owned())),
            },
            Err(error) => Err(not_run(&error)),
        };
    }
    let Some(question) = question(probe, &target, limit) else {
        return Err(Failure::Unwell("the probe's port is unknown".to_owned()));
    };
    if target.from_switch {
        let to = SocketAddr::new(target.ip, question.port);
        let asking = async {
            let stream = runtime.dial(to).await.map_err(|error| not_dialed(&error))?;
            talk(stream, &question).await.map_err(Failure::Unwell)
        };
        let asked = tokio::time::timeout(limit, asking).await;
        return asked.unwrap_or_else(|_| Err(Failure::Unwell(LATE.to_owned())));
    }
    let text = serde_json::to_string(&question).map_err(|error| Failure::Unasked(error.to_string()))?;
    let argv = vec![SELF_EXE.to_owned(), ASK.to_owned(), text];
    match runtime.run_in_container(target.pod, &target.container.name, argv, limit + Duration::from_secs(1)).await {
        Ok(result) if result.code == Some(0) => Ok(()),
        Ok(result) => Err(Failure::Unwell(String::from_utf8_lossy(&result.output).trim().to_owned())),
        Err(error) => Err(not_run(&error)),
    }
}

const LATE: &str = "no answer in time";

fn question(probe: &Probe, target: &Target<'_>, limit: Duration) -> Option<Question> {
    let number = |port: Option<&IntOrString>| match port? {
        IntOrString::Int(port) => Some(*port),
        IntOrString::Name(name) => target.container.ports.iter().find(|p| p.name == *name).map(|p| p.container_port),
    };
    let host = |named: &str| if named.is_empty() { target.ip.to_string() } else { named.to_owned() };
    let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    let (host, port, what) = match (&probe.http_get, &probe.tcp_socket, &probe.grpc) {
        (Some(http), ..) => {
            let (host, port) = (host(&http.host), number(http.port.as_ref())?);
            let over_tls = http.scheme.eq_ignore_ascii_case("https");
            let request = get(http, &host, port);
            (host, port, What::Http { over_tls, request })
        }
        (None, Some(tcp), _) => (host(&tcp.host), number(tcp.port.as_ref())?, What::Connect),
        (None, None, Some(grpc)) => (host(""), grpc.port, What::Grpc { service: grpc.service.clone() }),
        (None, None, None) => return None,
    };
    Some(Question { host, port, what, timeout_ms })
}

fn get(http: &HttpGetAction, host: &str, port: u16) -> String {
    let named = http.http_headers.iter().find(|header| header.name.eq_ignore_ascii_case("host"));
    let host = named.map_or_else(|| authority(host, port), |header| header.value.clone());
    let path = if http.path.starts_with('/') { http.path.clone() } else { format!("/{}", http.path) };
    let mut request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {USER_AGENT}\r\nAccept: */*\r\nConnection: close\r\n"
    );
    for header in http.http_headers.iter().filter(|header| !header.name.eq_ignore_ascii_case("host")) {
        for part in [header.name.as_str(), ": ", &header.value, "\r\n"] {
            request.push_str(part);
        }
    }
    request.push_str("\r\n");
    request
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Asks over a connection.
async fn talk(stream: TcpStream, question: &Question) -> Result<(), String> {
    match &question.what {
        What::Connect => Ok(()),
        What::Http { over_tls: false, request } => http(stream, request).await,
        What::Http { over_tls: true, request } => http(tls::connect(stream, &question.host).await?, request).await,
        What::Grpc { service } => grpc::check(stream, &authority(&question.host, question.port), service).await,
    }
}

/// Sends the request and looks at the status: 200 to 399 is well.
async fn http(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    stream.write_all(request.as_bytes()).await.map_err(failed)?;
    stream.flush().await.map_err(failed)?;
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    while head.len() < HEAD_BYTES_MAX && !head.contains(&b'\n') {
        match stream.read(&mut buffer).await.map_err(failed)? {
            0 => break,
            length => head.extend_from_slice(&buffer[..length]),
        }
    }
    let line = String::from_utf8_lossy(&head);
    let status = line
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1))
        .and_then(|word| word.get(..3))
        .and_then(|code| code.parse::<u16>().ok());
    match status {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("HTTP probe failed with statuscode: {status}")),
        None => Err("the answer is not HTTP".to_owned()),
    }
}

/// The hidden role: asks from within the container.
pub(crate) fn probe_main(argument: &str) -> ExitCode {
    let outcome = serde_json::from_str::<Question>(argument).map_err(|error| error.to_string()).and_then(|question| {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
        let asking = async {
            let to = (question.host.as_str(), question.port);
            let stream = TcpStream::connect(to).await.map_err(|error| error.to_string())?;
            talk(stream, &question).await
        };
        let limit = Duration::from_millis(question.timeout_ms);
        let limited = async { tokio::time::timeout(limit, asking).await.unwrap_or_else(|_| Err(LATE.to_owned())) };
        let outcome = runtime.block_on(limited);
        // A name that is still being resolved would keep the runtime.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            use std::io::Write as _;
            // The node reads it; without a reader there is nobody to tell.
            drop(writeln!(std::io::stderr(), "{message}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    async fn answer(text: &'static str) -> Result<(), String> {
        let (mut server, client) = tokio::io::duplex(4096);
        let serve = async move {
            let mut buffer = [0; 512];
            drop(server.read(&mut buffer).await);
            drop(server.write_all(text.as_bytes()).await);
        };
        tokio::join!(serve, http(client, "GET / HTTP/1.1\r\n\r\n")).1
    }

    #[tokio::test]
    async fn two_and_three_hundreds_are_well() {
        assert_eq!(answer("HTTP/1.1 200 OK\r\n\r\n").await, Ok(()));
        assert_eq!(answer("HTTP/1.0 302 Found\r\n\r\n").await, Ok(()));
        assert!(answer("HTTP/1.1 503 Service Unavailable\r\n\r\n").await.unwrap_err().contains("503"));
        assert!(answer("SSH-2.0-x\r\n").await.unwrap_err().contains("not HTTP"));
        assert!(answer("").await.is_err());
    }

    #[test]
    fn only_who_takes_no_connection_is_unwell() {
        let io = |errno| RuntimeError::Io(std::io::Error::from_raw_os_error(errno));
        assert!(matches!(not_dialed(&io(libc::ECONNREFUSED)), Failure::Unwell(_)));
        assert!(matches!(not_dialed(&io(libc::EMFILE)), Failure::Unasked(_)));
        assert!(matches!(not_dialed(&RuntimeError::Down), Failure::Unasked(_)));
    }

    #[test]
    fn what_is_asked_where() {
        let check = |probe: serde_json::Value, host: &str, port: u16, what: &What| {
            let container = json!({"name": "c", "ports": [{"name": "web", "containerPort": 8080}]});
            let container: Container = serde_json::from_value(container).unwrap();
            let probe: Probe = serde_json::from_value(probe).unwrap();
            let ip = "10.77.0.9".parse().unwrap();
            let target = Target { pod: PodId(1), ip, container: &container, from_switch: false };
            let question = question(&probe, &target, Duration::from_secs(1)).unwrap();
            assert_eq!((question.host.as_str(), question.port, &question.what), (host, port, what));
        };
        let http = |over_tls: bool, host: &str, more: &str| What::Http {
            over_tls,
            request: format!(
                "GET /x HTTP/1.1\r\nHost: {host}\r\nUser-Agent: kube-probe/1.0\r\nAccept: */*\r\nConnection: close\r\n{more}\r\n"
            ),
        };
        check(json!({"httpGet": {"path": "x", "port": "web"}}), "10.77.0.9", 8080, &http(false, "10.77.0.9:8080", ""));
        check(
            json!({"httpGet": {"path": "/x", "port": 1, "scheme": "HTTPS", "host": "a.test", "httpHeaders": [{"name": "A", "value": "b"}]}}),
            "a.test",
            1,
            &http(true, "a.test:1", "A: b\r\n"),
        );
        check(
            json!({"httpGet": {"path": "/x", "port": 1, "httpHeaders": [{"name": "Host", "value": "b.test"}]}}),
            "10.77.0.9",
            1,
            &http(false, "b.test", ""),
        );
        check(json!({"tcpSocket": {"port": 2, "host": "127.0.0.1"}}), "127.0.0.1", 2, &What::Connect);
        let health = What::Grpc { service: "s".to_owned() };
        check(json!({"grpc": {"port": 3, "service": "s"}}), "10.77.0.9", 3, &health);
    }
}
