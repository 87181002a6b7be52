"""`python -m harness doctor`: what this machine can run, what is missing, and the command that mends it."""

from importlib.util import find_spec
from pathlib import Path

from harness import environment
from harness.config import options


def show() -> int:
    """Prints one line for every fact."""
    for name, text in (*machine(), *engines(), *weights(), *tools()):
        print(f"{name:<14} {text}")
    return 0


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
    from harness.models.toy_wan import ASSETS

    facts = [("lpips", found(ALEXNET, "reinstall the package: pip install --force-reinstall ."))]
    for name in options("model"):
        file = ASSETS / name / "transformer" / "diffusion_pytorch_model.safetensors"
        if name.startswith("toy"):
            facts.append(
                (name, found(file, f"reinstall the package, or train: python scripts/train_toy.py --out runs/{name}"))
            )
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
