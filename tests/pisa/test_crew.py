import pytest
import torch

from pisa import crew, piecewise_sparse_attention
from pisa.crew import Crew
from pisa.tail import TAILS

CPU = torch.device("cpu")


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    crew.threads.cache_clear()
    yield
    crew.threads.cache_clear()
    torch.set_num_threads(before)


def test_every_thread_computes_alone_and_the_callers_number_returns(three_threads):
    """With more threads of torch than cores a share would wait for its own helpers."""
    found = []
    with Crew.called(CPU) as three:
        assert torch.get_num_threads() == 1
        three.share(lambda parts: found.append(len(parts)), [None] * 7)
    assert sorted(found) == [2, 2, 3]
    assert torch.get_num_threads() == 3
    later = [crew.threads(3).submit(torch.get_num_threads) for _ in range(9)]
    assert {number.result() for number in later} == {1}


def test_the_callers_number_returns_after_an_error(three_threads):
    def fail(parts):
        raise ArithmeticError("share")

    with pytest.raises(ArithmeticError, match="share"), Crew.called(CPU) as three:
        three.share(fail, [1, 2, 3])
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("mode", [True, False])
def test_shares_inherit_inference_mode(three_threads, mode):
    found = []
    with torch.inference_mode(mode), Crew.called(CPU) as three:
        three.share(lambda parts: found.append(torch.is_inference_mode_enabled()), [1, 2])
    assert found == [mode, mode]


@pytest.mark.parametrize("tail", TAILS)
def test_a_method_gives_what_it_gives_alone(three_threads, tail, seed):
    """Routing and the eager engine share their work out; which thread did what changes nothing."""
    q, k, v = (torch.randn(1, 4, 200, 32) for _ in range(3))
    shared = piecewise_sparse_attention(q, k, v, density=0.4, block_size=16, tail=tail, engine="eager")
    torch.set_num_threads(1)
    alone = piecewise_sparse_attention(q, k, v, density=0.4, block_size=16, tail=tail, engine="eager")
    assert torch.allclose(shared, alone, rtol=1e-5, atol=1e-6)


def test_a_gpu_needs_no_crew():
    with Crew.called(torch.device("cuda")) as alone:
        assert alone.size == 1 and alone.cut(4) == [slice(None)]
