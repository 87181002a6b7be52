"""Writes results/toy/tails/README.md: which tail is worth what, by density and order, from the records beside it.

    python scripts/report_tails.py [FOLDER]

The records come from these sweeps (whole samples, then single forwards), all with identical seeds:

    python -m harness sweep experiment=tails            out=FOLDER
    python -m harness sweep experiment=random_control   out=FOLDER
    python -m harness sweep experiment=tails            workload=step seed='range(64)' workload.repeats=0 out=FOLDER
    python -m harness sweep experiment=random_control   workload=step seed='range(64)' workload.repeats=0 out=FOLDER
"""

import sys
from pathlib import Path

import pandas as pd

from harness import statistics
from harness.plots import draw_all
from harness.records import load

TAILS = ["drop", "zeroth", "blockwise_first", "hybrid"]
PAIRS = [("hybrid", "drop"), ("hybrid", "zeroth"), ("zeroth", "drop"), ("blockwise_first", "hybrid")]
ORDERS = ["tile_3d", "raster"]

TEXT = """# Which tail is worth what

toy_wan, {seeds} seeds of whole samples and {forwards} of single forwards, {steps} steps, no guidance, no dense
warm-up steps, layer 0 dense, identical block indices at equal input (top-k on centroids), fp32 on one {machine},
engine eager. Every number below comes from `records.jsonl.gz` in this folder through `scripts/report_tails.py`, whose
docstring holds the commands. ± is half of the 95 % interval; differences are paired by seed, and k/n counts the seeds
in which the first one is better. **Bold** differences exclude zero.

{findings}

![PSNR and LPIPS by density, tile order](plots/density_quality-toy_wan.png)

## Whole samples: PSNR in dB against dense, more is closer

Noise floor: {floor}.

{psnr}

Paired differences in dB:

{psnr_pairs}

Order and routing, same tail (dB): what tiles are worth over raster, and what choosing blocks is worth over random
ones.

{psnr_axes}

## One forward: relative L2 error of the prediction, less is closer

The input is the same noisy latent as dense, at steps {at}; errors of earlier steps do not add up here, so small
differences show.

{step}

Paired differences in percent of the second one's error (negative: the first is closer):

{step_pairs}
"""

FINDINGS = """**In short.** On whole samples in tile order, PISA's hybrid tail leads drop and zeroth at sparsity 0.5
and 0.75; at 0.875 it still leads drop, but its lead over zeroth is no longer certain, and at 0.9375 the three are
level. In raster order it leads zeroth surely only at 0.5, and from 0.875 on the means turn against it. The block-wise
first order, PISA's slow ablation, is ahead of hybrid in every row. In a single forward from equal input the tails rank
the same at every density and in both orders: block-wise, hybrid, zeroth, drop, in nearly every seed. So where hybrid
does not win on samples, its predictions at equal input are still the closer ones, and what decides is how errors grow
over the following steps. Tiles are worth more than the choice between hybrid and zeroth at 0.5 and 0.75 (with drop
they gain nothing certain), and choosing blocks instead of drawing them is worth most. One model, one prompt set, eight
steps: do not carry these numbers over to another model."""


def difference(a: pd.Series, b: pd.Series, better: int, relative: bool = False) -> str:
    """`+1.23 ± 0.45 (14/16)` of paired values indexed by seed, bold where the interval excludes zero."""
    both = pd.concat([a, b], axis=1, keys=["a", "b"]).dropna()
    delta = both["a"] - both["b"]
    if relative:
        delta = 100 * delta / both["b"].mean()
    estimate = statistics.mean(delta)
    text = f"{estimate.value:+.2f} ± {estimate.half:.2f}"
    bold = "**" if abs(estimate.value) > estimate.half else ""
    return f"{bold}{text}{bold} ({int((better * delta > 0).sum())}/{len(delta)})"


def by(rows: pd.DataFrame, column: str, **where: object) -> pd.Series:
    """One value per seed of the rows that match."""
    for key, value in where.items():
        rows = rows[rows[key].eq(value)]
    return rows.set_index("seed")[column]


def values(rows: pd.DataFrame, column: str, digits: int) -> str:
    table = []
    for order in ORDERS:
        for sparsity in sorted(rows["sparsity"].unique()):
            line = {"order": order, "sparsity": f"{sparsity:g}"}
            for method, tails in (("pisa", TAILS), ("random_blocks", ["drop", "hybrid"])):
                for tail in tails:
                    cell = statistics.mean(by(rows, column, method=method, order=order, sparsity=sparsity, tail=tail))
                    name = tail if method == "pisa" else f"random, {tail}"
                    line[name] = f"{cell.value:.{digits}f} ± {cell.half:.{digits}f}"
            table.append(line)
    return pd.DataFrame(table).to_markdown(index=False, disable_numparse=True)


def tail_pairs(rows: pd.DataFrame, column: str, better: int, relative: bool = False) -> str:
    table = []
    for order in ORDERS:
        for sparsity in sorted(rows["sparsity"].unique()):
            same = {"method": "pisa", "order": order, "sparsity": sparsity}
            line = {"order": order, "sparsity": f"{sparsity:g}"}
            for a, b in PAIRS:
                first, second = (by(rows, column, tail=tail, **same) for tail in (a, b))
                line[f"{a} - {b}"] = difference(first, second, better, relative)
            table.append(line)
    return pd.DataFrame(table).to_markdown(index=False, disable_numparse=True)


def axis_pairs(rows: pd.DataFrame, column: str) -> str:
    table = []
    for sparsity in sorted(rows["sparsity"].unique()):
        line = {"sparsity": f"{sparsity:g}"}
        for tail in ("drop", "hybrid"):
            tile, raster = (by(rows, column, method="pisa", order=o, sparsity=sparsity, tail=tail) for o in ORDERS)
            line[f"tile_3d - raster, {tail}"] = difference(tile, raster, 1)
            control = by(rows, column, method="random_blocks", order="tile_3d", sparsity=sparsity, tail=tail)
            line[f"top-k - random, {tail}, tile_3d"] = difference(tile, control, 1)
        table.append(line)
    return pd.DataFrame(table).to_markdown(index=False, disable_numparse=True)


def noise_floor(records: pd.DataFrame) -> str:
    parts = []
    for variant, rows in records[records["role"].eq("noise_floor")].groupby("variant"):
        same = int(rows["identical"].eq(True).sum())
        psnr = f"{rows['psnr_db'].astype(float).mean():.1f} dB" if same < len(rows) else "identical"
        parts.append(f"{variant} {psnr} ({len(rows)} seeds)")
    return ", ".join(parts)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "results" / "toy" / "tails"
    records = load(folder)
    samples, forwards = (records[records["workload"].eq(name)] for name in ("generate", "step"))
    methods, steps = (rows[rows["role"].eq("method")] for rows in (samples, forwards))
    one = records.iloc[0]
    text = TEXT.format(
        seeds=methods["seed"].nunique(),
        forwards=steps["seed"].nunique(),
        steps=one["steps"],
        machine=one["machine"],
        at=steps.iloc[0]["config"]["workload"]["at"],
        findings=FINDINGS,
        floor=noise_floor(samples),
        psnr=values(methods, "psnr_db", 2),
        psnr_pairs=tail_pairs(methods, "psnr_db", 1),
        psnr_axes=axis_pairs(methods, "psnr_db"),
        step=values(steps, "rel_l2", 4),
        step_pairs=tail_pairs(steps, "rel_l2", -1, relative=True),
    )
    (folder / "README.md").write_text(text)
    tails = records[records["method"].eq("pisa") & records["order"].eq("tile_3d") | records["role"].ne("method")]
    draw_all(tails, folder / "plots", folder)


if __name__ == "__main__":
    main()
