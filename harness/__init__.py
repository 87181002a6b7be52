"""The experiment. `harness.attach(pipe)` puts sparse attention into a diffusers pipeline for a `with` block."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`attach`, imported when first asked for: importing harness stays cheap."""
    if name == "attach":
        from harness.api import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
