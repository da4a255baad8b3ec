"""Prepares MLX before its first import."""

import ctypes
import importlib.util
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from models.cpu_products import multiply_quantized_in_float32

log = logging.getLogger(__name__)


class MlxMissing(Exception):
    """mlx cannot be imported. The message says what to install."""


def prepare_mlx(*, quiet: bool = True) -> bool:
    """Imports mlx, before mflux is used. Only the first call has an effect.

    Args:
        quiet: no progress bars.

    Returns:
        Whether MLX has a GPU here.

    Raises:
        MlxMissing: the message is for the operator.
    """
    if "mlx.core" not in sys.modules:
        _import_mlx(quiet=quiet)
    import mlx.core as mx

    has_gpu = bool(mx.is_available(mx.gpu))
    if not has_gpu:
        multiply_quantized_in_float32()
    return has_gpu


def _import_mlx(*, quiet: bool) -> None:
    if quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if sys.platform == "linux":
        _preload_fast_blas()
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise MlxMissing(
            f"mlx cannot be imported ({error}): run 'pip install --no-deps -r requirements.txt' "
            "with Python 3.11 or newer on macOS with Apple Silicon or on Linux x86_64."
        ) from None


def _preload_fast_blas() -> None:
    """Makes the CPU build of mlx use the OpenBLAS of opencv (a dependency of mflux).

    mlx links the `cblas_*` functions of the system. On most Linux machines that is the reference
    BLAS, 50 times slower. The library that is loaded first is used. Macs have Metal and Accelerate.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    opencv = importlib.util.find_spec("cv2")
    if opencv is None or opencv.origin is None:
        return
    libraries = Path(opencv.origin).parent.parent / "opencv_python.libs"
    for pattern in ("libquadmath*.so*", "libgfortran*.so*", "libopenblas*.so*"):
        for library in sorted(libraries.glob(pattern)):
            try:
                ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            except OSError as error:
                log.debug("%s cannot be loaded: %s", library.name, error)


def give_back_memory() -> None:
    """Return freed memory to the operating system: the C library keeps gigabytes of what MLX's
    arrays on the CPU, and the reading of files, have used."""
    with suppress(AttributeError, OSError):  # a C library without such a function
        if sys.platform == "darwin":
            ctypes.CDLL(None).malloc_zone_pressure_relief(None, ctypes.c_size_t(0))
        elif sys.platform.startswith("linux"):
            ctypes.CDLL(None).malloc_trim(0)
