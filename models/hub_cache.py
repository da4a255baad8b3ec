"""What the Hugging Face cache holds of a model, without the network.

Read from the files. huggingface_hub's own cache API does not answer these questions: its
`scan_cache_dir` reads the whole cache (0.1 s for each 1,000 files, and GET /models asks for every
model), `try_to_load_from_cache` needs the names of the files, and neither counts the bytes of a
running download. Names and places come from huggingface_hub, pinned revisions from mflux.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

from models.model_catalog import Model
from models.weight_files import are_float32, loaded_shares, stored_bits

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
STALE_S = 600.0
TEXT_ENCODER = "text_encoder"
DENSE: Mapping[str, tuple[str, ...]] = {
    "anima": (TEXT_ENCODER, "llm_adapter", "t_embedder", "adaln_modulation"),
    "krea2": (TEXT_ENCODER,),
    "qwen": (TEXT_ENCODER,),
    "qwen21": (TEXT_ENCODER,),
}
"""By family: parts of the names of folders and arrays that mflux never quantizes."""
_STORED: WeakKeyDictionary[Model, Model] = WeakKeyDictionary()
"""Models with what their files say, once these are on this machine."""


def cache_dir() -> Path:
    """Where huggingface_hub keeps what it has downloaded."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def has_login() -> bool:
    """Whether there is a token of Hugging Face on this machine, or in the environment."""
    from huggingface_hub import get_token

    return bool(get_token())


def login_command() -> str:
    """The command that logs in at Hugging Face: `hf` is beside this Python, and perhaps not on
    PATH. Inside of the server's folder its path is relative to that."""
    program, root = Path(sys.executable).with_name("hf"), Path(__file__).parent.parent
    if not program.exists():
        return "hf auth login"
    shown = program.relative_to(root) if program.is_relative_to(root) else program
    return f"{shown} auth login"


def is_present(model: Model) -> bool:
    """Whether the weights are on this machine: each repository has a complete snapshot."""
    folder = _folder(model)
    if not all(_is_complete(*repository) for repository in _part_repositories(model)):
        return False
    if model.tiny or folder is not None:
        return folder is None or folder.is_dir()
    if model.url:
        return _url_file(model).is_file()
    return _has_text_encoder(model) and all(
        _is_complete(name, model.files) for name in _names(model)
    )


def _has_text_encoder(model: Model) -> bool:
    """False if the repository is there and its text encoder is needed and missing, because it was
    downloaded for the small one."""
    option = "small_text_encoder"
    has_option = any(option in pipeline.options for pipeline in model.pipelines)
    if not has_option or option in model.options.in_use:
        return True
    folders = _snapshots(_names(model)[0])
    return not folders or any((folder / TEXT_ENCODER).is_dir() for folder in folders)


def _part_repositories(model: Model) -> list[tuple[str, tuple[str, ...]]]:
    """Repositories of what its options load, and the files of weights in them."""
    return [repository for part in model.parts for repository in part.repositories.items()]


def needs_download(data_dir: Path, model: Model) -> bool:
    """Whether weights must be downloaded before the model can be loaded: they are missing, or a
    download has not ended, which is the only sign of an incomplete one."""
    if not model.parts and (model.tiny or _folder(model) is not None):
        return False
    return _mark_of(data_dir, model).exists() or not is_present(model)


@contextmanager
def marked_as_incomplete(data_dir: Path, model: Model) -> Iterator[None]:
    """Marks a model as incomplete during a download, and after a download that failed."""
    mark = _mark_of(data_dir, model)
    if model.url and mark.exists():  # mflux takes a partial file for a whole one
        with suppress(OSError):
            _url_file(model).unlink(missing_ok=True)
    with suppress(OSError):  # if nothing can be written, the download reports it
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    yield
    with suppress(OSError):
        mark.unlink(missing_ok=True)


def _mark_of(data_dir: Path, model: Model) -> Path:
    return data_dir / "downloads" / model.name


def partial_files(model: Model) -> set[Path]:
    """Returns unfinished files of downloads, which huggingface_hub never resumes."""
    names = () if _folder(model) else _names(model)
    names += tuple(name for name, _ in _part_repositories(model))
    return {path for name in names for path in (_repository(name) / "blobs").glob("*.incomplete")}


def _is_complete(name: str, files: tuple[str, ...] = ()) -> bool:
    """
    Args:
        files: names that must be there; empty: any file of weights.
    """
    weights = {
        path.name
        for snapshot in _snapshots(name)
        for path in snapshot.rglob("*")
        if path.suffix in WEIGHTS and path.exists()
    }
    if files:
        return set(files) <= weights
    partial = (_repository(name) / "blobs").glob("*.incomplete")
    return bool(weights) and not any(map(_is_growing, partial))


def _is_growing(part: Path) -> bool:
    """Whether a download is writing the file; files of an earlier one stay for ever."""
    try:
        # A time in the future was written before the clock was set back.
        return abs(time.time() - part.stat().st_mtime) < STALE_S
    except OSError:  # it has just been renamed
        return True


def weight_files(model: Model) -> list[Path]:
    """Returns the .safetensors files of a model that are on this machine."""
    folder = _folder(model)
    return [
        path
        for folder in ([folder] if folder else source_folders(model))
        for path in sorted(folder.rglob("*.safetensors"))
        if not path.name.startswith(".")  # macOS puts "._" files beside those on other disks
    ]


def source_folders(model: Model) -> list[Path]:
    """Returns the folders on this machine that mflux reads a model from: a local one or the
    snapshots of its repositories, and the snapshots of those that it needs besides."""
    folder = _folder(model)
    names = model.repositories[1:] if folder else _names(model)
    names += tuple(name for name, _ in _part_repositories(model))
    snapshots = [snapshot for name in names for snapshot in _snapshots(name)[:1]]
    return [folder, *snapshots] if folder else snapshots


def as_stored(model: Model) -> Model:
    """Returns the model with what its files say, if they are on this machine: how much memory they
    take, and for weights that the operator has named their bits and size."""
    if model in _STORED:
        return _STORED[model]
    if model.tiny or model.stored_bits or model.loaded_shares or not is_present(model):
        return model
    files = [path for path in weight_files(model) if path.is_file()]
    if not files:
        return model
    shares = loaded_shares(files, DENSE.get(model.family, ()))
    stored = replace(model, loaded_shares=shares, float32=are_float32(files))
    if model.path is not None:
        size_gb = sum(path.stat().st_size for path in files) / 1e9
        stored = replace(stored, stored_bits=stored_bits(files), weights_gb=size_gb)
    _STORED[model] = stored
    return stored


def pin(name: str, commit: str) -> None:
    """From now on, mflux loads this commit of a repository."""
    from mflux.models.common.resolution.model_revisions import ModelRevisions

    ModelRevisions.PINNED[name] = commit


def source_of(model: Model) -> str:
    """Returns the folder or repository that the operator has named for a model, with the commit of
    the repository; empty: none."""
    commit = pinned(model.path) if model.path and not _folder(model) else None
    return f"{model.path}:{commit}" if commit else model.path or ""


def pinned(name: str) -> str | None:
    """Returns the commit of a repository that mflux loads; None: the newest."""
    from mflux.models.common.resolution.model_revisions import ModelRevisions

    commit: str | None = ModelRevisions.get(name)
    return commit


def _snapshots(name: str) -> list[Path]:
    """The folders that mflux may load a repository from, the one that it prefers first: the
    revision that it pins, else the newest."""
    folder = _repository(name) / "snapshots"
    if commit := pinned(name):
        return [folder / commit] if (folder / commit).is_dir() else []
    return sorted(folder.glob("*/"), key=lambda path: path.stat().st_mtime, reverse=True)


def bytes_on_disk(model: Model) -> int:
    """Returns the bytes of its repositories on disk, also during a download."""
    if model.url:
        return _url_file(model).stat().st_size if is_present(model) else 0
    folder = _folder(model)
    folders = [folder] if folder else [_repository(name) / "blobs" for name in _names(model)]
    folders += [_repository(name) / "blobs" for name, _ in _part_repositories(model)]
    return sum(_size(folder) for folder in folders)


def _url_file(model: Model) -> Path:
    """Returns where mflux keeps a file that does not come from Hugging Face."""
    from mflux.cli.defaults.defaults import MFLUX_CACHE_DIR

    return Path(MFLUX_CACHE_DIR) / model.family / model.url.rpartition("/")[2]


def _names(model: Model) -> tuple[str, ...]:
    """Returns its repositories. A repository named by --path replaces the first one."""
    return (model.path, *model.repositories[1:]) if model.path else model.repositories


def _folder(model: Model) -> Path | None:
    """Returns the local folder of the weights."""
    if model.path is None:
        return None
    folder = Path(model.path).expanduser()
    return folder if folder.exists() or model.path.count("/") != 1 else None


def _repository(name: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache_dir() / repo_folder_name(repo_id=name, repo_type="model")


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            if path.suffix != ".incomplete" or _is_growing(path):
                size += path.stat().st_size if path.is_file() else 0
        except OSError:  # it has just been renamed
            continue
    return size
