"""The command line as a person meets it: quick to answer, one sentence for bad input, own methods without a fork."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import main


def test_list_and_help_import_nothing_heavy():
    code = (
        "import sys; from harness.cli import main\n"
        "for words in (['list'], ['--help'], *([v, '--help'] for v in ('sweep', 'bench', 'doctor'))): main(words)\n"
        "heavy = {'torch', 'pandas', 'hydra', 'matplotlib', 'diffusers', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "block_topk" in done.stdout and "method/tail" in done.stdout


@pytest.mark.parametrize("verb", ["sweep", "plot", "bench", "score", "list", "doctor"])
def test_every_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert f"python -m harness {verb}" in capsys.readouterr().out


BAD = [
    (["swep"], "Did you mean 'sweep'"),
    (["sweep", "method=pizza"], "Did you mean 'pisa'"),
    (["sweep", "model=toy_wam"], "Did you mean 'toy_wan'"),
    (["sweep", "method/tail=hybrd"], "Did you mean 'hybrid'"),
    (["sweep", "sparsity=1.2"], "sparsity must be in [0, 1)"),
    (["sweep", "sparsity=0.5,", "0.75"], "empty value"),
    (["sweep", "method="], "empty value"),
    (["sweep", "seed=1.5"], "seed must be a whole number"),
    (["sweep", "method.block_size=1000000"], "method.block_size must be from 1 to"),
    (["sweep", "model.width=50"], "multiples of 4"),
    (["sweep", "engine=warp"], "warp"),
    (["sweep", "device=cuda"], "device=cpu"),
    (["sweep", "dense_kernel=fast"], "No dense kernel 'fast'"),
    (["sweep", "prompt=a red pentagon"], "do not know the word 'pentagon'"),
    (["sweep", "model.path=/nowhere"], "no toy_wan weights"),
    (["sweep", "--fast"], "no flag '--fast'"),
    (["sweep", "metrics.protocol=v9"], "metrics.protocol must be one of"),
    (["sweep", "model.steps=0"], "model.steps must be at least 1"),
    (["bench", "kernels"], "bench kernel"),
    (["plot", "out=/nowhere"], "no records"),
    (["score", "a.png"], "compares two paths"),
]


@pytest.mark.parametrize(("words", "sentence"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(words, sentence, capsys, monkeypatch, tmp_path, tiny_model):
    import torch

    if "device=cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    if words[0] == "sweep" and not any(w.startswith("model") for w in words):
        words = [*words, f"model.path={tiny_model}"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not (tmp_path / "results").exists()


def test_damaged_weights_are_a_sentence(tiny_model, tmp_path, capsys):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert main(["sweep", f"model.path={folder}", f"out={tmp_path / 'out'}"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_an_unwritable_folder_is_a_sentence(tiny_model, tmp_path, capsys):
    (tmp_path / "out").write_text("a file where a folder should be")
    assert main(["sweep", f"model.path={tiny_model}", f"out={tmp_path / 'out'}"]) == 2
    assert "out=" in capsys.readouterr().err


def test_a_method_from_outside_the_repository_works(tiny_words, tmp_path, capsys, monkeypatch):
    """The README's example: one Python file, one config, no fork."""
    from harness.records import load

    conf = tmp_path / "my_conf"
    (conf / "method" / "routing").mkdir(parents=True)
    (tmp_path / "my_package.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from pisa import BlockMap\n\n"
        "@dataclass(frozen=True)\n"
        "class Diagonal:\n"
        "    width: int\n\n"
        "    def __call__(self, q, k, v, blocks):\n"
        "        i, j = torch.arange(blocks.n_q)[:, None], torch.arange(blocks.n_k)\n"
        "        mask = (i - j).abs() <= self.width\n"
        "        return BlockMap.from_mask(mask.expand(*q.shape[:2], -1, -1).to(q.device), blocks)\n"
    )
    (conf / "method" / "routing" / "diagonal.yaml").write_text("_target_: my_package.Diagonal\nwidth: 1\n")
    (conf / "method" / "mine.yaml").write_text(
        "defaults:\n  - order: model\n  - routing: diagonal\n  - tail: zeroth\n  - _self_\n"
        "_target_: pisa.SparseAttention\nblock_size: 32\nengine: ${engine}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["sweep", *tiny_words, "method=mine", "sparsity=0.5", "seed=0", "noise_floor=0", "--config-dir", str(conf)]
    assert main(words) == 2
    assert "allow=my_package" in capsys.readouterr().err
    assert main([*words, "allow=my_package"]) == 0
    record = load(Path(tiny_words[-1].split("=")[1])).set_index("method").loc["mine"]
    assert record["routing"] == "diagonal" and record["status"] == "ok" and record["block_size"] == 32
    assert "mine" in capsys.readouterr().out


def test_doctor_tells_in_words(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for word in ("cpu", "gpu", "engine eager", "dense kernels", "lpips", "toy_wan", "wandb"):
        assert word in told


def test_plot_draws_again_from_records(tiny_words, tmp_path, capsys):
    assert main(["sweep", *tiny_words, "method=pisa", "sparsity=0.5", "seed=0", "noise_floor=0"]) == 0
    out = Path(tiny_words[-1].split("=")[1])
    (out / "tables.md").unlink()
    assert main(["plot", f"out={out}"]) == 0
    assert (out / "tables.md").exists() and "pisa" in capsys.readouterr().out


def test_bench_kernel_times_attention(tmp_path, capsys):
    words = ["model.tokens=256,300", "model.heads=2", "sparsity=0.5", "workload.repeats=3", f"out={tmp_path}"]
    assert main(["bench", "kernel", *words]) == 0
    assert "pisa" in capsys.readouterr().out
