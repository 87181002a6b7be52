"""Sparse attention in a diffusers pipeline of yours, for the length of a `with` block.

    with harness.attach(pipe, density=0.125) as session:
        image = pipe(prompt).images[0]
    print(session.report())

(Not named attach.py: importing that file would put the module in the place of the function `harness.attach`.)
"""

from importlib import import_module
from typing import Any

from harness.config import Composer, build
from harness.errors import InputError
from harness.hook import Family, Session
from pisa import SparseAttention

FAMILIES = {
    "WanTransformer3DModel": "harness.models.wan.WanFamily",
    "HunyuanVideoTransformer3DModel": "harness.models.hunyuan_video.HunyuanVideoFamily",
    "FluxTransformer2DModel": "harness.models.flux.FluxFamily",
    "SD3Transformer2DModel": "harness.models.sd3.SD3Family",
}


def attach(
    pipe: Any,
    method: str = "pisa",
    density: float = 0.125,
    *,
    dense_steps: int = 0,
    dense_layers: int = 0,
    order: str | None = None,
    routing: str | None = None,
    tail: str | None = None,
    block_size: int | None = None,
    engine: str = "auto",
) -> Session:
    """A session to enter with `with`: inside, the pipeline's self-attention is `method`; after it, the stock one again.

    pipe: a diffusers pipeline of Wan2.1, HunyuanVideo, FLUX.1 or SD3(.5). method: a file of conf/method, "dense" too.
    density: fraction of key blocks computed exactly, in (0, 1]. dense_steps, dense_layers: the first denoising steps
    and transformer blocks that stay dense. order, routing, tail: option names of conf/method/order|routing|tail;
    None keeps the method's own, where order "model" means raster for video and tile_2d for images.
    `session.report()` then says what ran: layers, forwards, calls, realised density, exact fraction, engine.
    Raises ValueError for what cannot run, before anything does.
    """
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(
            f"density must be in (0, 1], got {density!r}: it is the fraction of key blocks computed exactly, "
            "and 1 computes them all."
        )
    if min(dense_steps, dense_layers) < 0:
        raise ValueError(f"dense_steps and dense_layers must be at least 0, got {dense_steps} and {dense_layers}.")
    family = family_of(pipe)
    axes = {"method/order": order, "method/routing": routing, "method/tail": tail, "method.block_size": block_size}
    built = compose(method, density, engine, {k: v for k, v in axes.items() if v is not None}, family.order)
    return Session(
        pipe.transformer,
        family,
        method=built,
        scheduler=pipe.scheduler,
        dense_steps=dense_steps,
        dense_layers=dense_layers,
    )


def family_of(pipe: Any) -> Family:
    """The family of the pipeline's transformer. Raises ValueError naming the supported ones."""
    name = type(getattr(pipe, "transformer", None)).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"the transformer of this pipeline ({type(pipe).__name__}) is {name}: supported are {', '.join(FAMILIES)}."
        )
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            "this pipeline has a second transformer (Wan2.2), which would stay dense: only one-transformer pipelines "
            "are supported."
        )
    module, _, kind = FAMILIES[name].rpartition(".")
    return getattr(import_module(module), kind)()


def compose(
    method: str, density: float, engine: str, axes: dict[str, Any], family_order: str
) -> SparseAttention | None:
    """The method that conf/method describes, as a sweep would build it; None for "dense"."""
    if method == "dense":
        return None
    settings = {"method": method, **axes, "sparsity": round(1 - density, 12), "engine": engine}
    try:
        one = Composer().compose(((k, str(v)) for k, v in settings.items()), order=family_order)
        return build(one.config["method"])
    except InputError as error:
        raise ValueError(str(error)) from None
