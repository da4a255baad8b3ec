"""The commands of server.py that end at once: --download, --new-key."""

import sys
from dataclasses import replace
from pathlib import Path

import errors
from configuration import allow
from generation.pipelines import fetch
from key_file import add_key
from models.hub_cache import marked_as_incomplete, source_of
from models.model_catalog import LoadSpec
from settings import Settings

SCRIPT = Path(__file__).with_name("server.py")
QUIET = ("--log-level", "error")


def download_command(data_dir: Path, weights: LoadSpec) -> list[str]:
    """Returns the command that downloads weights in a separate process."""
    model = weights.model
    command = [sys.executable, str(SCRIPT), "--download", model.name, "--data-dir", str(data_dir)]
    source = source_of(model)
    if model.base:
        command += ["--models", f"{model.name}={source}@{model.base}"]
    else:
        command += ["--models", "", "--path", source]
    return [*command, *model.options.flags, *QUIET]


def download(settings: Settings) -> int:
    """Downloads the weights of --download, with progress bars; returns the exit code."""
    asked = replace(settings, model=settings.download)
    allowed = allow(asked, has_gpu=False, default_option="--download")
    with marked_as_incomplete(settings.data_dir, allowed.default):
        for pipeline in allowed.default.pipelines:
            if not pipeline.inpaints:  # it has the weights of another one
                fetch(LoadSpec(allowed.default, pipeline, None), settings.data_dir)
    print(f"The weights of {allowed.default.name} are on this machine.")
    return 0


def write_key(settings: Settings) -> int:
    """Write the key of --new-key; returns the exit code. Raises: BadOption."""
    if settings.keys is None or settings.new_key is None:
        raise errors.BadOption("--new-key NAME needs --keys FILE, which it is added to.")
    key = add_key(settings.keys, settings.new_key)
    print(f"The key of {settings.new_key}, which is shown only now: {key}")
    return 0
