"""The summary and the paired differences as text: terminal, CSV, Markdown and LaTeX.

Cells without numbers are named below their table, a number that was not measured shows as a dash.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness import kernels, step_plots
from harness.labels import Usual
from harness.summary import (
    DENSITY,
    ERROR,
    EXACT,
    LATENCY,
    PICTURE,
    PSNR,
    QUALITY,
    SECTION,
    SETTINGS,
    SPEEDUP,
    Metric,
    cells,
    check_label,
    compare,
    failures,
    paired,
    sections,
    summarise,
    summary,
)

__all__ = ["latex", "markdown", "paired", "print_tables", "summary", "write_all"]

DASH = "–"
BOLD = "\x02", "\x03"  # marks around the best value until a writer knows how to print it
FEW_PAIRS = 10  # up to five labels: all pairs are shown
MIXED = ["git_commit", "torch", "diffusers", "gpu"]  # rows that mix these average over different programs
METRICS = {metric.column: metric for metric in [*PICTURE, *ERROR]} | {"speed_ratio": SPEEDUP}


def print_tables(records: pd.DataFrame, console: Console | None = None, usual: Usual | None = None) -> None:
    """Print every table; in a pipe or file plain text of 120 columns, without colour or bold."""
    console = console or Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for heading, tables, notes in _all_pages(records, None, usual):
        console.print(f"\n{heading}", markup=False, style="bold")
        for frame in tables:
            table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
            for place, name in enumerate(frame):
                head = name.replace(" (", "\n(")
                table.add_column(head, justify="right" if place else "left", overflow="fold")
            for row in frame.itertuples(index=False):
                table.add_row(*(_rich(text) for text in row))
            console.print(table)
        for note in notes:
            console.print(note, markup=False)


def markdown(records: pd.DataFrame, against: str | None = None, usual: Usual | None = None) -> str:
    """All tables as Markdown, each with a heading and the notes below it."""
    return _as_markdown(_all_pages(records, against, usual))


def latex(records: pd.DataFrame, against: str | None = None, usual: Usual | None = None) -> str:
    """All tables as LaTeX (booktabs); titles and notes are comments, for the author to use in the caption."""
    return _as_latex(_all_pages(records, against, usual))


def write_all(
    records: pd.DataFrame, out_dir: Path, against: str | None = None, usual: Usual | None = None
) -> list[Path]:
    """Write summary.csv, paired.csv and failures.csv (raw), tables.md and tables.tex (formatted) into `out_dir`.

    Cells of the kernel workload have kernels.csv in the place of the first three.
    """
    ours, others = kernels.split(records)
    pages = _all_pages(records, against, usual)
    texts = _raw(cells(others, usual), against) if len(others) else {}
    if len(ours):
        texts["kernels.csv"] = kernels.rows(ours).to_csv(index=False)
    texts |= {"tables.md": _as_markdown(pages), "tables.tex": _as_latex(pages)}
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out_dir / name).write_text(text, encoding="utf-8")
    return [out_dir / name for name in texts]


def _raw(labelled: pd.DataFrame, against: str | None) -> dict[str, str]:
    bad = labelled[labelled["status"].ne("ok")]
    return {
        "summary.csv": summarise(labelled).to_csv(index=False),
        "paired.csv": compare(labelled, against).to_csv(index=False),
        "failures.csv": bad[[*SECTION, "status", "label", "sparsity", *SETTINGS, "seed", "reason"]].to_csv(index=False),
    }


# ----------------------------------------------------------------------------------------------- numbers into text
Page = tuple[str, list[pd.DataFrame], list[str]]  # title, text tables, notes


def _all_pages(records: pd.DataFrame, against: str | None, usual: Usual | None) -> list[Page]:
    """The pages of all records; attention calls on random inputs have tables of their own."""
    ours, others = kernels.split(records)
    pages = _pages(cells(others, usual), against) if len(others) else []
    pages += step_plots.pages(step_plots.rows(others))
    return pages + kernels.pages(kernels.rows(ours)) if len(ours) else pages


def _pages(labelled: pd.DataFrame, against: str | None) -> list[Page]:
    """One page for every section. Raises ValueError when no method has the label `against`."""
    check_label(labelled, against)
    pages = []
    for section in sections(labelled):
        rows, pairs = summarise(section), compare(section, against)
        shown = pairs if against else _controlled(pairs)
        tables = [_summary_text(rows)] if len(rows) else []
        tables += [_paired_text(shown)] if len(shown) else []
        notes = _notes(section, rows)
        if len(shown) < len(pairs):
            notes.append("Pairs shown differ in at most one of order, routing and tail; paired.csv has all.")
        pages.append((title(section), tables, notes))
    return pages


def _controlled(pairs: pd.DataFrame) -> pd.DataFrame:
    """All pairs when they are few; of many only those that change one axis, so that the difference has one cause."""
    few = len(pairs[["label", "against"]].drop_duplicates()) <= FEW_PAIRS
    return pairs if few else pairs[pairs["changed"].str.split().map(len) <= 1]


def _as_markdown(pages: list[Page]) -> str:
    parts = []
    for heading, tables, notes in pages:
        parts.append(f"### {heading}")
        for frame in tables:
            text = frame.map(lambda cell: _marked(cell.replace("|", "\\|"), "**", "**"))
            align = ["left"] + ["right"] * (len(frame.columns) - 1)
            parts.append(text.to_markdown(index=False, disable_numparse=True, colalign=align))
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _as_latex(pages: list[Page]) -> str:
    parts = []
    for heading, tables, notes in pages:
        parts.append(f"% {heading}")
        for frame in tables:
            body = frame.to_latex(index=False, escape=True, column_format="l" + "r" * (len(frame.columns) - 1))
            body = _marked(body, r"\textbf{", "}")
            parts.append(body.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$"))
        parts.append("\n".join(f"% {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def varying_settings(rows: pd.DataFrame) -> list[str]:
    """The settings that need a column: methods decide, or everybody where there is no method."""
    methods = rows[rows["role"].eq("method")] if "role" in rows and rows["role"].eq("method").any() else rows
    return [column for column in SETTINGS if methods[column].nunique() > 1]


def title(section: pd.DataFrame) -> str:
    first = section.iloc[0]
    methods = section[section["role"].eq("method")]
    fixed = [column for column in SETTINGS if column != "dense_kernel" and methods[column].nunique() == 1]
    words = [f"{first['model']} ({first['weights']} weights), {first['workload']}"]
    words += [f"{column.replace('_', ' ')} {methods[column].dropna().iloc[0]:g}" for column in fixed]
    kernels = sorted(methods["dense_kernel"].dropna().unique())
    words += [f"speed-up over dense {' or '.join(kernels)}"] if kernels else []
    words += [f"machine {first['machine']}"] if not pd.isna(first["machine"]) else []
    return ", ".join(words)


def _summary_text(rows: pd.DataFrame) -> pd.DataFrame:
    """The formatted summary of one section; the best values stand between the marks BOLD."""
    quality = [m for m in QUALITY[rows["workload"].iloc[0]] if not _hides_quality(rows)]
    text = pd.DataFrame({"method": rows["label"]})
    for column in [*varying_settings(rows), "sparsity"]:
        text[column.replace("_", " ")] = rows[column].map(_plain)
    for metric in (DENSITY, EXACT):
        text[metric.title] = rows[metric.column].map(_plain)
    text["n"] = rows["n"].astype(str)
    for metric in [LATENCY, SPEEDUP, *quality]:
        shown, values, halves = metric, rows[metric.column], rows[f"{metric.column}_half"]
        if metric in (LATENCY, SPEEDUP) and values.isna().all():
            continue  # an untimed sweep
        if metric is LATENCY:
            shown, values, halves = _latency(values, halves)
        shown_values = [_with_half(*pair, shown) for pair in zip(values, halves, strict=True)]
        text[shown.title] = [
            f"{BOLD[0]}{value}{BOLD[1]}" if best else value
            for value, best in zip(shown_values, _best(rows, shown, shown_values), strict=True)
        ]
    if "PSNR" in "".join(text):
        same = rows["identical"].eq(rows["n"])
        text.loc[same, PSNR.title] = "identical"
    return text


def _latency(values: pd.Series, halves: pd.Series) -> tuple[Metric, pd.Series, pd.Series]:
    """Milliseconds, or seconds when the slowest row needs a second; four digits of the slowest in every row."""
    unit, scale = ("s", 1e-3) if values.max() >= 1000 else ("ms", 1.0)
    slowest = values.max() * scale
    decimals = max(0, 3 - math.floor(math.log10(slowest))) if slowest > 0 else 3
    return replace(LATENCY, unit=unit, decimals=decimals), values * scale, halves * scale


def _best(rows: pd.DataFrame, metric: Metric, shown: list[str]) -> pd.Series:
    """Which methods are best as shown, among two or more methods at one sparsity and setting; equal texts share it."""
    value = rows[metric.column].where(rows["role"].eq("method")) * metric.better
    groups = [rows[column] for column in ["sparsity", *varying_settings(rows)]]
    top = value.groupby(groups).transform("max")
    rivals = value.groupby(groups).transform("count")
    centre = pd.Series([text.split(" ")[0] for text in shown], index=rows.index)
    at_top = centre.where(value.eq(top)).groupby(groups).transform("first")
    return value.notna() & (rivals > 1) & centre.eq(at_top)


def _paired_text(pairs: pd.DataFrame) -> pd.DataFrame:
    """One row per pair and sparsity: difference ± half-width, wins of n, and `tie` where the interval holds none."""
    places = [column for column in SETTINGS if pairs[column].nunique() > 1]
    heads = {"speed_ratio": f"times faster ({SPEEDUP.unit})"} | {m.column: m.title for m in [*PICTURE, *ERROR]}
    rows = []
    for key, group in pairs.groupby(["label", "against", "sparsity", *places], dropna=False, sort=False):
        row = {"method vs other": f"{key[0]} vs {key[1]}"}
        row |= {
            name.replace("_", " "): _plain(value) for name, value in zip(["sparsity", *places], key[2:], strict=True)
        }
        for pair in group.itertuples():
            metric = METRICS[pair.metric]
            sign = "" if pair.metric == "speed_ratio" or pair.value < 0 else "+"
            tie = " tie" if pair.verdict == "tie" else ""
            row[heads[pair.metric]] = f"{sign}{_with_half(pair.value, pair.half, metric)} {pair.wins}/{pair.n}{tie}"
        rows.append(row)
    return pd.DataFrame(rows).fillna(DASH)


def _notes(section: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """What the reader must know: intervals, left out cells, mixed versions, failures."""
    notes = [
        "± is half of the 95 % interval over the n cells (seed × prompt) of a row; best value at a sparsity in bold."
    ]
    if _hides_quality(section):
        notes.append("No quality is shown: random weights have no attention structure that a sparse method could lose.")
    same = rows[rows["identical"].gt(0) & rows["identical"].lt(rows["n"])]
    notes += [
        f"{row.label} at sparsity {_plain(row.sparsity)}: {row.identical} of {row.n} cells equal dense, so no PSNR."
        for row in same.itertuples()
    ]
    for column in [c for c in MIXED if c in section and section[c].nunique() > 1]:
        notes.append(
            f"Cells of several kinds are mixed, {column}: {', '.join(sorted(map(str, section[column].unique())))}."
        )
    return notes + failures(section)


def _hides_quality(rows: pd.DataFrame) -> bool:
    return rows["weights"].iloc[0] == "random" and rows["workload"].iloc[0] != "operator"


def _with_half(value: float, half: float, metric: Metric) -> str:
    """`26.71 ± 1.41`, without the half-width where one cell gives none, a dash where nothing was measured."""
    if pd.isna(value):
        return DASH
    style = ".1e"
    if metric.decimals is not None:
        style = f".{metric.decimals}f"
    elif value == 0 or abs(value) >= 1e-3:  # three digits of the value, and the half-width to the same decimal
        style = f".{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f"
    return f"{value:{style}}" if pd.isna(half) else f"{value:{style}} ± {half:{style}}"


def _plain(value: object) -> str:
    return DASH if pd.isna(value) else f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


def _rich(text: str) -> Text:
    plain = _marked(text, "", "").replace(" ± ", "±")
    return Text(plain, style="bold" if text.startswith(BOLD[0]) else "")


def _marked(text: str, start: str, end: str) -> str:
    return text.replace(BOLD[0], start).replace(BOLD[1], end)
