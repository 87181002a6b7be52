"""Dense kernels: all of them are attention, and each says by name what runs."""

import pytest
import torch

from baselines.dense import FASTEST_FIRST, Dense, available
from pisa import reference
from tests.pisa.cases import DTYPES, normal, relative_l2

EPS = {torch.float32: 1e-5, torch.float16: 2 * 2**-10, torch.bfloat16: 2 * 2**-7}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_kernel_that_runs_here_is_attention(seed, dtype, scale):
    q, k, v = normal(2, 2, 100, 64, dtype), normal(2, 2, 70, 64, dtype), normal(2, 2, 70, 64, dtype)
    truth, _ = reference.dense(q, k, v, scale)
    for kernel in ("auto", "sdpa", *available(q)):
        assert relative_l2(Dense(kernel)(q, k, v, scale=scale), truth) < EPS[dtype], kernel


def test_the_name_is_that_of_the_kernel_that_runs(seed):
    q = normal(1, 1, 64, 64, device="cpu")
    assert available(q) == ["cpu_flash", "sdpa_math"]
    assert Dense().resolve(q) == Dense("sdpa").resolve(q) == "cpu_flash"
    assert Dense("sdpa_math").resolve(q) == "sdpa_math"
    math, flash = Dense("sdpa_math")(q, q, q), Dense("cpu_flash")(q, q, q)
    assert relative_l2(math, flash) > 0  # two kernels, not two names of one


@pytest.mark.parametrize("kernel", [k for k in FASTEST_FIRST if k not in ("cpu_flash", "sdpa_math")])
def test_a_kernel_that_cannot_run_says_why(kernel):
    q = normal(1, 1, 64, 64, device="cpu")
    with pytest.raises(ValueError, match=f"dense kernel {kernel} cannot run this: .* Here: cpu_flash, sdpa_math"):
        Dense(kernel)(q, q, q)


def test_a_mistyped_kernel_is_refused_at_once():
    with pytest.raises(ValueError, match="No dense kernel 'sdpa_cudn'. Did you mean 'sdpa_cudnn'"):
        Dense("sdpa_cudn")
