"""The eager engine: plain torch on any device. It gathers the selected blocks of a few query blocks at a time.

Exact part and tail are two small attentions, each with its log-sum-exp, merged at the end; so the tail, an empty one
too, has the right mass whatever its logits are. In memory: one gathered chunk, never an L x L matrix, and never a
D x D matrix for every block. Nothing asks the device for a number unless the counts of the map differ.
G = B * H heads of the whole batch; g heads and r query blocks make a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import BlockMap, Blocks
from ..tail import Tail
from .softmax import MASKED, attention, merge

CHUNK_BYTES_CPU = 4 << 20  # gathered keys and values of a chunk: they stay in the cache,
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
    indices, bias = block_map.indices.flatten(0, 1), None  # [G, Nq, width]
    rest = Rest.of(keys, values, block_map, blocks, tail, scale) if has_tail(block_map, tail) else None
    o = torch.empty_like(queries)
    lse = torch.empty(queries.shape[:3], dtype=torch.float32, device=q.device)
    parts = list(chunks(block_map, keys))
    buffer = gather_buffer(keys, parts)
    for heads, rows, width in parts:
        picked = indices[heads, rows, :width]
        if not (block_map.uniform and blocks.k_len % blocks.size == 0):
            picked, bias = padding(picked, blocks)
        chunk = queries[heads, rows]  # [g, r, b, D]
        own_keys, own_values = gather(keys[heads], picked, buffer[0]), gather(values[heads], picked, buffer[1])
        result = attention(chunk, own_keys, own_values, bias, scale)
        o[heads, rows], lse[heads, rows] = merge(*result, *rest(chunk, heads, rows)) if rest else result
    return uncut(o, q), uncut(lse, q)


def cut(x: Tensor, size: int) -> Tensor:
    """`[B, H, L, D]` to contiguous `[G, N, b, D]`; zeros fill a short last block."""
    short = -x.shape[2] % size
    x = torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x
    return x.unflatten(2, (-1, size)).flatten(0, 1).contiguous()


def uncut(x: Tensor, like: Tensor) -> Tensor:
    """`[G, N, b, ...]` back to `[B, H, L, ...]`, B, H and L as in `like`."""
    return x.flatten(1, 2).unflatten(0, like.shape[:2])[:, :, : like.shape[2]]


def chunks(block_map: BlockMap, keys: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """(heads, query blocks, widest row) of each chunk, so that the chunk gathers about the budget of the device."""
    heads, n_q, width = len(keys), *block_map.indices.shape[2:]
    budget = (CHUNK_BYTES_CPU if keys.device.type == "cpu" else CHUNK_BYTES) // (2 * keys[0, 0].nbytes)  # in blocks
    widths = [width] * n_q if block_map.uniform else block_map.counts.amax((0, 1)).tolist()
    spans, start, widest = [], 0, 0
    for row, width in enumerate(widths):
        if row > start and max(widest, width) * (row + 1 - start) > budget:
            spans.append((slice(start, row), widest))
            start, widest = row, 0
        widest = max(widest, width)
    spans.append((slice(start, n_q), widest))
    group = max(1, budget // sum(widths))  # several heads in a chunk where whole heads are small
    for head in range(0, heads, group):
        for rows, widest in spans:
            yield slice(head, min(head + group, heads)), rows, widest


def gather_buffer(keys: Tensor, parts: list[tuple[slice, slice, int]]) -> Tensor:
    """Room for the gathered keys and values of the largest chunk, `[2, blocks, b * D]`, written again for every chunk.

    Fresh memory for each chunk costs a CPU a fifth of the whole call in page faults.
    """
    most = max((heads.stop - heads.start) * (rows.stop - rows.start) * width for heads, rows, width in parts)
    return keys.new_empty(2, most, keys[0, 0].numel())


def gather(blocks: Tensor, picked: Tensor, buffer: Tensor) -> Tensor:
    """The tokens `[g, r, width * b, D]` of the blocks `picked` `[g, r, width]` out of each head's `[g, N, b, D]`."""
    g, n, size, dim = blocks.shape
    first = torch.arange(0, g * n, n, dtype=picked.dtype, device=picked.device)[:, None, None]
    out = buffer[: picked.numel()]
    torch.index_select(blocks.view(g * n, size * dim), 0, (picked + first).flatten(), out=out)
    return out.view(*picked.shape[:2], -1, dim)


def padding(picked: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Safe indices and the bias `[g, r, 1, width * b]` that hides the fill of short rows and of a short last block."""
    lengths = blocks.lengths(blocks.k_len, picked.device)
    used = picked >= 0
    picked = torch.where(used, picked, picked[..., :1])  # a block that is exact anyway: no other may be read
    hidden = torch.arange(blocks.size, device=picked.device) >= (lengths[picked] * used)[..., None]
    return picked, torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, MASKED).flatten(2)[:, :, None]


def has_tail(block_map: BlockMap, tail: Tail) -> bool:
    every_block_is_exact = block_map.uniform and block_map.indices.shape[-1] == block_map.n_k
    return tail.name != "drop" and not every_block_is_exact


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
