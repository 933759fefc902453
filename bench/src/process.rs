//! A program under measurement: how long it computed, how much memory is its own.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// Time on a processor, user and system, of each thread by its id, with its name.
///
/// *Source*: `/proc/PID/task/TID/schedstat`, in nanoseconds. Threads that ended are not counted;
/// neither proxy ends threads while it serves.
pub(crate) fn threads(pid: u32) -> Result<BTreeMap<u32, (String, Duration)>> {
    let mut all = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("threads of process {pid}"))? {
        let path = task?.path();
        let Some(tid) = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok()) else {
            continue;
        };
        // a thread may end between the listing and the reading
        let Ok(text) = fs::read_to_string(path.join("schedstat")) else { continue };
        let nanos = text.split(' ').next().and_then(|first| first.parse().ok()).context("schedstat")?;
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default().trim().to_owned();
        all.insert(tid, (name, Duration::from_nanos(nanos)));
    }
    Ok(all)
}

/// Time on a processor of all threads together.
pub(crate) fn cpu(pid: u32) -> Result<Duration> {
    Ok(threads(pid)?.values().map(|(_, time)| *time).sum())
}

/// Proportional set size in KiB: shared pages count by their share.
pub(crate) fn pss_kib(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).with_context(|| format!("memory of {pid}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("Pss in smaps_rollup")?;
    line.trim().trim_end_matches(" kB").trim().parse().context("Pss is a number")
}

/// `root` and everything it started, directly or not.
pub(crate) fn tree(root: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // the name in parentheses may hold anything
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut all = vec![root];
    let mut at = 0;
    while let Some(pid) = all.get(at).copied() {
        all.extend(children.get(&pid).into_iter().flatten());
        at += 1;
    }
    all
}
