"""Random attention problems, and how far two answers are apart."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pisa import BlockMap, Blocks
from pisa.tail import TAILS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Blocks
    block_map: BlockMap
    tail: str

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def normal(batch: int, heads: int, tokens: int, dim: int, dtype=torch.float32, strided=False, device=DEVICE) -> Tensor:
    """`[B, H, L, D]` of normal numbers; strided: heads inside tokens, as projections leave them."""
    shape = (batch, tokens, heads, dim) if strided else (batch, heads, tokens, dim)
    x = torch.randn(shape).to(device, dtype)
    return x.transpose(1, 2) if strided else x


def random_map(batch: int, heads: int, blocks: Blocks, uniform: bool, device=DEVICE) -> BlockMap:
    """Any legal map: equal counts, or every count from one block to all of them."""
    shape = batch, heads, blocks.n_q, blocks.n_k
    score = torch.rand(shape, device=device)
    rank = score.argsort(-1, descending=True).argsort(-1)
    count = torch.randint(1, blocks.n_k + 1, () if uniform else shape[:3], device=device)
    return BlockMap.from_mask(rank < count[..., None], blocks).validate()


@st.composite
def cases(draw, dtypes=DTYPES, tails=tuple(TAILS)) -> Case:
    """Ragged lengths, one block, other key than query lengths, every head_dim, strides, equal and varying counts."""
    torch.manual_seed(draw(st.integers(0, 2**31 - 1), label="seed"))
    size = draw(st.sampled_from((16, 32, 64)), label="block_size")
    q_len, k_len = (draw(st.integers(1, 5 * size), label=name) for name in ("q_len", "k_len"))
    batch, heads = draw(st.integers(1, 2), label="batch"), draw(st.integers(1, 2), label="heads")
    dim, dtype = draw(st.sampled_from((32, 64, 96, 128))), draw(st.sampled_from(dtypes))
    strided, uniform = draw(st.booleans(), label="strided"), draw(st.booleans(), label="uniform")
    blocks = Blocks(size, q_len, k_len)
    q, k, v = (normal(batch, heads, n, dim, dtype, strided) for n in (q_len, k_len, k_len))
    return Case(q, k, v, blocks, random_map(batch, heads, blocks, uniform), draw(st.sampled_from(tails)))


def relative_l2(answer: Tensor, truth: Tensor) -> float:
    """The error's norm over the truth's norm, in float64; NaN compares as an error wherever it is asserted on."""
    truth = truth.double()
    return ((answer.double() - truth).norm() / truth.norm()).item()


class Largest(TorchDispatchMode):
    """Inside `with Largest() as largest:`, `largest.numel` is the size of the largest tensor that an operator made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() > 0:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result
