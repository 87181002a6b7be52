"""What every method owes, whatever its paper. Methods are found in conf/method: a new one is tested by its config.

Beside each method's usual routing stand the others that bear its name (conf/method/routing/NAME_*.yaml).
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from harness.config import Composer, build, options
from pisa import Grid, SparseAttention, attend, reference
from pisa.orders import inverse
from tests.pisa.cases import normal, relative_l2

SIZE = 16
METHODS = [name for name in options("method") if name != "dense"]
ROUTINGS = [(m, r) for m in METHODS for r in (None, *options("method/routing")) if r is None or r.startswith(f"{m}_")]
GRIDS = {
    "whole": Grid(4, 8, 8),
    "ragged": Grid(3, 5, 7, text=13),
    "text first": Grid(2, 6, 10, text=20, text_first=True),
    "one block": Grid(1, 4, 4),
    "one frame": Grid(1, 9, 9),
}
methods = pytest.mark.parametrize("method", METHODS)
routings = pytest.mark.parametrize(("method", "routing"), ROUTINGS, ids=lambda x: x or "usual")
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


@pytest.fixture(scope="module")
def composer():
    return Composer()


def built(composer: Composer, method: str, sparsity: float, routing: str | None = None, **settings) -> SparseAttention:
    """The method as a sweep builds it, in blocks of 16; two share a list where the config lets blocks share one."""
    axes = {f"method/{axis}": value for axis, value in (("routing", routing), ("tail", settings.get("tail"))) if value}
    cell = {"method": method, **axes, "sparsity": str(sparsity), "method.block_size": str(SIZE)}
    if composer.compose([("method", method)]).config["method"].get("block_q"):
        cell["method.block_q"] = str(2 * SIZE)
    return build(composer.compose(cell.items()).config["method"])


def tensors(grid: Grid, batch: int = 2, dim: int = 32) -> list[torch.Tensor]:
    """q, k, v of heads that differ: one flat, one peaked, keys with a common mean."""
    q, k, v = (normal(batch, 2, grid.tokens, dim) for _ in range(3))
    return [q * torch.tensor([0.3, 3.0], device=q.device)[:, None, None], k + normal(batch, 2, 1, dim), v]


def permuted(method: SparseAttention, grid: Grid, *x: torch.Tensor) -> list[torch.Tensor]:
    permutation = method.order(x[0], x[0], grid)
    return list(x) if permutation is None else [y[:, :, permutation] for y in x]


@grids
@methods
def test_at_density_1_it_is_dense_attention(composer, method, grid, seed):
    q, k, v = tensors(grid)
    attention = built(composer, method, 0)
    assert relative_l2(attention(q, k, v, grid), reference.dense(q, k, v)[0]) < 1e-5
    assert attention.last.density == 1


@grids
@routings
@pytest.mark.parametrize("tail", ["drop", "hybrid"])
def test_it_is_what_its_block_map_says(composer, method, routing, grid, tail, seed):
    """The map is legal, and the output, back in the model's order, is the definition on that map."""
    q, k, v = tensors(grid)
    attention = built(composer, method, 0.7, routing, tail=tail)
    o, block_map = attention(q, k, v, grid), attention.last.block_map.validate()
    q, k, v, o = permuted(attention, grid, q, k, v, o)
    assert relative_l2(o, reference.attend(q, k, v, block_map, tail)[0]) < 1e-5
    if tail == "drop":
        by_key = block_map.to_mask().repeat_interleave(SIZE, 3)[..., : grid.tokens]
        mask = by_key.repeat_interleave(SIZE, 2)[:, :, : grid.tokens]
        assert relative_l2(o, scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)) < 1e-5


@routings
def test_keys_outside_the_map_are_not_read(composer, method, routing, seed):
    """NaN in the key blocks that one list leaves out does not reach its queries."""
    grid = GRIDS["ragged"]
    q, k, v = tensors(grid, batch=1)
    attention = built(composer, method, 0.7, routing, tail="drop")
    attention(q, k, v, grid)
    block_map, (q, k, v) = attention.last.block_map, permuted(attention, grid, q, k, v)
    clean = attend(q, k, v, block_map, "drop")[0]
    assert routing is not None or attention.last.density < 0.9  # there is something to poison
    tokens = torch.arange(grid.tokens, device=q.device) // SIZE
    for i in range(block_map.counts.shape[2]):
        for head, kept in enumerate(block_map.to_mask()[0, :, i]):
            dead, alive = ~kept[tokens], tokens == i
            bad_k, bad_v = k.clone(), v.clone()
            bad_k[:, head, dead], bad_v[:, head, dead] = torch.nan, torch.nan
            o = attend(q, bad_k, bad_v, block_map, "drop")[0]
            assert torch.equal(o[:, head, alive], clean[:, head, alive])


@grids
@methods
def test_its_order_comes_back(composer, method, grid, seed):
    permutation = built(composer, method, 0.7).order(*tensors(grid)[:2], grid)
    if permutation is not None:
        numbers = torch.arange(grid.tokens, device=permutation.device)
        assert torch.equal(permutation.sort().values, numbers)
        assert torch.equal(permutation[inverse(permutation)], numbers)


@methods
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_the_density_is_what_was_asked_for(composer, method, sparsity, seed):
    grid = Grid(16, 8, 8)
    q, k, v = tensors(grid)
    attention = built(composer, method, sparsity)
    attention(q, k, v, grid)
    assert attention.last.density == pytest.approx(1 - sparsity, abs=0.01)
