"""Records in, numbers out: one row per method and sparsity, and the differences between methods seed by seed.

A cell is one (seed, prompt) of a row. Nothing but the records is read, so a result can be made again on any machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from harness import statistics
from harness.config import AXES
from harness.labels import Usual, labels

SECTION = ["workload", "model", "weights", "machine", "protocol"]  # one table each: their numbers never mix
SETTINGS = ["steps", "guidance", "dense_steps", "dense_layers", "dense_kernel"]
ROW = [*SECTION, "role", "label", "sparsity", *SETTINGS]
CELL = ["seed", "prompt"]
ROLES = ["noise_floor", "reference", "method"]  # the order of the rows


@dataclass(frozen=True)
class Metric:
    """A measured column of the records; decimals None means three digits; better is 1 (higher), -1 (lower) or 0."""

    column: str
    head: str
    unit: str = ""
    decimals: int | None = None
    better: int = 0

    @property
    def title(self) -> str:
        """Head, better direction and unit, e.g. `PSNR ↑ (dB)`."""
        return self.head + {1: " ↑", -1: " ↓", 0: ""}[self.better] + (f" ({self.unit})" if self.unit else "")


LATENCY = Metric("latency_ms_median", "latency", "ms", better=-1)
SPEEDUP = Metric("speedup", "speed-up", "×", 2, better=1)
DENSITY = Metric("density_realised", "density")
EXACT = Metric("exact_fraction", "exact")
PSNR, SSIM = Metric("psnr_db", "PSNR", "dB", 2, 1), Metric("ssim", "SSIM", "", 3, 1)
LPIPS = Metric("lpips", "LPIPS", "", 3, -1)
REL_L2, REL_L1 = Metric("rel_l2", "rel. L2", better=-1), Metric("rel_l1", "rel. L1", better=-1)
COSINE = Metric("cosine", "cosine", "", 5, 1)
PICTURE, ERROR = [PSNR, SSIM, LPIPS], [REL_L2, REL_L1, COSINE]
QUALITY = {"generate": PICTURE, "step": ERROR, "operator": ERROR, "kernel": ERROR}
MEASURED = [DENSITY, EXACT, LATENCY, *PICTURE, *ERROR]


def cells(records: pd.DataFrame, usual: Usual | None = None) -> pd.DataFrame:
    """The records with every column that the views read and `label`; of a cell measured twice the newest stays."""
    numbers = ["sparsity", *(metric.column for metric in MEASURED), "speedup", "speedup_low", "speedup_high"]
    wanted = [
        *ROW,
        *CELL,
        *AXES,
        *numbers,
        "variant",
        "method",
        "engine",
        "block_size",
        "status",
        "reason",
        "identical",
        "frames_path",
    ]
    missing = {column: None for column in wanted if column not in records}
    result = records.reset_index(drop=True).assign(**missing)
    result[numbers] = result[numbers].apply(pd.to_numeric)
    result["label"] = labels(result, usual)
    if "created" in result:
        result = result.sort_values("created", kind="stable", na_position="first")
    result = result.drop_duplicates([*ROW, *CELL], keep="last").sort_index()
    # Random weights have no attention structure to lose: every method would look good.
    random = result["weights"].eq("random") & result["workload"].ne("operator")
    result.loc[random, [metric.column for metric in [*PICTURE, *ERROR]]] = np.nan
    return result


def sections(labelled: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The cells of each model, workload, weights, machine and protocol apart."""
    for _, section in labelled.groupby(SECTION, dropna=False):
        yield section


def summary(records: pd.DataFrame, usual: Usual | None = None) -> pd.DataFrame:
    """One row per method and sparsity: n, and per metric the mean and half-width (`_half`) of the 95 % interval."""
    return summarise(cells(records, usual))


def summarise(labelled: pd.DataFrame) -> pd.DataFrame:
    """`summary` of labelled cells. Noise floor first, then dense, then the methods by sparsity.

    speedup is a geometric mean with speedup_low and _high; a single cell has the interval of its own timing rounds.
    identical counts the cells whose frames equal dense; these have no PSNR.
    """
    ok = labelled[labelled["status"].eq("ok")]
    rows = [_row(group) for _, group in ok.groupby(ROW, dropna=False)]
    table = pd.DataFrame(rows, columns=list(_row(labelled.iloc[:0])))
    keys = table.assign(role=table["role"].map(ROLES.index))
    keys[[*SECTION, "dense_kernel"]] = keys[[*SECTION, "dense_kernel"]].astype(str)
    by = [*SECTION, "role", *SETTINGS, "sparsity", "label"]
    return table.loc[keys.sort_values(by, kind="stable").index].reset_index(drop=True)


def _row(group: pd.DataFrame) -> dict:
    first = group.iloc[0] if len(group) else {}
    row = {column: first.get(column) for column in [*ROW, "method", *AXES, "engine", "block_size"]}
    row |= {"n": len(group), "identical": int(group["identical"].eq(True).sum())}
    for metric in MEASURED:
        estimate = statistics.mean(group[metric.column])
        row |= {metric.column: estimate.value, f"{metric.column}_half": estimate.half}
    ratio = statistics.geometric_mean(group["speedup"])
    low, high = (first["speedup_low"], first["speedup_high"]) if len(group) == 1 else (ratio.low, ratio.high)
    return row | {"speedup": ratio.value, "speedup_low": low, "speedup_high": high, "speedup_half": (high - low) / 2}


def paired(records: pd.DataFrame, against: str | None = None, usual: Usual | None = None) -> pd.DataFrame:
    """Differences between methods at equal sparsity and settings, paired by seed and prompt; one row per metric.

    against: the label that all others are compared with; None compares every two. changed: the axes that differ.
    value is the mean of label - against with low, high and half of its 95 % interval; for the metric speed_ratio it is
    how many times label is faster (geometric mean). wins counts the pairs in which label is better; verdict is better,
    worse, tie (the interval holds no difference) or None (one pair has no interval).
    Raises ValueError when no record has the label `against`.
    """
    labelled = cells(records, usual)
    check_label(labelled, against)
    return compare(labelled, against)


def check_label(labelled: pd.DataFrame, against: str | None) -> None:
    """Raises ValueError when no method has the label `against`."""
    known = sorted(labelled.loc[labelled["role"].eq("method"), "label"].unique())
    if against is not None and against not in known:
        raise ValueError(f"against must be one of the labels {known}, got {against!r}.")


def compare(labelled: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """`paired` of labelled cells."""
    methods = labelled[labelled["role"].eq("method") & labelled["status"].eq("ok")]
    places, measured = [*SECTION, "sparsity", *SETTINGS], [metric.column for metric in MEASURED]
    rows = []
    for key, group in methods.groupby(places, dropna=False):
        place = dict(zip(places, key, strict=True))
        axes = group.groupby("label")[list(AXES)].first()
        parts = dict(list(group.groupby("label")[[*CELL, *measured]]))
        for a, b in itertools.combinations(sorted(parts, key=lambda label: (label == against, label)), 2):
            if against in (None, b):
                changed = [axis for axis in AXES if str(axes.loc[a, axis]) != str(axes.loc[b, axis])]
                pair = {"label": a, "against": b, "changed": " ".join(changed)}
                both = parts[a].merge(parts[b], on=CELL, suffixes=("_a", "_b"))
                rows += [place | pair | row for row in _pair_rows(both, place["workload"])]
    names = ["label", "against", "changed", "metric", "n", "value", "low", "high", "half", "wins", "verdict"]
    return pd.DataFrame(rows, columns=[*places, *names])


def _pair_rows(both: pd.DataFrame, workload: str) -> Iterator[dict]:
    def of(column: str) -> tuple[pd.Series, pd.Series]:
        return both[f"{column}_a"], both[f"{column}_b"]

    comparisons = {
        m.column: statistics.paired_difference(*of(m.column), higher_is_better=m.better > 0) for m in QUALITY[workload]
    }
    label_ms, against_ms = of("latency_ms_median")
    comparisons["speed_ratio"] = statistics.speed_ratio(against_ms, label_ms)
    for metric, c in comparisons.items():
        if c.n:
            yield {"metric": metric, **asdict(c), "half": c.half, "verdict": c.verdict}


def failures(labelled: pd.DataFrame) -> list[str]:
    """One sentence for each kind of cell that has no numbers: how many, which, and why."""
    bad = labelled[labelled["status"].ne("ok")]
    lines = []
    for (status, label, sparsity, reason), group in bad.groupby(
        ["status", "label", "sparsity", "reason"], dropna=False
    ):
        where = [label if pd.isna(sparsity) else f"{label} at sparsity {sparsity:g}"]
        where += [f"seed {', '.join(f'{seed:g}' for seed in sorted(group['seed'].dropna().unique()))}"]
        why = "" if pd.isna(reason) else " ".join(reason.split())  # a traceback's lines would break the note
        lines.append(f"{len(group)} {status.replace('_', ' ')}: {', '.join(where)}: {why}".removesuffix(": "))
    return lines
