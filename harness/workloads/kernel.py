"""One attention call on random inputs: every dense kernel here and one method, in turn in one process, phase by phase.

The reference times every dense kernel. A record of a method holds its time beside the dense kernels that may be the
fastest, in the same rounds (clock and power are those of all of them), and its error beside its time: against float64
dense attention and against the float64 PISA formula with the same map, on some query blocks of every call.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from baselines.dense import Dense, available
from harness.clocks import watch
from harness.metrics import tensor_errors
from harness.phases import Apart, durations
from harness.roofline import dense_work, measure_limits, phase_work
from harness.shapes import SIZES, shape_name
from harness.timing import Clock, host_us, interleave, peak_memory, quantiles, speedup
from harness.workloads import Run
from pisa import SparseAttention
from pisa import reference as definition

NEVER_A_PEER = "sdpa_math"  # writes the L x L matrix: a definition, which would only set the number of rounds
CONTENDERS = 1.25  # a dense kernel this many times slower than another is not timed again beside every method
CALL, PHASE = "call", "phase "  # peers of a dense kernel, by its name


@dataclass(frozen=True)
class Kernel:
    """truth_blocks: query blocks whose float64 output is the truth, spread over heads and length, the last one among
    them. repeats: timed rounds; None suits them to the slowest peer, 0 measures errors alone.
    """

    truth_blocks: int = 16
    repeats: int | None = None

    def reference(self, model: Any, run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The dense kernels alone; nothing is kept, since every cell can draw the inputs again."""
        return self.measure(model, run, {})

    @torch.no_grad()
    def measure(self, model: Any, run: Run, reference: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        q, k, v = model.qkv(run.seed)
        spots = Spots.of(q, getattr(run.method, "block_size", 64), self.truth_blocks)
        truth = spots.dense(q, k, v)
        dense, dense_facts, left_out = dense_peers(run.dense, q, k, v, spots, truth, run.device)
        columns = {"shape": shape_name(dict(zip(SIZES, q.shape, strict=True))), "dense_left_out": left_out}
        peers, apart = dict(dense), None
        if run.method is not None:
            peers = contenders(dense, run.device)
            peers[CALL] = lambda: run.method(q, k, v, grid=model.grid)
            o, facts = first_call(peers[CALL], run.device)
            columns |= facts | described(run.method)
            if isinstance(run.method, SparseAttention):  # another class with the same call has no parts to look at
                apart = Apart.of(run.method, q, k, v, model.grid)
                formula = spots.formula(apart)
                columns["rel_l2_formula"] = tensor_errors(spots.rows(apart.in_order(o)), formula)["rel_l2"]
                peers |= {f"{PHASE}{name}": fn for name, fn in apart.callables().items()}
                warm_up(peers)
            columns |= tensor_errors(spots.rows(o), truth)
            del o
        with watch(run.device) as clocks:
            samples = interleave(peers, run.device, self.repeats, warmup=0)
        columns |= clocks
        dense_columns = dense_results(dense_facts, samples, dense_work(q, k).flops, run.device)
        if run.method is None:
            fastest = dense_columns["dense_peers"][0]
            shared = ("rel_l1", "rel_l2", "cosine", "peak_memory_mb", "host_us", "first_call_ms")
            columns |= {"density_realised": 1.0, "exact_fraction": 1.0} | {name: fastest[name] for name in shared}
            return columns | dense_columns | quantiles(samples[fastest["kernel"]]), {}
        columns |= dense_columns | quantiles(samples[CALL]) | {"host_us": host_us(peers[CALL], run.device)}
        columns |= speedup(samples[dense_columns["dense_kernel"]], samples[CALL])
        return columns | (phase_columns(apart, samples, run.device) if apart else {}), {}


# ------------------------------------------------------------------------------------------------------------- truth
@dataclass(frozen=True)
class Spots:
    """Query blocks of one call, (batch, head, block) each, that are compared with float64, a head at a time."""

    places: tuple[tuple[int, int, int], ...]
    size: int

    @classmethod
    def of(cls, q: Tensor, size: int, wanted: int) -> "Spots":
        """Evenly over the length, the first and the last block (a short one, perhaps) with it, another head each."""
        heads, n = q.shape[0] * q.shape[1], -(-q.shape[2] // size)
        count = min(wanted, n * heads)
        blocks = [round(i * (n - 1) / max(1, count - 1)) for i in range(count)]
        chosen = [divmod(i % heads, q.shape[1]) + (block,) for i, block in enumerate(blocks)]
        return cls(tuple(dict.fromkeys(chosen)), size)

    def part(self, x: Tensor, place: tuple[int, int, int]) -> Tensor:
        batch, head, block = place
        return x[batch, head, block * self.size : (block + 1) * self.size].double()

    def rows(self, x: Tensor) -> Tensor:
        """These rows of `[B, H, L, D]`, one below the other, float64."""
        return torch.cat([self.part(x, place) for place in self.places])

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Float64 dense attention of these rows."""
        return torch.cat([definition.dense(self.part(q, (b, h, i)), k[b, h], v[b, h])[0] for b, h, i in self.places])

    def formula(self, call: Apart) -> Tensor:
        """The float64 definition (pisa.reference) of these rows, in the call's order, with the call's map."""
        out, scale = [], call.q.shape[3] ** -0.5
        for b, h, i in self.places:
            keys, values = (x[b, h].double().split(self.size) for x in (call.k, call.v))
            exact = call.block_map.indices[b, h, i, : call.block_map.counts[b, h, i]].tolist()
            q = self.part(call.q, (b, h, i))
            out.append(definition.attend_block(q, keys, values, exact, call.method.tail.name, scale))
        return torch.cat([o for o, _ in out])


# ------------------------------------------------------------------------------------------------------------- peers
def first_call(fn: Callable[[], Tensor], device: str) -> tuple[Tensor, dict[str, float]]:
    """The output, the memory it took, and the time of a first call: with compilation, where that was still to do."""
    with peak_memory(device) as memory:
        start = time.perf_counter()
        o = fn()
        if device == "cuda":
            torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - start)
    return o, {**memory, "first_call_ms": ms}


def warm_up(peers: dict[str, Callable[[], Any]]) -> None:
    """The phases once; dense kernels and call have had their first call already."""
    for name, fn in peers.items():
        if name.startswith(PHASE):
            fn()


def dense_peers(
    dense: Dense, q: Tensor, k: Tensor, v: Tensor, spots: Spots, truth: Tensor, device: str
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, dict[str, Any]], str]:
    """Every dense kernel that runs this call (of dense_kernel=auto, else the one named), what is known of each after a
    first call, and a sentence about those that failed. Raises ValueError when none runs."""
    names = [dense.resolve(q)]
    if dense.kernel == "auto":
        names = [name for name in available(q) if name != NEVER_A_PEER] or names
    peers, facts, failed = {}, {}, {}
    for name in names:
        fn = partial(replace(dense, kernel=name), q, k, v)
        try:
            o, known = first_call(fn, device)
            facts[name] = known | tensor_errors(spots.rows(o), truth) | {"host_us": host_us(fn, device)}
            peers[name] = fn
        except Exception as error:  # a peer that cannot run this shape is a word in the record, not the end of the cell
            failed[name] = " ".join(str(error).split())[:200]
    sentence = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    if not peers:
        raise ValueError(f"no dense kernel runs this shape: {sentence}")
    return peers, facts, sentence


def contenders(dense: dict[str, Callable[[], Tensor]], device: str) -> dict[str, Callable[[], Tensor]]:
    """The dense kernels that may be the fastest, by one timed call of each."""
    clock = Clock(device)
    ms = {name: clock(fn) for name, fn in dense.items()} if len(dense) > 1 else dict.fromkeys(dense, 1.0)
    return {name: fn for name, fn in dense.items() if ms[name] <= CONTENDERS * min(ms.values())}


def described(method: Any) -> dict[str, Any]:
    """What the last call of the method decided."""
    if (last := getattr(method, "last", None)) is None:  # a class of one's own need not say it
        return {}
    return {"engine": last.engine, "density_realised": last.density, "exact_fraction": last.density}


# ----------------------------------------------------------------------------------------------------------- columns
def dense_results(
    facts: dict[str, dict[str, Any]], samples: dict[str, list[float]], flops: float, device: str
) -> dict[str, Any]:
    """dense_peers: a dict for each dense kernel, fastest first; dense_kernel is the first; and the machine's limits."""
    limits = measure_limits(device)
    peers = []
    for name, known in facts.items():
        if name not in samples:
            continue  # no contender
        peer = {"kernel": name, **known, **{k: v for k, v in quantiles(samples[name]).items() if "samples" not in k}}
        if samples[name]:
            peer["tflops"] = flops / median(samples[name]) / 1e9
            peer["roofline_percent"] = 100 * peer["tflops"] / limits.matrix_tflops
        peers.append(peer)
    peers.sort(key=lambda peer: peer.get("latency_ms_median", 0.0))
    return {
        "dense_peers": peers,
        "dense_kernel": peers[0]["kernel"],
        "dense_tflops": peers[0].get("tflops"),
        "matrix_tflops": limits.matrix_tflops,
        "copy_gb_s": limits.copy_gb_s,
    }


def phase_columns(apart: Apart, samples: dict[str, list[float]], device: str) -> dict[str, Any]:
    """phase_ms_NAME and roofline_percent_NAME of each phase, and exact_tflops; nothing in an untimed cell."""
    times = {name.removeprefix(PHASE): ms for name, ms in samples.items() if name.startswith(PHASE)}
    if not all(times.values()):
        return {}
    columns: dict[str, Any] = {}
    for name, ms in durations(times).items():
        columns[f"phase_ms_{name}"] = ms
        work = phase_work(name, apart.q, apart.k, apart.block_map, apart.method.tail.name)
        if work is not None and ms > 0:  # a difference of two times can fall below zero
            columns[f"roofline_percent_{name}"] = work.percent(ms, measure_limits(device))
        if name == "exact":
            columns["exact_tflops"] = work.flops / ms / 1e9
    return columns | {"roofline_percent": columns.get("roofline_percent_exact")}
