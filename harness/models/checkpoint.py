"""A diffusers checkpoint on this machine: where it lies, whether it is whole, and how many parameters each part has.

Nothing is ever downloaded: a hub id is looked up in the local cache, and what is missing is named with the command that
fetches it.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from harness.errors import InputError

LEARNED = ("transformer", "vae", "text_encoder")  # a component of these names, or of one with a number, has weights


def find(path: str, parts: Iterable[str], gated: bool) -> Path:
    """The folder of a checkpoint: `path` itself, or the snapshot of that hub id in the local cache.

    parts: components that are needed, such as "transformer" or "text_encoder_2". gated: whether the hub asks for a
    licence first. Raises InputError when it is not there, not whole, or damaged.
    """
    remedy = download_command(path, parts, gated)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise InputError(f"there is no folder {path}: name a checkpoint's folder or a hub id with model.path=.")
        folder, remedy = cached_snapshot(path, remedy), f"run `{remedy}` again, which goes on where it stopped"
    else:
        remedy = "copy the whole folder again"
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(f"{folder} has no model_index.json, so it is no whole checkpoint of diffusers: {remedy}.")
    listed = json.loads(index.read_text())
    for part in parts:
        if not listed.get(part, [None])[0] or not (folder / part).is_dir():
            raise InputError(f"the checkpoint {folder} lacks its {part}: {remedy}.")
        for file in weight_files(folder, part) if is_learned(part) else ():
            if not file.is_file():
                raise InputError(f"the checkpoint {folder} lacks {part}/{file.name}: {remedy}.")
            count_parameters(file, remedy)
    return folder


def cached_snapshot(hub_id: str, command: str) -> Path:
    """The newest snapshot of a hub id in the local cache, without asking the network. Raises InputError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        raise InputError(
            f"there are no weights of {hub_id} in the local cache, and nothing is downloaded unasked: run `{command}`, "
            "or set model.weights=random to measure latency alone."
        ) from None


def download_command(hub_id: str, parts: Iterable[str], gated: bool) -> str:
    """The command line that fetches what is needed and no more."""
    wanted = " ".join(f'"{name}"' for name in ("model_index.json", *(f"{part}/*" for part in parts)))
    login = "hf auth login` (its licence must be accepted on the model's page first) and `" if gated else ""
    return f"{login}hf download {hub_id} --include {wanted}"


def is_learned(part: str) -> bool:
    return part.startswith(LEARNED)


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of a component, also those that an index promises and that are not there."""
    inside = folder / part
    for index in sorted(inside.glob("*.safetensors.index.json")):
        return [inside / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    plain = [inside / name for name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    return [file for file in plain if file.is_file()] or plain[part.startswith("text") :][:1]


def count_parameters(file: Path, remedy: str = "fetch it again") -> int:
    """Numbers in a safetensors file, from its header alone. Raises InputError when it is cut short or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"the weights {file} are damaged ({' '.join(str(error).split())}): {remedy}.") from error


def parameters(folder: Path, parts: Iterable[str]) -> dict[str, int]:
    """How many parameters each component with weights has."""
    learned = [part for part in parts if is_learned(part) and (folder / part).is_dir()]
    return {part: sum(map(count_parameters, weight_files(folder, part))) for part in learned}
