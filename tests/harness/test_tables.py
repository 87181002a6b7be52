"""Labels, summary rows, paired differences and the four ways to write them."""

import io
import math

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from harness import statistics, tables
from harness.labels import labels, usual_axes
from harness.summary import cells, paired, summary
from tests.harness.synthetic import USUAL, operator_sweep, record, sweep


@pytest.fixture
def records() -> pd.DataFrame:
    rng_seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("rng_seed", rng_seed)
    return sweep(4, rng_seed)


def frame(*rows: dict) -> pd.DataFrame:
    return pd.DataFrame([record(**row) for row in rows])


# ---------------------------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "pisa"),
        ({"tail": "zeroth"}, "pisa tail=zeroth"),
        ({"tail": "zeroth", "order": "tile_3d"}, "pisa order=tile_3d tail=zeroth"),
        ({"method": "block_topk", "tail": "drop"}, "block_topk"),
        ({"role": "noise_floor", "method": "dense", "variant": "dense again", "order": None}, "dense again"),
        ({"role": "reference", "method": "dense", "order": None, "tail": None}, "dense"),
    ],
)
def test_label_names_what_is_unusual(changes, label):
    assert labels(frame(changes), USUAL).tolist() == [label]


def test_unknown_method_names_the_axes_that_vary():
    rows = frame({"method": "mine", "tail": "a"}, {"method": "mine", "tail": "b"})
    assert labels(rows, {}).tolist() == ["mine tail=a", "mine tail=b"]


def test_the_models_own_order_is_usual():
    model = {"config": {"model": {"order": "tile_3d"}}}
    rows = frame({"order": "tile_3d", **model}, {"order": "raster", **model}, {"order": "model", **model})
    usual = {"pisa": {**USUAL["pisa"], "order": "model"}}
    assert labels(rows, usual).tolist() == ["pisa", "pisa order=raster", "pisa"]


def test_usual_axes_reads_the_conf_folder(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults:\n  - order: raster\n  - tail: drop\n  - _self_\n_target_: a.B\n")
    (tmp_path / "bare.yaml").write_text("_target_: a.B\n")
    assert usual_axes(tmp_path) == {"mine": {"order": "raster", "tail": "drop"}, "bare": {}}
    assert set(usual_axes()["pisa"]) == {"order", "routing", "tail"}


def test_options_that_differ_are_never_averaged():
    """Two values of an option that has no column of its own are two rows, not two seeds."""
    rows = frame(
        {"config": {"method": {"order": {"height": 4}}}, "psnr_db": 20.0},
        {"config": {"method": {"order": {"height": 8}}}, "psnr_db": 30.0},
    )
    table = summary(rows, USUAL)
    assert table["label"].tolist() == ["pisa order.height=4", "pisa order.height=8"]
    assert table["psnr_db"].tolist() == [20.0, 30.0]


# --------------------------------------------------------------------------------------------------------- summary
def test_summary_equals_the_formulas(records):
    table = summary(records, USUAL)
    for row in table[table["role"] == "method"].itertuples():
        tail = row.tail
        chosen = records[
            (records["role"] == "method") & (records["tail"] == tail) & (records["sparsity"] == row.sparsity)
        ]
        psnr, speed = statistics.mean(chosen["psnr_db"]), statistics.geometric_mean(chosen["speedup"])
        assert (row.n, row.psnr_db, row.psnr_db_half) == (4, pytest.approx(psnr.value), pytest.approx(psnr.half))
        assert (row.speedup, row.speedup_low) == (pytest.approx(speed.value), pytest.approx(speed.low))
    assert len(table) == 3 + 3 * 3


def test_noise_floor_first_then_dense_then_methods(records):
    table = summary(records.sample(frac=1, random_state=0), USUAL)
    assert table["role"].tolist() == ["noise_floor"] * 2 + ["reference"] + ["method"] * 9
    assert table["sparsity"].tolist()[3:] == sorted(table["sparsity"].tolist()[3:])


def test_one_cell_has_the_interval_of_its_timing_rounds():
    row = summary(frame({}), USUAL).iloc[0]
    assert (row["speedup_low"], row["speedup_high"]) == (1.9, 2.1)
    assert math.isnan(row["psnr_db_half"])


@pytest.mark.parametrize("column", ["machine", "protocol", "weights", "guidance", "dense_steps", "dense_kernel"])
def test_what_makes_numbers_incomparable_splits_rows(column):
    a, b = {"weights": ("toy", "pretrained")}.get(column, ("1", "2")) if column in ("machine", "weights") else (1, 2)
    assert len(summary(frame({column: a}, {column: b, "seed": 1}), USUAL)) == 2


def test_a_cell_measured_again_counts_once_and_the_newest_wins():
    rows = frame({"psnr_db": 10.0}, {"psnr_db": 30.0, "created": "2026-02-01T00:00:00"}, {"psnr_db": 20.0})
    row = summary(rows, USUAL).iloc[0]
    assert (row["n"], row["psnr_db"]) == (1, 30.0)


def test_identical_output_is_counted_and_left_out_of_psnr():
    rows = frame({"psnr_db": None, "identical": True}, {"psnr_db": 40.0, "seed": 1})
    row = summary(rows, USUAL).iloc[0]
    assert (row["n"], row["identical"], row["psnr_db"]) == (2, 1, 40.0)
    assert "1 of 2 cells equal dense" in tables.markdown(rows, usual=USUAL)


def test_random_weights_show_no_quality():
    rows = sweep(2, weights="random")
    assert summary(rows, USUAL)[["psnr_db", "ssim", "lpips"]].isna().to_numpy().all()
    text = tables.markdown(rows, usual=USUAL)
    assert "PSNR" not in text and "speed-up" in text and "No quality is shown" in text


def test_operator_rows_show_errors_instead_of_picture_metrics():
    text = tables.markdown(operator_sweep(), usual=USUAL)
    assert "rel. L2 ↓" in text and "cosine ↑" in text and "PSNR" not in text


# ---------------------------------------------------------------------------------------------------------- paired
def test_paired_by_seed_by_hand():
    rows = [record(seed=s, psnr_db=20.0 + 5 * s, latency_ms_median=100.0) for s in range(3)]
    rows += [record(seed=s, psnr_db=19.0 + 5 * s - s % 2, tail="zeroth", latency_ms_median=200.0) for s in range(3)]
    rows += [record(seed=9, psnr_db=99.0)]  # no partner
    table = paired(pd.DataFrame(rows), usual=USUAL).set_index("metric")
    psnr, speed = table.loc["psnr_db"], table.loc["speed_ratio"]
    assert (psnr["label"], psnr["against"]) == ("pisa", "pisa tail=zeroth")
    assert psnr["value"] == pytest.approx(4 / 3) and (psnr["n"], psnr["wins"]) == (3, 3)  # differences 1, 2, 1
    assert psnr["half"] == pytest.approx(4.302652730 * math.sqrt(1 / 3) / math.sqrt(3))  # t with 2 degrees of freedom
    assert psnr["verdict"] == "tie" and psnr["low"] < 0 < psnr["high"]  # three pairs do not prove it
    assert speed["value"] == pytest.approx(2.0) and speed["verdict"] == "better"


def test_level_of_a_seed_does_not_change_the_paired_table(records):
    shifted = records.copy()
    shifted["psnr_db"] += shifted["seed"].map(dict(enumerate(np.random.default_rng(1).normal(0, 50, 4))))
    a, b = (paired(r, usual=USUAL).query("metric == 'psnr_db'") for r in (records, shifted))
    np.testing.assert_allclose(a["value"].astype(float), b["value"].astype(float), atol=1e-9)
    np.testing.assert_allclose(a["half"].astype(float), b["half"].astype(float), atol=1e-9)


def test_pairs_never_mix_sparsity_settings_or_models():
    rows = frame(
        {}, {"tail": "zeroth", "sparsity": 0.5}, {"tail": "drop", "dense_steps": 3}, {"tail": "x", "model": "m"}
    )
    assert paired(rows, usual=USUAL).empty


def test_against_one_label(records, tmp_path):
    table = paired(records, against="pisa", usual=USUAL)
    assert set(table["against"]) == {"pisa"} and set(table["label"]) == {"block_topk", "pisa tail=zeroth"}
    with pytest.raises(ValueError, match="block_topk.*got 'pizza'"):
        paired(records, against="pizza", usual=USUAL)
    with pytest.raises(ValueError, match="got 'pizza'"):
        tables.write_all(records, tmp_path, against="pizza", usual=USUAL)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_the_label_does_not_stop_the_others(records):
    both = pd.concat([records, frame({"model": "toy_flux", "method": "mine"})])
    assert "block_topk vs pisa" in tables.markdown(both, against="pisa", usual=USUAL)


def test_of_many_pairs_the_page_shows_those_with_one_cause(tmp_path):
    rows = [
        record(order=order, tail=tail, seed=seed)
        for order in ("raster", "tile_3d")
        for tail in ("drop", "zeroth", "hybrid", "a", "b", "c")
        for seed in (0, 1)
    ]
    tables.write_all(pd.DataFrame(rows), tmp_path, usual=USUAL)
    text, table = (tmp_path / "tables.md").read_text(), pd.read_csv(tmp_path / "paired.csv")
    assert len(table[["label", "against"]].drop_duplicates()) == 66  # twelve labels, every pair in the raw file
    assert text.count(" vs pisa") == 15 + 15 + 6  # tails in each order, orders at each tail
    assert "pisa order=tile_3d tail=drop vs pisa tail=drop" in text and "paired.csv has all" in text
    assert tables.markdown(pd.DataFrame(rows), against="pisa", usual=USUAL).count(" vs pisa ") == 11  # all


def test_lower_is_better_for_lpips():
    rows = [record(seed=s, lpips=0.1 + 0.01 * s) for s in range(4)]
    rows += [record(seed=s, lpips=0.2 + 0.011 * s, tail="zeroth") for s in range(4)]
    row = paired(pd.DataFrame(rows), usual=USUAL).set_index("metric").loc["lpips"]
    assert (row["verdict"], row["wins"]) == ("better", 4) and row["value"] < 0


# --------------------------------------------------------------------------------------------------------- writers
MEMORY = {"status": "out_of_memory", "method": "radial", "sparsity": 0.5, "reason": "needs 90 GB, this GPU has 80 GB."}
BAD = [
    MEMORY,
    MEMORY | {"seed": 1},
    {"status": "refused", "method": "svg2", "engine": None, "reason": "engine fa4 needs compute capability 9.0."},
    {"status": "failed", "method": "pasa", "model": "toy_flux", "reason": "RuntimeError:\n  it broke"},
]  # fmt: skip


def printed(records: pd.DataFrame, **console: object) -> str:
    file = io.StringIO()
    tables.print_tables(records, Console(file=file, width=120, highlight=False, **console), usual=USUAL)
    return file.getvalue()


@pytest.mark.parametrize(
    "writer", [printed, lambda r: tables.markdown(r, usual=USUAL), lambda r: tables.latex(r, usual=USUAL)]
)
def test_failed_cells_are_counted_and_named(records, writer):
    text = " ".join(writer(pd.concat([records, frame(*BAD)], ignore_index=True)).split())
    assert "2 out of memory: radial at sparsity 0.5, seed 0, 1: needs 90 GB" in text
    assert "1 refused: svg2 at sparsity 0.75, seed 0: engine fa4" in text
    assert "1 failed: pasa" in text and "RuntimeError: it broke" in text  # its model has no other row
    assert "toy_flux" in text


def test_failed_cells_stay_out_of_the_numbers(records):
    failed = records[records["role"] == "method"].assign(status="failed", psnr_db=0.0, seed=99)
    pd.testing.assert_frame_equal(summary(pd.concat([records, failed]), USUAL), summary(records, USUAL))


def test_terminal_fits_120_columns_and_is_plain_in_a_pipe(records):
    wide = records.copy()
    wide.loc[wide["seed"] > 1, "guidance"] = 3.0
    wide.loc[wide["seed"] % 2 == 1, "dense_steps"] = 3
    odd = frame({"config": {"method": {"at": ["[red]", "b"]}}}, {"config": {"method": {"at": ["[bold]"]}}})
    assert "[red]" in printed(odd)  # a name is no markup
    for frame_ in (records, operator_sweep(2), pd.concat([wide, frame(*BAD)])):
        text = printed(frame_)
        assert "\x1b" not in text and "bold]" not in text and "\x02" not in text
        assert max(map(len, text.splitlines())) <= 120
        assert "latency ↓" in text and "(×)" in text


def test_terminal_shows_every_number(records):
    shown = tables.summary(records, USUAL)
    text = printed(records)
    for value in shown["psnr_db"].dropna():
        assert f"{value:.2f}±" in text


def test_best_value_is_bold(records):
    assert "\x1b[1m" in printed(records, force_terminal=True, color_system="standard")
    rows = [line.split("|") for line in tables.markdown(records, usual=USUAL).splitlines() if line.startswith("| ")]
    head = [cell.strip() for cell in rows[0]]
    table = pd.DataFrame([[c.strip() for c in row] for row in rows[1:13]], columns=head)
    values = summary(records, USUAL)
    for sparsity, group in values[values["role"] == "method"].groupby("sparsity"):
        best = group.loc[group["psnr_db"].idxmax()]
        bold = table[(table["sparsity"] == f"{sparsity:g}") & table["PSNR ↑ (dB)"].str.startswith("**")]
        assert best["label"] in bold["method"].tolist() and len(bold) == 1
        assert bold["PSNR ↑ (dB)"].iloc[0] == f"**{best['psnr_db']:.2f} ± {best['psnr_db_half']:.2f}**"
    assert not table[table["sparsity"] == "–"].map(lambda cell: "**" in cell).to_numpy().any()  # dense is no rival


def test_a_missing_number_is_a_dash_and_never_zero():
    text = tables.markdown(frame({"lpips": None, "latency_ms_median": None}), usual=USUAL)
    cells_ = [cell.strip() for cell in text.splitlines()[4].split("|")]
    assert cells_.count("–") == 1 and "nan" not in text.lower() and "none" not in text.lower()
    assert "latency" not in text  # a sweep without times has no column for them


@pytest.mark.parametrize(
    ("milliseconds", "shown"), [(0.4123, "0.4123"), (14.031, "14.03"), (202.54, "202.5"), (14031, "14.03")]
)
def test_latency_unit_follows_its_size(milliseconds, shown):
    text = tables.markdown(frame({"latency_ms_median": milliseconds}), usual=USUAL)
    assert ("latency ↓ (s)" in text) == (milliseconds >= 1000)
    assert f" {shown} |" in text


@pytest.mark.parametrize(
    ("value", "shown"), [(0.16345, "0.163"), (0.01234, "0.0123"), (2.34e-6, "2.3e-06"), (1.5, "1.50"), (0.0, "0.00")]
)
def test_errors_show_three_digits_and_tiny_ones_their_power(value, shown):
    text = tables.markdown(frame({"workload": "step", "rel_l2": value, "cosine": None}), usual=USUAL)
    assert f" {shown} |" in text


def test_dense_rows_are_no_rivals_for_the_best_value():
    dense = {"role": "reference", "method": "dense", "order": None, "routing": None, "tail": None, "sparsity": 0.0}
    floor = dense | {"role": "noise_floor", "variant": "dense again", "latency_ms_median": 1.0}
    text = tables.markdown(frame(dense, floor), usual=USUAL)
    assert "**" not in text


def test_output_into_a_pipe_has_120_columns(records, capsys):
    tables.print_tables(records, usual=USUAL)
    assert 80 < max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_mixed_versions_are_named():
    rows = frame({"git_commit": "abc"}, {"git_commit": "def", "seed": 1})
    assert "git_commit: abc, def" in tables.markdown(rows, usual=USUAL)


def test_csv_round_trip_is_exact(records, tmp_path):
    files = tables.write_all(pd.concat([records, frame(*BAD)], ignore_index=True), tmp_path, usual=USUAL)
    assert [file.name for file in files] == ["summary.csv", "paired.csv", "failures.csv", "tables.md", "tables.tex"]
    back = pd.read_csv(tmp_path / "summary.csv")
    truth = summary(records, USUAL)
    assert back["label"].tolist() == truth["label"].tolist()
    for column in truth.select_dtypes("number"):
        np.testing.assert_array_equal(back[column].to_numpy(float), truth[column].to_numpy(float), err_msg=column)
    assert len(pd.read_csv(tmp_path / "failures.csv")) == len(BAD)


def test_latex_escapes_names_but_not_the_bold(records):
    text = tables.latex(records, usual=USUAL)
    assert r"block\_topk" in text and r"\textbf{" in text and r"\textbackslash" not in text and "↑" not in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {9, 5}  # the summary and the paired table


def test_no_records_at_all():
    empty = cells(pd.DataFrame({"role": [], "method": [], "variant": []}), USUAL)
    assert len(empty) == 0 and len(summary(empty, USUAL)) == 0 and len(paired(empty, usual=USUAL)) == 0
    assert tables.markdown(empty, usual=USUAL) == "\n"
