"""Attention as torch.compile sees it inside a session: one operator without an inside, so that every block of a model
compiles to the same graph (fullgraph), whatever its layer, the step and the method are."""

from typing import Any

import torch
from torch import Tensor

RUNNING: list[Any] = []  # sessions that were entered and not left; a call belongs to the newest


@torch.library.custom_op("harness::attention", mutates_args=())
def attention_operator(q: Tensor, k: Tensor, v: Tensor, layer: Tensor, text: int) -> Tensor:
    """`Session.attention` of the running session, `[B, L, H, D]`; text: tokens of text, -1 for what the grid says.

    layer: a 0-dim tensor on the CPU, since a graph would be compiled anew for every number.
    """
    o = RUNNING[-1].attention(layer, q, k, v, None if text < 0 else text)
    fresh = o.is_contiguous() and o.data_ptr() not in {x.data_ptr() for x in (q, k, v)}
    return o if fresh else o.clone(memory_format=torch.contiguous_format)


@attention_operator.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)
