"""What ran where: the fields of a record that say so, and digests of code and weights that could change an answer."""

import hashlib
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEASURING_CODE = (
    "pisa",
    "baselines",
    "harness/models",
    "harness/workloads",
    "harness/metrics.py",
    "harness/media.py",
    "harness/hook.py",
    "harness/opaque.py",
    "harness/timing.py",
    "harness/phases.py",
    "harness/roofline.py",
)


@cache
def code_digest() -> str:
    """A digest of every source file whose change could change a measured number."""
    files = [
        p for part in MEASURING_CODE for p in ([ROOT / part] if part.endswith(".py") else (ROOT / part).rglob("*.py"))
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def file_digest(path: Path) -> str:
    with path.open("rb") as file:  # in pieces: a checkpoint may have gigabytes
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor in words, as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git(*words: str) -> str | None:
    """git's answer about the checkout this package lies in; None outside one or without git."""
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def choose_device(name: str) -> str:
    """'cuda' or 'cpu'. Raises ValueError when a GPU is asked for and there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA GPU here: use device=cpu or device=auto.")
    return name


def machine(device: str) -> str:
    """The class of machine that a latency belongs to."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()} x{torch.get_num_threads()}"


@cache
def capture(device: str) -> dict[str, Any]:
    """The environment fields of a record."""
    import torch

    cuda = device == "cuda"
    commit = git("rev-parse", "--short=12", "HEAD")
    return {
        "machine": machine(device),
        "device": device,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "capability": "%d.%d" % torch.cuda.get_device_capability() if cuda else None,
        "driver": nvidia_driver() if cuda else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": sys.platform,
        **{name: package_version(name) for name in ("torch", "triton", "diffusers", "torchmetrics")},
        "git_commit": commit,
        "git_dirty": bool(git("status", "--porcelain")) if commit else None,
        "code": code_digest(),
    }


def nvidia_driver() -> str | None:
    """The driver's version, through NVML where its package is installed."""
    if package_version("nvidia-ml-py") is None:
        return None
    import pynvml

    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
