"""One short name per record: the method, and whatever makes it differ from its usual form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import yaml

from harness.config import AXES, conf_dir

NO_DIFFERENCE = {
    "_target_",
    "name",
    "kernel",
    "repeats",
    "keep_frames",
    "timed",
    "path",
}  # options that do not make another method
Usual = Mapping[str, Mapping[str, str]]  # method -> axis -> option


def usual_axes(folder: Path | None = None) -> dict[str, dict[str, str]]:
    """Order, routing and tail that each method in `folder` (conf/method) has unless they are overridden."""
    folder = folder or conf_dir() / "method"
    usual = {}
    for path in sorted(folder.glob("*.yaml")):
        defaults = (yaml.safe_load(path.read_text()) or {}).get("defaults", [])
        options = {key: value for entry in defaults if isinstance(entry, dict) for key, value in entry.items()}
        usual[path.stem] = {axis: options[axis] for axis in AXES if axis in options}
    return usual


def labels(records: pd.DataFrame, usual: Usual | None = None) -> pd.Series:
    """The name of each record, e.g. `pisa`, `pisa tail=zeroth`, `pisa order.height=4`, or a noise floor's variant.

    usual: the axes of each method; None reads conf/method. A method that is not there names every axis that varies.
    """
    usual = usual_axes() if usual is None else usual
    floor = records["role"].eq("noise_floor")
    text = records["variant"].fillna("dense").where(floor, records["method"]).astype(object)
    for method, rows in records[records["role"].eq("method")].groupby("method"):
        for column in [*AXES, "engine", "block_size"]:
            values, common = rows[column], _expected(rows, usual.get(method, {}).get(column))
            named = values.notna() & (
                values.nunique() > 1 if common is None else values.ne("model") & values.ne(common)
            )
            text[values.index[named]] += [f" {column}={_plain(value)}" for value in values[named]]
    return text + _config_differences(records)


def _expected(rows: pd.DataFrame, common: str | None) -> str | pd.Series | None:
    """The usual option of each row; `order: model` stands for the order that the row's model prefers."""
    if common != "model" or "config" not in rows:
        return None if common == "model" else common
    return rows["config"].map(lambda config: ((config or {}).get("model") or {}).get("order", "model"))


def _config_differences(records: pd.DataFrame) -> pd.Series:
    """` key=value` for every option of method, model and workload that varies between otherwise equal records.

    Without it two variants of a method would be averaged as if they were two seeds.
    """
    text = pd.Series("", index=records.index, dtype=object)
    if "config" not in records:
        return text
    ignored = {*records.columns, *NO_DIFFERENCE}  # what has a column of its own is named by that
    for _, rows in records.groupby(["workload", "model", "role", "variant", "method", *AXES], dropna=False):
        options = pd.DataFrame(
            {i: dict(_leaves(config)) for i, config in rows["config"].items() if config}, dtype=object
        ).T
        for path in options:
            values = options[path].map(_plain)
            if path.split(".")[-1] not in ignored and values.nunique() > 1:
                text[values.index] += f" {path.removeprefix('method.')}=" + values
    return text


def _leaves(config: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}.")
        elif path.startswith(("method.", "model.", "workload.")):
            yield path, value


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
