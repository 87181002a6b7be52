"""Progress of a sweep on stderr: a live line in a terminal, one plain line for each cell elsewhere."""

import sys
import time
from typing import Any


class Progress:
    """`start` and `done` around every cell; the time left is told from the cells measured so far."""

    def __init__(self, total: int, have: int):
        self.total, self.have, self.count = total, have, 0
        self.began = time.monotonic()
        self.live: Any = None

    def __enter__(self) -> "Progress":
        if self.have:
            self.say(f"{self.have} of {self.total} cells have a record already")
        if sys.stderr.isatty() and self.have < self.total:
            from rich.console import Console

            self.live = Console(stderr=True).status("")
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def start(self, label: str) -> None:
        if self.live is not None:
            self.live.update(f"[{self.have + self.count + 1}/{self.total}] {label}{self._left()}")

    def done(self, label: str, record: dict[str, Any]) -> None:
        self.count += 1
        self.say(f"[{self.have + self.count}/{self.total}] {label}: {outcome(record)}{self._left()}")

    def say(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _left(self) -> str:
        todo = self.total - self.have - self.count
        if not self.count or not todo:
            return ""
        seconds = (time.monotonic() - self.began) / self.count * todo
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def outcome(record: dict[str, Any]) -> str:
    """A record in a few words."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['reason']}"
    ms, psnr, error = (record.get(name) for name in ("latency_ms_median", "psnr_db", "rel_l2"))
    parts = [] if ms is None else [f"{ms / 1000:.2f} s" if ms >= 1000 else f"{ms:.2f} ms"]
    if record.get("identical"):
        parts.append("identical to dense")
    elif psnr is not None:
        parts.append(f"PSNR {psnr:.2f} dB")
    elif error is not None:
        parts.append(f"relative L2 {error:.4f}")
    return ", ".join(parts) or "ok"
