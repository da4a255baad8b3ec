"""The groups of options in --help and docs/options.md, and what stands for their values.

An option that is in no group is in the last one.
"""

from collections.abc import Sequence
from dataclasses import Field
from typing import Any

GROUPS = {
    "server": (
        "config check host port data_dir drain_s log_level log_format log_prompts public_url "
        "keep_awake traces"
    ),
    "models": (
        "model quantize quantize_choices path models models_in_memory unload_after_s lora_dir "
        "allow_lora_repos wildcards_dir expand_url expand_model download"
    ),
    "limits": (
        "max_queue max_pixels max_steps max_prompt_chars max_count max_input_pixels max_wait_s "
        "sync_max_wait_s max_body_bytes memory_limit"
    ),
    "clients": (
        "keys new_key pair operator_key client_max_waiting client_max_wait_s "
        "client_max_requests_per_s"
    ),
    "network": (
        "allowed_hosts cors_origins trusted_proxies lan bonjour callback_hosts callback_key broker "
        "local_worker worker_name lease_s"
    ),
    "storage": (
        "keep_s keep_bytes max_kept_pictures input_bytes refetch_s weights_cache metadata "
        "mark_generated"
    ),
}
LAST = "advanced"


def grouped(options: Sequence[Field[Any]]) -> dict[str, list[Field[Any]]]:
    """The options by group, in the order of GROUPS, and each group in its order."""
    by_name = {option.name: option for option in options}
    groups = {
        title: [by_name.pop(name) for name in names.split() if name in by_name]
        for title, names in GROUPS.items()
    }
    return {**groups, LAST: list(by_name.values())}


def metavar_of(option: Field[Any]) -> str | None:
    """What stands for the value of an option in --help. None: its choices do."""
    metadata = option.metadata
    if metadata["metavar"] or metadata["choices"]:
        return metadata["metavar"] or None
    if not isinstance(option.default, int):
        return option.name.rpartition("_")[2].upper()
    if option.name.endswith("_s") and not option.name.endswith("per_s"):
        return "SECONDS"
    return "BYTES" if option.name.endswith("bytes") else "N"
