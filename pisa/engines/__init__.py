"""Engines: who executes a block map. Each is a module with two functions.

`refuses(q, block_map, tail) -> str | None` gives the reason why it cannot run these inputs, or None.
`attend(q, k, v, block_map, tail, scale) -> (o, lse)` gives o `[B, H, Lq, D]` in q's dtype and lse `[B, H, Lq]` fp32,
the natural logarithm of the softmax normaliser with the tail's mass in it. No engine changes the map or the formula.
"""

from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

from torch import Tensor

from ..blocks import BlockMap
from ..tail import Tail

ENGINES = ("eager", "triton", "cudnn", "fa4")
# What "auto" tries on a CUDA GPU, as measured on an H100 (results/kernels.md): the triton engine led at every shape and
# density, alone and with its tail; the borrowed kernels are there to be compared with. Elsewhere there is only eager.
FASTEST_FIRST = ("triton", "cudnn", "fa4", "eager")


def choose(name: str, q: Tensor, block_map: BlockMap, tail: Tail) -> ModuleType:
    """The engine called `name`; "auto" is the fastest that accepts these inputs. A named engine never falls back.

    Raises ValueError for an unknown name, and with every reason when no engine accepts.
    """
    if name not in ("auto", *ENGINES):
        near = get_close_matches(name, ENGINES, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"No engine '{name}'.{hint} Allowed: auto, {', '.join(ENGINES)}.")
    refusals = {}
    automatic = FASTEST_FIRST if q.is_cuda else ("eager",)  # never Triton's interpreter unless asked for by name
    for candidate in automatic if name == "auto" else (name,):
        engine = import_module(f"pisa.engines.{candidate}")  # here, because an engine may need an optional package
        if not (reason := engine.refuses(q, block_map, tail)):
            return engine
        refusals[candidate] = reason
    raise ValueError("; ".join(f"engine {e} cannot run this: {why}" for e, why in refusals.items()) + ".")


def name_of(engine: ModuleType) -> str:
    """The short name of an engine module, as `choose` takes it and records keep it."""
    return engine.__name__.rpartition(".")[2]
