"""The eager engine: plain torch on any device. It gathers the selected blocks of a few query blocks at a time.

Exact part and tail are two small attentions, each with its log-sum-exp, merged at the end; so the tail, an empty one
too, has the right mass whatever its logits are. In memory: one chunk of query blocks, never an L x L matrix, and never
a D x D matrix for every block. Nothing asks the device for a number unless the counts of the map differ.
G = B * H heads of the whole batch; g heads and r query blocks make a chunk.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Barrier

import torch
from torch import Tensor

from ..blocks import BlockMap, Blocks
from ..tail import Tail
from .softmax import MASKED, attention, merge

Parts = list[tuple[slice, slice]]  # (heads, query blocks) of each chunk
CHUNK_BYTES_CPU = 4 << 20  # what a chunk gathers: it stays in the caches,
CHUNK_BYTES = 256 << 20  # elsewhere few large launches


def refuses(q: Tensor, block_map: BlockMap, tail: Tail) -> str | None:
    """None: it runs on every device, dtype, length and tail."""
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, tail: Tail, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The contract of `pisa.engines`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocks = Blocks(block_map.block_size, q.shape[2], k.shape[2])
    queries, keys, values = (cut(x, blocks.size) for x in (q, k, v))  # [G, N, b, D]
    o, lse = exact(queries, keys, values, block_map, blocks, scale)
    every_block_is_exact = block_map.uniform and block_map.indices.shape[-1] == blocks.n_k
    if tail.name != "drop" and not every_block_is_exact:
        rest = Rest.of(keys, values, block_map, blocks, tail, scale)
        cost = 4 * blocks.size * (blocks.n_k + 3 * q.shape[3])  # fp32: logits, queries, two outputs

        def add(parts: Parts) -> None:
            for part in parts:
                o[part], lse[part] = merge(o[part], lse[part], *rest(queries[part], *part))

        in_threads(add, list(chunks(queries, [cost] * blocks.n_q)), queries.device)
    return uncut(o, q), uncut(lse, q)


def cut(x: Tensor, size: int) -> Tensor:
    """`[B, H, L, D]` to contiguous `[G, N, b, D]`; zeros fill a short last block."""
    short = -x.shape[2] % size
    x = torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x
    return x.unflatten(2, (-1, size)).flatten(0, 1).contiguous()


def uncut(x: Tensor, like: Tensor) -> Tensor:
    """`[G, N, b, ...]` back to `[B, H, L, ...]`, B, H and L as in `like`."""
    return x.flatten(1, 2).unflatten(0, like.shape[:2])[:, :, : like.shape[2]]


def chunks(queries: Tensor, costs: list[int]) -> Iterator[tuple[slice, slice]]:
    """(heads, query blocks) of each chunk; costs: bytes that each query block takes, all of a chunk as the dearest."""
    budget = CHUNK_BYTES_CPU if queries.device.type == "cpu" else CHUNK_BYTES
    stops, dearest, start = [], 0, 0
    for row, cost in enumerate(costs):
        if row > start and max(dearest, cost) * (row + 1 - start) > budget:
            stops.append(row)
            dearest, start = 0, row
        dearest = max(dearest, cost)
    rows = [slice(*ends) for ends in zip([0, *stops], [*stops, len(costs)], strict=True)]
    group = max(1, budget // (max(costs) * len(costs)))  # several heads at once where whole heads are small
    for head in range(0, len(queries), group):
        for some in rows:
            yield slice(head, min(head + group, len(queries))), some


def exact(
    queries: Tensor, keys: Tensor, values: Tensor, block_map: BlockMap, blocks: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query block to its own key blocks: o `[G, Nq, b, D]`, lse `[G, Nq, b]` fp32."""
    o = torch.empty_like(queries)
    lse = torch.empty(queries.shape[:3], dtype=torch.float32, device=queries.device)
    indices = block_map.indices.flatten(0, 1)  # [G, Nq, width]
    widths = [indices.shape[-1]] * blocks.n_q if block_map.uniform else block_map.counts.amax((0, 1)).tolist()
    parts = list(chunks(queries, [2 * keys[0, 0].nbytes * width for width in widths]))
    most = max((heads.stop - heads.start) * (rows.stop - rows.start) * max(widths[rows]) for heads, rows in parts)

    def attend_to_own(parts: Parts) -> None:
        buffer = keys.new_empty(
            2, most, keys[0, 0].numel()
        )  # one for all: page faults of fresh ones cost a CPU a fifth
        for heads, rows in parts:
            picked, bias = indices[heads, rows, : max(widths[rows])], None
            if not (block_map.uniform and blocks.k_len % blocks.size == 0):
                picked, bias = padding(picked, blocks)
            own = (gather(x[heads], picked, out) for x, out in zip((keys, values), buffer, strict=True))
            o[heads, rows], lse[heads, rows] = attention(queries[heads, rows], *own, bias, scale)

    in_threads(attend_to_own, parts, queries.device)
    return o, lse


def in_threads(work: Callable[[Parts], None], parts: Parts, device: torch.device) -> None:
    """Calls `work` with shares of `parts`: on a CPU one for each thread of torch, which then computes alone.

    The operators of one chunk are too small for all threads to share: they would wait for each other after each.
    """
    threads = min(torch.get_num_threads(), len(parts)) if device.type == "cpu" else 1
    if threads == 1:
        return work(parts)
    inference = torch.is_inference_mode_enabled()

    def share(number: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both belong to the thread that sets them
            work(parts[number::threads])

    for done in [pool(threads).submit(share, number) for number in range(threads)]:
        done.result()  # raises what the share raised
    return None


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which every operator of torch runs alone; they stay, since new ones would fault in fresh memory."""
    before = torch.get_num_threads()
    started = Barrier(threads)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    workers = ThreadPoolExecutor(threads, thread_name_prefix="pisa")
    for done in [workers.submit(start) for _ in range(threads)]:
        done.result()
    torch.set_num_threads(before)  # threads that start later take the last number set, which was 1
    return workers


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=pool.cache_clear)  # a forked process has none of these threads


def gather(blocks: Tensor, picked: Tensor, out: Tensor) -> Tensor:
    """The tokens `[g, r, width * b, D]` of the blocks `picked` `[g, r, width]` of each head's `[g, N, b, D]`."""
    g, n, size, dim = blocks.shape
    first = torch.arange(0, g * n, n, dtype=picked.dtype, device=picked.device)[:, None, None]
    out = out[: picked.numel()]
    torch.index_select(blocks.view(g * n, size * dim), 0, (picked + first).flatten(), out=out)
    return out.view(*picked.shape[:2], -1, dim)


def padding(picked: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Safe indices and the bias `[g, r, 1, width * b]` that hides the fill of short rows and of a short last block."""
    lengths = blocks.lengths(blocks.k_len, picked.device)
    used = picked >= 0
    picked = torch.where(used, picked, picked[..., :1])  # a block that is exact anyway: no other may be read
    hidden = torch.arange(blocks.size, device=picked.device) >= (lengths[picked] * used)[..., None]
    return picked, torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, MASKED).flatten(2)[:, :, None]


@dataclass(frozen=True)
class Rest:
    """The tail as an attention over block means: `rest(q, heads, rows)` gives its output and log-sum-exp.

    The logit of block j is s q.kbar_j + log n_j, its value vbar_j. Divided by the tail mass, the first-order terms are
    s q (sum_j H_j) / Lk for hybrid and sum_j p_j / n_j s q H_j for blockwise_first, p the softmax over the tail.
    """

    keys: Tensor  # kbar, [G, 1, Nk, D] fp32
    values: Tensor  # vbar, [G, 1, Nk, D] fp32
    bias: Tensor  # log n_j, MASKED where the block is exact, [G, Nq, Nk] fp32
    slope: Tensor | None  # hybrid: s sum_j H_j / Lk, [G, D, D] fp32
    slopes: tuple[Tensor, Tensor] | None  # blockwise_first: s (k - kbar) / n_j and v, each [G, Nk, b, D] fp32
    scale: float

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, block_map: BlockMap, blocks: Blocks, tail: Tail, scale: float) -> "Rest":
        lengths = blocks.lengths(blocks.k_len, keys.device)[:, None]
        kbar, vbar = (x.sum(2, dtype=torch.float32) / lengths for x in (keys, values))  # [G, Nk, D]
        bias = torch.where(block_map.to_mask().flatten(0, 1), MASKED, lengths.squeeze(1).log())
        slope = slopes = None
        if tail.name in ("hybrid", "blockwise_first"):
            centred = keys - kbar[:, :, None]  # fp32; the fill of a short block meets values of zero below
            if tail.name == "hybrid":
                total = centred.flatten(1, 2).mT @ values.float().flatten(1, 2)  # sum_j H_j, [G, D, D]
                slope = total * (scale / blocks.k_len)
            else:
                slopes = centred * scale / lengths[:, None], values.float()
        return cls(kbar[:, None], vbar[:, None], bias, slope, slopes, scale)

    def __call__(self, q: Tensor, heads: slice, rows: slice) -> tuple[Tensor, Tensor]:
        q, bias = q.float(), self.bias[heads, rows, None]  # [g, r, b, D], [g, r, 1, Nk]
        keys, values = (x[heads].expand(-1, q.shape[1], -1, -1) for x in (self.keys, self.values))
        o, lse = attention(q, keys, values, bias, self.scale)
        if self.slope is not None:
            o = o + (q.flatten(1, 2) @ self.slope[heads]).view_as(q)
        if self.slopes is not None:
            p = (q @ keys.mT * self.scale + bias - lse[..., None]).exp()  # [g, r, b, Nk]
            for j, (k, v) in enumerate(zip(*(x[heads].unbind(1) for x in self.slopes), strict=True)):
                o = o + p[..., j, None] * (q @ (k.mT @ v)[:, None])  # one H_j at a time
        return o, lse
