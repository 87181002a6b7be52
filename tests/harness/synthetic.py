"""Invented records for the tests of the result views: numbers like those of a small trained video model."""

from __future__ import annotations

import numpy as np
import pandas as pd

DENSE_MS = 14_000.0  # one whole sample
USUAL = {
    "pisa": {"order": "raster", "routing": "topk", "tail": "hybrid"},
    "block_topk": {"order": "raster", "routing": "topk", "tail": "drop"},
}
QUALITY = {  # PSNR by tail and density
    "drop": {0.5: 29.5, 0.25: 24.1, 0.125: 20.5},
    "zeroth": {0.5: 32.0, 0.25: 25.3, 0.125: 21.8},
    "hybrid": {0.5: 34.8, 0.25: 26.7, 0.125: 22.1},
}
PROMPT = "a red checker circle bounces over drifting clouds"


def record(**changes: object) -> dict:
    """One good method cell, with `changes`."""
    base = {
        "key": "k",
        "status": "ok",
        "reason": "",
        "protocol": "v1",
        "workload": "generate",
        "role": "method",
        "model": "toy_wan",
        "weights": "toy",
        "variant": None,
        "method": "pisa",
        "order": "raster",
        "routing": "topk",
        "tail": "hybrid",
        "engine": "eager",
        "block_size": 64,
        "dense_kernel": "cpu_flash",
        "sparsity": 0.75,
        "density_realised": 0.25,
        "exact_fraction": 0.34375,
        "dense_steps": 0,
        "dense_layers": 1,
        "steps": 12,
        "guidance": 1.0,
        "seed": 0,
        "prompt": PROMPT,
        "latency_ms_median": 7_000.0,
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
        "psnr_db": 26.0,
        "ssim": 0.9,
        "lpips": 0.1,
        "identical": False,
        "rel_l1": None,
        "rel_l2": None,
        "cosine": None,
        "frames_path": None,
        "created": "2026-01-01T00:00:00",
        "machine": "laptop",
    }
    return base | changes


def sweep(seeds: int = 4, rng_seed: int = 0, **changes: object) -> pd.DataFrame:
    """Noise floor, dense and three tails at three sparsities over `seeds` seeds, whose level differs by about 3 dB."""
    rng = np.random.default_rng(rng_seed)
    rows = []
    for seed in range(seeds):
        level, dense_ms = rng.normal(0, 2.8), DENSE_MS * rng.normal(1, 0.02)
        dense = {"method": "dense", "sparsity": None, "order": None, "routing": None, "tail": None, "engine": None}
        dense |= {
            "density_realised": 1.0,
            "exact_fraction": 1.0,
            "speedup": 1.0,
            "speedup_low": 1.0,
            "speedup_high": 1.0,
        }
        dense |= {"seed": seed, "latency_ms_median": dense_ms, "dense_steps": None, "dense_layers": None}
        nothing = {"psnr_db": None, "ssim": None, "lpips": None}
        rows.append(record(role="reference", **dense | nothing))
        rows.append(
            record(
                role="noise_floor",
                variant="dense again",
                identical=True,
                **dense | {"psnr_db": None, "ssim": 1.0, "lpips": 0.0},
            )
        )
        floor = {
            "psnr_db": 54.4 + rng.normal(0, 0.5),
            "ssim": 0.9995,
            "lpips": 0.0004,
            "latency_ms_median": dense_ms * 1.8,
        }
        rows.append(record(role="noise_floor", variant="dense sdpa_math", **dense | floor | {"speedup": 0.55}))
        for tail, by_density in QUALITY.items():
            for density, psnr in by_density.items():
                quality = psnr + level + rng.normal(0, 0.6)
                ratio = {0.5: 1.28, 0.25: 1.62, 0.125: 1.85}[density] * {"drop": 1.04, "zeroth": 1.01, "hybrid": 1.0}[
                    tail
                ]
                ratio *= rng.normal(1, 0.01)
                rows.append(
                    record(
                        method="block_topk" if tail == "drop" else "pisa",
                        tail=tail,
                        seed=seed,
                        sparsity=1 - density,
                        density_realised=density,
                        exact_fraction=1 / 8 + density * 7 / 8,
                        latency_ms_median=dense_ms / ratio,
                        speedup=ratio,
                        speedup_low=ratio * 0.98,
                        speedup_high=ratio * 1.02,
                        psnr_db=quality,
                        ssim=1 - 3 * 10 ** (-quality / 20),
                        lpips=4 * 10 ** (-quality / 20),
                    )  # fmt: skip
                )
    return pd.DataFrame(rows).assign(**changes)


def operator_sweep(seeds: int = 3, rng_seed: int = 0) -> pd.DataFrame:
    """The operator workload: error of one attention call for three tails."""
    rng = np.random.default_rng(rng_seed)
    records = sweep(seeds, rng_seed, workload="operator", weights="random", steps=None, guidance=None, dense_steps=None)
    records = records[records["variant"].ne("dense again") | records["variant"].isna()].copy()
    scale = {"drop": 0.43, "zeroth": 0.134, "hybrid": 0.104}
    for i, row in records.iterrows():
        error = 2.3e-6 if row["role"] == "noise_floor" else scale.get(row["tail"], np.nan)
        if row["role"] == "method":
            error *= (0.125 / row["density_realised"]) ** 0.7 * rng.normal(1, 0.04)
        records.loc[i, ["rel_l2", "rel_l1", "cosine"]] = error, error * 0.8, 1 - error**2 / 2
        records.loc[i, ["psnr_db", "ssim", "lpips"]] = None
    records["latency_ms_median"] /= 120
    return records
