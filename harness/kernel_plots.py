"""Figures of `bench kernel`: speed-up by density, latency by length, and the phases of a call. One row = one point."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from harness.kernels import FAMILY, PHASES, in_words, phases

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
DENSE = ["#000000", "#6b6b6b", "#a5a5a5", "#c8c8c8"]
MARKERS = "osD^vP"
PHASE_COLOURS = dict(zip(PHASES, ["#c8c8c8", "#E69F00", "#56B4E9", "#0072B2", "#CC79A7", "#D55E00"], strict=True))
HALO = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.6}
Drawn = tuple[str, Figure, pd.DataFrame]  # file name, figure, its data


def kernel_figures(rows: pd.DataFrame) -> Iterator[Drawn]:
    """Every figure that the rows (harness.kernels.rows) allow."""
    timed = rows[rows["status"].eq("ok") & rows["latency_ms_median"].notna()]
    methods = timed[timed["role"].eq("method")]
    for machine, some in methods.groupby("machine", dropna=False):
        suffix = "" if methods["machine"].nunique() == 1 else f"-{_slug(machine)}"
        yield _speedup(some, f"speedup_density{suffix}")
        if phases(some):
            yield _phases(some, f"phases{suffix}")
    for _, family in timed.groupby(FAMILY, dropna=False):
        if family.loc[family["role"].eq("method"), "tokens"].nunique() > 1:
            yield _latency(family, rows["machine"].nunique() > 1)


def _panels(count: int, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    """Axes for `count` panels, up to three beside one another; the figure is 9 inches wide."""
    columns = 2 if count == 4 else min(3, count)
    lines = math.ceil(count / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(9, height * lines + 0.6), squeeze=False)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def _styles(series: pd.Series) -> dict[str, dict]:
    names = dict.fromkeys(series.sort_values())
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }


def _shapes(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A title and the rows of each shape, by length."""
    groups = rows.sort_values("tokens", kind="stable").groupby([*FAMILY, "tokens"], sort=False, dropna=False)
    return [(f"{g['shape'].iloc[0]} ({g['tokens'].iloc[0]:,} tokens, {g['dtype'].iloc[0]})", g) for _, g in groups]


def _speedup(methods: pd.DataFrame, name: str) -> Drawn:
    """A panel for each shape: times faster than the fastest dense kernel, with the interval of the timing rounds."""
    shapes, styles = _shapes(methods), _styles(methods["series"])
    figure, axes = _panels(len(shapes))
    for ax, (title, shape) in zip(axes, shapes, strict=True):
        for series, line in shape.sort_values("density_realised").groupby("series"):
            bounds = line["speedup"] - line["speedup_low"], line["speedup_high"] - line["speedup"]
            bars = np.nan_to_num(np.clip(np.array(bounds, dtype=float), 0, None))
            ax.errorbar(line["density_realised"], line["speedup"], bars, label=series, markersize=5, linewidth=1.4,
                        capsize=2, **styles[series])  # fmt: skip
        ax.axhline(1, color="#7a7a7a", linestyle=(0, (4, 2)), linewidth=1)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ticks = sorted({round(value, 4) for value in shape["density_realised"]})
        ticks = [tick for i, tick in enumerate(ticks) if i == 0 or tick / ticks[i - 1] > 1.15]
        ax.xaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator())
        ax.set_xticklabels([f"{100 * tick:.3g}" for tick in ticks])
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), minor_locator=NullLocator())
        ax.yaxis.set_major_formatter(_plain())
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("density, realised (%)")
        ax.set_ylabel(f"speed-up over dense {' or '.join(sorted(shape['dense_kernel'].unique()))} (×)", fontsize=8)
    _legend(figure, axes)
    used = ["shape", "tokens", "series", "density_realised", "dense_kernel", "speedup", "speedup_low", "speedup_high"]
    return name, figure, pd.concat([shape for _, shape in shapes])[used]


def _latency(family: pd.DataFrame, several_machines: bool) -> Drawn:
    """A panel for each density: time against length of every kernel, dense in grey, and where sparse breaks even."""
    methods, dense = family[family["role"].eq("method")], family[family["role"].eq("dense")]
    densities = sorted(methods["sparsity"].unique(), reverse=True)
    styles = _styles(methods["series"])
    greys = dict(zip(sorted(dense["series"].unique()), DENSE * len(dense), strict=False))
    figure, axes = _panels(len(densities), 3.4)
    for ax, sparsity in zip(axes, densities, strict=True):
        for series, line in dense.sort_values("tokens").groupby("series"):
            ax.plot(line["tokens"], line["latency_ms_median"], label=series, color=greys[series], linewidth=1.4,
                    marker=".", linestyle="--")  # fmt: skip
        for series, line in methods[methods["sparsity"].eq(sparsity)].sort_values("tokens").groupby("series"):
            even = line["break_even_tokens"].iloc[0]
            words = in_words(None if pd.isna(even) else even, line["tokens"].tolist())
            ax.plot(line["tokens"], line["latency_ms_median"], linewidth=1.4, markersize=5, label=series,
                    **styles[series])  # fmt: skip
            if pd.notna(even) and even > line["tokens"].min():
                ax.axvline(even, color=styles[series]["color"], linewidth=0.8, linestyle=":")
            ax.text(0.03, 0.97 - 0.07 * list(styles).index(series), f"break-even: {words}", fontsize=7, va="top",
                    color=styles[series]["color"], transform=ax.transAxes, bbox=HALO)  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set(major_locator=FixedLocator(sorted(family["tokens"].unique())), minor_locator=NullLocator())
        ax.set_xticklabels([f"{tokens:,}" for tokens in sorted(family["tokens"].unique())], fontsize=7, rotation=30)
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 3)), minor_locator=NullLocator(), major_formatter=_plain())
        ax.set_title(f"density {1 - sparsity:g}", fontsize=8)
        ax.set_xlabel("tokens")
        ax.set_ylabel("latency (ms)")
    _legend(figure, axes)
    one = family.iloc[0]
    name = f"latency_length-b{one['batch']}_h{one['heads']}_d{one['head_dim']}_{one['dtype']}"
    name += f"-{_slug(one['machine'])}" if several_machines else ""
    used = ["role", "series", "tokens", "sparsity", "latency_ms_median", "latency_ms_p20", "latency_ms_p80"]
    return name, figure, family[[*used, "break_even_tokens"]]


def _phases(methods: pd.DataFrame, name: str) -> Drawn:
    """A panel for each shape: what the time of a call consists of; the tick is the whole call in the same rounds."""
    shapes, names = _shapes(methods), phases(methods)
    figure, axes = _panels(len(shapes))
    for ax, (title, shape) in zip(axes, shapes, strict=True):
        shape, bottom = shape.sort_values(["series", "density_realised"]), np.zeros(len(shape))
        place = np.arange(len(shape))
        for i, phase in enumerate(names):
            ms = shape.get(f"phase_ms_{phase}", pd.Series(dtype=float)).fillna(0).clip(lower=0).to_numpy(float)
            colour = PHASE_COLOURS.get(phase, COLOURS[i % len(COLOURS)])
            ax.bar(place, ms, 0.7, bottom, color=colour, label=phase.replace("_", " "))
            bottom += ms
        ax.scatter(place, shape["latency_ms_median"], marker="_", s=160, color="black", label="whole call", zorder=3)
        labels = [f"{row.series} {100 * row.density_realised:.3g} %" for row in shape.itertuples()]
        ax.set_xticks(place, labels, rotation=90, fontsize=6.5)
        ax.set_title(title, fontsize=8)
        ax.set_ylabel("latency (ms)")
        ax.grid(axis="x", visible=False)
    _legend(figure, axes)
    columns = [f"phase_ms_{phase}" for phase in names]
    used = ["shape", "tokens", "series", "density_realised", "latency_ms_median", *columns]
    return name, figure, pd.concat([shape for _, shape in shapes])[used]


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend below all panels, each name once."""
    found = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(4, len(found)))


def _plain() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:g}")


def _slug(value: object) -> str:
    return re.sub(r"[^\w.]+", "_", str(value))
