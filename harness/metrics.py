"""How far a video moved from the dense one (PSNR, SSIM, LPIPS, flicker, by a named protocol) and how far a tensor did.

F frames, H height, W width, k window; videos are `[F, 3, H, W]`, floating point in [0, 1]. The same two videos differ
by dB between projects' formulas, so every result names its protocol; FORMULAS is the table of them.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from math import exp
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from harness import media

ALEXNET = Path(__file__).parent / "assets" / "lpips" / "alexnet_features.safetensors"
LPIPS_MIN_SIDE = 32  # pixels; AlexNet's pooling leaves nothing of less
CHUNK = 8  # frames at a time
WEB_QUALITY = 5  # of 10: the H.264 setting that diffusers and imageio write by default, hence what projects scored


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One video against the dense one. Fields are record columns; None = not measured, or infinite (identical)."""

    protocol: str
    psnr_db: float | None  # the protocol's own average; v1: mean over the frames that differ
    psnr_pooled_db: float | None  # from the mean squared error of the whole video
    psnr_min_db: float | None  # the worst frame
    psnr_frames: list[float | None]  # None = this frame is identical
    ssim: float | None
    lpips: float | None
    identical: bool
    flicker: float | None  # mean |frame - frame before|, in [0, 1]; None for a picture
    flicker_dense: float | None
    notes: str = ""  # why a value is missing, or what the number cannot show


@dataclass(frozen=True)
class Protocol:
    """Scores a video against the dense one by the formula named `protocol` (a key of FORMULAS)."""

    protocol: str = "v1"

    def __post_init__(self):
        if self.protocol not in FORMULAS:
            close = get_close_matches(str(self.protocol), FORMULAS, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"metrics.protocol must be one of {', '.join(FORMULAS)}, got '{self.protocol}'.{hint}")

    @property
    def formula(self) -> "Formula":
        return FORMULAS[self.protocol]

    def __call__(self, dense: Tensor, video: Tensor, *, decoded: tuple[bool, bool] = (False, False)) -> Quality:
        """dense, video: `[F, 3, H, W]`, floating point in [0, 1], clamped; equal shapes unless the formula fits them.

        decoded: which of the two come out of a video file, so that a formula that scores files must not encode again.
        Raises TypeError (integer frames), ValueError (shapes, range, NaN or infinity).
        """
        formula = self.formula
        dense, video = _checked(dense, "dense"), _checked(video, "scored").to(dense.device)
        if formula.files:
            dense, video = (x if done else _through_mp4(x) for x, done in zip((dense, video), decoded, strict=True))
        dense, video = formula.fit(dense, video)
        frames = _psnr(dense, video).double().clamp(max=formula.psnr_cap)  # [F]
        finite = frames[frames.isfinite()]
        pooled = -10 * (10 ** (-frames / 10)).mean().log10()
        notes = [formula.note] if formula.note else []
        ssim = lpips = None
        if (side := min(video.shape[2:])) < formula.ssim_min_side:
            notes += [f"SSIM needs sides of at least {formula.ssim_min_side} px, got {side}"]
        else:
            picked = formula.pick(len(video))
            ssim = _mean(_chunked(formula.ssim, dense[picked], video[picked]))
        if formula.alexnet and side < LPIPS_MIN_SIDE:
            notes += [f"LPIPS needs sides of at least {LPIPS_MIN_SIDE} px, got {side}"]
        elif formula.alexnet:
            lpips = _mean(lpips_alex(dense, video))
        return Quality(
            protocol=self.protocol,
            psnr_db=_number(pooled) if formula.pooled else _mean(finite),
            psnr_pooled_db=_number(pooled),
            psnr_min_db=_number(finite.min()) if len(finite) else None,
            psnr_frames=[_number(value) for value in frames],
            ssim=ssim,
            lpips=lpips,
            identical=torch.equal(dense, video),
            flicker=flicker(video),
            flicker_dense=flicker(dense),
            notes="; ".join(notes),
        )


def tensor_errors(out: Tensor, truth: Tensor) -> dict[str, float | None]:
    """rel_l1, rel_l2 and cosine of two tensors of any equal shape, in float64. None where the truth is all zeros.

    rel_lp = |out - truth|_p / |truth|_p over all elements. Raises ValueError (shapes, NaN or infinity).
    """
    if out.shape != truth.shape:
        raise ValueError(f"tensors must have equal shapes, got {list(out.shape)} and {list(truth.shape)}.")
    x, y = out.detach().flatten().double(), truth.detach().to(out.device).flatten().double()
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("a tensor holds NaN or infinity, so it has no error to report: look for its cause first.")
    l1, l2, norm = y.abs().sum(), y.norm(), x.norm()
    return {
        "rel_l1": float((x - y).abs().sum() / l1) if l1 else None,
        "rel_l2": float((x - y).norm() / l2) if l2 else None,
        "cosine": float(x / norm @ (y / l2)) if norm and l2 else None,
    }


def flicker(video: Tensor) -> float | None:
    """Mean absolute difference of successive frames `[F, 3, H, W]` (VBench temporal_flickering before its scaling)."""
    return _number((video[1:] - video[:-1]).abs().mean()) if len(video) > 1 else None


# ---- the parts of a formula: two [F, 3, H, W] in, one value per frame [F] out


def ssim_gaussian(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (Wang 2004) with the Gaussian window, 11 px, sigma 1.5, edges reflected, range 1: torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds to import

    return structural_similarity_index_measure(x, y, sigma=1.5, kernel_size=11, data_range=1.0, reduction="none")


def ssim_window(x: Tensor, y: Tensor, *, window: list[float], padding: int, unbiased: bool = False) -> Tensor:
    """SSIM with a separable window [k], summing to 1, and zero padding; unbiased: covariances by k * k - 1 samples."""
    w = x.new_tensor(window)
    kernel = torch.outer(w, w).expand(3, 1, -1, -1)  # [3, 1, k, k]
    mean = partial(conv2d, weight=kernel, padding=padding, groups=3)
    samples = len(window) ** 2
    correction = samples / (samples - 1) if unbiased else 1.0
    mx, my = mean(x), mean(y)
    vx, vy, cov = [
        correction * (mean(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
    ]
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean((1, 2, 3))


def lpips_alex(x: Tensor, y: Tensor) -> Tensor:
    """LPIPS v0.1 with AlexNet (arXiv 1801.03924) of frames in [0, 1], at least 32 px a side: `[F]`."""
    model = _alexnet(x.device, _precise(x[:0]).dtype)
    with torch.no_grad():
        return _chunked(lambda a, b: model(a * 2 - 1, b * 2 - 1).flatten(), x, y)


@cache
def _alexnet(device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """lpips' model on our packaged backbone. Never a download; torch's random state is left as it was."""
    import lpips  # seconds to import

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # lpips builds torchvision's AlexNet by an argument that is deprecated
        model = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    slice_of = {key.split(".")[1]: key.split(".")[0] for key in model.net.state_dict()}  # "3" -> "slice2"
    weights = {}
    for key, weight in load_file(ALEXNET).items():  # features.3.bias -> slice2.3.bias
        _, number, kind = key.split(".")
        weights[f"{slice_of[number]}.{number}.{kind}"] = weight
    model.net.load_state_dict(weights, strict=True)
    return model.requires_grad_(False).eval().to(device, dtype)


def _psnr(x: Tensor, y: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio  # seconds to import

    return _chunked(partial(peak_signal_noise_ratio, data_range=1.0, reduction="none", dim=(1, 2, 3)), x, y)


def _chunked(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    pairs = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    return torch.cat([function(_precise(a), _precise(b)) for a, b in pairs])


def _precise(x: Tensor) -> Tensor:
    return x.double() if x.is_cuda else x  # a GPU may round fp32 convolutions to TF32, too coarse for a variance


def _through_mp4(video: Tensor) -> Tensor:
    with TemporaryDirectory() as folder:
        path = media.write_mp4(video, Path(folder) / "video.mp4", quality=WEB_QUALITY)
        return media.read(path)[..., : video.shape[2], : video.shape[3]].to(video.device)  # without the padding


def _checked(video: Tensor, name: str) -> Tensor:
    if not video.is_floating_point():
        raise TypeError(
            f"the {name} frames must be floating point in [0, 1], got {video.dtype}: integer differences wrap around "
            "and read about 28 dB instead of 15. Convert to float and divide by 255 first."
        )
    if video.ndim != 4 or video.shape[1] != 3 or not video.numel():
        raise ValueError(f"the {name} frames must be [F, 3, H, W] with F, H, W >= 1, got {list(video.shape)}.")
    if not video.isfinite().all():
        raise ValueError(f"the {name} frames hold NaN or infinity, so they have no score: look for its cause first.")
    if (top := video.amax()) > 16:
        raise ValueError(f"the {name} frames must be in [0, 1], got values up to {top:.0f}: divide by 255 first.")
    return video.detach().float().clamp(0, 1)


def _number(x: Tensor) -> float | None:
    return float(x) if x.isfinite() else None


def _mean(x: Tensor) -> float | None:
    return float(x.double().mean()) if len(x) else None


# ---- the table


def _box(size: int) -> list[float]:
    return [1 / size] * size


def _gaussian(size: int, sigma: float) -> list[float]:
    weights = [exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return [w / sum(weights) for w in weights]


@dataclass(frozen=True, kw_only=True)
class Formula:
    """What one project computes. The defaults are our v1, which compares decoded frames before any video file."""

    files: bool = False  # scores MP4 files, not frames
    cuts: bool = False  # drops the longer video's last frames instead of refusing
    resizes: bool = False  # resizes the scored video to the dense one's size instead of refusing
    pooled: bool = False  # PSNR of the whole video's mean squared error, instead of the mean of the frames' PSNR
    psnr_cap: float = float("inf")  # dB
    ssim: Callable[[Tensor, Tensor], Tensor] = ssim_gaussian
    ssim_min_side: int = 6  # px
    ssim_samples: int | None = None  # frames; None = all
    alexnet: bool = True  # LPIPS on AlexNet
    note: str = ""

    def fit(self, dense: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Both videos in equal shapes, as the project makes them so, or ValueError."""
        if self.cuts:
            frames = min(len(dense), len(video))
            dense, video = dense[:frames], video[:frames]
        if self.resizes and dense.shape[2:] != video.shape[2:]:
            video = interpolate(video, dense.shape[2:], mode="bilinear", align_corners=False)
        if dense.shape != video.shape:
            raise ValueError(
                f"the videos must have equal shapes [F, 3, H, W], got {list(dense.shape)} (dense) and "
                f"{list(video.shape)}: nothing is resized or cut. Generate both with the same frames, height and width."
            )
        return dense, video

    def pick(self, frames: int) -> list[int]:
        """The frames that SSIM looks at."""
        if self.ssim_samples is None:
            return list(range(frames))
        step = (frames - 1) / (self.ssim_samples - 1)
        return sorted({round(i * step) for i in range(min(self.ssim_samples, frames))})


VGG_NOTE = "LPIPS of this protocol uses VGG, whose weights are not packaged"
FORMULAS = {
    "v1": Formula(),
    # Sparse-VideoGen: an 11 px box window; its own MP4 export truncates to bytes, ours rounds. An identical frame is
    # infinite there and left out here.
    "svg": Formula(
        files=True, ssim=partial(ssim_window, window=_box(11), padding=5), ssim_min_side=1, alexnet=False, note=VGG_NOTE
    ),
    # FastVideo's evaluation: squared errors floored at 1e-10, so an identical frame counts as 100 dB.
    "fastvideo": Formula(
        cuts=True, psnr_cap=100.0, ssim=partial(ssim_window, window=_gaussian(11, 1.5), padding=5), ssim_min_side=1
    ),
    # SparseVideo's scripts: scikit-image's SSIM (7 px box inside the frame, unbiased) on 16 frames; below 16 frames its
    # sampling takes only the first ones, as here. Resizing is bilinear, on floats here and on bytes there for SSIM.
    "sparsevideo": Formula(
        files=True,
        cuts=True,
        resizes=True,
        pooled=True,
        ssim=partial(ssim_window, window=_box(7), padding=0, unbiased=True),
        ssim_min_side=7,
        ssim_samples=16,
        alexnet=False,
        note="this protocol has no LPIPS",
    ),
}
