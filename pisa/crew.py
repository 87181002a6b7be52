"""Threads for a CPU: small operators of torch run faster side by side than each of them split over all threads."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Part = TypeVar("Part")


@dataclass(frozen=True)
class Crew:
    """The threads of one call: on a CPU as many as torch has; elsewhere, and of one, the caller alone."""

    size: int

    @classmethod
    @contextmanager
    def called(cls, device: torch.device) -> Iterator["Crew"]:
        """A crew for the length of a `with`, in which the caller's own operators run on one thread.

        Else each of them would wake threads of torch that, when done, spin for milliseconds on the crew's cores.
        """
        size = torch.get_num_threads() if device.type == "cpu" else 1
        if size == 1:
            yield cls(1)
            return
        torch.set_num_threads(1)
        try:
            yield cls(size)
        finally:
            torch.set_num_threads(size)

    def cut(self, heads: int) -> list[slice]:
        """Heads one by one for several threads, all at once for one."""
        return [slice(h, h + 1) for h in range(heads)] if self.size > 1 else [slice(None)]

    def share(self, work: Callable[[list[Part]], None], parts: list[Part]) -> None:
        """Calls `work` with shares of `parts`, one for each thread. Raises what the first share raised."""
        size = min(self.size, len(parts))
        if size <= 1:
            return work(parts)
        inference = torch.is_inference_mode_enabled()

        def own(number: int) -> None:
            with torch.inference_mode(inference), torch.no_grad():  # both belong to the thread that sets them
                work(parts[number::size])

        for done in [threads(self.size).submit(own, number) for number in range(size)]:
            done.result()
        return None


@cache
def threads(size: int) -> ThreadPoolExecutor:
    """Threads in which every operator of torch runs alone; they stay, since new ones would fault in fresh memory."""
    started = Barrier(size)

    def start() -> None:
        torch.get_num_threads()  # at its first use of torch a thread takes over the caller's number, which is 1 now
        started.wait()

    workers = ThreadPoolExecutor(size, thread_name_prefix="pisa")
    for done in [workers.submit(start) for _ in range(size)]:
        done.result()
    return workers


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=threads.cache_clear)  # a forked process has none of these threads
