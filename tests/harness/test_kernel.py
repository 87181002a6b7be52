"""`bench kernel` at sizes of a second: what a record holds, which engines run, which inputs, errors in a sentence."""

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from baselines.dense import Dense
from harness import clocks, phases, roofline, timing
from harness.cells import plan
from harness.cli import main
from harness.config import Composer, build, options
from harness.errors import InputError
from harness.models.synthetic import Synthetic
from harness.phases import Apart, durations
from harness.records import Records, load
from harness.roofline import Limits, Work, dense_work, exact_pairs, phase_work
from harness.shapes import shape_name
from harness.workloads import Run
from harness.workloads.kernel import Kernel, Spots
from pisa import BlockMap, Blocks, SparseAttention, engines, reference
from pisa.engines import eager
from pisa.orders import Tile2D
from pisa.routing import RandomTopK, TopK

SMALL = Limits(matrix_tflops=0.1, copy_gb_s=10.0)


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    """The machine's limits are measured by one test alone."""
    monkeypatch.setattr("harness.workloads.kernel.measure_limits", lambda device: SMALL)


def synthetic(tokens=150, heads=2, batch=1, device="cpu", dtype="float32") -> Synthetic:
    return Synthetic("none", batch, heads, tokens, 32, dtype, 0, 0, "raster", device)


def measured(method=None, repeats=2, kernel="auto", **sizes) -> dict:
    run = Run(method=method, dense=Dense(kernel), seed=0, prompt=None, device="cpu")
    columns, tensors = Kernel(truth_blocks=4, repeats=repeats).measure(synthetic(**sizes), run, {})
    assert tensors == {}
    return columns


# --------------------------------------------------------------------------------------------------------- shapes
SIX = {
    "short": (2, 16, 4096, 128),
    "flux": (1, 24, 4608, 128),
    "long": (2, 16, 32768, 128),
    "wan2.1_1.3b": (1, 12, 32760, 128),
    "wan2.1_14b": (1, 40, 75600, 128),
    "hunyuan_video": (1, 24, 119056, 128),
}


@pytest.mark.parametrize("shape", SIX)
def test_a_shape_sets_all_sizes_at_once(shape):
    config = Composer().compose([("model", "synthetic"), ("shape", shape), ("workload", "kernel")]).config
    model = build(config["model"], where="model")
    assert (model.batch, model.heads, model.tokens, model.head_dim) == SIX[shape] and model.dtype == "bfloat16"
    assert shape_name(config["model"]) == shape


def test_single_sizes_go_on_top_of_a_shape():
    words = [("model", "synthetic"), ("shape", "flux"), ("model.tokens", "100"), ("workload", "kernel")]
    sizes = Composer().compose(words).config["model"]
    assert (sizes["heads"], sizes["tokens"], shape_name(sizes)) == (24, 100, "1x24x100x128")


def test_every_shape_is_another_one():
    found = [Composer().compose([("model", "synthetic"), ("shape", name)]).config["model"] for name in options("shape")]
    assert len({tuple(sizes.values()) for sizes in found}) == len(found) >= 8


def test_shapes_are_swept_one_after_the_other_and_equal_ones_measured_once():
    composer = Composer()
    words = composer.experiment(["shape=cpu_4k,cpu_32k", "sparsity=0.5,0.75"], "bench_kernel")
    tokens = [cell.config["model"]["tokens"] for cell in plan(words, composer)]
    assert tokens == [4096] * 3 + [32768] * 3
    assert len(plan([*words, "model.tokens=256"], composer)) == 3


# --------------------------------------------------------------------------------------------------------- inputs
def test_one_seed_is_one_input_and_the_cpu_keeps_its_numbers():
    first, again, other = synthetic().qkv(3), synthetic().qkv(3), synthetic().qkv(4)
    g = torch.Generator().manual_seed(3)
    for x, y, z in zip(first, again, other, strict=True):
        assert torch.equal(x, y) and not torch.equal(x, z)
        assert torch.equal(x, torch.randn(1, 2, 150, 32, generator=g))
    model = synthetic()
    assert model.qkv(1)[0] is model.qkv(1)[0]
    assert not torch.equal(model.qkv(1)[0], model.qkv(2)[0])


@pytest.mark.gpu
def test_inputs_are_drawn_on_the_gpu():
    a, b = (synthetic(device="cuda", dtype="bfloat16").qkv(3) for _ in range(2))
    assert all(x.is_cuda and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -------------------------------------------------------------------------------------------------------- records
def test_a_method_is_measured_beside_dense_and_phase_by_phase():
    columns = measured(SparseAttention(routing=TopK(0.5), block_size=16), repeats=3)
    assert columns["engine"] == "eager" and columns["density_realised"] == pytest.approx(0.5)  # 5 of 10 blocks
    assert columns["dense_kernel"] == "cpu_flash" == columns["dense_peers"][0]["kernel"]
    for column in ("latency_ms_median", "speedup", "phase_ms_routing", "phase_ms_exact", "exact_tflops",
                   "roofline_percent", "roofline_percent_routing", "matrix_tflops", "copy_gb_s",
                   "first_call_ms", "dense_latency_ms_median"):  # fmt: skip
        assert columns[column] > 0, column
    assert "phase_ms_statistics_and_tail" in columns and "phase_ms_order" not in columns
    assert columns["roofline_percent"] == columns["roofline_percent_exact"]
    assert len(columns["latency_ms_samples"]) == columns["dense_peers"][0]["latency_n"] == 3
    assert columns["host_us"] is None and "sm_clock_mhz" not in columns  # of a GPU alone
    assert columns["rel_l2_formula"] < 1e-5 < columns["rel_l2"]
    assert columns["dense_peers"][0]["rel_l2"] < 1e-5


def test_exact_tflops_are_the_pairs_of_the_map_over_the_exact_phase():
    columns = measured(SparseAttention(routing=TopK(0.5), block_size=16), tokens=160)
    flops = 4 * 2 * 160 * 80 * 32
    assert columns["exact_tflops"] == pytest.approx(flops / columns["phase_ms_exact"] / 1e9)
    assert columns["roofline_percent"] >= 100 * columns["exact_tflops"] / SMALL.matrix_tflops * 0.999


@pytest.mark.parametrize("tail", ["drop", "zeroth", "blockwise_first", "hybrid"])
def test_every_tail_is_judged_by_its_own_formula(tail):
    columns = measured(SparseAttention(routing=RandomTopK(0.25), tail=tail, block_size=16))
    assert columns["rel_l2_formula"] < 1e-5
    assert ("phase_ms_statistics_and_tail" in columns) == (tail != "drop")


def test_a_wrong_engine_shows_in_its_record(monkeypatch):
    def wrong(*args):
        o, lse = attend(*args)
        return o * 1.01, lse

    attend = eager.attend
    monkeypatch.setattr(eager, "attend", wrong)
    assert measured(SparseAttention(routing=TopK(0.5), block_size=16))["rel_l2_formula"] == pytest.approx(
        0.01, rel=0.01
    )


def test_an_order_is_a_phase_and_the_formula_follows_it():
    model = synthetic(tokens=96)
    type(model).grid, stock = property(lambda self: __import__("pisa").Grid(1, 8, 12)), type(model).grid
    try:
        run = Run(SparseAttention(Tile2D(4, 4), TopK(0.4), block_size=16), Dense(), 0, None, "cpu")
        columns, _ = Kernel(4, 1).measure(model, run, {})
    finally:
        type(model).grid = stock
    assert columns["phase_ms_order"] > 0 and columns["rel_l2_formula"] < 1e-5


def test_the_exact_phase_drops_the_tail_on_the_same_map(monkeypatch):
    model, method, seen = synthetic(), SparseAttention(routing=TopK(0.5), block_size=16), []
    method(*model.qkv(0))
    apart = Apart.of(method, *model.qkv(0), model.grid)
    monkeypatch.setattr(eager, "attend", lambda q, k, v, block_map, tail, scale: seen.append((tail.name, block_map)))
    found = apart.callables()
    assert list(found) == ["routing", "exact", phases.WHOLE]
    found["exact"](), found[phases.WHOLE]()
    assert seen == [("drop", method.last.block_map), ("hybrid", method.last.block_map)]


def test_an_engine_may_name_its_phases(monkeypatch):
    def split(q, k, v, block_map, tail, scale):
        assert (tail.name, scale, block_map.block_size) == ("hybrid", None, 16)
        return {name: lambda: torch.zeros(8).sum() for name in ("statistics", "exact", "tail", "sprint")}

    monkeypatch.setattr(eager, "phases", split, raising=False)
    columns = measured(SparseAttention(routing=TopK(0.5), block_size=16))
    names = [name.removeprefix("phase_ms_") for name in columns if name.startswith("phase_ms_")]
    assert names == ["routing", "statistics", "exact", "tail", "sprint"]
    assert {"roofline_percent_statistics", "roofline_percent_tail", "exact_tflops"} < set(columns)
    assert "roofline_percent_sprint" not in columns


def test_another_class_with_the_same_call_is_timed_whole():
    columns = measured(lambda q, k, v, grid: v)
    assert columns["latency_ms_median"] > 0 and columns["rel_l2"] > 0.1
    assert not [name for name in columns if name.startswith("phase_ms_")] and "rel_l2_formula" not in columns


def test_no_rounds_are_errors_alone():
    columns = measured(SparseAttention(routing=TopK(0.5), block_size=16), repeats=0)
    assert columns["rel_l2_formula"] < 1e-5 and "latency_ms_median" not in columns and "exact_tflops" not in columns


def test_the_fastest_dense_kernel_is_the_one_to_beat(monkeypatch):
    """Three kernels: one that fails here, a slow one named first, and a fast one."""
    import time

    def call(self, q, k, v, grid=None, scale=None):
        if self.kernel == "sdpa_cudnn":
            raise RuntimeError("no plan for\nthis shape")
        time.sleep(0.3 if self.kernel == "sdpa_flash" else 0)
        return reference.dense(q, k, v)[0].float()

    monkeypatch.setattr(Dense, "__call__", call)
    monkeypatch.setattr(
        "harness.workloads.kernel.available", lambda q: ["sdpa_cudnn", "sdpa_flash", "cpu_flash", "sdpa_math"]
    )
    columns = measured()
    assert [peer["kernel"] for peer in columns["dense_peers"]] == ["cpu_flash", "sdpa_flash"]
    assert columns["dense_kernel"] == "cpu_flash" and columns["dense_left_out"] == "sdpa_cudnn: no plan for this shape"
    assert columns["latency_ms_median"] == columns["dense_peers"][0]["latency_ms_median"]
    flops = 4 * 2 * 150 * 150 * 32
    assert columns["dense_tflops"] == pytest.approx(flops / columns["latency_ms_median"] / 1e9)

    beside = measured(SparseAttention(routing=TopK(0.5), block_size=16))
    assert [peer["kernel"] for peer in beside["dense_peers"]] == ["cpu_flash"] == [beside["dense_kernel"]]

    monkeypatch.setattr("harness.workloads.kernel.available", lambda q: ["sdpa_cudnn"])
    with pytest.raises(ValueError, match="no dense kernel runs this shape: sdpa_cudnn: no plan"):
        measured()


def test_a_named_dense_kernel_is_the_only_peer():
    assert [peer["kernel"] for peer in measured(kernel="sdpa_math")["dense_peers"]] == ["sdpa_math"]


@pytest.mark.parametrize(("tokens", "wanted"), [(150, 4), (10, 4), (64, 1), (1000, 16)])
def test_spots_are_spread_and_take_the_last_block(tokens, wanted):
    q = torch.zeros(2, 3, tokens, 8)
    spots = Spots.of(q, 16, wanted)
    blocks = [block for _, _, block in spots.places]
    assert len(set(spots.places)) == len(spots.places) == min(wanted, 6 * -(-tokens // 16))
    assert blocks[0] == 0 and (wanted == 1 or blocks[-1] == -(-tokens // 16) - 1)
    if wanted > 6:
        assert len({(b, h) for b, h, _ in spots.places}) == 6
    assert spots.rows(q).dtype == torch.float64


def test_spots_equal_the_definition():
    model = synthetic(tokens=100)
    q, k, v = model.qkv(0)
    method = SparseAttention(routing=TopK(0.3), block_size=16)
    method(q, k, v)
    spots, whole = Spots.of(q, 16, 5), reference.attend(q, k, v, method.last.block_map, "hybrid")[0]
    assert torch.allclose(spots.formula(Apart.of(method, q, k, v, model.grid)), spots.rows(whole))
    assert torch.allclose(spots.dense(q, k, v), spots.rows(reference.dense(q, k, v)[0]))


# ------------------------------------------------------------------------------------------------------ the sweep
WORDS = ["bench", "kernel", "model.tokens=200", "model.heads=2", "sparsity=0.5", "workload.repeats=2"]


def test_nothing_but_records_tables_and_plots_is_written(tmp_path, capsys):
    words = [*WORDS, "method.engine=eager,auto", "model.tokens=200,300", f"out={tmp_path}"]
    assert main(words) == 0
    assert not list(tmp_path.rglob("*.safetensors")) and (tmp_path / "kernels.csv").stat().st_size
    records = load(tmp_path)
    assert records["role"].value_counts().to_dict() == {"method": 4, "reference": 2}
    assert set(records["shape"]) == {"1x2x200x64", "1x2x300x64"} and records["status"].eq("ok").all()
    assert "break-even" in capsys.readouterr().out
    assert len(list((tmp_path / "plots").glob("*.csv"))) == len(list((tmp_path / "plots").glob("*.png"))) == 3

    before = {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    assert main(words) == 0  # nothing is measured again, the reference without tensors neither
    assert {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()} == before


def test_engines_that_cannot_run_are_left_out_of_a_sweep_with_a_word(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("triton may run here")
    assert main([*WORDS, "method.engine=triton,eager", f"out={tmp_path}"]) == 0
    assert "left out: engine triton cannot run this: it needs" in capsys.readouterr().err
    assert [r["engine"] for r in Records(tmp_path).all() if r["role"] == "method"] == ["eager"]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("method.engine=triton", "engine triton cannot run this: it needs"),
        ("method.engine=triton,triton", "engine triton cannot run this: it needs"),
        ("method.engine=eager,warp", "No engine 'warp'"),
        ("shape=flox", "Did you mean 'flux'"),
        ("model=toy_wan", "shape= sets the sizes of model=synthetic, got model=toy_wan"),
        ("workload=operator", "go together"),
        ("model.head_dim=80", "head_dim"),
    ],
)
def test_what_cannot_run_is_one_sentence_before_any_work(word, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if "triton" in word and torch.cuda.is_available():
        pytest.skip("triton may run here")
    words = [w for w in WORDS if w.split("=")[0] != word.split("=")[0]]
    assert main([*words, word, f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_engine_is_asked_with_the_sizes_of_the_call(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(
        engines, "choose", lambda name, q, block_map, tail: asked.append((q.shape, block_map.block_size))
    )
    composer = Composer()
    words = ["model.head_dim=128", "method.block_size=32", "method.engine=eager", "sparsity=0.5"]
    plan(composer.experiment(words, "bench_kernel"), composer)
    assert asked and set(asked) == {((1, 1, 32, 128), 32)}


def test_a_shape_belongs_to_synthetic_inputs():
    composer = Composer()
    with pytest.raises(InputError, match="shape= sets the sizes of model=synthetic"):
        plan(composer.experiment(["shape=flux"], "main"), composer)


# --------------------------------------------------------------------------------------------------------- timing
@pytest.mark.parametrize(("ms", "rounds"), [(0.1, 50), (2, 25), (29, 25), (30, 12), (119, 12), (120, 8), (9000, 8)])
def test_rounds_follow_the_duration(ms, rounds):
    assert timing.rounds_for(ms) == rounds


def test_the_slowest_peer_sets_the_rounds_of_all_and_peers_take_turns(monkeypatch):
    order = []
    took = {"fast": 1.0, "slow": 40.0}

    class Told(timing.Clock):
        def __call__(self, fn):
            return took[fn()]

    monkeypatch.setattr(timing, "Clock", Told)
    peers = {name: (lambda name=name: order.append(name) or name) for name in took}
    samples = timing.interleave(peers, "cpu", None, warmup=0)
    assert {name: len(ms) for name, ms in samples.items()} == {"fast": 12, "slow": 12}
    assert order[2:6] == ["fast", "slow", "slow", "fast"]


def test_the_difference_of_whole_and_exact_is_taken_round_by_round():
    times = {"routing": [1.0, 1.0, 1.0], "exact": [2.0, 20.0, 3.0], "attend": [3.0, 22.0, 8.0]}
    assert durations(times) == {"routing": 1.0, "exact": 3.0, phases.REST: 2.0}
    assert durations({"exact": [2.0]}) == {"exact": 2.0}


# ------------------------------------------------------------------------------------------------------- roofline
def test_percent_of_the_roofline_takes_the_tighter_limit():
    limits = Limits(matrix_tflops=100.0, copy_gb_s=1000.0)
    assert Work(flops=1e11).percent(2.0, limits) == pytest.approx(50)  # 1 ms of arithmetic
    assert Work(flops=1e10, bytes=1e9).percent(2.0, limits) == pytest.approx(50)  # 1 ms of traffic
    assert Work(flops=2e11, bytes=1e9).percent(4.0, limits) == pytest.approx(50)


@pytest.mark.parametrize(("q_len", "k_len", "size"), [(64, 64, 16), (70, 70, 16), (33, 50, 16), (16, 17, 16)])
def test_exact_pairs_are_counted_token_by_token(q_len, k_len, size, seed):
    blocks = Blocks(size, q_len, k_len)
    mask = torch.rand(2, 3, blocks.n_q, blocks.n_k) < 0.5
    mask[..., 0] = True
    tokens = mask.repeat_interleave(size, 2)[:, :, :q_len].repeat_interleave(size, 3)[..., :k_len]
    assert exact_pairs(BlockMap.from_mask(mask, blocks)) == int(tokens.sum())


def test_the_exact_part_of_a_full_map_is_dense_work_and_has_no_tail():
    q = torch.zeros(1, 2, 64, 32)
    block_map = BlockMap.from_mask(torch.ones(1, 2, 4, 4, dtype=torch.bool), Blocks(16, 64, 64))
    assert phase_work("exact", q, q, block_map, "zeroth") == dense_work(q, q)
    assert phase_work("tail", q, q, block_map, "zeroth").flops == 0
    assert phase_work("tail", q, q, block_map, "hybrid").flops == 2 * q.numel() * 32
    assert phase_work("order", q, q, block_map, "drop").bytes == 8 * q.nbytes
    assert phase_work("sprint", q, q, block_map, "drop") is None


def test_the_limits_are_measured(monkeypatch):
    monkeypatch.setitem(roofline.MATRIX, "cpu", (64, torch.float32))
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 2**16)
    limits = roofline.measure_limits.__wrapped__("cpu")
    assert 0 < limits.matrix_tflops < 1e3 and 0 < limits.copy_gb_s < 1e5


# --------------------------------------------------------------------------------------------------------- clocks
@pytest.fixture
def nvml(monkeypatch):
    """A GPU that NVML knows by its UUID: 1980 MHz, 650 W, 61 degrees, at the power cap."""
    fake = ModuleType("pynvml")
    fake.NVMLError = type("NVMLError", (Exception,), {})
    fake.NVML_CLOCK_SM, fake.NVML_TEMPERATURE_GPU = 1, 0
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    fake.nvmlDeviceGetClockInfo = lambda handle, kind: 1980
    fake.nvmlDeviceGetPowerUsage = lambda handle: 650_000
    fake.nvmlDeviceGetTemperature = lambda handle, kind: 61
    fake.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x05
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(clocks, "package_version", lambda name: "13")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="a-b"))
    return fake


def test_clocks_are_watched_while_the_block_runs(nvml):
    with clocks.watch("cuda") as found:
        assert not found
    throttle = found.pop("throttle")
    assert found == {"sm_clock_mhz": 1980, "power_w": 650, "temperature_c": 61} and throttle == "power cap 100 %"


def test_no_nvml_no_columns(nvml, monkeypatch):
    def refuse(*_):
        raise nvml.NVMLError("not permitted")

    with clocks.watch("cpu") as found:
        pass
    assert found == {}
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlInit"):
        monkeypatch.setattr(nvml, name, refuse)
        with clocks.watch("cuda") as found:
            pass
        assert found == {}
    monkeypatch.setattr(clocks, "package_version", lambda name: None)
    with clocks.watch("cuda") as found:
        pass
    assert found == {}


def test_reasons_in_words():
    assert clocks.in_words((0x1, 0x4, 0x24, 0x0)) == "power cap 50 %, software thermal 25 %"
    assert clocks.in_words((0x1, 0x100)) == ""


@pytest.mark.gpu
def test_a_queued_call_is_timed_without_the_host():
    import time

    x = torch.ones(1, device="cuda")

    def call():
        time.sleep(0.0005)  # half of the spin
        x.add_(1)

    clock = timing.Clock("cuda")
    clock(call)
    assert min(clock(call) for _ in range(5)) < 0.3
    assert timing.host_us(call, "cuda") > 500
    assert math.isclose(timing.spin_cycles(2.0), 2 * timing.spin_cycles(1.0), rel_tol=0.3)


def test_memory_that_malloc_keeps_does_not_hide_what_a_call_takes():
    size = 24 * 2**20

    def take():
        torch.ones(size // 4).sum()

    for _ in range(4):
        take()
    with timing.peak_memory("cpu") as again:
        for _ in range(10):
            take()
    if Path("/proc/self/statm").exists():
        assert again["peak_memory_mb"] > 12
