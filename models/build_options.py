"""Options of mflux's classes that the operator sets for all models that have them.

They are parameters of the constructors; mflux_registry.py reads from mflux's source which class has
which. Some load smaller parts from repositories of their own: PARTS.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple


class BuildOptions(NamedTuple):
    """The fields have the names of mflux's parameters."""

    compute_precision: str | None = None
    small_text_encoder: bool = False
    small_decoder: bool = False
    low_ram: bool = False

    @property
    def in_use(self) -> tuple[str, ...]:
        """Names of the options that are set."""
        return tuple(name for name, value in self._asdict().items() if value)

    def of(self, names: Collection[str]) -> "BuildOptions":
        """The same, without the options that are not among these names."""
        return BuildOptions(**{name: value for name, value in self._values() if name in names})

    @property
    def suffix(self) -> str:
        """Ends the keys of what is learned or loaded with these options; empty: none is set."""
        return "".join(f"/{name if value is True else value}" for name, value in self._values())

    @property
    def flags(self) -> list[str]:
        """Of the command line, for those that load other files."""
        return [f"--{name.replace('_', '-')}" for name, value in self._values() if value is True]

    def _values(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in zip(self._fields, self, strict=True) if value]


NO_OPTIONS = BuildOptions()


QUANTIZED_EXTRA_BITS = 0.5
"""Of a quantized value, for the scale and bias (16 bits each) of each group of 64."""


def quantized_share(bits: int | None) -> float:
    """Memory of quantized weights / of the same in 16 bits. None: they are not quantized."""
    return (bits + QUANTIZED_EXTRA_BITS) / 16 if bits else 1.0


class Part(NamedTuple):
    """What is loaded in place of a part of a model. Sizes in 10^9 bytes, from mflux's READMEs."""

    repositories: Mapping[str, tuple[str, ...]]
    """Repository -> patterns of its files of weights."""
    download_gb: float
    quantized_gb: float = 0.0
    """What is quantized of it, in 16 bits."""
    dense_gb: float = 0.0
    """What is not, in memory."""
    replaced_gb: float = 0.0
    """What is not loaded of the model."""
    replaced_is_quantized: bool = True

    def replaced_share(self, bits: int | None) -> float:
        """Memory of what is replaced / of the same in 16 bits."""
        return quantized_share(bits) if self.replaced_is_quantized else 1.0


PARTS: Mapping[tuple[str, str], Part] = {
    ("flux2", "small_text_encoder"): Part(
        {
            "Qwen/Qwen3-0.6B": ("model.safetensors",),
            "AiArtLab/qwen3-0.6b-4b-adapter": ("adapter_v14_bal.safetensors",),
        },
        download_gb=2.3,
        quantized_gb=1.2,
        dense_gb=0.8,
        replaced_gb=7.5,
    ),
    ("flux2", "small_decoder"): Part(
        {"black-forest-labs/FLUX.2-small-decoder": ("diffusion_pytorch_model.safetensors",)},
        download_gb=0.25,
    ),
    ("qwen21", "small_text_encoder"): Part(
        {"AiArtLab/zen-image-edit": ("text_encoder/model.safetensors",)},
        download_gb=2.1,
        dense_gb=2.6,
        replaced_gb=17.5,
        replaced_is_quantized=False,
    ),
}
"""By family and option."""


def parts_of(family: str, options: BuildOptions) -> tuple[Part, ...]:
    """What models of a family load with these options."""
    return tuple(PARTS[family, name] for name in options.in_use if (family, name) in PARTS)
