"""A hidden law of time, against which the timing model is tested."""

from timing_model import Measured, Work


def work(side: int = 1024, steps: int = 4, model: str = "m", format: str = "JPEG") -> Work:
    return Work(model, 12.0, (side // 16) ** 2, steps, format)


def law(work: Work, noise: float = 1.0, speed: float = 1.0) -> Measured:
    """A machine with a text encoder, attention, a slow first step and a decoder."""
    x = work.tokens / 4096
    step = (0.3 + 2.0 * x + 0.7 * x * x) * noise * speed
    return Measured(
        text_encoding_s=0.8 * noise * speed,
        step_s=[step * 1.5] + [step] * (work.steps - 1),
        decoding_s=(0.2 + 1.1 * x) * noise * speed,
        image_encoding_s=0.01 * x,
    )


def total(measured: Measured) -> float:
    return (
        measured.text_encoding_s
        + sum(measured.step_s)
        + measured.decoding_s
        + measured.image_encoding_s
    )
