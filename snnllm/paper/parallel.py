"""Several models of the tables at once, in worker processes that share the output folder of a run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from snnllm.paper.jobs import Job
from snnllm.paper.runner import Runner

__all__ = ["Workers"]

_WATCH_SECONDS = 0.5
Open = Callable[[int], tuple[Runner, Mapping[str, Job]]]


@dataclass(frozen=True)
class Workers:
    """Worker processes, for several GPUs or a CPU of many cores; on one GPU they wait for each other.

    Attributes:
        count: Models at once.
        open: Makes the runner (`at_once`) of worker 0, 1, ... and its jobs by name; can be pickled.
    """

    count: int
    open: Open

    def run(self, jobs: Sequence[Job]) -> Generator[tuple[Job, dict[str, Any] | str], None, None]:
        """Work on the jobs, each once; it comes back with its record, or with what ended its worker.

        A worker that has ended is replaced by a fresh one for the jobs that are left. Whoever closes the
        iterator ends the workers.
        """
        waiting = list(reversed(jobs))
        busy: dict[Connection, _Worker] = {}
        try:
            for number in range(min(self.count, len(jobs))):
                self._start(number, waiting.pop(), busy)
            while busy:
                ready = wait(list(busy))
                for worker in [w for channel, w in busy.items() if channel in ready]:
                    job, result = worker.job, worker.result()
                    if isinstance(result, dict) and waiting and worker.give(waiting[-1]):
                        waiting.pop()
                    else:
                        worker.end()
                        del busy[worker.channel]
                        if waiting:
                            self._start(worker.number, waiting.pop(), busy)
                    yield job, result
        finally:
            for worker in busy.values():
                worker.end()

    def _start(self, number: int, job: Job, busy: dict[Connection, _Worker]) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        threads = max(1, torch.get_num_threads() // self.count)
        arguments = (self.open, number, os.getpid(), threads, theirs)
        process = context.Process(target=_serve, args=arguments)
        process.start()
        busy[ours] = _Worker(number, process, ours, job)
        theirs.close()  # or its end would stay open when the process dies
        busy[ours].give(job)


@dataclass
class _Worker:
    """A worker process as the leader sees it.

    Attributes:
        number: Place among the workers, which decides about its GPU.
        process: The process.
        channel: Takes names of jobs there, and records or what failed back.
        job: What it works on.
    """

    number: int
    process: BaseProcess
    channel: Connection
    job: Job

    def give(self, job: Job) -> bool:
        """Start a job; False if the worker has died since its last one."""
        try:
            self.channel.send(job.row.name)
        except OSError:
            return False
        self.job = job
        return True

    def result(self) -> dict[str, Any] | str:
        """The record of its job, or what ended the process; it writes no more then."""
        try:
            answer: dict[str, Any] | str = self.channel.recv()
        except (EOFError, OSError):
            self.process.join()
            return _ending(self.process.exitcode)
        return answer

    def end(self) -> None:
        self.process.kill()  # what is measured is written already, durably
        self.process.join()
        self.channel.close()


def _ending(code: int | None) -> str:
    """What an exit code says."""
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    memory = ", as the system does when memory runs out: try fewer --jobs"
    return f"its process was ended by {name}{memory if -code == signal.SIGKILL else ''}"


def _serve(opened: Open, number: int, parent: int, threads: int, channel: Connection) -> None:
    """What a worker process does: jobs by their names, until it is ended or something fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        runner, jobs = opened(number)
        while True:
            job = jobs[channel.recv()]
            runner.execute([job])
            channel.send(runner.record(job.row))
    except Exception as error:  # what rows survive stands in their records
        channel.send(f"{type(error).__name__}: {error}")


def _end_with(parent: int) -> None:
    """End this process when its parent was killed: its folder would be free again."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
