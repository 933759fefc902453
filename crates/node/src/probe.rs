//! Probes: is a container's port, page or program well?
//!
//! A pod's proxy takes what arrives from outside, and under STRICT refuses a plain probe. Istio lets
//! its agent ask the application; here the question is asked from within the container, by our own
//! binary in a hidden role, so that neither proxy nor rules see it. The proxy's own page, which is
//! never captured, is asked from the switch.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use api::k8s::{Container, IntOrString, Probe};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::runtime::PodRuntime;
use crate::spec::{PodId, SELF_EXE};

/// The hidden role.
pub(crate) const ASK: &str = "node-ask";
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// A question over the network.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Question {
    to: SocketAddr,
    /// The request to send; none: connecting is enough.
    request: Option<String>,
    timeout_ms: u64,
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

/// Asks once; the error says why the container is not well.
pub(crate) async fn ask(probe: &Probe, target: Target<'_>, runtime: &PodRuntime) -> Result<(), String> {
    let limit = Duration::from_secs(u64::from(probe.timeout_seconds.max(1)));
    if let Some(exec) = &probe.exec {
        let run = runtime.run_in_container(target.pod, &target.container.name, exec.command.clone(), limit).await;
        return match run {
            Ok(result) => match result.code {
                Some(0) => Ok(()),
                Some(code) => {
                    Err(format!("command ended with {code}: {}", String::from_utf8_lossy(&result.output).trim()))
                }
                None => Err("command ran out of time".to_owned()),
            },
            Err(error) => Err(error.to_string()),
        };
    }
    let Some(question) = question(probe, &target, limit) else { return Err("the probe's port is unknown".to_owned()) };
    if target.from_switch {
        return match tokio::time::timeout(limit, runtime.dial(question.to)).await {
            Err(_) => Err("no answer in time".to_owned()),
            Ok(Err(error)) => Err(error.to_string()),
            Ok(Ok(stream)) => talk(stream, &question).await,
        };
    }
    let text = serde_json::to_string(&question).map_err(|error| error.to_string())?;
    let argv = vec![SELF_EXE.to_owned(), ASK.to_owned(), text];
    match runtime.run_in_container(target.pod, &target.container.name, argv, limit + Duration::from_secs(1)).await {
        Ok(result) if result.code == Some(0) => Ok(()),
        Ok(result) => Err(String::from_utf8_lossy(&result.output).trim().to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn question(probe: &Probe, target: &Target<'_>, limit: Duration) -> Option<Question> {
    let number = |port: Option<&IntOrString>| match port? {
        IntOrString::Int(port) => Some(*port),
        IntOrString::Name(name) => target.container.ports.iter().find(|p| p.name == *name).map(|p| p.container_port),
    };
    let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    if let Some(http) = &probe.http_get {
        let port = number(http.port.as_ref())?;
        let named = http.http_headers.iter().find(|header| header.name.eq_ignore_ascii_case("host"));
        let host = named.map_or_else(|| format!("{}:{port}", target.ip), |header| header.value.clone());
        let path = if http.path.starts_with('/') { http.path.clone() } else { format!("/{}", http.path) };
        let mut request = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: kube-probe/1.0\r\nAccept: */*\r\nConnection: close\r\n"
        );
        for header in http.http_headers.iter().filter(|header| !header.name.eq_ignore_ascii_case("host")) {
            for part in [header.name.as_str(), ": ", &header.value, "\r\n"] {
                request.push_str(part);
            }
        }
        request.push_str("\r\n");
        // TLS is accepted without looking, so a connection is all that an HTTPS probe here can tell.
        let request = (!http.scheme.eq_ignore_ascii_case("https")).then_some(request);
        return Some(Question { to: SocketAddr::new(target.ip, port), request, timeout_ms });
    }
    let port = match (&probe.tcp_socket, &probe.grpc) {
        (Some(tcp), _) => number(tcp.port.as_ref())?,
        (None, Some(grpc)) => grpc.port,
        (None, None) => return None,
    };
    Some(Question { to: SocketAddr::new(target.ip, port), request: None, timeout_ms })
}

/// Sends the request and looks at the status: 200 to 399 is well.
async fn talk(mut stream: impl AsyncRead + AsyncWrite + Unpin, question: &Question) -> Result<(), String> {
    let Some(request) = &question.request else { return Ok(()) };
    let exchange = async {
        stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
        let mut head = Vec::new();
        let mut buffer = [0; 1024];
        while head.len() < HEAD_BYTES_MAX && !head.contains(&b'\n') {
            match stream.read(&mut buffer).await {
                Ok(0) => break,
                Ok(length) => head.extend_from_slice(&buffer[..length]),
                Err(error) => return Err(error.to_string()),
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
    };
    match tokio::time::timeout(Duration::from_millis(question.timeout_ms), exchange).await {
        Ok(result) => result,
        Err(_) => Err("no answer in time".to_owned()),
    }
}

/// The hidden role: asks from within the container.
pub(crate) fn probe_main(argument: &str) -> ExitCode {
    let outcome = serde_json::from_str::<Question>(argument).map_err(|error| error.to_string()).and_then(|question| {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
        runtime.block_on(async {
            let limit = Duration::from_millis(question.timeout_ms);
            match tokio::time::timeout(limit, tokio::net::TcpStream::connect(question.to)).await {
                Err(_) => Err("no answer in time".to_owned()),
                Ok(Err(error)) => Err(error.to_string()),
                Ok(Ok(stream)) => talk(stream, &question).await,
            }
        })
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

    async fn answer(text: &'static str) -> Result<(), String> {
        let (mut server, client) = tokio::io::duplex(4096);
        let serve = async move {
            let mut buffer = [0; 512];
            drop(server.read(&mut buffer).await);
            drop(server.write_all(text.as_bytes()).await);
        };
        let question = Question {
            to: "127.0.0.1:1".parse().unwrap(),
            request: Some("GET / HTTP/1.1\r\n\r\n".into()),
            timeout_ms: 60_000,
        };
        tokio::join!(serve, talk(client, &question)).1
    }

    #[tokio::test]
    async fn two_and_three_hundreds_are_well() {
        assert_eq!(answer("HTTP/1.1 200 OK\r\n\r\n").await, Ok(()));
        assert_eq!(answer("HTTP/1.0 302 Found\r\n\r\n").await, Ok(()));
        assert!(answer("HTTP/1.1 503 Service Unavailable\r\n\r\n").await.unwrap_err().contains("503"));
        assert!(answer("SSH-2.0-x\r\n").await.unwrap_err().contains("not HTTP"));
        assert!(answer("").await.is_err());
    }
}
