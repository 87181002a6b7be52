"""`python -m harness list`: what can be chosen, from the file names of conf/ alone (no torch, no Hydra)."""

from pathlib import Path

from harness.config import conf_dir, options

GROUPS = (
    ("method", "named methods: an order, a routing and a tail"),
    ("method/order", "which tokens share a block"),
    ("method/routing", "which key blocks a query block computes exactly"),
    ("method/tail", "what happens to the other blocks"),
    ("model", ""),
    ("shape", "sizes of model=synthetic"),
    ("workload", ""),
    ("experiment", "saved sweeps"),
    ("metrics", "formulas of PSNR, SSIM and LPIPS"),
    ("tracker", ""),
)


def show(config_dirs: tuple[Path, ...]) -> int:
    """Prints every group with its options and the comment at the head of their files."""
    roots = (*config_dirs, conf_dir())
    for group, meaning in GROUPS:
        print(f"{group}" + (f"  ({meaning})" if meaning else ""))
        for name in options(group, config_dirs):
            path = next(p for root in roots if (p := Path(root) / group / f"{name}.yaml").exists())
            first = next((line for line in path.read_text().splitlines() if not line.startswith("# @")), "")
            said = first[2:] if first.startswith("# ") else ""
            print(f"  {name:<16} {said}{' (no weights yet)' if _untrained(group, name) else ''}".rstrip())
        print()
    return 0


def _untrained(group: str, name: str) -> bool:
    """A toy model whose weights do not ship: `doctor` and `sweep` give the command that makes them."""
    return group == "model" and name.startswith("toy") and not (Path(__file__).parent / "assets" / name).exists()
