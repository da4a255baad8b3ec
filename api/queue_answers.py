"""The answers of GET /queue and DELETE /delete: tasks of all clients, and what each client may see
of those of others."""

from collections.abc import Callable
from typing import Any

from pydantic import Field

from api.answers import Answer, Seconds
from api.task_answers import Params, params_answer, whole_seconds
from task import GenerationParams, Reason, Task, TaskStatus

PROMPT_IN_LISTS = 200
"""Characters."""


class OthersParams(Answer):
    """What everybody may know of a task: what its time depends on."""

    model: str = Field(description="Which model draws.", examples=["schnell"])
    width: int = Field(description="Pixels, a multiple of 16.", examples=[1024])
    height: int = Field(description="Pixels, a multiple of 16.", examples=[1024])
    steps: int = Field(description="Denoising steps.", examples=[4])
    count: int = Field(description="How many images.", examples=[1])


class QueuedTask(Answer):
    task_id: str | None = Field(
        None,
        description="The id that /generate gave. Absent for tasks of other clients.",
        examples=["1fc9cc4f9d3b27a1"],
    )
    client: str | None = Field(
        None,
        description="Name of its client; empty: nobody, or everybody. Only for operators.",
        examples=["alice"],
    )
    mine: bool = Field(description="Whether the client that asks may see and cancel it.")
    status: TaskStatus = Field(description="waiting or running.")
    pos: int = Field(description="Tasks waiting before it; 0 when next or running.", examples=[0])
    wait_remaining: int = Field(
        description="Forecast of whole seconds until its image is ready.", examples=[15]
    )
    reason: Reason | None = Field(None, description="As in StatusAnswer.")
    created_at: float = Field(description="Unix seconds, UTC.", examples=[1725311496.5])
    params: Params | OthersParams = Field(
        description="What is done for it; less of it for tasks of other clients."
    )


class QueueAnswer(Answer):
    """The tasks that are not finished, in the order in which they run."""

    length: int = Field(description="How many there are, also beyond `limit`.", examples=[1])
    paused: bool = Field(
        description="Whether the operator has paused the queue: no task is started. Forecasts are "
        "those of a queue that goes on now."
    )
    tasks: list[QueuedTask] = Field(description="With the first 200 characters of prompts.")


class DeleteAnswer(Answer):
    task_id: str = Field(description="The id that /generate gave.", examples=["1fc9cc4f9d3b27a1"])
    was: TaskStatus = Field(description="The status that the task had.")
    message: str = Field(
        description="What happened.", examples=["The task was taken out of the queue."]
    )
    stopping_s: Seconds | None = Field(
        None,
        description="Forecast seconds until the GPU is free of a task that was running: its step, "
        "the encoding of its prompt, its decoding or a part of its load must end first, with "
        "after_current its image. Absent where nothing must end.",
        examples=[12.5],
    )


class OriginalTask(Answer):
    """A task in the shape that the original mflux-server lists."""

    task_id: str = Field(description="The id that /generate gave.", examples=["1fc9cc4f9d3b27a1"])
    prompt: str = Field(description="What the image shows.")
    seed: str = Field(description="Of the first image.", examples=["1725311496"])
    height: int = Field(description="Pixels.", examples=[1024])
    width: int = Field(description="Pixels.", examples=[1024])
    steps: int = Field(description="Denoising steps.", examples=[4])
    guidance: float | None = Field(None, description="Absent if the model has none.")
    format: str = Field(description="Of the file.", examples=["JPEG"])
    quality: int = Field(description="Of the file, in percent.", examples=[85])
    priority: bool = Field(description="Whether it is urgent.")
    start_time: float = Field(description="Unix seconds of its submission.")
    compute_time: float | None = Field(None, description="Unix seconds at which it started.")


def original_tasks(views: list[Task]) -> list[dict[str, Any]]:
    return [
        OriginalTask(
            task_id=view.task_id,
            prompt=view.params.prompt,
            seed=str(view.params.seed),
            height=view.params.height,
            width=view.params.width,
            steps=view.params.steps,
            guidance=view.params.guidance,
            format=view.params.format,
            quality=view.params.quality,
            priority=view.priority > 0,
            start_time=view.created_at,
            compute_time=view.started_at,
        ).model_dump(exclude_none=True)
        for view in views
    ]


def queue_answer(
    views: list[Task],
    length: int,
    owns: Callable[[Task], bool],
    *,
    paused: bool,
    names: bool = False,
) -> QueueAnswer:
    """Args:
    owns: whether the client that asks may see a task.
    names: whether it may see the names of the clients.
    """
    return QueueAnswer(
        length=length,
        paused=paused,
        tasks=[
            QueuedTask(
                task_id=view.task_id if owns(view) else None,
                client=view.owner.name if names else None,
                mine=owns(view),
                status=view.status,
                pos=view.forecast.pos,
                wait_remaining=whole_seconds(view.forecast.end_s),
                reason=view.forecast.reason,
                created_at=view.created_at,
                params=params_answer(shortened(view.params), view.priority)
                if owns(view)
                else others_params(view.params),
            )
            for view in views
            if view.forecast is not None
        ],
    )


def others_params(params: GenerationParams) -> OthersParams:
    return OthersParams(
        model=params.model,
        width=params.width,
        height=params.height,
        steps=params.steps,
        count=params.count,
    )


def shortened(params: GenerationParams) -> GenerationParams:
    """With the beginning of the first prompt, for lists."""
    prompt = params.prompt
    if len(prompt) <= PROMPT_IN_LISTS and not params.prompts:
        return params
    if len(prompt) > PROMPT_IN_LISTS:
        prompt = prompt[: PROMPT_IN_LISTS - 3] + "..."
    return params.model_copy(update={"prompt": prompt, "prompts": ()})
