//! Does this machine give pods what they need? Tried for real in a child process.
//!
//! [`run`] makes namespaces, a switch and two pods' worth of interfaces and rules, and sends
//! connections through them. It belongs in a process of its own that is single-threaded and ends
//! afterwards: the namespaces end with it.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::UnshareFlags;
use types::wellknown::{marks, ports};

use crate::error::{CaptureError, Step};
use crate::link::{Network, Switch, join};
use crate::netlink::errno_of;
use crate::rules::Redirect;

/// Connections of the probe stay on this machine. A first packet may be lost while an interface comes
/// up on a busy machine; then the next one, a second later, must do.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Enters the namespaces that pods live in, in the order that works for every kind of user.
///
/// With `user_namespace` the caller's uid and gid are mapped to themselves and every capability is
/// made ambient, so that programs started later keep what they are given. The calling process must
/// be single-threaded. Children, not the caller, are in the new pid namespace.
pub fn enter_namespaces(user_namespace: bool) -> Result<(), CaptureError> {
    let failed = |step| move |errno| CaptureError::explain(step, errno);
    // Read first: in the new namespace both are 65534 until they are mapped.
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    if user_namespace {
        unshare(UnshareFlags::NEWUSER).map_err(failed(Step::UserNamespace))?;
        write("/proc/self/setgroups", "deny").map_err(failed(Step::SetGroups))?;
        write("/proc/self/uid_map", &format!("{uid} {uid} 1")).map_err(failed(Step::IdMap))?;
        write("/proc/self/gid_map", &format!("{gid} {gid} 1")).map_err(failed(Step::IdMap))?;
    }
    unshare(UnshareFlags::NEWNET).map_err(failed(Step::NetNamespace))?;
    unshare(UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWUTS | UnshareFlags::NEWIPC)
        .map_err(failed(Step::OtherNamespaces))?;
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .map_err(failed(Step::PrivateMounts))?;
    if user_namespace { keep_capabilities().map_err(failed(Step::Capabilities)) } else { Ok(()) }
}

/// Makes every capability the process has inheritable and ambient, so that exec keeps it.
fn keep_capabilities() -> Result<(), Errno> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.inheritable = sets.permitted;
    rustix::thread::set_capabilities(None, sets)?;
    for bit in 0..64 {
        let one = rustix::thread::CapabilitySet::from_bits_retain(1 << bit);
        if sets.permitted.contains(one) {
            rustix::thread::configure_capability_in_ambient_set(one, true)?;
        }
    }
    Ok(())
}

fn write(path: &str, text: &str) -> Result<(), Errno> {
    std::fs::write(path, text).map_err(|error| errno_of(&error))
}

#[expect(
    unsafe_code,
    reason = "unshare has no safe form: sharing descriptors or memory differently could break others"
)]
fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: only namespaces are unshared, never the descriptor table or memory.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Runs every step in the calling process, which must be single-threaded and exit soon after.
pub fn run(user_namespace: bool) -> Result<(), CaptureError> {
    if !cfg!(target_os = "linux") {
        return Err(CaptureError::explain(Step::UserNamespace, Errno::NOSYS));
    }
    enter_namespaces(user_namespace)?;
    let network = Network::LOCAL;
    let switch = Switch::create("lateen-probe", network)?;
    let switch_listener = listen(SocketAddr::from((network.switch, 1)), Step::BridgeConnect)
        .or_else(|_| listen(SocketAddr::from((network.switch, 15999)), Step::BridgeConnect))?;
    let switch_at =
        switch_listener.local_addr().map_err(|error| CaptureError::explain(Step::BridgeConnect, errno_of(&error)))?;

    // From here on in a second network namespace, as a pod would be.
    unshare(UnshareFlags::NEWNET).map_err(|errno| CaptureError::explain(Step::NetNamespace, errno))?;
    let pod = open_own_namespace()?;
    switch.plug("port1", pod.as_fd())?;
    let pod_ip = Ipv4Addr::new(10, 77, 0, 2);
    join(&network, pod_ip, None)?;
    Redirect::default().install()?;

    let outbound = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, ports::OUTBOUND)), Step::RedirectedConnect)?;
    let service: SocketAddr = "10.96.0.99:80".parse().expect("an address");
    let (client, server) = pair(&outbound, service, None, Step::RedirectedConnect)?;
    let original = socket2::SockRef::from(&server).original_dst_v4();
    match original.map(|address| address.as_socket()) {
        Ok(Some(address)) if address == service => {}
        Ok(other) => {
            return Err(CaptureError::wrong(
                Step::OriginalDestination,
                format!("the kernel named {other:?} instead of {service}"),
            ));
        }
        Err(error) => return Err(CaptureError::explain(Step::OriginalDestination, errno_of(&error))),
    }
    exchange(client, server, Step::RedirectedConnect)?;

    // Marked as the proxy's own: passes the rules and reaches the switch.
    let (client, server) = pair(&switch_listener, switch_at, Some(marks::PROXY), Step::BridgeConnect)?;
    match server.peer_addr() {
        Ok(peer) if peer.ip() == pod_ip => exchange(client, server, Step::BridgeConnect),
        other => Err(CaptureError::wrong(Step::BridgeConnect, format!("the peer appeared as {other:?}"))),
    }
}

fn open_own_namespace() -> Result<OwnedFd, CaptureError> {
    std::fs::File::open("/proc/thread-self/ns/net")
        .map(OwnedFd::from)
        .map_err(|error| CaptureError::explain(Step::NetNamespace, errno_of(&error)))
}

fn listen(at: SocketAddr, step: Step) -> Result<TcpListener, CaptureError> {
    TcpListener::bind(at).map_err(|error| CaptureError::explain(step, errno_of(&error)))
}

/// Connects to `to` and takes the connection from `listener`, both within the time limit.
fn pair(
    listener: &TcpListener,
    to: SocketAddr,
    mark: Option<u32>,
    step: Step,
) -> Result<(TcpStream, TcpStream), CaptureError> {
    let explain = |error: std::io::Error| CaptureError::explain(step, errno_of(&error));
    let socket =
        socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None).map_err(explain)?;
    if let Some(mark) = mark {
        socket.set_mark(mark).map_err(|error| CaptureError::explain(Step::Mark, errno_of(&error)))?;
    }
    socket.connect_timeout(&to.into(), CONNECT_TIMEOUT).map_err(explain)?;
    listener.set_nonblocking(true).map_err(explain)?;
    let (server, _) = listener.accept().map_err(explain)?;
    server.set_nonblocking(false).map_err(explain)?;
    Ok((socket.into(), server))
}

fn exchange(mut client: TcpStream, mut server: TcpStream, step: Step) -> Result<(), CaptureError> {
    let mut byte = [0];
    let mut both = || {
        server.set_read_timeout(Some(CONNECT_TIMEOUT))?;
        client.write_all(b"x")?;
        server.read_exact(&mut byte)
    };
    both().map_err(|error| CaptureError::explain(step, errno_of(&error)))
}
