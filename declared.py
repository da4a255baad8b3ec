"""What the operator declares with --model, --models and --path: names, folders, repositories.

An entry of --models is a name, `all`, or [NAME=]SOURCE[@BASE]. SOURCE is a folder, or a repository
on Hugging Face with an optional commit: org/name:COMMIT.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from allowed import Allowed
from errors import BadOption
from models.build_options import NO_OPTIONS, BuildOptions
from models.helpers import HELPERS
from models.hub_cache import as_stored, pin
from models.model_catalog import Catalog, Model, Pipeline

REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+?)(?::([^:]*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[\w.-]{1,64}")
OF_LARGE_ENCODER = ("auto_mask", "verify_retries")
Recognize = Callable[[Path, Catalog], tuple[Sequence[Model], str]]
"""Returns the models that the weights in a folder may be of, and a reason if there is none."""


def nothing_fits(folder: Path, catalog: Catalog) -> tuple[Sequence[Model], str]:
    return (), ""


def read_allowed(
    catalog: Catalog,
    *,
    default: str | None,
    allowed: Sequence[str],
    path: str | None,
    fallback: str,
    quantize: int | None,
    quantize_choices: Sequence[int],
    lora_dir: Path | None,
    allow_lora_repos: bool,
    default_option: str = "--model",
    recognize: Recognize = nothing_fits,
    options: BuildOptions = NO_OPTIONS,
) -> Allowed:
    """Builds `Allowed` from the options of the server.

    Args:
        default: --model, or what default_option says.
        allowed: --models: names, `all`, or [NAME=]SOURCE[@BASE].
        path: --path, for the default model.
        fallback: the model to load if neither option names one.
        recognize: for folders without a BASE.
        options: how models are built that have these options.

    Raises:
        BadOption: an option names a model or a folder that does not exist.
    """
    _check_commits([path or "", *allowed])
    models, helpers = _entries(catalog, allowed, recognize)
    by_name = {model.name: model for model in models}
    if default and (found := Catalog(models).find(default)):
        chosen = found
    elif default_option == "--download" and default and default.lower() in HELPERS:
        chosen = HELPERS[default.lower()]
    elif path and not default and not models and (folder := _folder(path)):
        chosen = _recognized(catalog, folder, path, recognize, "--path")
    elif default or not models:
        chosen = _named(catalog, default or fallback, default_option)
    else:
        chosen = models[0]
    if path:
        chosen = _at_path(chosen, path)
    if lora_dir is not None and not lora_dir.is_dir():
        raise BadOption(f"argument --lora-dir: there is no folder {lora_dir}.")
    for model in (chosen, *(model for model in models if "all" not in allowed)):
        _check_bits(model, quantize)
    others = [model for name, model in by_name.items() if name != chosen.name]
    chosen, *others = (with_options(model, options) for model in (chosen, *others))
    return Allowed(
        default=chosen,
        models=(chosen, *others),
        helpers=tuple(dict.fromkeys(helpers)),
        quantize=quantize,
        quantize_choices=tuple(quantize_choices),
        lora_dir=lora_dir,
        allow_lora_repos=allow_lora_repos,
    )


def with_options(model: Model, options: BuildOptions) -> Model:
    """Returns the model as it is built with those of the options that it has."""
    own = options.of(frozenset().union(*(pipeline.options for pipeline in model.pipelines)))
    if not own.in_use:
        return model
    pipelines = model.pipelines
    if own.small_text_encoder:
        pipelines = tuple(_without_vision(pipeline) for pipeline in pipelines)
    return replace(model, options=own, pipelines=pipelines)


def _without_vision(pipeline: Pipeline) -> Pipeline:
    """Returns the pipeline without what only the large text encoder of Qwen-Image 2.1 can do."""
    kept = {name: to for name, to in pipeline.parameters.items() if to not in OF_LARGE_ENCODER}
    return replace(pipeline, parameters=kept)


def _entries(
    catalog: Catalog, entries: Sequence[str], recognize: Recognize
) -> tuple[list[Model], list[Model]]:
    """Returns the models and the helper models of --models."""
    models: list[Model] = []
    helpers: list[Model] = []
    for entry in entries:
        if entry == "all":
            models += (model for model in catalog.models if model.pipelines)
            helpers += HELPERS.values()
        elif entry.lower() in HELPERS:
            helpers.append(HELPERS[entry.lower()])
        elif catalog.find(entry) or not re.search(r"[@=/]", entry):
            models.append(_named(catalog, entry, "--models"))
        else:
            models.append(_declared(catalog, models, entry, recognize))
    return models, helpers


def _at_path(model: Model, path: str) -> Model:
    """Returns the model with the weights of --path."""
    if model.tiny:
        raise BadOption(
            f"argument --path: the model {model.name} builds its own weights. Say with "
            "--model which model the weights are of."
        )
    repository = None if _folder(path) else _repository(path, "--path")
    return as_stored(replace(model, path=repository or path))


def _check_bits(model: Model, quantize: int | None) -> None:
    if model.stored_bits:
        return
    if any(quantize in pipeline.rules.refused_bits for pipeline in model.pipelines):
        raise BadOption(
            f"argument --quantize: {model.name} cannot be quantized to {quantize} bits: it draws "
            "noise. Choose another number."
        )


def _named(catalog: Catalog, name: str, option: str) -> Model:
    model = catalog.find(name)
    if model is None or not model.pipelines:
        raise BadOption(
            f"argument {option}: there is no model {name!r}.{catalog.like(name)} "
            f"docs/models.md lists all {len(catalog.models)}."
        )
    return model


def _declared(catalog: Catalog, others: Sequence[Model], entry: str, recognize: Recognize) -> Model:
    """Returns the model of [NAME=]SOURCE[@BASE]."""
    name, _, rest = entry.rpartition("=")
    source, with_base, base_name = rest.rpartition("@")
    if not with_base:
        source, base_name = rest, ""
    folder = _folder(source)
    repository = None if folder else _repository(source, "--models")
    if not folder and not repository:
        raise BadOption(f"argument --models: there is no folder {source}.")
    name = name or (folder or Path(str(repository))).name
    if Catalog([*catalog.models, *others]).find(name) or not NAME.fullmatch(name):
        raise BadOption(
            f"argument --models: {entry!r} needs a NAME of its own of letters, digits, '.', '_' "
            "and '-', as in NAME=FOLDER@BASE."
        )
    if base_name:
        base = _named(Catalog([*catalog.models, *others]), base_name, "--models")
    elif folder:
        base = _recognized(catalog, folder, source, recognize, "--models")
    else:
        raise BadOption(
            f"argument --models: say which model the repository {repository} has weights of: "
            f"{name}={source}@BASE."
        )
    if base.tiny:
        raise BadOption(f"argument --models: {entry!r} needs a BASE with real weights.")
    return as_stored(
        replace(
            base,
            name=name,
            title=f"{name}, from {base.name}",
            aliases=(),
            base=base.key,
            path=str(folder or repository),
            stored_bits=None,
        )
    )


def _folder(source: str) -> Path | None:
    path = Path(source).expanduser()
    return path if path.is_dir() else None


def _repository(source: str, option: str) -> str | None:
    """Returns the repository that a source names, after pinning its commit; None: it names none."""
    parts = REPOSITORY.fullmatch(source)
    if parts is None or source.startswith("."):
        return None
    name, commit = parts[1], parts[2]
    if commit is None:
        return name
    if not COMMIT.fullmatch(commit):
        raise BadOption(
            f"argument {option}: {source!r} needs a whole commit after ':', 40 hexadecimal digits, "
            f"as huggingface.co/{name}/commits/main shows them."
        )
    pin(name, commit)
    return name


def _check_commits(entries: Sequence[str]) -> None:
    """mflux knows one commit of a repository at a time."""
    commits: dict[str, set[str | None]] = {}
    for entry in entries:
        source = entry.rpartition("=")[2].partition("@")[0]
        if parts := REPOSITORY.fullmatch(source):
            commits.setdefault(parts[1], set()).add(parts[2])
    for name, named in commits.items():
        if len(named) > 1:
            raise BadOption(
                f"argument --models: {name} is named with several commits. One process can load "
                "one commit of a repository: give each entry the same."
            )


def _recognized(
    catalog: Catalog, folder: Path, source: str, recognize: Recognize, option: str
) -> Model:
    """Returns the model that the weights in a folder are of."""
    fitting, reason = recognize(folder, catalog)
    how = "with --model" if option == "--path" else f"with {option} {source}@BASE"
    if not fitting:
        why = f" ({reason})" if reason else ""
        raise BadOption(
            f"argument {option}: it is not clear of which model the weights in {source} "
            f"are{why}. Say it {how}. docs/models.md lists all models."
        )
    if len(fitting) > 1:
        names = ", ".join(model.name for model in fitting)
        raise BadOption(
            f"argument {option}: the weights in {source} may be of {names}: they have the same "
            f"layers. Say which {how}."
        )
    return fitting[0]
