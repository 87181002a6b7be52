"""The step workload of random weights: no dense sample, honest parts, and a table and a figure of them. On CPU."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

from baselines.dense import Dense
from harness import step_plots
from harness.config import Composer
from harness.hook import Session
from harness.records import load
from harness.sweep import sweep
from harness.timing import elapsed_ms
from harness.workloads import Run
from harness.workloads.breakdown import Breakdown, Forward, timed_linears
from harness.workloads.step import Input, Step
from pisa import SparseAttention
from pisa.routing import TopK
from tests.harness.checkpoints import CONF, adapter, overrides


def measured(tmp_path, words, **more):
    """The records of a sweep of the step workload with its breakdown."""
    settings = {"experiment": "step_gpu", "method": "pisa", "method.block_size": 16, "sparsity": 0.75, "device": "cpu"}
    settings |= {"workload.repeats": 2, "out": tmp_path} | more
    assert sweep([*words, *(f"{k}={v}" for k, v in settings.items())], Composer()) == 0
    return load(tmp_path)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """One record of every family."""
    out = tmp_path_factory.mktemp("step")
    for name in CONF:
        more = {"dense_steps": 1, "dense_layers": 1} if name == "sd3" else {}
        table = measured(out, overrides(name, **more))
    return table[table["role"].eq("method")].set_index("model")


def test_nothing_is_sampled_and_no_quality_is_kept(records):
    assert set(records.index) == set(CONF.values()) and records["status"].eq("ok").all()
    assert records["forwards"].eq(1).all() and records["weights"].eq("random").all()
    assert not {"sites", "rel_l2", "cosine"} & set(records)
    assert records["dense_kernel"].eq("cpu_flash").all()


def test_a_sweep_of_random_weights_generates_nothing(tmp_path, monkeypatch):
    from harness.models.full import FullModel

    monkeypatch.setattr(FullModel, "generate", lambda *_: pytest.fail("a dense sample was made"))
    table = measured(tmp_path, overrides("wan"), **{"workload.breakdown": False})
    assert "limit_ms" not in table and table["speedup"].notna().any()


def test_the_parts_add_up(records):
    for row in records.to_dict("records"):
        step = {k.removeprefix("step_ms_"): v for k, v in row.items() if k.startswith("step_ms_") and pd.notna(v)}
        phases = [step[k] for k in ("routing", "exact", "statistics_and_tail", "layout")] + [step.get("order", 0)]
        assert step["attention"] == pytest.approx(sum(phases) + step["dense_layers"])
        assert step["attention"] == row["attention_ms"] < row["latency_ms_median"]
        assert 0 < row["dense_step_ms_attention"] < row["dense_latency_ms_median"]
        assert row["limit_speedup"] > 0 and step["linear"] > 0 and row["latency_n"] == 2
        assert row["order"] == "tile_2d" or "order" not in step


def test_warm_up_is_counted(records):
    """SD3 medium: 5 layers, of which block 0 has two."""
    sd3 = records.loc[CONF["sd3"]]
    assert (sd3["sparse_calls"], sd3["dense_calls"]) == (3, 2)
    assert sd3["step_ms_dense_layers"] == pytest.approx(2 / 5 * sd3["dense_step_ms_attention"])
    dense, sparse = sd3["dense_latency_ms_median"] / 1e3, sd3["latency_ms_median"] / 1e3
    assert sd3["predicted_s"] == pytest.approx(dense + sparse)  # one step of two stays dense
    assert sd3["dense_predicted_s"] == pytest.approx(2 * dense)


def test_guidance_of_wan_takes_two_forwards_a_step(records):
    wan = records.loc[CONF["wan"]]
    assert wan["predicted_s"] == pytest.approx(2 * 2 * wan["latency_ms_median"] / 1e3)
    assert wan["predicted_speedup"] == pytest.approx(wan["dense_latency_ms_median"] / wan["latency_ms_median"])


def test_random_weights_take_noise_once_as_of_the_first_sparse_step():
    model = adapter(overrides("wan", dense_steps=1))
    run = Run(None, Dense(), seed=4, prompt="x", device="cpu")
    assert Step().reference(model, run) == ({"density_realised": 1.0, "exact_fraction": 1.0}, {})
    (one,) = Step(at=(0, 7)).inputs(model, run, {})
    assert one.step == 1 and torch.equal(one.latents, model.noise(4))


@torch.no_grad()
def test_the_limit_returns_v_and_costs_nothing():
    """Its forward is that of a session whose attention is the identity on v, and equals no other."""
    model = adapter(overrides("flux"))
    at = Input(0, model.noise(0), 0.5)
    method = SparseAttention(routing=TopK(0.25), block_size=16)
    dense, sparse = Forward(model, "x", {}), Forward(model, "x", {"method": method})
    dense(at), sparse(at)
    limit = Breakdown(model, Run(method, Dense(), seed=0, prompt="x", device="cpu"), dense, sparse, at).limit
    with Session(model.transformer, model.family, dense=lambda q, k, v: v.clone()):
        expected = model.forward(at.latents, at.timestep, "x")
    assert torch.equal(limit(at), expected) and not torch.allclose(dense(at), expected)
    assert limit.attention_ms(1) < dense.attention_ms(1)


@torch.no_grad()
def test_a_forward_reports_all_its_calls():
    model = adapter(overrides("wan"))
    at = Input(3, model.noise(0), 500.0)
    method = SparseAttention(routing=TopK(0.25), block_size=16)
    sparse = Forward(model, "x", {"method": method, "dense_steps": 3, "dense_layers": 1})
    sparse(at), sparse(at._replace(step=2))
    report = sparse.report()
    assert (report["forwards"], report["layers"]) == (2, 3) and report["engine"] == "eager"
    assert (report["sparse_calls"], report["dense_calls"]) == (2, 4)
    assert report["exact_fraction"] == pytest.approx((4 + 2 * report["density_realised"]) / 6)


def test_linear_layers_are_timed_one_by_one_and_the_hooks_go():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))
    with timed_linears(net) as spans, torch.no_grad():
        net(torch.zeros(1, 4))
    assert len(spans) == 2 and elapsed_ms(spans) > 0
    net(torch.zeros(1, 4))
    assert len(spans) == 2 and not net[0]._forward_hooks and not net[0]._forward_pre_hooks
    assert elapsed_ms([(1.0, 1.5), (2.0, 2.25)]) == pytest.approx(750)


def test_a_table_row_and_a_bar_for_every_model(records, tmp_path):
    frame = step_plots.rows(records.reset_index())
    assert list(frame["model"]) == list(CONF.values())
    ((heading, (table,), notes),) = step_plots.pages(frame)
    assert "One denoising step" in heading and len(table) == 4 and "no error stands beside" in notes[-1]
    assert table["model"].iloc[0] == "wan2.1_1.3b, 144 x 112, 9 frames" and table["tokens"].iloc[0] == "189"
    ((name, figure, bars),) = step_plots.step_figures(frame)
    figure.savefig(Path(tmp_path) / f"{name}.png")
    plt.close(figure)
    assert name == "step_breakdown" and bars["panel"].nunique() == 4 and len(figure.axes) == 4
    dense = bars[bars["bar"].eq("dense") & bars["panel"].str.startswith("flux1_dev")]
    assert dense["ms"].sum() == pytest.approx(dense["whole_ms"].iloc[0], rel=0.3)
    assert {"linear layers", "dense attention"} <= set(dense["part"])


def test_seeds_are_one_bar_and_other_records_none(records):
    one = records.reset_index()
    shifted = one.assign(latency_ms_median=one["latency_ms_median"] + 2.0, seed=1)
    frame = step_plots.rows(pd.concat([one, shifted], ignore_index=True))
    assert len(frame) == len(one)
    assert frame["latency_ms_median"].to_numpy() == pytest.approx((one["latency_ms_median"] + 1.0).to_numpy())
    for without in (one.assign(limit_ms=None), one.drop(columns="limit_ms")):
        none = step_plots.rows(without)
        assert none.empty and step_plots.pages(none) == [] and list(step_plots.step_figures(none)) == []
