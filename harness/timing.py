"""Latency measured honestly: warm-up apart, peers in turn in one process, medians with quantiles, raw samples kept."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

L2_FLUSH_BYTES = 256 * 2**20


class Clock:
    """Times one call in milliseconds: CUDA events behind a flushed L2 cache on a GPU, the wall clock on a CPU."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=device) if self.cuda else None

    def __call__(self, fn: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            fn()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def interleave(
    peers: dict[str, Callable[[], Any]], device: str, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of every peer in every round. The order turns by one each round, so that drift hits all alike."""
    clock, names = Clock(device), list(peers)
    for name in names:
        for _ in range(warmup):
            peers[name]()
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
    p20, median, p80 = (float(torch.quantile(values, q)) for q in (0.2, 0.5, 0.8))
    spread = {"latency_ms_p20": p20, "latency_ms_p80": p80} if len(samples) > 1 else {}
    return {"latency_ms_median": median, **spread, "latency_n": len(samples), "latency_ms_samples": samples}


def speedup(dense: list[float], sparse: list[float]) -> dict[str, float]:
    """Geometric mean of the ratio in each round with a 95 % bootstrap interval (paired: drift cancels)."""
    if not dense:
        return {}
    logs = torch.tensor([math.log(d / s) for d, s in zip(dense, sparse, strict=True)], dtype=torch.float64)
    out = {"speedup": math.exp(logs.mean()), "dense_latency_ms_median": float(torch.tensor(dense).median())}
    if len(logs) >= 3:
        g = torch.Generator().manual_seed(0)
        draws = logs[torch.randint(len(logs), (2000, len(logs)), generator=g)].mean(1)
        low, high = (math.exp(float(torch.quantile(draws, q))) for q in (0.025, 0.975))
        out |= {"speedup_low": low, "speedup_high": high}
    return out


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


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
