"""Shows that a toy model's attention is learned: how much attention mass the best eighth of the key blocks holds.

    python scripts/describe_toy.py --out results/toy/attention
    python scripts/describe_toy.py --model toy_flux --path runs/toy_flux/toy_flux_latest --out runs/toy_flux/attention

For every layer and head, at three denoising steps of one sample: the share of the exact softmax mass in the 12.5 % of
key blocks with the best centroid scores (what a top-k routing finds) and with the most mass (the best that any routing
could), averaged over queries, in raster order and in the model's own; for the trained weights and for a freshly
initialised copy, where every block looks alike (12.5 % would be uniform) and where no quality measurement means
anything. Writes concentration.csv and a summary.md.
"""

import argparse
import math
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from baselines.dense import Dense
from harness.checks import build_model
from harness.config import Composer, build
from harness.hook import Session
from pisa import Blocks
from pisa.orders import Raster
from pisa.routing import TopK

DENSITY, BLOCK, STEPS = 0.125, 64, (1, 4, 6)


def concentration(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Mass in the routed and in the heaviest blocks, and entropy / log L, each `[H]`; q, k, v `[1, H, L, D]`."""
    picked = TopK(DENSITY)(q, k, v, blocks).indices.long()  # [1, H, Nq, kept]
    routed, heaviest, entropy = [], [], []
    member = torch.eye(blocks.n_k).repeat_interleave(BLOCK, 0)[: q.shape[2]]  # [L, N], the last block may be short
    for head in range(q.shape[1]):
        p = (q[0, head] @ k[0, head].mT * q.shape[-1] ** -0.5).softmax(-1)  # [L, L]
        entropy.append(torch.special.entr(p).sum(-1).mean() / math.log(len(p)))
        mass = member.mT @ (p @ member) / len(p)  # [Nq, Nk], all of it sums to 1
        routed.append(mass.gather(1, picked[0, head]).sum())
        heaviest.append(mass.topk(picked.shape[-1], dim=-1).values.sum())
    return torch.stack(routed), torch.stack(heaviest), torch.stack(entropy)


@torch.no_grad()
def measure(model_name: str, path: str | None, weights: str) -> pd.DataFrame:
    composed = Composer().compose([("model", model_name), ("method", "pisa"), ("method/order", "model")])
    config = composed.config
    config["model"] |= {"weights": weights, "path": path}
    model = build_model(config, "cpu")
    model.check()
    orders = (("raster", Raster()), (composed.choices["method/order"], build(config["method"]["order"])))
    rows = []

    def look(session: Session, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if session.step not in STEPS:
            return
        for name, order in orders:
            permutation = order(q, k, session.grid)
            tokens = [x if permutation is None else x.index_select(2, permutation) for x in (q, k, v)]
            found = concentration(*(x.float() for x in tokens), Blocks(BLOCK, q.shape[2], k.shape[2], session.grid))
            for head, (routed, heaviest, entropy) in enumerate(zip(*(x.tolist() for x in found), strict=True)):
                rows.append((weights, session.step, layer, head, name, routed, heaviest, entropy))

    with Session(model.transformer, model.family, dense=Dense(), scheduler=model.scheduler, observe=look):
        model.generate(model.prompt(0), seed=0)
    columns = ["weights", "step", "layer", "head", "order", "mass_routed", "mass_heaviest", "entropy_share"]
    return pd.DataFrame(rows, columns=columns)


def summary(table: pd.DataFrame) -> str:
    means = table.groupby(["weights", "order", "step"])[["mass_routed", "mass_heaviest", "entropy_share"]].mean()
    order = table["order"].iloc[-1]  # the model's own
    heads = table[(table["step"] == 4) & (table["order"] == order)]
    per_head = heads.pivot_table(index=["weights", "layer"], columns="head", values="mass_routed")
    return (
        "Attention mass in the best 12.5 % of the key blocks (uniform: 0.125), mean over layers and heads:\n\n"
        + means.round(3).reset_index().to_markdown(index=False)
        + f"\n\nThe same by layer and head, routed blocks, {order}, step 4:\n\n"
        + per_head.round(2).reset_index().to_markdown(index=False)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy_wan")
    parser.add_argument("--path", help="a folder that scripts/train_toy.py wrote; the weights that ship if left out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = pd.concat([measure(args.model, args.path, weights) for weights in ("toy", "random")])
    table.round(5).to_csv(args.out / "concentration.csv", index=False)
    (args.out / "summary.md").write_text(summary(table))
    print(summary(table))


if __name__ == "__main__":
    main()
