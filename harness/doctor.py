"""`python -m harness doctor [model=NAME]`: what this machine can run, what is missing, the command that mends it."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness import environment
from harness.config import options
from harness.errors import InputError


def show(words: Sequence[str] = (), config_dirs: tuple[Path, ...] = ()) -> int:
    """Prints one line for every fact: of the machine, or of the model that the overrides `words` name."""
    facts = one_model(words, config_dirs) if words else (*machine(), *engines(), *weights(), *tools())
    for name, text in facts:
        print(f"{name:<14} {text}")
    return 0


def one_model(words: Sequence[str], config_dirs: tuple[Path, ...] = ()) -> list[tuple[str, str]]:
    """Size, memory and weights of one model, and whether it can run here. Raises InputError for other words."""
    from harness.checks import build_model
    from harness.config import Composer

    wrong = next((word for word in words if not word.startswith(("model=", "model.", "device="))), None)
    if wrong is not None or not any(word.startswith("model=") for word in words):
        raise InputError(
            f"doctor takes model=NAME and settings of the model, got {' '.join(words)!r}: "
            f"models are {', '.join(options('model', config_dirs))}."
        )
    composer = Composer(config_dirs)
    cells = composer.expand(list(words))
    if len(cells) > 1:
        raise InputError("doctor looks at one model at a time: leave out comma lists.")
    config = composer.compose(cells[0]).config
    device = environment.choose_device(config["device"])
    model = build_model(config, device)
    facts = [("tokens", f"{model.tokens:,} in one self-attention")]
    if hasattr(model, "download"):
        facts += full_size(model, device)
    return [*facts, ("verdict", verdict(model))]


def full_size(model: Any, device: str) -> list[tuple[str, str]]:
    """What a full-size model (harness.models.full) is made of and needs; of weights that are missing, the command."""
    from dataclasses import replace

    from harness.models.full import GIB, memory_there, parameter_count

    try:
        size = sum(file.stat().st_size for file in model.folder.rglob("*.safetensors"))
        found = f"found in {model.folder} ({size / GIB:.1f} GiB)"
    except InputError as error:
        found = str(error)
        model = replace(model, weights="random")  # whose size is known without them
    needed, there = model.memory(), memory_there(device) / GIB
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.items())
    where = "GPU" if device == "cuda" else "main memory"
    return [
        ("parameters", f"{parameter_count(model.outline) / 1e9:.2f} billion in the transformer"),
        ("memory", f"about {sum(needed.values()) / GIB:.1f} GiB ({parts}); {where} here: {there:.1f} GiB"),
        ("weights", found),
    ]


def verdict(model: Any) -> str:
    try:
        model.check()
    except InputError as error:
        return f"cannot run here as it is set: {error}"
    return "can run here"


def machine() -> list[tuple[str, str]]:
    import torch

    facts = [("cpu", f"{environment.cpu_name()}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        facts.append(
            ("gpu", f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}")
        )
    else:
        facts.append(("gpu", "none that torch can use: the toy models run on the CPU; real models need a CUDA GPU"))
    facts.append(("torch", f"{torch.__version__}, triton {environment.package_version('triton') or 'not installed'}"))
    return facts


def engines() -> list[tuple[str, str]]:
    """Every sparse engine and dense kernel: runs here, or why not."""
    import torch

    from baselines import dense
    from harness.checks import ask_engine, probe
    from pisa.engines import ENGINES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = probe(device, "bfloat16" if device == "cuda" else "float32")
    facts = []
    for name in ENGINES:
        try:
            ask_engine(name, q, "hybrid")
            facts.append((f"engine {name}", "runs here"))
        except ValueError as error:
            facts.append((f"engine {name}", str(error)))
    here = dense.available(q)
    facts.append(("dense kernels", f"{', '.join(here)} (the first is the reference)"))
    return facts


def weights() -> list[tuple[str, str]]:
    """The weights that are needed and where they were looked for."""
    from harness.metrics import ALEXNET
    from harness.models.toy import ASSETS, training_command

    facts = [("lpips", found(ALEXNET, "reinstall the package: pip install --force-reinstall ."))]
    for name in options("model"):
        file = ASSETS / name / "transformer" / "diffusion_pytorch_model.safetensors"
        if name.startswith("toy"):
            facts.append((name, found(file, training_command(name))))
    return facts


def found(path: Path, remedy: str) -> str:
    return (
        f"weights found ({path.stat().st_size / 2**20:.1f} MiB)"
        if path.is_file()
        else f"no weights at {path}: {remedy}"
    )


def tools() -> list[tuple[str, str]]:
    import os

    netrc = Path.home() / ".netrc"
    key = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())
    logged = "logged in: tracker.mode=online works" if key else "not logged in: tracker=wandb writes offline runs"
    git = environment.git("rev-parse", "--short=12", "HEAD")
    return [
        ("wandb", logged if find_spec("wandb") else "not installed: pip install wandb"),
        ("video", "MP4 can be written" if find_spec("imageio_ffmpeg") else "pip install imageio-ffmpeg to write MP4"),
        ("git", f"commit {git}" if git else "not a checkout: records carry no commit"),
    ]
