"""Frames of dense and sparse runs beside each other: a strip of pictures with the amplified difference, and a video."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from harness.labels import Usual
from harness.summary import CELL, cells

log = logging.getLogger(__name__)
AMPLIFIED = 4  # differences are shown this many times larger
COLUMNS = 6  # frames of a video that are shown
METHODS = 5  # methods in one strip


def film_strips(section: pd.DataFrame, records_dir: Path) -> Iterator[tuple[str, Figure, pd.DataFrame]]:
    """(file suffix, figure, data) per sparsity: dense, each method, and 4 x |method - dense|, for one seed and prompt.

    section: the labelled cells of one model. records_dir: the folder that `frames_path` is relative to.
    """
    for sparsity, shown in _matches(section, records_dir).items():
        yield f"sparsity_{sparsity:g}", *_strip(shown, records_dir)


def comparison_video(
    records: pd.DataFrame,
    path: Path,
    records_dir: Path,
    sparsity: float | None = None,
    usual: Usual | None = None,
    fps: int = 8,
) -> Path | None:
    """Write dense and the methods side by side as MP4, from the frames that the records of one model name.

    sparsity: None takes the highest that is stored. Returns None, with a word in the log, when frames are missing.
    """
    import torch

    from harness import media

    matches = _matches(cells(records, usual), records_dir)
    if not matches or sparsity not in (None, *matches):
        log.warning("no video %s: frames are stored for sparsities %s.", path.name, sorted(matches))
        return None
    shown = matches[max(matches) if sparsity is None else sparsity]
    files = {
        "dense": shown["frames_path_dense"].iloc[0],
        **dict(zip(shown["label"], shown["frames_path"], strict=True)),
    }
    panels = {name: torch.from_numpy(_frames(records_dir / file)) for name, file in files.items()}
    return media.write_mp4(media.side_by_side(panels), path, fps=fps)


def _matches(section: pd.DataFrame, records_dir: Path) -> dict[float, pd.DataFrame]:
    """Per sparsity the methods whose frames are stored, and the dense frames of one seed and prompt that all share."""
    ok = section[section["status"].eq("ok") & section["frames_path"].notna()]
    stored = ok[ok["frames_path"].map(lambda path: (records_dir / path).is_file()).astype(bool)]
    same = ["model", *CELL, "steps", "guidance"]
    dense = stored.loc[stored["role"].eq("reference"), [*same, "frames_path"]]
    pairs = stored[stored["role"].eq("method")].merge(dense, on=same, suffixes=("", "_dense"))
    if pairs.empty:
        model = ", ".join(map(str, section["model"].unique()))
        log.warning("no frames to show for %s: dense and a method of one seed must both be stored.", model)
    matches = {}
    for sparsity, group in pairs.groupby("sparsity"):
        _, shown = max(group.groupby(same, dropna=False), key=lambda item: item[1]["label"].nunique())
        matches[sparsity] = shown.sort_values("label").drop_duplicates("label").head(METHODS)
    return matches


def _frames(path: Path) -> np.ndarray:
    return load_file(path)["frames"].astype(np.float32).clip(0, 1)  # [F, 3, H, W]


def _strip(shown: pd.DataFrame, records_dir: Path) -> tuple[Figure, pd.DataFrame]:
    first = shown.iloc[0]
    dense = _frames(records_dir / first["frames_path_dense"])
    picked = np.unique(np.linspace(0, len(dense) - 1, COLUMNS).round().astype(int))
    rows = [("dense", dense[picked])]
    for cell in shown.itertuples():
        frames = _frames(records_dir / cell.frames_path)
        psnr = f"\n{cell.psnr_db:.1f} dB" if pd.notna(cell.psnr_db) else ""
        rows.append((textwrap.fill(cell.label, 18, break_long_words=False) + psnr, frames[picked]))
        rows.append((f"{AMPLIFIED} ×\n|difference|", (np.abs(frames - dense) * AMPLIFIED).clip(0, 1)[picked]))
    heads = [f"frame {i}" for i in picked]
    caption = f"“{first['prompt']}”, " if pd.notna(first["prompt"]) else ""
    caption += f"{first['model']} ({first['weights']} weights), seed {first['seed']}, sparsity {first['sparsity']:g}"
    data = shown[["label", "sparsity", *CELL, "psnr_db", "frames_path", "frames_path_dense"]]
    return _grid(rows, heads, caption), data.assign(frames=" ".join(map(str, picked)))


def _grid(rows: list[tuple[str, np.ndarray]], heads: list[str], caption: str) -> Figure:
    """Pictures [columns, 3, H, W] per row with names at the left; one picture per row lies side by side instead."""
    if len(heads) == 1:
        return _single(rows, caption)
    height, width = rows[0][1].shape[2:]
    side = (9 - 1.25) / COLUMNS
    figure, axes = plt.subplots(
        len(rows),
        len(heads),
        squeeze=False,
        figsize=(1.25 + side * len(heads), 0.6 + side * height / width * len(rows)),
    )
    for (name, pictures), line in zip(rows, axes, strict=True):
        for picture, ax in zip(pictures, line, strict=True):
            _show(ax, picture)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8.5)
    for head, ax in zip(heads, axes[0], strict=True):
        ax.set_title(head, fontsize=8.5)
    _caption(figure, caption)
    return figure


def _single(rows: list[tuple[str, np.ndarray]], caption: str) -> Figure:
    """One picture per method: dense and methods above, their differences below."""
    (name, dense), others = rows[0], rows[1:]
    methods, differences = others[::2], others[1::2]
    height, width = dense.shape[2:]
    side = 9 / (len(methods) + 1)
    figure, axes = plt.subplots(2, len(methods) + 1, squeeze=False, figsize=(9, 0.9 + 2 * side * height / width))
    for ax, (text, pictures) in zip(axes[0], [(name, dense), *methods], strict=True):
        _show(ax, pictures[0])
        ax.set_title(text, fontsize=8.5)
    axes[1, 0].set_axis_off()
    for ax, (text, pictures) in zip(axes[1, 1:], differences, strict=True):
        _show(ax, pictures[0])
        ax.set_xlabel(text.replace("\n", " "), fontsize=8.5)
    _caption(figure, caption)
    return figure


def _show(ax: plt.Axes, picture: np.ndarray) -> None:
    ax.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.grid(False)


def _caption(figure: Figure, caption: str) -> None:
    figure.supxlabel(textwrap.fill(caption, 130), fontsize=8.5, color="#333333")
