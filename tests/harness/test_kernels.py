"""Tables, break-even lengths and figures of `bench kernel`, from invented records."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from harness import kernels, plots, tables
from harness.kernels import break_even, in_words, rows
from tests.harness import synthetic

LENGTHS = [1024, 4096, 16384, 65536]
DENSE_MS = {"flash": 1.0, "cudnn": 1.2}  # at 4,096 tokens; four times as long for twice the length


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def record(tokens: int, role: str, **changes: object) -> dict:
    config = {
        "model": {"batch": 1, "heads": 24, "tokens": tokens, "head_dim": 128, "dtype": "bfloat16"},
        "method": {"engine": changes.pop("asked", "auto")},
    }
    quadratic = (tokens / 4096) ** 2
    peers = [
        {"kernel": name, "latency_ms_median": ms * quadratic, "latency_ms_p20": 0.99 * ms * quadratic, "rel_l2": 2e-3,
         "latency_ms_p80": 1.01 * ms * quadratic, "tflops": 600.0 / ms, "roofline_percent": 75.0 / ms}
        for name, ms in DENSE_MS.items()
    ]  # fmt: skip
    base = {
        "key": repr((tokens, role, sorted(changes.items()))),
        "status": "ok",
        "reason": "",
        "workload": "kernel",
        "model": "synthetic",
        "weights": "none",
        "machine": "H100",
        "protocol": "v1",
        "variant": None,
        "order": "raster",
        "routing": "centroid",
        "tail": "hybrid",
        "block_size": 64,
        "seed": 0,
        "prompt": None,
        "role": role,
        "method": "dense",
        "engine": None,
        "sparsity": 0.0,
        "density_realised": 1.0,
        "created": "2026-01-01T00:00:00",
        "config": config,
        "dense_peers": peers,
        "dense_kernel": "flash",
        "matrix_tflops": 800.0,
        "copy_gb_s": 3000.0,
        "dense_left_out": "",
        "throttle": None,
    }
    return base | changes


def method(tokens: int, sparsity: float, engine: str, overhead_ms: float, **changes: object) -> dict:
    """A call of that overhead beside the exact part's share of dense."""
    dense_ms = (tokens / 4096) ** 2
    exact = (1 - sparsity) * dense_ms
    ms = exact + overhead_ms * tokens / 4096
    return record(
        tokens, "method", method="pisa", engine=engine, asked=engine, sparsity=sparsity, density_realised=1 - sparsity,
        latency_ms_median=ms, latency_ms_p20=0.98 * ms, latency_ms_p80=1.02 * ms, speedup=dense_ms / ms,
        speedup_low=0.97 * dense_ms / ms, speedup_high=1.03 * dense_ms / ms, phase_ms_routing=ms - exact,
        phase_ms_exact=exact, exact_tflops=500.0, roofline_percent=62.5, peak_memory_mb=64.0, host_us=80.0,
        sm_clock_mhz=1755.0, power_w=690.0, rel_l2_formula=3e-3, rel_l2=0.5, **changes,
    )  # fmt: skip


def bench() -> pd.DataFrame:
    """Dense and two engines at four lengths and two densities; triton breaks even, eager does so at 0.125 alone."""
    found = [record(tokens, "reference") for tokens in LENGTHS]
    for tokens in LENGTHS:
        for sparsity in (0.5, 0.875):
            found += [method(tokens, sparsity, "triton", 0.4), method(tokens, sparsity, "eager", 9.0)]
    return pd.DataFrame(found)


# ----------------------------------------------------------------------------------------------------- break-even
@given(
    crossing=st.floats(1100, 60000), slope=st.floats(0.1, 2),
    tokens=st.lists(st.integers(512, 100_000), min_size=2, max_size=8, unique=True),
)  # fmt: skip
def test_break_even_is_where_two_power_laws_cross(crossing, slope, tokens):
    """Speed-up (L / crossing)^slope is a straight line in logs, so the answer is exact wherever lengths enclose it."""
    tokens = sorted(tokens)
    length = break_even(tokens, [(x / crossing) ** slope for x in tokens])
    if tokens[-1] <= crossing:
        assert length is None
    elif tokens[0] > crossing:
        assert length == tokens[0]
    else:
        assert length == pytest.approx(crossing, rel=1e-6)


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=8))
def test_break_even_lies_behind_the_last_length_that_dense_wins(ratios):
    tokens = [1024 * 2**i for i in range(len(ratios))]
    length = break_even(tokens, ratios)
    if ratios[-1] <= 1:
        assert length is None
    else:
        assert all(ratio > 1 for x, ratio in zip(tokens, ratios, strict=True) if x > length)
        assert tokens[0] <= length <= tokens[-1]


def test_break_even_in_words():
    assert in_words(12345.4, [1024, 65536]) == "12,345"
    assert in_words(1024.0, [1024, 65536]) == "≤ 1,024"
    assert in_words(None, [1024, 65536]) == "none up to 65,536"
    assert break_even([], []) is None


def test_break_even_of_a_bench_stands_in_every_row_of_its_line():
    table = rows(bench()).query("role == 'method'")
    for (series, sparsity), line in table.groupby(["series", "sparsity"]):
        overhead = 0.4 if "triton" in series else 9.0
        assert line["break_even_tokens"].nunique(dropna=False) == 1
        true = 4096 * overhead / sparsity  # s L^2 = overhead L, in units of 4,096 tokens
        found = line["break_even_tokens"].iloc[0]
        assert found == pytest.approx(true, rel=0.1) if true < LENGTHS[-1] else math.isnan(found)
    one = table.query("series == 'pisa eager' and sparsity == 0.5")
    assert set(one["break_even"]) == {"none up to 65,536"}


def test_lengths_of_other_families_are_never_joined():
    records = bench()
    for column, value in (("heads", 12), ("dtype", "float16"), ("batch", 2), ("head_dim", 64)):
        other = records.copy()
        other["config"] = [{**c, "model": {**c["model"], column: value}} for c in other["config"]]
        other["key"], other["speedup"] = other["key"] + column, 0.5
        both = rows(pd.concat([records, other], ignore_index=True)).query("role == 'method'")
        assert both.loc[both[column].eq(value), "break_even_tokens"].isna().all()
        assert both.loc[both[column].ne(value) & both["series"].eq("pisa triton"), "break_even_tokens"].notna().all()


# ----------------------------------------------------------------------------------------------------------- rows
def test_a_row_for_every_dense_kernel_and_every_method():
    table = rows(bench())
    assert len(table) == 4 * (2 + 2 * 2)
    dense = table.query("role == 'dense' and tokens == 4096")
    assert dense["series"].tolist() == ["dense flash", "dense cudnn"]  # fastest first
    assert dense["latency_ms_median"].tolist() == [1.0, 1.2] and dense["exact_tflops"].tolist() == [600, 500]
    assert table.query("role == 'method'")["dense_kernel"].eq("flash").all()


def test_the_newest_record_of_a_key_wins():
    old, new = method(4096, 0.5, "triton", 1.0), method(4096, 0.5, "triton", 0.5)
    new |= {"key": old["key"], "created": "2026-02-01T00:00:00"}
    assert rows(pd.DataFrame([new, old]))["latency_ms_median"].tolist() == [new["latency_ms_median"]]


def test_series_name_what_differs():
    table = [method(4096, 0.5, "triton", 1.0), method(4096, 0.5, "triton", 1.0, tail="drop")]
    assert set(rows(pd.DataFrame(table))["series"]) == {"pisa triton tail=hybrid", "pisa triton tail=drop"}
    auto = method(4096, 0.5, "triton", 1.0)
    auto["config"] = {**auto["config"], "method": {"engine": "auto"}}
    assert rows(pd.DataFrame([auto]))["series"].tolist() == ["pisa triton"]
    both = rows(pd.DataFrame([auto | {"key": "auto"}, method(4096, 0.5, "triton", 1.0)]))
    assert set(both["series"]) == {"pisa triton", "pisa auto: triton"}


# ---------------------------------------------------------------------------------------------------------- views
def test_tables_hold_every_number_and_note():
    records = bench()
    records.loc[len(records)] = method(4096, 0.75, "fa4", 1.0) | {
        "status": "refused",
        "reason": "ValueError: no",
        "engine": None,
        "speedup": None,
        "exact_tflops": None,
    }
    records.loc[0, "dense_left_out"] = "sdpa_cudnn: no plan"
    records.loc[4, "throttle"] = "power cap 80 %"
    text = tables.markdown(records)
    assert text.count("### ") == 4 and "H100" in text and "1, 24, 4,096, 128, bfloat16" in text
    for word in (
        *(
            "dense flash",
            "dense cudnn",
            "pisa triton",
            "p20–p80",
            "over dense",
            "break-even (tokens)",
            "none up to 65,536",
        ),
        *("routing (ms)", "exact (ms)", "exact (TFLOP/s)", "of the roofline (%)", "host (µs)", "memory (MB)"),
        *("clock (MHz)", "power (W)", "error: formula", "800 TFLOP/s", "3,000 GB/s", "held back, power cap 80 %"),
        *("pisa fa4 at sparsity 0.75: refused: ValueError: no", "Dense kernels left out: sdpa_cudnn: no plan"),
    ):
        assert word in text, word
    assert "1.11 (1.08–1.14)" in text  # 1 / (0.5 + 0.4) at 4,096 tokens


def test_kernel_records_have_a_csv_of_their_own_and_leave_other_tables_alone(tmp_path):
    both = pd.concat([bench(), synthetic.sweep(2, config=None)], ignore_index=True)
    names = {path.name for path in tables.write_all(both, tmp_path, usual=synthetic.USUAL)}
    assert names == {"tables.md", "tables.tex", "kernels.csv", "summary.csv", "paired.csv", "failures.csv"}
    assert set(pd.read_csv(tmp_path / "summary.csv")["workload"]) == {"generate"}
    table = pd.read_csv(tmp_path / "kernels.csv")
    assert len(table) == 24 and table["phase_ms_exact"].notna().sum() == 16
    tables.print_tables(bench())
    assert {path.name for path in tables.write_all(bench(), tmp_path / "alone")} == {
        *("tables.md", "tables.tex", "kernels.csv"),
    }


def test_figures_are_what_the_rows_say(tmp_path):
    files = plots.draw_all(bench(), tmp_path, tmp_path)
    stems = {"speedup_density", "phases", "latency_length-b1_h24_d128_bfloat16"}
    assert {path.name for path in files} == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png", "csv")}
    assert all(path.stat().st_size > 200 for path in files)
    table, data = rows(bench()), pd.read_csv(tmp_path / "speedup_density.csv")
    np.testing.assert_allclose(sorted(data["speedup"]), sorted(table["speedup"].dropna().astype(float)))
    parts = pd.read_csv(tmp_path / "phases.csv")
    np.testing.assert_allclose(parts["phase_ms_routing"] + parts["phase_ms_exact"], parts["latency_ms_median"])
    lines = pd.read_csv(tmp_path / "latency_length-b1_h24_d128_bfloat16.csv")
    assert len(lines) == 24 and lines["break_even_tokens"].notna().any()
    svg = (tmp_path / "latency_length-b1_h24_d128_bfloat16.svg").read_text()
    assert "break-even: none up to 65,536" in svg and "dense flash" in svg and "density 0.125" in svg


def test_one_length_has_no_curve_and_no_times_no_figure(tmp_path):
    records = bench()
    one = records[[c["model"]["tokens"] == 4096 for c in records["config"]]]
    assert {path.suffix: path.stem for path in plots.draw_all(one, tmp_path, tmp_path)}.keys() == {
        ".svg",
        ".png",
        ".csv",
    }
    assert not list(tmp_path.glob("latency_length*"))
    untimed = one.assign(latency_ms_median=np.nan, dense_peers=[[{"kernel": "flash"}]] * len(one))
    assert plots.draw_all(untimed, tmp_path / "none", tmp_path) == []


def test_other_views_do_not_trip_over_kernel_records():
    ours, others = kernels.split(pd.concat([bench(), synthetic.sweep(1)], ignore_index=True))
    assert len(ours) == 20 and set(others["workload"]) == {"generate"}
