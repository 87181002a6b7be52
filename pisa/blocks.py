"""How tokens are cut into blocks, and which key blocks a query block computes exactly.

B batch, H heads, L tokens, D head_dim, N blocks, b block size. The last block may be short.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Where the tokens of one sample sit: frames x height x width video tokens, text tokens before or after them."""

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1 or self.text < 0:
            raise ValueError(f"A grid needs frames, height and width of at least 1 and text of at least 0, got {self}.")

    @property
    def video(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        return self.video + self.text


@dataclass(frozen=True)
class Blocks:
    """The cut of `q_len` query and `k_len` key tokens into blocks of `size`; what a routing needs beside q, k and v.

    grid: token grid, for routings that look at positions or at text; None when nobody said.
    scale: softmax scale s; None means 1 / sqrt(D).
    shared: query blocks, one after the other, that are to have one list of key blocks.
    tail: name of the tail to come, for a routing that can prepare it; None when nobody said.
    """

    size: int
    q_len: int
    k_len: int
    grid: Grid | None = None
    scale: float | None = None
    shared: int = 1
    tail: str | None = None

    @property
    def n_q(self) -> int:
        return -(-self.q_len // self.size)

    @property
    def n_k(self) -> int:
        return -(-self.k_len // self.size)

    def lengths(self, tokens: int, device: torch.device | str | None = None) -> Tensor:
        """Tokens in each block, `[N]` int64: `size` everywhere but perhaps in the last block."""
        starts = torch.arange(0, tokens, self.size, device=device)
        return (tokens - starts).clamp(max=self.size)

    def sum(self, x: Tensor) -> Tensor:
        """Block sums: `[B, H, L, D]` to `[B, H, N, D]`, fp32."""
        whole = x.shape[2] // self.size
        body, rest = x[:, :, : whole * self.size], x[:, :, whole * self.size :]
        sums = body.unflatten(2, (whole, self.size)).sum(3, dtype=torch.float32)  # a view: nothing is padded or copied
        return torch.cat([sums, rest.sum(2, keepdim=True, dtype=torch.float32)], 2) if rest.shape[2] else sums

    def mean(self, x: Tensor) -> Tensor:
        """Block means: `[B, H, L, D]` to `[B, H, N, D]`, fp32."""
        return self.sum(x) / self.lengths(x.shape[2], x.device)[:, None]

    def text_query_blocks(self) -> slice:
        """Query blocks that hold a text token (empty without a grid or without text)."""
        return self._text(self.q_len)

    def text_key_blocks(self) -> slice:
        """Key blocks that hold a text token (empty without a grid or without text)."""
        return self._text(self.k_len)

    def _text(self, tokens: int) -> slice:
        if self.grid is None or self.grid.text == 0:
            return slice(0, 0)
        if self.grid.text_first:
            return slice(0, -(-self.grid.text // self.size))
        return slice((tokens - self.grid.text) // self.size, -(-tokens // self.size))


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The answer of a routing: for every query block the key blocks that it computes exactly.

    counts: `[B, H, Nq]` int32, how many, at least 1.
    indices: `[B, H, Nq, width]` int32, which: ascending in the first `counts` entries, -1 after them.
    uniform: the maker knows that every count equals `width`, so that an engine may skip its masks without asking
    the device. False is always safe.
    shared: the maker knows that query blocks 0 to shared - 1 have one list, the next `shared` another, and so on, so
    that an engine may walk it once for all of them. 1 is always safe.
    bits, summary: what pisa.launch needs beside the map, where its maker has made them on the way (see there).
    """

    counts: Tensor
    indices: Tensor
    block_size: int
    q_len: int
    k_len: int
    uniform: bool = False
    shared: int = 1
    bits: Tensor | None = None
    summary: object | None = None

    @property
    def n_k(self) -> int:
        return -(-self.k_len // self.block_size)

    @property
    def known_full(self) -> bool:
        """Every key block is exact in every row, and the maker said so: nothing is left for a tail."""
        return self.uniform and self.indices.shape[-1] == self.n_k

    @classmethod
    def from_indices(cls, indices: Tensor, blocks: Blocks) -> "BlockMap":
        """The uniform map of `indices` `[B, H, Nq, width]`: distinct key blocks in any order. Never synchronises.

        With blocks.shared, of one list for each run of query blocks, `[B, H, ceil(Nq / shared), width]`.
        """
        indices = indices.sort(dim=-1).values.to(torch.int32)
        return cls.from_sorted(torch.full_like(indices[..., 0], indices.shape[-1]), indices, blocks)

    @classmethod
    def from_sorted(
        cls,
        counts: Tensor,
        indices: Tensor,
        blocks: Blocks,
        bits: Tensor | None = None,
        summary: object | None = None,
    ) -> "BlockMap":
        """`from_indices` of int32 lists that ascend already, with their counts, all equal to the width."""
        lists = (counts, indices) if bits is None else (counts, indices, bits)
        if blocks.shared > 1:
            lists = tuple(x.repeat_interleave(blocks.shared, 2)[:, :, : blocks.n_q].contiguous() for x in lists)
        counts, indices, bits = lists if len(lists) == 3 else (*lists, None)
        return cls(counts, indices, blocks.size, blocks.q_len, blocks.k_len, True, blocks.shared, bits, summary)

    @classmethod
    def from_mask(cls, mask: Tensor, blocks: Blocks) -> "BlockMap":
        """The map of `mask` `[B, H, Nq, Nk]`, True where exact. Synchronises once, for the longest row."""
        counts = mask.sum(-1, dtype=torch.int32)
        width, least = int(counts.max()), int(counts.min())
        order = mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :width]  # ascending
        indices = torch.where(torch.arange(width, device=mask.device) < counts[..., None], order, -1).to(torch.int32)
        return cls(counts, indices, blocks.size, blocks.q_len, blocks.k_len, uniform=width == least)

    def to_mask(self) -> Tensor:
        """`[B, H, Nq, Nk]` bool, True where the block is computed exactly."""
        column = torch.where(self.indices < 0, self.n_k, self.indices).long()  # the fill goes to a spare column
        mask = torch.zeros(*self.counts.shape, self.n_k + 1, dtype=torch.bool, device=self.counts.device)
        return mask.scatter_(-1, column, True)[..., : self.n_k]

    def density(self) -> float:
        """Realised density: the mean over batch, heads and query blocks of counts / Nk. Synchronises unless uniform."""
        if self.uniform:
            return self.indices.shape[-1] / self.n_k
        return self.counts.double().mean().item() / self.n_k

    def with_dense_rows(self, rows: slice) -> "BlockMap":
        """The same map with every key block exact in the query blocks `rows` (text queries). Never synchronises."""
        if not range(self.counts.shape[2])[rows]:
            return self
        counts, spare = self.counts.clone(), self.n_k - self.indices.shape[-1]
        indices = torch.nn.functional.pad(self.indices, (0, spare), value=-1)
        counts[:, :, rows] = self.n_k
        indices[:, :, rows] = torch.arange(self.n_k, dtype=torch.int32, device=indices.device)
        return BlockMap(counts, indices, self.block_size, self.q_len, self.k_len, self.uniform and spare == 0)

    def with_blocks(self, columns: slice) -> "BlockMap":
        """The same map with the key blocks `columns` exact in every row (text keys). Synchronises once."""
        if not range(self.n_k)[columns]:
            return self
        mask = self.to_mask()
        mask[..., columns] = True
        return BlockMap.from_mask(mask, Blocks(self.block_size, self.q_len, self.k_len))

    def validate(self) -> "BlockMap":
        """This map, checked. Synchronises. Raises ValueError with the first rule of the class that is broken."""
        counts, indices = self.counts, self.indices
        n_q = -(-self.q_len // self.block_size)
        if indices.ndim != 4 or counts.shape != indices.shape[:3] or counts.shape[2] != n_q:
            raise ValueError(
                f"A block map for {n_q} query blocks needs counts [B, H, {n_q}] and indices [B, H, {n_q}, width], "
                f"got {list(counts.shape)} and {list(indices.shape)}."
            )
        if counts.dtype != torch.int32 or indices.dtype != torch.int32:
            raise ValueError(f"Counts and indices must be int32, got {counts.dtype} and {indices.dtype}.")
        width = indices.shape[-1]
        if not ((counts >= 1) & (counts <= width)).all():
            raise ValueError(
                f"Every count must be in [1, {width}], the width of the indices, got {int(counts.min())} to "
                f"{int(counts.max())}: a query block needs at least one exact key block."
            )
        used = torch.arange(width, device=indices.device) < counts[..., None]
        if not ((indices >= 0) & (indices < self.n_k))[used].all():
            raise ValueError(f"Every used index must be a key block in [0, {self.n_k}): check k_len and block_size.")
        if not (indices[..., 1:] > indices[..., :-1])[used[..., 1:]].all():
            raise ValueError("The used indices of a row must be strictly ascending: sort them, and drop duplicates.")
        if not (indices[~used] == -1).all():
            raise ValueError("Indices after the first `counts` entries of a row must be -1.")
        if self.uniform and not (counts == width).all():
            raise ValueError(f"The map says uniform, but some counts differ from the width {width}.")
        first = torch.arange(n_q, device=counts.device) // self.shared * self.shared
        if not (counts == counts[:, :, first]).all() or not (indices == indices[:, :, first]).all():
            raise ValueError(f"The map says that {self.shared} query blocks share a list, but some lists differ.")
        return self
