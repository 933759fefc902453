//! The allocator, and what a program that has started can let go.

use rustix::mm::{Advice, madvise};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[expect(unsafe_code, reason = "a function of the allocator that its crate does not offer")]
mod sys {
    // SAFETY: as in mimalloc.h, which says that it may be called at any time by any thread.
    unsafe extern "C" {
        pub(super) safe fn mi_collect(force: bool);
    }
}

/// Gives memory back to the system: what this thread has freed, what no thread owns, and the pages of
/// the program's own file that are mapped. Those of code that only starts things are not needed again; the
/// others come back from the page cache, many at a touch.
pub(crate) fn trim() {
    sys::mi_collect(true);
    let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else { return };
    let Ok(program) = std::fs::read_link("/proc/self/exe") else { return };
    for (start, length) in clean_pages(&maps, &program.to_string_lossy()) {
        #[expect(unsafe_code, reason = "there is no safe way to unmap a page")]
        // SAFETY: the range is a private mapping of the program's file, which stands where the kernel put it for as
        // long as the process lives. It cannot be written to and has no page of its own: what is read from it after
        // this is what was read before. Libraries are left alone: they may be mapped and unmapped meanwhile.
        let advised = unsafe { madvise(start as *mut _, length, Advice::LinuxDontNeed) };
        if let Err(error) = advised {
            tracing::debug!(%error, "pages of the program stay mapped");
        }
    }
}

/// Address and length of each mapping that holds the program's pages as its file has them, in the text of
/// `/proc/PID/smaps` (proc(5)). Pages with relocations are a process's own, and so is a breakpoint;
/// what is its own may have been swapped out.
fn clean_pages(smaps: &str, program: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut current: Option<(usize, usize)> = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(first), Some(second)) = (words.next(), words.next()) else { continue };
        if let Some((start, end)) = first.split_once('-') {
            let is_own = words.nth(3) == Some(program);
            let range = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16));
            current = match range {
                (Ok(start), Ok(end)) if is_own && matches!(second, "r-xp" | "r--p") => {
                    Some((start, end.saturating_sub(start)))
                }
                _ => None,
            };
        } else if matches!(first, "Anonymous:" | "Swap:") && second != "0" {
            current = None;
        } else if first == "VmFlags:" {
            found.extend(current.take());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_as_in_the_file_are_let_go() {
        let mapping = |range: &str, rights: &str, path: &str, own: u32, swapped: u32| {
            format!(
                "{range} {rights} 00001000 fd:01 1234 {path}\nSize: 8 kB\nPrivate_Clean: 4 kB\n\
                 Private_Dirty: {own} kB\nAnonymous: {own} kB\nSwap: {swapped} kB\nVmFlags: rd mr\n"
            )
        };
        let smaps = [
            mapping("1000-3000", "r--p", "/bin/lateen", 0, 0),
            mapping("3000-8000", "r-xp", "/bin/lateen", 0, 0),
            mapping("8000-9000", "r--p", "/bin/lateen", 4, 0),
            mapping("9000-a000", "r--p", "/bin/lateen", 0, 4),
            mapping("a000-b000", "rw-p", "/bin/lateen", 0, 0),
            mapping("b000-c000", "r--s", "/bin/lateen", 0, 0),
            mapping("f000-10000", "r-xp", "/lib/libc.so.6", 0, 0),
            mapping("c000-d000", "r--p", "", 0, 0),
            mapping("d000-e000", "r-xp", "[vdso]", 0, 0),
        ];
        assert_eq!(clean_pages(&smaps.concat(), "/bin/lateen"), [(0x1000, 0x2000), (0x3000, 0x5000)]);
    }

    #[test]
    fn a_program_goes_on_without_its_pages() {
        trim();
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let program = std::env::current_exe().unwrap();
        assert!(!clean_pages(&text, program.to_str().unwrap()).is_empty());
    }
}
