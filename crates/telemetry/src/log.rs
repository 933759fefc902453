//! Access-log lines on their way to a file.
//!
//! A worker fills a batch and hands it over when it is large or old; one thread writes. A writer
//! that is behind costs lines, never traffic ([`LineSink::write`] never blocks).

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;

/// Batches that may wait for the writer.
const BATCHES_MAX: usize = 256;

/// Where lines go. Cheap to clone; one for each file.
#[derive(Clone)]
pub struct LineSink {
    queue: SyncSender<Vec<u8>>,
    dropped: Arc<AtomicU64>,
}

impl LineSink {
    /// Opens `path` for appending (`/dev/stdout` and `/dev/stderr` included) and starts its writer.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file: Box<dyn Write + Send> = match path.to_str() {
            Some("/dev/stdout") => Box::new(io::stdout()),
            Some("/dev/stderr") => Box::new(io::stderr()),
            _ => Box::new(OpenOptions::new().append(true).create(true).open(path)?),
        };
        Ok(Self::to(file))
    }

    /// Starts a writer over anything.
    pub fn to(file: Box<dyn Write + Send>) -> Self {
        let (queue, batches) = sync_channel(BATCHES_MAX);
        thread::Builder::new()
            .name("access-log".into())
            .spawn(move || write_batches(file, &batches))
            .map_or_else(|error| tracing::error!(%error, "no thread for the access log"), drop);
        Self { queue, dropped: Arc::default() }
    }

    /// Hands a batch of whole lines over. Never waits: a full queue drops the batch and counts it.
    pub fn write(&self, batch: Vec<u8>) {
        if batch.is_empty() {
            return;
        }
        if let Err(TrySendError::Full(batch) | TrySendError::Disconnected(batch)) = self.queue.try_send(batch) {
            let lines: u64 = batch.iter().map(|byte| u64::from(*byte == b'\n')).sum();
            self.dropped.fetch_add(lines, Ordering::Relaxed);
        }
    }

    /// Lines dropped so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

fn write_batches(mut file: Box<dyn Write + Send>, batches: &Receiver<Vec<u8>>) {
    while let Ok(batch) = batches.recv() {
        if let Err(error) = file.write_all(&batch).and_then(|()| file.flush()) {
            tracing::warn!(%error, "the access log cannot be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Gate {
        open: Receiver<()>,
        out: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.open.recv().map_err(io::Error::other)?;
            self.out.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_writer_costs_lines_not_time() {
        let (open, opened) = mpsc::channel();
        let (out, lines) = mpsc::channel();
        let sink = LineSink::to(Box::new(Gate { open: opened, out }));
        let sent = BATCHES_MAX + 50;
        for _ in 0..sent {
            sink.write(b"line\n".to_vec());
        }
        let dropped = sink.dropped();
        assert!((49..=50).contains(&dropped), "{dropped}");
        for _ in 0..sent {
            open.send(()).unwrap();
        }
        for _ in 0..sent as u64 - dropped {
            assert_eq!(lines.recv().unwrap(), b"line\n");
        }
    }
}
