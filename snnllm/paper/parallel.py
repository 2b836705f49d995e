"""Several models of the tables at once, in worker processes that share the output folder of a run."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any] | BaseException]]:
        """Work on the jobs; each comes back with its record, or with what ended its worker."""
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        numbers = context.SimpleQueue()
        for number in range(self.count):
            numbers.put(number)
        start = (self.open, numbers, os.getpid(), max(1, torch.get_num_threads() // self.count))
        with ProcessPoolExecutor(self.count, context, _start, start) as pool:
            names: dict[Future[dict[str, Any]], Job] = {
                pool.submit(_work, job.row.name): job for job in jobs
            }
            for future in as_completed(names):
                yield names[future], future.exception() or future.result()


def _start(opened: Open, numbers: SimpleQueue[int], parent: int, threads: int) -> None:
    global _runner, _jobs
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    _runner, _jobs = opened(numbers.get())


def _end_with(parent: int) -> None:
    """End this process when its parent was killed: it would write into a folder that is free again."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _work(name: str) -> dict[str, Any]:
    _runner.execute([_jobs[name]])
    return _runner.record(_jobs[name].row)
