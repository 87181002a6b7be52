"""Trains toy_wan, the small Wan video model that ships with the project, from videos it draws itself.

    python scripts/train_toy.py --out runs/toy_wan --minutes 15          # one GPU; run it again to resume
    python scripts/train_toy.py --out /tmp/try --minutes 0.5 --small     # a CPU rehearsal of every step

Three stages share the time: short clips (4 frames: shapes, textures, words), whole videos (16 frames: paths,
occlusion), then guidance distillation: the model learns to predict in one pass what classifier-free guidance would give
in two, as FLUX.1-dev and HunyuanVideo do, so that a sample needs no second branch. Rectified flow:
x_t = (1 - t) x + t noise, the model predicts noise - x. Hidden matrices learn with Muon, the rest with AdamW. Writes a
folder that WanPipeline.from_pretrained loads, a log (train_log.json) and sample strips; a checkpoint every minute.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from torchvision.utils import save_image
from toy_videos import draw_captions, render, strip

from harness.models.captions import embed, make_vocabulary

FRAMES, SIZE, NULL_SHARE, EMA, SHIFT = 16, 64, 0.1, 0.9985, 3.0
STAGES = (("clips", 0.26), ("videos", 0.56), ("guidance", 0.18))  # name, share of the time


def build(small: bool) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        text_dim=64,
        freq_dim=256,
        ffn_dim=768,
        num_layers=2 if small else 8,
    )
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


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

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        torch.manual_seed(args.seed)
        self.model = build(args.small).to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.teacher: WanTransformer3DModel | None = None
        self.vocabulary = make_vocabulary()
        hidden = [p for n, p in self.model.named_parameters() if p.ndim == 2 and n.startswith("blocks.")]
        held = {id(p) for p in hidden}
        rest = [p for p in self.model.parameters() if id(p) not in held]
        adam = torch.optim.AdamW(
            rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=self.device.type == "cuda"
        )
        self.optimizers = [Muon(hidden, lr=args.lr), adam]
        self.g = torch.Generator(self.device).manual_seed(args.seed)
        self.step, self.seconds, self.videos, self.stage, self.log = 0, 0.0, 0, 0, []

    def state(self) -> dict:
        keep = {k: getattr(self, k) for k in ("step", "seconds", "videos", "stage", "log")}
        models = {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        if self.teacher is not None:
            models["teacher"] = self.teacher.state_dict()
        return {**keep, **models, "optimizers": [o.state_dict() for o in self.optimizers], "g": self.g.get_state()}

    def restore(self, saved: dict) -> None:
        for k in ("step", "seconds", "videos", "stage", "log"):
            setattr(self, k, saved[k])
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        if "teacher" in saved:
            self.teacher = copy.deepcopy(self.ema)
            self.teacher.load_state_dict(saved["teacher"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.g.set_state(saved["g"].cpu())

    def start_guidance(self) -> None:
        """The average weights become the teacher, and the student goes on from them."""
        self.teacher = copy.deepcopy(self.ema)
        self.model.load_state_dict(self.ema.state_dict())
        for block in self.teacher.blocks if self.device.type == "cuda" else ():
            block.compile(dynamic=False)

    def batch(self, n: int, frames: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        captions = draw_captions(n, seed=self.args.seed * 10**7 + self.step + 1)
        first = torch.randint(0, 17 - frames, (n,), generator=self.g, device=self.device)
        x = render(captions, frames, 32 if self.args.small else SIZE, self.g, first)
        text = embed(captions, self.vocabulary).to(self.device)
        noise = torch.randn(x.shape, generator=self.g, device=self.device)
        t = torch.sigmoid(torch.randn(n, generator=self.g, device=self.device))
        t = 4 * t / (1 + 3 * t)  # shape and path are decided at high noise
        flat = torch.rand(n, generator=self.g, device=self.device)
        t = torch.where(torch.arange(n, device=self.device) % 6 == 0, flat, t)
        return x, noise, t, text

    def train_step(self, lr: float) -> Tensor:
        name = STAGES[self.stage][0]
        n, frames = (self.args.batch * 4, 4) if name == "clips" else (self.args.batch, FRAMES)
        x, noise, t, text = self.batch(n, frames)
        x_t = torch.lerp(x, noise, t.view(-1, 1, 1, 1, 1))
        null = torch.rand(n, 1, 1, generator=self.g, device=self.device) < NULL_SHARE
        text = text.masked_fill(null, 0)
        with torch.autocast(self.device.type, torch.bfloat16):
            target = noise - x
            if self.teacher is not None:
                with torch.no_grad():
                    conditional = self.teacher(x_t, t * 1000, text, return_dict=False)[0]
                    unconditional = self.teacher(x_t, t * 1000, torch.zeros_like(text), return_dict=False)[0]
                target = (unconditional + self.args.guidance * (conditional - unconditional)).float()
            v = self.model(x_t, t * 1000, text, return_dict=False)[0]
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
        self.step, self.videos = self.step + 1, self.videos + n
        return loss.detach()

    def run(self) -> None:
        if self.device.type == "cuda":
            for block in self.model.blocks:
                block.compile(dynamic=False)
        total, done, last_save = self.args.minutes * 60, self.seconds, time.monotonic()
        ends = [sum(share for _, share in STAGES[: i + 1]) for i in range(len(STAGES))]
        started = time.monotonic()
        while (progress := self.seconds / total) < 1:
            stage = next(i for i, end in enumerate(ends) if progress < end or i == len(ends) - 1)
            if stage != self.stage:
                self.finish_stage()
                self.stage = stage
                if STAGES[stage][0] == "guidance":
                    self.start_guidance()
            lr = self.args.lr * self.lr_share(progress, ends)
            loss = self.train_step(lr)
            if self.step % (20 if not self.args.small else 2) == 0:  # one sync for many steps
                value = round(loss.item(), 5)
                self.seconds = done + time.monotonic() - started
                self.log.append({"step": self.step, "stage": STAGES[self.stage][0], "loss": value, "lr": round(lr, 7)})
                self.log[-1] |= {"seconds": round(self.seconds, 1), "videos": self.videos}
                if self.step % 200 == 0:
                    print(self.log[-1], flush=True)
            if time.monotonic() - last_save > 60:
                self.save()
                last_save = time.monotonic()
        self.finish_stage()
        self.save()

    @staticmethod
    def lr_share(progress: float, ends: list[float]) -> float:
        """Warm-up, flat, a cosine down to 3 % at the end of the videos; then a low, falling rate for the guidance."""
        if progress < ends[1]:
            p = progress / ends[1]
            return min(1.0, p / 0.02 + 0.01) * (
                1.0 if p < 0.45 else 0.515 + 0.485 * math.cos(math.pi * (p - 0.45) / 0.55)
            )
        p = (progress - ends[1]) / (1 - ends[1])
        return 0.25 * (1 - p) + 0.005

    def save(self) -> None:
        part = self.args.out / "checkpoint.part"
        torch.save(self.state(), part)
        part.replace(self.args.out / "checkpoint.pt")
        (self.args.out / "train_log.json").write_text(json.dumps({"seed": self.args.seed, "log": self.log}))

    def finish_stage(self) -> None:
        """Sample strips and the loss on held-out videos, from the average weights."""
        name = STAGES[self.stage][0]
        entry = {"stage_end": name, "step": self.step, "videos": self.videos, "seconds": round(self.seconds, 1)}
        if name != "guidance":
            entry["held_out_loss"] = self.held_out_loss()
        self.log.append(entry)
        print(entry, flush=True)
        pipe = export(self.ema, self.vocabulary, self.args.out / f"toy_wan_{name}")
        for guidance in (1.0,) if name != "videos" else (1.0, 3.0):
            videos = self.sample(pipe, guidance)
            save_image(strip(videos), self.args.out / f"samples_{name}_cfg{guidance:g}.png")

    @torch.no_grad()
    def held_out_loss(self) -> dict[str, float]:
        g = torch.Generator(self.device).manual_seed(12345)
        captions = draw_captions(8, seed=999_999_999)
        x = render(captions, FRAMES, 32 if self.args.small else SIZE, g)
        noise = torch.randn(x.shape, generator=g, device=self.device)
        text = embed(captions, self.vocabulary).to(self.device)
        losses = {}
        for t in (0.1, 0.3, 0.5, 0.7, 0.9, 0.97):
            v = self.ema(
                torch.lerp(x, noise, t), torch.full((8,), t * 1000.0, device=self.device), text, return_dict=False
            )
            losses[str(t)] = round(F.mse_loss(v[0], noise - x).item(), 4)
        return losses

    def sample(self, pipe: WanPipeline, guidance: float) -> Tensor:
        captions = draw_captions(10, seed=4242)
        size = 32 if self.args.small else SIZE
        pipe.transformer.to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return (
            pipe(
                prompt_embeds=embed(captions, self.vocabulary).to(self.device),
                negative_prompt_embeds=embed([None] * 10, self.vocabulary).to(self.device),
                num_frames=FRAMES * 4 - 3,  # the pipeline believes in a VAE that shrinks time by 4 and space by 8
                height=size * 8,
                width=size * 8,
                num_inference_steps=8,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(7),
                output_type="latent",
            )
            .frames.float()
            .cpu()
        )


def export(ema: WanTransformer3DModel, vocabulary: dict[str, Tensor], folder: Path) -> WanPipeline:
    """Writes the pipeline (fp16) and returns it in fp32."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
    )
    model = WanTransformer3DModel.from_config(ema.config)
    model.load_state_dict(ema.state_dict())
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=model.half(), scheduler=scheduler)
    pipe.save_pretrained(folder)
    save_file(vocabulary, folder / "vocabulary.safetensors")
    model.float()
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument(
        "--batch", type=int, default=24, help="whole videos in a step; short clips come four times as many"
    )
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="two layers and 32 x 32 pixels, to rehearse on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if (checkpoint := args.out / "checkpoint.pt").exists():
        trainer.restore(torch.load(checkpoint, map_location=args.device, weights_only=True))
        print(f"resumed at step {trainer.step}, {trainer.seconds:.0f} s", flush=True)
    trainer.run()


if __name__ == "__main__":
    main()
