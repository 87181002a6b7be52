"""Triton kernels, without launchers: grids, strides and tile choice live in pisa/launch.py and pisa/engines.

Names: `x_ptr` pointer, `x` loaded tile, i/j query/key block, head = batch * H + head, UPPER for constexpr. Strides are
in elements and end in the axis they belong to; the last axis of every tensor is contiguous.
"""
