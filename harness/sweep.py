"""The experiment as one loop: plan cells, skip those that have a record, measure the rest, store each at once.

Records are the only memory: kill a sweep, run it again, and it goes on where it was.
"""

import time
from pathlib import Path
from typing import Any

from harness.cells import Cell, plan
from harness.config import Composer, build
from harness.measure import Bench, lost_tensors
from harness.progress import Progress
from harness.records import Records, key_of

EXIT_SOME_FAILED = 3


def sweep(words: list[str], composer: Composer, default_experiment: str = "main") -> int:
    """Runs a sweep from command-line words; returns the exit code (0, or 3 when a cell has no result)."""
    overrides = composer.experiment(words, default_experiment)
    cells = plan(overrides, composer)
    settings = cells[0].config
    store = Records(Path(settings["out"]))
    store.check_writable()
    todo = [cell for cell in cells if wanted(cell, store, settings)]
    if settings["dry_run"]:
        list_cells(cells, todo)
        return 0
    tracker = build(settings["tracker"], where="tracker")
    bench, started = Bench(settings["device"], settings["allow"]), time.monotonic()
    with Progress(len(cells), len(cells) - len(todo)) as progress:
        try:
            for cell in todo:
                progress.start(cell.label)
                record = bench.measure(cell, store)
                store.save(record)
                progress.done(cell.label, record)
                if record["status"] != "ok" and settings["on_error"] == "stop":
                    break
        except KeyboardInterrupt:
            progress.say("stopped; nothing is lost. Run the same command again to go on.")
            return 130
    results = [r for cell in cells if (r := store.load(cell.key))]
    show(results, Path(settings["out"]), settings, tracker, overrides, redraw=bool(todo))
    progress.say(f"{len(todo)} measured, {len(cells) - len(todo)} already there, {time.monotonic() - started:.0f} s")
    return 0 if all(r["status"] == "ok" for r in results) and len(results) == len(cells) else EXIT_SOME_FAILED


def wanted(cell: Cell, store: Records, settings: dict[str, Any]) -> bool:
    """Whether a cell must be measured: it has no record, or a failed one that is to be tried again, or force."""
    if settings["force"] or (record := store.load(cell.key)) is None:
        return True
    if lost_tensors(store, record):
        return True
    return settings["retry_failed"] and record["status"] != "ok"


def list_cells(cells: list[Cell], todo: list[Cell]) -> None:
    """The plan, a line each."""
    waiting = {cell.key for cell in todo}
    for cell in cells:
        print(f"{'measure' if cell.key in waiting else 'have   '}  {cell.key}  {cell.label}")
    print(f"{len(cells)} cells: {len(todo)} to measure, {len(cells) - len(todo)} have a record.")


def show(
    results: list[dict[str, Any]],
    out: Path,
    settings: dict[str, Any],
    tracker: Any,
    overrides: list[str],
    redraw: bool,
) -> None:
    """The views of a sweep, all made from its records: tables, plots, videos, tracker."""
    import pandas as pd

    from harness.tables import print_tables
    from harness.views import draw

    records = pd.DataFrame(results)
    media = draw(records, out) if redraw or not (out / "tables.md").exists() else []
    print_tables(records)
    if redraw:
        spec = {"overrides": overrides, **{k: settings[k] for k in ("model", "workload", "metrics")}}
        folder = tracker.log(records, out, key_of({"overrides": overrides}), spec, media)
        if folder:
            print(f"Weights & Biases run in {folder} (send it with `wandb sync {folder}`)")
    print(f"Records, tables and plots are in {out}/")
