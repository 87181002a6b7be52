"""The eager engine: plain torch on any device. It gathers the selected blocks of a few query blocks at a time.

Exact part and tail are two small attentions, each with its log-sum-exp, merged at the end; so the tail, an empty one
too, has the right mass whatever its logits are. In memory: one chunk of query blocks, never an L x L matrix, and never
a D x D matrix for every block. Nothing asks the device for a number unless the counts of the map differ.
G = B * H heads of the whole batch; g heads and r query blocks make a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import BlockMap, Blocks
from ..crew import Crew
from ..tail import Tail
from .softmax import MASKED, attention, merge_

Parts = list[tuple[slice, slice]]  # (heads, query blocks) of each chunk
GATHERED_BYTES_CPU = 2 << 20  # what a chunk of the exact part gathers: it stays in the caches
TAIL_BYTES_CPU = 32 << 20  # a chunk of the tail: from 192 query blocks on, torch's kernel takes larger tiles
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
    with Crew.called(q.device) as crew:
        queries, keys, values = (cut(x, blocks.size) for x in (q, k, v))  # [G, N, b, D]
        o, lse = exact(queries, keys, values, block_map, blocks, scale, crew)
        if tail.name != "drop" and not block_map.known_full:
            rest = Rest.of(keys, values, block_map, blocks, tail, scale, crew)
            add_tail(o, lse, queries, rest, crew)
    return uncut(o, q), uncut(lse, q)


def add_tail(o: Tensor, lse: Tensor, queries: Tensor, rest: "Rest", crew: Crew) -> None:
    """Merges the tail of every query block into the exact part's o and lse."""
    in_memory = queries.device.type != "cpu" or rest.slopes is not None  # the logits; torch's CPU kernel never has them
    logits = rest.keys.shape[2] if in_memory else 0
    size, dim = queries.shape[2:]
    cost = 4 * size * (logits + 3 * dim)  # fp32: logits, queries, two outputs

    def add(parts: Parts) -> None:
        for part in parts:
            merge_(o[part], lse[part], *rest(queries[part], *part))

    share = cost * queries.shape[0] * queries.shape[1] // crew.size  # or some threads would have no chunk
    crew.share(add, list(chunks(queries, [cost] * queries.shape[1], min(TAIL_BYTES_CPU, share))))


def cut(x: Tensor, size: int) -> Tensor:
    """`[B, H, L, D]` to contiguous `[G, N, b, D]`; zeros fill a short last block."""
    short = -x.shape[2] % size
    x = torch.nn.functional.pad(x, (0, 0, 0, short)) if short else x
    return x.unflatten(2, (-1, size)).flatten(0, 1).contiguous()


def uncut(x: Tensor, like: Tensor) -> Tensor:
    """`[G, N, b, ...]` back to `[B, H, L, ...]`, B, H and L as in `like`."""
    return x.flatten(1, 2).unflatten(0, like.shape[:2])[:, :, : like.shape[2]]


def chunks(queries: Tensor, costs: list[int], on_cpu: int) -> Iterator[tuple[slice, slice]]:
    """(heads, query blocks) of each chunk; costs: bytes that each query block takes, all of a chunk as the dearest.

    on_cpu: the bytes of a chunk on a CPU.
    """
    budget = on_cpu if queries.device.type == "cpu" else CHUNK_BYTES
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
    queries: Tensor, keys: Tensor, values: Tensor, block_map: BlockMap, blocks: Blocks, scale: float, crew: Crew
) -> tuple[Tensor, Tensor]:
    """Attention of every query block to its own key blocks: o `[G, Nq, b, D]`, lse `[G, Nq, b]` fp32."""
    o = torch.empty_like(queries)
    lse = torch.empty(queries.shape[:3], dtype=torch.float32, device=queries.device)
    indices = block_map.indices.flatten(0, 1)  # [G, Nq, width]
    widths = [indices.shape[-1]] * blocks.n_q if block_map.uniform else block_map.counts.amax((0, 1)).tolist()
    parts = list(chunks(queries, [2 * keys[0, 0].nbytes * width for width in widths], GATHERED_BYTES_CPU))
    most = max((heads.stop - heads.start) * (rows.stop - rows.start) * max(widths[rows]) for heads, rows in parts)
    full = block_map.uniform and blocks.k_len % blocks.size == 0
    # Blocks numbered through all heads, once: K and V of every chunk are then picked with the same numbers.
    head = torch.arange(0, len(keys) * blocks.n_k, blocks.n_k, dtype=indices.dtype, device=indices.device)
    numbers = torch.where(indices < 0, indices[..., :1], indices) + head[:, None, None]  # fill: a block that is exact
    tables = [x.view(-1, blocks.size * x.shape[3]) for x in (keys, values)]  # [G * Nk, b * D]

    def attend_to_own(parts: Parts) -> None:
        # One buffer for all chunks: the page faults of fresh ones cost a CPU a fifth.
        buffers = keys.new_empty(2, most, blocks.size * keys.shape[3])
        for heads, rows in parts:
            q, width = queries[heads, rows], max(widths[rows])
            picked = numbers[heads, rows, :width].flatten()
            k, v = (gather(*x, picked).view(*q.shape[:2], -1, q.shape[3]) for x in zip(tables, buffers, strict=True))
            bias = None if full else padding(indices[heads, rows, :width], blocks)
            o[heads, rows], lse[heads, rows] = attention(q, k, v, bias, scale)

    crew.share(attend_to_own, parts)
    return o, lse


def gather(table: Tensor, buffer: Tensor, picked: Tensor) -> Tensor:
    """The rows `picked` of `table`, in the first rows of `buffer`."""
    return torch.index_select(table, 0, picked, out=buffer[: len(picked)])


def padding(picked: Tensor, blocks: Blocks) -> Tensor:
    """The bias `[g, r, 1, width * b]` that hides the fill of short rows and of a short last block."""
    lengths = blocks.lengths(blocks.k_len, picked.device)
    hidden = (
        torch.arange(blocks.size, device=picked.device) >= (lengths[picked.clamp(min=0)] * (picked >= 0))[..., None]
    )
    return torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, MASKED).flatten(2)[:, :, None]


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
    def of(
        cls, keys: Tensor, values: Tensor, block_map: BlockMap, blocks: Blocks, tail: Tail, scale: float, crew: Crew
    ) -> "Rest":
        lengths = blocks.lengths(blocks.k_len, keys.device)[:, None]
        kbar, vbar, slope = statistics(keys, values, lengths, tail.name == "hybrid", crew)
        bias = torch.where(block_map.to_mask().flatten(0, 1), MASKED, lengths.squeeze(1).log())
        slopes = None
        if slope is not None:
            slope *= scale / blocks.k_len
        if tail.name == "blockwise_first":  # fp32; the fill of a short block meets values of zero
            slopes = (keys - kbar[:, :, None]) * (scale / lengths[:, None]), values.float()
        return cls(kbar[:, None], vbar[:, None], bias, slope, slopes, scale)

    def __call__(self, q: Tensor, heads: slice, rows: slice) -> tuple[Tensor, Tensor]:
        q, bias = q.float(), self.bias[heads, None, rows]  # [g, r, b, D], [g, 1, r, Nk]
        # The n-th tokens of all query blocks make one attention, in whose bias nothing repeats: long tiles, small bias.
        keys, values = (x[heads].expand(-1, q.shape[2], -1, -1) for x in (self.keys, self.values))
        o, lse = (x.transpose(1, 2) for x in attention(q.transpose(1, 2), keys, values, bias, self.scale))
        if self.slope is not None:
            o = o.flatten(1, 2).baddbmm_(q.flatten(1, 2), self.slope[heads]).view_as(q)
        if self.slopes is not None:
            p = (q @ self.keys[heads].mT * self.scale + bias.transpose(1, 2) - lse[..., None]).exp()  # [g, r, b, Nk]
            for j, (k, v) in enumerate(zip(*(x[heads].unbind(1) for x in self.slopes), strict=True)):
                o = o + p[..., j, None] * (q @ (k.mT @ v)[:, None])  # one H_j at a time
        return o, lse


def statistics(
    keys: Tensor, values: Tensor, lengths: Tensor, first_order: bool, crew: Crew
) -> tuple[Tensor, Tensor, Tensor | None]:
    """kbar, vbar `[G, Nk, D]` and, if first_order, sum_j H_j `[G, D, D]`, all fp32; lengths: n_j `[Nk, 1]`.

    Centring before the product keeps keys with a large mean exact.
    """
    groups, n, _, dim = keys.shape
    kbar, vbar = (keys.new_empty(groups, n, dim, dtype=torch.float32) for _ in range(2))
    slope = torch.zeros(groups, dim, dim, device=keys.device) if first_order else None
    on_cpu = keys.device.type == "cpu"
    few = 32 if on_cpu else n  # blocks at a time: they and the centred keys stay in the caches

    def add(parts: list[slice]) -> None:
        for heads in parts:
            tensors = (x[heads].split(few, dim=1) for x in (keys, values, kbar, vbar))
            for k, v, k_mean, v_mean, count in zip(*tensors, lengths.split(few), strict=True):
                for x, mean in ((k, k_mean), (v, v_mean)):
                    torch.sum(x, 2, dtype=torch.float32, out=mean).div_(count)
                if slope is not None:
                    slope[heads].baddbmm_((k - k_mean[:, :, None]).flatten(1, 2).mT, v.float().flatten(1, 2))

    crew.share(add, crew.cut(groups))
    return kbar, vbar, slope
