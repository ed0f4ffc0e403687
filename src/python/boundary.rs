//! Every native call that takes time goes through here: GIL released, panics caught, Ctrl-C heard, errors typed.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Once};
use std::thread::Builder;
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::error::{Error, Result};

/// How often Ctrl-C is looked for while native work runs.
const SIGNAL_POLL: Duration = Duration::from_millis(20);
/// How long work that can be left behind may take to stop.
const PATIENCE: Duration = Duration::from_millis(60);
/// tract's parser recurses; preflight bounds the depth to what this stack holds. Untouched pages cost nothing.
const WORKER_STACK: usize = 64 << 20;

thread_local! {
    /// `Some` while this thread is inside [`guard`]; filled by the panic hook instead of stderr.
    static CAUGHT: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `work` on a worker thread, polling Python's signals meanwhile. `work` gets a flag that turns true on Ctrl-C;
/// it should look at it at least every 100 ms, clean up and return [`Error::Interrupted`].
pub fn native<T: Send>(py: Python<'_>, work: impl FnOnce(&AtomicBool) -> Result<T> + Send) -> PyResult<T> {
    let stop = AtomicBool::new(false);
    let (outcome, signal) = py.detach(|| {
        std::thread::scope(|scope| {
            let (done, finished) = channel();
            let stop_flag = &stop;
            // The receiver outlives the worker, so that this arrives.
            let body = move || drop(done.send(guard(|| work(stop_flag))));
            match worker().spawn_scoped(scope, body) {
                Ok(_) => wait(&finished, &stop, None),
                Err(e) => (Err(no_thread(&e)), None),
            }
        })
    });
    raise(py, outcome, signal)
}

/// [`native`] for `work` that owns what it needs and writes nothing: if it takes longer to stop than [`PATIENCE`], which
/// tract's optimizer does, it is left to finish on its own.
pub fn native_owned<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static,
) -> PyResult<T> {
    let stop = Arc::new(AtomicBool::new(false));
    let (outcome, signal) = py.detach(|| {
        let (done, finished) = channel();
        let stop_flag = Arc::clone(&stop);
        let body = move || drop(done.send(guard(|| work(&stop_flag))));
        match worker().spawn(body) {
            Ok(_) => wait(&finished, &stop, Some(PATIENCE)),
            Err(e) => (Err(no_thread(&e)), None),
        }
    });
    raise(py, outcome, signal)
}

fn worker() -> Builder {
    Builder::new().stack_size(WORKER_STACK)
}

fn no_thread(why: &std::io::Error) -> Error {
    Error::InvalidArgument(format!("cannot start a thread: {why}"))
}

/// What arrives at `finished`, and the exception a signal raised meanwhile; after that, at most `patience`.
fn wait<T>(
    finished: &Receiver<Result<T>>,
    stop: &AtomicBool,
    patience: Option<Duration>,
) -> (Result<T>, Option<PyErr>) {
    let mut signal = None;
    loop {
        let limit = patience.filter(|_| signal.is_some()).unwrap_or(SIGNAL_POLL);
        match finished.recv_timeout(limit) {
            Ok(outcome) => return (outcome, signal),
            Err(RecvTimeoutError::Disconnected) => return (Err(Error::Panic("worker thread died".into())), signal),
            Err(RecvTimeoutError::Timeout) if signal.is_some() && patience.is_some() => {
                return (Err(Error::Interrupted), signal);
            }
            Err(RecvTimeoutError::Timeout) => {
                if signal.is_none() {
                    signal = raised();
                    stop.store(signal.is_some(), Ordering::Relaxed);
                }
            }
        }
    }
}

/// The exception that the handler of a pending signal raises, if it does.
#[expect(clippy::redundant_closure_for_method_calls, reason = "the bare method is not general over lifetimes")]
fn raised() -> Option<PyErr> {
    Python::attach(|py| py.check_signals()).err()
}

fn raise<T>(py: Python<'_>, outcome: Result<T>, signal: Option<PyErr>) -> PyResult<T> {
    match signal {
        Some(signal) => Err(signal),
        None => outcome.map_err(|e| to_py(py, &e)),
    }
}

/// Runs `work` on the calling thread with the GIL released. It asks between its steps whether to stop.
pub fn native_here<T: Send>(py: Python<'_>, work: impl FnOnce(&dyn Fn() -> bool) -> Result<T> + Send) -> PyResult<T> {
    let (outcome, signal) = py.detach(|| {
        let (asked, signal) = (Cell::new(Instant::now()), RefCell::new(None));
        let outcome = guard(|| {
            work(&|| {
                if asked.get().elapsed() >= SIGNAL_POLL {
                    asked.set(Instant::now());
                    signal.replace(raised());
                }
                signal.borrow().is_some()
            })
        });
        (outcome, signal.into_inner())
    });
    let signal = signal.or_else(|| py.check_signals().err());
    raise(py, outcome, signal)
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
