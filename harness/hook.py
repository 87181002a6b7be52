"""Replaces a transformer's self-attention for the length of a `with` block, counts what ran, and restores it after.

A session knows the layer (each has its own processor), the denoising step (from the scheduler, read before every
forward) and the branch of classifier-free guidance (the n-th forward of a step). After every forward it checks that
each layer was reached exactly once: a sparse run that silently stayed dense must not go unnoticed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from baselines.dense import Dense
from harness.opaque import RUNNING, attention_operator
from harness.timing import elapsed_ms, now
from pisa import Grid, SparseAttention
from pisa.orders import inverse

Attention = Callable[..., Tensor]
Observer = Callable[["Session", int, Tensor, Tensor, Tensor], None]


class Family(Protocol):
    """What differs between transformer families: where self-attention sits and how tokens lie on the grid.

    order: what `method/order=model` means where no model config says it.
    """

    order: str

    def processors(self, transformer: nn.Module, session: "Session") -> dict[str, Any]:
        """A processor for every self-attention layer, by its name in `transformer.attn_processors`, in running order.

        Raises ValueError when the attention is not the stock one (fused projections, adapters, other hooks).
        """

    def grid(self, transformer: nn.Module, inputs: dict[str, Any]) -> Grid:
        """The token grid of one forward, from its keyword arguments; padding of the text is not counted."""

    # Optional, `reorder(inputs, permutation) -> inputs | None`: the keyword arguments of the forward with the image or
    # video tokens permuted, for models to which a token is where its position says. A static order then costs two
    # permutations per forward and none per layer. None: not with these inputs.


@dataclass
class Session:
    """One hooked transformer. `method` None keeps every call dense (the reference runs through the same code).

    dense_steps, dense_layers: the first denoising steps and the first transformer blocks that stay dense; a block with
    two self-attentions (SD3.5 medium) counts once, though each is a layer of its own.
    observe: called with (session, layer, q, k, v), tensors `[B, H, L, D]`, before every self-attention; `grid` is then
    the grid of these tokens, and `permutation` the order they came in, None for the model's own.
    """

    transformer: nn.Module
    family: Family
    method: SparseAttention | None = None
    dense: Attention = field(default_factory=Dense)
    scheduler: Any = None
    dense_steps: int = 0
    dense_layers: int = 0
    observe: Observer | None = None

    step: int = field(default=0, init=False)
    branch: int = field(default=0, init=False)
    grid: Grid | None = field(default=None, init=False)
    permutation: Tensor | None = field(default=None, init=False)  # of the forward's tokens, where they come in order
    sparse_calls: int = field(default=0, init=False)
    dense_calls: int = field(default=0, init=False)
    forwards: int = field(default=0, init=False)
    layers: int = field(default=0, init=False)
    density_sum: float = field(default=0.0, init=False)

    def __enter__(self) -> "Session":
        self._stock = dict(self.transformer.attn_processors)
        ours = self.family.processors(self.transformer, self)
        self.layers = len(ours)
        blocks = [name.rsplit(".", 2)[0] for name in ours]  # "transformer_blocks.3.attn2.processor" sits in block 3
        self._block = [list(dict.fromkeys(blocks)).index(block) for block in blocks]
        self._reached: list[int] = []
        self._seen: tuple[Any, Any] | None = None
        self._spans: list[tuple[Any, Any]] = []
        self.transformer.set_attn_processor({**self._stock, **ours})
        self._hooks = [
            self.transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            self.transformer.register_forward_hook(self._after, prepend=True),  # other hooks see the model's order
        ]
        RUNNING.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        RUNNING.remove(self)
        for hook in self._hooks:
            hook.remove()
        self.transformer.set_attn_processor(dict(self._stock))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.scheduler is not None:
            now = (self.scheduler.timesteps, self.scheduler.step_index)  # a new run makes a new timesteps tensor
            same = self._seen is not None and self._seen[0] is now[0] and self._seen[1] == now[1]
            self.branch = self.branch + 1 if same else 0
            self.step, self._seen = now[1] or 0, now
        self.grid = self.family.grid(module, kwargs)
        self._reached = []
        inputs, self.permutation = self._in_order(kwargs)
        return args, inputs

    def _in_order(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """The inputs of a forward with their tokens in the method's order, where method and family can."""
        order, reorder = getattr(self.method, "order", None), getattr(self.family, "reorder", None)
        can = isinstance(self.method, SparseAttention) and getattr(order, "static", False) and reorder is not None
        if not can or self.step < self.dense_steps:
            return inputs, None
        tokens = inputs["hidden_states"]
        permutation = order(tokens, tokens, replace(self.grid, text=0))
        moved = reorder(inputs, permutation)
        return (inputs, None) if moved is None else (moved, permutation)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if sorted(self._reached) != list(range(self.layers)):
            odd = [i for i in range(self.layers) if self._reached.count(i) != 1]
            raise RuntimeError(
                f"the attention of layers {odd} was not reached exactly once in this forward: another hook, a cache, "
                "skipped layers or fused projections went around our processors. Attach to the plain pipeline."
            )
        self.forwards += 1
        if self.permutation is None:
            return output
        sample = output[0].index_select(1, inverse(self.permutation))
        return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample)

    def attention(self, layer: int | Tensor, q: Tensor, k: Tensor, v: Tensor, text: int | None = None) -> Tensor:
        """Self-attention of one layer; `[B, L, H, D]` in and out, as diffusers lays tensors out.

        text: how many of these tokens are text, from families where layers of one forward differ in it.
        """
        if torch.compiler.is_compiling():
            return attention_operator(q, k, v, layer, -1 if text is None else text)
        layer = int(layer)
        self._reached.append(layer)
        if text is not None:
            self.grid = replace(self.grid, text=text)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D] views
        if self.observe is not None:
            self.observe(self, layer, q, k, v)
        start = now(q.is_cuda)
        if self.method is None or self.step < self.dense_steps or self._block[layer] < self.dense_layers:
            o = self.dense(q, k, v)
            self.dense_calls += 1
        else:
            o = self.method(q, k, v, grid=self.grid, **({} if self.permutation is None else {"in_order": True}))
            self.sparse_calls += 1
            self.density_sum += self.method.last.density
        self._spans.append((start, now(q.is_cuda)))
        return o.transpose(1, 2)

    def report(self) -> dict[str, Any]:
        """What ran, as columns of a record."""
        calls = self.sparse_calls + self.dense_calls
        exact = self.density_sum + self.dense_calls
        return {
            "layers": self.layers,
            "forwards": self.forwards,
            "sparse_calls": self.sparse_calls,
            "dense_calls": self.dense_calls,
            "density_realised": self.density_sum / self.sparse_calls if self.sparse_calls else 1.0,
            "exact_fraction": exact / calls if calls else None,
            "engine": self.method.last.engine if self.sparse_calls else None,
            "attention_ms": elapsed_ms(self._spans),
        }
