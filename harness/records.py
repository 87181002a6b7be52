"""One JSON file per measured cell, named by what could change its answer; written atomically as soon as it is known."""

import gzip
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

ARCHIVE = "records.jsonl.gz"
VERSION = 1  # of the record's meaning; a new one makes every cell new


def key_of(identity: dict[str, Any]) -> str:
    """A name of 16 hex digits for everything that could change the answer."""
    text = json.dumps({"version": VERSION, **identity}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, data: bytes) -> None:
    """The file is there whole or not at all, also after a kill. Raises InputError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            os.chmod(part, 0o644)  # a temporary file is its owner's alone
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}. Free space or choose another folder with out=."
        ) from error


class Records:
    """The records below one results folder."""

    def __init__(self, out: Path):
        self.folder = Path(out) / "records"

    def check_writable(self) -> None:
        probe = self.folder / ".probe"
        write_atomically(probe, b"")
        probe.unlink()

    def load(self, key: str) -> dict[str, Any] | None:
        path = self.folder / f"{key}.json"
        return self._read(path) if path.exists() else None

    def save(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, indent=1, allow_nan=False, default=str)
        write_atomically(self.folder / f"{record['key']}.json", text.encode())

    def all(self) -> list[dict[str, Any]]:
        """Every readable record, by time of creation."""
        found = (self._read(p) for p in sorted(self.folder.glob("*.json")))
        return sorted((r for r in found if r), key=lambda r: r.get("created", ""))

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A record, or None after setting a damaged or foreign file aside and naming it."""
        try:
            record = json.loads(path.read_text())
            if isinstance(record, dict) and record.get("key") == path.stem:
                return record
            reason = "is not a record of this name"
        except (json.JSONDecodeError, UnicodeDecodeError):
            reason = "is damaged"
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        print(f"{path} {reason}: set aside as {aside.name}; its cell will be measured again.", file=sys.stderr)
        return None


def load(out: Path) -> "DataFrame":
    """All records of a results folder as one table, a row each. Raises InputError when there are none."""
    import pandas as pd

    rows = Records(out).all()
    if (packed := Path(out) / ARCHIVE).exists():
        with gzip.open(packed, "rt") as lines:
            rows += [json.loads(line) for line in lines]
    if not rows:
        raise InputError(f"there are no records in {out}: run `python -m harness sweep out={out}` first.")
    return pd.DataFrame(rows)


def archive(out: Path, to: Path) -> Path:
    """Packs all records of a folder into one file, a line each, for keeping in a repository; the same records give the
    same bytes. `load` reads it too."""
    lines = "".join(json.dumps(r, sort_keys=True) + "\n" for r in sorted(Records(out).all(), key=lambda r: r["key"]))
    write_atomically(Path(to) / ARCHIVE, gzip.compress(lines.encode(), mtime=0))
    return Path(to) / ARCHIVE


def finite(value: Any) -> Any:
    """NaN and infinity become None, also inside lists: a record holds numbers or 'not measured'."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
