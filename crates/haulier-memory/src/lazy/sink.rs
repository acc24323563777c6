//! Where the daemon asks for pages that have not arrived.

/// Told of pages that tasks wait for. Called outside of the daemon's locks, by the thread that met
/// the fault; must not block for long, since other faults wait meanwhile.
pub trait FaultSink: Send + Sync {
    /// Threads of `task` wait for these pages (addresses in the image), which have not arrived. May
    /// be called again for a page, when a forked child waits for it too.
    fn missing(&self, task: u32, pages: &[u64]);

    /// Nobody waits any more for a page that was reported missing: it has been placed, or unmapped.
    fn settled(&self, task: u32, page: u64) {
        let _ = (task, page);
    }
}
