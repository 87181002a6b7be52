import pytest
import torch

from pisa import crew
from pisa.crew import Crew

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


def test_a_gpu_needs_no_crew():
    with Crew.called(torch.device("cuda")) as alone:
        assert alone.size == 1 and alone.cut(4) == [slice(None)]
