"""What the Hugging Face cache holds of a model, without the network.

Read from the files. huggingface_hub's own cache API does not answer these questions: its
`scan_cache_dir` reads the whole cache (0.1 s for each 1,000 files, and GET /models asks for every
model), `try_to_load_from_cache` needs the names of the files, and neither counts the bytes of a
running download. Names and places come from huggingface_hub, pinned revisions from mflux.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import filter as filter_names
from fnmatch import fnmatch
from pathlib import Path
from weakref import WeakKeyDictionary

from models.build_options import NO_OPTIONS, PARTS
from models.missing_files import WEIGHTS, absent_shards, file_sizes, unusable_files
from models.model_catalog import Model
from models.repositories import further, loaded_patterns
from models.weight_files import are_float32, loaded_shares, stored_bits

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
    if model.url:
        return _has_bytes(_url_file(model))
    if folder is not None and not folder.is_dir():
        return False
    return all(_is_complete(name, patterns) for name, patterns in _needed(model).items())


def _of_parts(model: Model) -> dict[str, tuple[str, ...]]:
    """Repositories of what its options load, and the patterns of their files."""
    parts = model.parts
    return {name: files for part in parts for name, files in part.repositories.items()}


def _sources(model: Model) -> dict[str, tuple[str, ...]]:
    """Returns the repositories that it is loaded from, and the patterns of their files; no
    patterns: all weights. Of a local folder: those that it needs besides."""
    folder = _folder(model)
    names = further(model, folder) if folder else _names(model)
    return {name: model.files.get(name, ()) for name in names} | _of_parts(model)


def _needed(model: Model) -> dict[str, tuple[str, ...]]:
    """The repositories of _sources(), with patterns of which each must match a file."""
    parts = _of_parts(model)
    return {name: parts.get(name) or loaded_patterns(model, name) for name in _sources(model)}


def needs_download(data_dir: Path, model: Model) -> bool:
    """Whether weights must be downloaded before the model can be loaded: they are missing, or a
    download has not ended, which is the only sign of an incomplete one."""
    if not model.url and not _sources(model):
        return False
    return _mark_of(data_dir, model).exists() or not is_present(model)


@contextmanager
def marked_as_incomplete(data_dir: Path, model: Model) -> Iterator[None]:
    """Marks a model as incomplete during a download, and after a download that failed."""
    mark = _mark_of(data_dir, model)
    if model.url and (mark.exists() or not _has_bytes(_url_file(model))):
        with suppress(OSError):  # mflux takes a partial file for a whole one
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
    return {path for name in _sources(model) for path in _partial(name)}


def _partial(name: str) -> list[Path]:
    return list((_repository(name) / "blobs").glob("*.incomplete"))


def _is_complete(name: str, patterns: tuple[str, ...]) -> bool:
    """
    Args:
        patterns: each must match a file; empty: there must be any file of weights.
    """
    if not any(_is_whole(snapshot, patterns) for snapshot in _snapshots(name)):
        return False
    several = not patterns or any("*" in pattern for pattern in patterns)
    return not (several and any(map(_is_growing, _partial(name))))


def _is_whole(snapshot: Path, patterns: tuple[str, ...]) -> bool:
    sizes = file_sizes(snapshot)
    names = [name for name, size in sizes.items() if size]
    if not patterns and not any(name.endswith(WEIGHTS) for name in names):
        return False
    if not all(filter_names(names, pattern) for pattern in patterns):
        return False
    return not unusable_files(snapshot, sizes, patterns)


def unusable(model: Model) -> list[tuple[str, Path, str]]:
    """Returns what must be downloaded again of a repository that is here in part: the repository,
    its snapshot, and the name of the file."""
    return [
        (name, snapshot, file)
        for name, patterns in _needed(model).items()
        if not _is_complete(name, patterns)
        for snapshot in _snapshots(name)[:1]
        for file in unusable_files(snapshot, file_sizes(snapshot), patterns)
    ]


def absent_from_folder(model: Model) -> list[Path]:
    """Returns the files that a local folder of weights lacks: shards of which others are there."""
    folder = _folder(model)
    if folder is None:
        return []
    patterns = loaded_patterns(model, str(model.path))
    return [folder / name for name in absent_shards(folder, patterns)]


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _is_growing(part: Path) -> bool:
    """Whether a download is writing the file; files of an earlier one stay for ever."""
    try:
        # A time in the future was written before the clock was set back.
        return abs(time.time() - part.stat().st_mtime) < STALE_S
    except OSError:  # it has just been renamed
        return True


def weight_files(model: Model) -> list[Path]:
    """Returns the .safetensors files of a model that are on this machine, of a local folder with
    those that it needs besides."""
    folder = _folder(model)
    own = _matching(folder) if folder else []
    return [
        path
        for path in (*own, *_snapshot_files(_sources(model)))
        if path.suffix == ".safetensors"
        and not path.name.startswith(".")  # macOS puts "._" files beside those on other disks
    ]


def _snapshot_files(sources: Mapping[str, tuple[str, ...]]) -> list[Path]:
    """Returns what is loaded of repositories, as far as it is on this machine."""
    return [
        path
        for name, patterns in sources.items()
        for snapshot in _snapshots(name)[:1]
        for path in _matching(snapshot, patterns)
    ]


def _matching(folder: Path, patterns: tuple[str, ...] = ()) -> list[Path]:
    """Returns the files in a folder that match a pattern, as huggingface_hub compares them."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
        and any(fnmatch(path.relative_to(folder).as_posix(), one) for one in patterns or ("*",))
    ]


def source_folders(model: Model) -> list[Path]:
    """Returns the folders on this machine that mflux reads a model from: a local one or the
    snapshots of its repositories, and the snapshots of those that it needs besides."""
    folder = _folder(model)
    snapshots = [snapshot for name in _sources(model) for snapshot in _snapshots(name)[:1]]
    return [folder, *snapshots] if folder else snapshots


def as_stored(model: Model) -> Model:
    """Returns the model with what its files say, if they are on this machine: how much memory they
    take, and for weights that the operator has named their bits and size."""
    if model in _STORED:
        return _STORED[model]
    if model.tiny or model.stored_bits or model.loaded_shares or not is_present(model):
        return model
    # What its options load instead is not in its size: LoadSpec.expected_bytes adds it.
    files = [path for path in weight_files(replace(model, options=NO_OPTIONS)) if path.is_file()]
    if not files:
        return model
    shares = loaded_shares(files, DENSE.get(model.family, ()))
    size_gb = sum(path.stat().st_size for path in files) / 1e9
    bits = stored_bits(files) if model.path is not None else None
    if not any(path.parent.name == TEXT_ENCODER for path in files):
        size_gb, shares = _with_replaced(model, size_gb, shares, bits)
    stored = replace(model, loaded_shares=shares, float32=are_float32(files))
    if model.path is not None:
        stored = replace(stored, stored_bits=bits, weights_gb=size_gb)
    _STORED[model] = stored
    return stored


def _with_replaced(
    model: Model, size_gb: float, shares: dict[int | None, float], stored: int | None
) -> tuple[float, dict[int | None, float]]:
    """Returns size and shares as if the text encoder were there that an option replaces:
    LoadSpec.expected_bytes takes it off."""
    option = "small_text_encoder"
    if not any(option in pipeline.options for pipeline in model.pipelines):
        return size_gb, shares
    part = PARTS[model.family, option]
    whole_gb = size_gb + part.replaced_gb
    with_part = {
        bits: (size_gb * share + part.replaced_gb * part.replaced_share(bits)) / whole_gb
        for bits, share in shares.items()
    }
    return size_gb + part.replaced_gb * part.replaced_share(stored), with_part


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
    """Returns the bytes on disk of what it loads, also during a download."""
    if model.url:
        return _url_file(model).stat().st_size if is_present(model) else 0
    folder = _folder(model)
    size = _size(folder.rglob("*")) if folder else 0
    for name, patterns in _sources(model).items():
        if patterns:
            size += _size([*_snapshot_files({name: patterns}), *_partial(name)])
        else:
            size += _size((_repository(name) / "blobs").rglob("*"))
    return size


def _url_file(model: Model) -> Path:
    """Returns where mflux keeps a file that does not come from Hugging Face."""
    from mflux.cli.defaults.defaults import MFLUX_CACHE_DIR

    return Path(MFLUX_CACHE_DIR) / model.family / model.url.rpartition("/")[2]


def _names(model: Model) -> tuple[str, ...]:
    """Returns its repositories. One that the operator has named replaces some of them."""
    if model.path and model.path != next(iter(model.repositories), None):
        return (model.path, *further(model))
    return model.repositories


def _folder(model: Model) -> Path | None:
    """Returns the local folder of the weights."""
    if model.path is None:
        return None
    folder = Path(model.path).expanduser()
    return folder if folder.exists() or model.path.count("/") != 1 else None


def _repository(name: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache_dir() / repo_folder_name(repo_id=name, repo_type="model")


def _size(paths: Iterable[Path]) -> int:
    size = 0
    for path in paths:
        try:
            if path.suffix != ".incomplete" or _is_growing(path):
                size += path.stat().st_size if path.is_file() else 0
        except OSError:  # it has just been renamed
            continue
    return size
