"""The routes about models: what there is, what is loaded, and loading one ahead."""

from collections.abc import Callable
from pathlib import Path

from flask import Response, request

import errors
from allowed import Allowed
from api.answers import json_response
from api.api_docs import documented, in_path, json_answer, query
from api.audit import audit
from api.generate_request import PICTURES
from api.identity import check_operator
from api.model_answers import (
    DownloadAnswer,
    HelperAnswer,
    LoadAnswer,
    LoraAnswer,
    LoraModelAnswer,
    ModelAnswer,
    ModelsAnswer,
    WildcardsAnswer,
)
from api.routes import route
from api.submission import Submission
from fields import SCHEDULERS, Takes
from models.helpers import HELPERS, OF_CONTROL
from models.hub_cache import bytes_on_disk, is_present
from models.model_catalog import Catalog, LoadSpec, LoraFit, Model
from models.model_rules import MOST_SIDE, SIDE_STEP
from queue_manager import QueueManager
from scheduler.health import QueueHealth
from timing_model import LOCAL

MODEL_NAME = in_path("name", "Of the model, or an alias.")

MACHINE = query(
    "machine",
    "Of a worker, as GET /machines names it; absent: the server's own.",
    {"type": "string", "minLength": 1, "maxLength": 200},
)


class ModelRoutes:
    def __init__(
        self,
        queue: QueueManager,
        submission: Submission,
        catalog: Catalog,
        fit_of_adapter: Callable[[Path, LoadSpec], LoraFit],
    ) -> None:
        self._queue = queue
        self._allowed = submission.allowed
        self._catalog = catalog
        self._wildcards = submission.wildcards
        self._fit_of_adapter = fit_of_adapter

    @route("GET", "/models")
    @documented(
        "List the models",
        tag="models",
        description="All that mflux has, those that tasks may name first.",
        answers={200: json_answer(ModelsAnswer, "The models.")},
        errors=(),
    )
    def list_models(self) -> Response:
        allowed, health = self._allowed, self._queue.health()
        names = {model.name for model in allowed.models}
        others = [model for model in self._catalog.models if model.name not in names]
        return json_response(
            ModelsAnswer(
                default=allowed.default.name,
                models=[
                    model_answer(model, allowed, health) for model in (*allowed.models, *others)
                ],
                helpers=[helper_answer(helper, allowed) for helper in HELPERS.values()],
                loras=[self._lora_answer(name, path) for name, path in allowed.loras().items()],
                schedulers=list(SCHEDULERS),
                quantize=[allowed.quantize] if allowed.quantize else [],
                quantize_choices=list(allowed.quantize_choices),
            )
        )

    @route("GET", "/wildcards")
    @documented(
        "List the wildcards",
        tag="models",
        description="Names that `__name__` in a prompt may have, with `expand_wildcards`.",
        answers={200: json_answer(WildcardsAnswer, "The names.")},
        errors=(),
    )
    def list_wildcards(self) -> Response:
        return json_response(WildcardsAnswer(wildcards=self._wildcards.names()))

    @route("GET", "/models/<name>")
    @documented(
        "One model",
        tag="models",
        parameters=[MODEL_NAME],
        answers={200: json_answer(ModelAnswer, "The model.")},
        errors=(errors.UnknownModel,),
    )
    def one_model(self, name: str) -> Response:
        model = self._find(name)
        return json_response(model_answer(model, self._allowed, self._queue.health()))

    @route("POST", "/models/<name>/load")
    @documented(
        "Load a model ahead",
        tag="models",
        description="For the operator: the model is loaded after the task that runs, so that the "
        "first task that names it does not wait for that. GET /health shows when it is ready.",
        parameters=[MODEL_NAME, MACHINE],
        answers={200: json_answer(LoadAnswer, "It will be loaded, or is already.")},
        errors=(
            errors.OperatorOnly,
            errors.UnknownMachine,
            errors.UnknownModel,
            errors.ModelNotAllowed,
            errors.NoWorker,
        ),
    )
    def load_model(self, name: str) -> Response:
        check_operator()
        model = self._allowed.model(self._find(name).name)
        weights = LoadSpec(model, model.pipelines[0], self._allowed.quantize)
        machine = request.args.get("machine", LOCAL)
        loaded = self._queue.control.order_load(weights, machine)
        if not loaded:
            audit(f"ordered model {model.name} to be loaded on {machine[:100]!r}")
        return json_response(LoadAnswer(model=model.name, loaded=loaded))

    def _lora_answer(self, name: str, path: Path) -> LoraAnswer:
        answer = LoraAnswer(name=name, keys=0, models=[])
        for model in self._allowed.models:
            pipeline = next((one for one in model.pipelines if one.loras), None)
            if pipeline is None:
                continue
            fit = self._fit_of_adapter(path, LoadSpec(model, pipeline, None))
            answer.rank, answer.keys = answer.rank or fit.rank, max(answer.keys, fit.keys)
            if fit.reason:
                answer.unusable = fit.reason
            else:
                answer.models.append(LoraModelAnswer(name=model.name, keys=fit.matched))
        if answer.models:
            answer.unusable = None
        return answer

    def _find(self, name: str) -> Model:
        catalog = self._catalog
        model = Catalog(self._allowed.models).find(name) or catalog.find(name)
        if model is None:
            raise errors.UnknownModel(
                f"mflux has no model {name[:100]!r}.{catalog.like(name)} GET /models lists all.",
                field="name",
            )
        return model


def model_answer(model: Model, allowed: Allowed, health: QueueHealth) -> ModelAnswer:
    all_rules = [pipeline.rules for pipeline in model.pipelines]
    return ModelAnswer(
        name=model.name,
        title=model.title,
        family=model.family,
        classes=list(dict.fromkeys(pipeline.name for pipeline in model.pipelines)),
        aliases=list(model.aliases),
        default_steps=model.default_steps,
        default_guidance=model.default_guidance,
        takes=[name for name in Takes if name in model.takes or _always(name, allowed)],
        needs=[name for name in Takes if name in model.needs],
        mask_of=[name for name in Takes if name in model.mask_of],
        pictures_together=pictures_together(model),
        schedulers=list(model.schedulers),
        control_types=control_types(model, allowed),
        presets=[name for rules in all_rules for name in rules.presets],
        least_steps=min((rules.least_steps for rules in all_rules), default=1),
        most_images=model.most_images,
        side_step=max((rules.side_step for rules in all_rules), default=SIDE_STEP),
        least_side=min((rules.sides[0] for rules in all_rules), default=SIDE_STEP),
        most_side=max((rules.sides[1] for rules in all_rules), default=MOST_SIDE),
        repositories=list(model.repositories),
        options=sorted(frozenset().union(*(one.options for one in model.pipelines))),
        options_in_use=list(model.options.in_use),
        gated=model.gated,
        weights_gb=model.weights_gb,
        allowed=any(model.name == other.name for other in allowed.models),
        loaded=any(model.name == weights.model.name for weights in health.loaded),
        present=is_present(model),
        bytes_on_disk=bytes_on_disk(model),
    )


def pictures_together(model: Model) -> list[list[Takes]]:
    """The fields with pictures that each class takes, without lists that are part of another."""
    sets = dict.fromkeys(pipeline.takes.intersection(PICTURES) for pipeline in model.pipelines)
    return [
        [name for name in Takes if name in one] for one in sets if not any(one < o for o in sets)
    ]


def control_types(model: Model, allowed: Allowed) -> list[str]:
    """Values of control_type that a model takes and whose helper the operator allows."""
    helpers = {helper.name for helper in allowed.helpers}
    taken = dict.fromkeys(kind for pipeline in model.pipelines for kind in pipeline.control_types)
    return [kind for kind in taken if kind not in OF_CONTROL or OF_CONTROL[kind].name in helpers]


def helper_answer(helper: Model, allowed: Allowed) -> HelperAnswer:
    return HelperAnswer(
        name=helper.name,
        title=helper.title,
        repositories=list(helper.repositories),
        gated=helper.gated,
        weights_gb=helper.weights_gb,
        allowed=helper in allowed.helpers,
        present=is_present(helper),
        bytes_on_disk=bytes_on_disk(helper),
    )


def _always(name: Takes, allowed: Allowed) -> bool:
    """An upscaler enlarges the pictures of every model."""
    return name in (Takes.UPSCALE, Takes.SOFTNESS) and bool(allowed.upscalers)


def download_answer(health: QueueHealth) -> DownloadAnswer | None:
    """How far the weights are that come from Hugging Face: for tasks that wait, or for the worker,
    which fetches what the server starts with itself. None: nothing comes."""
    if health.download is not None:
        weights, bytes_done = health.download.spec, health.download.bytes_done
    elif health.loading is not None and not is_present(health.loading.model):
        weights, bytes_done = health.loading, bytes_on_disk(health.loading.model)
    else:
        return None
    return DownloadAnswer.of(weights.model, bytes_done)
