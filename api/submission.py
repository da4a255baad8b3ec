"""Turns a request into params: defaults, sizes, images, and what the model takes.

Every API, native or foreign, submits through here.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Semaphore

import errors
from allowed import Allowed
from api.client_queue import OwnQueue
from api.generate_request import PICTURES, GenerateRequest, Limits
from api.image_size import sized
from api.input_pictures import InputPictures, MaskReading
from api.request_body import return_freed_memory
from api.request_checks import check_fields, check_limits, has_pictures
from api.waiting_places import RETRY_AFTER_S, WaitingPlaces
from api.wildcards import Wildcards
from decoding.decoder import PictureDecoder
from decoding.protocol import Meaning
from fields import MASK_FEATHER, Takes
from models.hub_cache import is_present
from models.model_catalog import LoadSpec, Model, Pipeline
from models.prompt_forms import PromptForm
from task import MAX_SEED, GenerationParams, Stage

LARGE_BODY_BYTES = 1_000_000
LARGE_BODIES = 4
"""Larger bodies that are parsed and decoded at a time, each in several copies. Others wait as they
were received."""
LARGE_BODY_WAIT_S = 30.0
"""Seconds that a large body waits before it is refused."""
IMAGE_STRENGTH = 0.4
"""The default of mflux."""


@dataclass
class Prepared:
    """Complete params and their input images."""

    params: GenerationParams
    inputs: dict[str, bytes] = field(default_factory=dict)
    """PNG bytes by InputImage.file."""
    ignored_fields: list[str] = field(default_factory=list)


class Submission:
    """Args:
    refusal: why a picture of this stage would not be drawn, or None.
    places: for requests that wait.
    decoder: reads the pictures; default: one of its own.
    check_adapters: answers a warning for each adapter that fits the model in part, and raises
        UnusableAdapter for one that does not fit.
    expands: whether there is a chat model that writes prompts.
    wildcards: for prompts.
    metadata: whether image files tell how they were made, where a client does not say.
    is_present: whether the weights of a model are on this machine.
    """

    def __init__(
        self,
        own_queue: OwnQueue,
        allowed: Allowed,
        limits: Limits,
        refusal: Callable[[Stage], errors.ServerError | None],
        *,
        places: WaitingPlaces,
        decoder: PictureDecoder | None = None,
        check_adapters: Callable[[LoadSpec], tuple[str, ...]] = lambda weights: (),
        metadata: bool = True,
        expands: bool = False,
        wildcards: Wildcards | None = None,
        is_present: Callable[[Model], bool] = is_present,
    ) -> None:
        self._is_present = is_present
        self._expands = expands
        self.wildcards = wildcards or Wildcards()
        self._check_adapters = check_adapters
        self.allowed = allowed
        self.limits = limits
        self._own_queue = own_queue
        self._refusal = refusal
        self._places = places
        self._metadata = metadata
        self.decoder = decoder or PictureDecoder(limits.max_input_pixels, places.place)
        self._large_bodies = Semaphore(LARGE_BODIES)

    @contextmanager
    def room_for_the_body(self, content_length: int | None) -> Iterator[None]:
        """Hold this from reading a body until its task is submitted. Waits for a large body.

        Raises:
            TooManyWaiting
        """
        if (content_length or 0) <= LARGE_BODY_BYTES:
            yield
            return
        try:
            with self._places.place():
                if not self._large_bodies.acquire(timeout=LARGE_BODY_WAIT_S):
                    raise errors.TooManyWaiting(retry_after_s=RETRY_AFTER_S)
                try:
                    yield
                finally:
                    self._large_bodies.release()
        finally:
            return_freed_memory()

    def prepare(
        self,
        request: GenerateRequest,
        *,
        mask_meaning: Meaning = Meaning.MASK,
        invert_mask: bool = False,
        empty_prompt: bool = False,
    ) -> Prepared:
        """Fill in defaults and a random seed, decode pictures, round the size, check everything.

        Args:
            mask_meaning: how the mask of this request is to be read.
            invert_mask: whether it is black where to repaint.
            empty_prompt: whether the prompt may be empty without a picture, too.

        Raises:
            InvalidInput, ModelNotAllowed, NotSupported, UnusableAdapter, DoesNotFit: with the field
                at fault.
            UnknownTask, NotReady, Gone: of a task whose picture is asked for.
            TooManyWaiting: its pictures cannot be decoded now.
        """
        model = self.allowed.model(request.model)
        pipeline = check_fields(request, model, empty_prompt)
        check_limits(request, model, self.limits)
        if request.callback_url is not None and not self.limits.may_call(request.callback_url):
            raise errors.NotSupported(
                "{field} must be an http or https address of a host that the operator allows "
                "(--callback-hosts).",
                field="callback_url",
            )
        if request.expand:
            self._check_expandable(model, pipeline)
        params = self._without_pictures(request, model, pipeline)
        prepared = Prepared(params)
        if has_pictures(request):
            mask = MaskReading(mask_meaning, invert_mask)
            with self.decoder.reading() as reader:
                pictures = InputPictures(reader, request, self._own_queue(), mask)
                source = pictures.size_of_source(model)
                params = sized(request, pipeline, params, source, self.limits)
                params = params.model_copy(update=pictures.decoded(params, model))
            prepared.inputs = pictures.inputs
            params = self._with_strengths(params, pipeline)
        else:
            params = sized(request, pipeline, params, None, self.limits)
        stages = self.allowed.stages(params)
        drawing = next(stage for stage in stages if not stage.load_spec.model.makes)
        if params.loras:
            warnings = self._check_adapters(drawing.load_spec)
            params = params.model_copy(update={"warnings": warnings})
        for stage in stages:
            if refusal := self._refusal(stage):
                if stage.load_spec.model.name == params.upscaler:
                    refusal.field = "upscale"
                raise refusal
        prepared.params = params
        prepared.ignored_fields = ignored_fields(request, params)
        return prepared

    def check_repeated(self, request: GenerateRequest, known: GenerationParams, key: str) -> None:
        """A request whose key is known asks for what it asked for before. An earlier result that it
        starts from may have gone since.

        Args:
            known: of the task of this key.
            key: name of the header or the field that it came with.

        Raises:
            KeyReused: it asks for something else.
        """
        if known.asked != request.digest and known.asked:
            raise errors.KeyReused(field=key)
        with suppress(errors.UnknownTask, errors.NotReady, errors.Gone):
            given: dict[str, object] = {}
            if has_pictures(request):
                with self.decoder.reading() as reader:
                    pictures = InputPictures(reader, request, self._own_queue(), MaskReading())
                    given = pictures.decoded(known, self.allowed.model(known.model))
            check_same(known, known.model_copy(update=dict.fromkeys(PICTURES) | given), key)

    def _check_expandable(self, model: Model, pipeline: Pipeline) -> None:
        """Raises: NotSupported: no prompt can be written for this model."""
        if not self._expands:
            raise errors.NotSupported(
                "{field}: this server has no chat model that writes prompts (--expand-url).",
                field="expand",
            )
        if pipeline.rules.prompt is not PromptForm.TEXT:
            raise errors.NotSupported(
                f"{model.name} has no {{field}}: its prompts are JSON.", field="expand"
            )

    def _without_pictures(
        self, request: GenerateRequest, model: Model, pipeline: Pipeline
    ) -> GenerationParams:
        rules = pipeline.rules
        upscaler = None
        if request.upscale is not None and not model.upscaler:
            upscaler = self.allowed.upscaler(request.upscaler, self._is_present).name
        usual_steps = rules.presets.get(request.preset or "", model.default_steps)
        steps = min(usual_steps, self.limits.max_steps) if request.steps is None else request.steps
        guidance = model.default_guidance if request.guidance is None else request.guidance
        needed = rules.guidance_idle_without
        if Takes.GUIDANCE not in pipeline.takes or (needed and getattr(request, needed) is None):
            guidance = None
        defaulted = ["guidance"] if request.guidance is None else []
        if request.steps is None and steps == usual_steps:
            defaulted.append("steps")
        passed = request.passed() | {
            "guidance": guidance,
            "quantize": self.allowed.bits(request.quantize),
            "expand": request.expand and any(text.strip() for text in request.prompts),
            "upscaler": upscaler,
        }
        passed |= dict.fromkeys(rules.ignored)
        differ = len(request.prompts) > 1 or request.expand_wildcards
        params = GenerationParams(
            **passed,
            prompt=request.prompts[0],
            prompts=tuple(request.prompts) if differ else (),
            seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
            width=request.width,
            height=request.height,
            steps=steps,
            model=model.name,
            count=max(request.count or request.n or 1, len(request.prompts)),
            loras=tuple((lora.name, lora.scale) for lora in request.loras or ()),
            metadata=self._metadata if request.metadata is None else request.metadata,
            defaulted=tuple(defaulted),
            asked=request.digest,
        )
        if not differ:
            return params
        return self._with_prompts(params, expand=request.expand_wildcards)

    def _with_prompts(self, params: GenerationParams, *, expand: bool) -> GenerationParams:
        """With the prompt of each image, or one for all if they are the same.

        Args:
            params: its `prompts` are those of the request.
            expand: replace wildcards.
        """
        texts = params.prompts if len(params.prompts) > 1 else params.prompts * params.count
        if expand:
            most_chars = self.limits.max_prompt_chars
            texts = tuple(
                self.wildcards.expanded(text, params.seed_of(index), most_chars)
                for index, text in enumerate(texts)
            )
        alike = len(set(texts)) == 1
        return params.model_copy(update={"prompt": texts[0], "prompts": () if alike else texts})

    def _with_strengths(self, params: GenerationParams, pipeline: Pipeline) -> GenerationParams:
        """With the usual strengths and mask_feather if the request gives none and the pipeline
        takes them."""
        if params.control_image and params.control_strength is None:
            strength = pipeline.rules.control_strength
            params = params.model_copy(update={"control_strength": strength})
        takes_strength = Takes.IMAGE_STRENGTH in pipeline.takes
        if params.init_image and params.image_strength is None and takes_strength:
            params = params.model_copy(update={"image_strength": IMAGE_STRENGTH})
        if pipeline.inpaints and params.mask_feather is None:
            params = params.model_copy(update={"mask_feather": MASK_FEATHER})
        if params.steps_run < 1:
            raise errors.InvalidInput(
                f"{{field}} must be more than {params.steps}: {params.image_strength:.0%} of the "
                "input image is kept, which leaves no step to draw.",
                field="steps",
            )
        return params


def check_same(known: GenerationParams, asked: GenerationParams, key: str) -> None:
    """The task of a key does what is asked for with this key.

    Raises:
        KeyReused
    """

    def pictures(params: GenerationParams) -> list[object]:
        return [getattr(params, name) or None for name in PICTURES]

    if known.asked and (known.asked, pictures(known)) != (asked.asked, pictures(asked)):
        raise errors.KeyReused(field=key)


def ignored_fields(request: GenerateRequest, params: GenerationParams) -> list[str]:
    """Returns the fields of the request that the model ignores."""
    return [
        name
        for name in (Takes.GUIDANCE, Takes.NEGATIVE_PROMPT)
        if getattr(request, name) is not None and getattr(params, name) is None
    ]
