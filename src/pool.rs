//! The threads that share work on large tensors. A fork leaves threads behind, so every process starts its own.

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

struct Pool {
    /// Whose threads these are.
    process: u32,
    threads: ThreadPool,
}

/// Not behind a lock, which another thread may hold at the moment of a fork. A pool once here is never freed.
static CURRENT: AtomicPtr<Pool> = AtomicPtr::new(ptr::null_mut());

/// Runs `work` where its parallel iterators find threads: the pool it is called in, or that of this process.
pub fn install<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    if rayon::current_thread_index().is_some() {
        return work();
    }
    current()?.install(work)
}

fn current() -> Result<&'static ThreadPool> {
    let process = std::process::id();
    let found = CURRENT.load(Ordering::Acquire);
    // SAFETY: null, or a box leaked below.
    if let Some(pool) = unsafe { found.as_ref() }.filter(|pool| pool.process == process) {
        return Ok(&pool.threads);
    }
    let threads = ThreadPoolBuilder::new().thread_name(|i| format!("t2n-{i}")).build();
    let threads = threads.map_err(|e| Error::InvalidArgument(format!("cannot start threads: {e}")))?;
    let made = Box::into_raw(Box::new(Pool { process, threads }));
    match CURRENT.compare_exchange(found, made, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: leaked from here on.
        Ok(_) => Ok(unsafe { &(*made).threads }),
        Err(others) => {
            // SAFETY: nobody has seen `made`; another thread of this process put `others` there meanwhile.
            unsafe {
                drop(Box::from_raw(made));
                Ok(&(*others).threads)
            }
        }
    }
}
