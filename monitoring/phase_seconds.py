"""The seconds of each phase, as histograms for Prometheus."""

from prometheus_client import Histogram

from models.model_catalog import LoadSpec
from timing_model import Measured

PHASE_BUCKETS = (0.05, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
"""Seconds."""


class PhaseSeconds:
    """Histograms of the seconds of each phase, by model. Any thread may call it."""

    def __init__(self) -> None:
        self.histogram = Histogram(
            "mflux_phase_seconds",
            "Seconds of a phase of one image, or of loading weights.",
            ("model", "phase"),
            buckets=PHASE_BUCKETS,
            registry=None,
        )

    def loaded(self, spec: LoadSpec, seconds: float) -> None:
        self.histogram.labels(spec.model.name, "loading").observe(seconds)

    def drawn(self, spec: LoadSpec, measured: Measured) -> None:
        """A stage of an image is done."""
        phases = {
            "text_encoding": measured.text_encoding_s,
            "denoising": sum(measured.step_s),
            "decoding": measured.decoding_s,
            "image_encoding": measured.image_encoding_s,
        }
        for phase, seconds in phases.items():
            self.histogram.labels(spec.model.name, phase).observe(seconds)
