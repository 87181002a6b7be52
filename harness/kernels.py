"""Records of `bench kernel` in, numbers and text out: a row per shape, density and engine, and break-even lengths.

Lengths are compared inside a family: equal batch, heads, head_dim and dtype on one machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from harness.config import AXES
from harness.shapes import shape_name

WORKLOAD = "kernel"
SIZES = ["batch", "heads", "tokens", "head_dim", "dtype"]
FAMILY = ["machine", "batch", "heads", "head_dim", "dtype"]
PLAIN = [  # columns of a record that a row takes as they are
    "machine", "seed", "method", "order", "routing", "tail", "block_size", "engine", "sparsity", "density_realised",
    "latency_ms_median", "latency_ms_p20", "latency_ms_p80", "latency_n", "first_call_ms", "host_us", "speedup",
    "speedup_low", "speedup_high", "dense_kernel", "dense_latency_ms_median", "dense_left_out", "exact_tflops",
    "roofline_percent", "matrix_tflops", "copy_gb_s", "peak_memory_mb", "sm_clock_mhz", "power_w", "temperature_c",
    "throttle", "rel_l2_formula", "rel_l2", "status", "reason",
]  # fmt: skip
PHASES = ["order", "routing", "statistics", "exact", "tail", "statistics_and_tail"]  # as they follow one another
DASH = "–"
Page = tuple[str, list[pd.DataFrame], list[str]]  # title, text tables, notes


def split(records: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The records of the kernel workload, and all others."""
    ours = records["workload"].eq(WORKLOAD)
    return records[ours], records[~ours]


def rows(records: pd.DataFrame) -> pd.DataFrame:
    """One row for each dense kernel of each shape (role dense) and for each method, density and engine (role method).

    `series` names what is one line in a plot; `break_even_tokens` is `break_even` of that line at this density.
    """
    newest = records.sort_values("created", kind="stable").drop_duplicates("key", keep="last")
    found = [row for record in newest.to_dict("records") for row in _of(record)]
    frame = pd.DataFrame(found, columns=list(dict.fromkeys(name for row in found for name in row)))
    if frame.empty:
        return frame
    frame["series"] = _series(frame)
    speed = frame["latency_ms_median"].where(frame["role"].eq("dense"))  # the fastest dense kernel first
    by = [*FAMILY, "tokens", "role", "sparsity", "speed", "series"]
    ordered = frame.loc[frame.assign(speed=speed).sort_values(by, kind="stable").index]
    return _with_break_even(ordered.reset_index(drop=True))


def _of(record: dict) -> list[dict]:
    model, asked = record["config"]["model"], record["config"]["method"].get("engine")
    base = {"shape": shape_name(model)} | {size: model[size] for size in SIZES}
    base |= {name: record.get(name) for name in PLAIN}
    if record["role"] == "method":
        known = {k: v for k, v in record.items() if k.startswith(("phase_ms_", "roofline_percent_")) and not pd.isna(v)}
        return [{**base, "role": "method", "engine_asked": asked, **known}]
    if record["role"] != "reference":
        return []
    nothing = {"role": "dense", "method": "dense", "engine": None, "engine_asked": None, "speedup": None}
    if record["status"] != "ok":
        return [{**base, **nothing}]
    # dense_kernel is what a speed-up divides by; of the dense rows it is the row's own name.
    return [
        {**base, **nothing, **{k: peer.get(k) for k in ("peak_memory_mb", "host_us", "first_call_ms", "rel_l2")},
         **{k: peer.get(k) for k in ("latency_ms_median", "latency_ms_p20", "latency_ms_p80", "roofline_percent")},
         "dense_kernel": peer["kernel"], "exact_tflops": peer.get("tflops")}
        for peer in record["dense_peers"]
    ]  # fmt: skip


def _series(frame: pd.DataFrame) -> pd.Series:
    """`dense cpu_flash`, or the method, the engine that ran (`auto: triton` when it was auto's choice), and every axis
    or block size in which records of the method differ."""
    engine = frame["engine"].where(frame["engine"].notna(), frame["engine_asked"]).astype(object)
    chosen = frame["engine_asked"].eq("auto") & frame["engine"].notna()
    several = frame.groupby("method")["engine_asked"].transform("nunique") > 1
    engine = engine.where(~(chosen & several), "auto: " + engine.astype(str))
    text = frame["method"].astype(object) + " " + engine.astype(object)
    for column in [*AXES, "block_size", "seed"]:
        differ = frame["role"].eq("method") & (frame.groupby("method")[column].transform("nunique") > 1)
        text = text.where(~differ, text + f" {column}=" + frame[column].astype(str))
    return text.where(frame["role"].eq("method"), "dense " + frame["dense_kernel"].astype(str))


def _with_break_even(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.assign(break_even_tokens=np.nan, break_even="")
    good = frame["role"].eq("method") & frame["speedup"].notna()
    for _, line in frame[good].groupby([*FAMILY, "series", "sparsity"], dropna=False):
        points = line.drop_duplicates("tokens", keep="last").sort_values("tokens")
        tokens = points["tokens"].tolist()
        length = break_even(tokens, points["speedup"].tolist())
        frame.loc[line.index, "break_even_tokens"] = np.nan if length is None else length
        frame.loc[line.index, "break_even"] = in_words(length, tokens)
    return frame


def break_even(tokens: Sequence[int], speedups: Sequence[float]) -> float | None:
    """The length from which on sparse beats the fastest dense kernel at every measured length; None if it never does.

    tokens ascend. Between the last length where dense is as fast or faster and the next, log latency is taken as linear
    in log length. The shortest measured length when sparse wins everywhere: the true one may be shorter still.
    """
    slower = [i for i, ratio in enumerate(speedups) if ratio <= 1]
    if not slower:
        return float(tokens[0]) if tokens else None
    i = slower[-1]
    if i == len(tokens) - 1:
        return None
    below, above = math.log(speedups[i]), math.log(speedups[i + 1])
    share = -below / (above - below)
    return tokens[i] * (tokens[i + 1] / tokens[i]) ** share


def in_words(length: float | None, tokens: Sequence[int]) -> str:
    """`12,345`; `≤ 4,096` when sparse wins from the shortest length on; `none up to 32,768` when it never does."""
    if length is None:
        return f"none up to {max(tokens):,}"
    return f"≤ {min(tokens):,}" if length == min(tokens) else f"{length:,.0f}"


# -------------------------------------------------------------------------------------------------------------- text
def pages(frame: pd.DataFrame) -> list[Page]:
    """A page for each shape: what was measured, and what it consists of."""
    found = []
    for _, shape in frame.groupby([*FAMILY, "tokens"], sort=False, dropna=False):
        good = shape[shape["status"].eq("ok")]
        tables = [_times(good), _parts(good)] if len(good) else []
        found.append((heading(shape.iloc[0]), tables, _notes(shape)))
    return found


def heading(row: pd.Series) -> str:
    """`flux: B, H, L, D = 1, 24, 4,608, 128, bfloat16, machine`."""
    sizes = ", ".join(f"{int(row[size]):,}" for size in SIZES[:4])
    return f"{row['shape']}: B, H, L, D = {sizes}, {row['dtype']}, {row['machine']}"


def _times(good: pd.DataFrame) -> pd.DataFrame:
    spread = [f"{_number(a)}–{_number(b)}" if pd.notna(a) else DASH
              for a, b in zip(good["latency_ms_p20"], good["latency_ms_p80"], strict=True)]  # fmt: skip
    ratio = [
        DASH if pd.isna(row.speedup) else f"{row.speedup:.2f}" if pd.isna(row.speedup_low)
        else f"{row.speedup:.2f} ({row.speedup_low:.2f}–{row.speedup_high:.2f})" for row in good.itertuples()
    ]  # fmt: skip
    return pd.DataFrame({
        **_names(good),
        "latency (ms)": good["latency_ms_median"].map(_number), "p20–p80": spread, "speed-up (95 %)": ratio,
        "over dense": good["dense_kernel"].where(good["role"].eq("method"), DASH),
        "break-even (tokens)": good["break_even"].replace("", DASH),
        "error: formula": good["rel_l2_formula"].map(_error), "error: dense": good["rel_l2"].map(_error),
    })  # fmt: skip


def _parts(good: pd.DataFrame) -> pd.DataFrame:
    text = pd.DataFrame(_names(good))
    for phase in phases(good):
        text[f"{phase.replace('_', ' ').replace(' and ', ' + ')} (ms)"] = good[f"phase_ms_{phase}"].map(_number)
    columns = {"exact_tflops": "exact (TFLOP/s)", "roofline_percent": "of the roofline (%)", "host_us": "host (µs)",
               "peak_memory_mb": "memory (MB)", "sm_clock_mhz": "clock (MHz)", "power_w": "power (W)"}  # fmt: skip
    for column, name in columns.items():
        if good[column].notna().any():
            text[name] = good[column].map(_number)
    return text


def phases(frame: pd.DataFrame) -> list[str]:
    """The phases that some row has, as they follow one another; those that an engine named itself come last."""
    there = [column.removeprefix("phase_ms_") for column in frame if column.startswith("phase_ms_")]
    there = [phase for phase in there if frame[f"phase_ms_{phase}"].notna().any()]
    return sorted(there, key=lambda phase: (PHASES.index(phase) if phase in PHASES else len(PHASES), phase))


def _names(good: pd.DataFrame) -> dict[str, pd.Series]:
    method = good["role"].eq("method")
    density = good["density_realised"].where(method, 1.0)
    return {"kernel": good["series"], "density": density.map(lambda value: DASH if pd.isna(value) else f"{value:.4g}")}


def _notes(shape: pd.DataFrame) -> list[str]:
    """What the reader must know of this shape: the machine's limits, what held it back, what did not run."""
    good, notes = shape[shape["status"].eq("ok")], []
    if len(good):
        one = good.iloc[0]
        notes.append(
            f"Roofline: {_number(one['matrix_tflops'])} TFLOP/s (a large matrix product) and "
            f"{_number(one['copy_gb_s'])} GB/s (a large copy), measured in the same run."
        )
    throttled = good.loc[good["throttle"].fillna("").ne(""), ["series", "throttle"]].itertuples(index=False)
    notes += [f"{series}: the GPU was held back, {reasons}." for series, reasons in dict.fromkeys(throttled)]
    left_out = dict.fromkeys(text for text in good["dense_left_out"].dropna() if text)
    notes += [f"Dense kernels left out: {text}." for text in left_out]
    bad = shape[shape["status"].ne("ok")]
    notes += [
        f"{row.series} at sparsity {row.sparsity:g}: {row.status.replace('_', ' ')}: {row.reason}"
        for row in bad.itertuples()
    ]
    return notes


def _number(value: float) -> str:
    """Three digits, and every digit of what is larger."""
    if value is None or pd.isna(value):
        return DASH
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".removesuffix(".")


def _error(value: float) -> str:
    return DASH if value is None or pd.isna(value) else f"{value:.1e}" if value < 1e-2 else f"{value:.3f}"
