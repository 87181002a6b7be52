"""The tail of piecewise sparse attention alone, merged into an exact part that another kernel has computed.

    o = (e^lse o_exact + sum_tail p_j vbar_j + tail (s q sum_j H_j / Lk)) / (e^lse + tail)

with p_j = n_j exp(s q.kbar_j) and tail = sum_tail p_j. All of it is one online softmax that starts at the exact part:
its maximum is lse and its sum is o_exact, so that a row without a tail stays as it is and no maximum is ever infinite.
Everything is divided by BLOCK, because n_j is BLOCK for every block but the last. Means and bits as in attend.py.
"""

import triton
import triton.language as tl

from .softmax import online_softmax_step, tile_ptrs


@triton.jit(do_not_specialize=["lse_stride_h", "heads", "q_len", "k_len", "n_q", "n_padded"])
def tail_kernel(
    q_ptr,  # [B, H, Lq, D] by strides
    bits_ptr,  # [B * H, Nq, n_padded / 32] int32: set where a block is exact or absent
    kbar_ptr,  # [B * H, n_padded, D], n_padded a multiple of STEP
    vbar_ptr,
    slope_ptr,  # [B * H, D, D]: sum_j H_j / Lk
    o_ptr,  # [B, H, Lq, D] by strides: the exact part, then the whole
    lse_ptr,  # [B * H, Lq] fp32 by stride: the same
    q_stride_b,
    q_stride_h,
    q_stride_l,
    o_stride_b,
    o_stride_h,
    o_stride_l,
    lse_stride_h,
    heads,
    q_len,
    k_len,
    n_q,
    n_padded,
    s,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    FIRST_ORDER: tl.constexpr,
):
    """Program (t, head): rows t * ROWS and following of one head, several query blocks or a part of one.

    STEP: key blocks at a time, a multiple of 32.
    """
    OWN: tl.constexpr = min(ROWS, BLOCK)  # rows of the tile in one query block
    t, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    rows = t * ROWS + tl.arange(0, ROWS)
    inside = rows < q_len
    scale = s * 1.4426950408889634  # log2(e)
    q_ptr += b * q_stride_b + h * q_stride_h
    o_ptr += b * o_stride_b + h * o_stride_h
    lse_ptrs = lse_ptr + head * lse_stride_h + rows
    q = tl.load(tile_ptrs(q_ptr, t, q_stride_l, ROWS, HEAD_DIM), mask=inside[:, None], other=0.0)
    acc = tl.load(tile_ptrs(o_ptr, t, o_stride_l, ROWS, HEAD_DIM), mask=inside[:, None], other=0.0).to(tl.float32)
    lse = tl.load(lse_ptrs, mask=inside, other=0.0)

    i = tl.minimum(t * ROWS // BLOCK + tl.arange(0, ROWS // OWN), n_q - 1)
    j = tl.arange(0, STEP)
    words = bits_ptr + (head * n_q + i)[:, None] * (n_padded // 32) + (j // 32)[None, :]
    last = (tl.cdiv(k_len, BLOCK) - 1) // STEP
    left = k_len - (last * STEP + j) * BLOCK  # tokens from block j of the last step on
    short = tl.log2(tl.minimum(tl.maximum(left, 1), BLOCK).to(tl.float32) / BLOCK) / scale  # n_j, as an addend
    kbar_ptr += head * n_padded * HEAD_DIM
    vbar_ptr += head * n_padded * HEAD_DIM

    tail = tl.zeros([ROWS], tl.float32)
    m_exact = lse * 1.4426950408889634 - tl.log2(BLOCK * 1.0)
    m = m_exact
    word = tl.load(words)
    for step in tl.range(0, last + 1):
        next_word = tl.load(words + tl.minimum(step + 1, last) * (STEP // 32))  # early: no step waits for its bits
        weight = tl.where(step == last, short, 0.0)
        bias = tl.where((word >> (j % 32)[None, :]) & 1 == 1, float("-inf"), weight[None, :])
        bias = tl.reshape(tl.broadcast_to(bias[:, None, :], [ROWS // OWN, OWN, STEP]), [ROWS, STEP])
        kbar = tl.load(tile_ptrs(kbar_ptr, step, HEAD_DIM, STEP, HEAD_DIM))
        vbar = tl.load(tile_ptrs(vbar_ptr, step, HEAD_DIM, STEP, HEAD_DIM))
        products = tl.dot(q, tl.trans(kbar), input_precision="ieee") + bias
        acc, tail, m = online_softmax_step(acc, tail, m, products, vbar, scale)
        word = next_word
    if FIRST_ORDER:
        slope = tl.load(tile_ptrs(slope_ptr, head, HEAD_DIM, HEAD_DIM, HEAD_DIM))
        acc += (tail * s)[:, None] * tl.dot(q, slope, input_precision="ieee")

    mass = tl.exp2(m_exact - m) + tail
    o = (acc / mass[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(tile_ptrs(o_ptr, t, o_stride_l, ROWS, HEAD_DIM), o, mask=inside[:, None])
    tl.store(lse_ptrs, lse + (m - m_exact + tl.log2(mass)) * 0.6931471805599453, mask=inside)
