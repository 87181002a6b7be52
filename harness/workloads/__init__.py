"""What a cell measures. Each workload has two functions.

`reference(model, run)` computes densely what its methods are compared with: (record columns, tensors to keep).
`measure(model, run, reference)` computes the same with run.method (None: dense by run.dense) and compares.
"""

from dataclasses import dataclass
from typing import Any

from baselines.dense import Dense


@dataclass(frozen=True)
class Run:
    """One cell's part that a workload needs: how attention is computed, and for which sample."""

    method: Any  # pisa.SparseAttention or a class with the same call; None is dense attention
    dense: Dense
    seed: int
    prompt: str | None
    device: str
    metrics: Any = None  # harness.metrics.Protocol
