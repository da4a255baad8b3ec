"""Turns a request into params: defaults, sizes, images, and what the model takes.

Every API, native or foreign, submits through here.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Semaphore

import errors
from allowed import Allowed, given_fields, not_supported
from api.client_queue import OwnQueue
from api.generate_request import PICTURES, GenerateRequest, Limits, default_side, refusal
from api.input_pictures import InputPictures, MaskReading
from api.request_body import return_freed_memory
from api.waiting_places import RETRY_AFTER_S, WaitingPlaces
from decoding.decoder import PictureDecoder
from decoding.protocol import Meaning
from fields import Takes
from models.hub_cache import is_present
from models.model_catalog import LoadSpec, Model
from task import MAX_SEED, SIDE_STEP, GenerationParams

LARGE_BODY_BYTES = 1_000_000
LARGE_BODIES = 4
"""Larger bodies that are parsed and decoded at a time, each in several copies. Others wait as they
were received."""
LARGE_BODY_WAIT_S = 30.0
"""Seconds that a large body waits before it is refused."""
IMAGE_STRENGTH = 0.4
"""The default of mflux."""
MOST_SIDE = 8192
"""Pixels, also if the size follows an input image."""
MOST_WEBP_SIDE = 16383
MOST_OUTPUT_PIXELS_FACTOR = 4
"""An upscaled image may have so many times --max-pixels."""


@dataclass
class Prepared:
    """Complete params and their input images."""

    params: GenerationParams
    inputs: dict[str, bytes] = field(default_factory=dict)
    """PNG bytes by InputImage.file."""
    ignored_fields: list[str] = field(default_factory=list)


class Submission:
    """Args:
    fits: why a picture of these params does not fit into memory, or None.
    places: for requests that wait.
    decoder: reads the pictures; default: one of its own.
    check_adapters: answers a warning for each adapter that fits the model in part, and raises
        UnusableAdapter for one that does not fit.
    metadata: whether image files tell how they were made, where a client does not say.
    is_present: whether the weights of a model are on this machine.
    """

    def __init__(
        self,
        own_queue: OwnQueue,
        allowed: Allowed,
        limits: Limits,
        fits: Callable[[GenerationParams], str | None],
        *,
        places: WaitingPlaces,
        decoder: PictureDecoder | None = None,
        check_adapters: Callable[[LoadSpec], tuple[str, ...]] = lambda weights: (),
        metadata: bool = True,
        is_present: Callable[[Model], bool] = is_present,
    ) -> None:
        self._is_present = is_present
        self._check_adapters = check_adapters
        self.allowed = allowed
        self.limits = limits
        self._own_queue = own_queue
        self._fits = fits
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
        self._check_fields(request, model, empty_prompt)
        self._check_limits(request, model)
        if request.callback_url is not None and not self.limits.may_call(request.callback_url):
            raise errors.NotSupported(
                "{field} must be an http or https address of a host that the operator allows "
                "(--callback-hosts).",
                field="callback_url",
            )
        params = self._without_pictures(request, model)
        prepared = Prepared(params)
        if _has_pictures(request):
            mask = MaskReading(mask_meaning, invert_mask)
            with self.decoder.reading() as reader:
                pictures = InputPictures(reader, request, self._own_queue(), mask)
                params = self._sized(request, model, params, pictures.size_of_source(model))
                params = params.model_copy(update=pictures.decoded(params, model))
            prepared.inputs = pictures.inputs
            params = self._with_strength(params)
        else:
            params = self._sized(request, model, params, None)
        stages = self.allowed.stages(params)
        if params.loras:
            warnings = self._check_adapters(stages[0].load_spec)
            params = params.model_copy(update={"warnings": warnings})
        if why := self._fits(params):
            raise errors.DoesNotFit(why, field="width")
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
            if _has_pictures(request):
                with self.decoder.reading() as reader:
                    pictures = InputPictures(reader, request, self._own_queue(), MaskReading())
                    given = pictures.decoded(known, self.allowed.model(known.model))
            check_same(known, known.model_copy(update=dict.fromkeys(PICTURES) | given), key)

    def _check_fields(self, request: GenerateRequest, model: Model, empty_prompt: bool) -> None:
        """What the model cannot honour is refused, but for guidance, which clients send to every
        model."""
        given = set(request.given())
        if not request.prompt and not model.upscaler:
            if not (_has_pictures(request) or empty_prompt):
                raise errors.InvalidInput(
                    "{field} is required: it may be empty only with a picture.", field="prompt"
                )
            given.add(Takes.PROMPT)
        if Takes.GUIDANCE not in model.takes:
            given.discard(Takes.GUIDANCE)
        if not model.upscaler:
            if request.upscale is None and (request.upscaler or request.softness is not None):
                raise errors.InvalidInput("upscaler and softness need upscale.", field="upscale")
            given -= {Takes.UPSCALE, Takes.SOFTNESS}
        if not given <= model.takes:
            raise not_supported(model, frozenset(given))
        _check_together(request, given)
        if model.pipeline_for(frozenset(given)) is None:
            raise not_supported(model, frozenset(given))
        for side in ("width", "height"):
            if model.upscaler and side in request.model_fields_set:
                raise errors.NotSupported(f"{model.name} takes upscale, not {{field}}.", field=side)

    def _check_limits(self, request: GenerateRequest, model: Model) -> None:
        limits = self.limits
        for name in ("prompt", "negative_prompt"):
            text = getattr(request, name)
            if text is not None and len(text) > limits.max_prompt_chars:
                raise refusal(name, text, limits)
        if request.steps is not None and request.steps > limits.max_steps:
            raise refusal("steps", request.steps, limits)
        for name in ("count", "n"):
            number = getattr(request, name)
            if number is not None and number > limits.max_count:
                raise refusal(name, number, limits)
        if None not in (request.count, request.n) and request.count != request.n:
            raise errors.InvalidInput("n and count mean the same: send one of them.", field="n")
        guidance = model.default_guidance if request.guidance is None else request.guidance
        if request.negative_prompt is not None and guidance is not None and guidance <= 1:
            raise errors.NotSupported(
                f"{model.name} does not use {{field}} at guidance {guidance:g}: send a guidance "
                "above 1.",
                field="negative_prompt",
            )

    def _without_pictures(self, request: GenerateRequest, model: Model) -> GenerationParams:
        guidance = model.default_guidance if request.guidance is None else request.guidance
        upscaler = None
        if request.upscale is not None and not model.upscaler:
            upscaler = self.allowed.upscaler(request.upscaler, self._is_present).name
        passed = request.passed() | {
            "guidance": guidance if Takes.GUIDANCE in model.takes else None,
            "quantize": self.allowed.bits(request.quantize),
            "upscaler": upscaler,
        }
        return GenerationParams(
            **passed,
            prompt=request.prompt or "",
            seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
            width=request.width,
            height=request.height,
            steps=min(model.default_steps, self.limits.max_steps)
            if request.steps is None
            else request.steps,
            model=model.name,
            count=request.count or request.n or 1,
            loras=tuple((lora.name, lora.scale) for lora in request.loras or ()),
            metadata=self._metadata if request.metadata is None else request.metadata,
            asked=request.digest,
        )

    def _with_strength(self, params: GenerationParams) -> GenerationParams:
        """With mflux's own image_strength if the request gives none and the pipeline takes it."""
        takes = self.allowed.model(params.model).takes
        if params.init_image and params.image_strength is None and Takes.IMAGE_STRENGTH in takes:
            pipeline = self.allowed.model(params.model).pipeline_for(given_fields(params))
            if pipeline and Takes.IMAGE_STRENGTH in pipeline.takes:
                params = params.model_copy(update={"image_strength": IMAGE_STRENGTH})
        if params.steps_run < 1:
            raise errors.InvalidInput(
                f"{{field}} must be more than {params.steps}: {params.image_strength:.0%} of the "
                "input image is kept, which leaves no step to draw.",
                field="steps",
            )
        return params

    def _sized(
        self,
        request: GenerateRequest,
        model: Model,
        params: GenerationParams,
        source: tuple[int, int] | None,
    ) -> GenerationParams:
        """With a width and height.

        Args:
            source: width and height of the picture that came.

        Raises:
            InvalidInput: they are larger than this server or the file format allows.
        """
        width, height = self._size(request, model, source)
        most = self.limits.max_pixels
        if width * height > most and not model.upscaler:
            raise errors.InvalidInput(
                f"width x height must be at most {most} pixels on this server, "
                f"not {width} x {height} = {width * height}.",
                field="width",
            )
        if max(width, height) > MOST_SIDE:
            raise errors.InvalidInput(
                f"width and height must be at most {MOST_SIDE} pixels, not {width} x {height}.",
                field="width",
            )
        params = params.model_copy(update={"width": width, "height": height})
        final_width, final_height = params.final_size
        if max(final_width, final_height) > MOST_WEBP_SIDE and params.format == "WEBP":
            raise errors.InvalidInput(
                f"{{field}} WEBP holds up to {MOST_WEBP_SIDE} pixels a side, not {final_width} x "
                f"{final_height}: choose another format.",
                field="format",
            )
        if params.upscale and final_width * final_height > most * MOST_OUTPUT_PIXELS_FACTOR:
            raise errors.InvalidInput(
                f"{{field}} {params.upscale:g} makes {final_width} x {final_height} pixels of "
                f"{width} x {height}: at most {most * MOST_OUTPUT_PIXELS_FACTOR} are allowed.",
                field="upscale",
            )
        return params

    def _size(
        self, request: GenerateRequest, model: Model, source: tuple[int, int] | None
    ) -> tuple[int, int]:
        """Width and height before enlarging: as asked for. Absent sides follow the picture that
        came, and without one they are the default, or what --max-pixels leaves of it."""
        if model.upscaler and source:
            return source
        default, most = default_side(self.limits), self.limits.max_pixels
        asked = request.model_fields_set & {"width", "height"}
        width, height = float(request.width), float(request.height)
        pipeline = model.pipeline_for(request.given() | {Takes.PROMPT})
        if source and not asked and pipeline and pipeline.default_width:
            width = float(pipeline.default_width)
            height = width * source[1] / source[0]
        elif source and not asked:
            shrink = min(1.0, (default * default / (source[0] * source[1])) ** 0.5)
            width, height = source[0] * shrink, source[1] * shrink
        elif "width" not in asked and "height" not in asked:
            width = height = default
        elif "height" not in asked:
            height = width * source[1] / source[0] if source else min(default, most / width)
        elif "width" not in asked:
            width = height * source[0] / source[1] if source else min(default, most / height)
        return _rounded(width), _rounded(height)


def _check_together(request: GenerateRequest, given: set[Takes]) -> None:
    """Fields that mean nothing without another one, or that exclude each other.

    Raises:
        InvalidInput
    """
    if request.image_strength is not None and request.init_image is None:
        raise errors.InvalidInput("{field} needs init_image.", field="image_strength")
    if request.control_image is None and {Takes.CONTROL_STRENGTH, Takes.CONTROL_TYPE} & given:
        raise errors.InvalidInput(
            "control_strength and control_type need control_image.", field="control_image"
        )
    more = request.control_images or ()
    if more and request.control_image is None:
        raise errors.InvalidInput("{field} needs control_image.", field="control_images")
    for name in ("control_types", "control_strengths"):
        if len(getattr(request, name) or ()) > len(more):
            raise errors.InvalidInput(
                "{field} has more values than control_images has pictures.", field=name
            )
    if len(request.reference_strengths or ()) > len(request.images or ()):
        raise errors.InvalidInput(
            "{field} has more values than images has pictures.",
            field="reference_strengths",
        )
    if request.background == "transparent":
        if request.format == "JPEG":
            raise errors.InvalidInput(
                "background transparent needs the format PNG or WEBP.", field="background"
            )
        if request.upscale is not None:
            raise errors.InvalidInput(
                "background transparent and upscale exclude each other: upscalers draw opaque "
                "images.",
                field="background",
            )
    if request.auto_mask is not None and request.mask is not None:
        raise errors.InvalidInput(
            "{field} is sent in place of mask: send one of them.", field="auto_mask"
        )


def _rounded(side: float) -> int:
    """Pixels, down to a multiple of SIDE_STEP."""
    return max(round(side) // SIDE_STEP, 1) * SIDE_STEP


def _has_pictures(request: GenerateRequest) -> bool:
    return any(getattr(request, name) is not None for name in PICTURES)


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
    return ["guidance"] if request.guidance is not None and params.guidance is None else []
