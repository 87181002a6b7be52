"""The real wandb, offline: what the run holds after a sweep was logged, and that nothing left the machine."""

import json
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from harness.summary import summary
from harness.tracking import NoTracker, WandbTracker
from tests.harness.synthetic import USUAL, record, sweep

BLOCK = 32768  # of the LevelDB log format that a .wandb file has
CONF = Path(__file__).parents[2] / "conf" / "tracker"


def stored(file: Path) -> Iterator[object]:
    """The protobuf records of a .wandb file: a header of 7 bytes, then chunks (crc 4, length 2, type 1)."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        if BLOCK - at % BLOCK < 7:  # padding at the end of a block
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            entry = wandb_internal_pb2.Record()
            entry.ParseFromString(parts)
            parts = b""
            yield entry


def history(entries: list) -> list[dict]:
    rows = [e.history.item for e in entries if e.WhichOneof("record_type") == "history"]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row} for row in rows]


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    """A port that takes every connection wandb may try; a test asks whether there was one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


@pytest.fixture(scope="module")
def logged(tmp_path_factory, listener) -> Iterator[tuple[Path, Path, pd.DataFrame]]:
    """(out, folder of the run, records) after one offline log in a home folder of its own."""
    out, home = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("home")
    port = f"http://127.0.0.1:{listener.getsockname()[1]}"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out / "plot.png")
    (out / "clip.mp4").write_bytes(b"not looked into")
    bad = record(status="failed", method="radial", reason="it broke", psnr_db=math.nan, speedup=None)
    records = pd.concat([sweep(2), pd.DataFrame([bad])], ignore_index=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "http_proxy"):
            patch.setenv(name, port)
        patch.setenv("HOME", str(home))
        media = [out / "plot.png", out / "clip.mp4", out / "plot.csv"]
        folder = WandbTracker("a-project").log(records, out, "c0ffee", {"sparsity": [0.5, math.inf]}, media, USUAL)
    assert list(home.rglob("*")) == []
    yield out, folder, records


@pytest.fixture(scope="module")
def entries(logged) -> list:
    return list(stored(next(logged[1].glob("*.wandb"))))


def test_everything_lies_below_the_out_folder(logged):
    out, folder, _ = logged
    assert folder.parent == out / "wandb" and folder.name.startswith("offline-run-")
    assert (out / "wandb" / "data").is_dir() and (out / "wandb" / "cache").is_dir()
    assert not {"WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"} & set(os.environ)


def test_nothing_reaches_the_network(logged, listener):
    with pytest.raises(TimeoutError):
        listener.accept()


def test_run_is_named_by_sweep_and_attempt(entries):
    run = next(e.run for e in entries if e.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.run_group) == ("c0ffee-1", "a-project", "c0ffee")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["sparsity"] == [0.5, None]


def test_table_holds_every_cell_and_is_strict_json(logged):
    _, folder, records = logged
    text = next(folder.rglob("cells*.table.json")).read_text()
    table = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    frame = pd.DataFrame(table["data"], columns=table["columns"])
    assert len(frame) == len(records)
    failed = frame[frame["status"] == "failed"].iloc[0]
    assert (failed["label"], failed["reason"]) == ("radial", "it broke") and math.isnan(failed["psnr_db"])
    np.testing.assert_allclose(sorted(frame["psnr_db"].dropna()), sorted(records["psnr_db"].dropna()))


def test_curves_are_the_summary(logged, entries):
    rows = [row for row in history(entries) if "generate/toy_wan/pisa/psnr_db" in row]
    truth = summary(logged[2], USUAL).query("label == 'pisa'").sort_values("density_realised")
    assert [row["generate/toy_wan/pisa/density"] for row in rows] == truth["density_realised"].tolist()
    np.testing.assert_allclose([row["generate/toy_wan/pisa/psnr_db"] for row in rows], truth["psnr_db"].astype(float))
    assert not any(isinstance(value, float) and math.isnan(value) for row in rows for value in row.values())


def test_quality_is_drawn_over_density(entries):
    metrics = {e.metric.name: e.metric for e in entries if e.WhichOneof("record_type") == "metric"}
    psnr = metrics["generate/toy_wan/pisa/psnr_db"]
    assert psnr.step_metric == "generate/toy_wan/pisa/density" and psnr.summary.max
    assert metrics["generate/toy_wan/pisa/latency_ms_median"].summary.min
    assert metrics["generate/toy_wan/pisa/lpips"].summary.min
    assert not any("." in name for name in metrics)  # wandb would nest them


def test_pictures_and_videos_are_stored_by_path(logged, entries):
    files = {path.suffix for path in (logged[1] / "files" / "media").rglob("*") if path.is_file()}
    assert files == {".png", ".mp4", ".json"}
    keys = {key.split("/_type")[0] for row in history(entries) for key in row}
    assert any(key.startswith("plots/plot") for key in keys) and any(key.startswith("videos/clip") for key in keys)


def test_logging_again_is_another_attempt(logged):
    out, first, records = logged
    second = WandbTracker("a-project").log(records.head(3), out, "c0ffee", usual=USUAL)
    assert first.name.endswith("c0ffee-1") and second.name.endswith("c0ffee-2")


def test_online_without_a_key_says_so_before_wandb_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    with pytest.raises(ValueError, match="wandb login.*offline"):
        WandbTracker("p", mode="online").log(sweep(1), tmp_path / "out", "k", usual=USUAL)
    assert not (tmp_path / "out").exists()


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'onlin'.*tracker=none"):
        WandbTracker("p", mode="onlin")


@pytest.mark.parametrize(("name", "kind"), [("none", NoTracker), ("wandb", WandbTracker)])
def test_conf_builds_the_tracker(name, kind):
    options = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert options.pop("_target_") == f"harness.tracking.{kind.__name__}"
    tracker = kind(**options)
    assert getattr(tracker, "mode", "offline") == "offline"


def test_no_tracker_writes_nothing(tmp_path):
    assert NoTracker().log(sweep(1), tmp_path, "k") is None
    assert list(tmp_path.iterdir()) == []
