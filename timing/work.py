"""The words of the timing model: the work of a task, what it takes, and how far it is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import log
from typing import NamedTuple

from timing.speeds import Product

REFERENCE_TOKENS = 4096
TEXT_TOKENS = 512


class Prior(NamedTuple):
    """What the law of a key is made of before anything was measured."""

    parameters_b: float
    """Billions of parameters that each token goes through in a step."""
    product: Product = Product.BF16
    """What most of their operations are."""
    text_b: float | None = None
    """Billions of parameters of the text encoder that each token goes through; None: a quarter of
    parameters_b."""
    text_product: Product | None = None
    """What most of their operations are; None: the same as in a step."""
    fixed_text_tokens: int = 100
    """Tokens that are encoded beside those of the prompt: templates, negative prompts."""
    step_text_tokens: int = 128
    """Tokens of the text in a step, beside those of the picture."""


class Place(NamedTuple):
    """What the seconds of a picture depend on, in the law of one key."""

    x: float
    """Latent tokens / REFERENCE_TOKENS."""
    steps: int
    text: float
    """Tokens that depend on the prompt / TEXT_TOKENS."""
    input_x: float = 0.0
    """x of the pictures that are encoded with the prompt; 0: none."""
    width: float = 0.0
    """In 1024 pixels; 0: unknown, as if it were square."""

    @property
    def sides(self) -> tuple[float, float]:
        """Width and height in 1024 pixels; x is their product."""
        width = self.width or self.x**0.5
        return width, self.x / width

    @property
    def aspect(self) -> float:
        """|log(width / height)|."""
        return abs(log(self.width**2 / self.x)) if self.width else 0.0


class Phases(NamedTuple):
    """Seconds of the phases of one picture."""

    text: float
    first: float
    """First step."""
    step: float
    """Each later step."""
    decoding: float


class Confidence(StrEnum):
    NONE = "none"  # nothing measured for this model: only the prior is used
    LOW = "low"  # fewer than SAMPLES_TO_TRUST tasks, or far from the sizes seen
    HIGH = "high"


@dataclass(frozen=True)
class Work:
    """The work of a task: all that its duration depends on."""

    model: str
    """Key of the timing law: model, quantization and what else changes the work of a step."""
    parameters_b: float
    """This and the other fields of Prior are for the prior."""
    tokens: int
    steps: int
    """Steps of each image."""
    format: str
    images: int = 1
    text_each: bool = False
    """Whether text encoding runs for each image, because it also encodes input images."""
    prompt_each: bool = False
    """Whether text encoding runs for each image, because each has its own prompt."""
    prompt_tokens: int = TEXT_TOKENS
    prompt_cached: bool = False
    """Whether the embeddings of its prompt are in memory when it starts."""
    width: int = 0
    """Pixels; 0: unknown, as if it were square."""
    product: Product = Product.BF16
    text_b: float | None = None
    text_product: Product | None = None
    fixed_text_tokens: int = 100
    step_text_tokens: int = 128
    text_with_picture: bool = False
    """Whether the text encoder also computes a token for each one of the picture."""

    @property
    def prior(self) -> Prior:
        return Prior(
            self.parameters_b,
            self.product,
            self.text_b,
            self.text_product,
            self.fixed_text_tokens,
            self.step_text_tokens,
        )

    @property
    def x(self) -> float:
        return self.tokens / REFERENCE_TOKENS

    @property
    def place(self) -> Place:
        input_x = self.x if self.text_each else 0.0
        encoded = self.prompt_tokens + (self.tokens if self.text_with_picture else 0)
        return Place(self.x, self.steps, encoded / TEXT_TOKENS, input_x, self.width / 1024)

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @staticmethod
    def from_json(text: str) -> "Work":
        return Work(**json.loads(text))


@dataclass(frozen=True)
class Durations:
    """Predicted seconds of one task's own work, all >= 0."""

    text_encoding_s: float
    """Seconds of text encoding: per task, or with text_each per image."""
    first_step_extra_s: float
    step_s: float
    """Seconds of one step, in the mean; an image has `steps` of them."""
    steps: int
    decoding_s: float
    image_encoding_s: float
    sigma: float
    """Spread of log(truth / forecast) of the whole task."""
    confidence: Confidence
    images: int = 1
    text_each: bool = False
    before_s: float = 0.0
    """Seconds of the stages before this one."""
    course: tuple[float, ...] = ()
    """Of each step after the first one, seconds / step_s; empty: all are 1."""

    def steps_s(self, first: int, end: int) -> float:
        """Seconds of the steps from `first` (1 at least) to the one before `end`."""
        known = self.course[first - 1 : max(end - 1, 0)]
        return self.step_s * (sum(known) + max(end - first - len(known), 0))

    @property
    def denoising_s(self) -> float:
        return self.first_step_extra_s + self.steps * self.step_s

    @property
    def image_gpu_s(self) -> float:
        """GPU seconds of one image, without text encoding."""
        return self.denoising_s + self.decoding_s

    @property
    def gpu_s(self) -> float:
        """GPU seconds of the whole task."""
        texts = self.images if self.text_each else 1
        return self.before_s + texts * self.text_encoding_s + self.images * self.image_gpu_s

    @property
    def total_s(self) -> float:
        return self.gpu_s + self.image_encoding_s


@dataclass(frozen=True)
class Measured:
    """Measured seconds of one image."""

    text_encoding_s: float
    step_s: Sequence[float]
    """Seconds of each step that ran."""
    decoding_s: float
    image_encoding_s: float

    @property
    def gpu_s(self) -> float:
        return self.text_encoding_s + sum(self.step_s) + self.decoding_s

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @staticmethod
    def from_json(text: str) -> "Measured":
        return Measured(**json.loads(text))


class Live(NamedTuple):
    """How far a running task is."""

    phase: str
    """text_encoding, denoising, decoding, image_encoding."""
    phase_elapsed_s: float
    steps_done: int = 0
    steps_total: int = 0
    step_s: Sequence[float] = ()
    step_elapsed_s: float = 0.0
    images_done: int = 0
    text_s: float = 0.0
    """Seconds that encoding its prompt has taken; 0: it is not known, or has not ended."""
