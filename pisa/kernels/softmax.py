"""Steps that the kernels share: tiles in memory, and one step of a softmax whose maximum is not known yet."""

import triton
import triton.language as tl


@triton.jit
def tile_ptrs(x_ptr, j, stride_l, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers `[ROWS, HEAD_DIM]` to tile j of one head; its first token can be beyond 2^31 elements."""
    first = x_ptr + tl.cast(j, tl.int64) * ROWS * stride_l
    return first + tl.arange(0, ROWS)[:, None] * stride_l + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def online_softmax_step(acc, mass, m, products, values, scale):
    """Adds one tile of columns to acc `[M, D]`, sum of weights mass `[M]` and maximum m `[M]`, which is in log2 units.

    products: q . k `[M, N]`, -inf where a column does not count; times scale > 0 they are logits in log2 units, so that
    the scale costs one fused multiply-add on the way into exp2. Whoever keeps another running sum beside mass must
    rescale it by exp2(old m - new m) as well. m must be finite after the step: some column counts in every row.
    """
    m_new = tl.maximum(m, tl.max(products, 1) * scale)
    p = tl.exp2(products * scale - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    return acc, mass * rescale + tl.sum(p, 1), m_new
