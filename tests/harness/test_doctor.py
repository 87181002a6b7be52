"""`doctor` says in words what a machine or a model has and lacks."""

import pytest
import torch

from harness import doctor
from harness.errors import InputError
from harness.models import full
from tests.harness.checkpoints import overrides, save


def said(words, capsys):
    assert doctor.show(words) == 0
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())


def test_the_machine(capsys):
    doctor.show()
    text = capsys.readouterr().out
    assert "engine eager" in text and "runs here" in text and torch.__version__ in text


def test_a_model_without_weights_has_its_size_and_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(full, "memory_there", lambda device: 24 * 2.0**30)
    facts = said(["model=wan2.1_14b", "device=cpu"], capsys)
    assert facts["tokens"].startswith("75,600") and facts["parameters"].startswith("14.29 billion")
    assert "about 45.4 GiB (transformer 26.6" in facts["memory"] and "main memory here: 24.0 GiB" in facts["memory"]
    command = "hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --include"
    assert command in facts["weights"] and command in facts["verdict"]


def test_random_weights_need_no_files_but_memory(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    words = ["model=flux1_dev", "device=cpu", "model.weights=random"]
    for gib, verdict in (
        (8, "cannot run here as it is set: FLUX.1 at this size needs about 22.7 GiB"),
        (80, "can run"),
    ):
        monkeypatch.setattr(full, "memory_there", lambda device, gib=gib: gib * 2.0**30)
        assert said(words, capsys)["verdict"].startswith(verdict)


def test_a_checkpoint_that_is_there(capsys, tmp_path):
    words = overrides("flux", weights="pretrained", path=save("flux", tmp_path / "flux"))
    facts = said([*words, "device=cpu"], capsys)
    assert facts["weights"].startswith(f"found in {tmp_path}") and facts["verdict"] == "can run here"
    assert "text encoders and VAE" in facts["memory"]


def test_the_toy_model(capsys):
    assert said(["model=toy_wan", "device=cpu"], capsys)["verdict"] == "can run here"


@pytest.mark.parametrize("words", [["seed=1"], ["model.steps=3"], ["model=flux1_dev", "method=pisa"]])
def test_other_words_are_refused(words):
    with pytest.raises(InputError, match="doctor takes model=NAME"):
        doctor.show(words)
    with pytest.raises(InputError, match="one model at a time"):
        doctor.show(["model=flux1_dev,wan2.1_14b"])
