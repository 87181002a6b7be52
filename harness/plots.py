"""Records in, figures out: speed against quality, quality against density, operator error, frames side by side.

Every figure is written as SVG (text stays text), PNG (200 dpi, 9 inches wide, readable in a README) and its
data as CSV. A method keeps its colour and marker in all figures of one model.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from harness import kernels, step_plots
from harness.filmstrip import comparison_video, film_strips
from harness.kernel_plots import kernel_figures
from harness.labels import Usual
from harness.summary import DENSITY, LPIPS, PSNR, REL_L2, SECTION, SPEEDUP, SSIM, Metric, cells, sections, summarise
from harness.tables import title, varying_settings

__all__ = ["comparison_video", "draw_all"]

log = logging.getLogger(__name__)
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "harness",  # the same data give the same file
    "figure.constrained_layout.use": True,
}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B"]  # Okabe-Ito, grey for black
MARKERS = "osD^vPX*"
LINES = ["-", "--", ":"]
FLOOR = "#7a7a7a"
PLACES = [(0, 10), (0, -10), (17, 5), (-17, 5), (17, -7), (-17, -7), (0, 20), (0, -20)]  # of a text, in points
Panels = list[tuple[Metric, Metric]]  # x and y of each


@dataclass(frozen=True)
class Style:
    """How one label is drawn."""

    color: str
    marker: str
    linestyle: str


def draw_all(records: pd.DataFrame, out_dir: Path, records_dir: Path, usual: Usual | None = None) -> list[Path]:
    """Draw what the records allow into `out_dir`; what they do not allow is logged with its reason.

    records_dir: the folder that `frames_path` is relative to. Returns all files, three for each figure.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    ours, others = kernels.split(records)
    files = []
    if len(ours):
        with plt.rc_context(STYLE):
            for name, figure, data in kernel_figures(kernels.rows(ours)):
                files += _save(figure, data, out_dir / name)
    with plt.rc_context(STYLE):
        for name, figure, data in step_plots.step_figures(step_plots.rows(others)):
            files += _save(figure, data, out_dir / name)
    return files + _draw(cells(others, usual), out_dir, records_dir) if len(others) else files


def _draw(labelled: pd.DataFrame, out_dir: Path, records_dir: Path) -> list[Path]:
    """The figures of labelled cells, section by section."""
    several = [column for column in SECTION if column != "workload" and labelled[column].nunique() > 1]
    files = []
    for section in sections(labelled):
        first, rows = section.iloc[0], _series(summarise(section))
        name = "-".join(_slug(first[column]) for column in dict.fromkeys(["model", *several]))
        with plt.rc_context(STYLE):
            for kind, make in _curves(rows, title(section)).items():
                if (made := make()) is not None:
                    files += _save(*made, out_dir / f"{kind}-{name}")
            if first["workload"] == "generate" and first["weights"] != "random":
                for suffix, figure, data in film_strips(section, records_dir):
                    files += _save(figure, data, out_dir / f"frames-{name}-{suffix}")
    return files


def _curves(rows: pd.DataFrame, heading: str) -> dict[str, Callable[[], tuple[Figure, pd.DataFrame] | None]]:
    """Figure name -> function that draws it, or logs why not."""
    workload = rows["workload"].iloc[0] if len(rows) else ""
    if workload in ("step", "operator"):
        panels = [(DENSITY, REL_L2), (SPEEDUP, REL_L2)]
        return {f"{workload}_error": lambda: _figure(rows, panels, heading, "error against density and speed")}
    second = next((metric for metric in (LPIPS, SSIM) if rows[metric.column].notna().any()), None)
    metrics = [PSNR, second] if second else [PSNR]
    return {
        "speed_quality": lambda: _figure(rows, [(SPEEDUP, m) for m in metrics], heading, "quality against speed"),
        "density_quality": lambda: _figure(rows, [(DENSITY, m) for m in metrics], heading, "quality against density"),
    }


def _series(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with `series`: the label and the settings that vary, one line in a plot."""
    series = rows["label"].astype(str)
    for column in varying_settings(rows):
        series += [f", {column.replace('_', ' ')} {value:g}" if pd.notna(value) and not isinstance(value, str)
                   else f", {value}" for value in rows[column]]  # fmt: skip
    return rows.assign(series=series)


def _figure(rows: pd.DataFrame, panels: Panels, heading: str, what: str) -> tuple[Figure, pd.DataFrame] | None:
    """One panel per (x, y), one line per series, shared legend below. None when no method has both numbers."""
    methods = rows[rows["role"].eq("method")]
    panels = [(x, y) for x, y in panels if methods[[x.column, y.column]].notna().all(axis=1).any()]
    if not panels:
        log.warning("no plot of %s for %s: no method has both numbers.", what, heading)
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 4.3), squeeze=False)
    styles = {
        series: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i // len(COLOURS) % len(LINES)])
        for i, series in enumerate(dict.fromkeys(methods["series"].sort_values()))
    }
    for ax, (x, y) in zip(axes[0], panels, strict=True):
        _panel(ax, rows, x, y, styles)
    handles, names = axes[0, 0].get_legend_handles_labels()
    _legend(figure, handles, names)
    heading += f"\n{_bars(methods)}"
    figure.suptitle(heading, fontsize=8, color="#444444", wrap=True)
    for ax, (x, y) in zip(axes[0], panels, strict=True):
        _annotate(ax, methods, x, y, styles)
    used = [c for metric in dict.fromkeys(m for panel in panels for m in panel) for c in _columns(metric)]
    return figure, rows[["role", "series", "label", "sparsity", "n", *used]]


def _legend(figure: Figure, handles: list, names: list[str]) -> None:
    """Below the axes, in as many columns as the width holds; the figure grows by the rows that this takes."""
    for columns in range(min(4, len(names)), 0, -1):
        legend = figure.legend(handles, names, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()
    rows = math.ceil(len(names) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))


def _bars(methods: pd.DataFrame) -> str:
    least, most = methods["n"].min(), methods["n"].max()
    if most == 1:
        return "bars: 95 % interval of the timing rounds; one cell (seed × prompt) shows no spread of quality"
    cells = f"{most}" if least == most else f"{least} to {most}"
    return f"bars: 95 % intervals over {cells} cells (seed × prompt), which shift all methods together"


def _columns(metric: Metric) -> list[str]:
    if metric is SPEEDUP:
        return ["speedup", "speedup_low", "speedup_high"]
    return [metric.column, f"{metric.column}_half"]


def _panel(ax: Axes, rows: pd.DataFrame, x: Metric, y: Metric, styles: dict[str, Style]) -> None:
    methods = rows[rows["role"].eq("method")].dropna(subset=[x.column, y.column])
    for series, line in methods.sort_values(x.column).groupby("series"):
        style = styles[series]
        xerr = None
        if x is SPEEDUP:
            bounds = line["speedup"] - line["speedup_low"], line["speedup_high"] - line["speedup"]
            xerr = np.nan_to_num(np.clip(np.array(bounds, dtype=float), 0, None))
        yerr = np.nan_to_num(line[f"{y.column}_half"].to_numpy(float))
        bars = ax.errorbar(
            line[x.column], line[y.column], yerr, xerr, label=series, markersize=6, linewidth=1.5, elinewidth=0.8,
            capsize=2, color=style.color, marker=style.marker, linestyle=style.linestyle, zorder=3,
        )  # fmt: skip
        for part in (*bars[1], *bars[2]):
            part.set_alpha(0.55)
    if x is SPEEDUP:
        _front(ax, methods, y)
    if x is DENSITY:
        _density_axis(ax, methods)
    if y is REL_L2:
        _log_axis(ax)
    _noise_floor(ax, rows[rows["role"].eq("noise_floor")], y)
    kernels = " or ".join(sorted(methods["dense_kernel"].dropna().unique())) or "attention"
    ax.set_xlabel({SPEEDUP: f"speed-up over dense {kernels} (×)", DENSITY: "density, realised (%)"}[x])
    ax.set_ylabel(y.title)


def _front(ax: Axes, methods: pd.DataFrame, y: Metric) -> None:
    """The Pareto front as a stair: the best quality that is reached at each speed-up or above it."""
    front = unbeaten(methods, y)
    ax.step(
        front["speedup"], front[y.column], where="pre", color="#b8b8b8", linewidth=3.5, zorder=1, label="Pareto front"
    )


def unbeaten(methods: pd.DataFrame, y: Metric) -> pd.DataFrame:
    """The rows that no other row equals or beats in both speed-up and y, slowest first."""
    ordered = methods.sort_values(["speedup", y.column], ascending=[False, y.better < 0])
    score = ordered[y.column] * y.better
    return ordered[score > score.cummax().shift(fill_value=-np.inf)][::-1]


def _density_axis(ax: Axes, methods: pd.DataFrame) -> None:
    ax.set_xscale("log", base=2)
    ticks = sorted({round(value, 4) for value in methods["density_realised"]})
    ticks = [tick for i, tick in enumerate(ticks) if i == 0 or tick / ticks[i - 1] > 1.15]  # no tick on another
    ax.xaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator())
    ax.set_xticklabels([f"{100 * tick:.3g}" for tick in ticks])


def _log_axis(ax: Axes) -> None:
    ax.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter=plain)


def _noise_floor(ax: Axes, floor: pd.DataFrame, y: Metric) -> None:
    """A line where two exact dense runs lie, or an arrow and the value when the axis would have to stretch for it."""
    low, high = ax.get_ylim()
    reach = (low / 3, high * 3) if ax.get_yscale() == "log" else (low - 0.25 * (high - low), high + 0.25 * (high - low))
    names: dict[float, list[str]] = {}  # value -> variants, lines on top of one another share a name
    far = []
    for row in floor.dropna(subset=[y.column]).itertuples():
        value, half = getattr(row, y.column), getattr(row, f"{y.column}_half")
        if not reach[0] < value < reach[1]:
            far.append(f"{row.label} {value:.3g} {y.unit}".strip())
            continue
        ax.axhline(value, color=FLOOR, linestyle=(0, (4, 2)), linewidth=1, zorder=2)
        if pd.notna(half):
            ax.axhspan(value - half, value + half, color=FLOOR, alpha=0.15, linewidth=0, zorder=0)
        close = next((other for other in names if abs(other - value) < 0.05 * (high - low)), value)
        names.setdefault(close, []).append(row.label)
    style = {"ha": "right", "fontsize": 7.5, "color": FLOOR}
    for value, variants in names.items():
        name = f"noise floor: {', '.join(variants)}"
        side, shift = ("bottom", 2) if y.better > 0 else ("top", -2)  # away from the curves
        place = {"xycoords": ("axes fraction", "data"), "xytext": (0, shift), "textcoords": "offset points"}
        ax.annotate(name, (0.99, value), va=side, **place, **style)
    if far:
        arrow = "↑" if y.better > 0 else "↓"
        ax.annotate(f"{arrow} noise floor: {', '.join(far)}", (1, 1.01), xycoords="axes fraction", va="bottom", **style)


def _annotate(ax: Axes, methods: pd.DataFrame, x: Metric, y: Metric, styles: dict[str, Style]) -> None:
    """The sparsity beside each point of a speed plot, in the first free place around it; none free, none written."""
    if x is not SPEEDUP:
        return
    ax.figure.draw_without_rendering()  # the layout must stand before text can be measured
    points = methods.dropna(subset=[x.column, y.column])
    markers = ax.transData.transform(points[[x.column, y.column]].to_numpy(float))
    taken = [text.get_window_extent() for text in ax.texts]
    halo = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6}
    for row in points.itertuples():
        point, color = (row.speedup, getattr(row, y.column)), styles[row.series].color
        text = ax.annotate(f"{row.sparsity:g}", point, ha="center", va="center", textcoords="offset points",
                           xytext=(0, 0), fontsize=7, color=color, bbox=halo, zorder=4)  # fmt: skip
        for text.xyann in PLACES:
            box = text.get_window_extent()
            inside = ax.bbox.contains(*box.min) and ax.bbox.contains(*box.max)
            if inside and not box.count_overlaps(taken) and not box.padded(5).count_contains(markers):
                taken.append(box)
                break
        else:
            text.remove()


def _save(figure: Figure, data: pd.DataFrame, stem: Path) -> list[Path]:
    """Write figure and data as .svg, .png and .csv and close the figure."""
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("svg", "png", "csv")]
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=200)
    data.to_csv(files[2], index=False)
    plt.close(figure)
    return files


def _slug(value: object) -> str:
    return re.sub(r"[^\w.]+", "_", str(value))
