//! The allocator.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[expect(unsafe_code, reason = "a function of the allocator that its crate does not offer")]
mod sys {
    // SAFETY: as in mimalloc.h, which says that it may be called at any time by any thread.
    unsafe extern "C" {
        pub(super) safe fn mi_collect(force: bool);
    }
}

/// Gives memory that this thread has freed, and what no thread owns, back to the system.
pub(crate) fn trim() {
    sys::mi_collect(true);
}
