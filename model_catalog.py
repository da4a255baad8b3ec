"""The models this server knows, as plain data: light to import, no weights, no mflux."""

from dataclasses import dataclass
from enum import StrEnum


class Family(StrEnum):
    """Which of mflux's pipelines draws with a model."""

    FLUX1 = "flux1"
    FLUX2_KLEIN = "flux2-klein"


@dataclass(frozen=True)
class Model:
    """What the server must know of a model before its weights are loaded."""

    name: str
    """The name that `--model` takes; for real models also mflux's own key."""
    family: Family
    title: str
    default_steps: int
    default_guidance: float | None
    """None: the model is distilled without guidance and ignores the field."""
    parameters_b: float
    """Size of the transformer in billions of parameters: scales the forecast before anything
    was measured."""
    repository: str | None = None
    """Hugging Face repository of the weights; None: built by tiny_models.py."""
    gated: bool = False
    """Whether the repository asks for a login and an accepted licence."""
    aliases: tuple[str, ...] = ()

    @property
    def tiny(self) -> bool:
        return self.repository is None


MODELS: tuple[Model, ...] = (
    Model(
        "schnell", Family.FLUX1, "FLUX.1 schnell, 12 B", 4, None, 12.0,
        "black-forest-labs/FLUX.1-schnell", gated=True, aliases=("flux1-schnell",),
    ),
    Model(
        "dev", Family.FLUX1, "FLUX.1 dev, 12 B", 25, 3.5, 12.0,
        "black-forest-labs/FLUX.1-dev", gated=True, aliases=("flux1-dev",),
    ),
    Model(
        "krea-dev", Family.FLUX1, "FLUX.1 Krea dev, 12 B", 25, 3.5, 12.0,
        "black-forest-labs/FLUX.1-Krea-dev", gated=True, aliases=("dev-krea",),
    ),
    Model(
        "flux2-klein-4b", Family.FLUX2_KLEIN, "FLUX.2 klein, 4 B, distilled", 4, None, 4.0,
        "black-forest-labs/FLUX.2-klein-4B", aliases=("flux2-klein", "klein-4b"),
    ),
    Model(
        "flux2-klein-9b", Family.FLUX2_KLEIN, "FLUX.2 klein, 9 B, distilled", 4, None, 9.0,
        "black-forest-labs/FLUX.2-klein-9B", gated=True, aliases=("klein-9b",),
    ),
    Model(
        "flux2-klein-base-4b", Family.FLUX2_KLEIN, "FLUX.2 klein base, 4 B", 50, 4.0, 4.0,
        "black-forest-labs/FLUX.2-klein-base-4B", aliases=("klein-base-4b",),
    ),
    Model(
        "flux2-klein-base-9b", Family.FLUX2_KLEIN, "FLUX.2 klein base, 9 B", 50, 4.0, 9.0,
        "black-forest-labs/FLUX.2-klein-base-9B", gated=True, aliases=("klein-base-9b",),
    ),
    Model(
        "tiny", Family.FLUX1, "tiny FLUX.1 with random weights: abstract noise, for trying the API",
        4, None, 0.001,
    ),
    Model(
        "tiny-flux2", Family.FLUX2_KLEIN,
        "tiny FLUX.2 klein with random weights: abstract noise, for trying the API", 4, None, 0.001,
    ),
)  # fmt: skip

DEFAULT_MODEL = "schnell"
DEFAULT_MODEL_WITHOUT_GPU = "tiny"


def find_model(name: str) -> Model | None:
    """The model of this exact name or alias, in any case of letters; None if there is none."""
    wanted = name.lower()
    return next((m for m in MODELS if wanted in (m.name, *m.aliases)), None)
