"""The cells of a sweep: one fully resolved config each, named by everything that could change its answer.

A method's cell is compared with its dense reference, a cell too, shared by all methods that start from the same noise.
"""

import copy
import sys
from dataclasses import dataclass
from typing import Any

from harness import environment
from harness.checks import build_model, check, prompt_of, without_refused_engines
from harness.config import Composed, Composer
from harness.errors import InputError
from harness.records import key_of
from harness.shapes import shape_name

# Settings that cannot change what a cell measures.
RUN_CONTROL = {"tracker", "out", "dry_run", "force", "retry_failed", "on_error", "noise_floor", "allow", "device"}


@dataclass(frozen=True)
class Cell:
    """One thing to measure. `reference` is the cell it is compared with, None for the reference itself."""

    config: dict[str, Any]
    choices: dict[str, str]
    role: str  # reference | noise_floor | method
    key: str
    variant: str | None = None
    reference: "Cell | None" = None

    @property
    def label(self) -> str:
        name = self.variant or self.choices["method"]
        detail = "" if self.role != "method" else f" {self.choices['method/tail']} {self.choices['method/order']}"
        sparsity = f" sparsity={self.config['sparsity']:g}" if self.role == "method" else ""
        engine = self.config["method"].get("engine", "auto")
        engine = "" if engine == "auto" else f" {engine}"
        return f"{self.config_name} {name}{detail}{engine}{sparsity} seed={self.config['seed']}"

    @property
    def config_name(self) -> str:
        kernel = self.choices["workload"] == "kernel"
        shape = f" {shape_name(self.config['model'])}" if kernel else ""
        return f"{self.choices['model']}/{self.choices['workload']}{shape}"


def plan(overrides: list[str], composer: Composer) -> list[Cell]:
    """All cells of a sweep in running order: for each sample the reference, the noise floor, then the methods.

    Raises one InputError with every distinct fault of every cell, before anything runs.
    """
    composed, faults = [], []
    for words in composer.expand(overrides):
        try:
            composed.append(composer.compose(words))
        except InputError as error:
            faults += error.sentences
    composed, left_out = without_refused_engines(composed)
    faults += check(composed)
    if faults:
        raise InputError(*dict.fromkeys(faults))
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    cells: dict[str, Cell] = {}
    floors: set[str] = set()
    for one in composed:
        reference = make_cell(dense_config(one), {**one.choices, "method": "dense"}, "reference")
        wanted_floor = reference.key in floors or len(floors) < one.config["noise_floor"]
        family = [reference]
        if wanted_floor:
            floors.add(reference.key)
            family += noise_floor(reference, one)
        if one.choices["method"] != "dense":
            family.append(make_cell(one.config, one.choices, "method", reference=reference))
        for cell in family:
            cells.setdefault(cell.key, cell)
    return list(cells.values())


def make_cell(config: dict[str, Any], choices: dict[str, str], role: str, **more: Any) -> Cell:
    """A cell and its key: everything that could change the answer, and nothing else."""
    device = environment.choose_device(config["device"])
    model = build_model(config, device)
    ignored = RUN_CONTROL | {"metrics"} if role == "reference" else RUN_CONTROL
    relevant = {k: v for k, v in config.items() if k not in ignored}
    weights = getattr(model, "weights_file", None)
    identity = {
        "config": {**relevant, "workload": {k: v for k, v in config["workload"].items() if k != "keep_frames"}},
        "role": role,
        "variant": more.get("variant"),
        "prompt": prompt_of(config, model),
        "code": environment.code_digest(),
        "weights": environment.file_digest(weights) if weights else None,
        "machine": environment.machine(device),
    }
    return Cell(config, choices, role, key_of(identity), **more)


def dense_config(one: Composed) -> dict[str, Any]:
    """The config of the dense reference: all that concerns sparse methods set to what does nothing."""
    config = copy.deepcopy(one.config)
    config["method"] = {"_target_": "baselines.dense.Dense", "kernel": config["dense_kernel"]}
    config["sparsity"], config["density"], config["engine"] = 0.0, 1.0, "auto"
    config["model"] |= {"dense_steps": 0, "dense_layers": 0, "order": "raster"}
    return config


def noise_floor(reference: Cell, one: Composed) -> list[Cell]:
    """Dense once more, and dense by another exact kernel: differences that mean nothing."""
    cells = []
    for variant, kernel in (("dense again", one.config["dense_kernel"]), ("dense sdpa_math", "sdpa_math")):
        config = copy.deepcopy(reference.config)
        config["method"]["kernel"] = kernel
        cells.append(make_cell(config, reference.choices, "noise_floor", variant=variant, reference=reference))
    return cells
