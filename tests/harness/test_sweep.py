"""The main loop: what is planned, what is measured once, what survives a kill and a fault."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from harness import environment
from harness.cells import plan
from harness.config import Composer
from harness.errors import InputError
from harness.measure import product_path
from harness.records import Records, load
from harness.sweep import sweep

LEAN = ["noise_floor=0", "seed=0"]


@pytest.fixture
def composer():
    return Composer()


def run(words, composer):
    return sweep(words, composer)


def test_the_plan_holds_one_reference_per_sample_and_the_floor_first(tiny_words, composer):
    cells = plan(composer.experiment([*tiny_words, "seed=0,1"], "main"), composer)
    assert [c.role for c in cells[:3]] == ["reference", "noise_floor", "noise_floor"]
    assert [c.config["seed"] for c in cells if c.role == "reference"] == [0, 1]
    assert sum(c.role == "noise_floor" for c in cells) == 2  # one sample has it, as configured
    methods = [c for c in cells if c.role == "method"]
    assert len(methods) == 2 * 2 * 3
    assert all(c.reference.config["seed"] == c.config["seed"] for c in methods)
    assert len({c.key for c in cells}) == len(cells)


def test_warm_up_and_order_share_the_dense_reference(tiny_words, composer):
    words = [*tiny_words, *LEAN, "method=pisa", "model.dense_steps=0,1", "method/order=raster,tile_3d", "sparsity=0.5"]
    cells = plan(composer.experiment(words, "main"), composer)
    assert sum(c.role == "reference" for c in cells) == 1 and sum(c.role == "method" for c in cells) == 4


def test_a_sweep_measures_once_and_draws_everything(tiny_words, composer, capsys):
    words = [*tiny_words, "seed=0", "sparsity=0.5,0.75"]
    out = Path(tiny_words[-1].split("=")[1])
    assert run(words, composer) == 0
    records = load(out)
    assert records["status"].eq("ok").all() and len(records) == 1 + 2 + 4
    methods = records[records["role"] == "method"]
    for column in ("psnr_db", "ssim", "lpips", "latency_ms_median", "speedup", "attention_share"):
        assert methods[column].notna().all(), column
    assert methods["density_realised"].tolist() == pytest.approx([1 - s for s in methods["sparsity"]])
    assert methods["order"].eq("tile_3d").all() and set(methods["tail"]) == {"hybrid", "drop"}
    again = records[records["variant"] == "dense again"].iloc[0]
    assert again["identical"] and pd.isna(again["psnr_db"])
    printed = capsys.readouterr().out
    assert "pisa" in printed and "block_topk" in printed and "PSNR" in printed
    for name in ("tables.md", "tables.tex", "summary.csv"):
        assert (out / name).stat().st_size > 0
    for pattern in ("*.png", "*.svg", "*.csv", "*.mp4"):
        assert list((out / "plots").glob(pattern)), pattern

    before = {p.name: p.read_bytes() for p in (out / "records").iterdir()}
    assert run(words, composer) == 0
    assert {p.name: p.read_bytes() for p in (out / "records").iterdir()} == before


def test_dry_run_measures_nothing(tiny_words, composer, capsys):
    assert run([*tiny_words, "dry_run=true"], composer) == 0
    assert "measure" in capsys.readouterr().out
    assert not list((Path(tiny_words[-1].split("=")[1]) / "records").glob("*.json"))


@pytest.mark.parametrize("workload", ["step", "operator"])
def test_the_cheap_workloads_record_errors_and_paired_time(tiny_words, composer, workload):
    words = [*tiny_words, *LEAN, f"workload={workload}", "workload.at=[0,1]", "sparsity=0.5", "model.dense_layers=0"]
    words += ["workload.layers=[0,2]", "workload.truth_rows=32"] if workload == "operator" else []
    assert run(words, composer) == 0
    records = load(Path(tiny_words[-1].split("=")[1]))
    methods = records[records["role"] == "method"].set_index("method")
    assert methods["rel_l2"].between(1e-6, 1).all() and methods["speedup"].gt(0).all()
    assert methods.loc["pisa", "rel_l2"] < methods.loc["block_topk", "rel_l2"]
    assert len(methods["sites"].iloc[0]) == (2 if workload == "step" else 4)


def test_untrained_weights_get_no_quality_columns(tiny_words, composer):
    for workload in ("generate", "step"):
        more = ["workload.at=[0]", "workload.repeats=1"] if workload == "step" else []
        assert (
            run([*tiny_words, *LEAN, "model.weights=random", f"workload={workload}", "sparsity=0.5", *more], composer)
            == 0
        )
    methods = load(Path(tiny_words[-1].split("=")[1])).query("role == 'method'")
    assert methods["latency_ms_median"].notna().all()
    assert not {"psnr_db", "ssim", "lpips", "rel_l2"} & set(methods.columns[methods.notna().any()])


def test_a_failing_cell_is_a_record_and_the_sweep_goes_on(tiny_words, composer, monkeypatch, capsys):
    from harness.workloads.generate import Generate

    measure = Generate.measure

    def fragile(self, model, run, reference):
        if run.method is not None and run.method.tail.name == "drop":
            raise RuntimeError("CUDA error: out of memory")
        return measure(self, model, run, reference)

    monkeypatch.setattr(Generate, "measure", fragile)
    words = [*tiny_words, *LEAN, "sparsity=0.5"]
    assert run(words, composer) == 3
    records = load(Path(tiny_words[-1].split("=")[1])).set_index("method")
    assert records.loc["block_topk", "status"] == "out_of_memory" and "CUDA" in records.loc["block_topk", "reason"]
    assert records.loc["pisa", "status"] == "ok"
    assert "out of memory" in capsys.readouterr().out

    monkeypatch.setattr(Generate, "measure", measure)
    assert run(words, composer) == 3  # a failure has a record too
    assert run([*words, "retry_failed=true"], composer) == 0


def test_a_lost_reference_is_made_again(tiny_words, composer):
    words = [*tiny_words, *LEAN, "sparsity=0.5", "method=pisa"]
    assert run(words, composer) == 0
    store = Records(Path(tiny_words[-1].split("=")[1]))
    reference = next(r for r in store.all() if r["role"] == "reference")
    product_path(store, reference["key"]).unlink()
    assert run([*words[:-2], "sparsity=0.75", "method=pisa"], composer) == 0


def test_all_faults_are_told_at_once_and_before_any_work(tiny_words, composer):
    words = [*tiny_words, "sparsity=0.5,1.5", "method=pisa", "model.height=30", "seed=0"]
    with pytest.raises(InputError) as caught:
        run(words, composer)
    text = str(caught.value)
    assert "sparsity must be in [0, 1)" in text and "multiples of 4" in text
    assert not Path(tiny_words[-1].split("=")[1]).exists()


def test_a_killed_sweep_goes_on_where_it_was(tiny_words, composer):
    words = [*tiny_words, "seed=0,1", "sparsity=0.5,0.75", "noise_floor=0"]
    folder = Path(tiny_words[-1].split("=")[1]) / "records"
    command = [sys.executable, "-m", "harness", "sweep", *words]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.json"))) < 3 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = {p.name: p.read_bytes() for p in folder.glob("*.json")}
    assert 3 <= len(done) < 10
    assert run(words, composer) == 0
    after = {p.name: p.read_bytes() for p in folder.glob("*.json")}
    assert len(after) == 2 * (1 + 4) and all(after[name] == text for name, text in done.items())
    assert not list(folder.glob(".*.json.*")) or len(list(folder.glob(".*.json.*"))) <= 1  # at most the torn part


def test_the_key_follows_code_weights_and_machine(tiny_words, composer, monkeypatch):
    words = composer.experiment([*tiny_words, *LEAN, "method=pisa", "sparsity=0.5"], "main")

    def keys():
        return {c.key for c in plan(words, composer)}

    first = keys()
    assert keys() == first
    for name, value in (
        ("code_digest", lambda: "x"),
        ("machine", lambda device: "x"),
        ("file_digest", lambda path: "x"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(environment, name, value)
            assert not keys() & first, name


def test_records_are_plain_json_with_the_environment(tiny_words, composer):
    assert run([*tiny_words, *LEAN, "method=pisa", "sparsity=0.5"], composer) == 0
    for path in (Path(tiny_words[-1].split("=")[1]) / "records").glob("*.json"):
        record = json.loads(path.read_text())
        assert record["key"] == path.stem and record["dense_kernel"] and record["torch"] and record["cpu"]
        assert record["config"]["model"]["steps"] == 2 and record["prompt"]


def test_a_sweep_is_one_offline_wandb_run(tiny_words, composer, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert run([*tiny_words, *LEAN, "method=pisa", "sparsity=0.5", "tracker=wandb"], composer) == 0
    out = Path(tiny_words[-1].split("=")[1])
    runs = list({path.resolve() for path in out.rglob("run-*.wandb")})
    assert len(runs) == 1 and runs[0].stat().st_size > 1000
    assert "wandb sync" in capsys.readouterr().out
