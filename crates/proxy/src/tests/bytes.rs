//! Connections of bytes.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::bed;

#[tokio::test]
async fn bytes_pass_both_ways_and_halves_close_apart() {
    let up = bed::server(|mut stream| async move {
        let mut all = Vec::new();
        if stream.read_to_end(&mut all).await.is_ok() {
            all.reverse();
            drop(stream.write_all(&all).await);
        }
    })
    .await;
    let running =
        bed::start(vec![bed::listener("in", bed::tcp_filter("up"))], vec![bed::cluster("up", up, false)]).await;
    let mut stream = tokio::net::TcpStream::connect(running.at("in")).await.unwrap();
    let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    stream.write_all(&sent).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut back = Vec::new();
    stream.read_to_end(&mut back).await.unwrap();
    back.reverse();
    assert!(back == sent);
    running.end().await;
}

#[tokio::test]
async fn a_server_may_speak_first() {
    let up = bed::server(|mut stream| async move {
        drop(stream.write_all(b"220 hello\r\n").await);
        let mut rest = Vec::new();
        drop(stream.read_to_end(&mut rest).await);
    })
    .await;
    let running =
        bed::start(vec![bed::listener("in", bed::tcp_filter("up"))], vec![bed::cluster("up", up, false)]).await;
    assert_eq!(Box::pin(bed::talk(running.at("in"), b"", |text| text.ends_with('\n'))).await, "220 hello\r\n");
    running.end().await;
}
