"""Trains a toy model of those that ship with the project, from pictures or videos it draws itself.

    python scripts/train_toy.py --model toy_wan --out runs/toy_wan --minutes 15     # one GPU; run it again to resume
    python scripts/train_toy.py --model toy_flux --out /tmp/try --minutes 0.5 --small   # a CPU rehearsal of every step

Three stages share the time: small samples (clips of 4 frames or pictures of half the size: shapes, textures, words),
whole ones (paths, places), then guidance distillation: the model learns to predict in one pass what classifier-free
guidance would give in two. toy_flux and toy_hunyuan take the scale as an input, as FLUX.1-dev and HunyuanVideo do.
Rectified flow: x_t = (1 - t) x + t noise, the model predicts noise - x. Hidden matrices learn with Muon, the rest with
AdamW.

The schedule runs by the seconds spent, so `--minutes` scales it, and a run that was stopped (SIGTERM is enough) goes on
where it was. Writes a folder that the pipeline's from_pretrained loads, a log (train_log.json), sample sheets, and a
checkpoint every two minutes. What differs between the models: scripts/toy_recipes.py.
"""

import argparse
import copy
import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from safetensors.torch import save_file
from torch import Tensor, nn
from toy_recipes import RECIPES
from toy_videos import draw_captions, save

from harness.checks import build_model
from harness.config import Composer
from harness.models.captions import make_vocabulary

NULL_SHARE, EMA, SAVE_SECONDS = 0.1, 0.9985, 120.0
SAMPLES = 8


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), equal shapes batched into one product.

    The update has the RMS of an AdamW step, so both optimizers take the same learning rate (Liu et al. 2025).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.02):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, ps in by_shape.items():
                state = self.state[ps[0]]
                grad = torch.stack([p.grad for p in ps])
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grad)
                state["momentum"].lerp_(grad, 1 - group["momentum"])
                update = orthogonalise(grad.lerp(state["momentum"], group["momentum"]))
                scale = 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(ps, list(update.to(ps[0].dtype).unbind()), alpha=-group["lr"] * scale)


def orthogonalise(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to a batch `[n, rows, columns]`, roughly (singular values 0.7 to 1.2)."""
    wide = x.shape[-2] <= x.shape[-1]
    x = (x if wide else x.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Trainer:
    """Everything that a checkpoint must hold, and one training step."""

    KEPT = ("step", "seconds", "samples", "stage", "log")

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self.recipe = RECIPES[args.model]
        half = 2 if args.small else 1
        self.stages = [replace(stage, size=stage.size // half) for stage in self.recipe.stages]
        self.ends = [sum(stage.share for stage in self.stages[: i + 1]) for i in range(len(self.stages))]
        torch.manual_seed(args.seed)
        self.model = self.recipe.build(args.small).to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.teacher: nn.Module | None = None
        self.vocabulary = make_vocabulary()
        hidden = [p for name, p in self.model.named_parameters() if is_hidden(name, p)]
        held = {id(p) for p in hidden}
        rest = [p for p in self.model.parameters() if id(p) not in held]
        adam = torch.optim.AdamW(
            rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=self.device.type == "cuda"
        )
        self.optimizers = [Muon(hidden, lr=args.lr), adam]
        self.g = torch.Generator(self.device).manual_seed(args.seed)
        self.step, self.seconds, self.samples, self.stage, self.log = 0, 0.0, 0, 0, []
        self.stopped = False

    def state(self) -> dict:
        models = {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        if self.teacher is not None:
            models["teacher"] = self.teacher.state_dict()
        optimizers = [o.state_dict() for o in self.optimizers]
        return {k: getattr(self, k) for k in self.KEPT} | models | {"optimizers": optimizers, "g": self.g.get_state()}

    def restore(self, saved: dict) -> None:
        for k in self.KEPT:
            setattr(self, k, saved[k])
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        if "teacher" in saved:
            self.start_teacher(saved["teacher"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.g.set_state(saved["g"].cpu())

    def start_teacher(self, weights: dict[str, Tensor]) -> None:
        self.teacher = copy.deepcopy(self.ema)
        self.teacher.load_state_dict(weights)
        self.compile(self.teacher)

    def compile(self, model: nn.Module) -> None:
        """Compiles the blocks, which are alike, one by one: the first of a kind takes the time."""
        if self.device.type == "cuda" and not self.args.eager:
            torch._dynamo.config.recompile_limit = 32  # by lengths, stages and gradients, of which none is wrong
            for name, module in model.named_modules():
                if name.rpartition(".")[0] in ("blocks", "transformer_blocks", "single_transformer_blocks"):
                    module.compile(dynamic=False)

    def train_step(self, lr: float) -> Tensor:
        stage = self.stages[self.stage]
        n = self.args.batch * stage.batch
        captions = self.recipe.captions(stage, n, seed=self.args.seed * 10**7 + self.step + 1)
        x = self.recipe.draw(captions, stage, self.g)
        noise = torch.randn(x.shape, generator=self.g, device=self.device)
        t = self.times(n)
        x_t = torch.lerp(x, noise, t.view(-1, *[1] * (x.ndim - 1)))
        null = torch.rand(n, 1, 1, generator=self.g, device=self.device) < NULL_SHARE
        text = self.recipe.text(captions, self.vocabulary).to(self.device).masked_fill(null, 0)
        one = torch.ones(n, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            target, guidance = noise - x, one
            if self.teacher is not None:
                guidance = one * self.args.guidance
                if self.recipe.embedded:  # any scale from 1 to one above the usual
                    guidance = 1 + self.args.guidance * torch.rand(n, generator=self.g, device=self.device)
                with torch.no_grad():
                    conditional = self.recipe.predict(self.teacher, x_t, t, text, one)
                    unconditional = self.recipe.predict(self.teacher, x_t, t, torch.zeros_like(text), one)
                scale = guidance.view(-1, *[1] * (x.ndim - 1))
                target = (unconditional + scale * (conditional - unconditional)).float()
            v = self.recipe.predict(self.model, x_t, t, text, guidance)
        loss = F.mse_loss(v.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(EMA, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.step, self.samples = self.step + 1, self.samples + n
        return loss.detach()

    def times(self, n: int) -> Tensor:
        """t `[n]`: mostly high noise, where shape and path are decided; every sixth is uniform."""
        t = torch.sigmoid(torch.randn(n, generator=self.g, device=self.device))
        t = 4 * t / (1 + 3 * t)
        flat = torch.rand(n, generator=self.g, device=self.device)
        return torch.where(torch.arange(n, device=self.device) % 6 == 0, flat, t)

    def run(self) -> None:
        self.compile(self.model)
        total, done = self.args.minutes * 60, self.seconds
        started = last_save = time.monotonic()
        while (progress := self.seconds / total) < 1 and not self.stopped:
            stage = next(i for i, end in enumerate(self.ends) if progress < end or i == len(self.ends) - 1)
            if stage != self.stage:
                self.finish_stage()
                self.stage = stage
                if self.stages[stage].name == "guidance":  # the average weights teach, and the student starts from them
                    self.start_teacher(self.ema.state_dict())
                    self.model.load_state_dict(self.ema.state_dict())
            lr = self.args.lr * lr_share(progress, self.ends[1])
            loss = self.train_step(lr)
            if self.step % (2 if self.args.small else 20) == 0:  # one sync for many steps
                value = round(loss.item(), 5)
                self.seconds = done + time.monotonic() - started
                self.log.append({"step": self.step, "stage": self.stages[self.stage].name, "loss": value})
                self.log[-1] |= {"lr": round(lr, 7), "seconds": round(self.seconds, 1), "samples": self.samples}
                if self.step % 200 == 0:
                    print(self.log[-1], flush=True)
            if time.monotonic() - last_save > SAVE_SECONDS:
                self.save()
                last_save = time.monotonic()
        if not self.stopped:
            self.finish_stage()
        self.save()
        print(f"{'stopped' if self.stopped else 'finished'} at step {self.step}, {self.seconds:.0f} s", flush=True)

    def save(self) -> None:
        """A checkpoint, and what the average weights draw by now."""
        part = self.args.out / "checkpoint.part"
        torch.save(self.state(), part)
        part.replace(self.args.out / "checkpoint.pt")
        (self.args.out / "train_log.json").write_text(json.dumps({"seed": self.args.seed, "log": self.log}))
        self.export("latest")

    def finish_stage(self) -> None:
        """Sample sheets and the loss on held-out data, from the average weights."""
        name = self.stages[self.stage].name
        entry = {"stage_end": name, "step": self.step, "samples": self.samples, "seconds": round(self.seconds, 1)}
        if name != "guidance":
            entry["held_out_loss"] = self.held_out_loss()
        self.log.append(entry)
        print(entry, flush=True)
        self.export(name)

    @torch.no_grad()
    def held_out_loss(self) -> dict[str, float]:
        stage = self.stages[-1]
        g = torch.Generator(self.device).manual_seed(12345)
        captions = draw_captions(8, seed=999_999_999, objects=2)
        x = self.recipe.draw(captions, stage, g)
        noise = torch.randn(x.shape, generator=g, device=self.device)
        text = self.recipe.text(captions, self.vocabulary).to(self.device)
        one = torch.ones(8, device=self.device)
        losses = {}
        for t in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
            v = self.recipe.predict(self.ema, torch.lerp(x, noise, t), t * one, text, one)
            losses[str(t)] = round(F.mse_loss(v, noise - x).item(), 4)
        return losses

    def export(self, name: str) -> None:
        """Writes the pipeline of the average weights (fp16) to OUT/MODEL_name, and a sheet of its samples."""
        folder = self.args.out / f"{self.args.model}_{name}"
        transformer = type(self.ema).from_config(self.ema.config)
        transformer.load_state_dict(self.ema.state_dict())
        self.recipe.pipeline(transformer.half()).save_pretrained(folder)
        save_file(self.vocabulary, folder / "vocabulary.safetensors")
        for guidance in {1.0, self.args.guidance}:
            toy = self.adapter(folder, guidance)
            frames = [toy.decode(toy.generate(toy.prompt(seed), seed)) for seed in range(SAMPLES)]
            save(frames, self.args.out / f"samples_{name}_{guidance:g}.png")

    def adapter(self, folder: Path, guidance: float) -> Any:
        """The model as the harness reads it from `folder`."""
        config = Composer().compose([("model", self.args.model)]).config
        size = self.stages[-1].size
        config["model"] |= {"path": str(folder), "height": size, "width": size, "guidance": guidance}
        return build_model(config, self.args.device)


def is_hidden(name: str, parameter: Tensor) -> bool:
    """A matrix inside a block, but none that makes the modulation from the timestep."""
    return parameter.ndim == 2 and "blocks." in name and ".norm" not in name


def lr_share(progress: float, videos_end: float) -> float:
    """Warm-up, flat, a cosine down to 3 % at the end of the second stage; then a low, falling rate for the guidance."""
    if progress < videos_end:
        p = progress / videos_end
        return min(1.0, p / 0.02 + 0.01) * (1.0 if p < 0.45 else 0.515 + 0.485 * math.cos(math.pi * (p - 0.45) / 0.55))
    p = (progress - videos_end) / (1 - videos_end)
    return 0.25 * (1 - p) + 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15, help="of all runs together")
    parser.add_argument(
        "--batch", type=int, default=24, help="whole samples in a step; small ones come four times as many"
    )
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="two layers and half the size, to rehearse on a CPU")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.set_verbosity_error()  # "vae=None cannot be saved"
    # cuDNN's attention comes first on Hopper, and is the suspect for an illegal memory access in toy_flux's backward
    # pass (torch 2.11). Without it flash is taken, then efficient attention.
    torch.backends.cuda.enable_cudnn_sdp(False)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if (checkpoint := args.out / "checkpoint.pt").exists():
        trainer.restore(torch.load(checkpoint, map_location=args.device, weights_only=True))
        print(f"resumed at step {trainer.step}, {trainer.seconds:.0f} s", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stopped", True))
    trainer.run()


if __name__ == "__main__":
    main()
