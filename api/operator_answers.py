"""Answers to the operator: the state of the queue, and the clients."""

from pydantic import Field

from api.answers import Answer, Seconds
from api.task_answers import whole_seconds
from task import Task, TaskStatus


class PausedAnswer(Answer):
    paused: bool = Field(description="Whether the queue is paused.")
    waiting: int = Field(description="Tasks that wait.", examples=[3])
    running: int = Field(description="Tasks that run: they end as always.", examples=[1])


class ClearedAnswer(Answer):
    cancelled: int = Field(description="How many waiting tasks were cancelled.", examples=[3])


class ClientAnswer(Answer):
    name: str = Field(description="Empty: tasks of nobody, or of everybody.", examples=["alice"])
    has_key: bool = Field(description="Whether the file of --keys has it.")
    waiting: int = Field(description="Tasks that wait.", examples=[3])
    running: int = Field(description="Tasks that run.", examples=[1])
    gpu_seconds_today: Seconds = Field(
        description="GPU seconds of its ended tasks since midnight, UTC.", examples=[120.5]
    )
    gpu_seconds: Seconds = Field(description="The same in all.", examples=[8640.0])
    weight: float = Field(description="Of its key: GPU time relative to others.", examples=[1.0])
    share_today: Seconds = Field(
        description="Its part of the GPU seconds of all clients today, 0 to 1.", examples=[0.25]
    )
    last_seen_at: Seconds | None = Field(
        None,
        description="Unix seconds of its latest request. Absent: none since the start of the "
        "server.",
        examples=[1725311496.5],
    )


class ClientsAnswer(Answer):
    """Clients with a key, and all others that have tasks or have used the GPU; those with the most
    GPU seconds today first."""

    length: int = Field(description="How many there are, also beyond `limit`.", examples=[1])
    clients: list[ClientAnswer] = Field(description="The clients.")


class PlaceAnswer(Answer):
    """A task that was moved, or is tried again."""

    task_id: str = Field(description="The id that /generate gave.", examples=["1fc9cc4f9d3b27a1"])
    status: TaskStatus = Field(description="waiting, or further on already.")
    pos: int | None = Field(None, description="Tasks waiting before it.", examples=[0])
    wait_remaining: int | None = Field(
        None, description="Forecast of whole seconds until the image is ready.", examples=[15]
    )


def place_answer(task: Task) -> PlaceAnswer:
    forecast = task.forecast
    return PlaceAnswer(
        task_id=task.task_id,
        status=task.status,
        pos=task.pos,
        wait_remaining=whole_seconds(forecast.end_s) if forecast else None,
    )
