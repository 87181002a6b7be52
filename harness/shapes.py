"""The sizes of one attention call, and the names that conf/shape gives to some of them. No torch, no Hydra."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from harness.config import conf_dir, options

SIZES = ("batch", "heads", "tokens", "head_dim")


def shape_name(sizes: Mapping[str, Any]) -> str:
    """The preset of conf/shape with these sizes, or the sizes themselves, as `1x4x1024x64`."""
    key = tuple(int(sizes[size]) for size in SIZES)
    return _presets().get(key, "x".join(map(str, key)))


@cache
def _presets() -> dict[tuple[int, ...], str]:
    files = {name: yaml.safe_load((conf_dir() / "shape" / f"{name}.yaml").read_text()) for name in options("shape")}
    return {tuple(sizes[size] for size in SIZES): name for name, sizes in files.items()}
