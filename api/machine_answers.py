"""Answers about the machines that draw."""

from pydantic import Field

from api.answers import Answer, Seconds
from api.model_answers import DownloadAnswer
from monitoring.machine_status import MachineState, MachineStatus


class MachineAnswer(Answer):
    name: str = Field(description="`local` is the server's own.", examples=["mac-mini"])
    state: MachineState = Field(
        description="idle, loading, running; stopping: its worker begins no more tasks; lost: its "
        "worker has left or is silent."
    )
    drained: bool = Field(description="Whether the operator gives it no more tasks.")
    loaded_models: list[str] = Field(
        description="In its memory, the latest used first.", examples=[["schnell/q8"]]
    )
    loading_model: str | None = Field(None, description="What it loads.")
    download: DownloadAnswer | None = Field(
        None, description="While it downloads the weights that it loads."
    )
    missing_models: list[str] = Field(
        description="Allowed models that it would have to download first.", examples=[["dev"]]
    )
    running: list[str] = Field(
        description="Ids of its tasks: on the GPU, or being encoded.",
        examples=[["1fc9cc4f9d3b27a1"]],
    )
    next_task: str | None = Field(
        None,
        description="Id of a waiting task that was sent there, and can still be taken back.",
        examples=["5d0f62a4b8e1c973"],
    )
    tasks_last_hour: int = Field(description="Done in the last hour.", examples=[57])
    images_today: int | None = Field(
        None,
        description="Images of the tasks that it has ended since midnight, UTC. In the list only.",
        examples=[312],
    )
    busy_share: Seconds = Field(
        description="Part of the last hour, or since it registered, for which it worked, 0 to 1.",
        examples=[0.93],
    )
    image_seconds: dict[str, float] = Field(
        description="By model and quantization, learned seconds of an image of 1024 x 1024 pixels "
        "with the model's default steps.",
        examples=[{"schnell/q8": 21.5}],
    )
    last_error: str | None = Field(None, description="Of its worker, in words.")
    hardware: str | None = Field(None, description="Absent: the server's own.", examples=["M4 Pro"])
    system: str | None = Field(None, description="Its system.", examples=["macOS-26.1"])
    memory_bytes: int | None = Field(None, description="Of the machine.", examples=[68_719_476_736])
    versions: dict[str, str] | None = Field(
        None, description="Of its packages.", examples=[{"mflux": "0.24.0"}]
    )
    allowed_models: list[str] | None = Field(
        None, description="That it may load.", examples=[["schnell", "dev"]]
    )
    last_seen_at: Seconds | None = Field(
        None, description="Unix seconds of its latest heartbeat.", examples=[1725311496.5]
    )


class MachinesAnswer(Answer):
    machines: list[MachineAnswer] = Field(description="The server's own first, lost ones last.")
    broker_away_since: Seconds | None = Field(
        None, description="As in /health.", examples=[1725311496.5]
    )


def machine_answer(machine: MachineStatus) -> MachineAnswer:
    about = machine.about
    return MachineAnswer(
        name=machine.name,
        state=machine.state,
        drained=machine.drained,
        loaded_models=list(machine.resident),
        loading_model=machine.loading,
        download=DownloadAnswer.of(*machine.download) if machine.download else None,
        missing_models=list(machine.missing),
        running=list(machine.running),
        next_task=machine.next_task,
        tasks_last_hour=machine.tasks_last_hour,
        images_today=machine.images_today,
        busy_share=machine.busy_share,
        image_seconds=machine.image_s,
        last_error=machine.last_error,
        hardware=about.hardware if about else None,
        system=about.system if about else None,
        memory_bytes=about.memory_bytes if about else None,
        versions=dict(about.versions) if about else None,
        allowed_models=list(about.models) if about else None,
        last_seen_at=about.heard_at if about else None,
    )
