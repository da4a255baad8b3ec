"""The options that are commands of their own: --check, --download, --new-key, --pair, --backup."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import doctor
import errors
from announcements import SIGNS_IN, base_url
from api.pairing import link_to
from configuration import allow, identity_of
from generation.fetching import fetch
from key_file import add_key
from lan import qr_code
from models.hub_cache import marked_as_incomplete, source_of
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec
from settings import Settings
from storage.backup import copy_data

SCRIPT = Path(__file__).with_name("server.py")
QUIET = ("--log-level", "error")


def run_command(settings: Settings) -> int | None:
    """Run the command that is among the options.

    Returns:
        Its exit code; None: there is none.

    Raises:
        BadOption, MlxMissing, ModelLoadError, StoreError.
    """
    if settings.new_key is not None:
        return write_key(settings)
    if settings.pair is not None:
        return pair(settings)
    if settings.check:
        return doctor.report(settings)
    if settings.backup or settings.restore:
        return copy_data(settings.data_dir, to=settings.backup, source=settings.restore)
    if settings.download is not None:
        prepare_mlx(quiet=False)
        return download(settings)
    return None


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


def pair(settings: Settings) -> int:
    """Print a link and a QR code for the client of --pair; returns the exit code.

    Raises:
        BadOption: there is no such client.
    """
    identity = identity_of(settings)
    client = identity.named(settings.pair or "")
    if client is None:
        raise errors.BadOption(f"--pair {settings.pair}: --keys (or --lan) has no such client.")
    link = link_to(identity, base_url(settings, settings.port), client, time.time())
    print(f"{SIGNS_IN} {client.name}: {link}\n{qr_code(link)}")
    return 0
