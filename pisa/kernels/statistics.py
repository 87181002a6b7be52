"""What attention needs of whole blocks, each computed once: their means, sum_j H_j, and the block map as bits.

For key block j with n_j tokens: kbar_j and vbar_j means, H_j = sum_n (k_n - kbar_j)^T v_n, a D x D matrix. Only sums of
H_j over many blocks leave the registers. K and V are read once, straight into the tensor cores.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .softmax import tile_ptrs


@triton.jit(do_not_specialize=["k_len", "heads", "n_padded", "per_program"])
def statistics_kernel(
    k_ptr,  # [B, H, Lk, D] by strides
    v_ptr,
    kbar_ptr,  # [B * H, n_padded, D], zeros from block Nk on
    vbar_ptr,
    kbar_fp32_ptr,  # [B * H, Nk, D] fp32, or None
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
    ROWS: tl.constexpr,
):
    """Program (p, head): key blocks p * per_program and following of one head."""
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k_ptr += head // heads * k_stride_b + head % heads * k_stride_h
    v_ptr += head // heads * v_stride_b + head % heads * v_stride_h
    dims = tl.arange(0, HEAD_DIM)
    rows = tl.arange(0, ROWS)
    slope = tl.zeros([HEAD_DIM, HEAD_DIM], tl.float32)
    end = tl.minimum((program + 1) * per_program, n_padded)
    for first in tl.range(program * per_program, end, ROWS):
        k_sums = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        v_sums = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        some_end = tl.minimum(first + ROWS, end)
        whole = tl.minimum(some_end, k_len // BLOCK)
        for j in tl.range(first, whole):
            k = tl.load(tile_ptrs(k_ptr, j, k_stride_l, BLOCK, HEAD_DIM))
            v = tl.load(tile_ptrs(v_ptr, j, v_stride_l, BLOCK, HEAD_DIM))
            k_sums, v_sums, slope = add_block(k_sums, v_sums, slope, k, v, j - first, FIRST_ORDER)
        for j in tl.range(tl.maximum(whole, first), tl.minimum(some_end, tl.cdiv(k_len, BLOCK))):  # a short block
            inside = (j * BLOCK + tl.arange(0, BLOCK) < k_len)[:, None]
            k = tl.load(tile_ptrs(k_ptr, j, k_stride_l, BLOCK, HEAD_DIM), mask=inside, other=0.0)
            v = tl.load(tile_ptrs(v_ptr, j, v_stride_l, BLOCK, HEAD_DIM), mask=inside, other=0.0)
            k_sums, v_sums, slope = add_block(k_sums, v_sums, slope, k, v, j - first, FIRST_ORDER)
        n = tl.minimum(tl.maximum(k_len - (first + rows) * BLOCK, 1), BLOCK).to(tl.float32)
        kbar, vbar = k_sums / n[:, None], v_sums / n[:, None]
        means = (head * n_padded + first + rows[:, None]) * HEAD_DIM + dims[None, :]
        in_range = (first + rows < some_end)[:, None]
        tl.store(kbar_ptr + means, kbar.to(kbar_ptr.dtype.element_ty), mask=in_range)
        tl.store(vbar_ptr + means, vbar.to(vbar_ptr.dtype.element_ty), mask=in_range)
        if kbar_fp32_ptr is not None:
            n_k = tl.cdiv(k_len, BLOCK)
            exact = (head * n_k + first + rows[:, None]) * HEAD_DIM + dims[None, :]
            tl.store(kbar_fp32_ptr + exact, kbar, mask=in_range & (first + rows < n_k)[:, None])
        if FIRST_ORDER:  # less sum_j n_j kbar_j^T vbar_j, each factor in two parts: one alone would be rounded
            k_high, k_low = two_parts(-k_sums, kbar_ptr.dtype.element_ty)
            v_high, v_low = two_parts(vbar, vbar_ptr.dtype.element_ty)
            slope = tl.dot(tl.trans(k_high), v_high, slope, input_precision="ieee")
            slope = tl.dot(tl.trans(k_high), v_low, slope, input_precision="ieee")
            slope = tl.dot(tl.trans(k_low), v_high, slope, input_precision="ieee")
    if FIRST_ORDER:
        tile = (head * tl.num_programs(0) + program) * HEAD_DIM
        tl.store(slopes_ptr + (tile + dims[:, None]) * HEAD_DIM + dims[None, :], slope)


@triton.jit
def add_block(k_sums, v_sums, slope, k, v, row, FIRST_ORDER: tl.constexpr):
    """Adds k^T v to slope, and the tokens of k and v to one row of the sums: by a product, for which the tile is ready
    where it lies, while a sum over its rows would first spread it over all threads."""
    own = tl.arange(0, k_sums.shape[0])[:, None] == row
    pick = tl.where(own & (tl.arange(0, k.shape[0])[None, :] >= 0), 1.0, 0.0).to(k.dtype)
    k_sums = tl.dot(pick, k, k_sums, input_precision="ieee")
    v_sums = tl.dot(pick, v, v_sums, input_precision="ieee")
    if FIRST_ORDER:
        slope = tl.dot(tl.trans(k), v, slope, input_precision="ieee")
    return k_sums, v_sums, slope


@triton.jit
def two_parts(x, dtype: tl.constexpr):
    """x as the sum of two numbers of a shorter type."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["n_slopes"])
def slope_kernel(
    slopes_ptr,  # [B * H, n_slopes, SIZE] fp32
    slope_ptr,  # [B * H, SIZE]: factor times the sum, always added in the same order
    n_slopes,
    factor,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """EARLY: it was launched before the kernel in front of it has ended, and has to wait for that here."""
    if EARLY:
        gdc_wait()
    head = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for first in tl.range(0, n_slopes, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        total += tl.sum(tl.load(slopes_ptr + (head * n_slopes + part) * SIZE + own, mask=part < n_slopes, other=0.0), 0)
    tl.store(slope_ptr + head * SIZE + own, (total * factor).to(slope_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["width", "n_words", "n_k"])
def selection_kernel(
    counts_ptr,  # [B * H * Nq]
    indices_ptr,  # [B * H * Nq, width]
    bits_ptr,  # [B * H * Nq, n_words] int32: bit j % 32 of word j // 32, set where block j is exact or absent
    width,
    n_words,
    n_k,
    CHUNK: tl.constexpr,
):
    """One program per query block. An eighth of the bytes of a mask, and no test of membership in the long loop."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    for first_word in tl.range(0, n_words, CHUNK):
        words = first_word + tl.arange(0, CHUNK)
        present = tl.minimum(tl.maximum(n_k - 32 * words, 0), 32).to(tl.int64)  # blocks of these words
        bits = (-1 << present).to(tl.int32)
        for first in tl.range(0, count, CHUNK):
            entries = first + tl.arange(0, CHUNK)
            j = tl.load(indices_ptr + row * width + entries, mask=entries < count, other=-1)
            own = (j >= 0)[None, :] & (j[None, :] // 32 == words[:, None])
            bits |= tl.sum(tl.where(own, 1 << (j % 32)[None, :], 0), 1)  # a sum of different bits
        tl.store(bits_ptr + row * n_words + words, bits, mask=words < n_words)
