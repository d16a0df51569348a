"""The same work on many tasks: in this process, in several processes, or on a Ray cluster.

`work(task, tick)` is called for each task; the work, the tasks and the results must be picklable. The work calls
`tick(bytes, tokens)` now and then to report its progress. A tick raises `Stopped` if another task has failed.
"""

import contextlib
import ctypes
import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_sentinels
from multiprocessing.sharedctypes import SynchronizedArray
from multiprocessing.synchronize import Event
from typing import Any, Literal, TypeVar

from gpt2_flax.errors import ExitCode, UserError, missing_package
from gpt2_flax.interruption import SIGNALS, FirstSignal

Engine = Literal["local", "ray"]
Tick = Callable[[int, int], None]

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task, Tick], Result]

POLL_SECONDS = 0.2


class Stopped(Exception):
    """Another task has failed."""


def run(
    engine: Engine, work: Work[Task, Result], tasks: Sequence[tuple[int, Task]], workers: int | None, tick: Tick
) -> Iterator[tuple[int, Result]]:
    """Yield (number, result) of each numbered task as it is finished.

    The first failure stops the other tasks and is raised.

    Args:
        engine: Where the workers run.
        work: The function to call for each task.
        tasks: The tasks with their numbers.
        workers: The number of workers; None means one for each core of this machine or of the cluster.
        tick: Receives the progress of all workers; called in this process.

    Raises:
        UserError: IO if a worker died, or the error of a signal.
    """
    if engine == "ray":
        return _run_on_ray(work, tasks, workers, tick)
    workers = min(workers or _cores(), len(tasks))
    if workers <= 1:
        return ((number, work(task, tick)) for number, task in tasks)
    return _run_in_processes(work, tasks, workers, tick)


def _run_in_processes(work: Work, tasks: Sequence[tuple[int, Any]], workers: int, tick: Tick) -> Iterator:
    with FirstSignal() as first:  # until everything that `multiprocessing` creates is freed again
        yield from _run_in_pool(work, tasks, workers, tick, first)


def _run_in_pool(
    work: Work, tasks: Sequence[tuple[int, Any]], workers: int, tick: Tick, first: FirstSignal
) -> Iterator:
    context = multiprocessing.get_context("spawn")  # safe whatever threads this process has
    with _signals_blocked():  # the resource tracker, a process of `multiprocessing`, inherits this
        stop, done = context.Event(), context.Array(ctypes.c_int64, 2)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (work, stop, done))
    shown = [0, 0]
    running: dict[Future, int] = {}
    try:
        todo = iter(tasks)
        while True:
            for number, task in itertools.islice(todo, 2 * workers - len(running)):
                with _signals_blocked(), _without_script():  # this may start a worker, which unblocks them when ready
                    running[pool.submit(_work, task)] = number
            first.check()
            if not running:
                break
            finished, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
            now = done[:]
            tick(now[0] - shown[0], now[1] - shown[1])
            shown = now
            for future in finished:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise _death(f"one of {workers} workers") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals; processes that the block starts inherit this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Hide the script of the user, which processes that the block starts would run again."""
    script, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


_worker: tuple[Work, Tick]  # of this process, if it is a worker


def _start_worker(work: Work, stop: Event, done: "SynchronizedArray[int]") -> None:
    global _worker
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent stops its workers
    signal.signal(signal.SIGTERM, lambda number, frame: _end_with_parent(timeout=1.0))  # the parent explains first
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _use_one_core()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tick(n_bytes: int, n_tokens: int) -> None:
        if stop.is_set():
            raise Stopped
        with done.get_lock():
            done[0] += n_bytes
            done[1] += n_tokens

    _worker = work, tick


def _work(task: Any) -> Any:
    work, tick = _worker
    return work(task, tick)


def _end_with_parent(timeout: float | None = None) -> None:
    """Wait until the parent process has ended, at most `timeout` seconds, then end this worker.

    A worker whose parent was killed would wait for tasks forever. After SIGTERM to all processes of a job, the parent
    prints the reason before it notices that this worker is gone.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        wait_for_sentinels([parent.sentinel], timeout)
        os._exit(1)


class _RayWorker:
    """An actor that receives the work once and then one task after another."""

    def __init__(self, work: Work):
        _use_one_core()
        self.work = work

    def run(self, task: Any) -> tuple[Any, int, int]:
        ticks: list[tuple[int, int]] = []
        result = self.work(task, lambda *amounts: ticks.append(amounts))
        return result, sum(n_bytes for n_bytes, _ in ticks), sum(n_tokens for _, n_tokens in ticks)


def _run_on_ray(work: Work, tasks: Sequence[tuple[int, Any]], workers: int | None, tick: Tick) -> Iterator:
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError:
        raise missing_package("--engine ray", "Ray", "ray", "this environment") from None
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            try:  # join the cluster in RAY_ADDRESS, which `ray job submit` sets, or start one on this machine
                ray.init(log_to_driver=False, logging_level="error")
            except Exception as error:
                fix = f"check RAY_ADDRESS and `ray status` ({str(error).splitlines()[0]})"
                where = os.environ.get("RAY_ADDRESS", "local")
                raise UserError(ExitCode.IO, "no Ray cluster", where, fix) from None
            stack.callback(ray.shutdown)
        shared = ray.put(work)
        actor = ray.remote(num_cpus=1)(_RayWorker)
        workers = min(workers or int(ray.cluster_resources()["CPU"]), len(tasks))
        idle = [actor.remote(shared) for _ in range(workers)]  # if there are too few cores, some wait until more join
        stack.callback(lambda: [ray.kill(worker) for worker in idle + [worker for _, worker in running.values()]])
        running: dict[Any, tuple[int, Any]] = {}
        todo = iter(tasks)
        try:
            while True:
                for number, task in itertools.islice(todo, len(idle)):
                    worker = idle.pop()
                    running[worker.run.remote(task)] = number, worker
                if not running:
                    return
                (finished, *_), _ = ray.wait(list(running))
                number, worker = running.pop(finished)
                idle.append(worker)
                result, n_bytes, n_tokens = ray.get(finished)
                tick(n_bytes, n_tokens)
                yield number, result
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", error)  # the exception of the task
            if not isinstance(cause, ray.exceptions.RayError):
                raise cause from None
            raise _death(f"Ray says: {str(cause).strip().splitlines()[0]}") from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS lacks it


def _use_one_core() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process for each core is enough


def _death(where: str) -> UserError:
    fix = "what is finished is kept: run the same command again, with fewer --workers if memory was short"
    return UserError(ExitCode.IO, "a worker process died", where, fix)
