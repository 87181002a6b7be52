"""Keep or drop: the best key blocks exact, the others forgotten. Order raster, routing TopK, tail drop.

It is plain block-sparse attention, and PISA with its idea taken out: same blocks, same engine, no tail. The distance
between the two on one block map is what the tail is worth; without this row nobody can tell it from good routing.
"""

from pisa import SparseAttention
from pisa.orders import Raster
from pisa.routing import TopK


def block_topk(density: float = 0.125, order=None, block_size: int = 64, engine: str = "auto") -> SparseAttention:
    """Top-k block-sparse attention of that density, in raster order unless `order` is given."""
    return SparseAttention(order or Raster(), TopK(density), "drop", engine, block_size)
