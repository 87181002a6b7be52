"""Figures: what is drawn is what the records say, it can be read, and what cannot be drawn is said."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from safetensors.numpy import save_file

from harness import media, plots
from harness.filmstrip import film_strips
from harness.summary import LPIPS, PSNR, SPEEDUP, cells, summary
from tests.harness.synthetic import PROMPT, USUAL, operator_sweep, sweep


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def drawn(records: pd.DataFrame, panels=((SPEEDUP, PSNR), (SPEEDUP, LPIPS))) -> plt.Figure:
    with plt.rc_context(plots.STYLE):
        figure, _ = plots._figure(plots._series(summary(records, USUAL)), list(panels), "heading", "a test")
        figure.draw_without_rendering()
    return figure


def with_frames(records: pd.DataFrame, folder: Path, frames: int) -> pd.DataFrame:
    """Noise of its own for every cell of seed 0, stored as the records say."""
    rng, records = np.random.default_rng(0), records.copy()
    for i in records.index[(records["seed"] == 0) & (records["role"] != "noise_floor")]:
        records.loc[i, "frames_path"] = name = f"frames/{i}.safetensors"
        (folder / "frames").mkdir(exist_ok=True)
        save_file({"frames": rng.random((frames, 3, 16, 24), dtype=np.float32)}, folder / name)
    return records


# ---------------------------------------------------------------------------------------------------------- files
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All figures of a sweep with one strip of frames, and of an operator sweep."""
    out = tmp_path_factory.mktemp("plots")
    stored = with_frames(sweep(3), out, frames=2)
    stored.loc[stored["sparsity"].ne(0.75) & stored["role"].eq("method"), "frames_path"] = None
    records = pd.concat([stored, operator_sweep(2).assign(model="synthetic")], ignore_index=True)
    files = plots.draw_all(records, out, out, USUAL)
    assert sorted(files) == sorted(path for path in out.iterdir() if path.is_file())
    return out


@pytest.mark.parametrize(
    "name",
    ["speed_quality-toy_wan-toy", "density_quality-toy_wan-toy", "operator_error-synthetic-random"]
    + ["frames-toy_wan-toy-sparsity_0.75"],
)
def test_every_figure_has_three_files(folder, name):
    with Image.open(folder / f"{name}.png") as picture:
        assert 700 <= picture.width <= 1900 and np.asarray(picture.convert("L")).std() > 10
    assert (folder / f"{name}.svg").stat().st_size > 5_000
    assert len(pd.read_csv(folder / f"{name}.csv")) >= 3


def svg_texts(path: Path) -> list[str]:
    return [re.sub("<[^>]+>", "", text) for text in re.findall(r"<text.*?</text>", path.read_text(), re.DOTALL)]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("speed_quality-toy_wan-toy", ["speed-up over dense cpu_flash (×)", "PSNR ↑ (dB)", "LPIPS ↓", "0.875"]),
        ("density_quality-toy_wan-toy", ["density, realised (%)", "PSNR ↑ (dB)", "12.5", "50"]),
        ("operator_error-synthetic-random", ["rel. L2 ↓", "density, realised (%)", "0.1"]),
    ],
)
def test_svg_holds_text_with_units_and_every_label(folder, name, wanted):
    texts = [text.strip() for text in svg_texts(folder / f"{name}.svg")]
    for text in [*wanted, "block_topk", "pisa", "pisa tail=zeroth"]:
        assert text in texts, f"{text} is not in {texts}"


def test_csv_beside_the_figure_holds_the_numbers_of_the_summary(folder):
    data = pd.read_csv(folder / "speed_quality-toy_wan-toy.csv")
    truth = summary(sweep(3), USUAL)
    np.testing.assert_allclose(data["psnr_db"], truth["psnr_db"].astype(float))
    np.testing.assert_allclose(data["speedup_high"], truth["speedup_high"].astype(float))


def test_strip_names_frames_methods_and_prompt(folder):
    texts = " ".join(svg_texts(folder / "frames-toy_wan-toy-sparsity_0.75.svg"))
    for word in ("frame 0", "frame 1", "dense", "block_topk", "pisa", "|difference|", PROMPT, "seed 0", "dB"):
        assert word in texts


def test_same_records_give_the_same_bytes(folder, tmp_path):
    plots.draw_all(sweep(3), tmp_path, tmp_path, USUAL)
    again = (tmp_path / "density_quality-toy_wan.svg").read_text()
    assert again == (folder / "density_quality-toy_wan-toy.svg").read_text()


# --------------------------------------------------------------------------------------------------------- drawing
def test_points_are_the_summary():
    records = sweep(3)
    table = summary(records, USUAL).query("label == 'pisa'").sort_values("speedup")
    ax = drawn(records).axes[0]
    bars = {container.get_label(): container for container in ax.containers}["pisa"]
    np.testing.assert_allclose(bars.lines[0].get_xydata(), table[["speedup", "psnr_db"]].to_numpy(float))
    across, upright = (np.array([part.get_paths()[i].vertices for i in range(3)]) for part in bars.lines[2])
    np.testing.assert_allclose(across[:, :, 0], table[["speedup_low", "speedup_high"]].to_numpy(float))
    np.testing.assert_allclose(np.ptp(upright[:, :, 1], axis=1) / 2, table["psnr_db_half"].to_numpy(float))


@pytest.mark.parametrize("metric", [PSNR, LPIPS])
def test_front_is_what_nothing_beats(metric):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    rng = np.random.default_rng(seed)
    points = pd.DataFrame({"speedup": rng.integers(1, 9, 30) / 2, metric.column: rng.integers(1, 9, 30) / 2})
    score = points[metric.column] * metric.better
    beaten = [
        any((points["speedup"] >= s) & (score >= q) & ((points["speedup"] > s) | (score > q)))
        for s, q in zip(points["speedup"], score, strict=True)
    ]
    expected = points[~np.array(beaten)].drop_duplicates().sort_values("speedup")
    pd.testing.assert_frame_equal(
        plots.unbeaten(points, metric).reset_index(drop=True), expected.reset_index(drop=True)
    )


def test_no_text_lies_on_another():
    for ax in drawn(sweep(4)).axes:
        boxes = [text.get_window_extent() for text in [*ax.texts, ax.xaxis.label, ax.yaxis.label]]
        assert len(boxes) >= 2 + 5  # most of the nine points have found room
        assert not any(box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))


@pytest.mark.parametrize(
    "names", [["a", "b"], [f"random_blocks order=raster tail=blockwise_first {i}" for i in range(9)]]
)
def test_legend_lies_below_the_axes_and_inside_the_figure(names):
    records = pd.concat([sweep(1).assign(method=name) for name in names])
    figure = drawn(records[records["role"].eq("method") & records["tail"].eq("hybrid")])
    legend = figure.legends[0].get_window_extent()
    assert not legend.count_overlaps([ax.get_tightbbox() for ax in figure.axes])
    assert figure.bbox.contains(*legend.min) and figure.bbox.contains(*legend.max)
    assert min(ax.bbox.height for ax in figure.axes) > 2.4 * figure.dpi  # inches: the axes keep their room


@pytest.mark.parametrize(("floor", "line"), [(54.0, False), (39.0, True)])
def test_noise_floor_is_a_line_or_an_arrow(floor, line):
    records = sweep(3)
    records.loc[records["variant"] == "dense sdpa_math", "psnr_db"] = floor
    ax = drawn(records).axes[0]
    flat = [item for item in ax.lines if len(set(item.get_ydata())) == 1 and item.get_ydata()[0] == floor]
    assert bool(flat) == line
    assert any("noise floor" in text.get_text() and ("↑" in text.get_text()) != line for text in ax.texts)
    assert ax.get_ylim()[1] < 50  # a far floor does not squash the methods


def test_lines_differ_without_colour():
    records = pd.concat([sweep(1).assign(method=f"m{i}") for i in range(9)])
    records = records[records["role"].eq("method") & records["tail"].eq("hybrid")]
    figure = drawn(records)
    looks = {(line.lines[0].get_marker(), line.lines[0].get_linestyle()) for line in figure.axes[0].containers}
    assert len(looks) == 9


def test_settings_that_vary_make_lines_of_their_own():
    records = pd.concat([sweep(2), sweep(2, dense_steps=3)])
    names = {c.get_label() for c in drawn(records).axes[0].containers}
    assert {"pisa, dense steps 0", "pisa, dense steps 3"} <= names


# ---------------------------------------------------------------------------------------------------------- absent
def test_what_cannot_be_drawn_is_said(tmp_path, caplog):
    assert plots.draw_all(sweep(1, weights="random"), tmp_path, tmp_path, USUAL) == []
    assert "no plot of quality against speed for toy_wan" in caplog.text
    caplog.clear()
    plots.draw_all(sweep(1), tmp_path, tmp_path, USUAL)
    assert "no frames to show for toy_wan" in caplog.text


def test_only_failures_draw_nothing(tmp_path):
    assert plots.draw_all(sweep(1, status="failed"), tmp_path, tmp_path, USUAL) == []


def test_without_lpips_the_second_panel_is_ssim(tmp_path):
    files = plots.draw_all(sweep(1, lpips=None), tmp_path, tmp_path, USUAL)
    assert "SSIM ↑" in svg_texts(next(f for f in files if f.suffix == ".svg"))


# ---------------------------------------------------------------------------------------------------------- frames
@pytest.mark.parametrize(("frames", "columns"), [(9, 6), (2, 2), (1, 1)])
def test_strip_shows_dense_methods_and_four_times_the_difference(tmp_path, frames, columns):
    labelled = cells(with_frames(sweep(2), tmp_path, frames), USUAL)
    strips = {suffix: figure for suffix, figure, _ in film_strips(labelled, tmp_path)}
    assert list(strips) == ["sparsity_0.5", "sparsity_0.75", "sparsity_0.875"]
    pictures = [ax.images[0].get_array() for ax in strips["sparsity_0.5"].axes if ax.images]
    assert len(pictures) == (1 + 3 + 3) * columns
    if frames > 1:  # rows: dense, then picture and difference of each method
        rows = np.array(pictures).reshape(7, columns, 16, 24, 3)
        dense, shown, difference = rows[0], rows[1::2], rows[2::2]
    else:  # above: dense and methods, below: differences
        dense, shown, difference = pictures[0], np.array(pictures[1:4]), np.array(pictures[4:])
    np.testing.assert_allclose(difference, (4 * np.abs(shown - dense)).clip(0, 1), atol=1e-6)
    assert (shown != dense).any()


def test_missing_frame_files_are_left_out(tmp_path):
    records = with_frames(sweep(1), tmp_path, 2)
    lost = records[(records["tail"] == "zeroth") & (records["sparsity"] == 0.5)]["frames_path"].iloc[0]
    (tmp_path / lost).unlink()
    shown = {suffix: data["label"].tolist() for suffix, _, data in film_strips(cells(records, USUAL), tmp_path)}
    assert shown["sparsity_0.5"] == ["block_topk", "pisa"] and len(shown["sparsity_0.75"]) == 3


def test_video_shows_all_side_by_side(tmp_path, caplog):
    records = with_frames(sweep(1), tmp_path, 3)
    path = plots.comparison_video(records, tmp_path / "a.mp4", tmp_path, sparsity=0.5, usual=USUAL)
    frames = media.read(path)
    assert frames.shape[0] == 3 and frames.shape[3] > 3 * frames.shape[2] > 0  # dense and three methods in one row
    assert plots.comparison_video(records, tmp_path / "b.mp4", tmp_path, sparsity=0.1, usual=USUAL) is None
    assert "no video b.mp4" in caplog.text
