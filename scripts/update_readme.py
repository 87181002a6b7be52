"""Writes the README's tables from the records under results/, so that no number there is typed by hand.

    python scripts/update_readme.py           # after new results
    python scripts/update_readme.py --check   # exit 1 when the README is not what the records give

A table stands between `<!-- table: FOLDER -->`, `<!-- bench: FOLDER -->` or `<!-- step: FOLDER -->` and `<!-- end -->`.
"""

import re
import sys
from pathlib import Path

import pandas as pd

from harness import step_plots
from harness.records import load
from harness.tables import summary

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- (table|bench|step): (\S+) -->\n).*?(<!-- end -->)", re.S)


def plus_minus(row: pd.Series, column: str, digits: int) -> str:
    value, half = row[column], row.get(f"{column}_half")
    if pd.isna(value):
        return "identical" if column == "psnr_db" and row["identical"] else "–"
    return f"{value:.{digits}f}" + (f" ± {half:.{digits}f}" if pd.notna(half) else "")


def seconds(row: pd.Series) -> pd.Series:
    names = ["latency_ms_median", "latency_ms_median_half"]
    return (row[names].astype(float) / 1000).reindex([*names, "identical"])


def table(folder: Path) -> str:
    """The main job: quality and time of every method, noise floor first."""
    records = load(folder)
    rows = []
    for _, row in summary(records).iterrows():
        method = row["role"] == "method"
        rows.append(
            {
                "method": row["label"],
                "sparsity": f"{row['sparsity']:g}" if method else "",
                "density": f"{row['density_realised']:g}",
                "s per sample": plus_minus(seconds(row), "latency_ms_median", 1),
                "speed-up": plus_minus(row, "speedup", 2) if method else "–",
                "PSNR dB": plus_minus(row, "psnr_db", 1),
                "SSIM": plus_minus(row, "ssim", 3),
                "LPIPS": plus_minus(row, "lpips", 3),
            }
        )
    one = records.iloc[0]
    seeds = records.loc[records["role"].eq("method"), "seed"].nunique()
    note = (
        f"{one['model']}, {one['steps']} steps, {seeds} seeds, mean ± half of the 95 % interval; speed-up over dense "
        f"`{one['dense_kernel']}` on {one['machine']}; layer 0 dense. "
        f"Records: [{folder.relative_to(ROOT)}]({folder.relative_to(ROOT)})."
    )
    return f"{pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)}\n\n{note}\n"


def bench(folder: Path) -> str:
    """The kernel benchmark at sparsity 0.875: PISA's time and speed-up by shape and engine, extra memory beside it."""
    records = load(folder)
    rows = []
    chosen = records[records["method"].eq("pisa") & records["sparsity"].eq(0.875)]
    for record in chosen.to_dict("records"):
        model, dense, ours = record["config"]["model"], record["dense_latency_ms_median"], record["latency_ms_median"]
        if record["config"]["method"].get("block_q"):
            continue
        rows.append(
            {
                "B, H, L, D": f"{model['batch']}, {model['heads']}, {model['tokens']:,}, {model['head_dim']}",
                "engine": record["engine"],
                "dense ms": f"{dense:#.3g}".rstrip(".") if dense < 1000 else f"{dense:.0f}",
                "PISA ms": f"{ours:#.3g}".rstrip(".") if ours < 1000 else f"{ours:.0f}",
                "speed-up (95 %)": "{speedup:.2f} ({speedup_low:.2f} to {speedup_high:.2f})".format_map(record),
                "peak memory MB": f"{record['peak_memory_mb']:.0f}",
                "size": (model["batch"] * model["heads"] * model["tokens"] ** 2, ours),
            }
        )
    text = pd.DataFrame(rows).sort_values("size").drop(columns="size").to_markdown(index=False, disable_numparse=True)
    one = chosen.iloc[0]
    note = f"Dense is `{one['dense_kernel']}`, {one['config']['model']['dtype']}, {one['machine']}"
    return f"{text}\n\n{note}; speed-up is the geometric mean over rounds; memory with the output.\n"


def step(folder: Path) -> str:
    """One denoising step of the real models: dense, PISA and the limit."""
    chosen = step_plots.rows(load(folder)).sort_values("dense_latency_ms_median", ascending=False)
    rows = [
        {
            "model": f"{row['model']}, {row['size']}",
            "tokens": f"{row['tokens']:,.0f}",
            "dense ms": f"{row['dense_latency_ms_median']:,.0f}",
            "PISA ms": f"{row['latency_ms_median']:,.0f}",
            "speed-up (95 %)": f"{row['speedup']:.2f}"
            + (f" ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})" if pd.notna(row["speedup_low"]) else ""),
            "limit": f"{row['limit_speedup']:.2f}",
            "attention ms": f"{row['dense_step_ms_attention']:,.0f} to {row['step_ms_attention']:,.0f}",
            "rounds": f"{row['latency_n']:.0f}",
        }
        for row in chosen.to_dict("records")
    ]
    one = chosen.iloc[0]
    text = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    return (
        f"{text}\n\nDense is `{one['dense_kernel']}`, {one['machine']}; speed-up is the geometric mean over rounds.\n"
    )


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text()
    makers = {"table": table, "bench": bench, "step": step}
    after = BLOCK.sub(lambda m: m[1] + "\n" + makers[m[2]](ROOT / m[3]) + "\n" + m[4], before)
    if "--check" in sys.argv:
        if after != before:
            print("README.md is not what results/ gives: run python scripts/update_readme.py.")
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
