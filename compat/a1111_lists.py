"""The other routes of AUTOMATIC1111's API: options, models, samplers, memory, and ControlNet's."""

from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, jsonify, request

import errors
from api.api_docs import View, documented
from api.request_body import json_body
from api.routes import route
from compat.a1111 import NOTHING
from compat.a1111_checkpoint import Checkpoint
from compat.a1111_controlnet import READY, SCRIPT, controlled
from compat.a1111_errors import A1111_ERRORS, TAG
from compat.bodies import Body, read_body
from compat.sync_calls import SyncCalls
from fields import MOST_CONTROLS
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
"""The options that clients read. They have no effect."""
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
    "lycos",
)
NOTHING_TO_DO = {
    "unload-checkpoint": "the queue decides what is in memory",
    "reload-checkpoint": "the queue decides what is in memory",
    "refresh-checkpoints": "the lists are read at each request",
    "refresh-loras": "the lists are read at each request",
    "refresh-vae": "there are none",
    "refresh-embeddings": "there are none",
}
"""POST routes without an effect, with the reason."""
A_LIST = {"type": "array", "items": {"type": "object"}}
AN_OBJECT = {"type": "object"}
ALWAYS_EMPTY = {
    "description": "Always empty",
    "content": {"application/json": {"schema": A_LIST}},
}


class Options(Body):
    """The body of POST /sdapi/v1/options: what GET answers, or a part of it."""

    sd_model_checkpoint: str | None = None


def _described(summary: str, answer: dict[str, Any]) -> Callable[[View], View]:
    return documented(summary, tag=TAG, answers={200: answer}, errors=(), shape=A1111_ERRORS)


def listed(path: str, summary: str, schema: dict[str, Any]) -> Callable[[View], View]:
    """A route that takes no parameters and answers JSON of this schema."""
    answer = {"description": summary, "content": {"application/json": {"schema": schema}}}

    def describe(view: View) -> View:
        return route("GET", f"/{path}")(_described(summary, answer)(view))

    return describe


class A1111Lists:
    def __init__(
        self, calls: SyncCalls, checkpoint: Checkpoint, memory: Callable[[], Memory]
    ) -> None:
        self._calls = calls
        self._checkpoint = checkpoint
        self._memory = memory

    @listed("options", "The options, as clients expect them", AN_OBJECT)
    def options(self) -> Response:
        return jsonify(OPTIONS | {"sd_model_checkpoint": self._checkpoint.model.name})

    @route("POST", "/options")
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
    def set_options(self) -> Response:
        with self._calls.room_for_the_body(request.content_length):
            asked = read_body(Options, json_body())
        self._checkpoint.choose(asked.sd_model_checkpoint)
        return jsonify(None)

    @listed("sd-models", "The models that may be named", A_LIST)
    def models(self) -> Response:
        return jsonify(
            [
                {
                    "title": model.name,
                    "model_name": model.name,
                    "hash": None,
                    "sha256": None,
                    "filename": f"{model.name}.safetensors",
                    "config": None,
                }
                for model in self._calls.allowed.models
                if not model.upscaler
            ]
        )

    @listed("samplers", "One: the models have their own", A_LIST)
    def samplers(self) -> Response:
        return jsonify([{"name": "Euler", "aliases": ["k_euler"], "options": {}}])

    @listed("schedulers", "The schedulers", A_LIST)
    def schedulers(self) -> Response:
        labels = {"automatic": "Automatic"} | {
            name: name for name in self._checkpoint.model.schedulers
        }
        rest = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
        return jsonify([{"name": name, "label": label, **rest} for name, label in labels.items()])

    @listed("upscalers", "The upscalers that the operator allows", A_LIST)
    def upscalers(self) -> Response:
        names = ["None", *(model.name for model in self._calls.allowed.upscalers)]
        nothing = {"model_name": None, "model_path": None, "model_url": None}
        return jsonify(
            [{"name": name, **nothing, "scale": 1 if name == "None" else 4} for name in names]
        )

    @listed("loras", "The operator's LoRAs", A_LIST)
    def loras(self) -> Response:
        return jsonify(
            [
                {"name": name, "alias": name, "path": f"{name}.safetensors", "metadata": {}}
                for name in self._calls.allowed.loras()
            ]
        )

    @listed("embeddings", "Always empty", AN_OBJECT)
    def embeddings(self) -> Response:
        return jsonify({"loaded": {}, "skipped": {}})

    @listed("scripts", "ControlNet, where a model follows a control", AN_OBJECT)
    def scripts(self) -> Response:
        names = [SCRIPT] if controlled(self._calls) else []
        return jsonify({"txt2img": names, "img2img": names})

    @listed("cmd-flags", "The flags that clients read", AN_OBJECT)
    def cmd_flags(self) -> Response:
        return jsonify({"api": True})

    @listed("memory", "The memory, as MLX counts it", AN_OBJECT)
    def memory(self) -> Response:
        now = self._memory()
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
        return jsonify({"ram": system, "cuda": cuda})


class ControlNetRoutes:
    """The lists of the extension, under /controlnet."""

    def __init__(self, calls: SyncCalls) -> None:
        self._calls = calls

    @listed("version", "The version of the extension's API", AN_OBJECT)
    def version(self) -> Response:
        return jsonify({"version": 3})

    @listed("model_list", "The models that follow a control", AN_OBJECT)
    def model_list(self) -> Response:
        return jsonify({"model_list": self._models()})

    @listed("module_list", "What can be extracted from a picture", AN_OBJECT)
    def module_list(self) -> Response:
        modules = self._modules()
        details = {name: {"model_free": False, "sliders": []} for name in modules}
        return jsonify({"module_list": modules, "module_detail": details})

    @listed("control_types", "Both of these lists", AN_OBJECT)
    def control_types(self) -> Response:
        models = self._models()
        every = {
            "module_list": self._modules(),
            "model_list": ["None", *models],
            "default_option": "none",
            "default_model": models[0] if models else "None",
        }
        return jsonify({"control_types": {"All": every}})

    @listed("settings", "How many units a request may have", AN_OBJECT)
    def settings(self) -> Response:
        return jsonify({"control_net_unit_count": MOST_CONTROLS + 1})

    def _models(self) -> list[str]:
        return [model.name for model in controlled(self._calls)]

    def _modules(self) -> list[str]:
        kinds = {
            kind
            for model in controlled(self._calls)
            for pipeline in model.pipelines
            for kind in pipeline.control_types
            if kind != READY
        }
        return ["none", *sorted(kinds)]


class GradioRoutes:
    """A route of the web page of AUTOMATIC1111 that clients call to see whether it is there."""

    def __init__(self, calls: SyncCalls) -> None:
        self._calls = calls

    @listed("queue/status", "How many tasks of the caller are unfinished", AN_OBJECT)
    def queue_status(self) -> Response:
        _, unfinished = self._calls.own_queue().unfinished(0, 0, lambda task: True)
        return jsonify({"msg": "estimation", "queue_size": unfinished})


def without_effect(name: str, url_prefix: str) -> Blueprint:
    """Adds the routes without content or effect."""
    blueprint = Blueprint(name, __name__, url_prefix=url_prefix)
    for path in EMPTY_LISTS:
        empty = _described("Always empty", ALWAYS_EMPTY)(lambda: jsonify([]))
        blueprint.add_url_rule(f"/{path}", path, empty)
    for path, why in NOTHING_TO_DO.items():
        ignore = _described(f"Accepted and ignored: {why}", NOTHING)(lambda: jsonify({}))
        blueprint.add_url_rule(f"/{path}", path, ignore, methods=["POST"])
    return blueprint
