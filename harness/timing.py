"""Latency measured honestly: warm-up apart, peers in turn in one process, medians with quantiles, raw samples kept.

On a GPU a call finds a flushed L2 cache and waits behind a short spin while the host queues it, so that the number is
the GPU's time alone; the host's time has a column of its own. A call that the host needs longer than the spin to
queue shows the rest of that time in its latency.
"""

import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from statistics import median
from typing import Any

import torch

L2_FLUSH_BYTES = 256 * 2**20
SPIN_MS = 1.0
ROUNDS = ((2, 50), (30, 25), (120, 12))  # of calls that take less than so many milliseconds
FEWEST_ROUNDS = 8
HOST_CALLS, HOST_SECONDS = 10, 1.0  # whichever ends first


def now(on_gpu: bool) -> Any:
    """A point in time: an event in the stream of a GPU, the wall clock elsewhere."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(spans: list[tuple[Any, Any]]) -> float:
    """Milliseconds of all spans together."""
    if spans and not isinstance(spans[0][0], float):
        torch.cuda.synchronize()
        return sum(a.elapsed_time(b) for a, b in spans)
    return 1e3 * sum(b - a for a, b in spans)


class Clock:
    """Times one call in milliseconds: CUDA events behind flush and spin on a GPU, the wall clock on a CPU."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=device) if self.cuda else None
        self.spin = spin_cycles(SPIN_MS) if self.cuda else 0

    def __call__(self, fn: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            fn()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        torch.cuda._sleep(self.spin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


@cache
def spin_cycles(ms: float) -> int:
    """Cycles of torch's spin that take `ms` on this GPU, by its own clock."""
    trial = 10_000_000
    for _ in range(2):  # the first one wakes the GPU
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(trial)
        end.record()
        end.synchronize()
    return int(trial * ms / start.elapsed_time(end))


def rounds_for(ms: float) -> int:
    """Timed rounds that a call of `ms` milliseconds gets: a short one varies more and costs less."""
    return next((rounds for below, rounds in ROUNDS if ms < below), FEWEST_ROUNDS)


def interleave(
    peers: dict[str, Callable[[], Any]], device: str, rounds: int | None, warmup: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of every peer in every round. The order turns by one each round, so that drift hits all alike.

    rounds: None is `rounds_for` the slowest peer, so that all have equally many and ratios pair up.
    """
    clock, names = Clock(device), list(peers)
    for name in names:
        for _ in range(warmup):
            peers[name]()
    if rounds is None:
        rounds = rounds_for(max(clock(peer) for peer in peers.values()))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(clock(peers[name]))
    return samples


def quantiles(samples: list[float]) -> dict[str, Any]:
    """The latency columns of a record, from raw milliseconds."""
    if not samples:
        return {}
    values = torch.tensor(samples, dtype=torch.float64)
    p20, p50, p80 = (float(torch.quantile(values, q)) for q in (0.2, 0.5, 0.8))
    spread = {"latency_ms_p20": p20, "latency_ms_p80": p80} if len(samples) > 1 else {}
    return {"latency_ms_median": p50, **spread, "latency_n": len(samples), "latency_ms_samples": samples}


def speedup(dense: list[float], sparse: list[float]) -> dict[str, float]:
    """Geometric mean of the ratio in each round with a 95 % bootstrap interval (paired: drift cancels)."""
    if not dense:
        return {}
    logs = torch.tensor([math.log(d / s) for d, s in zip(dense, sparse, strict=True)], dtype=torch.float64)
    out = {"speedup": math.exp(logs.mean()), "dense_latency_ms_median": median(dense)}
    if len(logs) >= 3:
        g = torch.Generator().manual_seed(0)
        draws = logs[torch.randint(len(logs), (2000, len(logs)), generator=g)].mean(1)
        low, high = (math.exp(float(torch.quantile(draws, q))) for q in (0.025, 0.975))
        out |= {"speedup_low": low, "speedup_high": high}
    return out


def host_us(fn: Callable[[], Any], device: str) -> float | None:
    """Microseconds that the host needs to queue one call on an idle GPU, median; None on a CPU, where it is the call.

    More than about 1,000 kernels in a call fill the queue: then the host waits for the GPU, and this says so too.
    """
    if device != "cuda":
        return None
    spans: list[float] = []
    while len(spans) < HOST_CALLS and sum(spans) < HOST_SECONDS:
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        spans.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * median(spans)


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """Most memory in use at once inside the block beyond what was in use before it, in MB: the allocator's count on a
    GPU; on a CPU the resident set of the process, sampled every millisecond (short peaks can be missed)."""
    found: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found["peak_memory_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    _give_back()
    before, done, peak = _resident(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
    found["peak_memory_mb"] = max(0, peak[0] - before) / 2**20


def _give_back() -> None:
    """Freed memory that malloc holds on to would hide what the block takes."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
