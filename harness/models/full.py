"""What the full-size models share: settings and their checks, weights read or drawn, prompts, and the memory they need.

`weights=pretrained` reads a checkpoint from the local cache or a folder, and never downloads. `weights=random` builds
the transformer alone at full size, where it will run, in seconds: no VAE, no text encoders, text embeddings of the true
shape. Its latencies are those of the real model; its pictures mean nothing, so no quality is ever recorded.
"""

import functools
import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.errors import InputError
from harness.models import checkpoint
from harness.models.settings import check_steps

GIB = 2**30
DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = (None, "model", "fp8")
PIXELS = 16  # 8 pixels for a latent, 2 x 2 latents for a token
COMPILER = "inductor"
FRAMES = 4  # frames for a latent one, the first of which stands alone
PROMPTS = (
    "a red fox trots through deep snow between birch trees, low winter sun",
    "an old lighthouse on a cliff in a storm, waves break against the rocks, spray in the air",
    "a potter's hands shape a tall clay vase on a turning wheel, close-up, warm workshop light",
    "a night market street in the rain, neon signs mirrored in puddles, people with umbrellas walk past",
    "a hot-air balloon with blue and yellow stripes drifts over a valley of vineyards at dawn",
    "a robot with a dented brass head waters tomato plants on a rooftop, city skyline behind",
    "macro shot of a bee landing on a lavender blossom, pollen dust, shallow depth of field",
    "a chess game in a park, an elderly woman moves her queen and smiles, autumn leaves fall",
)


@dataclass(kw_only=True)
class FullModel:
    """The settings of conf/model/*.yaml; `pipe` loads or builds the pipeline when first asked for.

    weights: "pretrained" or "random". path: a hub id or a checkpoint's folder. architecture: the arguments of the
    transformer's class that random weights are drawn for; a checkpoint has its own. text_tokens: text tokens that the
    transformer is given, at most for pretrained weights, exactly for random ones. offload: None, "model" (parts wait in
    main memory until they are needed) or "fp8" (the transformer's weights are stored in 8 bits, computed in `dtype`).
    compile: every block by torch.compile, at the price of a slow first forward.
    """

    weights: str
    path: str
    architecture: dict[str, Any]
    height: int
    width: int
    frames: int = 1
    text_tokens: int
    steps: int
    guidance: float
    dense_steps: int
    dense_layers: int
    order: str
    dtype: str
    offload: str | None
    compile: bool
    device: str = "cpu"
    _encoded: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    # What a family says of itself.
    title: ClassVar[str]
    text_parts: ClassVar[tuple[str, ...]]  # tokenizers and text encoders of the pipeline
    gated: ClassVar[bool] = False
    video: ClassVar[bool] = False
    longest: ClassVar[int] = 16384  # pixels along an edge that the positions reach
    activations: ClassVar[float]  # tensors [rows, tokens, width] alive at once, counted with fused attention
    vae_dtype: ClassVar[str | None] = None  # None: the model's

    # ------------------------------------------------------------------------------------------- what families answer
    @staticmethod
    def pipeline_class() -> type:
        """diffusers' own; importing it needs the package transformers, which random weights can do without."""
        raise NotImplementedError

    @staticmethod
    def classes() -> tuple[type, type]:
        """diffusers' transformer and scheduler class."""
        raise NotImplementedError

    def scheduler_settings(self) -> dict[str, Any]:
        """Arguments of the scheduler's class; those that a checkpoint's own settings are replaced by, too."""
        raise NotImplementedError

    def random_embeddings(self, draw: Any) -> dict[str, Tensor]:
        """Prompt embeddings as the pipeline takes them, each made by `draw(*shape)`."""
        raise NotImplementedError

    def text_embeddings(self, prompt: str) -> dict[str, Tensor]:
        """Prompt embeddings as the pipeline takes them, by the pipeline's own encoders."""
        raise NotImplementedError

    def forward(self, latents: Tensor, timestep: float, prompt: str) -> Tensor:
        """The transformer's prediction for latents as it is given them, in one forward of a denoising step."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Frames `[F, 3, H, W]` fp32 in [0, 1] from the latents of `generate`."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------------- sizes
    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens."""
        return (self.frames - 1) // FRAMES + 1, self.height // PIXELS, self.width // PIXELS

    @property
    def tokens(self) -> int:
        """Tokens of one self-attention."""
        return math.prod(self.latent_size) + self.joint_text

    @property
    def joint_text(self) -> int:
        """Text tokens that take part in self-attention."""
        return self.text_tokens

    @property
    def branches(self) -> int:
        """Forwards of the transformer in a denoising step."""
        return 1

    @property
    def rows(self) -> int:
        """Samples in the batch of one forward."""
        return 1

    @property
    def head_dim(self) -> int:
        return self.outline.config.attention_head_dim

    @property
    def outline(self) -> nn.Module:
        """The transformer without numbers, on the meta device. Raises InputError for unknown arguments."""
        return outline(self.classes()[0], json.dumps(self._arguments(), sort_keys=True))

    def _arguments(self) -> dict[str, Any]:
        """Of the transformer's class: the checkpoint's own, or those of `architecture`."""
        if self.weights == "pretrained":
            saved = json.loads((self.folder / "transformer" / "config.json").read_text())
            return {name: value for name, value in saved.items() if not name.startswith("_")}
        return {k: v if isinstance(v, (int, float, str)) else list(v) for k, v in self.architecture.items()}

    # ------------------------------------------------------------------------------------------------------- checks
    def check(self) -> None:
        """Everything that can be wrong before work starts. Raises InputError in one sentence."""
        for name, value, allowed in (
            ("weights", self.weights, ("pretrained", "random")),
            ("dtype", self.dtype, DTYPES),
            ("offload", self.offload, OFFLOADS),
            ("compile", self.compile, (False, True)),
        ):
            if value not in allowed:
                words = ", ".join("null" if word is None else str(word).lower() for word in allowed)
                raise InputError(f"model.{name} must be one of {words}, got {value!r}.")
        check_steps(self.steps, self.dense_steps, self.dense_layers)
        if self.weights == "pretrained":
            self.folder  # noqa: B018  finding it is the check
        self._check_size()
        if self.offload == "model" and (self.device == "cpu" or self.weights == "random"):
            raise InputError(
                "model.offload=model keeps parts of a pretrained pipeline off the GPU until they are needed: it wants "
                "model.weights=pretrained and a GPU, so set model.offload=null or fp8."
            )
        if self.offload and self.compile:
            raise InputError(
                "model.compile=true and model.offload do not go together here: set one of them to its default."
            )
        self._check_memory()

    def _check_size(self) -> None:
        height, width = (min(max(round(x / PIXELS), 1) * PIXELS, self.longest) for x in (self.height, self.width))
        frames = max(round((self.frames - 1) / FRAMES), 0) * FRAMES + 1 if self.video else 1
        if (self.height, self.width, self.frames) != (height, width, frames):
            rule = f", frames {FRAMES}n + 1" if self.video else ""
            asked, nearest = (
                f"{f} frames of {h} x {w}" if self.video else f"a picture of {h} x {w}"
                for f, h, w in ((self.frames, self.height, self.width), (frames, height, width))
            )
            raise InputError(
                f"{self.title} cannot make {asked} pixels (height x width): both must be multiples of {PIXELS} up to "
                f"{self.longest}{rule}; the nearest that works is {nearest}."
            )
        if self.text_tokens < 1:
            raise InputError(f"model.text_tokens must be at least 1, got {self.text_tokens}.")

    def _check_memory(self) -> None:
        needed, there = self.memory(), memory_there(self.device)
        total = sum(needed.values())
        if total > there:
            parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.items())
            where = "GPU" if self.device == "cuda" else "machine's main memory"
            raise InputError(
                f"{self.title} at this size needs about {total / GIB:.1f} GiB ({parts}) and this {where} has "
                f"{there / GIB:.1f}: {self._less_memory()}."
            )

    def _less_memory(self) -> str:
        if self.device == "cpu":
            return "use a GPU, or a smaller model.height, model.width, model.frames or model.architecture"
        offload = "" if self.offload else "model.offload=fp8, " + "model.offload=model, " * (self.weights != "random")
        return f"try {offload}a smaller model.height, model.width or model.frames, or a larger GPU"

    def memory(self) -> dict[str, float]:
        """Estimated bytes in use at once, by what they are for."""
        size = getattr(torch, self.dtype).itemsize
        config = self.outline.config
        width = config.num_attention_heads * config.attention_head_dim
        needed = {"transformer": parameter_count(self.outline) * (1 if self.offload == "fp8" else size)}
        if self.weights == "pretrained":
            found = checkpoint.parameters(self.folder, self.parts)
            needed["transformer"] = found.pop("transformer") * (1 if self.offload == "fp8" else size)
            others = {name: count * size for name, count in found.items()}
            if self.offload == "model":  # one part at a time
                needed = {"largest part": max(needed["transformer"], *others.values(), 0)}
            elif others:
                needed["text encoders and VAE"] = sum(others.values())
        return needed | {"activations": self.activations * self.rows * self.tokens * width * size}

    # ------------------------------------------------------------------------------------------------------ weights
    @property
    def parts(self) -> tuple[str, ...]:
        return ("scheduler", "transformer", "vae", *self.text_parts)

    @cached_property
    def folder(self) -> Path:
        """Of the pretrained checkpoint. Raises InputError when it is not here, whole and undamaged."""
        return checkpoint.find(self.path, self.parts, self.gated)

    @property
    def download(self) -> str:
        """The command that fetches the weights."""
        return checkpoint.download_command(self.path, self.parts, self.gated)

    @property
    def weights_file(self) -> Path | None:
        """What stands for the weights in a cell's identity: the file, or of several the list of them."""
        if self.weights == "random":
            return None
        lists = sorted((self.folder / "transformer").glob("*.safetensors.index.json"))
        return lists[0] if lists else checkpoint.weight_files(self.folder, "transformer")[0]

    @cached_property
    def pipe(self) -> Any:
        """diffusers' pipeline: the checkpoint's, or one of random weights, without VAE and text encoders."""
        from diffusers.utils import logging

        logging.disable_progress_bar()
        if self.weights == "random":
            absent = dict.fromkeys(("vae", *self.text_parts))
            pipe = self.pipeline_class()(transformer=self._drawn, scheduler=self._schedule, **absent)
        else:
            pipe = self._pretrained()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _pretrained(self) -> Any:
        from transformers.utils import logging

        logging.disable_progress_bar()
        dtype = getattr(torch, self.dtype)
        vae = dtype if self.vae_dtype is None else getattr(torch, self.vae_dtype)
        pipe = self.pipeline_class().from_pretrained(
            self.folder, dtype={"default": dtype, "vae": vae}, local_files_only=True
        )
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **self.scheduler_settings())
        self._prepare(pipe.transformer)
        if self.offload != "model":
            return pipe.to(self.device)
        pipe.enable_model_cpu_offload()
        return pipe

    def _prepare(self, transformer: nn.Module) -> None:
        if self.compile:
            for block in blocks(transformer):
                block.compile(fullgraph=True, backend=COMPILER)
        if self.offload == "fp8":
            computed = getattr(torch, self.dtype)
            transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=computed)

    @cached_property
    def _drawn(self) -> nn.Module:
        """The transformer with random weights, made where it will run."""
        torch.manual_seed(0)
        with torch.device(self.device), default_dtype(getattr(torch, self.dtype)):
            transformer = self.classes()[0](**self._arguments()).eval().requires_grad_(False)
        keep_in_fp32(transformer)
        self._prepare(transformer)
        return transformer

    @cached_property
    def _schedule(self) -> Any:
        return self.classes()[1](**self.scheduler_settings())

    @property
    def transformer(self) -> Any:
        return self._drawn if self.weights == "random" else self.pipe.transformer

    @property
    def scheduler(self) -> Any:
        return self._schedule if self.weights == "random" else self.pipe.scheduler

    # -------------------------------------------------------------------------------------------------------- samples
    def prompt(self, seed: int) -> str:
        """Prompt number `seed` of the model's list, which begins again at its end."""
        return PROMPTS[seed % len(PROMPTS)]

    def check_prompt(self, prompt: str) -> None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"prompt must be a sentence, got {prompt!r}: leave it out for the model's own list.")

    def noise(self, seed: int) -> Tensor:
        """Initial latents `[1, C, (F,) H/8, W/8]`, fp32, the same on every device."""
        frames, height, width = self.latent_size
        size = (frames, 2 * height, 2 * width)[0 if self.video else 1 :]
        channels = self.outline.config.in_channels
        return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def encode(self, prompt: str) -> dict[str, Tensor]:
        """Embeddings of a prompt by the pipeline's keyword arguments, on the model's device; computed once."""
        if prompt not in self._encoded:
            if self.weights == "random":
                made = self.random_embeddings(self._drawer(prompt))
            else:
                made = self.text_embeddings(prompt)
            self._encoded[prompt] = {name: x.to(self.device) for name, x in made.items() if x is not None}
        return self._encoded[prompt]

    def _drawer(self, prompt: str) -> Any:
        g, dtype = torch.Generator().manual_seed(zlib.crc32(prompt.encode())), getattr(torch, self.dtype)
        return lambda *shape: torch.randn(*shape, generator=g).to(dtype)

    @torch.no_grad()
    def generate(self, prompt: str, seed: int) -> Tensor:
        """Latents of one sample, fp32, as the pipeline returns them."""
        frames = {"num_frames": self.frames} if self.video else {}
        return self.pipe(
            **self.encode(prompt),
            **frames,
            height=self.height,
            width=self.width,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            latents=self.noise(seed).to(self.device),
            output_type="latent",
        )[0].float()


def blocks(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks of every kind."""
    kinds = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [block for kind in kinds for block in getattr(transformer, kind, ())]


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@functools.cache
def outline(kind: type, arguments: str) -> nn.Module:
    """A transformer of class `kind` on the meta device; arguments as JSON. Raises InputError for unknown ones."""
    from inspect import signature

    given = json.loads(arguments)
    unknown = sorted(set(given) - set(signature(kind.__init__).parameters))
    if unknown:
        raise InputError(f"{kind.__name__} has no argument {', '.join(unknown)}: mend model.architecture.")
    with torch.device("meta"):
        return kind(**given)


def keep_in_fp32(transformer: nn.Module) -> None:
    """What reading a checkpoint leaves in fp32 whatever the dtype is (norms, time embedding)."""
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, parameter in transformer.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Fresh parameters are made in `dtype` inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def memory_there(device: str) -> float:
    """Bytes of memory: the GPU's own, or what the system can still give."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):  # not Linux
        return math.inf
