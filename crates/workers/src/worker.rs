//! A worker: one thread, one runtime, everything a connection touches.
//!
//! ```text
//!  control ── Command ──► inbox ──► Worker (Rc) ──► connection tasks ──► stream tasks
//!                                      │ config: Rc<RuntimeConfig>, swapped whole
//!                                      │ pools, TLS contexts, metrics shard, log batch
//! ```

use std::cell::{Cell, RefCell};
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::chain::{Direction, FilterChain, Terminal};
use engine::exchange::Env;
use engine::{Now, RuntimeConfig};
use futures_util::FutureExt as _;
use telemetry::metrics::{Counter, Manager, Recorder};
use tokio::sync::{mpsc, oneshot};

use crate::accept::Accepted;
use crate::shared::Shared;
use crate::tls::Contexts;
use crate::upstream::Pools;

/// What the control side tells a worker.
pub(crate) enum Command {
    /// Serve this connection.
    Accept(Box<Accepted>),
    /// Run this configuration; say when.
    Config(Arc<RuntimeConfig>, oneshot::Sender<u64>),
    /// Connections of these directions leave; new ones are still taken.
    Drain(DrainScope),
    /// End now.
    Stop,
}

/// Which connections a drain concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainScope {
    /// Those of inbound listeners.
    Inbound,
    /// All.
    All,
}

impl DrainScope {
    /// Whether listeners of this direction are concerned.
    pub fn covers(self, direction: Direction) -> bool {
        self == Self::All || direction == Direction::Inbound
    }
}

/// The control side's end of a worker.
#[derive(Debug)]
pub struct WorkerHandle {
    pub(crate) inbox: mpsc::UnboundedSender<Command>,
    /// Connections handed over and not yet ended.
    pub(crate) live: Arc<AtomicUsize>,
    thread: std::thread::JoinHandle<()>,
}

impl WorkerHandle {
    /// Gives it the configuration to run; resolves to its generation once it does. An error: it has ended.
    pub fn configure(&self, config: Arc<RuntimeConfig>) -> oneshot::Receiver<u64> {
        let (done, waiting) = oneshot::channel();
        self.tell(Command::Config(config, done));
        waiting
    }

    /// Tells its connections in `scope` to leave; new ones are still taken.
    pub fn drain(&self, scope: DrainScope) {
        self.tell(Command::Drain(scope));
    }

    /// Tells it to end.
    pub fn stop(&self) {
        self.tell(Command::Stop);
    }

    /// Waits for its end. An error is its panic.
    pub fn join(self) -> std::thread::Result<()> {
        self.thread.join()
    }

    fn tell(&self, command: Command) {
        // a worker that has ended needs no telling
        drop(self.inbox.send(command));
    }
}

/// One worker's state. Never leaves its thread.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) engine: engine::worker::Worker,
    pub(crate) pools: Pools,
    pub(crate) tls: Contexts,
    pub(crate) recorder: Recorder,
    pub(crate) telemetry: crate::record::Telemetry,
    config: RefCell<Rc<RuntimeConfig>>,
    seed: Cell<u64>,
    conns: RefCell<Vec<Rc<ConnState>>>,
    draining: Cell<Option<DrainScope>>,
    live: Arc<AtomicUsize>,
    date: RefCell<(u64, String)>,
}

/// What outlives the stages of one downstream connection.
pub(crate) struct ConnState {
    pub(crate) direction: Direction,
    listener: Arc<str>,
    /// The newest version of its chain: the one that was chosen, or what stood in its place later.
    chain: RefCell<Arc<FilterChain>>,
    draining: Cell<bool>,
    /// All of the proxy's HTTP connections should end, for as long as this holds.
    is_leaving: Arc<AtomicBool>,
    /// The connection's task, when it waits for [`Self::drain`]. No other task does.
    waiting: Cell<Option<Waker>>,
    /// What is left after this is cut.
    pub(crate) drain_time: Duration,
    /// The proxy is a gateway: it reports as a source.
    pub(crate) is_gateway: bool,
    /// What its connection manager counts, if it has one.
    pub(crate) manager: Option<Arc<Manager>>,
}

impl ConnState {
    /// Whether the connection should end after what is in flight.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// Whether a connection of HTTP should be told to end the next time that something is said on it.
    pub(crate) fn is_told_to_leave(&self) -> bool {
        self.is_draining() || self.is_leaving.load(Relaxed)
    }

    pub(crate) fn drain(&self) {
        if !self.draining.replace(true)
            && let Some(waker) = self.waiting.take()
        {
            waker.wake();
        }
    }

    /// Ready once the connection drains. For its own task only: the last one that asked is woken. A
    /// connection that falls idle asks each time, so this takes no lock, and keeps the waker it has.
    pub(crate) fn poll_draining(&self, cx: &Context<'_>) -> Poll<()> {
        if self.is_draining() {
            return Poll::Ready(());
        }
        let waker = self.waiting.take().filter(|known| known.will_wake(cx.waker()));
        self.waiting.set(Some(waker.unwrap_or_else(|| cx.waker().clone())));
        Poll::Pending
    }

    /// The chain whose filters the next request meets. When the configuration has no such chain any
    /// more, the last one that stood in its place: never the older one the connection began with,
    /// which may lack a policy that came since.
    pub(crate) fn chain(&self, config: &RuntimeConfig) -> Arc<FilterChain> {
        config.current_chain(&self.listener, &self.chain.borrow())
    }

    /// Follows a new configuration. `false`: the chain does not stand any more, in the same TLS and
    /// of the same kind.
    fn follow(&self, config: &RuntimeConfig) -> bool {
        let before = Arc::clone(&self.chain.borrow());
        let Some(now) = config.listeners.get(&self.listener).and_then(|listener| listener.chain_by_key(before.key))
        else {
            return false;
        };
        self.chain.replace(Arc::clone(now));
        let same_tls = now.tls.as_ref().map(|tls| tls.fingerprint) == before.tls.as_ref().map(|tls| tls.fingerprint);
        let same_kind = matches!(
            (&now.terminal, &before.terminal),
            (Terminal::Http(_), Terminal::Http(_)) | (Terminal::Tcp(_), Terminal::Tcp(_))
        );
        same_tls && same_kind
    }
}

impl Worker {
    fn new(shared: Arc<Shared>, live: Arc<AtomicUsize>) -> Self {
        let recorder = shared.metrics.recorder();
        Self {
            engine: engine::worker::Worker::new(Arc::clone(&shared.hosts)),
            pools: Pools::default(),
            tls: Contexts::new(shared.secrets.clone()),
            telemetry: crate::record::Telemetry::new(&shared),
            recorder,
            config: RefCell::new(Rc::new(RuntimeConfig::default())),
            seed: Cell::new(first_seed()),
            conns: RefCell::default(),
            draining: Cell::new(None),
            live,
            date: RefCell::default(),
            shared,
        }
    }

    /// The newest configuration.
    pub(crate) fn config(&self) -> Rc<RuntimeConfig> {
        Rc::clone(&self.config.borrow())
    }

    /// Both clocks.
    #[expect(clippy::unused_self, reason = "the moment is asked of whoever acts")]
    pub(crate) fn now(&self) -> Now {
        Now { mono: tokio::time::Instant::now().into_std(), wall_nanos: wall_nanos() }
    }

    /// What a decision may read.
    pub(crate) fn env<'a>(&'a self, config: &'a Rc<RuntimeConfig>) -> Env<'a> {
        self.env_at(config, self.now())
    }

    /// The same for a moment that is known already.
    pub(crate) fn env_at<'a>(&'a self, config: &'a Rc<RuntimeConfig>, now: Now) -> Env<'a> {
        Env { config, worker: &self.engine, now }
    }

    /// A fresh seed for one request. Unpredictable from outside only as far as its start is.
    pub(crate) fn seed(&self) -> u64 {
        // SplitMix64
        let state = self.seed.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.seed.set(state);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number for a connection, unique in the proxy.
    pub(crate) fn next_connection_id(&self) -> u64 {
        self.shared.connection_ids.fetch_add(1, Relaxed)
    }

    /// The `date` header of this second.
    pub(crate) fn with_date<T>(&self, wall_seconds: u64, use_it: impl FnOnce(&str) -> T) -> T {
        let mut date = self.date.borrow_mut();
        if date.0 != wall_seconds || date.1.is_empty() {
            let stamp = i64::try_from(wall_seconds).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
            let text = stamp.map(|stamp| stamp.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string());
            *date = (wall_seconds, text.unwrap_or_default());
        }
        use_it(&date.1)
    }

    /// Runs a task of this worker; a panic in it is contained and counted.
    ///
    /// Combinators, not an `async` block: that would hold the task twice, as what it captured and as what it awaits.
    pub(crate) fn spawn(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) {
        let worker = Rc::clone(self);
        drop(tokio::task::spawn_local(AssertUnwindSafe(task).catch_unwind().map(move |ended| {
            if ended.is_err() {
                worker.recorder.count(Counter::Panics);
                tracing::error!("a connection's task panicked; only it is lost");
            }
        })));
    }

    /// Notes a connection that has chosen its chain, so that it drains with it.
    pub(crate) fn register(
        &self,
        listener: &Arc<str>,
        direction: Direction,
        chain: &Arc<FilterChain>,
    ) -> Rc<ConnState> {
        // The handshake may have outlived the configuration that chose the chain.
        let current = self.config.borrow().current_chain(listener, chain);
        let state = Rc::new(ConnState {
            direction,
            listener: Arc::clone(listener),
            chain: RefCell::new(current),
            draining: Cell::new(self.draining.get().is_some_and(|scope| scope.covers(direction))),
            is_leaving: Arc::clone(&self.shared.is_leaving),
            waiting: Cell::default(),
            drain_time: self.shared.drain_time,
            is_gateway: self.shared.is_gateway,
            manager: match &chain.terminal {
                Terminal::Http(hcm) => Some(self.recorder.manager(&hcm.stat_prefix)),
                Terminal::Tcp(_) => None,
            },
        });
        let mut conns = self.conns.borrow_mut();
        // those only this list still knows have ended
        if conns.len() == conns.capacity() {
            conns.retain(|conn| Rc::strong_count(conn) > 1);
        }
        conns.push(Rc::clone(&state));
        state
    }

    fn take_config(&self, config: &RuntimeConfig) {
        let config = Rc::new(config.clone());
        let mut conns = self.conns.borrow_mut();
        conns.retain(|conn| Rc::strong_count(conn) > 1);
        for conn in conns.iter().filter(|conn| !conn.follow(&config)) {
            conn.drain();
        }
        drop(conns);
        self.engine.reconcile(&config);
        self.config.replace(config);
    }

    fn drain(&self, scope: DrainScope) {
        self.draining.set(Some(scope));
        for conn in self.conns.borrow().iter().filter(|conn| scope.covers(conn.direction)) {
            conn.drain();
        }
    }
}

/// Nanoseconds since the Unix epoch.
pub fn wall_nanos() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn first_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// Starts a worker's thread.
pub fn start(index: usize, shared: Arc<Shared>) -> std::io::Result<WorkerHandle> {
    let (inbox, commands) = mpsc::unbounded_channel();
    let live = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&live);
    let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(tokio::runtime::LocalOptions::default());
        match runtime {
            Ok(runtime) => runtime.block_on(run(shared, counter, commands)),
            Err(error) => tracing::error!(%error, "a worker cannot start"),
        }
    })?;
    Ok(WorkerHandle { inbox, live, thread })
}

/// How often pools are swept, and logs written unless they shall wait longer.
const TICK: Duration = Duration::from_millis(500);
/// Logs are not written more often.
const TICK_MIN: Duration = Duration::from_millis(10);

async fn run(shared: Arc<Shared>, live: Arc<AtomicUsize>, mut commands: mpsc::UnboundedReceiver<Command>) {
    let flush_interval = shared.log_flush_interval;
    let worker = Rc::new(Worker::new(shared, live));
    let mut tick = tokio::time::interval(flush_interval.clamp(TICK_MIN, TICK));
    let mut flushed = tokio::time::Instant::now();
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        // commands first: a new configuration must not wait behind housekeeping
        tokio::select! {
            biased;
            command = commands.recv() => match command {
                Some(Command::Accept(accepted)) => {
                    let on = Rc::clone(&worker);
                    let live = Live(Arc::clone(&worker.live));
                    worker.spawn(async move {
                        crate::accept::serve(&on, *accepted).await;
                        drop(live);
                    });
                }
                Some(Command::Config(config, done)) => {
                    let generation = config.generation;
                    worker.take_config(&config);
                    // nobody listens when the control side has given up: nothing to tell then
                    if done.send(generation).is_err() {
                        tracing::trace!("nobody waits for the new generation");
                    }
                }
                Some(Command::Drain(scope)) => worker.drain(scope),
                Some(Command::Stop) | None => break,
            },
            _ = tick.tick() => {
                let now = tokio::time::Instant::now();
                worker.pools.sweep(&worker.config(), now);
                if now.duration_since(flushed) + TICK_MIN / 2 >= flush_interval {
                    flushed = now;
                    worker.telemetry.flush();
                }
            }
        }
    }
    worker.telemetry.flush();
}

/// One live connection, for the control side's choice.
struct Live(Arc<AtomicUsize>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
