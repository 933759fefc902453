//! What runs under callgrind: a known number of requests and nothing else, each allocation counted.

use std::alloc::{GlobalAlloc, Layout};
use std::hint::black_box;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use engine::access_log::LogRecord;
use engine::assembly::Assembly;
use engine::chain::Terminal;
use engine::config::NodeFacts;
use engine::exchange::{Answer, Env, Exchange, Start, Step};
use engine::facts::{ConnFacts, Now};
use engine::record::NoRecord;
use engine::shared::SharedTable;
use engine::worker::Worker;
use mimalloc::MiMalloc;
use types::{RequestHead, ResponseHead};

/// The product's allocator, counting.
pub(crate) struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed on as it is to an allocator that keeps the contract.
#[expect(unsafe_code, reason = "an allocator that counts has to be one")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.dealloc(at, layout) }
    }
}

/// What [`report`] writes before the number.
pub(crate) const ALLOCATIONS_ARE: &str = "allocations: ";

fn report() {
    println!("{ALLOCATIONS_ARE}{}", ALLOCATIONS.load(Relaxed));
}

/// A proxy in this process, until its admin interface ends it.
pub(crate) fn proxy(file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let flags = proxy::bootstrap::Flags { concurrency: Some(1), ..proxy::bootstrap::Flags::default() };
    let mut options = proxy::bootstrap::options(&text, &flags)?;
    options.termination.drain = Duration::ZERO;
    proxy::run(options)?;
    report();
    Ok(())
}

/// `requests` requests through the engine alone, from a decoded head to the line of the access log.
pub(crate) fn exchange(file: &Path, requests: u64) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let resources = proxy::bootstrap::options(&text, &proxy::bootstrap::Flags::default())?.resources;
    let mut assembly = Assembly::new(NodeFacts::default());
    let mut refused = assembly.apply_clusters(&resources.clusters, &[]);
    refused.extend(assembly.apply_listeners(&resources.listeners, &[]));
    ensure!(refused.is_empty(), "refused: {refused:?}");
    let config = Rc::new(assembly.publish());
    let listener = config.listeners.iter().next().context("a listener")?.1;
    let chain = Arc::clone(listener.all_chains().next().context("a chain")?);
    let Terminal::Http(hcm) = &chain.terminal else { bail!("a chain of HTTP") };
    let mono = Instant::now();
    let now = Now { mono, wall_nanos: 1_700_000_000_000_000_000 };
    let worker = Worker::new(Arc::new(SharedTable::new(mono)));
    let conn = Arc::new(ConnFacts::plaintext("gateway", listener.address, "192.0.2.7:1234".parse()?));
    let env = Env { config: &config, worker: &worker, now };
    let (mut head, mut response, mut line) = (RequestHead::default(), ResponseHead::default(), Vec::new());
    for seed in 0..requests {
        fill(&mut head, &mut response);
        let start = Start { chain: &chain, conn: &conn, ended: true, seed, recorder: &mut NoRecord };
        let (mut exchange, step) = Exchange::start(&env, start, &mut head);
        exchange.request_complete(mono);
        let Step::Forward(attempt) = step else { bail!("not forwarded: {step:?}") };
        let answer = Answer::Upstream { head: &mut response, ended: false };
        let step = exchange.resume(&env, answer, &mut head, &mut NoRecord);
        ensure!(matches!(step, Step::Respond), "no response: {step:?}");
        exchange.response_ended();
        line.clear();
        let record = LogRecord {
            conn: &conn,
            chain: &chain.name,
            request: Some(&head),
            response: Some(&response),
            trailers: None,
            info: exchange.info(),
            start_nanos: now.wall_nanos,
            duration: Duration::from_millis(3),
            request_duration: None,
            response_duration: None,
            bytes_received: 0,
            bytes_sent: 1024,
            upstream_local: None,
            upstream_protocol: None,
            connection_id: 1,
            downstream_failure: "",
        };
        for log in &hcm.access_log {
            log.write(&record, &mut line);
        }
        drop(attempt);
        black_box(&line);
    }
    report();
    Ok(())
}

/// The heads of the load, as the codec leaves them.
fn fill(head: &mut RequestHead, response: &mut ResponseHead) {
    head.clear();
    head.set_method("GET");
    head.set_authority(b"reviews.bench.test");
    head.set_path(b"/api/v1/reviews/42?page=1");
    for (name, value) in [
        ("user-agent", "bench/1.0"),
        ("accept", "application/json"),
        ("accept-language", "en"),
        ("cookie", "session=0123456789abcdef"),
    ] {
        head.fields.push(name, value.as_bytes());
    }
    response.status = 200;
    response.fields.clear();
    for (name, value) in [("content-type", "application/octet-stream"), ("server", "bench"), ("content-length", "1024")]
    {
        response.fields.push(name, value.as_bytes());
    }
}
