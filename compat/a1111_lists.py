"""What AUTOMATIC1111's clients ask around a picture: options, models, samplers, memory."""

from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, jsonify, request

import errors
from api.api_docs import documented
from api.request_body import json_body
from compat.a1111 import A1111_ERRORS, NOTHING, TAG, Checkpoint
from compat.bodies import Body, read_body
from compat.sync_calls import SyncCalls
from fields import SCHEDULERS
from task import Memory

OPTIONS: dict[str, Any] = {
    "samples_save": False,
    "samples_format": "png",
    "sd_checkpoint_hash": "",
    "sd_vae": "Automatic",
    "CLIP_stop_at_last_layers": 1,
    "eta_noise_seed_delta": 0,
    "live_previews_enable": True,
    "show_progress_every_n_steps": 1,
    "enable_pnginfo": True,
}
"""Those that clients read; none of them changes anything."""
EMPTY_LISTS = (
    "latent-upscale-modes",
    "sd-vae",
    "sd-modules",
    "hypernetworks",
    "face-restorers",
    "realesrgan-models",
    "prompt-styles",
    "script-info",
    "extensions",
)
NOTHING_TO_DO = {
    "unload-checkpoint": "the queue decides what is in memory",
    "reload-checkpoint": "the queue decides what is in memory",
    "refresh-checkpoints": "the lists are read at each request",
    "refresh-loras": "the lists are read at each request",
    "refresh-vae": "there are none",
    "refresh-embeddings": "there are none",
}
"""Routes that take POST, and why they do nothing."""
A_LIST = {"type": "array", "items": {"type": "object"}}
AN_OBJECT = {"type": "object"}


class Options(Body):
    """The body of POST /sdapi/v1/options: what GET answers, or a part of it."""

    sd_model_checkpoint: str | None = None


def a1111_lists(
    calls: SyncCalls, checkpoint: Checkpoint, memory: Callable[[], Memory]
) -> Blueprint:
    routes = Blueprint("a1111_lists", __name__, url_prefix="/sdapi/v1")

    def tell(name: str, summary: str, schema: dict[str, Any], answer: Callable[[], Any]) -> None:
        """A route without parameters."""
        described = {"description": summary, "content": {"application/json": {"schema": schema}}}
        view = documented(
            summary, tag=TAG, answers={200: described}, errors=(), shape=A1111_ERRORS
        )(lambda: jsonify(answer()))
        routes.add_url_rule(f"/{name}", name, view)

    @routes.post("/options")
    @documented(
        "Choose the model of requests that name none",
        tag=TAG,
        description="Only where the operator allows it (--sdapi-model-switch). What GET answers "
        "may be posted back; other options are ignored.",
        content={"application/json": {"schema": AN_OBJECT}},
        answers={200: NOTHING},
        errors=(
            errors.InvalidInput,
            errors.BodyTooLarge,
            errors.UnsupportedMediaType,
            errors.TooManyWaiting,
            errors.OperatorOnly,
            errors.ModelNotAllowed,
        ),
        shape=A1111_ERRORS,
    )
    def set_options() -> Response:
        with calls.room_for_the_body(request.content_length):
            asked = read_body(Options, json_body())
        checkpoint.choose(asked.sd_model_checkpoint)
        return jsonify(None)

    def models() -> list[dict[str, Any]]:
        return [
            {
                "title": model.name,
                "model_name": model.name,
                "hash": None,
                "sha256": None,
                "filename": f"{model.name}.safetensors",
                "config": None,
            }
            for model in calls.allowed.models
            if not model.upscaler
        ]

    def upscalers() -> list[dict[str, Any]]:
        names = ["None", *([calls.allowed.upscaler.name] if calls.allowed.upscaler else [])]
        nothing = {"model_name": None, "model_path": None, "model_url": None}
        return [{"name": name, **nothing, "scale": 1 if name == "None" else 4} for name in names]

    def schedulers() -> list[dict[str, Any]]:
        labels = {"automatic": "Automatic"} | {name: name for name in SCHEDULERS}
        rest = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
        return [{"name": name, "label": label, **rest} for name, label in labels.items()]

    def loras() -> list[dict[str, Any]]:
        return [
            {"name": name, "alias": name, "path": f"{name}.safetensors", "metadata": {}}
            for name in calls.allowed.loras()
        ]

    def memory_told() -> dict[str, Any]:
        now = memory()
        free = max(now.total_bytes - now.active_bytes - now.cache_bytes, 0)
        system = {"free": free, "used": now.total_bytes - free, "total": now.total_bytes}
        active = {"current": now.active_bytes, "peak": now.peak_bytes}
        nothing = {"current": 0, "peak": 0}
        cuda = {
            "system": system,
            "active": active,
            "allocated": active,
            "reserved": active,
            "inactive": nothing,
            "events": {"retries": 0, "oom": 0},
        }
        return {"ram": system, "cuda": cuda}

    tell(
        "options",
        "The options, as clients expect them",
        AN_OBJECT,
        lambda: OPTIONS | {"sd_model_checkpoint": checkpoint.model.name},
    )
    tell("sd-models", "The models that may be named", A_LIST, models)
    tell(
        "samplers",
        "One: the models have their own",
        A_LIST,
        lambda: [{"name": "Euler", "aliases": ["k_euler"], "options": {}}],
    )
    tell("schedulers", "The schedulers", A_LIST, schedulers)
    tell("upscalers", "The upscaler, where the operator allows one", A_LIST, upscalers)
    for name in EMPTY_LISTS:
        tell(name, "Always empty", A_LIST, list)
    tell("loras", "The operator's adapters", A_LIST, loras)
    tell("embeddings", "Always empty", AN_OBJECT, lambda: {"loaded": {}, "skipped": {}})
    tell("scripts", "Always empty", AN_OBJECT, lambda: {"txt2img": [], "img2img": []})
    tell("cmd-flags", "The flags that clients read", AN_OBJECT, lambda: {"api": True})
    tell("memory", "The memory, as MLX counts it", AN_OBJECT, memory_told)

    for name, why in NOTHING_TO_DO.items():
        ignore = documented(
            f"Accepted and ignored: {why}",
            tag=TAG,
            answers={200: NOTHING},
            errors=(),
            shape=A1111_ERRORS,
        )(lambda: jsonify({}))
        routes.add_url_rule(f"/{name}", name, ignore, methods=["POST"])

    return routes
