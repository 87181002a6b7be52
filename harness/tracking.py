"""Weights & Biases as a view of the records: one run per sweep, written when the sweep is over.

The records stay the only truth: losing the run loses nothing, and logging again makes a new attempt of the same sweep.
Offline, everything lies under the output folder; `wandb sync OUT/wandb/offline-run-*` sends it (once: sending twice
doubles the files).
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pandas as pd

from harness.labels import Usual
from harness.summary import DENSITY, LATENCY, QUALITY, SPEEDUP, cells, summarise

MODES = ("offline", "online")
PICTURES, VIDEOS = (".png",), (".mp4",)
TOO_LONG = ("latency_ms_samples", "psnr_frames", "config")  # lists and nested values have no place in a table of cells


class NoTracker:
    """Logs nothing."""

    def log(
        self,
        records: pd.DataFrame,
        out: Path,
        key: str,
        config: Mapping | None = None,
        media: Sequence[Path] = (),
        usual: Usual | None = None,
    ) -> Path | None:
        """Returns None."""
        return None


@dataclass(frozen=True)
class WandbTracker:
    """Logs a sweep to Weights & Biases.

    mode: "offline" (no network at all) or "online" (needs a key). Raises ValueError for another mode.
    """

    project: str
    entity: str | None = None
    mode: str = "offline"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(
                f"tracker.mode must be one of {MODES}, got {self.mode!r}. To log nothing use tracker=none."
            )

    def log(
        self,
        records: pd.DataFrame,
        out: Path,
        key: str,
        config: Mapping | None = None,
        media: Sequence[Path] = (),
        usual: Usual | None = None,
    ) -> Path | None:
        """Write one run with the config, the table of cells, one curve per method, and pictures and videos.

        key: names the sweep; with the number of the attempt it is the run's id. config: the resolved sweep.
        media: files; .png become images, .mp4 videos, others are left out. Returns the run's folder.
        Raises ValueError when mode is online and there is no key.
        """
        if self.mode == "online" and not _has_key():
            raise ValueError(
                "tracker.mode=online needs a Weights & Biases key and none was found: run `wandb login`, set "
                "WANDB_API_KEY, or use tracker.mode=offline and send the run later with `wandb sync`."
            )
        out, labelled = Path(out).resolve(), cells(records, usual)
        with _folders_under(out):
            import wandb

            run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,
                dir=out,
                id=_run_id(out, key),
                group=key,
                config=_finite(dict(config or {})),
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True
                ),
            )
            with run:
                folder = Path(run.dir).parent
                run.log({"cells": _table(wandb, labelled)})
                _log_curves(run, summarise(labelled))
                _log_media(wandb, run, media)
        return folder


def _log_curves(run: object, rows: pd.DataFrame) -> None:
    """Each quality, speed-up and latency against realised density, one curve per model and label."""
    methods = rows[rows["role"].eq("method")].dropna(subset=["density_realised"])
    for (workload, model, label), line in methods.groupby(["workload", "model", "label"], dropna=False):
        prefix = re.sub(r"[^\w/=-]+", "_", f"{workload}/{model}/{label}")  # a dot would nest the name
        metrics = [SPEEDUP, LATENCY, *QUALITY[workload]]
        run.define_metric(f"{prefix}/density")
        for metric in metrics:
            best = "max" if metric.better > 0 else "min"
            run.define_metric(f"{prefix}/{metric.column}", step_metric=f"{prefix}/density", summary=best)
        for _, row in line.sort_values("density_realised").iterrows():
            point = {f"{prefix}/density": row[DENSITY.column]}
            point |= {f"{prefix}/{metric.column}": row[metric.column] for metric in metrics}
            run.log({name: float(value) for name, value in point.items() if pd.notna(value)})


def _table(wandb: object, labelled: pd.DataFrame) -> object:
    """All cells, failed ones too, as a table; what is not a finite number is None (JSON has no NaN)."""
    columns = [c for c in labelled if c not in TOO_LONG and not labelled[c].isna().all()]
    return wandb.Table(columns=columns, data=[[_finite(v) for v in row] for row in labelled[columns].values.tolist()])


def _log_media(wandb: object, run: object, media: Sequence[Path]) -> None:
    for path in map(Path, media):
        if path.suffix in PICTURES:
            run.log({f"plots/{path.stem}": wandb.Image(str(path))})
        elif path.suffix in VIDEOS:
            run.log({f"videos/{path.stem}": wandb.Video(str(path), format="mp4")})


def _finite(value: object) -> object:
    """Plain Python values, NaN and infinities as None, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NaT or (isinstance(value, float) and not np.isfinite(value)):
        return None
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _run_id(out: Path, key: str) -> str:
    """The sweep's key and the number of this attempt: an offline run cannot be resumed, so each has its own id."""
    short = re.sub(r"[^\w-]", "_", key)[:32]
    attempt = 1 + len(list((out / "wandb").glob(f"*run-*-{short}-*")))
    return f"{short}-{attempt}"


@contextmanager
def _folders_under(out: Path) -> Iterator[None]:
    """All that wandb writes goes below `out`, so that the folder can be moved to the machine that sends it."""
    folders = {"WANDB_DIR": out, "WANDB_DATA_DIR": out / "wandb" / "data", "WANDB_CACHE_DIR": out / "wandb" / "cache"}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    before = {name: os.environ.get(name) for name in folders}
    os.environ.update({name: str(folder) for name, folder in folders.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _has_key() -> bool:
    """Whether the environment or the netrc file (where `wandb login` writes) has a key; wandb itself would prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / n for n in (".netrc", "_netrc")]
    return any(host in netrc.netrc(file).hosts for file in files if file.is_file())
