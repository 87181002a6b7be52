"""Tails: what a query block does with the key blocks that it does not compute exactly."""

from dataclasses import dataclass
from difflib import get_close_matches

TAILS = {
    "drop": "nothing: softmax over the exact keys only, as in plain block-sparse attention",
    "zeroth": "every key of a block is its mean: mass n_j exp(s q.kbar_j), value vbar_j (PISA-0th)",
    "blockwise_first": "zeroth plus s q.H_j for each block j: exact first order, slow, an ablation (PISA-1st)",
    "hybrid": "zeroth plus s q.Hbar, one first-order matrix per head for the whole tail (PISA)",
}


@dataclass(frozen=True)
class Tail:
    """A tail by name; `TAILS` says what each one does. Raises ValueError for an unknown name."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in TAILS:
            near = get_close_matches(str(self.name), TAILS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"No tail '{self.name}'.{hint} Allowed: {', '.join(TAILS)}.")

    @classmethod
    def of(cls, tail: "str | Tail") -> "Tail":
        """`tail` itself, or the tail of that name."""
        return tail if isinstance(tail, cls) else cls(tail)
