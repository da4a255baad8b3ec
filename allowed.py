"""What the operator permits: models, quantizations, adapters.

Clients choose names from these lists. What they send never becomes a path, and never causes a
download that the operator did not allow.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from errors import InvalidInput, ModelNotAllowed, NotSupported
from fields import Takes, given_of
from models import in_context
from models.helpers import FIBO_VLM, OF_CONTROL
from models.hub_cache import as_stored
from models.model_catalog import Catalog, LoadSpec, Lora, Model, Pipeline
from models.model_rules import broken_rule
from models.prompt_forms import WRITTEN, form_error
from task import GenerationParams, Stage

MOST_LISTED = 10
"""The largest number of allowed models that an error lists."""
_NAME = r"\w[\w.-]*"
LORA_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}(:{_NAME}(/{_NAME})*\.safetensors)?")


@dataclass(frozen=True)
class Allowed:
    """Args:
    default: the model of tasks that name none; the first of `models`.
    helpers: helper models (models/helpers.py).
    quantize: bits to quantize weights to if a task requests none.
    quantize_choices: other bits that tasks may request.
    lora_dir: folder of LoRAs (.safetensors), or None.
    allow_lora_repos: whether tasks may name LoRAs on Hugging Face, to be downloaded.
    """

    default: Model
    models: tuple[Model, ...]
    helpers: tuple[Model, ...] = ()
    quantize: int | None = None
    quantize_choices: tuple[int, ...] = ()
    lora_dir: Path | None = None
    allow_lora_repos: bool = False

    def model(self, name: str | None) -> Model:
        """Returns the model of this name or alias; the default model for None and "".

        Raises:
            ModelNotAllowed: there is none, or the operator does not allow it.
        """
        if not name:
            return self.default
        found = Catalog(self.models).find(name)
        if found is None:
            if len(self.models) <= MOST_LISTED:
                allowed = f" Allowed: {', '.join(model.name for model in self.models)}."
            else:
                alike = Catalog(self.models).like(name)
                allowed = f"{alike} GET /models lists the {len(self.models)} that are allowed."
            raise ModelNotAllowed(
                f"This server does not draw with a model {name[:100]!r}.{allowed}", field="model"
            )
        return found

    @property
    def first_spec(self) -> LoadSpec:
        """What the server starts with."""
        model = as_stored(self.default)
        return LoadSpec(model, model.pipelines[0], self.quantize)

    @property
    def upscalers(self) -> tuple[Model, ...]:
        """The models that upscale the images of others."""
        return tuple(model for model in self.models if model.upscaler)

    def upscaler(self, name: str | None, is_present: Callable[[Model], bool]) -> Model:
        """The upscaler of this name; for None, one that is present before one that is not.

        Raises:
            NotSupported: there is none.
        """
        upscalers = self.upscalers
        if not upscalers:
            raise NotSupported(
                "{field} needs an upscaler among the allowed models (seedvr2-3b).", field="upscale"
            )
        if name is None:
            return next(filter(is_present, upscalers), upscalers[0])
        found = Catalog(upscalers).find(name)
        if found is None:
            known = ", ".join(model.name for model in upscalers)
            raise NotSupported(
                f"There is no upscaler {name!r} on this server. Upscalers: {known}.",
                field="upscaler",
            )
        return found

    def bits(self, asked: int | None) -> int | None:
        """Returns the bits to quantize the weights to.

        Raises:
            NotSupported: the operator does not allow them.
        """
        if asked is None or asked == self.quantize:
            return self.quantize
        if asked not in self.quantize_choices:
            allowed = sorted({*self.quantize_choices, *([self.quantize] if self.quantize else [])})
            raise NotSupported(
                f"{{field}} {asked} is not allowed on this server. Allowed: "
                f"{', '.join(map(str, allowed)) or 'none; leave the field out'}.",
                field="quantize",
            )
        return asked

    def stages(self, params: GenerationParams, images_done: int = 0) -> tuple[Stage, ...]:
        """Returns the stages of a task, in order.

        Args:
            images_done: of its images, those that are stored.

        Raises:
            ModelNotAllowed, NotSupported: also for stored tasks, if an earlier start allowed
                more.
        """
        model = self.model(params.model)
        given = given_fields(params)
        if params.upscaler:
            given -= {Takes.UPSCALE, Takes.SOFTNESS}
        if model.upscaler:
            given -= {Takes.PROMPT}
        pipeline = model.pipeline_for(given)
        if pipeline is None:
            raise not_supported(model, given)
        if broken := broken_rule(model.name, pipeline.rules, params):
            raise NotSupported(broken.sentence, field=broken.field)
        model = as_stored(model)
        strength = params.control_strength if pipeline.loads_control_strength else None
        loras = self._loras(params, pipeline)
        weights = LoadSpec(model, pipeline, params.quantize, loras, strength)
        helping = self._helping(params, model, pipeline)
        if not params.upscaler:
            return (*helping, Stage(weights, params, images_done=images_done))
        upscaler = as_stored(self.model(params.upscaler))
        kept = {Takes.UPSCALE, Takes.SOFTNESS, Takes.STEPS, Takes.PROMPT, Takes.INIT_IMAGE}
        update: dict[str, object] = {"model": upscaler.name, "upscaler": None, "steps": 1}
        for name in set(Takes) - kept:
            update[name] = GenerationParams.model_fields[name].default
        enlarge = params.model_copy(update=update)
        drawn = params.model_copy(update={"upscale": None, "upscaler": None, "softness": None})
        enlarging = LoadSpec(upscaler, upscaler.pipelines[0], self.quantize)
        each = (weights, drawn), (enlarging, enlarge)
        return (*helping, *(Stage(*stage, images_done=images_done) for stage in each))

    def _loras(self, params: GenerationParams, pipeline: Pipeline) -> tuple[Lora, ...]:
        """Returns the LoRAs of a task: those of its pipeline and style, and its own.

        Raises:
            NotSupported: the operator does not allow one.
        """
        own = [pipeline.adapter] if pipeline.adapter else []
        if params.lora_style:
            own.append(in_context.style(params.lora_style))
        if own and not self.allow_lora_repos:
            field = "lora_style" if params.lora_style else "images"
            raise NotSupported(
                f"{{field}}: the LoRA {own[0].name} comes from Hugging Face, which the operator "
                "must allow (--allow-lora-repos).",
                field=field,
            )
        for lora in (*own, *params.loras):
            self.lora(lora.name)
        return (*own, *params.loras)

    def _helping(
        self, params: GenerationParams, model: Model, pipeline: Pipeline
    ) -> tuple[Stage, ...]:
        """Returns the stages of the helper models that have to run before the drawing.

        Raises:
            NotSupported: the operator does not allow one, or the model has no use for it.
        """
        if needs_json(pipeline, params):
            why = f"{model.name} draws from JSON. For plain text in {{field}}"
            return (self._helper_stage(FIBO_VLM, params, "prompt", why),)
        stages = []
        for number, control in enumerate(params.controls):
            field = "control_types" if number else "control_type"
            if control.type is not None and control.type not in pipeline.control_types:
                kinds = ", ".join(pipeline.control_types)
                raise NotSupported(
                    f"{{field}} of {model.name} must be one of {kinds}.", field=field
                )
            if control.type is not None and control.type in OF_CONTROL:
                alone = {"control_image": control.image, "control_images": ()}
                one = params.model_copy(update=alone)
                why = f"For {{field}} {control.type}"
                stage = self._helper_stage(OF_CONTROL[control.type], one, field, why)
                stages.append(replace(stage, control=number))
        return tuple(stages)

    def _helper_stage(self, helper: Model, params: GenerationParams, field: str, why: str) -> Stage:
        """
        Args:
            field, why: for the message if the operator does not allow it.
        """
        if helper.name not in {allowed.name for allowed in self.helpers}:
            raise NotSupported(
                f"{why}, the operator must allow the helper model {helper.name} (--models).",
                field=field,
            )
        alone: dict[str, object] = {"count": 1, "steps": 1, "image_strength": None}
        if helper.makes == "prompt":  # each is written
            alone["count"] = len(params.prompts) or 1
        else:
            alone["prompts"] = ()
        once = params.model_copy(update=alone)
        return Stage(LoadSpec(helper, helper.pipelines[0], params.quantize), once)

    def loras(self) -> dict[str, Path]:
        """The LoRAs in the operator's folder. A name is a path in it, without `.safetensors`."""
        if self.lora_dir is None:
            return {}
        return {
            path.relative_to(self.lora_dir).with_suffix("").as_posix(): path
            for path in sorted(self.lora_dir.rglob("*.safetensors"))
            if path.is_file()
        }

    def lora(self, name: str) -> str:
        """Returns what mflux loads a LoRA from: a file or a repository.

        Raises:
            NotSupported: there is none of this name.
        """
        loras = self.loras()
        if name in loras:
            return str(loras[name])
        is_repository = LORA_REPOSITORY.fullmatch(name) and not Path(name).exists()
        if self.allow_lora_repos and is_repository:  # mflux would load a local file of this name
            return name
        known = ", ".join(loras) or "none"
        raise NotSupported(
            f"There is no LoRA {name[:100]!r} on this server. LoRAs: {known}.", field="loras"
        )


def needs_json(pipeline: Pipeline, params: GenerationParams) -> bool:
    """Whether a pipeline draws from JSON and the prompt is plain text."""
    form = pipeline.rules.prompt
    prompts = params.prompts or (params.prompt,)
    return form in WRITTEN and any(form_error(form, prompt) for prompt in prompts)


def given_fields(params: GenerationParams) -> frozenset[Takes]:
    """Returns the fields of these params that only some pipelines take."""
    return given_of(vars(params)) - {Takes.STEPS, Takes.GUIDANCE} | {Takes.PROMPT}


def not_supported(model: Model, given: frozenset[Takes]) -> NotSupported | InvalidInput:
    """Returns the error for the first field that the model does not take, or that is missing."""
    for name in Takes:
        if name in given - model.takes - model.ignored:
            return NotSupported(f"{model.name} has no {{field}}.", field=name)
    able = [pipeline for pipeline in model.pipelines if given <= pipeline.takes]
    if able:
        lacking = min((pipeline.needs - given for pipeline in able), key=len)
        name = next(name for name in Takes if name in lacking)
        return InvalidInput(f"{model.name} needs {{field}}.", field=name)
    first, second = _at_odds(model, given)
    return NotSupported(f"{model.name} takes {first} or {{field}}, not both.", field=second)


def _at_odds(model: Model, given: frozenset[Takes]) -> tuple[str, str]:
    ordered = [name for name in Takes if name in given]
    for number, first in enumerate(ordered):
        for second in ordered[number + 1 :]:
            if not any({first, second} <= pipeline.takes for pipeline in model.pipelines):
                return first, second
    return ordered[0], ordered[-1]
