"""The definition of piecewise sparse attention (PISA, arXiv 2602.01077) in float64: slow, obvious, the judge.

Letters follow the paper. For query block i: S the key blocks computed exactly, U the others. For key block j:
n_j tokens, kbar_j and vbar_j means, H_j = sum_n (k_n - kbar_j)^T v_n. s is the softmax scale, 1 / sqrt(D) by default.
Engines and routings share no code with this file.
"""

import torch
from torch import Tensor

from .blocks import BlockMap
from .tail import Tail


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention in float64: output `[B, H, Lq, D]` and natural-log normaliser `[B, H, Lq]`."""
    s = q.shape[-1] ** -0.5 if scale is None else scale
    logits = s * q.double() @ k.double().mT
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, block_map: BlockMap, tail: str | Tail = "hybrid", scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention with the blocks of `block_map` exact and the others by `tail`, in float64.

    q: `[B, H, Lq, D]`; k, v: `[B, H, Lk, D]`. Returns the output `[B, H, Lq, D]` and the natural logarithm of the
    normaliser `[B, H, Lq]`, tail mass included.
    """
    q, k, v = q.double(), k.double(), v.double()
    s, tail = q.shape[-1] ** -0.5 if scale is None else scale, Tail.of(tail).name
    o, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = k[b, h].split(block_map.block_size), v[b, h].split(block_map.block_size)
            start = 0
            for i, queries in enumerate(q[b, h].split(block_map.block_size)):
                exact = block_map.indices[b, h, i, : block_map.counts[b, h, i]].tolist()  # S
                rows = slice(start, start + len(queries))
                o[b, h, rows], lse[b, h, rows] = attend_block(queries, keys, values, exact, tail, s)
                start += len(queries)
    return o, lse


def attend_block(
    q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], exact: list[int], tail: str, s: float
) -> tuple[Tensor, Tensor]:
    """One query block q `[n, D]` of one head against the key blocks `keys[j]`, `values[j]`, each `[n_j, D]`."""
    rest = [j for j in range(len(keys)) if j not in exact] if tail != "drop" else []  # U
    kbar = [block.mean(0) for block in keys]
    H = [(keys[j] - kbar[j]).T @ values[j] for j in range(len(keys))] if tail in ("blockwise_first", "hybrid") else []

    exact_logits = [s * q @ keys[j].T for j in exact]  # [n, n_j]
    tail_logits = [s * q @ kbar[j] for j in rest]  # [n]
    m = torch.stack([x.amax(1) for x in exact_logits] + tail_logits).amax(0)  # one maximum, so that exp() stays finite

    numerator, denominator = torch.zeros_like(q), torch.zeros_like(m)
    for j, logits in zip(exact, exact_logits, strict=True):
        p = (logits - m[:, None]).exp()
        numerator += p @ values[j]
        denominator += p.sum(1)
    tail_mass = torch.zeros_like(m)
    for j, logits in zip(rest, tail_logits, strict=True):
        p = (logits - m).exp()
        numerator += p[:, None] * values[j].sum(0)
        if tail == "blockwise_first":
            numerator += p[:, None] * (s * q @ H[j])  # its term in the denominator is exactly zero
        tail_mass += p * len(keys[j])
    if tail == "hybrid":  # tail_mass * sum(H) / L equals (sum of p) * Hbar, and is also right for a short last block
        numerator += tail_mass[:, None] * (s * q @ sum(H)) / sum(len(block) for block in keys)
    denominator += tail_mass
    return numerator / denominator[:, None], m + denominator.log()


def centroid_scores(q: Tensor, k: Tensor, block_size: int, scale: float | None = None) -> Tensor:
    """s qbar_i . kbar_j, `[B, H, Nq, Nk]` float64."""
    s = q.shape[-1] ** -0.5 if scale is None else scale
    qbar = torch.stack([block.mean(2) for block in q.double().split(block_size, 2)], 2)
    kbar = torch.stack([block.mean(2) for block in k.double().split(block_size, 2)], 2)
    return s * qbar @ kbar.mT


def covariance_scores(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float | None = None, epsilon: float = 1e-5
) -> Tensor:
    """s qbar_i . kbar_j + log(M_j + epsilon) with M_j = |H_j - Hbar|_F, `[B, H, Nq, Nk]` float64."""
    pairs = zip(k.double().split(block_size, 2), v.double().split(block_size, 2), strict=True)
    H = torch.stack([(keys - keys.mean(2, keepdim=True)).mT @ values for keys, values in pairs], 2)  # [B, H, Nk, D, D]
    M = (H - H.mean(2, keepdim=True)).norm(dim=(-1, -2))
    return centroid_scores(q, k, block_size, scale) + (M + epsilon).log()[:, :, None]


def top_k(scores: Tensor, density: float) -> list[list[list[list[int]]]]:
    """For every batch, head and query block the ascending list of its exact key blocks; ties go to the lower block."""
    count = max(1, int(density * scores.shape[-1] + 1e-6))

    def best(row: list[float]) -> list[int]:
        return sorted(sorted(range(len(row)), key=lambda j: (-row[j], j))[:count])

    return [[[best(row) for row in head] for head in sample] for sample in scores.tolist()]
