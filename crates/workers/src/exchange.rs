//! One request from its head to the end of its response: performs the steps of the engine.
//!
//! ```text
//!   start ─► step ─┬─ Wait ──── sleep ───────────────┐
//!      ▲           ├─ Ask ───── ask ─────────────────┤
//!      │           ├─ Forward ─ lease, send, await ──┤ (retry)
//!      │           │               └─ Respond ─ relay ─► end
//!      │           ├─ Reply ─── answer ──────────────► end
//!      │           └─ Abort ─── cut ─────────────────► end
//!      └───────────────── resume ◄───────────────────┘
//! ```
//!
//! At every wait the client may go away, which cancels what is under way upstream (property 24).

pub(crate) mod ask;
mod mirror;

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use engine::exchange::{Answer, Attempt, Exchange, Failure, LocalReply, Question, Start, Step};
use engine::record::NoRecord;
use engine::{Now, RuntimeConfig};
use telemetry::metrics::Counter;
use tokio::time::Instant;
use types::{Cause, Fields, RequestHead, ResponseHead, Version};

use crate::accept::Conn;
use crate::alarm::Alarm;
use crate::codec::relay::{Download, Fault, Upload, Watch, poll_response};
use crate::codec::{Broken, Down, Frame};
use crate::record::{Ending, RequestLog};
use crate::upstream::{self, Running};
use crate::worker::Worker;
use mirror::Mirrors;

/// Serves one request whose head has been read. `alarm` is the task's timer.
pub(crate) async fn serve(
    worker: &Rc<Worker>,
    conn: &Rc<Conn>,
    down: Down<'_>,
    head: &mut RequestHead,
    alarm: &mut Alarm,
) {
    let config = worker.config();
    let chain = conn.state.chain(&config);
    // bytes for a tunnel wait until the upstream has agreed to it (property 6)
    let ended = head.asks_for_tunnel() || down.is_finished();
    let seed = worker.seed();
    if let Some(manager) = &conn.state.manager {
        manager.begun();
    }
    let start = Start { chain: &chain, conn: &conn.facts, ended, seed, recorder: &mut NoRecord };
    let received = worker.now();
    let (mut exchange, step) = Exchange::start(&worker.env_at(&config, received), start, head);
    worker.recorder.add(Counter::RbacAllowed, exchange.info().allowed.into());
    let log = RequestLog::start(received, &chain, head, exchange.info(), seed);
    if ended {
        exchange.request_complete(received.mono);
    }
    let mut driver = Driver {
        worker,
        conn,
        config,
        exchange,
        down,
        head,
        response: ResponseHead::default(),
        upload: Upload::new(ended),
        complete: ended,
        traffic: Traffic::default(),
        mirrors: Mirrors::default(),
        log,
        is_counted: false,
        moved: Instant::from_std(received.mono),
        alarm,
    };
    driver.run(step).await;
    driver.end();
}

/// What passes through, for metrics and mirrors.
#[derive(Default)]
struct Traffic {
    request_bytes: u64,
    request_messages: Messages,
    response_bytes: u64,
    response_messages: Messages,
    trailers: Option<Fields>,
    moved: bool,
}

impl Traffic {
    /// gRPC messages so far, there and back.
    fn messages(&self) -> (u64, u64) {
        (self.request_messages.count, self.response_messages.count)
    }
}

/// Counts gRPC messages in a body, however it is cut.
#[derive(Default)]
struct Messages {
    count: u64,
    header: [u8; 5],
    have: usize,
    left: u32,
}

impl Messages {
    fn take(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let skip = data.len().min(self.left as usize);
            self.left -= u32::try_from(skip).unwrap_or(self.left);
            data = &data[skip..];
            while self.left == 0 && !data.is_empty() && self.have < 5 {
                self.header[self.have] = data[0];
                self.have += 1;
                data = &data[1..];
            }
            if self.have == 5 {
                self.have = 0;
                self.count += 1;
                self.left = u32::from_be_bytes([self.header[1], self.header[2], self.header[3], self.header[4]]);
            }
        }
    }
}

/// The request's frames as they pass.
struct Requests<'a> {
    traffic: &'a mut Traffic,
    mirrors: &'a mut Mirrors,
    grpc: bool,
    exchange: &'a Exchange,
    head: &'a RequestHead,
    worker: &'a Worker,
}

impl Watch for Requests<'_> {
    fn frame(&mut self, frame: &mut Frame) {
        self.traffic.moved = true;
        match frame {
            Frame::Data(data) => {
                self.traffic.request_bytes += data.len() as u64;
                if self.grpc {
                    self.traffic.request_messages.take(data);
                }
            }
            Frame::Trailers(trailers) => self.exchange.edit_request_trailers(trailers, self.head, self.worker.now()),
        }
        self.mirrors.frame(frame);
    }
}

/// The response's frames as they pass.
struct Responses<'a> {
    traffic: &'a mut Traffic,
    grpc: bool,
    exchange: &'a Exchange,
    heads: (&'a RequestHead, &'a ResponseHead),
    worker: &'a Worker,
}

impl Watch for Responses<'_> {
    fn frame(&mut self, frame: &mut Frame) {
        self.traffic.moved = true;
        match frame {
            Frame::Data(data) => {
                self.traffic.response_bytes += data.len() as u64;
                if self.grpc {
                    self.traffic.response_messages.take(data);
                }
            }
            Frame::Trailers(trailers) => {
                self.exchange.edit_response_trailers(trailers, self.heads, self.worker.now());
                self.traffic.trailers = Some(trailers.clone());
            }
        }
    }
}

/// Watches the request's frames, with parts of the driver that nothing else uses meanwhile.
macro_rules! watching {
    ($driver:ident, $grpc:expr) => {
        Requests {
            traffic: &mut $driver.traffic,
            mirrors: &mut $driver.mirrors,
            grpc: $grpc,
            exchange: &$driver.exchange,
            head: $driver.head,
            worker: $driver.worker,
        }
    };
}

/// What ends a wait before what was waited for.
enum Interrupt {
    /// The exchange's deadline.
    Elapsed,
    /// Nothing moved for too long.
    Idle,
    /// The client went away.
    Gone,
    /// The client broke the protocol within its body.
    Garbled(Cause),
}

/// What awaiting a response head came to.
enum Awaited {
    Head { ended: bool },
    Failed(Failure),
    Interrupted(Interrupt),
}

struct Driver<'d, 'c> {
    worker: &'d Rc<Worker>,
    conn: &'d Rc<Conn>,
    config: Rc<RuntimeConfig>,
    exchange: Exchange,
    down: Down<'c>,
    head: &'d mut RequestHead,
    response: ResponseHead,
    upload: Upload,
    /// The exchange has been told that the request is complete.
    complete: bool,
    traffic: Traffic,
    mirrors: Mirrors,
    log: RequestLog,
    /// The cluster has counted our answer in its place.
    is_counted: bool,
    moved: Instant,
    alarm: &'d mut Alarm,
}

impl Driver<'_, '_> {
    async fn run(&mut self, mut step: Step) {
        loop {
            step = match step {
                Step::Wait(time) => match self.wait(time).await {
                    Ok(()) => self.resume(Answer::Elapsed),
                    Err(interrupt) => match self.interrupted(interrupt) {
                        Some(step) => step,
                        None => return,
                    },
                },
                // rare, large and about to wait: on the heap
                Step::Ask(question) => match Box::pin(self.ask(question)).await {
                    Ok(step) => step,
                    Err(interrupt) => match self.interrupted(interrupt) {
                        Some(step) => step,
                        None => return,
                    },
                },
                Step::Forward(attempt) => match self.forward(attempt).await {
                    Some(step) => step,
                    None => return,
                },
                Step::Reply(reply) => return self.reply(*reply).await,
                Step::Respond => {
                    debug_assert!(false, "a response is answered where it arrived");
                    return self.abort(Cause::Internal);
                }
                Step::Abort(cause) => return self.abort(cause),
            };
        }
    }

    fn resume(&mut self, answer: Answer<'_>) -> Step {
        self.resume_at(self.worker.now(), answer)
    }

    fn resume_at(&mut self, now: Now, answer: Answer<'_>) -> Step {
        self.config = self.worker.config();
        let env = self.worker.env_at(&self.config, now);
        let before = self.exchange.info().allowed;
        let step = self.exchange.resume(&env, answer, self.head, &mut NoRecord);
        let allowed = self.exchange.info().allowed.saturating_sub(before);
        self.worker.recorder.add(Counter::RbacAllowed, allowed.into());
        step
    }

    /// Waits while nothing is under way upstream.
    async fn wait(&mut self, time: Duration) -> Result<(), Interrupt> {
        let down = &mut self.down;
        // a client that left needs no answer any more
        tokio::select! {
            biased;
            () = poll_fn(|cx| down.poll_gone(cx)) => Err(Interrupt::Gone),
            () = tokio::time::sleep(time) => Ok(()),
        }
    }

    async fn ask(&mut self, question: Question) -> Result<Step, Interrupt> {
        match question {
            Question::Authorize(question) => {
                let answer = {
                    let (worker, conn) = (self.worker, self.conn);
                    let down = &mut self.down;
                    // the client first: nobody wants the verdict when it is gone
                    tokio::select! {
                        biased;
                        () = poll_fn(|cx| down.poll_gone(cx)) => return Err(Interrupt::Gone),
                        answer = ask::authorize(worker, conn, *question) => answer,
                    }
                };
                Ok(self.resume(Answer::Authorized(answer)))
            }
            Question::Body(wanted) => {
                // One byte more tells whether the body is longer.
                let max = wanted.bytes_max as usize;
                self.buffer(max + 1).await?;
                let mut bytes = self.upload.kept();
                let complete = self.upload.is_source_done() && bytes.len() <= max;
                bytes.truncate(max);
                Ok(self.resume(Answer::Body { bytes, complete }))
            }
            Question::Resolve { host } => {
                let answer = ask::resolve(self.worker, &host).await;
                Ok(self.resume(Answer::Resolved(answer)))
            }
        }
    }

    /// Pulls up to `max` bytes of the body before anything is sent.
    async fn buffer(&mut self, max: usize) -> Result<(), Interrupt> {
        self.moved = Instant::now();
        poll_fn(|cx| {
            let mut watch = watching!(self, false);
            let polled = self.upload.poll_buffer(cx, &mut self.down, max, &mut watch);
            self.note_progress();
            match polled {
                Poll::Ready(Ok(())) => Poll::Ready(Ok(())),
                Poll::Ready(Err(Fault::Down(broken))) => Poll::Ready(Err(client_broke(broken))),
                Poll::Ready(Err(Fault::Up(_))) => Poll::Ready(Err(Interrupt::Gone)),
                Poll::Pending => self.poll_timers(cx).map(Err),
            }
        })
        .await
    }

    /// One attempt. `None`: the request has ended.
    async fn forward(&mut self, mut attempt: Box<Attempt>) -> Option<Step> {
        let step = self.forward_once(&mut attempt).await;
        // what ends here is answered in the upstream's place
        if let Some(Step::Reply(reply)) = &step {
            self.is_counted = true;
            attempt.shared.tallies.answered(reply.head.status);
            if reply.cause == Cause::RequestTimeout {
                attempt.shared.tallies.timeouts.count();
            }
        }
        step
    }

    async fn forward_once(&mut self, attempt: &mut Attempt) -> Option<Step> {
        if attempt.number > 1 {
            attempt.shared.tallies.retries.count();
            self.upload.rewind();
        } else {
            self.upload.keep(attempt.replay_bytes_max as usize);
            let mirrors = std::mem::take(&mut attempt.mirrors);
            self.mirrors.start(self.worker, self.conn, mirrors, &self.upload);
        }
        let leased = match self.lease(attempt).await {
            Ok(Ok(leased)) => leased,
            Ok(Err(failure)) => return Some(self.failed(failure)),
            Err(interrupt) => return self.interrupted(interrupt),
        };
        if attempt.upgrade && self.head.protocol().is_some() && !leased.takes_upgrades() {
            return Some(self.failed(Failure::unsent(Cause::LocalReset)));
        }
        let endpoints = leased.endpoints.clone();
        self.moved = Instant::now();
        attempt.shared.tallies.requests.count();
        let version = if leased.is_http2() { Version::Http2 } else { Version::Http11 };
        self.log.sent(&endpoints, version, self.moved.into_std());
        let mut running = match leased.start(self.head, self.upload.ended) {
            Ok(running) => running,
            // a host that HTTP/2 cannot carry is the client's doing
            Err(Broken::Unwritable) => return self.interrupted(Interrupt::Garbled(Cause::BadRequest)),
            Err(broken) => return Some(self.failed(failure_of(broken, false))),
        };
        match self.await_head(&mut running).await {
            Awaited::Head { ended } => {
                let now = self.worker.now();
                self.moved = Instant::from_std(now.mono);
                self.log.head_arrived(now.mono);
                let mut head = std::mem::take(&mut self.response);
                let status = head.status;
                let step = self.resume_at(now, Answer::Upstream { head: &mut head, ended });
                self.response = head;
                if !matches!(step, Step::Respond) {
                    // an answer that is here whole leaves its connection to the next request
                    if ended && self.upload.ended {
                        running.finish();
                    } else {
                        running.cancel();
                    }
                    return Some(step);
                }
                attempt.shared.tallies.answered(status);
                self.respond(running, attempt, ended).await;
                None
            }
            Awaited::Failed(failure) => {
                running.cancel();
                Some(self.failed(failure))
            }
            Awaited::Interrupted(interrupt) => {
                running.cancel();
                self.interrupted(interrupt)
            }
        }
    }

    fn failed(&mut self, failure: Failure) -> Step {
        self.resume(Answer::Failed(failure))
    }

    /// Turns an interruption into the next step, or into the end.
    fn interrupted(&mut self, interrupt: Interrupt) -> Option<Step> {
        match interrupt {
            Interrupt::Elapsed => Some(self.resume(Answer::Elapsed)),
            Interrupt::Idle => Some(self.resume(Answer::Idle)),
            Interrupt::Garbled(cause) if !self.down.head_sent() => {
                self.worker.recorder.count(Counter::DownstreamProtocolErrors);
                let env = self.worker.env(&self.config);
                Some(self.exchange.refuse(&env, cause, self.head, &mut NoRecord))
            }
            other => {
                self.give_up(&other);
                None
            }
        }
    }

    async fn lease(&mut self, attempt: &Attempt) -> Result<Result<upstream::Leased, Failure>, Interrupt> {
        let deadline = self.exchange.deadline().map(Instant::from_std);
        let leasing = upstream::lease(self.worker, attempt, &self.conn.facts);
        let down = &mut self.down;
        // a connection that is there wins over everything; it is the usual case and costs no timer
        tokio::select! {
            biased;
            leased = leasing => Ok(leased),
            () = poll_fn(|cx| down.poll_gone(cx)) => Err(Interrupt::Gone),
            () = until(deadline) => Err(Interrupt::Elapsed),
        }
    }

    /// Sends the request and waits for a response head; interim heads pass through.
    async fn await_head(&mut self, running: &mut Running) -> Awaited {
        let mut sent = false;
        let mut stopped = false;
        let mut interim = 0;
        let grpc = self.exchange.info().is_grpc;
        poll_fn(|cx| {
            loop {
                if !stopped {
                    let mut watch = watching!(self, grpc);
                    match self.upload.poll(cx, &mut self.down, &mut running.up, &mut watch) {
                        Poll::Ready(Ok(())) => {
                            sent = true;
                            stopped = true;
                        }
                        Poll::Ready(Err(Fault::Down(broken))) => {
                            return Poll::Ready(Awaited::Interrupted(client_broke(broken)));
                        }
                        // the upstream may have answered before it stopped reading: its answer counts
                        Poll::Ready(Err(Fault::Up(_))) => stopped = true,
                        Poll::Pending => sent = true,
                    }
                    self.note_progress();
                }
                match running.up.poll_head(cx, &mut self.response) {
                    Poll::Ready(Ok(true)) => {
                        interim += 1;
                        if interim > INTERIM_MAX {
                            return Poll::Ready(Awaited::Failed(failure_of(Broken::Protocol, sent)));
                        }
                        self.moved = Instant::now();
                        if self.response.status == 100 && self.down.send_interim(&self.response).is_err() {
                            return Poll::Ready(Awaited::Interrupted(Interrupt::Gone));
                        }
                        if let Poll::Ready(Err(_)) = self.down.poll_flush(cx) {
                            return Poll::Ready(Awaited::Interrupted(Interrupt::Gone));
                        }
                        continue;
                    }
                    Poll::Ready(Ok(false)) => {
                        return Poll::Ready(Awaited::Head { ended: running.up.is_finished() });
                    }
                    Poll::Ready(Err(broken)) => return Poll::Ready(Awaited::Failed(failure_of(broken, sent))),
                    Poll::Pending => {}
                }
                if stopped && self.down.poll_gone(cx).is_ready() {
                    return Poll::Ready(Awaited::Interrupted(Interrupt::Gone));
                }
                return self.poll_timers(cx).map(Awaited::Interrupted);
            }
        })
        .await
    }

    /// The request's completeness, retry buffer and idle clock, after frames may have moved.
    fn note_progress(&mut self) {
        if std::mem::take(&mut self.traffic.moved) {
            self.moved = Instant::now();
            if !self.upload.is_replayable() {
                self.exchange.set_replayable(false);
            }
            let info = self.exchange.info();
            if info.is_grpc {
                self.log.messages(self.worker, self.conn, self.head, info, self.traffic.messages());
            }
        }
        if !self.complete && self.upload.is_source_done() {
            self.complete = true;
            self.mirrors.end();
            self.exchange.request_complete(self.worker.now().mono);
        }
    }

    /// Ready when the exchange's deadline or the idle time has passed.
    fn poll_timers(&mut self, cx: &mut Context<'_>) -> Poll<Interrupt> {
        let deadline = self.exchange.deadline().map(Instant::from_std);
        let idle = self.exchange.idle_timeout().map(|idle| self.moved + idle);
        let Some(next) = deadline.into_iter().chain(idle).min() else { return Poll::Pending };
        std::task::ready!(self.alarm.poll(cx, next));
        Poll::Ready(if deadline == Some(next) { Interrupt::Elapsed } else { Interrupt::Idle })
    }

    /// Writes the edited head and relays the body; the request goes on meanwhile.
    async fn respond(&mut self, mut running: Running, attempt: &Attempt, ended: bool) {
        let status = self.response.status;
        let agreed = status == 101 || (self.head.method() == "CONNECT" && (200..300).contains(&status));
        let tunnel = attempt.upgrade && agreed;
        if self.conn.is_draining() {
            self.down.close_after();
        }
        self.set_date();
        self.log.responding(&self.response);
        if let Err(broken) = self.down.send_head(&self.response, ended && !tunnel) {
            running.cancel();
            let cause = if broken == Broken::Unwritable { Cause::UpstreamProtocolError } else { Cause::DownstreamGone };
            return self.abort(cause);
        }
        let mut download = Download::new(ended && !tunnel);
        if tunnel {
            self.upload = Upload::new(false);
        }
        match self.relay(&mut running, &mut download, tunnel).await {
            Ok(()) => {
                self.exchange.response_ended();
                self.log.ended(Ending::Complete);
                if !self.upload.ended {
                    // the answer is complete, the request is not: what follows it is not read
                    self.down.stop_reading();
                    running.cancel();
                } else {
                    running.finish();
                }
            }
            Err(cause) => {
                running.cancel();
                self.abort(cause);
            }
        }
    }

    async fn relay(&mut self, running: &mut Running, download: &mut Download, tunnel: bool) -> Result<(), Cause> {
        let grpc = self.exchange.info().is_grpc;
        let mut uploading = !self.upload.ended;
        poll_fn(|cx| {
            if uploading {
                let mut watch = watching!(self, grpc && !tunnel);
                match self.upload.poll(cx, &mut self.down, &mut running.up, &mut watch) {
                    Poll::Ready(Ok(())) => uploading = false,
                    Poll::Ready(Err(Fault::Down(broken))) => {
                        return Poll::Ready(Err(match client_broke(broken) {
                            Interrupt::Garbled(cause) => cause,
                            _ => gone(self.conn, &self.down),
                        }));
                    }
                    Poll::Ready(Err(Fault::Up(_))) => uploading = false,
                    Poll::Pending => {}
                }
            }
            let mut watch = Responses {
                traffic: &mut self.traffic,
                grpc: grpc && !tunnel,
                exchange: &self.exchange,
                heads: (&*self.head, &self.response),
                worker: self.worker,
            };
            let polled = poll_response(cx, download, &mut self.down, &mut running.up, &mut watch);
            self.note_progress();
            match polled {
                // a tunnel lives until both directions have ended
                Poll::Ready(Ok(())) if tunnel && uploading => {}
                Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
                Poll::Ready(Err(Fault::Down(_))) => return Poll::Ready(Err(gone(self.conn, &self.down))),
                Poll::Ready(Err(Fault::Up(broken))) => return Poll::Ready(Err(mid_response(broken))),
                Poll::Pending => {}
            }
            if !uploading && !tunnel && self.down.poll_gone(cx).is_ready() {
                return Poll::Ready(Err(gone(self.conn, &self.down)));
            }
            match self.poll_timers(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(interrupt) => {
                    let answer = if matches!(interrupt, Interrupt::Idle) { Answer::Idle } else { Answer::Elapsed };
                    match self.resume(answer) {
                        Step::Abort(cause) => Poll::Ready(Err(cause)),
                        _ => Poll::Ready(Err(Cause::StreamIdleTimeout)),
                    }
                }
            }
        })
        .await
    }

    fn set_date(&mut self) {
        if !self.response.fields.contains("date") {
            let fields = &mut self.response.fields;
            self.worker.with_date(self.worker.now().wall_seconds(), |date| fields.push("date", date.as_bytes()));
        }
    }

    /// Answers by ourselves.
    async fn reply(&mut self, reply: LocalReply) {
        match reply.cause {
            Cause::RbacDenied => self.worker.recorder.count(Counter::RbacDenied),
            cause if cause.surface().details == "jwt_authn_access_denied" => {
                self.worker.recorder.count(Counter::JwtDenied);
            }
            // there was nobody to attempt it with
            Cause::NoHealthyUpstream if !self.is_counted => {
                if let Some(cluster) = &self.exchange.info().cluster {
                    self.worker.engine.counters(&cluster.name).tallies.answered(reply.head.status);
                }
            }
            _ => {}
        }
        self.response = reply.head;
        self.set_date();
        if reply.close || self.conn.is_draining() || !self.down.is_finished() {
            self.down.close_after();
        }
        self.log.responding(&self.response);
        let size = reply.body.len() as u64;
        let written = self.down.send_head(&self.response, reply.body.is_empty()).and_then(|()| {
            if reply.body.is_empty() {
                return Ok(());
            }
            self.down.send_data(reply.body)?;
            self.down.send_end(None)
        });
        let down = &mut self.down;
        let flushed = match written {
            Ok(()) => {
                tokio::time::timeout(REPLY_MAX, poll_fn(|cx| down.poll_flush(cx))).await.unwrap_or(Err(Broken::Closed))
            }
            Err(broken) => Err(broken),
        };
        match flushed {
            Ok(()) => {
                self.traffic.response_bytes += size;
                self.log.ended(Ending::Complete);
                if !self.down.is_finished() {
                    self.down.stop_reading();
                }
            }
            Err(_) => self.give_up(&Interrupt::Gone),
        }
    }

    /// The response cannot be finished: the client must see that (property 2).
    fn abort(&mut self, cause: Cause) {
        let env = self.worker.env(&self.config);
        self.exchange.broke(&env, cause);
        self.log.ended(Ending::Broken);
        let reason = match cause {
            Cause::DownstreamGone | Cause::DownstreamReset => h2::Reason::CANCEL,
            Cause::BadRequest | Cause::BadStream => h2::Reason::PROTOCOL_ERROR,
            _ => h2::Reason::INTERNAL_ERROR,
        };
        self.down.abort(reason);
    }

    fn give_up(&mut self, interrupt: &Interrupt) {
        let cause = match *interrupt {
            Interrupt::Gone => gone(self.conn, &self.down),
            Interrupt::Garbled(cause) => {
                self.worker.recorder.count(Counter::DownstreamProtocolErrors);
                cause
            }
            Interrupt::Elapsed | Interrupt::Idle => Cause::StreamIdleTimeout,
        };
        self.abort(cause);
    }

    /// Records the request, once, on every way out.
    fn end(self) {
        let grpc = self.traffic.trailers.as_ref().and_then(|trailers| trailers.get_str("grpc-status"));
        let counts = crate::record::Counts {
            request_bytes: self.traffic.request_bytes,
            response_bytes: self.traffic.response_bytes,
            request_messages: self.traffic.request_messages.count,
            response_messages: self.traffic.response_messages.count,
            grpc_status: grpc
                .or_else(|| self.response.fields.get_str("grpc-status"))
                .and_then(|code| code.parse().ok()),
        };
        let trailers = self.traffic.trailers.as_ref();
        self.log.write(self.worker, self.conn, self.head, &self.response, trailers, self.exchange.info(), &counts);
    }
}

/// Interim heads an upstream may send before its answer.
const INTERIM_MAX: u32 = 16;

/// How long a client may take to read an answer of ours.
const REPLY_MAX: Duration = Duration::from_mins(1);

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn gone(conn: &Conn, down: &Down<'_>) -> Cause {
    if let Some(cause) = conn.broken.get() {
        return cause;
    }
    match down {
        Down::H2(stream) if stream.is_cancelled() => Cause::DownstreamReset,
        _ => Cause::DownstreamGone,
    }
}

/// A client that failed within its request.
fn client_broke(broken: Broken) -> Interrupt {
    match broken {
        Broken::Message(error) => Interrupt::Garbled(error.cause()),
        Broken::Protocol => Interrupt::Garbled(Cause::BadStream),
        _ => Interrupt::Gone,
    }
}

/// An upstream that failed before its response head.
fn failure_of(broken: Broken, request_sent: bool) -> Failure {
    let cause = match broken {
        Broken::Closed => Cause::UpstreamClosed,
        Broken::Reset => Cause::UpstreamReset,
        Broken::Refused => Cause::UpstreamRefusedStream,
        Broken::Protocol | Broken::Message(_) => Cause::UpstreamProtocolError,
        Broken::Unwritable => Cause::LocalReset,
    };
    Failure { cause, detail: "".into(), request_sent }
}

/// An upstream that failed within its response.
fn mid_response(broken: Broken) -> Cause {
    match broken {
        Broken::Closed => Cause::UpstreamClosedMidResponse,
        _ => Cause::UpstreamResetMidResponse,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let mut body = Vec::new();
        for size in [0_u8, 3, 200] {
            body.extend([0, 0, 0, 0, size]);
            body.extend(vec![7; size.into()]);
        }
        for piece in 1..body.len() {
            let mut messages = Messages::default();
            for chunk in body.chunks(piece) {
                messages.take(chunk);
            }
            assert_eq!(messages.count, 3, "pieces of {piece}");
        }
    }
}
