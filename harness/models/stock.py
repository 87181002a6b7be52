"""What the families share: only stock attention is replaced, and the projections of a joint attention."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from harness.hook import Session


class Replacement:
    """What every family's processor has beside the stock class it is mixed into: its layer and its session."""

    def __init__(self, layer: int, session: "Session"):
        super().__init__()
        # A tensor: torch.compile would make a graph for every number, and has one for all tensors.
        self.layer, self.session = torch.tensor(layer), session


def replacements(
    transformer: nn.Module, names: list[str], stock: type, replacement: type[Replacement], session: "Session"
) -> dict[str, Any]:
    """A `replacement` for each of `names`, numbered in their order. Raises as `check_stock`."""
    check_stock(transformer, names, stock)
    return {name: replacement(layer, session) for layer, name in enumerate(names)}


def double_and_single(transformer: nn.Module) -> list[str]:
    """The joint attentions of FLUX and HunyuanVideo in running order: double blocks, then single blocks."""
    kinds = ("transformer_blocks", "single_transformer_blocks")
    return [f"{kind}.{i}.attn.processor" for kind in kinds for i in range(len(getattr(transformer, kind)))]


def check_stock(transformer: nn.Module, names: Iterable[str], stock: type) -> None:
    """Refuses attention that is not diffusers' own, since replacing it would silently undo what somebody changed.

    names: keys of `transformer.attn_processors`. stock: the processor class that the replacement is written after.
    Raises ValueError in one sentence.
    """
    found = transformer.attn_processors
    for name in names:
        kind = type(found[name])
        if kind is not stock:
            raise ValueError(
                f"{name} is {kind.__name__}, but only the stock {stock.__name__} can be replaced: unload IP-adapters, "
                "call unfuse_qkv_projections() on fused projections, and leave other attention hooks and sessions."
            )
        if getattr(found[name], "_parallel_config", None) is not None:
            raise ValueError(f"{name} runs context parallel, which is not supported: attach to a pipeline on one GPU.")
        # Modules without an unfuse_projections() (SD3) fuse by another processor class; there the flag means nothing.
        attention = transformer.get_submodule(name.removesuffix(".processor"))
        if hasattr(attention, "unfuse_projections") and attention.fused_projections:
            raise ValueError(f"{name} has fused projections: call unfuse_qkv_projections() first.")


def project(
    x: Tensor,
    heads: int,
    to_q: nn.Module,
    to_k: nn.Module,
    to_v: nn.Module,
    norm_q: nn.Module | None,
    norm_k: nn.Module | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[B, L, H, D]` of tokens `[B, L, C]`; q and k are normalised per head where the model has norms."""
    q, k, v = (to(x).unflatten(-1, (heads, -1)) for to in (to_q, to_k, to_v))
    return (q if norm_q is None else norm_q(q)), (k if norm_k is None else norm_k(k)), v


def join(first: Iterable[Tensor], second: Iterable[Tensor]) -> list[Tensor]:
    """q, k, v `[B, L, H, D]` of two groups of tokens, one after the other in L."""
    return [torch.cat(pair, 1) for pair in zip(first, second, strict=True)]


def own_projections(attn: nn.Module) -> tuple[nn.Module | None, ...]:
    """The projections and norms of the image or video tokens, in `project`'s order."""
    return attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k


def text_projections(attn: nn.Module) -> tuple[nn.Module | None, ...]:
    """The projections and norms of the text tokens, in `project`'s order."""
    return attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
