//! Servers behind the proxies.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::json;

/// A request that arrived.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    /// Names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

/// An answer: status, headers, body.
pub(crate) type Answer = (u16, Vec<(&'static str, String)>, String);

/// A server of HTTP/1.1, for as long as the process lives.
#[derive(Clone)]
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Backend {
    pub(crate) fn start(answer: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let made = Self { address: listener.local_addr().unwrap(), seen: Arc::default() };
        let (seen, answer) = (Arc::clone(&made.seen), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream, &seen, &*answer));
            }
        });
        made
    }

    /// Answers with what it was asked, without what differs from proxy to proxy by nature (of a retry,
    /// Envoy tells the time that is left).
    pub(crate) fn echo(name: &'static str) -> Self {
        Self::start(move |seen| {
            let mut headers = seen.headers.clone();
            for volatile in [
                "x-request-id",
                "x-b3-traceid",
                "x-b3-spanid",
                "x-b3-parentspanid",
                "traceparent",
                "x-envoy-expected-rq-timeout-ms",
            ] {
                headers.entry(volatile.to_owned()).and_modify(|value| "some".clone_into(value));
            }
            let body = json!({
                "by": name, "method": seen.method, "path": seen.path, "headers": headers, "body": seen.body,
            });
            (200, vec![("x-by", name.to_owned())], body.to_string())
        })
    }

    /// What arrived so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn serve(stream: TcpStream, all: &Mutex<Vec<Seen>>, answer: &dyn Fn(&Seen) -> Answer) {
    let mut stream = BufReader::new(stream);
    while let Some(seen) = read(&mut stream) {
        all.lock().unwrap().push(seen.clone());
        let (status, headers, body) = answer(&seen);
        let mut head = format!("HTTP/1.1 {status} Some\r\ncontent-length: {}\r\n", body.len());
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if stream.get_mut().write_all(format!("{head}\r\n{body}").as_bytes()).is_err() {
            return;
        }
    }
}

fn read(stream: &mut BufReader<TcpStream>) -> Option<Seen> {
    let mut line = || {
        let mut line = String::new();
        stream.read_line(&mut line).ok().filter(|n| *n > 0)?;
        Some(line.trim_end().to_owned())
    };
    let first = line()?;
    let mut words = first.split(' ').map(str::to_owned);
    let mut seen = Seen { method: words.next()?, path: words.next()?, ..Seen::default() };
    while let Some((name, value)) = line()?.split_once(':') {
        seen.headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut body = Vec::new();
    if let Some(length) = seen.headers.get("content-length").and_then(|length| length.parse().ok()) {
        body.resize(length, 0);
        stream.read_exact(&mut body).ok()?;
    } else if seen.headers.contains_key("transfer-encoding") {
        loop {
            let mut size = String::new();
            stream.read_line(&mut size).ok()?;
            let size = usize::from_str_radix(size.trim(), 16).ok()?;
            let start = body.len();
            body.resize(start + size, 0);
            stream.read_exact(&mut body[start..]).ok()?;
            stream.read_line(&mut String::new()).ok()?;
            if size == 0 {
                break;
            }
        }
    }
    seen.body = String::from_utf8_lossy(&body).into_owned();
    Some(seen)
}

/// A TCP server that greets with its name, then gives back what it gets.
pub(crate) fn tcp(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut line = String::new();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while reader.read_line(&mut line).is_ok_and(|n| n > 0) {
                    // Whoever asked may be gone.
                    if stream.write_all(format!("{name} {line}").as_bytes()).is_err() {
                        return;
                    }
                    line.clear();
                }
            });
        }
    });
    address
}

/// Where nobody listens: a port that is given to nobody who asks for any.
pub(crate) fn nobody() -> SocketAddr {
    SocketAddr::from(([127, 77, 0, 1], 1))
}
