//! What runs inside pods.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

/// How long a peer may say nothing.
const SILENCE_MAX: Duration = Duration::from_secs(30);

pub(crate) fn play(role: &str, words: &[String]) -> Option<ExitCode> {
    let word = |index: usize| words.get(index).map_or("", String::as_str);
    let outcome = match role {
        "serve" => serve(&TcpListener::bind(word(0)).unwrap(), word(1)),
        "serve-inherited" => serve_inherited(word(0)),
        "fake-proxy" => fake_proxy(),
        "dial" => dial(word(0)),
        "dial-marked" => dial_marked(word(0)),
        "dial-host" => dial_host(word(0)),
        "resolve" => resolve(word(0)),
        "capabilities" => capabilities(),
        "exit" => return Some(ExitCode::from(word(0).parse::<u8>().unwrap())),
        "wait" => {
            println!("waiting");
            std::thread::sleep(Duration::from_mins(10));
            Ok(())
        }
        "orphans" => orphans(),
        "hold" => crate::cases::hold(word(0)),
        _ => return None,
    };
    Some(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    })
}

type Outcome = Result<(), std::io::Error>;

fn serve(listener: &TcpListener, name: &str) -> Outcome {
    println!("serving");
    loop {
        let (mut client, peer) = listener.accept()?;
        let local = client.local_addr()?;
        // A client that went away is no reason to stop.
        let _result = writeln!(client, "{name} peer={} local={local}", peer.ip());
    }
}

fn serve_inherited(port: &str) -> Outcome {
    let passed = std::env::var(types::wellknown::env::LISTEN_FDS).unwrap_or_default();
    let fd =
        passed.split(',').find_map(|entry| entry.strip_prefix(&format!("{port}="))).expect("a listener for the port");
    // SAFETY: the variable names a descriptor that we inherited and nobody else uses.
    #[expect(unsafe_code, reason = "adopting an inherited descriptor")]
    let listener = TcpListener::from(unsafe { OwnedFd::from_raw_fd(fd.parse().unwrap()) });
    listener.set_nonblocking(false)?;
    serve(&listener, "gateway")
}

/// Says what the rules did to a connection, then passes it on as a proxy would.
fn fake_proxy() -> Outcome {
    let outbound = TcpListener::bind("127.0.0.1:15001")?;
    let inbound = TcpListener::bind("0.0.0.0:15006")?;
    println!("serving");
    let out = std::thread::spawn(move || -> Outcome {
        loop {
            let (mut client, _) = outbound.accept()?;
            let original = socket2::SockRef::from(&client).original_dst_v4()?.as_socket().unwrap();
            writeln!(client, "outbound {original}")?;
            if let Ok(upstream) = std::env::var("UPSTREAM") {
                let answer = connect(upstream.parse().unwrap(), Some(types::wellknown::marks::PROXY), None)?;
                client.write_all(read(answer).as_bytes())?;
            }
        }
    });
    loop {
        let (mut client, peer) = inbound.accept()?;
        let original = socket2::SockRef::from(&client).original_dst_v4()?.as_socket().unwrap();
        writeln!(client, "inbound {original} peer={}", peer.ip())?;
        let source = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6));
        let answer = connect(original, Some(types::wellknown::marks::PROXY_TO_APP), Some(source))?;
        client.write_all(read(answer).as_bytes())?;
        if out.is_finished() {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
    }
}

fn connect(to: SocketAddr, mark: Option<u32>, source: Option<IpAddr>) -> std::io::Result<TcpStream> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    socket.connect_timeout(&to.into(), SILENCE_MAX)?;
    Ok(socket.into())
}

fn read(mut stream: TcpStream) -> String {
    let mut text = String::new();
    stream.set_read_timeout(Some(SILENCE_MAX)).unwrap();
    if let Err(error) = stream.read_to_string(&mut text)
        && matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
    {
        text.push_str("(silence)");
    }
    text
}

fn dial(to: &str) -> Outcome {
    let to = to.to_socket_addrs()?.next().expect("an address");
    print!("{}", read(connect(to, None, None)?));
    Ok(())
}

fn dial_marked(to: &str) -> Outcome {
    print!("{}", read(connect(to.parse().unwrap(), Some(types::wellknown::marks::PROXY), None)?));
    Ok(())
}

/// The client side of the contract of `LATEEN_HOST_SOCKETS`.
fn dial_host(to: &str) -> Outcome {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
    let number: i32 = std::env::var(types::wellknown::env::HOST_SOCKETS).expect("the variable").parse().unwrap();
    // SAFETY: the variable names a descriptor that we inherited and nobody else uses.
    #[expect(unsafe_code, reason = "adopting an inherited descriptor")]
    let service = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::net::send(&service, &[1, 1, 4, 1], SendFlags::empty())?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut status = [9];
    rustix::net::recvmsg(&service, &mut [std::io::IoSliceMut::new(&mut status)], &mut ancillary, RecvFlags::empty())?;
    assert_eq!(status, [0]);
    let socket = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let socket = socket2::Socket::from(socket.expect("a socket"));
    assert!(socket.set_mark(types::wellknown::marks::PROXY).is_err() || rustix::process::geteuid().is_root());
    socket.connect_timeout(&to.parse::<SocketAddr>().unwrap().into(), SILENCE_MAX)?;
    socket.set_nonblocking(false)?;
    print!("{}", read(socket.into()));
    Ok(())
}

fn resolve(name: &str) -> Outcome {
    let mut found: Vec<String> = (name, 0).to_socket_addrs()?.map(|address| address.ip().to_string()).collect();
    found.sort();
    found.dedup();
    println!("{}", found.join(" "));
    Ok(())
}

fn capabilities() -> Outcome {
    for line in std::fs::read_to_string("/proc/self/status")?.lines() {
        if ["CapPrm", "CapEff", "CapBnd", "CapAmb"].iter().any(|name| line.starts_with(name)) {
            println!("{}", line.replace('\t', " "));
        }
    }
    Ok(())
}

/// Leaves a grandchild behind and waits: it must be reaped and must not outlive the container.
fn orphans() -> Outcome {
    std::process::Command::new("/proc/self/exe")
        .args(["wait", "orphan"])
        .stdout(std::process::Stdio::null())
        .spawn()?;
    println!("left");
    std::thread::sleep(Duration::from_mins(10));
    Ok(())
}
