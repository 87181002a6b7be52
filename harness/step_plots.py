"""Records of workload=step with a breakdown in, a table and a figure out: what a denoising step consists of, by model.

For each model and size a bar for dense, one for each method and density, and one for the limit, a forward whose
attention costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd

from harness.kernels import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Page = tuple[str, list[pd.DataFrame], list[str]]  # title, text tables, notes
Drawn = tuple[str, "Figure", pd.DataFrame]  # file name, figure, its data

PARTS = {  # name -> colour, from the bottom of a bar; the greys are what no attention method can save
    "linear layers": "#6b6b6b",
    "everything else": "#c8c8c8",
    "dense attention": "#0072B2",
    "exact": "#56B4E9",
    "routing": "#E69F00",
    "statistics": "#CC79A7",
    "tail": "#D55E00",
    "statistics and tail": "#D55E00",
    "order": "#F0E442",
    "layout": "#009E73",
}
GROUP = ["machine", "model", "size", "series"]  # of which several seeds are one bar, by their medians
DASH = "–"


def is_broken_down(records: pd.DataFrame) -> pd.Series:
    """Which records have a breakdown."""
    return records["limit_ms"].notna() if "limit_ms" in records else pd.Series(False, index=records.index)


def rows(records: pd.DataFrame) -> pd.DataFrame:
    """One row for each machine, model, size, method and density: medians over seeds of the columns of
    harness.workloads.breakdown, and the parts of the three bars as `sparse: PART`, `dense: PART`, `limit: PART`."""
    found = [_row(record) for record in records[is_broken_down(records)].to_dict("records")]
    if not found:
        return pd.DataFrame(columns=GROUP)
    frame = pd.DataFrame(found)
    numbers = [name for name in frame if name not in GROUP and pd.api.types.is_numeric_dtype(frame[name])]
    words = [name for name in frame if name not in (*GROUP, *numbers)]
    groups = frame.groupby(GROUP, sort=False, dropna=False)
    return groups[words].first().join(groups[numbers].median()).reset_index()


def _row(record: dict) -> dict:
    model = record["config"]["model"]
    frames = f", {model['frames']} frames" if model.get("frames", 1) > 1 else ""
    series = f"{record['method']} {record['engine']}, density {record['density_realised']:.3g}"
    if record["dense_steps"] or record["dense_layers"]:
        series += f", {record['dense_steps']} steps and {record['dense_layers']} layers dense"
    size = f"{model['height']} x {model['width']}{frames}"
    ms = {name.removeprefix("step_ms_"): value for name, value in record.items()
          if name.startswith("step_ms_") and pd.notna(value)}  # fmt: skip
    phases = [name for name in (*PHASES, "layout") if name in ms]
    sparse = {name.replace("_", " "): max(0.0, ms[name]) for name in phases}
    if not phases:  # a method of one's own that says nothing of itself
        sparse = {"exact": ms["attention"] - ms["dense_layers"]}
    kinds = {
        "dense": (record["dense_latency_ms_median"], {"dense attention": record["dense_step_ms_attention"]}),
        "sparse": (record["latency_ms_median"], {"dense attention": ms["dense_layers"], **sparse}),
        "limit": (record["limit_ms"], {}),
    }
    parts, linear = {}, ms.get("linear", 0.0)
    for kind, (whole, attention) in kinds.items():
        measured = {"dense": record["dense_step_ms_attention"], "sparse": ms["attention"], "limit": 0.0}[kind]
        rest = {"linear layers": linear, "everything else": max(0.0, whole - linear - measured)}
        parts |= {f"{kind}: {name}": value for name, value in (rest | attention).items()}
    kept = ("machine", "model", "tokens", "weights", "dense_kernel", "density_realised", "latency_ms_median", "speedup",
            "speedup_low", "speedup_high", "dense_latency_ms_median", "limit_ms", "limit_speedup", "latency_n",
            "dense_step_ms_attention", "step_ms_attention", "step_ms_linear", "dense_predicted_s", "predicted_s",
            "predicted_speedup", "peak_memory_mb", "dense_peak_memory_mb", "weights_mb")  # fmt: skip
    return {"size": size, "series": series, **{name: record.get(name) for name in kept}, **parts}


# -------------------------------------------------------------------------------------------------------------- text
def pages(frame: pd.DataFrame) -> list[Page]:
    """One page for each machine."""
    return [(f"One denoising step, {machine}", [_table(some)], _notes(some))
            for machine, some in frame.groupby("machine", dropna=False)]  # fmt: skip


def _table(frame: pd.DataFrame) -> pd.DataFrame:
    def both(a: str, b: str, scale: float = 1.0) -> list[str]:
        return [f"{_number(x * scale)} → {_number(y * scale)}" for x, y in zip(frame[a], frame[b], strict=True)]

    ratio = [f"{row.speedup:.2f}" if pd.isna(row.speedup_low)
             else f"{row.speedup:.2f} ({row.speedup_low:.2f}–{row.speedup_high:.2f})"
             for row in frame.itertuples()]  # fmt: skip
    return pd.DataFrame({
        "model": frame["model"] + ", " + frame["size"],
        "tokens": [f"{int(tokens):,}" for tokens in frame["tokens"]],
        "method": frame["series"],
        "step (ms)": both("dense_latency_ms_median", "latency_ms_median"),
        "speed-up (95 %)": ratio,
        "limit": [f"{value:.2f}" for value in frame["limit_speedup"]],
        "attention (ms)": both("dense_step_ms_attention", "step_ms_attention"),
        "linear layers (ms)": frame["step_ms_linear"].map(_number),
        "whole sample (s)": both("dense_predicted_s", "predicted_s"),
        "peak beyond weights (GiB)": both("dense_peak_memory_mb", "peak_memory_mb", 1 / 1024),
    })  # fmt: skip


def _notes(frame: pd.DataFrame) -> list[str]:
    kernels, rounds = " or ".join(sorted(set(frame["dense_kernel"]))), sorted(set(frame["latency_n"].astype(int)))
    notes = [
        f"a → b: dense by {kernels}, then the method, in turn, medians of {' or '.join(map(str, rounds))} rounds. "
        "Limit: speed-up of a forward whose attention costs nothing. Whole sample: predicted from the steps, dense "
        "steps and branches of guidance, without text encoder and decoder."
    ]
    if frame["weights"].eq("random").any():
        notes.append("Random weights: these are times alone, and no error stands beside them.")
    return notes


# ------------------------------------------------------------------------------------------------------------ figure
def step_figures(frame: pd.DataFrame) -> Iterator[Drawn]:
    """One figure for each machine: a panel for each model and size."""
    for i, (machine, some) in enumerate(frame.groupby("machine", dropna=False)):
        yield f"step_breakdown{f'-{i}' if i else ''}", *_figure(some, str(machine))


def _figure(frame: pd.DataFrame, machine: str) -> tuple[Figure, pd.DataFrame]:
    from matplotlib import pyplot as plt  # the table needs none

    panels = [(f"{model}\n{size}", some) for (model, size), some in frame.groupby(["model", "size"], sort=False)]
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(9, 3.2 * lines + 0.8), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    bars = []
    for ax, (title, some) in zip(axes.flat, panels, strict=False):
        bars += _panel(ax, title, some)
    found = {name: handle for ax in axes.flat[: len(panels)]
             for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(4, len(found)))
    figure.suptitle(f"One denoising step by what it consists of, {machine}", fontsize=9)
    return figure, pd.DataFrame(bars)


def _panel(ax: Axes, title: str, some: pd.DataFrame) -> list[dict]:
    """A bar for dense, one for each row, one for the limit; the ticks are whole forwards as measured."""
    first = some.iloc[0]
    bars = [("dense", first, "dense", first["dense_latency_ms_median"])]
    bars += [(row["series"].replace(", density ", " "), row, "sparse", row["latency_ms_median"])
             for _, row in some.iterrows()]  # fmt: skip
    bars += [("limit", first, "limit", first["limit_ms"])]
    scale, unit = (1e-3, "s") if first["dense_latency_ms_median"] >= 1000 else (1.0, "ms")
    data = []
    for place, (name, row, kind, whole) in enumerate(bars):
        bottom = 0.0
        for part, colour in PARTS.items():
            ms = row.get(f"{kind}: {part}")
            if ms is None or not ms > 0:
                continue
            label = part if part not in ax.get_legend_handles_labels()[1] else None
            ax.bar(place, ms * scale, 0.72, bottom * scale, color=colour, label=label, linewidth=0.4, edgecolor="white")
            bottom += ms
            data.append({"panel": title.replace("\n", ", "), "bar": name, "part": part, "ms": ms, "whole_ms": whole})
        ax.scatter([place], [whole * scale], marker="_", s=150, color="black", zorder=3,
                   label="whole forward" if place == 0 else None)  # fmt: skip
        faster = first["dense_latency_ms_median"] / whole
        words = f"{whole * scale:.3g} {unit}" + ("" if kind == "dense" else f"\n{faster:.2f} ×")
        ax.annotate(words, (place, max(whole, bottom) * scale), (0, 3), textcoords="offset points", ha="center",
                    va="bottom", fontsize=6.5)  # fmt: skip
    ax.set_xticks(range(len(bars)), [name for name, *_ in bars], rotation=20, ha="right", fontsize=7)
    ax.set_title(title, fontsize=7.5)
    ax.set_ylabel(f"one step ({unit})", fontsize=8)
    ax.margins(y=0.18)
    ax.grid(axis="x", visible=False)
    return data


def _number(value: float) -> str:
    """Three digits, and every digit of what is larger."""
    if value is None or pd.isna(value):
        return DASH
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".removesuffix(".")
