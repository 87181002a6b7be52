"""Dense attention by named kernels: what every speed-up is divided by. A row of results names the kernel that ran.

Swapping only the dense kernel moves a generated video by 27 to 34 dB PSNR, so reference and warm-up must use one.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pisa import Grid

SDPA = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "cpu_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
FASTEST_FIRST = ("flash_attn_4", *SDPA)  # as measured on Hopper, D = 128, bf16


@dataclass(frozen=True)
class Dense:
    """Dense softmax attention, never with a mask.

    kernel: one of `FASTEST_FIRST`; "auto" for the first of them that runs here; "sdpa" for torch's own choice.
    "cpu_flash" is torch's fused CPU kernel, "sdpa_flash" is FlashAttention-2.
    """

    kernel: str = "auto"

    def __post_init__(self) -> None:
        names = ("auto", "sdpa", *FASTEST_FIRST)
        if self.kernel not in names:
            near = get_close_matches(self.kernel, names, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"No dense kernel '{self.kernel}'.{hint} Allowed: {', '.join(names)}.")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None = None, scale: float | None = None) -> Tensor:
        """`[B, H, L, D]` in and out; the grid is ignored. Raises ValueError when the kernel cannot run here."""
        name = self.resolve(q)
        if name == "flash_attn_4":
            return flash_attn_4(q, k, v, scale)
        with sdpa_kernel(SDPA[name]):
            return scaled_dot_product_attention(q, k, v, scale=scale)

    def resolve(self, q: Tensor) -> str:
        """The name of the kernel that runs on tensors like `q`: what a record keeps as dense_kernel."""
        if self.kernel == "auto":
            return available(q)[0]
        if self.kernel == "sdpa":
            choice = SDPBackend(torch._fused_sdp_choice(q, q, q))
            return next((name for name in available(q) if SDPA.get(name) == choice), "sdpa_math")
        if reason := refuses(self.kernel, q):
            raise ValueError(f"dense kernel {self.kernel} cannot run this: {reason}. Here: {', '.join(available(q))}.")
        return self.kernel


def available(q: Tensor) -> list[str]:
    """The kernels that can run on tensors like `q` here, fastest first; sdpa_math always can."""
    return [name for name in FASTEST_FIRST if refuses(name, q) is None]


def refuses(name: str, q: Tensor) -> str | None:
    """Why the kernel `name` cannot run on tensors like `q`, or None."""
    if name == "sdpa_math":
        return None
    if name == "cpu_flash":
        return None if q.device.type == "cpu" else f"it needs tensors on the CPU, these are on {q.device}"
    if q.device.type != "cuda":
        return f"it needs a CUDA GPU, the tensors are on {q.device}"
    if name == "flash_attn_4":
        return refuses_flash_attn_4(q)
    can_use = {
        "sdpa_cudnn": cuda.can_use_cudnn_attention,
        "sdpa_flash": cuda.can_use_flash_attention,
        "sdpa_efficient": cuda.can_use_efficient_attention,
    }[name]
    if not can_use(cuda.SDPAParams(q, q, q, None, 0.0, False, False)):
        return f"torch {torch.__version__} does not offer it for {q.dtype}, head_dim {q.shape[-1]} on this GPU"
    return None


def refuses_flash_attn_4(q: Tensor) -> str | None:
    major, minor = torch.cuda.get_device_capability(q.device)
    if major < 9:
        return f"it needs compute capability 9.0 or higher, this GPU has {major}.{minor}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, got {q.dtype}"
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return "the package flash-attn-4 is not installed (pip install flash-attn-4)"
    return None


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    from flash_attn.cute import flash_attn_func  # an optional extra

    result = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale)  # wants [B, L, H, D]
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)  # some versions add the log-sum-exp
