"""The work list of `t2n quantize-shards` on a Ray cluster: a task a file; a lost worker's file goes on in another where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_to_nnef.exceptions import T2NError, T2NErrorRuntime
from torch_to_nnef.llm_tract.shard_list import WorkList
from torch_to_nnef.llm_tract.shard_work import quantize_output

if TYPE_CHECKING:
    from torch_to_nnef.llm_tract.shards import Run
    from torch_to_nnef.quantize.apply import Progress


def on_ray(address: str | None = None, retries: int = 3, **init: Any) -> Run:
    """Who makes files as tasks of the cluster at `address`, by default one on this machine; every node has to reach both folders.

    A task is tried `retries` times again after its worker was lost, or the system failed it. `init` is for `ray.init`; a cluster that this
    process is connected to is used as it is.

    Raises `T2NErrorRuntime` if Ray is not installed; what is returned raises it for a cluster that cannot be reached, and for lost workers
    beyond `retries`.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise T2NErrorRuntime("no ray: pip install 'torch-to-nnef-native[ray]'") from error

    def run(work: WorkList, numbers: Sequence[int], checkpoint: Path, out: Path, progress: Progress | None) -> None:
        started = not ray.is_initialized()
        try:
            if started:
                ray.init(address=address, **{"log_to_driver": False, "include_dashboard": False, **init})
            _run(ray, work, numbers, checkpoint.resolve(), out.resolve(), progress, retries)
        except T2NError:
            raise
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise T2NErrorRuntime(f"Ray: {type(error).__name__}: {' '.join(str(error).split())}") from error
        finally:
            if started:
                ray.shutdown()

    return run


def _run(
    ray: Any,
    work: WorkList,
    numbers: Sequence[int],
    checkpoint: Path,
    out: Path,
    progress: Progress | None,
    retries: int,
) -> None:
    task = ray.remote(max_retries=retries, retry_exceptions=[T2NErrorRuntime, OSError])(quantize_output)
    shared = ray.put(work)
    waiting = {task.remote(shared, number, checkpoint, out): work.outputs[number] for number in numbers}
    done, total = 0, sum(output.nbytes for output in waiting.values())
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            for reference in ready:
                output = waiting.pop(reference)
                _result(ray, reference)
                done += output.nbytes
                if progress:
                    progress(done, total, output.name)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _result(ray: Any, reference: Any) -> None:
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # The exception of the task, not Ray's class around it.
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise
