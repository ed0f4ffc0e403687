//! Every native call that takes time goes through here: GIL released, panics caught, Ctrl-C heard, errors typed.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::error::{Error, Result};

/// How often Ctrl-C is looked for while native work runs.
const SIGNAL_POLL: Duration = Duration::from_millis(50);
/// tract's parser recurses; preflight bounds the depth to what this stack holds. Untouched pages cost nothing.
const WORKER_STACK: usize = 64 << 20;

thread_local! {
    /// `Some` while this thread is inside [`guard`]; filled by the panic hook instead of stderr.
    static CAUGHT: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `work` on a worker thread, polling Python's signals meanwhile. `work` gets a flag that turns true on Ctrl-C;
/// it should look at it at least every 100 ms, clean up and return [`Error::Interrupted`].
#[expect(clippy::redundant_closure_for_method_calls, reason = "the bare method is not general over lifetimes")]
pub fn native<T: Send>(py: Python<'_>, work: impl FnOnce(&AtomicBool) -> Result<T> + Send) -> PyResult<T> {
    let stop = AtomicBool::new(false);
    let (outcome, signal) = py.detach(|| {
        std::thread::scope(|scope| {
            let (done, finished) = channel();
            let stop_flag = &stop;
            let body = move || {
                let outcome = guard(|| work(stop_flag));
                // The receiver outlives the worker; a failed send could only lose a wake-up.
                let _ = done.send(());
                outcome
            };
            let worker = match std::thread::Builder::new().stack_size(WORKER_STACK).spawn_scoped(scope, body) {
                Ok(worker) => worker,
                Err(e) => return (Err(Error::InvalidArgument(format!("cannot start a thread: {e}"))), None),
            };
            let mut signal = None;
            while let Err(RecvTimeoutError::Timeout) = finished.recv_timeout(SIGNAL_POLL) {
                if signal.is_none() {
                    signal = Python::attach(|py| py.check_signals()).err();
                    stop.store(signal.is_some(), Ordering::Relaxed);
                }
            }
            (worker.join().unwrap_or_else(|_| Err(Error::Panic("worker thread died".into()))), signal)
        })
    });
    match signal {
        Some(interrupt) => Err(interrupt),
        None => outcome.map_err(|e| to_py(py, &e)),
    }
}

/// Runs short `work` on the calling thread with the GIL released; Ctrl-C is looked for once, after it.
pub fn native_short<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    let outcome = py.detach(|| guard(work));
    py.check_signals()?;
    outcome.map_err(|e| to_py(py, &e))
}

/// Turns a panic into [`Error::Panic`] without a word on stderr; panics of other threads keep their hook.
fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let ours = CAUGHT.with_borrow_mut(|slot| slot.as_mut().map(|text| *text = info.to_string()).is_some());
            if !ours {
                previous(info);
            }
        }));
    });
    CAUGHT.set(Some(String::new()));
    let outcome = catch_unwind(AssertUnwindSafe(work));
    let text = CAUGHT.take().unwrap_or_default();
    outcome.unwrap_or_else(|_| Err(Error::Panic(text)))
}

/// The exception of `torch_to_nnef.exceptions` that stands for `error`.
pub fn to_py(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::InvalidArgument(_) => "T2NErrorInvalidArgument",
        Error::Misuse(_) => "T2NErrorMisuse",
        Error::ImpossibleQuantization(_) => "T2NErrorImpossibleQuantization",
        Error::InconsistentTensor(_) => "T2NErrorInconsistentTensor",
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => "T2NErrorNotFoundFile",
        Error::Io { .. } | Error::Panic(_) | Error::Interrupted => "T2NErrorRuntime",
        Error::Tract(_) => "T2NErrorTract",
    };
    match py
        .import("torch_to_nnef.exceptions")
        .and_then(|m| m.getattr(class)?.cast_into::<PyType>().map_err(Into::into))
    {
        Ok(class) => PyErr::from_type(class, error.to_string()),
        Err(missing) => missing,
    }
}
