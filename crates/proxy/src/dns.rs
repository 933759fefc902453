//! DNS for the application: names of the mesh from the control plane's table, all else from the
//! pod's own servers.
//!
//! *Source*: Istio's DNS proxy: search domains are honoured by listing every form of a name;
//! answers of the table are authoritative, live 30 s; AAAA of a name with IPv4 addresses only is
//! an empty answer, not an error.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use envoy_types::pb::google::protobuf::Any;
use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{RData, Record, RecordType};
use prost::Message as _;
use telemetry::metrics::{Counter, Recorder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use types::wellknown::marks;

use workers::Shared;
use workers::dial::How;

/// Names and their addresses. Keys are lower case, without trailing dot.
#[derive(Debug, Default)]
pub(crate) struct NameTable {
    names: HashMap<Box<str>, Box<[IpAddr]>>,
}

impl NameTable {
    /// Reads the control plane's message.
    pub(crate) fn parse(any: &Any) -> Result<Self, String> {
        let table = proto::nds::NameTable::decode(any.value.as_slice()).map_err(|error| error.to_string())?;
        let entry = |(name, info): (String, proto::nds::name_table::NameInfo)| {
            let ips = info.ips.iter().filter_map(|ip| ip.parse().ok()).collect();
            (name.trim_end_matches('.').to_ascii_lowercase().into_boxed_str(), ips)
        };
        Ok(Self { names: table.table.into_iter().map(entry).collect() })
    }

    /// Addresses of `name` (lower case, no trailing dot); wildcards serve the names below them.
    fn get(&self, name: &str) -> Option<&[IpAddr]> {
        if let Some(found) = self.names.get(name) {
            return Some(found);
        }
        let mut rest = name;
        while let Some((_, parent)) = rest.split_once('.') {
            if let Some(found) = self.names.get(format!("*.{parent}").as_str()) {
                return Some(found);
            }
            rest = parent;
        }
        None
    }
}

/// Seconds an answer lives.
const TTL: u32 = 30;
/// Servers get so long, each.
const UPSTREAM_MAX: Duration = Duration::from_secs(4);
/// Queries under way at once; more are dropped (clients ask again).
const QUERIES_MAX: usize = 512;

/// A DNS service.
pub(crate) struct Dns {
    names: Arc<ArcSwap<NameTable>>,
    upstream: Vec<SocketAddr>,
    shared: Arc<Shared>,
    limit: Arc<tokio::sync::Semaphore>,
}

/// Serves UDP and TCP at `address`; gives the address it really has.
pub(crate) async fn serve(
    address: SocketAddr,
    names: Arc<ArcSwap<NameTable>>,
    upstream: Vec<SocketAddr>,
    shared: Arc<Shared>,
) -> io::Result<SocketAddr> {
    let udp = UdpSocket::bind(address).await?;
    let address = udp.local_addr()?;
    let tcp = TcpListener::bind(address).await?;
    let recorder = shared.metrics.recorder();
    let dns = Arc::new(Dns { names, upstream, shared, limit: Arc::new(tokio::sync::Semaphore::new(QUERIES_MAX)) });
    let over_tcp = Arc::clone(&dns);
    tokio::spawn(serve_udp(dns, Arc::new(udp), recorder));
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = tcp.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let dns = Arc::clone(&over_tcp);
            let Ok(permit) = Arc::clone(&dns.limit).try_acquire_owned() else { continue };
            tokio::spawn(async move {
                let serving = serve_tcp(&dns, stream);
                if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(30), serving).await {
                    tracing::trace!(%error, "a DNS connection ended");
                }
                drop(permit);
            });
        }
    });
    Ok(address)
}

async fn serve_udp(dns: Arc<Dns>, socket: Arc<UdpSocket>, recorder: Recorder) {
    let mut buffer = [0; 4096];
    loop {
        let Ok((n, peer)) = socket.recv_from(&mut buffer).await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        recorder.count(Counter::DnsRequests);
        match dns.local_answer(&buffer[..n]) {
            Local::Answer(answer) => {
                if let Err(error) = socket.send_to(&answer, peer).await {
                    tracing::trace!(%error, "a DNS answer was not sent");
                }
            }
            Local::Garbage => {}
            Local::Elsewhere => {
                recorder.count(Counter::DnsUpstream);
                let Ok(permit) = Arc::clone(&dns.limit).try_acquire_owned() else { continue };
                let (dns, socket, query) = (Arc::clone(&dns), Arc::clone(&socket), buffer[..n].to_vec());
                tokio::spawn(async move {
                    let answer = dns.forward(&query).await;
                    if let Err(error) = socket.send_to(&answer, peer).await {
                        tracing::trace!(%error, "a DNS answer was not sent");
                    }
                    drop(permit);
                });
            }
        }
    }
}

async fn serve_tcp(dns: &Dns, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let n = usize::from(stream.read_u16().await?);
        let mut query = vec![0; n];
        stream.read_exact(&mut query).await?;
        let answer = match dns.local_answer(&query) {
            Local::Answer(answer) => answer,
            Local::Garbage => return Ok(()),
            Local::Elsewhere => dns.forward(&query).await,
        };
        let length = u16::try_from(answer.len()).map_err(|_| io::Error::other("the answer is too long"))?;
        stream.write_u16(length).await?;
        stream.write_all(&answer).await?;
    }
}

enum Local {
    Answer(Vec<u8>),
    Elsewhere,
    Garbage,
}

impl Dns {
    fn local_answer(&self, query: &[u8]) -> Local {
        answer(query, &self.names.load())
    }

    /// Asks the pod's servers, one after the other; a failure is SERVFAIL.
    async fn forward(&self, query: &[u8]) -> Vec<u8> {
        for server in &self.upstream {
            match tokio::time::timeout(UPSTREAM_MAX, self.ask(*server, query)).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(error)) => tracing::debug!(%error, %server, "a DNS server does not answer"),
                Err(_) => tracing::debug!(%server, "a DNS server does not answer in time"),
            }
        }
        failure(query)
    }

    async fn ask(&self, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
        let socket = self.shared.dialer.udp(server, &How { mark: marks::PROXY, bind: None, keepalive: None }).await?;
        socket.connect(server).await?;
        socket.send(query).await?;
        let mut buffer = vec![0; 4096];
        loop {
            let n = socket.recv(&mut buffer).await?;
            // another's answer, or a forged one
            if n >= 12 && buffer[..2] == query[..2] && buffer[2] & 0x80 != 0 {
                buffer.truncate(n);
                return Ok(buffer);
            }
        }
    }
}

fn failure(query: &[u8]) -> Vec<u8> {
    let Ok(query) = Message::from_vec(query) else { return Vec::new() };
    reply(&query, ResponseCode::ServFail).to_vec().unwrap_or_default()
}

fn reply(query: &Message, code: ResponseCode) -> Message {
    let mut message = Message::new(query.id, MessageType::Response, OpCode::Query);
    message.metadata.recursion_desired = query.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.response_code = code;
    message.add_queries(query.queries.clone());
    message
}

fn answer(bytes: &[u8], names: &NameTable) -> Local {
    let Ok(query) = Message::from_vec(bytes) else { return Local::Garbage };
    let [question] = query.queries.as_slice() else { return Local::Garbage };
    if query.metadata.message_type != MessageType::Query || query.metadata.op_code != OpCode::Query {
        return Local::Garbage;
    }
    if !matches!(question.query_type(), RecordType::A | RecordType::AAAA) {
        return Local::Elsewhere;
    }
    let name = question.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
    let Some(addresses) = names.get(&name) else { return Local::Elsewhere };
    let mut message = reply(&query, ResponseCode::NoError);
    message.metadata.authoritative = true;
    for address in addresses {
        let data = match (address, question.query_type()) {
            (IpAddr::V4(ip), RecordType::A) => RData::A(A(*ip)),
            (IpAddr::V6(ip), RecordType::AAAA) => RData::AAAA(AAAA(*ip)),
            _ => continue,
        };
        message.add_answer(Record::from_rdata(question.name().clone(), TTL, data));
    }
    message.to_vec().map_or(Local::Garbage, Local::Answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use hickory_proto::rr::Name;

    fn table() -> NameTable {
        let mut names: HashMap<Box<str>, Box<[IpAddr]>> = HashMap::new();
        names.insert("reviews.shop.svc.cluster.local".into(), ["10.96.0.3".parse().unwrap()].into());
        names.insert("*.wild.example".into(), ["10.96.0.4".parse().unwrap()].into());
        NameTable { names }
    }

    fn ask(name: &str, kind: RecordType) -> Option<(ResponseCode, Vec<String>)> {
        let mut query = Message::new(7, MessageType::Query, OpCode::Query);
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        match answer(&query.to_vec().unwrap(), &table()) {
            Local::Answer(bytes) => {
                let message = Message::from_vec(&bytes).unwrap();
                assert_eq!(message.id, 7);
                let data = message.answers.iter().map(|record| record.data.to_string()).collect();
                Some((message.metadata.response_code, data))
            }
            Local::Elsewhere => None,
            Local::Garbage => panic!("garbage"),
        }
    }

    #[test]
    fn the_table_answers_and_passes_on() {
        let yes = Some((ResponseCode::NoError, vec!["10.96.0.3".to_owned()]));
        assert_eq!(ask("Reviews.shop.svc.cluster.local.", RecordType::A), yes);
        assert_eq!(ask("reviews.shop.svc.cluster.local.", RecordType::AAAA), Some((ResponseCode::NoError, vec![])));
        assert_eq!(ask("a.b.wild.example.", RecordType::A).unwrap().1, ["10.96.0.4"]);
        assert_eq!(ask("wild.example.", RecordType::A), None);
        assert_eq!(ask("reviews.shop.svc.cluster.local.", RecordType::MX), None);
    }

    #[test]
    fn garbage_is_not_answered() {
        assert!(matches!(answer(&[1, 2, 3], &table()), Local::Garbage));
    }
}
