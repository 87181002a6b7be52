"""Piecewise sparse attention of one query block: exact tiles, then the tail, in one online softmax (PISA, Alg. 1).

    o = (sum_exact p_n v_n + sum_tail p_j vbar_j + tail (s q sum_j H_j / Lk)) / (sum_exact p_n + tail)

with p_n = exp(s q.k_n), p_j = n_j exp(s q.kbar_j) and tail = sum_tail p_j, all relative to one running maximum.
Tiles are [M, N] and [M, D]: M queries, N keys or key blocks. Means and bits come from statistics.py.
"""

import triton
import triton.language as tl

from .softmax import online_softmax_step, tile_ptrs

DROP, ZEROTH, HYBRID = (tl.constexpr(tail) for tail in range(3))
GROUP = tl.constexpr(64)  # key blocks that a step of the tail takes


@triton.jit
def exact_part(
    q,
    k_ptr,
    v_ptr,
    k_stride_l,
    v_stride_l,
    indices_ptr,
    count,
    k_len,
    scale,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """The `count` >= 1 key blocks at indices_ptr: (acc, mass, m). Indices ascend, so a short last block comes last."""
    acc = tl.zeros([q.shape[0], HEAD_DIM], tl.float32)
    mass = tl.zeros([q.shape[0]], tl.float32)
    m = tl.full([q.shape[0]], float("-inf"), tl.float32)
    last = tl.load(indices_ptr + count - 1)
    short = (last + 1) * BLOCK > k_len
    whole = count - short.to(tl.int32)
    j = tl.load(indices_ptr)
    for t in tl.range(0, whole):
        j_next = tl.load(indices_ptr + tl.minimum(t + 1, count - 1))  # early: keys must not wait for their address
        k = tl.load(tile_ptrs(k_ptr, j, k_stride_l, BLOCK, HEAD_DIM))
        v = tl.load(tile_ptrs(v_ptr, j, v_stride_l, BLOCK, HEAD_DIM))
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        acc, mass, m = online_softmax_step(acc, mass, m, products, v, scale)
        j = j_next
    if short:  # outside the loop, so that no other tile needs a mask
        inside = last * BLOCK + tl.arange(0, BLOCK) < k_len
        k = tl.load(tile_ptrs(k_ptr, last, k_stride_l, BLOCK, HEAD_DIM), mask=inside[:, None], other=0.0)
        v = tl.load(tile_ptrs(v_ptr, last, v_stride_l, BLOCK, HEAD_DIM), mask=inside[:, None], other=0.0)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        products = tl.where(inside[None, :], products, float("-inf"))
        acc, mass, m = online_softmax_step(acc, mass, m, products, v, scale)
    return acc, mass, m


@triton.jit
def tail_part(
    acc, m, q, kbar_ptr, vbar_ptr, bits_ptr, n_groups, k_len, scale, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """All key blocks that are not exact, each by its mean: (acc, tail, m), acc and tail relative to the new m."""
    tail = tl.zeros([q.shape[0]], tl.float32)
    for group in tl.range(0, n_groups):
        j = group * GROUP + tl.arange(0, GROUP)
        left = k_len - j * BLOCK  # tokens from block j on, none behind the last block
        exact = (tl.load(bits_ptr + j // 32) >> (j % 32)) & 1
        weight = tl.log2(tl.minimum(tl.maximum(left, 1), BLOCK).to(tl.float32)) / scale  # n_j, as an addend
        bias = tl.where((exact == 0) & (left > 0), weight, float("-inf"))
        kbar = tl.load(tile_ptrs(kbar_ptr, group, HEAD_DIM, GROUP, HEAD_DIM))
        vbar = tl.load(tile_ptrs(vbar_ptr, group, HEAD_DIM, GROUP, HEAD_DIM))
        products = tl.dot(q, tl.trans(kbar), input_precision="ieee") + bias[None, :]
        acc, tail, m = online_softmax_step(acc, tail, m, products, vbar, scale)
    return acc, tail, m


@triton.jit(do_not_specialize=["heads", "q_len", "k_len", "width", "n_groups"])
def attend_kernel(
    q_ptr,  # [B, H, Lq, D] by strides
    k_ptr,  # [B, H, Lk, D] by strides
    v_ptr,
    counts_ptr,  # [B * H, Nq] int32
    indices_ptr,  # [B * H, Nq, width] int32
    bits_ptr,  # [B * H, Nq, 2 * n_groups] int32
    kbar_ptr,  # [B * H, GROUP * n_groups, D]
    vbar_ptr,
    slope_ptr,  # [B * H, D, D] in q's dtype: sum_j H_j / Lk
    o_ptr,  # [B, H, Lq, D] by strides
    lse_ptr,  # [B * H, Lq] fp32
    q_stride_b,
    q_stride_h,
    q_stride_l,
    k_stride_b,
    k_stride_h,
    k_stride_l,
    v_stride_b,
    v_stride_h,
    v_stride_l,
    o_stride_b,
    o_stride_h,
    o_stride_l,
    heads,
    q_len,
    k_len,
    width,
    n_groups,
    s,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Program (i, head): query block i of one head."""
    i, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    row = head * tl.num_programs(0) + i
    scale = s * 1.4426950408889634  # log2(e)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    inside = rows < q_len
    q_ptr += b * q_stride_b + h * q_stride_h
    q = tl.load(tile_ptrs(q_ptr, i, q_stride_l, BLOCK, HEAD_DIM), mask=inside[:, None], other=0.0)

    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    count, row_indices = tl.load(counts_ptr + row), indices_ptr + row * width
    acc, mass, m = exact_part(
        q, k_ptr, v_ptr, k_stride_l, v_stride_l, row_indices, count, k_len, scale, BLOCK, HEAD_DIM
    )
    if TAIL != DROP:
        means, m_exact = head * n_groups * GROUP * HEAD_DIM, m
        acc, tail, m = tail_part(
            acc, m, q, kbar_ptr + means, vbar_ptr + means, bits_ptr + row * n_groups * (GROUP // 32),
            n_groups, k_len, scale, BLOCK, HEAD_DIM,
        )  # fmt: skip
        mass = mass * tl.exp2(m_exact - m) + tail
        if TAIL == HYBRID:
            slope = tl.load(tile_ptrs(slope_ptr, head, HEAD_DIM, HEAD_DIM, HEAD_DIM))
            acc += (tail * s)[:, None] * tl.dot(q, slope, input_precision="ieee")

    o_ptr += b * o_stride_b + h * o_stride_h
    o = (acc / mass[:, None]).to(q.dtype)
    tl.store(tile_ptrs(o_ptr, i, o_stride_l, BLOCK, HEAD_DIM), o, mask=inside[:, None])
    tl.store(lse_ptr + head * q_len + rows, (m + tl.log2(mass)) * 0.6931471805599453, mask=inside)  # natural logarithm
