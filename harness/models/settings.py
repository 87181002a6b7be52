"""Checks of the settings that every model has."""

from harness.errors import InputError


def check_steps(steps: int, dense_steps: int, dense_layers: int) -> None:
    """Raises InputError for denoising steps, dense first steps or dense first blocks that cannot be."""
    if steps < 1 or not 0 <= dense_steps <= steps or dense_layers < 0:
        raise InputError(
            f"model.steps must be at least 1 and dense_steps from 0 to it, dense_layers at least 0; "
            f"got steps={steps}, dense_steps={dense_steps}, dense_layers={dense_layers}."
        )
