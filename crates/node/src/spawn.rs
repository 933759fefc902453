//! The last steps of a new process before it becomes the container's program.
//!
//! Everything here runs between fork and exec in a copy of the multi-threaded manager, so it may
//! only make system calls: no allocation, no lock.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::spec::Rights;

/// How a program enters its container.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Entry {
    /// It is the first of a new pid namespace: below a small init that reaps and passes signals on.
    First {
        /// Mount a `/proc` of the new pid namespace.
        own_proc: bool,
    },
    /// It joins a container that runs.
    Joins,
    /// It joins from a terminal: session and process group stay the caller's.
    FromTerminal,
}

/// The capabilities a container's processes hold.
pub(crate) fn capabilities(rights: Rights, low_ports_by_sysctl: bool) -> CapabilitySet {
    match rights {
        Rights::App if low_ports_by_sysctl => CapabilitySet::empty(),
        Rights::App => CapabilitySet::NET_BIND_SERVICE,
        Rights::Proxy => CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW | CapabilitySet::NET_BIND_SERVICE,
    }
}

/// Adds the steps to a command. `inherit` are descriptors that stay open, by number.
#[expect(unsafe_code, reason = "a pre-exec hook is the only place between fork and exec")]
pub(crate) fn prepare(command: &mut Command, entry: Entry, keep: CapabilitySet, inherit: Vec<RawFd>) {
    let hook = move || {
        if entry != Entry::FromTerminal {
            // Fails only for a session leader, which is as good.
            crate::tolerate(rustix::process::setsid());
        }
        if let Entry::First { own_proc } = entry {
            // Without an own one the manager's /proc stays: foreign pids show, nothing else breaks.
            if own_proc {
                crate::tolerate(mount_proc());
            }
            become_child_of_init()?;
        } else {
            // `lateen exec` that is killed takes its program along.
            crate::starter::die_with_parent();
        }
        for &fd in &inherit {
            keep_open(fd)?;
        }
        keep_only(keep)?;
        Ok(())
    };
    // SAFETY: the hook makes system calls only; the vectors it reads were filled before the fork.
    unsafe {
        command.pre_exec(hook);
    }
}

/// A `/proc` of the calling process's pid namespace.
pub(crate) fn mount_proc() -> Result<(), rustix::io::Errno> {
    use rustix::mount::MountFlags;
    rustix::mount::mount("proc", "/proc", "proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)
}

#[expect(unsafe_code, reason = "descriptors are known by number after a fork")]
fn keep_open(fd: RawFd) -> io::Result<()> {
    // SAFETY: the manager holds the descriptor open across the fork.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?)
}

/// Gives up every capability but these, for good, whatever the uid; keeps these across exec.
fn keep_only(keep: CapabilitySet) -> io::Result<()> {
    use rustix::thread::{
        clear_ambient_capability_set, configure_capability_in_ambient_set, remove_capability_from_bounding_set,
        set_capabilities,
    };
    clear_ambient_capability_set()?;
    let one = |bit: u32| CapabilitySet::from_bits_retain(1 << bit);
    for bit in 0..64 {
        if !keep.contains(one(bit)) {
            match remove_capability_from_bounding_set(one(bit)) {
                // Beyond the kernel's last capability; or no right to drop, then uid 0 is not ours.
                Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    set_capabilities(None, CapabilitySets { effective: keep, permitted: keep, inheritable: keep })?;
    for bit in 0..64 {
        if keep.contains(one(bit)) {
            configure_capability_in_ambient_set(one(bit), true)?;
        }
    }
    Ok(())
}

/// Forks: the parent stays as the pid namespace's init and never returns, the child goes on.
///
/// A first process without handlers would ignore SIGTERM, and orphans would pile up. The init costs
/// no exec and shares the manager's memory.
#[expect(unsafe_code, reason = "fork, and the signal calls around it, have no safe form")]
fn become_child_of_init() -> io::Result<()> {
    // SAFETY: plain system calls on local memory; the process is single-threaded after the first
    // fork, and init() does nothing but system calls.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        // Before the fork: a blocked signal waits, an unblocked one is lost on a first process.
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
        match libc::fork() {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                libc::sigprocmask(libc::SIG_UNBLOCK, &raw const all, std::ptr::null_mut());
                // Its own process group and session, as a container's main program has.
                libc::setsid();
                Ok(())
            }
            child => init(child, &all),
        }
    }
}

/// First process of a container: reaps everybody, passes signals to the program, ends with it.
#[expect(unsafe_code, reason = "waiting for signals has no safe form")]
fn init(child: libc::pid_t, all: &libc::sigset_t) -> ! {
    const NAME: &std::ffi::CStr = c"lateen-init";
    // SAFETY: system calls on local memory only. Closing all descriptors is sound because this copy
    // of the process uses none of them again; the pipe that reports a failed exec closes with them.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, NAME.as_ptr(), 0, 0, 0);
        if libc::syscall(libc::SYS_close_range, 0_u32, u32::MAX, 0_u32) != 0 {
            for fd in 0..4096 {
                libc::close(fd);
            }
        }
        loop {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let signal = libc::sigwaitinfo(all, &raw mut info);
            if signal == libc::SIGCHLD {
                loop {
                    let mut status = 0;
                    let ended = libc::waitpid(-1, &raw mut status, libc::WNOHANG);
                    if ended <= 0 {
                        break;
                    }
                    if ended == child {
                        let code = if libc::WIFSIGNALED(status) {
                            128 + libc::WTERMSIG(status)
                        } else {
                            libc::WEXITSTATUS(status)
                        };
                        libc::_exit(code);
                    }
                }
            } else if signal > 0 {
                libc::kill(child, signal);
            }
        }
    }
}
