"""Several models of the tables at once, in worker processes that share the output folder of a run."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

from snnllm.paper.runner import Job, Runner

__all__ = ["Workers"]

_WATCH_SECONDS = 0.5
Open = Callable[[int], tuple[Runner, Mapping[str, Job]]]
_runner: Runner
_jobs: Mapping[str, Job]


@dataclass(frozen=True)
class Workers:
    """Worker processes, for several GPUs or a CPU of many cores; on one GPU they wait for each other.

    Attributes:
        count: Models at once.
        open: Makes the runner (`at_once`) of worker 0, 1, ... and its jobs by name; can be pickled.
    """

    count: int
    open: Open

    def run(
        self, jobs: Sequence[Job]
    ) -> Generator[tuple[Job, dict[str, Any] | BaseException], None, None]:
        """Work on the jobs; each comes back with its record, or with what ended its worker.

        The latter come when no worker is left that writes. Whoever closes the iterator ends the workers.
        """
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        numbers = context.SimpleQueue()
        for number in range(self.count):
            numbers.put(number)
        stop = context.RawValue(ctypes.c_bool, False)
        threads = max(1, torch.get_num_threads() // self.count)
        start = (self.open, numbers, os.getpid(), stop, threads)
        failed: list[tuple[Job, BaseException]] = []
        with ProcessPoolExecutor(self.count, context, _start, start) as pool:
            names: dict[Future[dict[str, Any]], Job] = {
                pool.submit(_work, job.row.name): job for job in jobs
            }
            try:
                for future in as_completed(names):
                    error = future.exception()
                    if error is None:
                        yield names[future], future.result()
                    else:
                        failed.append((names[future], error))
            except BaseException:  # the pool would work on everything that is left
                stop.value = True
                pool.shutdown(cancel_futures=True)
                raise
        yield from failed


def _start(
    opened: Open, numbers: SimpleQueue[int], parent: int, stop: ctypes.c_bool, threads: int
) -> None:
    global _runner, _jobs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader ends its workers
    threading.Thread(target=_end_with, args=(parent, stop), daemon=True).start()
    torch.set_num_threads(threads)
    _runner, _jobs = opened(numbers.get())


def _end_with(parent: int, stop: ctypes.c_bool) -> None:
    """End this process when its parent says so, or was killed: its folder would be free again."""
    while os.getppid() == parent and not stop.value:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _work(name: str) -> dict[str, Any]:
    _runner.execute([_jobs[name]])
    return _runner.record(_jobs[name].row)
