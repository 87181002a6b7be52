"""The small language of the toy models: "a red checkered disc moves left and a blue plain ring circles over clouds".

An object is colour, texture, shape and motion; one or two objects stand over a background. The object named first is in
front. Every slot of that sentence is one text token: a fixed random word vector plus a fixed vector of its object.
"""

import random
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "orange", "white")
TEXTURES = ("plain", "striped", "checkered", "dotted")
SHAPES = ("disc", "square", "triangle", "cross", "ring")
MOTIONS = ("left", "right", "up", "down", "circles", "swings")
BACKGROUNDS = ("fog", "clouds", "waves", "bricks")
SLOTS = (COLOURS, TEXTURES, SHAPES, MOTIONS)
WORDS = tuple(word for slot in (*SLOTS, BACKGROUNDS) for word in slot)
FILLERS = {"a", "an", "the", "moves", "over"}
MAX_OBJECTS = 2
TEXT_TOKENS = MAX_OBJECTS * len(SLOTS) + 1
TEXT_DIM = 64


@dataclass(frozen=True)
class Caption:
    """One or two objects, each a (colour, texture, shape, motion), and a background."""

    objects: tuple[tuple[str, str, str, str], ...]
    background: str

    @classmethod
    def parse(cls, prompt: str) -> "Caption":
        """Reads a prompt; slots left out get a usual word (plain, left, fog). Raises ValueError for unknown words."""
        objects, background = [], "fog"
        for phrase in prompt.lower().replace(",", " ").split(" and "):
            found: dict[int, str] = {}
            for word in phrase.split():
                if word in BACKGROUNDS:
                    background = word
                elif word in WORDS:
                    found[next(i for i, slot in enumerate(SLOTS) if word in slot)] = word
                elif word not in FILLERS:
                    raise ValueError(_unknown_word(word))
            objects.append(tuple(found.get(i, default) for i, default in enumerate(("white", "plain", "disc", "left"))))
        if len(objects) > MAX_OBJECTS:
            raise ValueError(
                f"the toy prompt names {len(objects)} objects, at most {MAX_OBJECTS} are known: {prompt!r}."
            )
        return cls(tuple(objects), background)

    @classmethod
    def draw(cls, rng: random.Random, objects: int | None = None) -> "Caption":
        """A random caption with this many objects, one or two if None."""
        count = objects or rng.choice((1, 2, 2))
        objects = [tuple(rng.choice(slot) for slot in SLOTS) for _ in range(count)]
        return cls(tuple(objects), rng.choice(BACKGROUNDS))

    def __str__(self) -> str:
        def say(colour: str, texture: str, shape: str, motion: str) -> str:
            article = "an" if colour == "orange" else "a"
            verb = motion if motion in ("circles", "swings") else f"moves {motion}"
            return f"{article} {colour} {texture} {shape} {verb}"

        return " and ".join(say(*o) for o in self.objects) + f" over {self.background}"


def _unknown_word(word: str) -> str:
    near = get_close_matches(word, WORDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"the toy models do not know the word {word!r}.{hint} They know: {', '.join(WORDS)}."


def make_vocabulary(seed: int = 0) -> dict[str, Tensor]:
    """Fixed random vectors: one for each word `[V, 64]` and one for each object `[2, 64]`, fp32."""
    g = torch.Generator().manual_seed(seed)
    return {
        "words": torch.randn(len(WORDS), TEXT_DIM, generator=g),
        "objects": torch.randn(MAX_OBJECTS, TEXT_DIM, generator=g),
    }


def load_vocabulary(folder: Path) -> dict[str, Tensor]:
    """The vectors that a toy model was trained with."""
    from safetensors.torch import load_file

    return load_file(folder / "vocabulary.safetensors")


def embed(captions: list[Caption | None], vocabulary: dict[str, Tensor]) -> Tensor:
    """Text tokens `[B, 9, 64]`, one for each slot; None is the empty prompt (all zeros)."""
    return _slots(captions, vocabulary)[0]


def sentence(captions: list[Caption], vocabulary: dict[str, Tensor], length: int) -> tuple[Tensor, Tensor]:
    """The words alone, then zeros up to `length` (at least 9): tokens `[B, length, 64]` and their mask, int64."""
    tokens, known = _slots(captions, vocabulary)
    first = known.logical_not().long().argsort(dim=1, stable=True)  # [B, 9], words before gaps
    tokens = tokens.gather(1, first[..., None].expand_as(tokens))
    mask = known.gather(1, first).long()
    room = length - TEXT_TOKENS
    return pad(tokens, (0, 0, 0, room)), pad(mask, (0, room))


def pooled(tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean of the words, `[B, 64]`."""
    return tokens.sum(1) / mask.sum(1, keepdim=True)


def _slots(captions: list[Caption | None], vocabulary: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A token for each slot of the sentence `[B, 9, 64]`, zero where it is empty, and which have a word `[B, 9]`."""
    width = len(SLOTS)
    codes = torch.full((len(captions), TEXT_TOKENS), -1)
    for row, caption in enumerate(captions):
        if caption is not None:
            words = [word for words in caption.objects for word in words]
            codes[row, : len(words)] = torch.tensor([WORDS.index(word) for word in words])
            codes[row, -1] = WORDS.index(caption.background)
    tokens = vocabulary["words"][codes.clamp(min=0)]  # [B, 9, 64]
    tokens[:, : MAX_OBJECTS * width] += vocabulary["objects"].repeat_interleave(width, 0)
    return tokens * (codes >= 0)[..., None], codes >= 0
