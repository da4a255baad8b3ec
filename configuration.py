"""What the settings mean to the parts of the server: models, generator, identity, limits."""

from collections.abc import Mapping
from dataclasses import replace

from allowed import Allowed
from api.generate_request import Limits
from api.identity import Identity
from api.origin_check import LOOPBACK
from declared import read_allowed
from generation.memory_guard import MemoryGuard
from generation.previews import Previews
from generation.recognition import fitting_models
from generator import MfluxGenerator
from key_file import Client, KeyFile, add_key
from models.build_options import BuildOptions
from models.hub_cache import has_login, needs_download
from models.mflux_registry import find_model, read_catalog
from models.mlx_setup import prepare_mlx
from models.model_catalog import DEFAULT_MODEL, DEFAULT_MODEL_WITHOUT_GPU
from models.weights_cache import WeightsCache
from scheduler.limits import QueueLimits
from settings import Settings
from storage.data_dir import secret_of
from workers.expander import ChatEndpoint

FIRST_CHOICES = ("flux2-klein-4b", "z-image-turbo")
"""Models for pictures that need no login."""
LAN_OPERATOR, LAN_PHONE = "operator", "phone"
"""Clients of the file of keys that --lan makes."""


def for_lan(settings: Settings) -> Settings:
    """The settings with what --lan stands for: it listens on all addresses, and has keys."""
    if not settings.lan:
        return settings
    host = "0.0.0.0" if settings.host in LOOPBACK else settings.host
    keys = settings.keys or settings.data_dir / "keys.toml"
    return replace(settings, host=host, keys=keys)


def make_keys(settings: Settings) -> None:
    """With --lan: a file of keys for an operator and for phones, if there is none.

    Nobody needs these keys: --pair and the links of --lan sign browsers in, and programs get keys
    of their own with --new-key.

    Raises:
        BadOption: it cannot be written.
    """
    if settings.lan and settings.keys and not settings.keys.exists():
        settings.keys.parent.mkdir(parents=True, exist_ok=True)
        add_key(settings.keys, LAN_OPERATOR, operator=True, option="--lan")
        add_key(settings.keys, LAN_PHONE, option="--lan")


def identity_of(settings: Settings) -> Identity:
    """Returns what identifies the clients; with --lan it makes their file if there is none.

    Raises:
        BadOption: the file of --keys cannot be used.
    """
    make_keys(settings)
    return Identity(
        KeyFile(settings.keys) if settings.keys else None,
        trusted=settings.host in LOOPBACK,
        operator_key=settings.operator_key,
        secret=secret_of(settings.data_dir),
        port=settings.port,
        limits=Client(
            max_waiting=settings.client_max_waiting or None,
            max_wait_seconds=settings.client_max_wait_s or None,
            max_requests_per_s=settings.client_max_requests_per_s or None,
        ),
    )


def chat_endpoint(settings: Settings, environ: Mapping[str, str]) -> ChatEndpoint:
    """The chat model that writes prompts, with its key from the environment."""
    key = environ.get("MFLUX_SERVER_EXPAND_KEY", "").strip()
    return ChatEndpoint(settings.expand_url, settings.expand_model, key)


def request_limits(settings: Settings) -> Limits:
    """What a request may contain."""
    return Limits(
        max_pixels=settings.max_pixels,
        max_steps=settings.max_steps,
        max_prompt_chars=settings.max_prompt_chars,
        max_count=settings.max_count,
        max_input_pixels=settings.max_input_pixels,
        callback_hosts=frozenset(name.lower() for name in settings.callback_hosts),
    )


def queue_limits(settings: Settings) -> QueueLimits:
    """What the queue may hold, and for how long."""
    return QueueLimits(
        max_queue=settings.max_queue,
        max_wait_s=settings.max_wait_s,
        keep_s=settings.keep_s,
        keep_bytes=settings.keep_bytes,
        max_kept_pictures=settings.max_kept_pictures,
        input_bytes=settings.input_bytes,
        refetch_s=settings.refetch_s,
        max_delay_s=settings.affinity_s,
        max_overtaken_s=settings.max_overtaken_s,
        preempt=settings.preempt,
        models_in_memory=settings.models_in_memory,
        local_worker=settings.local_worker,
    )


def allow(settings: Settings, has_gpu: bool, default_option: str = "--model") -> Allowed:
    """Builds what clients may use, from the options.

    Raises:
        BadOption: an option names a model or a folder that does not exist.
    """
    fallback, choices = _unnamed(settings, has_gpu)
    return read_allowed(
        read_catalog(),
        default=settings.model,
        allowed=settings.models or choices,
        path=settings.path,
        fallback=fallback,
        quantize=settings.quantize,
        quantize_choices=settings.quantize_choices,
        lora_dir=settings.lora_dir,
        allow_lora_repos=settings.allow_lora_repos,
        default_option=default_option,
        recognize=fitting_models,
        options=options_of(settings),
    )


def _unnamed(settings: Settings, has_gpu: bool) -> tuple[str, tuple[str, ...]]:
    """The model of an operator who has named none, and which ones tasks may name.

    It is one whose weights are here, or that can be downloaded: the usual one with a login at
    Hugging Face. Else the tiny model serves until the operator has chosen, also on the page.
    """
    if not has_gpu:
        return DEFAULT_MODEL_WITHOUT_GPU, ()
    if settings.model or settings.models or settings.path:
        return DEFAULT_MODEL, ()
    here = [name for name in (DEFAULT_MODEL, *FIRST_CHOICES) if _is_here(settings, name)]
    if here or has_login():
        return (here or [DEFAULT_MODEL])[0], ()
    return DEFAULT_MODEL_WITHOUT_GPU, (DEFAULT_MODEL_WITHOUT_GPU, *FIRST_CHOICES)


def _is_here(settings: Settings, name: str) -> bool:
    model = find_model(name)
    return model is not None and not needs_download(settings.data_dir, model)


def options_of(settings: Settings) -> BuildOptions:
    return BuildOptions(*(getattr(settings, name) for name in BuildOptions._fields))


def generator_of(
    settings: Settings, allowed: Allowed, previews: Previews, weights_cache: WeightsCache
) -> MfluxGenerator:
    return MfluxGenerator(
        settings.data_dir,
        models_in_memory=settings.models_in_memory,
        lora_path=allowed.lora,
        cache_limit_bytes=settings.cache_limit,
        guard=MemoryGuard(
            settings.memory_limit,
            prepare_mlx(),
            on=settings.memory_check,
            tiling=settings.vae_tiling,
            bits=settings.quantize_choices,
        ),
        previews=previews,
        weights_cache=weights_cache,
    )
