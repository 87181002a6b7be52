"""Keep or drop is PISA without its tail, on the same blocks."""

import torch

from baselines.block_topk import block_topk
from pisa import Grid, SparseAttention, reference
from pisa.orders import Tile2D
from pisa.routing import TopK
from tests.pisa.cases import normal, relative_l2


def test_same_blocks_as_pisa_and_no_tail(seed):
    grid = Grid(2, 8, 8)
    q, k, v = (normal(1, 2, grid.tokens, 32) for _ in range(3))
    drop, pisa = block_topk(0.25, Tile2D(4, 4), block_size=16), SparseAttention(Tile2D(4, 4), TopK(0.25), block_size=16)
    o = drop(q, k, v, grid)
    pisa(q, k, v, grid)
    assert torch.equal(drop.last.block_map.indices, pisa.last.block_map.indices)
    permutation = Tile2D(4, 4)(q, k, grid)
    truth, _ = reference.attend(*(x[:, :, permutation] for x in (q, k, v)), drop.last.block_map, "drop")
    assert relative_l2(o[:, :, permutation], truth) < 1e-5
