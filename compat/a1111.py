"""AUTOMATIC1111's API under /sdapi/v1: what its clients send becomes a task like any other.

a1111_lists.py has what its clients ask around a picture: options, models, samplers.
"""

import json
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, jsonify, request

import errors
from api.answers import json_response
from api.api_docs import SCHEMAS, ErrorShape, ForeignSchemas, documented, json_answer, query
from compat.a1111_callers import Caller, Callers
from compat.a1111_shapes import (
    A1111Error,
    A1111Images,
    A1111PngInfo,
    A1111Progress,
    A1111State,
    ImageToImage,
    PngInfo,
    TextToImage,
)
from compat.bodies import read_body
from compat.pictures import EDIT, START, place_pictures
from compat.sync_calls import DRAWING_ERRORS, Call, Finished, SyncCalls
from decoding.protocol import Meaning
from images import (
    decode_base64,
    to_base64,
    with_png_text,
)
from models.model_catalog import SCHEDULERS, Model, Takes
from queueing.task_view import TaskView
from task import GenerationParams

PREFIX = "/sdapi/"
TAG = "AUTOMATIC1111"
SCHEMAS_OF_A1111: ForeignSchemas = (
    (TextToImage, "validation"),
    (ImageToImage, "validation"),
    (PngInfo, "validation"),
    (A1111Images, "serialization"),
    (A1111Progress, "serialization"),
    (A1111PngInfo, "serialization"),
    (A1111Error, "serialization"),
)
NAMES = {
    "count": "batch_size x n_iter",
    "images": "init_images",
    "init_image": "init_images",
    "image_strength": "1 - denoising_strength",
    "guidance": "cfg_scale",
    "upscale": "hr_scale",
}
"""What our fields are called here, where they have another name."""
RANDOM_SEEDS = 2**32
"""AUTOMATIC1111's, which every client can hold."""
LORA = re.compile(r"<lora:([^:<>]{1,200})(?::(-?[0-9.]{1,10}))?(?::[^<>]{0,100})?>")
MOST_LORAS = 8
AT_LEAST_SHOWN = 0.01
"""Progress of a task that waits: clients take 0 for idle."""
NOTHING = {"description": "Nothing.", "content": {"application/json": {"schema": {}}}}


def a1111_error_body(problem: errors.Problem) -> dict[str, Any]:
    told = A1111Error(error=problem.code, detail=problem.message, errors=problem.message)
    return told.model_dump()


def a1111_error(problem: errors.Problem) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The body, the status and the headers of an answer."""
    headers = {}
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(problem.retry_after_s)
    return a1111_error_body(problem), problem.http_status, headers


A1111_ERRORS = ErrorShape("A1111Error", a1111_error_body, int)


class Checkpoint:
    """The model of requests of this API that name none.

    Args:
        switch: whether clients may choose another one for all of them.
    """

    def __init__(self, calls: SyncCalls, switch: bool) -> None:
        self._calls = calls
        self._switch = switch
        self._chosen = calls.offer.default

    @property
    def model(self) -> Model:
        return self._chosen

    def named(self, title: object) -> str | None:
        """The model of this title; None where the present one is meant."""
        name = str(title or "").split(" [")[0].removesuffix(".safetensors")
        return self._calls.known_name(name)

    def choose(self, title: object) -> None:
        """
        Raises:
            InvalidInput: there is no such model.
            OperatorOnly: another one than before, which the operator does not allow.
            ModelNotAllowed.
        """
        if title is None or title == "":
            return
        name = self.named(title)
        if name is None:
            raise errors.InvalidInput(
                f"There is no model {str(title)[:100]!r}.", field="sd_model_checkpoint"
            )
        model = self._calls.offer.model(name)
        if model is self._chosen:
            return
        if not self._switch:
            raise errors.OperatorOnly(
                "This server does not let its clients switch the model for all; name it in "
                "override_settings.sd_model_checkpoint, or start the server with "
                "--sdapi-model-switch on."
            )
        self._chosen = model


def a1111_routes(
    calls: SyncCalls,
    checkpoint: Checkpoint,
    callers: Callers,
    preview: Callable[[str], bytes | None],
) -> Blueprint:
    routes = Blueprint("a1111", __name__, url_prefix="/sdapi/v1")

    @routes.post("/txt2img")
    @documented(
        "Draw images, and wait for them",
        tag=TAG,
        content={"application/json": {"schema": {"$ref": SCHEMAS + "TextToImage"}}},
        answers={200: json_answer(A1111Images, "The images.")},
        errors=DRAWING_ERRORS,
        shape=A1111_ERRORS,
    )
    def txt2img() -> Response:
        with calls.room_for_the_body(request.content_length):
            asked = read_body(TextToImage, request.get_data(cache=False))
            started = _start(asked, {"model": _model_of(asked).name})
        return _wait(asked, *started)

    @routes.post("/img2img")
    @documented(
        "Draw images from a picture, and wait for them",
        tag=TAG,
        content={"application/json": {"schema": {"$ref": SCHEMAS + "ImageToImage"}}},
        answers={200: json_answer(A1111Images, "The images.")},
        errors=DRAWING_ERRORS,
        shape=A1111_ERRORS,
    )
    def img2img() -> Response:
        with calls.room_for_the_body(request.content_length):
            asked = read_body(ImageToImage, request.get_data(cache=False))
            started = _start(asked, _placed(asked, calls, checkpoint))
        # Its pictures are not held while the caller waits.
        asked = asked.model_copy(update={"init_images": [], "mask": None})
        return _wait(asked, *started)

    def _model_of(asked: TextToImage) -> Model:
        named = checkpoint.named(asked.override_settings.get("sd_model_checkpoint"))
        return calls.offer.model(named) if named else checkpoint.model

    def _start(asked: TextToImage, placed: dict[str, Any]) -> tuple[Call, GenerationParams]:
        model = calls.offer.model(placed["model"])
        _, prepared = calls.prepare(
            _fields(asked, model, calls) | placed,
            NAMES,
            mask_meaning=Meaning.MASK_OPAQUE,
            invert_mask=isinstance(asked, ImageToImage) and asked.inpainting_mask_invert,
        )
        hung_up = request.environ.get("waitress.client_disconnected", lambda: False)
        return calls.start(prepared, hung_up=hung_up), prepared.params

    def _wait(asked: TextToImage, started: Call, params: GenerationParams) -> Response:
        with started as call, callers.waiting(_caller(), call.task_id):
            try:
                finished = call.result()
            except errors.Gone:
                if not callers.was_interrupted(call.task_id):
                    raise
                finished = Finished([], params)
        answer = json_response(_images_answer(asked, finished))
        if finished.images and asked.send_images:
            answer.call_on_close(call.fetched)
        return answer

    @routes.get("/progress")
    @documented(
        "How far the caller's own task is",
        tag=TAG,
        description="A caller is who has the same address, Authorization and User-Agent.",
        parameters=[
            query(
                "skip_current_image",
                "true: without the picture so far.",
                {"type": "boolean", "default": False},
            )
        ],
        answers={200: json_answer(A1111Progress, "The task as it stands; all 0 when idle.")},
        errors=(errors.StorageUnavailable,),
        shape=A1111_ERRORS,
    )
    def progress() -> Response:
        view = callers.present(_caller())
        answer = _progress(view) if view else A1111Progress()
        if view and request.args.get("skip_current_image", "").lower() not in ("true", "1"):
            picture = preview(view.task_id)
            answer.current_image = to_base64(picture) if picture else None
        return jsonify(answer.model_dump())

    @routes.post("/interrupt")
    @routes.post("/skip")
    @documented(
        "Stop the caller's own task",
        tag=TAG,
        description="The one that runs, or the first that waits; never another client's.",
        answers={200: NOTHING},
        errors=(errors.StorageUnavailable,),
        shape=A1111_ERRORS,
    )
    def stop() -> Response:
        callers.interrupt(_caller())
        return jsonify({})

    @routes.post("/png-info")
    @documented(
        "How a picture was made, as far as its file tells",
        tag=TAG,
        content={"application/json": {"schema": {"$ref": SCHEMAS + "PngInfo"}}},
        answers={200: json_answer(A1111PngInfo, "What it tells.")},
        errors=(errors.InvalidInput, errors.BodyTooLarge, errors.TooManyWaiting),
        shape=A1111_ERRORS,
    )
    def png_info() -> Response:
        with calls.room_for_the_body(request.content_length):
            data = decode_base64(read_body(PngInfo, request.get_data(cache=False)).image, "image")
            with calls.decoder.reading() as reader:
                texts, made = reader.texts(data, "image")
        info = texts.get("parameters") or str(made.get("prompt") or "")
        return json_response(A1111PngInfo(info=info, items={**texts}, parameters=made))

    return routes


def _placed(asked: ImageToImage, calls: SyncCalls, checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of /generate that the pictures of a request go to, and the model."""
    pictures = [decode_base64(text, "init_images") for text in asked.init_images]
    mask = decode_base64(asked.mask, "mask") if asked.mask else None
    named = checkpoint.named(asked.override_settings.get("sd_model_checkpoint"))
    if named is None and checkpoint.model is not calls.offer.default:
        named = checkpoint.model.name
    placed = place_pictures(calls, named, pictures, mask, ways=(START, EDIT), field="init_images")
    model = calls.offer.model(placed["model"])
    pipeline = model.pipeline_for(frozenset({Takes.PROMPT, Takes.INIT_IMAGE}))
    if START in placed and not mask and pipeline and Takes.IMAGE_STRENGTH in pipeline.takes:
        placed["image_strength"] = min(max(1 - asked.denoising_strength, 0.01), 0.99)
    return placed


def _caller() -> Caller:
    """Who asks, as well as can be known of clients that name no task."""
    headers = request.headers
    return (
        request.remote_addr or "",
        headers.get("Authorization", "").strip(),
        headers.get("User-Agent", ""),
    )


def _fields(asked: TextToImage, model: Model, calls: SyncCalls) -> dict[str, Any]:
    """The fields of /generate, but for the pictures."""
    prompt, loras = _without_loras(asked.prompt, calls, model)
    guidance = _guidance(asked, model, calls)
    guided = model.default_guidance if guidance is None else guidance
    negative = asked.negative_prompt.strip() or None
    if Takes.NEGATIVE_PROMPT not in model.takes or (guided is not None and guided <= 1):
        negative = None
    enlarge = asked.enable_hr and calls.offer.upscaler is not None and asked.hr_scale > 1
    scheduler = asked.scheduler if asked.scheduler in SCHEDULERS else None
    return {
        "prompt": prompt if prompt.strip() else None,
        "negative_prompt": negative,
        "seed": secrets.randbelow(RANDOM_SEEDS) if asked.seed is None else asked.seed,
        "width": asked.width,
        "height": asked.height,
        "steps": calls.steps(model, asked.steps),
        "guidance": guidance,
        "count": asked.batch_size * asked.n_iter,
        "format": "PNG",
        "loras": loras or None,
        "upscale": min(asked.hr_scale, 4.0) if enlarge else None,
        "scheduler": scheduler if Takes.SCHEDULER in model.takes else None,
    }


def _guidance(asked: TextToImage, model: Model, calls: SyncCalls) -> float | None:
    """FLUX's guidance is another quantity than CFG, and 7 of it ruins a picture."""
    if model.family.startswith("flux"):
        return asked.distilled_cfg_scale
    if asked.cfg_scale is None or Takes.GUIDANCE not in model.takes:
        return None
    if calls.clamp and model.default_guidance is not None:
        return min(asked.cfg_scale, model.default_guidance)
    return asked.cfg_scale


def _without_loras(prompt: str, calls: SyncCalls, model: Model) -> tuple[str, list[dict[str, Any]]]:
    """<lora:NAME:SCALE> is taken out of a prompt; names that are not the operator's are ignored."""
    known = calls.offer.loras() if Takes.LORAS in model.takes else {}
    loras: list[dict[str, Any]] = []
    for name, scale in LORA.findall(prompt):
        if name in known and len(loras) < MOST_LORAS:
            loras.append({"name": name, "scale": _scale(scale)})
    return LORA.sub("", prompt), loras


def _scale(text: str) -> float:
    try:
        return min(max(float(text), -10.0), 10.0)
    except ValueError:
        return 1.0


def _images_answer(asked: TextToImage, finished: Finished) -> A1111Images:
    params = finished.params
    texts = [_infotext(params, index, asked) for index in range(params.count)]
    images = [
        with_png_text(image, "parameters", text) if params.metadata else image
        for image, text in zip(finished.images, texts, strict=False)
    ]
    return A1111Images(
        images=[to_base64(image) for image in images] if asked.send_images else [],
        parameters=asked.model_dump(exclude={"init_images", "mask"}),
        info=json.dumps(_info(params, asked, texts)),
    )


def _info(params: GenerationParams, asked: TextToImage, texts: list[str]) -> dict[str, Any]:
    width, height = params.final_size
    negative = params.negative_prompt or ""
    return {
        "prompt": params.prompt,
        "all_prompts": [params.prompt] * params.count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * params.count,
        "seed": params.seed,
        "all_seeds": [params.seed_of(index) for index in range(params.count)],
        "subseed": params.seed,
        "all_subseeds": [params.seed_of(index) for index in range(params.count)],
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": asked.sampler_name,
        "cfg_scale": 1.0 if params.guidance is None else params.guidance,
        "steps": params.steps,
        "batch_size": asked.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": params.model,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": asked.denoising_strength if params.init_image else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": params.mask is not None,
    }


def _infotext(params: GenerationParams, index: int, asked: TextToImage) -> str:
    width, height = params.final_size
    cfg = 1.0 if params.guidance is None else params.guidance
    lines = [params.prompt]
    if params.negative_prompt:
        lines.append(f"Negative prompt: {params.negative_prompt}")
    lines.append(
        f"Steps: {params.steps}, Sampler: {asked.sampler_name}, CFG scale: {cfg:g}, "
        f"Seed: {params.seed_of(index)}, Size: {width}x{height}, Model: {params.model}"
    )
    return "\n".join(lines)


def _progress(view: TaskView) -> A1111Progress:
    wait_s = view.wait_s or 0.0
    running = view.started_at is not None
    return A1111Progress(
        progress=min(max(view.progress, AT_LEAST_SHOWN), 0.99) if running else AT_LEAST_SHOWN,
        eta_relative=round(wait_s, 3),
        state=A1111State(
            job=view.task_id,
            job_count=view.params.count,
            job_timestamp=time.strftime("%Y%m%d%H%M%S", time.localtime(view.created_at)),
            job_no=view.images_done,
            sampling_step=view.steps_done,
            sampling_steps=view.steps_total,
        ),
        textinfo=None if running else f"{view.pos} tasks wait before this one",
    )
