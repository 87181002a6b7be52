"""Routing: which key blocks a query block computes exactly. A routing is called as `routing(q, k, v, blocks)`.

q, k, v: `[B, H, L, D]`; blocks: `Blocks`; the answer is a `BlockMap`. Scores are fp32 `[B, H, Nq, Nk]`, more is better.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import launch
from .blocks import BlockMap, Blocks
from .crew import Crew

EPSILON = 1e-5  # inside the logarithm of the covariance-aware score, as in the paper


def centroid_scores(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """score_ij = s qbar_i . kbar_j: the logit of the block means (PISA, plain routing)."""
    lists = Blocks(blocks.size * blocks.shared, blocks.q_len, blocks.k_len)
    return lists.mean(q) * scale_of(q, blocks) @ blocks.mean(k).mT


def covariance_scores(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """score_ij = s qbar_i . kbar_j + log(M_j + eps), M_j = |H_j - Hbar|_F (PISA, covariance-aware routing)."""
    return centroid_scores(q, k, v, blocks) + (deviations(k, v, blocks) + EPSILON).log()[:, :, None]


SCORES = {"centroid": centroid_scores, "covariance": covariance_scores}


def scale_of(q: Tensor, blocks: Blocks) -> float:
    return q.shape[-1] ** -0.5 if blocks.scale is None else blocks.scale


def deviations(k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """M_j = |H_j - Hbar|_F, `[B, H, Nk]` fp32, without a D x D matrix per block.

    With kc, vc the keys and values less their block means, H_j = sum_n kc_n^T vc_n, so
    |H_j|^2 = sum_mn (kc_m.kc_n)(vc_m.vc_n) needs two b x b Gram matrices, and <H_j, Hbar> = sum_n (kc_n Hbar).vc_n.
    """
    kc, vc = centred(k, blocks), centred(v, blocks)  # [B, H, N, b, D]
    mean = kc.flatten(2, 3).mT @ vc.flatten(2, 3) / blocks.n_k  # Hbar [B, H, D, D]
    squared = ((kc @ kc.mT) * (vc @ vc.mT)).sum((-1, -2))  # [B, H, N]
    cross = ((kc @ mean[:, :, None]) * vc).sum((-1, -2))
    # The three terms cancel when H_j is close to Hbar; rounding may then leave a small negative number.
    return (squared - 2 * cross + mean.square().sum((-1, -2))[..., None]).clamp(min=0).sqrt()


def centred(x: Tensor, blocks: Blocks) -> Tensor:
    """`[B, H, L, D]` to `[B, H, N, b, D]` fp32, less the block means; zeros fill a short last block."""
    mean = blocks.mean(x).repeat_interleave(blocks.size, dim=2)[:, :, : x.shape[2]]
    short = -x.shape[2] % blocks.size
    return torch.nn.functional.pad(x - mean, (0, 0, 0, short)).unflatten(2, (-1, blocks.size))


def kept_blocks(density: float, n_k: int) -> int:
    """Exact key blocks per query block. The 1e-6 saves a block from 1 - 0.9 < 0.1 in floating point."""
    return max(1, int(density * n_k + 1e-6))


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` best columns of each row; of equal scores the lowest column first, on every device.

    topk promises nothing about ties, so none are left: score and column become one integer key.
    """
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # now integers compare as the floats do
    column = torch.arange(scores.shape[-1], device=scores.device)
    key = (ordered.long() << 32) - column
    return key.topk(count, dim=-1, sorted=False).indices


@dataclass(frozen=True)
class TopK:
    """The best `density` of the key blocks for each query block (PISA, arXiv 2602.01077).

    score: "centroid" (the paper's video runs) or "covariance" (its image runs).
    text_keys_exact: key blocks with text are always exact; they count inside the budget, which grows only to fit them.
    text_rows_dense: query blocks with text compute every key block.
    """

    density: float = 0.125
    score: str = "centroid"
    text_keys_exact: bool = False
    text_rows_dense: bool = False

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.score not in SCORES:
            raise ValueError(f"No score '{self.score}'. Allowed: {', '.join(SCORES)}.")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> BlockMap:
        text = blocks.text_key_blocks() if self.text_keys_exact else slice(0, 0)
        count = max(kept_blocks(self.density, blocks.n_k), text.stop - text.start)
        if torch.compiler.is_compiling():
            facts = blocks.size, scale_of(q, blocks), blocks.shared, self.score, count, text.start, text.stop
            lists = top_k_operator(q, k, v, *facts)
            block_map = BlockMap(*lists, blocks.size, blocks.q_len, blocks.k_len, True, blocks.shared)
        else:
            block_map = self.choose(q, k, v, blocks, count, text)
        return block_map.with_dense_rows(blocks.text_query_blocks()) if self.text_rows_dense else block_map

    def choose(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, count: int, text: slice) -> BlockMap:
        """The `count` best key blocks of each query block, text among them."""
        how = self.by_kernels if launch.can_route(q, blocks, self.score == "covariance") else self.by_torch
        return how(q, k, v, blocks, count, text)

    def by_torch(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, count: int, text: slice) -> BlockMap:
        """The definition, on every device."""
        lists = q.new_empty(*q.shape[:2], -(-blocks.n_q // blocks.shared), count, dtype=torch.int64)

        def choose(parts: list[slice]) -> None:
            for heads in parts:
                scores = SCORES[self.score](q[:, heads], k[:, heads], v[:, heads], blocks)
                scores[..., text] = torch.inf
                lists[:, heads] = best(scores, count)

        with Crew.called(q.device) as crew:
            crew.share(choose, crew.cut(q.shape[1]))
            return BlockMap.from_indices(lists, blocks)

    def by_kernels(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, count: int, text: slice) -> BlockMap:
        """The same in two launches (covariance: four) and without the matrix of scores, where `launch` can."""
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        bias = summary = None
        if self.score == "covariance":
            summary = launch.summarise(k, v, blocks.size, first_order=True)
            kbar, bias = launch.deviations(k, v, summary.slope, blocks.size, EPSILON)
        elif blocks.tail in ("zeroth", "hybrid"):  # it reads the keys as well: once for both
            kbar = k.new_empty(k.shape[0] * k.shape[1], blocks.n_k, k.shape[3], dtype=torch.float32)
            summary = launch.summarise(k, v, blocks.size, blocks.tail == "hybrid", kbar)
        else:
            kbar = launch.means(k, blocks.size)
        rows = blocks.size * blocks.shared
        counts, indices, bits = launch.select(q, kbar, bias, rows, count, text, scale_of(q, blocks))
        return BlockMap.from_sorted(counts, indices, blocks, bits, summary)


@dataclass(frozen=True)
class RandomTopK:
    """As many blocks as TopK, drawn uniformly: the control that shows what choosing is worth.

    The draw depends on the seed and the shape alone: the same blocks on every device, layer and step.
    """

    density: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> BlockMap:
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(*q.shape[:2], -(-blocks.n_q // blocks.shared), blocks.n_k, generator=generator)
        return BlockMap.from_indices(best(scores, kept_blocks(self.density, blocks.n_k)).to(q.device), blocks)


def check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(
            f"density must be in (0, 1], got {density}: it is the fraction of key blocks computed exactly; 1 is dense."
        )


@torch.library.custom_op("pisa::top_k", mutates_args=())
def top_k_operator(
    q: Tensor, k: Tensor, v: Tensor, size: int, scale: float, shared: int, score: str, count: int,
    text_start: int, text_stop: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`TopK.choose` as torch.compile sees it: counts and indices of the map."""
    blocks = Blocks(size, q.shape[2], k.shape[2], None, scale, shared)
    found = TopK(score=score).choose(q, k, v, blocks, count, slice(text_start, text_stop))
    return found.counts.contiguous(), found.indices.contiguous()


@top_k_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, size: int, scale: float, shared: int, score: str, count: int, *_: int):
    rows = *q.shape[:2], -(-q.shape[2] // size)
    return q.new_empty(rows, dtype=torch.int32), q.new_empty(*rows, count, dtype=torch.int32)
