"""Everything that is drawn from records into a results folder: tables, plots, frame strips, side-by-side videos."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame


def draw(records: "DataFrame", out: Path) -> list[Path]:
    """Writes tables into `out` and pictures into `out/plots`; returns the pictures and videos."""
    from harness.filmstrip import comparison_video
    from harness.plots import draw_all
    from harness.tables import write_all

    write_all(records, out)
    files = draw_all(records, out / "plots", out)
    video = comparison_video(records, out / "plots" / "side-by-side.mp4", out)
    return [*files, video] if video else files
