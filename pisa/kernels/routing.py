"""Routing on the GPU: block means, scores and the best key blocks of each query block, without a sort.

    score_ij = s qbar_i . kbar_j (+ log(|H_j - Hbar|_F + eps)), H_j = sum_n (k_n - kbar_j)^T v_n

The scores of a few query blocks at a time go to memory that their program owns and reuses, small enough for the L2
cache. The count-th largest of a row is then built bit by bit, and one scan numbers the selected columns. STEP rows are
read again as `[CHUNKS, 4, STEP, 32]`, columns ascending in (chunk, lane, one of 4): loads are whole vectors, and each
warp has rows of its own, so that sums and scans along a row ask no other warp. FLIP reverses the axes of what is loaded
and stored: a compiler spreads threads over axes of equal contiguity from the last on, or, before Triton 3.7, from the
first on. Only speed depends on it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .softmax import tile_ptrs

TOKENS = tl.constexpr(8)  # tokens of each block in flight
LEAST = tl.constexpr(-3.4028234663852886e38)  # of a score; -inf stands for no score
NOTHING = tl.constexpr(-2139095041)  # number(NOTHING) is -inf


@triton.jit
def block_means(
    x_ptr,
    stride_l,
    first,
    length,
    POLICY: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Means of block `first` and those that follow, `[BLOCKS, HEAD_DIM]` fp32; zeros behind the last block."""
    starts = (first + tl.arange(0, BLOCKS)) * BLOCK
    x_ptrs = x_ptr + starts.to(tl.int64)[:, None] * stride_l + tl.arange(0, HEAD_DIM)[None, :]
    total = tl.zeros([BLOCKS, HEAD_DIM], tl.float32)
    for t in tl.range(0, BLOCK, TOKENS):
        for u in tl.static_range(TOKENS):
            inside = (starts + t + u < length)[:, None]
            x = tl.load(x_ptrs + (t + u) * stride_l, mask=inside, other=0.0, eviction_policy=POLICY)
            total += x.to(tl.float32)
    n = tl.minimum(tl.maximum(length - starts, 1), BLOCK).to(tl.float32)
    return total / n[:, None]


@triton.jit(do_not_specialize=["heads", "k_len", "n_k"])
def means_kernel(
    k_ptr,  # [B, H, Lk, D] by strides
    kbar_ptr,  # [B * H, Nk, D] fp32
    k_stride_b,
    k_stride_h,
    k_stride_l,
    heads,
    k_len,
    n_k,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Program (p, head): key blocks p * BLOCKS and following of one head."""
    first, head = tl.program_id(0) * BLOCKS, tl.program_id(1).to(tl.int64)
    k_ptr += head // heads * k_stride_b + head % heads * k_stride_h
    kbar = block_means(k_ptr, k_stride_l, first, k_len, "", BLOCKS, BLOCK, HEAD_DIM)
    inside = first + tl.arange(0, BLOCKS) < n_k
    kbar_ptr += (head * n_k + first) * HEAD_DIM
    tl.store(tile_ptrs(kbar_ptr, 0, HEAD_DIM, BLOCKS, HEAD_DIM), kbar, mask=inside[:, None])


@triton.jit(do_not_specialize=["heads", "k_len", "n_k", "per_program"])
def deviations_kernel(
    k_ptr,  # [B, H, Lk, D] by strides
    v_ptr,
    slope_ptr,  # [B * H, D, D] in k's dtype: sum_j H_j / Lk
    kbar_ptr,  # [B * H, Nk, D] fp32
    bias_ptr,  # [B * H, Nk] fp32: log(|H_j - Hbar|_F + epsilon)
    k_stride_b,
    k_stride_h,
    k_stride_l,
    v_stride_b,
    v_stride_h,
    v_stride_l,
    heads,
    k_len,
    n_k,
    per_program,
    epsilon,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (p, head): key blocks p * per_program and following. H_j starts at -Hbar and never leaves registers."""
    first, head = tl.program_id(0) * per_program, tl.program_id(1).to(tl.int64)
    k_ptr += head // heads * k_stride_b + head % heads * k_stride_h
    v_ptr += head // heads * v_stride_b + head % heads * v_stride_h
    dims = tl.arange(0, HEAD_DIM)
    minus_mean = tl.load(tile_ptrs(slope_ptr, head, HEAD_DIM, HEAD_DIM, HEAD_DIM)).to(tl.float32) * (-k_len / n_k)
    for j in tl.range(first, tl.minimum(first + per_program, n_k)):
        inside = (j * BLOCK + tl.arange(0, BLOCK) < k_len)[:, None]
        k = tl.load(tile_ptrs(k_ptr, j, k_stride_l, BLOCK, HEAD_DIM), mask=inside, other=0.0)
        v = tl.load(tile_ptrs(v_ptr, j, v_stride_l, BLOCK, HEAD_DIM), mask=inside, other=0.0)
        n = tl.minimum(k_len - j * BLOCK, BLOCK).to(tl.float32)
        kbar = tl.sum(k.to(tl.float32), 0) / n
        centred = (k.to(tl.float32) - kbar[None, :]).to(k.dtype)  # the fill of a short block meets values of zero
        deviation = tl.dot(tl.trans(centred), v, minus_mean, input_precision="tf32x3")
        M = tl.sqrt(tl.sum(tl.sum(deviation * deviation, 1), 0))
        tl.store(kbar_ptr + (head * n_k + j) * HEAD_DIM + dims, kbar)
        tl.store(bias_ptr + head * n_k + j, tl.log(M + epsilon))


@triton.jit
def score_rows(
    qbar,
    kbar_ptr,
    bias_ptr,
    scores_ptr,
    n_k,
    pitch,
    text_start,
    text_stop,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The scores of qbar `[ROWS, D]` with every key block, `[ROWS, pitch]` at scores_ptr; -inf behind the last one."""
    for first in tl.range(0, pitch, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < n_k
        kbar_ptrs = tile_ptrs(kbar_ptr, first // COLUMNS, HEAD_DIM, COLUMNS, HEAD_DIM)
        kbar = tl.load(kbar_ptrs, mask=inside[:, None], other=0.0)
        scores = tl.dot(qbar, tl.trans(kbar), input_precision="tf32x3")
        if BIAS:
            scores += tl.load(bias_ptr + columns, mask=inside, other=0.0)[None, :]
        text = (columns >= text_start) & (columns < text_stop)
        scores = tl.maximum(tl.where(text[None, :], float("inf"), scores), LEAST)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        scores_ptrs = scores_ptr + tl.arange(0, ROWS)[:, None] * pitch + columns[None, :]
        tl.store(scores_ptrs, scores, mask=(columns < pitch)[None, :])


@triton.jit
def number(t):
    """The float of an integer: as the integers ascend, so do the floats."""
    return (t ^ ((t >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def how_many(scores, least):
    """Of each row `[STEP]`, the scores `[CHUNKS, 4, STEP, 32]` that reach `least`; none reaches NaN."""
    reach = (scores >= least[None, None, :, None]).to(tl.float32)
    return tl.sum(tl.sum(tl.sum(reach, 0), 0), 1).to(tl.int32)


@triton.jit
def first_guess(scores, kept, count):
    """Where `threshold` begins: (t, kept, bit), the answer being below t + 2^(bit + 1).

    An eighth of normal scores reach beyond a third of the largest, so it mostly lies within two octaves of that, eight
    for longer lists. Where it does not, in any row, all bits are searched.
    """
    bit = tl.where(count * 8 <= tl.max(kept, 0), 23, 25)
    largest = tl.max(tl.max(tl.max(tl.where(scores < float("inf"), scores, float("-inf")), 0), 0), 1)
    top = largest.to(tl.int32, bitcast=True)
    top = top ^ ((top >> 31) & 0x7FFFFFFF)  # the inverse of `number` is itself
    low = top - ((2 << bit) - 1)
    reached = how_many(scores, number(low))
    open_row = kept > count
    found = tl.min((((reached >= count) & (low < top)) | ~open_row).to(tl.int32), 0) > 0
    t = tl.where(found & open_row, low, -(2**31))
    return t, tl.where(found & open_row, reached, kept), tl.where(found, bit, 31)


@triton.jit
def threshold(scores, kept, count):
    """Numbers `[STEP]` that exactly `count` scores of their row reach, or more where the last of them are equal to it.

    scores: `[CHUNKS, 4, STEP, 32]`. kept: `[STEP]`, how many scores a row has; it is done when `count` are left.
    """
    t, kept, bit = first_guess(scores, kept, count)
    while (tl.max(kept, 0) > count) & (bit > 0):
        for _ in tl.static_range(2):  # a pair, because the question above waits for all warps
            higher = t + (1 << bit)  # bit 31 wraps from the lowest integer to 0
            reached = how_many(scores, number(higher))
            t = tl.where(reached >= count, higher, t)
            kept = tl.where(reached >= count, reached, kept)
            bit -= 1
    return number(tl.maximum(t, NOTHING))  # every score is above it where nothing had to be left out


@triton.jit
def places(scores, t, count):
    """Which columns have the `count` largest scores, of equal ones the lowest first, and where in indices each goes."""
    above, equal = scores > t[None, None, :, None], scores == t[None, None, :, None]
    both = above.to(tl.int32) + (equal.to(tl.int32) << 16)  # two counts in one sum
    quad = tl.sum(both, 1)  # [CHUNKS, STEP, 32]
    chunk = tl.broadcast_to(tl.sum(quad, 2, keep_dims=True), quad.shape)
    before = tl.cumsum(chunk, 0) - chunk + tl.cumsum(quad, 2) - quad
    up_to = before[:, None, :, :] + tl.cumsum(both, 1)
    spare = (count - (tl.sum(tl.sum(quad, 0), 1) & 0xFFFF))[None, None, :, None]  # places for equal scores
    selected = above | (equal & (up_to >> 16 <= spare))
    return (up_to & 0xFFFF) + tl.minimum(up_to >> 16, spare) - 1, selected


@triton.jit
def bit_words(selected):
    """The columns `[CHUNKS, 4, STEP, 32]` of a mask as words of 32 bits `[CHUNKS, STEP, 4]`."""
    four, lane = tl.arange(0, 4)[None, :, None, None], tl.arange(0, 32)[None, None, :]
    bits = tl.sum(selected.to(tl.int32) << four, 1) << lane % 8 * 4  # [CHUNKS, STEP, 32]
    return tl.sum(tl.reshape(bits, (bits.shape[0], bits.shape[1], 4, 8)), 3)


@triton.jit
def flipped(x, FLIP: tl.constexpr):
    return tl.permute(x, (3, 2, 1, 0)) if FLIP else x


@triton.jit(
    do_not_specialize=["heads", "q_len", "n_q", "n_k", "n_tiles", "n_words", "count", "text_start", "text_stop"]
)
def select_kernel(
    q_ptr,  # [B, H, Lq, D] by strides
    kbar_ptr,  # [B * H, Nk, D] fp32
    bias_ptr,  # [B * H, Nk] fp32, or None
    scores_ptr,  # [programs, ROWS, pitch] fp32, pitch = Nk in whole 32s
    counts_ptr,  # [B * H, Nq] int32
    indices_ptr,  # [B * H, Nq, count] int32
    bits_ptr,  # [B * H, Nq, n_words] int32: bit j % 32 of word j // 32, set where block j is selected or absent
    q_stride_b,
    q_stride_h,
    q_stride_l,
    heads,
    q_len,
    n_q,
    n_k,
    n_tiles,
    n_words,
    count,
    text_start,  # key blocks that are always selected: these first, up to text_stop
    text_stop,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    FLIP: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Every program takes each so many-th tile: ROWS query blocks of one head. WIDTH >= pitch is a power of two.

    EARLY: as in statistics.slope_kernel.
    """
    if EARLY:
        gdc_wait()
    pitch = tl.cdiv(n_k, 32) * 32  # whole vectors
    scores_ptr += tl.program_id(0).to(tl.int64) * ROWS * pitch
    chunks, fours, lanes = tl.arange(0, WIDTH // 128) * 128, tl.arange(0, 4), tl.arange(0, 32) * 4
    if FLIP:
        columns = lanes[:, None, None, None] + fours[None, None, :, None] + chunks[None, None, None, :]
    else:
        columns = chunks[:, None, None, None] + fours[None, :, None, None] + lanes[None, None, None, :]
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        head = (tile // tl.cdiv(n_q, ROWS)).to(tl.int64)
        first = tile % tl.cdiv(n_q, ROWS) * ROWS
        q_head = q_ptr + head // heads * q_stride_b + head % heads * q_stride_h
        # evict_first: the stream of queries should not drive the scores out of the L2 cache
        qbar = block_means(q_head, q_stride_l, first, q_len, "evict_first", ROWS, BLOCK, HEAD_DIM) * scale
        score_rows(
            qbar, kbar_ptr + head * n_k * HEAD_DIM, bias_ptr + head * n_k if BIAS else bias_ptr, scores_ptr,
            n_k, pitch, text_start, text_stop, ROWS, COLUMNS, HEAD_DIM, BIAS,
        )  # fmt: skip
        tl.debug_barrier()  # other warps wrote the scores that this one reads
        for step in tl.range(0, ROWS, STEP):
            rows = step + tl.arange(0, STEP)
            i = head * n_q + first + rows
            inside = first + rows < n_q
            row_starts = flipped((rows * pitch)[None, None, :, None], FLIP)
            scores = tl.load(scores_ptr + row_starts + columns, mask=columns < pitch, other=float("-inf"))
            scores = flipped(scores, FLIP)
            t = threshold(scores, tl.where(inside, n_k, count), count)
            place, selected = places(scores, t, count)
            words = bit_words(selected | (flipped(columns, FLIP) >= n_k))  # [CHUNKS, STEP, 4]
            word = tl.arange(0, WIDTH // 128)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
            kept = inside[None, :, None] & (word < n_words)
            tl.store(bits_ptr + i[None, :, None] * n_words + word, words, mask=kept)
            ptrs = flipped((indices_ptr + i * count)[None, None, :, None] + place, FLIP)
            selected = flipped(selected & inside[None, None, :, None], FLIP)
            tl.store(ptrs, tl.broadcast_to(columns, ptrs.shape), mask=selected)
            tl.store(counts_ptr + i, tl.zeros_like(rows) + count, mask=inside)
        tl.debug_barrier()  # the next tile's scores go to the same place
