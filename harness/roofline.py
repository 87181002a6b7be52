"""How close a part of attention comes to what the machine can do at all, measured in the same process.

The floor of a part is the time of its arithmetic at the rate of a large matrix product, or of its bytes (every tensor
read or written once) at the rate of a large copy, whichever is longer. Percent of the roofline = floor / time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from torch import Tensor

from harness.timing import Clock
from pisa import BlockMap

MATRIX = {"cuda": (8192, torch.bfloat16), "cpu": (2048, torch.float32)}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
REPEATS = {"cuda": 20, "cpu": 5}


@dataclass(frozen=True)
class Limits:
    """Measured: a square matrix product (bf16 on a GPU, fp32 on a CPU), and a copy, bytes read plus bytes written."""

    matrix_tflops: float
    copy_gb_s: float


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float = 0.0

    def percent(self, ms: float, limits: Limits) -> float:
        """Percent of the roofline that a part with this work reaches in `ms`."""
        floor_s = max(self.flops / (1e12 * limits.matrix_tflops), self.bytes / (1e9 * limits.copy_gb_s))
        return 100 * 1e3 * floor_s / ms


@cache
def measure_limits(device: str) -> Limits:
    """The limits of this machine, once in a process."""
    edge, dtype = MATRIX[device]
    a, b = torch.randn(2, edge, edge, device=device, dtype=dtype)
    product = torch.empty_like(a)
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)

    def ms(fn: Callable[[], object]) -> float:
        fn()
        return median(clock(fn) for _ in range(REPEATS[device]))

    multiplied, copied = ms(lambda: torch.matmul(a, b, out=product)), ms(lambda: target.copy_(source))
    return Limits(2 * edge**3 / multiplied / 1e9, 2 * source.nbytes / copied / 1e6)


def dense_work(q: Tensor, k: Tensor) -> Work:
    """Attention of every pair: 4 D operations each (two products), and q, k, v read and o written."""
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return Work(4.0 * pairs * q.shape[3], 2 * (q.nbytes + k.nbytes))


def exact_pairs(block_map: BlockMap) -> int:
    """Pairs of query and key that the map computes exactly, over all batches and heads."""
    size, device = block_map.block_size, block_map.counts.device
    last = block_map.n_k - 1
    missing = size * block_map.n_k - block_map.k_len  # tokens that the last key block lacks
    keys = block_map.counts.long() * size - missing * (block_map.indices == last).any(-1)  # [B, H, Nq]
    queries = (block_map.q_len - torch.arange(0, block_map.q_len, size, device=device)).clamp(max=size)
    return int((keys * queries).sum())


def phase_work(phase: str, q: Tensor, k: Tensor, block_map: BlockMap, tail: str) -> Work | None:
    """The least work of one phase of a sparse call; None for a phase that nobody counted.

    Means are counted as two numbers of q's type for each key block and channel. `statistics` reads k and v, and adds
    the product k^T v for the hybrid tail; the tail is attention to block means.
    """
    heads, (q_len, dim) = q.shape[0] * q.shape[1], q.shape[2:]
    rest = q_len * heads * block_map.n_k - exact_pairs(block_map) / block_map.block_size  # pairs of query and key block
    means = 2 * heads * block_map.n_k * dim * q.element_size()
    first_order = tail == "hybrid"
    statistics = Work(2.0 * first_order * k.numel() * dim, 2 * k.nbytes + means)
    tail_work = Work(4.0 * rest * dim + 2.0 * first_order * q.numel() * dim, 2 * q.nbytes + means)
    scores = heads * block_map.counts.shape[2] * block_map.n_k
    return {
        "order": Work(0.0, 2 * (2 * q.nbytes + 2 * k.nbytes)),
        "routing": Work(2.0 * scores * dim, q.nbytes + k.nbytes + block_map.indices.nbytes),
        "statistics": statistics,
        "exact": Work(4.0 * exact_pairs(block_map) * dim, 2 * (q.nbytes + k.nbytes)),
        "tail": tail_work,
        "statistics_and_tail": Work(statistics.flops + tail_work.flops, 2 * (q.nbytes + k.nbytes) + means),
    }.get(phase)
