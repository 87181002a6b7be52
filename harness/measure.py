"""Turns a cell into its record: builds the model, the method and the workload, runs them, and records failures too."""

import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import environment
from harness.cells import RUN_CONTROL, Cell
from harness.checks import build_model, probe, prompt_of
from harness.config import AXES, build
from harness.errors import InputError
from harness.records import Records, finite


class Bench:
    """Builds what cells need, keeps the last model and reference at hand, and turns every outcome into a record."""

    def __init__(self, device: str, allow: str | None):
        self.device, self.allow = environment.choose_device(device), allow
        self._models: dict[str, Any] = {}
        self._reference: tuple[str, Any] = ("", None)
        self._warm: set[str] = set()

    def measure(self, cell: Cell, store: Records) -> dict[str, Any]:
        """The cell's record, also when it fails: status refused, out_of_memory or failed, with one sentence."""
        record = self.describe(cell)
        try:
            return record | {"status": "ok", "reason": ""} | {k: finite(v) for k, v in self._run(cell, store).items()}
        except Exception as error:  # every failure becomes a record, and the sweep goes on
            if isinstance(error, InputError):  # a full disk ends the sweep, with nothing lost
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = (
                f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(last.filename).name}:{last.lineno})"
            )
            return record | {"status": status_of(error), "reason": reason}

    def describe(self, cell: Cell) -> dict[str, Any]:
        """The columns that are known before anything runs."""
        config, choices = cell.config, cell.choices
        model = self._model(config)
        method = cell.role == "method"
        return {
            "key": cell.key,
            "status": "failed",
            "reason": "",
            "role": cell.role,
            "variant": cell.variant,
            "protocol": config["metrics"]["protocol"],
            "model": choices["model"],
            "weights": model.weights,
            "workload": choices["workload"],
            "method": choices["method"],
            **{axis: choices[f"method/{axis}"] if method else None for axis in AXES},
            "block_size": config["method"].get("block_size"),
            "sparsity": config["sparsity"],
            "density": config["density"],
            "dense_steps": config["model"]["dense_steps"],
            "dense_layers": config["model"]["dense_layers"],
            "steps": config["model"].get("steps"),
            "guidance": config["model"].get("guidance"),
            "seed": config["seed"],
            "prompt": prompt_of(config, model),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **environment.capture(self.device),
            "config": {k: v for k, v in config.items() if k not in RUN_CONTROL},
        }

    def _model(self, config: dict[str, Any]) -> Any:
        """One adapter for every model that differs in more than its warm-up."""
        shared = {k: v for k, v in config["model"].items() if k not in ("dense_steps", "dense_layers", "order")}
        name = repr(shared)
        if name not in self._models:
            self._models = {name: build_model(config, self.device)}  # the one before is let go
        model = self._models[name]
        for key in ("dense_steps", "dense_layers"):
            setattr(model, key, config["model"][key])
        return model

    def _run(self, cell: Cell, store: Records) -> dict[str, Any]:
        from baselines.dense import Dense
        from harness.workloads import Run

        config, model = cell.config, self._model(cell.config)
        workload = build(config["workload"], where="workload")
        kernel = config["method"]["kernel"] if cell.role != "method" else config["dense_kernel"]
        run = Run(
            method=build(config["method"], self.allow) if cell.role == "method" else None,
            dense=Dense(kernel),
            seed=config["seed"],
            prompt=prompt_of(config, model),
            device=self.device,
            metrics=build(config["metrics"], where="metrics"),
        )
        columns: dict[str, Any] = {"dense_kernel": run.dense.resolve(probe(self.device, model.dtype))}
        self._warm_up(cell, model, run)
        if cell.role == "reference":
            measured, tensors = workload.reference(model, run)
        else:
            measured, tensors = workload.measure(model, run, self._load_reference(cell, store))
            columns |= self._against_dense(cell, store, measured)
        columns |= measured
        if cell.role == "reference":
            columns["keeps_tensors"] = bool(tensors)
        if tensors:
            columns["frames_path"] = self._keep(product_path(store, cell.key), tensors, "frames" in tensors)
        return columns

    def _warm_up(self, cell: Cell, model: Any, run: Any) -> None:
        if cell.choices["workload"] != "generate":
            return  # the other workloads warm up themselves, in turn with dense
        from harness.workloads.generate import warm_up

        method = {k: v for k, v in cell.config["method"].items() if k != "routing"}  # any density warms the same code
        name = repr((method, run.dense, cell.config["model"]))
        if name not in self._warm:
            warm_up(model, run)
            self._warm.add(name)

    def _load_reference(self, cell: Cell, store: Records) -> dict[str, Any]:
        from safetensors.torch import load_file

        key = cell.reference.key
        if self._reference[0] != key:
            path, record = product_path(store, key), store.load(key) or {}
            if record.get("keeps_tensors") is False:  # random inputs: their seed is enough
                return {}
            if not path.exists():
                raise ValueError("its dense reference has no result: see that record for the reason")
            self._reference = (key, load_file(path))
        return self._reference[1]

    @staticmethod
    def _against_dense(cell: Cell, store: Records, measured: dict[str, Any]) -> dict[str, Any]:
        """Speed-up of a whole sample over the dense one of the same seed; other workloads time both in turn."""
        dense = (store.load(cell.reference.key) or {}).get("latency_ms_median")
        if cell.role != "method" or "speedup" in measured or not dense or not measured.get("latency_ms_median"):
            return {}
        return {"dense_latency_ms_median": dense, "speedup": dense / measured["latency_ms_median"]}

    @staticmethod
    def _keep(path: Path, tensors: dict[str, Any], has_frames: bool) -> str | None:
        from safetensors.torch import save

        from harness.records import write_atomically

        write_atomically(path, save({k: v.contiguous() for k, v in tensors.items()}))
        return path.relative_to(path.parent.parent).as_posix() if has_frames else None


def status_of(error: Exception) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out_of_memory"
    return "refused" if isinstance(error, (ValueError, TypeError)) else "failed"


def lost_tensors(store: Records, record: dict[str, Any]) -> bool:
    """Whether a good reference should have tensors and they are gone."""
    return (
        record["role"] == "reference"
        and record["status"] == "ok"
        and record.get("keeps_tensors", True)
        and not product_path(store, record["key"]).exists()
    )


def product_path(store: Records, key: str) -> Path:
    """Tensors that belong to a record: the reference's, or a sample's frames."""
    return store.folder.parent / "tensors" / f"{key}.safetensors"
