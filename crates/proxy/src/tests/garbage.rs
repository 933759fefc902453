//! Bytes that are not what a listener expects before HTTP: TLS, PROXY protocol, sniffing.

use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3::ProxyProtocol;
use envoy_types::pb::envoy::extensions::filters::listener::{http_inspector, tls_inspector};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::bed;
use super::mesh::{Authority, inbound};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

fn filter(name: &str, config: envoy_types::pb::google::protobuf::Any) -> listener::ListenerFilter {
    listener::ListenerFilter {
        name: name.into(),
        config_type: Some(listener::listener_filter::ConfigType::TypedConfig(config)),
        ..Default::default()
    }
}

async fn behind(filters: Vec<listener::ListenerFilter>, timeout: i32) -> (bed::Running, bed::Seen) {
    let (up, seen) = bed::recorder("\r\n\r\n", OK).await;
    let manager = bed::manager(vec![bed::to_cluster("/", "up")]);
    let mut made = bed::listener("in", bed::http_filter(&manager));
    made.listener_filters = filters;
    made.listener_filters_timeout = bed::milliseconds(timeout);
    (Box::pin(bed::start(vec![made], vec![bed::cluster("up", up, false)])).await, seen)
}

#[tokio::test]
async fn a_bad_proxy_preamble_ends_the_connection() {
    const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
    for optional in [false, true] {
        let config = ProxyProtocol { allow_requests_without_proxy_protocol: optional, ..ProxyProtocol::default() };
        let (running, seen) = behind(vec![filter("p", bed::any(&config))], 3000).await;
        let mut cases: Vec<Vec<u8>> = [
            "PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n",
            "PROXY TCP4 ::1 ::2 1 2\r\n",
            "PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 70000\r\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
            "PROXY TCP9 1.2.3.4 5.6.7.8 1 2\r\n",
            "PROXY  TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
            "PROXY \r\n",
        ]
        .iter()
        .map(|line| line.as_bytes().to_vec())
        .collect();
        cases.push([b"PROXY ", &[b'x'; 200][..]].concat());
        cases.push([V2, &[0x31, 0x11, 0, 12], &[0; 12]].concat());
        cases.push([V2, &[0x22, 0x11, 0, 12], &[0; 12]].concat());
        cases.push([V2, &[0x21, 0x11, 0, 4], &[0; 4]].concat());
        cases.push([V2, &[0x21, 0x21, 0, 12], &[0; 12]].concat());
        // and one that never comes to its end
        cases.push([V2, &[0x21, 0x11, 0xff, 0xff], &[0; 12]].concat());
        for case in cases {
            let bytes = [&case[..], GET.as_bytes()].concat();
            let answer = bed::talk(running.at("in"), &bytes, |_| false).await;
            assert_eq!(answer, "", "{optional} {:?}", String::from_utf8_lossy(&case));
        }
        assert_eq!(seen.text(), [""; 0]);
        for good in ["PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n", "PROXY UNKNOWN\r\n"] {
            let answer = bed::talk(running.at("in"), format!("{good}{GET}").as_bytes(), |_| false).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{good}: {answer}");
        }
        let bare = bed::talk(running.at("in"), GET.as_bytes(), |_| false).await;
        assert_eq!(bare.starts_with("HTTP/1.1 200 "), optional, "{bare}");
        running.end().await;
    }
}

#[tokio::test]
async fn a_preamble_names_the_listener_and_the_original_destination() {
    use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
    use envoy_types::pb::google::protobuf::BoolValue;

    let flag = |value| Some(BoolValue { value });
    let (up, seen) = bed::recorder("\r\n\r\n", OK).await;
    let mut captured = bed::listener("captured", bed::tcp_filter("dialled"));
    captured.listener_filters = vec![filter("p", bed::any(&ProxyProtocol::default()))];
    captured.use_original_dst = flag(true);
    // It is handed what is for its address, and looks at it with filters of its own.
    let mut other = bed::listener("other", bed::http_filter(&bed::manager(vec![bed::to_cluster("/", "up")])));
    other.address = Some(bed::address(([10, 9, 9, 9], 80).into()));
    other.bind_to_port = flag(false);
    other.listener_filters = vec![filter("http", bed::any(&http_inspector::v3::HttpInspector::default()))];
    other.filter_chains[0].filter_chain_match =
        Some(listener::FilterChainMatch { application_protocols: vec!["http/1.1".into()], ..Default::default() });
    let mut dialled = bed::cluster("dialled", up, false);
    dialled.load_assignment = None;
    dialled.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into()));
    dialled.lb_policy = LbPolicy::ClusterProvided.into();
    let running = Box::pin(bed::start(vec![captured, other], vec![bed::cluster("up", up, false), dialled])).await;
    let at = running.at("captured");
    let talk = async |to: &str| {
        let bytes = format!("PROXY TCP4 10.0.0.1 {to}\r\n{GET}");
        bed::talk(at, bytes.as_bytes(), |text| text.ends_with("ok")).await
    };
    let answer = talk("10.9.9.9 1000 80").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "a request: {answer}");
    let port = up.port();
    assert_eq!(talk(&format!("127.0.0.1 1000 {port}")).await.as_bytes(), OK, "bytes to the address that is named");
    let itself = talk(&format!("127.0.0.1 1000 {}", at.port())).await;
    assert_eq!(itself, "", "never back to itself");
    let seen = seen.text();
    assert!(seen.len() == 2 && seen[0].contains("x-request-id") && seen[1] == GET, "{seen:?}");
    running.end().await;
}

#[tokio::test]
async fn inspectors_do_not_wait_for_ever() {
    let filters = vec![
        filter("tls", bed::any(&tls_inspector::v3::TlsInspector::default())),
        filter("http", bed::any(&http_inspector::v3::HttpInspector::default())),
    ];
    let (running, _) = behind(filters, 1500).await;
    // silence, half a ClientHello, half a request line
    for bytes in [&b""[..], &[22, 3, 1, 1, 0, 1, 0, 0, 252, 3, 3], b"GET / HT"] {
        let mut stream = TcpStream::connect(running.at("in")).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        assert!(bed::is_closed(&mut stream).await, "{bytes:?}");
    }
    let answer = bed::talk(running.at("in"), GET.as_bytes(), |_| false).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    running.end().await;
}

#[tokio::test]
async fn without_a_time_the_inspector_waits_until_the_client_speaks() {
    let (up, seen) = bed::recorder("\r\n\r\n", OK).await;
    let mut made = bed::listener("in", bed::tcp_filter("up"));
    made.listener_filters = vec![filter("http", bed::any(&http_inspector::v3::HttpInspector::default()))];
    made.listener_filters_timeout = bed::milliseconds(0);
    made.continue_on_listener_filters_timeout = true;
    let running = Box::pin(bed::start(vec![made], vec![bed::cluster("up", up, false)])).await;
    let mut silent = TcpStream::connect(running.at("in")).await.unwrap();
    let at = running.at("in");
    for _ in 0..100 {
        assert!(bed::talk(at, GET.as_bytes(), |text| text.ends_with("ok")).await.starts_with("HTTP/1.1 200 "));
    }
    assert_eq!(seen.text().len(), 100, "nobody was called for the one that is silent");
    silent.write_all(GET.as_bytes()).await.unwrap();
    seen.until(|all| all.len() == 101 && all[100] == GET).await;
    running.end().await;
}

#[tokio::test]
async fn bad_handshakes_end_their_connection() {
    let authority = Authority::new();
    let (up, seen) = bed::recorder("\r\n\r\n", OK).await;
    let manager = bed::manager(vec![bed::to_cluster("/", "up")]);
    let mut made = inbound(&authority, bed::http_filter(&manager));
    made.filter_chains[0].transport_socket_connect_timeout = bed::milliseconds(300);
    let running = Box::pin(bed::start(vec![made], vec![bed::cluster("up", up, false)])).await;
    let mut cases: Vec<Vec<u8>> = vec![
        Vec::new(),
        GET.as_bytes().to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        vec![22],
        vec![22, 3, 1, 0xff, 0xff, 1, 0, 0, 4],
        vec![22, 3, 1, 0, 0],
        vec![23, 3, 3, 0, 5, 1, 2, 3, 4, 5],
        vec![21, 3, 3, 0, 2, 2, 40],
        vec![0x80, 46, 1, 3, 1],
        [&[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff][..], &[0; 4096]].concat(),
        vec![0; 100_000],
        vec![0xff; 100_000],
    ];
    // a ClientHello in crumbs, and TLS 1.1 at most
    cases.push((0..2000).flat_map(|_| [22, 3, 1, 0, 1, 1]).collect());
    let mut old = vec![3, 2];
    old.extend([7; 32]);
    old.extend([0, 0, 2, 0, 0x2f, 1, 0]);
    let hello = [&[1, 0, 0, u8::try_from(old.len()).unwrap()][..], &old].concat();
    cases.push([&[22, 3, 1, 0, u8::try_from(hello.len()).unwrap()][..], &hello].concat());
    for case in cases {
        let mut stream = TcpStream::connect(running.at("tls")).await.unwrap();
        // it may be closed before all is written
        drop(stream.write_all(&case).await);
        assert!(bed::is_closed(&mut stream).await, "{:?}", &case[..case.len().min(16)]);
    }
    assert_eq!(seen.text(), [""; 0]);
    running.end().await;
}
