"""What attention needs of whole blocks, each computed once: their means, sum_j H_j, and the block map as bits.

For key block j with n_j tokens: kbar_j and vbar_j means, H_j = sum_n (k_n - kbar_j)^T v_n, a D x D matrix. Only sums of
H_j over many blocks leave the registers. K and V are read once; centring before the product instead of subtracting
n_j kbar_j^T vbar_j after it keeps keys with a large mean exact.
"""

import triton
import triton.language as tl

from .softmax import tile_ptrs


@triton.jit(do_not_specialize=["k_len", "heads", "n_padded", "per_program"])
def statistics_kernel(
    k_ptr,  # [B, H, Lk, D] by strides
    v_ptr,
    kbar_ptr,  # [B * H, n_padded, D], zeros from block Nk on
    vbar_ptr,
    slopes_ptr,  # [B * H, programs, D, D] fp32: sums of H_j
    k_stride_b,
    k_stride_h,
    k_stride_l,
    v_stride_b,
    v_stride_h,
    v_stride_l,
    heads,
    k_len,
    n_padded,
    per_program,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_ORDER: tl.constexpr,
):
    """Program (p, head): key blocks p * per_program and following of one head."""
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k_ptr += head // heads * k_stride_b + head % heads * k_stride_h
    v_ptr += head // heads * v_stride_b + head % heads * v_stride_h
    dims = tl.arange(0, HEAD_DIM)
    slope = tl.zeros([HEAD_DIM, HEAD_DIM], tl.float32)
    n_blocks = (k_len + BLOCK - 1) // BLOCK
    start = program * per_program
    end = tl.minimum(start + per_program, n_padded)
    for j in tl.range(start, tl.minimum(end, n_blocks)):
        inside = (j * BLOCK + tl.arange(0, BLOCK) < k_len)[:, None]
        k = tl.load(tile_ptrs(k_ptr, j, k_stride_l, BLOCK, HEAD_DIM), mask=inside, other=0.0)
        v = tl.load(tile_ptrs(v_ptr, j, v_stride_l, BLOCK, HEAD_DIM), mask=inside, other=0.0)
        n = tl.minimum(k_len - j * BLOCK, BLOCK).to(tl.float32)
        kbar = tl.sum(k.to(tl.float32), 0) / n
        vbar = tl.sum(v.to(tl.float32), 0) / n
        row = (head * n_padded + j) * HEAD_DIM + dims
        tl.store(kbar_ptr + row, kbar.to(k.dtype))
        tl.store(vbar_ptr + row, vbar.to(v.dtype))
        if FIRST_ORDER:  # the fill of a short block meets values of zero
            centred = (k.to(tl.float32) - kbar[None, :]).to(k.dtype)
            slope = tl.dot(tl.trans(centred), v, slope, input_precision="ieee")
    for j in tl.range(tl.maximum(start, n_blocks), end):
        row = (head * n_padded + j) * HEAD_DIM + dims
        tl.store(kbar_ptr + row, tl.zeros_like(dims).to(kbar_ptr.dtype.element_ty))
        tl.store(vbar_ptr + row, tl.zeros_like(dims).to(vbar_ptr.dtype.element_ty))
    if FIRST_ORDER:
        tile = (head * tl.num_programs(0) + program) * HEAD_DIM
        tl.store(slopes_ptr + (tile + dims[:, None]) * HEAD_DIM + dims[None, :], slope)


@triton.jit(do_not_specialize=["width", "n_words"])
def selection_kernel(
    counts_ptr,  # [B * H * Nq]
    indices_ptr,  # [B * H * Nq, width]
    bits_ptr,  # [B * H * Nq, n_words] int32: bit j % 32 of word j // 32 is set where block j is exact
    width,
    n_words,
    CHUNK: tl.constexpr,
):
    """One program per query block. An eighth of the bytes of a mask, and no test of membership in the long loop."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    for first_word in tl.range(0, n_words, CHUNK):
        words = first_word + tl.arange(0, CHUNK)
        bits = tl.zeros([CHUNK], tl.int32)
        for first in tl.range(0, count, CHUNK):
            entries = first + tl.arange(0, CHUNK)
            j = tl.load(indices_ptr + row * width + entries, mask=entries < count, other=-1)
            own = (j >= 0)[None, :] & (j[None, :] // 32 == words[:, None])
            bits |= tl.sum(tl.where(own, 1 << (j % 32)[None, :], 0), 1)  # a sum of different bits
        tl.store(bits_ptr + row * n_words + words, bits, mask=words < n_words)
