"""Detects NaN and infinity in computed values, which would give a black picture.

Depends on mflux and mlx.
"""

from typing import Any

from errors import NotFinite


def check_finite(array: Any, what: str) -> None:
    """Evaluate an MLX array and check its values.

    Args:
        what: name of the values, for the message.

    Raises:
        NotFinite: a value is NaN or infinite.
    """
    import mlx.core as mx

    finite = mx.isfinite(array).all()
    mx.eval(array, finite)
    if not finite.item():
        raise NotFinite(
            f"The model computed {what} with values that are not numbers (NaN or infinity), so "
            "there is no picture. Try another size, guidance, or scale of the LoRAs; if every "
            "picture of this model fails, its weights are damaged."
        )


def check_decoded_pictures() -> None:
    """Makes mflux check each picture before the conversion to bytes, where NaN becomes black.

    All of mflux's classes go through ImageUtil.to_pil, the upscalers too. Calling this again
    changes nothing.
    """
    from mflux.utils.image_util import ImageUtil

    to_pil = ImageUtil.to_pil
    if getattr(to_pil, "checks_values", False):
        return

    def checked(decoded_latents: Any) -> Any:
        check_finite(decoded_latents, "a picture")
        return to_pil(decoded_latents)

    checked.checks_values = True  # type: ignore[attr-defined]
    ImageUtil.to_pil = staticmethod(checked)
