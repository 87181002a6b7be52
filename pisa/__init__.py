"""Piecewise sparse attention for diffusion transformers (PISA, arXiv 2602.01077).

Legend, used in every shape comment: B batch, H heads, L tokens (Lq queries, Lk keys), D head_dim, N blocks (Nq, Nk),
b block size. Density is the fraction of key blocks computed exactly; sparsity is 1 - density.
Read attention.py first, then blocks.py, routing.py, tail.py and reference.py, which is the definition.
"""

from .attention import Routed, SparseAttention, attend, piecewise_sparse_attention
from .blocks import BlockMap, Blocks, Grid
from .tail import Tail

__all__ = [
    "BlockMap",
    "Blocks",
    "Grid",
    "Routed",
    "SparseAttention",
    "Tail",
    "attend",
    "piecewise_sparse_attention",
]
