//! Listening sockets: one per address, owned by the control side, kept while the address is
//! configured.
//!
//! Accepted connections go to the worker with the fewest live ones. A socket outlives changes of
//! its listener; it closes when no listener has its address.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine::RuntimeConfig;
use engine::chain::Listener;
use engine::config::Name;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::mpsc;

use crate::accept::Accepted;
use crate::worker::{Command, DrainScope, WorkerHandle};

/// Where an accepted connection goes.
#[derive(Clone, Debug)]
pub struct Workers(Arc<Vec<(mpsc::UnboundedSender<Command>, Arc<AtomicUsize>)>>, Arc<AtomicUsize>);

impl Workers {
    /// Those with these handles.
    pub fn new(handles: &[WorkerHandle]) -> Self {
        let workers = handles.iter().map(|handle| (handle.inbox.clone(), Arc::clone(&handle.live))).collect();
        Self(Arc::new(workers), Arc::default())
    }

    /// Connections handed over so far.
    pub fn accepted(&self) -> usize {
        self.1.load(Relaxed)
    }

    /// Connections handed over and not yet ended.
    pub fn live(&self) -> usize {
        self.0.iter().map(|(_, live)| live.load(Relaxed)).sum()
    }

    fn hand_over(&self, accepted: Accepted) {
        let Some((inbox, live)) = self.0.iter().min_by_key(|(_, live)| live.load(Relaxed)) else { return };
        live.fetch_add(1, Relaxed);
        self.1.fetch_add(1, Relaxed);
        if inbox.send(Command::Accept(Box::new(accepted))).is_err() {
            live.fetch_sub(1, Relaxed);
        }
    }
}

/// A socket and its accepting task.
struct Bound {
    /// Which listener its connections belong to.
    listener: Arc<Mutex<Name>>,
    address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What tells one socket from another.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Place {
    /// An address of the configuration; port 0 is a place of its own for each listener.
    Own(SocketAddr, Option<Name>),
    /// Inherited, by port.
    Inherited(u16),
}

/// All listening sockets of a proxy.
pub struct Listeners {
    workers: Workers,
    bound: BTreeMap<Place, Bound>,
    inherited: BTreeMap<u16, TcpListener>,
    backlog: i32,
    /// Listeners that were told to stop, for good.
    stopped: Option<DrainScope>,
}

impl Listeners {
    /// None yet; connections will go to `workers`. Sockets that were open before, by port, stand for
    /// the listeners of their port.
    pub fn new(workers: Workers, inherited: Vec<(u16, OwnedFd)>) -> Self {
        let adopt = |(port, fd): (u16, OwnedFd)| {
            let socket = Socket::from(fd);
            match socket.set_cloexec(true).and_then(|()| socket.set_nonblocking(true)) {
                Ok(()) => Some((port, TcpListener::from(socket))),
                Err(error) => {
                    tracing::warn!(%error, port, "an inherited socket is unusable");
                    None
                }
            }
        };
        Self {
            workers,
            bound: BTreeMap::new(),
            inherited: inherited.into_iter().filter_map(adopt).collect(),
            backlog: 4096,
            stopped: None,
        }
    }

    /// Opens what `config` has and is not open, closes what it no longer has. Says which listeners
    /// cannot listen.
    pub fn sync(&mut self, config: &RuntimeConfig) -> Vec<(Name, SocketAddr, io::Error)> {
        let mut failed = Vec::new();
        let mut wanted: BTreeMap<Place, (Name, SocketAddr, bool)> = BTreeMap::new();
        let may_listen = |listener: &Listener| {
            listener.bind_to_port && !self.stopped.is_some_and(|scope| scope.covers(listener.direction))
        };
        for (name, listener) in config.listeners.iter().filter(|(_, listener)| may_listen(listener)) {
            for address in std::iter::once(&listener.address).chain(&listener.additional_addresses) {
                let own = (address.port() == 0).then(|| Name::clone(name));
                wanted.entry(Place::Own(*address, own)).or_insert((Name::clone(name), *address, listener.transparent));
                if self.inherited.contains_key(&address.port()) {
                    wanted.entry(Place::Inherited(address.port())).or_insert((Name::clone(name), *address, false));
                }
            }
        }
        self.bound.retain(|place, _| wanted.contains_key(place));
        for (place, (name, address, transparent)) in wanted {
            if let Some(bound) = self.bound.get(&place) {
                *bound.listener.lock().unwrap_or_else(PoisonError::into_inner) = name;
                continue;
            }
            let socket = match &place {
                Place::Own(..) => listen(address, transparent, self.backlog),
                Place::Inherited(port) => match self.inherited.get(port) {
                    Some(listener) => listener.try_clone(),
                    None => continue,
                },
            };
            let stands_for = match place {
                Place::Own(..) => None,
                Place::Inherited(port) => Some(port),
            };
            match socket.and_then(|socket| self.accept_on(socket, &name, stands_for)) {
                Ok(bound) => {
                    self.bound.insert(place, bound);
                }
                Err(error) => failed.push((name, address, error)),
            }
        }
        failed
    }

    /// Names and addresses of what is open.
    pub fn addresses(&self) -> Vec<(String, SocketAddr)> {
        let name = |bound: &Bound| bound.listener.lock().unwrap_or_else(PoisonError::into_inner).to_string();
        self.bound.values().map(|bound| (name(bound), bound.address)).collect()
    }

    /// Closes the sockets of listeners in `scope`, and opens none of them any more.
    pub fn stop(&mut self, scope: DrainScope, config: &RuntimeConfig) {
        self.stopped = Some(scope);
        self.close(|name| config.listeners.get(name).is_none_or(|listener| scope.covers(listener.direction)));
    }

    /// Closes the sockets of listeners for which `which` holds: nothing new is taken there.
    pub fn close(&mut self, which: impl Fn(&str) -> bool) {
        self.bound.retain(|_, bound| !which(&bound.listener.lock().unwrap_or_else(PoisonError::into_inner)));
    }

    fn accept_on(&self, socket: TcpListener, name: &Name, stands_for: Option<u16>) -> io::Result<Bound> {
        let address = socket.local_addr()?;
        let socket = tokio::net::TcpListener::from_std(socket)?;
        let listener = Arc::new(Mutex::new(Name::clone(name)));
        let (belongs, workers) = (Arc::clone(&listener), self.workers.clone());
        let task = tokio::spawn(accept(socket, belongs, stands_for, workers));
        Ok(Bound { listener, address, task })
    }
}

/// Opens a socket.
fn listen(address: SocketAddr, transparent: bool, backlog: i32) -> io::Result<TcpListener> {
    let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if transparent {
        socket.set_ip_transparent_v4(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(backlog)?;
    Ok(socket.into())
}

/// After running out of descriptors: neither spinning nor ending (property 23).
const PAUSE: Duration = Duration::from_millis(20);

async fn accept(
    socket: tokio::net::TcpListener,
    listener: Arc<Mutex<Name>>,
    stands_for: Option<u16>,
    workers: Workers,
) {
    // said once, not fifty times a second
    let mut failing = false;
    loop {
        // the connection leaves this thread's runtime: its worker registers it anew
        let accepted = socket.accept().await.and_then(|(stream, peer)| Ok((stream.into_std()?, peer)));
        match accepted {
            Ok((stream, peer)) => {
                failing = false;
                let name = Name::clone(&listener.lock().unwrap_or_else(PoisonError::into_inner));
                workers.hand_over(Accepted { stream, listener: name, peer, stands_for });
            }
            // the client is gone already: the next one waits
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "cannot accept");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
