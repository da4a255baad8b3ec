"""Answers about tasks: accepted tasks, their progress, the queue, the images."""

from math import ceil
from typing import Any

from pydantic import Field

from api.answers import Answer, ErrorBody, Seconds
from api.generate_request import priority_answer
from api.model_answers import DownloadAnswer
from fields import PassedFields
from scheduler.health import ServerState
from task import MAX_SEED, Forecast, GenerationParams, InputImage, Phase, Reason, Task, TaskStatus
from timing_model import LOCAL, Confidence, Measured

POLL_AT_MOST_S = 10
WARNINGS = (
    "A sentence for each LoRA that fits the model in part, and one if the prompt could not be "
    "expanded. Absent where there is none."
)


class Picture(Answer):
    """An image from the client."""

    id: str = Field(
        description="Beginning of the SHA-256 of its pixels' PNG file: equal pictures have equal "
        "ones.",
        examples=["9f86d081884c7d65"],
    )
    width: int = Field(description="Pixels.", examples=[1024])
    height: int = Field(description="Pixels.", examples=[768])


class LoraParams(Answer):
    name: str = Field(description="Of the LoRA.", examples=["watercolour"])
    scale: float = Field(description="How strongly it acts.", examples=[0.8])


class _OwnParams(Answer):
    """Params that the server fills in, rounds or decodes."""

    model: str = Field(description="Which model draws.", examples=["schnell"])
    prompt: str = Field(description="What the image shows.", examples=["A beautiful landscape"])
    prompts: list[str] | None = Field(
        None,
        description="The prompt of each image, where they differ; `prompt` is the first one. "
        "Lists of tasks leave it out.",
    )
    count: int = Field(description="How many images.", examples=[1])
    seed: str = Field(
        description=f"Digits, 0 to {MAX_SEED}: as a string, because JSON numbers lose precision "
        "above 2^53 in many clients.",
        examples=["1725311496"],
    )
    width: int = Field(description="Pixels, a multiple of 16.", examples=[1024])
    height: int = Field(description="Pixels, a multiple of 16.", examples=[1024])
    steps: int = Field(description="Denoising steps.", examples=[4])
    init_image: Picture | None = Field(None, description="Where drawing starts.")
    images: list[Picture] | None = Field(None, description="What is edited or varied.")
    mask: Picture | None = Field(None, description="White where init_image is repainted.")
    control_image: Picture | None = Field(None, description="What is followed.")
    loras: list[LoraParams] | None = Field(None, description="Adapters.")
    metadata: bool = Field(description="Whether the image files tell these params.")
    priority: bool | int = Field(
        description="true: urgent; false: normal; -1: background.", examples=[False]
    )


class Params(PassedFields, _OwnParams):
    """The complete parameters of the task: defaults filled in, size rounded."""


class EstimateAnswer(Answer):
    """The answer that submitting this would get now. Nothing was submitted."""

    task_length: int = Field(
        description="Tasks not yet finished ahead of and beside this one, without it.", examples=[1]
    )
    expected_time_seconds: Seconds = Field(
        description="Forecast seconds until the image is ready: as likely earlier as later.",
        examples=[146.9],
    )
    wait_p90_s: Seconds = Field(
        description="Seconds within which it is ready nine times out of ten, urgent tasks that "
        "may still overtake it included.",
        examples=[171.2],
    )
    expected_start_at: Seconds = Field(
        description="Unix seconds, UTC, at which the GPU turns to it.", examples=[1725311500.5]
    )
    expected_end_at: Seconds = Field(
        description="Unix seconds, UTC, at which the image is ready.", examples=[1725311643.4]
    )
    confidence: Confidence = Field(
        description="none: nothing was measured for this model yet, the forecast is a guess from "
        "its size; low: little was measured, or far from this size; high.",
        examples=["high"],
    )
    pos: int = Field(description="Tasks waiting before it.", examples=[0])
    params: Params = Field(description="What is done for it.")
    ignored_fields: list[str] = Field(
        description="Fields of the request that this model has no use for.", examples=[["guidance"]]
    )
    warnings: list[str] | None = Field(None, description=WARNINGS)
    server: ServerState = Field(description="State of the server.")


class GenerateAnswer(EstimateAnswer):
    """The task is in the queue."""

    task_id: str = Field(description="The id that /generate gave.", examples=["1fc9cc4f9d3b27a1"])
    status: TaskStatus = Field(description="waiting, or further on for a key sent again.")


class Timings(Answer):
    """Seconds that the finished task took."""

    text_encoding_s: Seconds = Field(description="Seconds of encoding the prompt.")
    step_s: list[Seconds] = Field(description="One value for each step, of all images.")
    decoding_s: Seconds = Field(description="Seconds of decoding the latents.")
    image_encoding_s: Seconds = Field(description="Seconds of writing the file, off the GPU.")
    total_s: Seconds = Field(description="Their sum: without the time spent waiting.")


class StatusAnswer(Answer):
    task_id: str = Field(description="The id that /generate gave.", examples=["1fc9cc4f9d3b27a1"])
    status: TaskStatus = Field(
        description="waiting, running, or how it ended: done, failed, cancelled."
    )
    pos: int | None = Field(
        None,
        description="Tasks waiting before it; 0 when it is next or running. Absent at the end.",
        examples=[0],
    )
    wait_remaining: int | None = Field(
        None,
        description="Forecast of whole seconds until the image is ready, at least 1. Absent at "
        "the end.",
        examples=[15],
    )
    wait_p90_s: Seconds | None = Field(
        None,
        description="Seconds within which it is ready nine times out of ten. Absent at the end.",
        examples=[17.5],
    )
    expected_start_at: Seconds | None = Field(
        None,
        description="Unix seconds, UTC, at which the GPU turns to it. Only while it waits.",
        examples=[1725311500.5],
    )
    expected_end_at: Seconds | None = Field(
        None,
        description="Unix seconds, UTC, at which the image is ready. Absent at the end.",
        examples=[1725311515.5],
    )
    confidence: Confidence | None = Field(
        None, description="How much the forecast knows: none, low, high. Absent at the end."
    )
    reason: Reason | None = Field(
        None,
        description="Why the forecast is later than it was when the task was submitted, or than a "
        "better one that came while it ran: it was overtaken by an urgent task, a model_switch "
        "is due, or something is slower_than_expected. Absent while it is not later. Each answer "
        "has it, whoever asks.",
    )
    poll_after_s: int | None = Field(
        None,
        description="Seconds after which asking again pays. Absent at the end.",
        examples=[4],
    )
    paused: bool | None = Field(
        None,
        description="true while it waits and the operator has paused the queue; else absent. The "
        "forecast is that of a queue that goes on now.",
    )
    phase: Phase | None = Field(
        None,
        description="What a task is at. While it waits: prompt_expansion (its prompt is being "
        "written), else absent. While it runs: loading the weights that it needs, text_encoding "
        "(the prompt), denoising, paused (another task is generated first), decoding, "
        "image_encoding (writing the file).",
    )
    progress: Seconds = Field(
        description="Part of a running task's time that is over, 0 to 1; never goes back.",
        examples=[0.35],
    )
    loading_progress: Seconds | None = Field(
        None,
        description="Part of the weights that are in memory, 0 to 1. Only in the phase loading.",
        examples=[0.6],
    )
    steps_done: int = Field(
        description="Denoising steps of the present image that have ended.", examples=[1]
    )
    steps_total: int = Field(description="Denoising steps of each image.", examples=[4])
    images_done: int = Field(
        description="Images that are stored: GET /image has those of index 0 to images_done - 1, "
        "also while the task runs. Of a batch that is upscaled it stays 0 until all images are "
        "drawn, because all are drawn before the first one is upscaled.",
        examples=[0],
    )
    current_image: int | None = Field(
        None,
        description="Index of the image that a running task is at: drawing it, or upscaling it.",
        examples=[0],
    )
    last_image: int | None = Field(
        None,
        description="Index of the image after which the task is cancelled (after_current of "
        "DELETE /delete). Absent where that was not asked for.",
    )
    machine: str | None = Field(
        None, description="Of the worker that runs it, if one does.", examples=["mac-mini"]
    )
    download: DownloadAnswer | None = Field(
        None, description="While weights are being downloaded that the task may wait for."
    )
    created_at: float = Field(description="Unix seconds, UTC.", examples=[1725311496.5])
    started_at: float | None = Field(
        None, description="Unix seconds, UTC. Absent while it waits.", examples=[1725311500.5]
    )
    ended_at: float | None = Field(
        None, description="Unix seconds, UTC. Absent until the end.", examples=[1725311515.5]
    )
    expires_at: float | None = Field(
        None,
        description="Unix seconds, UTC, at which the ended task and its images are removed; "
        "earlier if newer images need the room. Absent while it is kept.",
        examples=[1725397915.5],
    )
    kept: bool | None = Field(None, description="true: POST /keep has pinned it; else absent.")
    params: Params = Field(description="What is done for it.")
    warnings: list[str] | None = Field(None, description=WARNINGS)
    timings: Timings | None = Field(None, description="Of a task that is done.")
    error: ErrorBody | None = Field(None, description="Why it failed.")
    version: int = Field(
        description="The number of the latest event of this task, or of the server's start; it "
        "only grows. Send it as `since`, or as Last-Event-ID to /events.",
        examples=[1725311497004],
    )
    server: ServerState = Field(
        description="loading: the model is not ready yet, tasks are accepted and wait."
    )


class ImageAnswer(Answer):
    index: int = Field(description="From 0.", examples=[0])
    seed: str = Field(description="Digits: of this image.", examples=["1725311496"])
    content_type: str = Field(description="Of the image.", examples=["image/jpeg"])
    base64: str = Field(description="The image.")


class ImagesAnswer(Answer):
    """All images of a task."""

    images: list[ImageAnswer] = Field(description="In the order of their seeds.")


class LinkAnswer(Answer):
    url: str = Field(
        description="Of the image.",
        examples=["http://localhost:4030/v1/images/img-1fc9cc4f9d3b27a1_0.jpg"],
    )
    expires_at: float | None = Field(
        None,
        description="Unix seconds after which it works no more. Absent where everyone is trusted: "
        "it works as long as the image is kept.",
        examples=[1725315096.0],
    )


_CHANGED = {"seed", "init_image", "mask", "control_image", "images", "loras", "prompts"}
SAME_PARAMS = (set(Params.model_fields) & set(GenerationParams.model_fields)) - _CHANGED
"""Params that an answer repeats as they are."""


_answers: dict[int, tuple[GenerationParams, int, Params]] = {}  # by id() of the params


def params_answer(params: GenerationParams, priority: int) -> Params:
    """It is kept: clients ask for the same tasks again and again, and params never change."""
    known = _answers.get(id(params))
    if known is None or known[0] is not params or known[1] != priority:
        if len(_answers) >= 1_000:
            _answers.clear()
        known = _answers[id(params)] = params, priority, _params_answer(params, priority)
    return known[2]


def _params_answer(params: GenerationParams, priority: int) -> Params:
    def picture(image: InputImage | None) -> Picture | None:
        return image and Picture(id=image.file, width=image.width, height=image.height)

    values = vars(params)
    return Params(
        **{name: values[name] for name in SAME_PARAMS},
        prompts=list(params.prompts) or None,
        seed=str(params.seed),
        init_image=picture(params.init_image),
        mask=picture(params.mask),
        control_image=picture(params.control_image),
        images=[image for image in map(picture, params.images) if image] or None,
        loras=[LoraParams(name=lora.name, scale=lora.scale) for lora in params.loras] or None,
        priority=priority_answer(priority),
    )


def estimate_fields(wait: Forecast | None, others: int, now: float) -> dict[str, Any]:
    """The fields of EstimateAnswer; a task that has ended waits for nothing.

    Args:
        now: unix seconds.
    """
    wait = wait or Forecast(0, 0.0, 0.0, 0.0, Confidence.HIGH)
    return {
        "task_length": others,
        "expected_time_seconds": wait.end_s,
        "wait_p90_s": wait.p90_s,
        "expected_start_at": now + wait.start_s,
        "expected_end_at": now + wait.end_s,
        "confidence": wait.confidence,
        "pos": wait.pos,
    }


def status_answer(
    view: Task,
    server: ServerState,
    now: float,
    download: DownloadAnswer | None = None,
    *,
    version: int,
    paused: bool = False,
) -> StatusAnswer:
    """Args: now: unix seconds; version: of the task, from before it was looked at; paused: whether
    the queue is."""
    error = ErrorBody(code=view.error_code, message=view.error or "") if view.error_code else None
    far = view.status is TaskStatus.RUNNING and view.machine != LOCAL
    return StatusAnswer(
        task_id=view.task_id,
        status=view.status,
        **_waiting_fields(view, now),
        phase=view.phase,
        progress=view.share_done,
        loading_progress=view.load_share,
        steps_done=view.steps_done,
        steps_total=view.steps_total,
        paused=(view.status is TaskStatus.WAITING and paused) or None,
        images_done=view.images_done,
        current_image=view.progress.image if view.progress else None,
        last_image=view.last_image,
        machine=view.machine if far else None,
        download=None if view.ended else download,
        created_at=view.created_at,
        started_at=view.started_at,
        ended_at=view.ended_at,
        expires_at=None if view.expires_in_s is None else now + view.expires_in_s,
        kept=view.kept or None,
        params=params_answer(view.params, view.priority),
        warnings=list(view.params.warnings) or None,
        timings=_timings(view.measured) if view.measured else None,
        error=error,
        version=version,
        server=server,
    )


def _waiting_fields(view: Task, now: float) -> dict[str, Any]:
    wait = view.forecast
    if wait is None:
        return {}
    return {
        "pos": wait.pos,
        "wait_remaining": whole_seconds(wait.end_s),
        "wait_p90_s": wait.p90_s,
        "expected_start_at": now + wait.start_s if view.status is TaskStatus.WAITING else None,
        "expected_end_at": now + wait.end_s,
        "confidence": wait.confidence,
        "reason": wait.reason,
        "poll_after_s": min(max(round(wait.end_s / 4), 1), POLL_AT_MOST_S),
    }


def whole_seconds(wait_s: float) -> int:
    return max(ceil(wait_s), 1)


def _timings(measured: tuple[Measured, ...]) -> Timings:
    return Timings(
        text_encoding_s=sum(image.text_encoding_s for image in measured),
        step_s=[step_s for image in measured for step_s in image.step_s],
        decoding_s=sum(image.decoding_s for image in measured),
        image_encoding_s=sum(image.image_encoding_s for image in measured),
        total_s=sum(image.gpu_s + image.image_encoding_s for image in measured),
    )
