"""The attention of attend.py for compute capability 9.0: tiles arrive by TMA, and products and softmax overlap (Gluon).

One program owns one query block, or two that share a list. Its key tiles are the exact blocks, then the means in groups
of 64. One warp only asks for tiles, four for each query block compute. Between them is a ring of `STAGES` pairs: value
tile t beside key tile t + 1, because step t needs both: the product of the queries with the next keys runs on the
tensor cores while the softmax of this step runs on the other units. The last pair is the first-order matrix. Rows
behind a ragged block arrive as zeros and are masked.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

DROP, ZEROTH, HYBRID = (gl.constexpr(tail) for tail in range(3))  # as in attend.py
BLOCK = gl.constexpr(64)  # tokens in a block, and key blocks in a step of the tail


@gluon.jit
def tile(ring, place, HEAD_DIM: gl.constexpr):
    return ring.index(place).reshape([BLOCK, HEAD_DIM])


@gluon.jit
def load(
    q_desc, k_desc, v_desc, kbar_desc, vbar_desc, slope_desc, queries, keys, values, start, full, empty,
    count_ptr, indices_ptr, width, n_groups, i, b, h, head,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, SLOPES: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """The warp that asks for tiles. Pair t is value tile t and key tile t + 1; pair n_tiles, the first-order matrix."""
    TILE: gl.constexpr = BLOCK * HEAD_DIM * 2  # bytes
    mbarrier.expect(start, (SHARED + 1) * TILE)
    for own in gl.static_range(SHARED):
        tma.async_copy_global_to_shared(q_desc, [b, h, (i + own) * BLOCK, 0], start, queries.index(own))
    j, j_next = gl.load(indices_ptr), gl.load(indices_ptr + gl.minimum(1, width - 1))
    count = gl.load(count_ptr)
    # The first keys have no pair: they lie where the last pair of the ring will put its own.
    tma.async_copy_global_to_shared(k_desc, [b, h, j * BLOCK, 0], start, keys.index(STAGES - 1))
    n_tiles = count + n_groups
    n_pairs = n_tiles
    if SLOPES > 0:
        n_pairs += 1
    for t in range(n_pairs):
        j_after = gl.load(indices_ptr + gl.minimum(t + 2, width - 1))
        place = t % STAGES
        bar, k, v = full.index(place), keys.index(place), values.index(place)
        # Once more for the last place: of the first keys.
        mbarrier.wait(empty.index(place), (t // STAGES + (place < STAGES - 1).to(gl.int32)) & 1)
        if (t + 1 < n_tiles) | ((t == n_tiles) & (SLOPES == 2)):
            mbarrier.expect(bar, 2 * TILE)
        else:
            mbarrier.expect(bar, TILE)
        if t < count:
            tma.async_copy_global_to_shared(v_desc, [b, h, j * BLOCK, 0], bar, v)
        elif t < n_tiles:
            tma.async_copy_global_to_shared(vbar_desc, [0, head, (t - count) * BLOCK, 0], bar, v)
        else:
            tma.async_copy_global_to_shared(slope_desc, [0, head, 0, 0], bar, v)
        if t + 1 < count:
            tma.async_copy_global_to_shared(k_desc, [b, h, j_next * BLOCK, 0], bar, k)
        elif t + 1 < n_tiles:
            tma.async_copy_global_to_shared(kbar_desc, [0, head, (t + 1 - count) * BLOCK, 0], bar, k)
        elif (t == n_tiles) & (SLOPES == 2):
            tma.async_copy_global_to_shared(slope_desc, [0, head, BLOCK, 0], bar, k)
        j, j_next = j_next, j_after


@gluon.jit
def compute(
    o_desc, queries, keys, values, start, full, empty, count_ptr, indices_ptr, bits_ptr, lse_ptr,
    n_groups, q_len, k_len, i, b, h, head, s,
    own: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr, SLOPES: gl.constexpr,
):  # fmt: skip
    """The four warps that compute query block i + own."""
    DTYPE: gl.constexpr = o_desc.dtype
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    BY_ROW_OUT: gl.constexpr = gl.SliceLayout(1, OUTPUT)

    scale = s * 1.4426950408889634  # log2(e)
    count = gl.load(count_ptr)
    n_tiles = count + n_groups
    column = gl.arange(0, BLOCK, COLUMNS)
    last = gl.load(indices_ptr + count - 1)
    short = k_len % BLOCK  # tokens in the last key block, 0 where it is whole
    lighter = (gl.log2(gl.maximum(short, 1).to(gl.float32)) - gl.log2(BLOCK * 1.0)) / scale
    first_word, second_word = 0, 0
    if TAIL != DROP:
        first_word, second_word = gl.load(bits_ptr), gl.load(bits_ptr + 1)
    acc = gl.zeros([BLOCK, HEAD_DIM], gl.float32, OUTPUT)
    m = gl.full([BLOCK], float("-inf"), gl.float32, BY_ROW)
    mass = gl.zeros([BLOCK], gl.float32, BY_ROW)
    tail = mass  # what the means contribute to it

    mbarrier.wait(start, 0)
    q_tile = tile(queries, own, HEAD_DIM)
    q = q_tile.load(gl.DotOperandLayout(0, LOGITS, 2))  # in registers: a third less to read from shared memory
    zeros = gl.zeros([BLOCK, BLOCK], gl.float32, LOGITS)
    logits = warpgroup_mma(q, tile(keys, STAGES - 1, HEAD_DIM).permute((1, 0)), zeros, use_acc=False)
    mbarrier.arrive(empty.index(STAGES - 1), count=1)

    for t in range(n_tiles):
        place = t % STAGES
        mbarrier.wait(full.index(place), t // STAGES & 1)
        coming = warpgroup_mma(q, tile(keys, place, HEAD_DIM).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if t >= count - 1:
            if t == count - 1:  # the last exact block may be short
                logits = gl.where((last * BLOCK + column < k_len)[None, :], logits, float("-inf"))
            elif TAIL != DROP:
                words = gl.where(column < 32, first_word, second_word)
                logits = gl.where(((words >> column % 32) & 1)[None, :] != 0, float("-inf"), logits)
                if (t == n_tiles - 1) & (short > 0):
                    is_short = (t - count) * BLOCK + column == k_len // BLOCK
                    logits += gl.where(is_short, lighter, 0.0)[None, :]
            if TAIL != DROP:  # a step early: it must not wait for them
                group = bits_ptr + 2 * gl.minimum(t + 1 - count, n_groups - 1)
                first_word, second_word = gl.load(group), gl.load(group + 1)
        weight = gl.where(t < count, 0.0, gl.log2(BLOCK * 1.0))  # a mean stands for BLOCK tokens
        m_new = gl.maximum(m, gl.max(logits, 1) * scale + weight)
        p = gl.exp2(logits * scale - (m_new - weight)[:, None])
        rescale = gl.exp2(m - m_new)
        step_mass = gl.sum(p, 1)
        mass = mass * rescale + step_mass
        if TAIL == HYBRID:
            tail = tail * rescale + gl.where(t < count, 0.0, step_mass)
        m = m_new
        acc = acc * gl.convert_layout(rescale, BY_ROW_OUT)[:, None]
        p = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, OUTPUT, 2))
        acc = warpgroup_mma(p, tile(values, place, HEAD_DIM), acc, is_async=True)
        logits, acc = warpgroup_mma_wait(0, deps=[coming, acc])
        mbarrier.arrive(empty.index(place), count=1)

    if SLOPES > 0:
        place = n_tiles % STAGES
        mbarrier.wait(full.index(place), n_tiles // STAGES & 1)
        first_order = gl.zeros([BLOCK, HEAD_DIM], gl.float32, OUTPUT)
        first_order = warpgroup_mma(q_tile.slice(0, BLOCK, dim=1), tile(values, place, HEAD_DIM), first_order)
        if SLOPES > 1:
            first_order = warpgroup_mma(q_tile.slice(BLOCK, BLOCK, dim=1), tile(keys, place, HEAD_DIM), first_order)
        acc += gl.convert_layout(tail * s, BY_ROW_OUT)[:, None] * first_order
    o = (acc / gl.convert_layout(mass, BY_ROW_OUT)[:, None]).to(DTYPE)
    q_tile.store(o)
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [b, h, (i + own) * BLOCK, 0], queries.index(own))
    rows = (i + own) * BLOCK + gl.arange(0, BLOCK, BY_ROW)
    lse = (m + gl.log2(mass)) * 0.6931471805599453  # natural logarithm
    gl.store(lse_ptr + head.to(gl.int64) * q_len + rows, lse, mask=rows < q_len)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "n_q", "q_len", "k_len", "width", "n_groups"])
def attend_kernel(
    q_desc,  # [B, H, Lq, D] in tiles [1, 1, BLOCK, D], as the next three
    o_desc,
    k_desc,
    v_desc,
    kbar_desc,  # [1, B * H, BLOCK * n_groups, D]
    vbar_desc,
    slope_desc,  # [1, B * H, D, D] in q's dtype: sum_j H_j / Lk
    counts_ptr,  # [B * H, Nq] int32
    indices_ptr,  # [B * H, Nq, width] int32
    bits_ptr,  # [B * H, Nq, 2 * n_groups] int32, set where a block is exact or absent
    lse_ptr,  # [B * H, Lq] fp32
    heads,
    n_q,
    q_len,
    k_len,
    width,
    n_groups,  # 0 for a dropped tail
    s,
    HEAD_DIM: gl.constexpr,
    TAIL: gl.constexpr,
    STAGES: gl.constexpr,
    SHARED: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Program (i, head): `SHARED` query blocks of one head, whose list is that of the first of them.

    EARLY: as in statistics.slope_kernel.
    """
    DTYPE: gl.constexpr = q_desc.dtype
    SLOPES: gl.constexpr = HEAD_DIM // BLOCK if TAIL == HYBRID else 0
    i, head = gl.program_id(0) * SHARED, gl.program_id(1)
    b, h = head // heads, head % heads
    row = head.to(gl.int64) * n_q + i
    count_ptr, indices_ptr, bits_ptr = counts_ptr + row, indices_ptr + row * width, bits_ptr + row * 2 * n_groups
    queries = gl.allocate_shared_memory(DTYPE, [SHARED, 1, 1, BLOCK, HEAD_DIM], q_desc.layout)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK, HEAD_DIM], q_desc.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK, HEAD_DIM], q_desc.layout)
    starts = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(starts.index(0), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=SHARED)
    fence_async_shared()
    if EARLY:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    if SHARED == 1:
        gl.warp_specialize(
            [
                (
                    compute,
                    (
                        o_desc, queries, keys, values, starts.index(0), full, empty, count_ptr, indices_ptr, bits_ptr,
                        lse_ptr, n_groups, q_len, k_len, i, b, h, head, s, 0, HEAD_DIM, STAGES, TAIL, SLOPES,
                    ),
                ),
                (
                    load,
                    (
                        q_desc, k_desc, v_desc, kbar_desc, vbar_desc, slope_desc, queries, keys, values,
                        starts.index(0), full, empty, count_ptr, indices_ptr, width, n_groups, i, b, h, head,
                        HEAD_DIM, STAGES, SLOPES, SHARED,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    compute,
                    (
                        o_desc, queries, keys, values, starts.index(0), full, empty, count_ptr, indices_ptr, bits_ptr,
                        lse_ptr, n_groups, q_len, k_len, i, b, h, head, s, 0, HEAD_DIM, STAGES, TAIL, SLOPES,
                    ),
                ),
                (
                    compute,
                    (
                        o_desc, queries, keys, values, starts.index(0), full, empty, count_ptr, indices_ptr, bits_ptr,
                        lse_ptr, n_groups, q_len, k_len, i, b, h, head, s, 1, HEAD_DIM, STAGES, TAIL, SLOPES,
                    ),
                ),
                (
                    load,
                    (
                        q_desc, k_desc, v_desc, kbar_desc, vbar_desc, slope_desc, queries, keys, values,
                        starts.index(0), full, empty, count_ptr, indices_ptr, width, n_groups, i, b, h, head,
                        HEAD_DIM, STAGES, SLOPES, SHARED,
                    ),
                ),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
