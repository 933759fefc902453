//! A server that answers as a test tells it and tells what it saw: an authorizer, a collector of
//! spans, an issuer of keys, a TLS server that only reads.
//!
//! `puppet PORT [RAW_PORT]`. On `PORT`, HTTP/1.1 with three pages of its own, and an answer of the
//! list for everything else (the longest path that the request's begins with; 200 when none fits):
//!
//! | page | what |
//! |---|---|
//! | `PUT /_/answers` | `[{"path", "status", "headers": {…}, "body", "hangs", "closes", "truncates", "echoes"}]` |
//! | `GET /_/seen`, `DELETE /_/seen` | the requests, as `[{"method", "path", "headers": {name: […]}, "body", "connection"}]` |
//! | `GET /_/raw` | the first bytes of each connection to `RAW_PORT`, in base64 |

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};

/// Requests and connections that are remembered; older ones are forgotten.
const SEEN_MAX: usize = 5000;
/// A client of `RAW_PORT` may be silent so long.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest body.
const BODY_MAX: u64 = 4 << 20;

#[derive(Default)]
struct Memory {
    answers: Vec<Value>,
    seen: Vec<Value>,
    raw: Vec<String>,
}

type Shared = Arc<Mutex<Memory>>;

fn main() -> io::Result<()> {
    let ports: Vec<u16> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let [http, raw @ ..] = &ports[..] else { return Err(io::Error::other("usage: puppet PORT [RAW_PORT]")) };
    let memory = Shared::default();
    if let Some(raw) = raw.first() {
        let (listener, memory) = (TcpListener::bind(("0.0.0.0", *raw))?, Arc::clone(&memory));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                record_raw(stream, &memory);
            }
        });
    }
    // Both families, where the machine has both.
    let listener = TcpListener::bind(("::", *http)).or_else(|_| TcpListener::bind(("0.0.0.0", *http)))?;
    for (number, stream) in listener.incoming().map_while(Result::ok).enumerate() {
        let memory = Arc::clone(&memory);
        std::thread::spawn(move || serve(stream, number, &memory));
    }
    Ok(())
}

fn lock(memory: &Shared) -> std::sync::MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remember<T>(list: &mut Vec<T>, item: T) {
    if list.len() >= SEEN_MAX {
        list.remove(0);
    }
    list.push(item);
}

/// Reads a whole record of TLS, or the first bytes of anything else.
fn record_raw(mut stream: TcpStream, memory: &Shared) {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    // A client that stops in the middle is not waited for.
    let timed = stream.set_read_timeout(Some(PATIENCE));
    while let (Ok(()), Ok(read @ 1..)) = (&timed, stream.read(&mut part)) {
        bytes.extend_from_slice(&part[..read]);
        let is_whole = match bytes[..] {
            [0x16, _, _, high, low, ..] => bytes.len() >= 5 + usize::from(u16::from_be_bytes([high, low])),
            [0x16, ..] => false,
            _ => true,
        };
        if is_whole {
            break;
        }
    }
    if !bytes.is_empty() {
        remember(&mut lock(memory).raw, BASE64.encode(&bytes));
    }
}

/// Serves a connection, the `number`th, until either side has enough of it.
fn serve(stream: TcpStream, number: usize, memory: &Shared) -> Option<()> {
    let mut out = stream.try_clone().ok()?;
    let mut from = BufReader::new(stream);
    loop {
        let mut request = read(&mut from)?;
        request["connection"] = json!(number);
        let [method, path] = ["method", "path"].map(|part| request[part].as_str().unwrap_or_default().to_owned());
        let (mut missing, mut echoes) = (0, false);
        let (status, headers, body) = match (method.as_str(), path.as_str()) {
            ("PUT", "/_/answers") => {
                let answers = serde_json::from_str(request["body"].as_str().unwrap_or_default());
                lock(memory).answers = answers.unwrap_or_default();
                (204, Map::new(), String::new())
            }
            ("GET", "/_/seen") => (200, Map::new(), json!(lock(memory).seen).to_string()),
            ("DELETE", "/_/seen") => {
                lock(memory).seen.clear();
                (204, Map::new(), String::new())
            }
            ("GET", "/_/raw") => (200, Map::new(), json!(lock(memory).raw).to_string()),
            _ => {
                let answer = {
                    let mut memory = lock(memory);
                    remember(&mut memory.seen, request);
                    choose(&memory.answers, &path)
                };
                if answer["closes"] == true {
                    return None;
                }
                if answer["hangs"] == true {
                    // Until the other side gives up.
                    return from.read(&mut [0]).ok().map(drop);
                }
                missing = usize::from(answer["truncates"] == true);
                echoes = answer["echoes"] == true;
                let status = answer["status"].as_u64().unwrap_or(200);
                let body = answer["body"].as_str().unwrap_or_default().to_owned();
                (status, answer["headers"].as_object().cloned().unwrap_or_default(), body)
            }
        };
        let mut head = format!("HTTP/1.1 {status} Told\r\n");
        if !matches!(status, 101 | 204) {
            head.push_str(&format!("content-length: {}\r\n", body.len() + missing));
        }
        for (name, value) in &headers {
            head.push_str(&format!("{name}: {}\r\n", value.as_str().unwrap_or_default()));
        }
        out.write_all(format!("{head}\r\n{body}").as_bytes()).ok()?;
        if missing > 0 {
            return None;
        }
        if echoes {
            return io::copy(&mut from, &mut out).ok().map(drop);
        }
    }
}

fn choose(answers: &[Value], path: &str) -> Value {
    let begins = |answer: &&Value| answer["path"].as_str().is_some_and(|prefix| path.starts_with(prefix));
    let longest = |answer: &&Value| answer["path"].as_str().map_or(0, str::len);
    answers.iter().filter(begins).max_by_key(longest).cloned().unwrap_or_default()
}

fn line(from: &mut impl BufRead) -> Option<String> {
    let mut line = String::new();
    let read = from.read_line(&mut line).ok()?;
    (read > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned())
}

fn read(from: &mut impl BufRead) -> Option<Value> {
    let first = line(from)?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?, words.next()?);
    let mut headers = Map::new();
    let (mut length, mut is_chunked) = (0, false);
    loop {
        let line = line(from)?;
        let Some((name, value)) = line.split_once(':') else { break };
        let (name, value) = (name.to_ascii_lowercase(), value.trim());
        match name.as_str() {
            "content-length" => length = value.parse().ok()?,
            "transfer-encoding" => is_chunked = true,
            _ => {}
        }
        if let Some(list) = headers.entry(name).or_insert_with(|| json!([])).as_array_mut() {
            list.push(value.into());
        }
    }
    let mut body = Vec::new();
    let mut is_more = is_chunked;
    while is_more {
        let size = u64::from_str_radix(line(from)?.split(';').next()?, 16).ok()?;
        from.by_ref().take(size.min(BODY_MAX)).read_to_end(&mut body).ok()?;
        line(from)?;
        is_more = size > 0;
    }
    from.by_ref().take(BODY_MAX.min(length)).read_to_end(&mut body).ok()?;
    let body = String::from_utf8_lossy(&body);
    Some(json!({"method": method, "path": path, "headers": headers, "body": body}))
}
