"""Answers about models: the list, and running downloads."""

from pydantic import Field

from api.answers import Answer
from fields import Takes
from models.model_catalog import Model


class DownloadAnswer(Answer):
    """LoadSpec on their way from Hugging Face."""

    model: str = Field(description="Whose weights.", examples=["schnell"])
    bytes_done: int = Field(description="On disk so far.", examples=[12_000_000_000])
    bytes_total: int | None = Field(
        None, description="About so many in all. Absent: unknown.", examples=[34_000_000_000]
    )

    @staticmethod
    def of(model: Model, bytes_done: int) -> "DownloadAnswer":
        known = model.weights_gb is not None
        total = round(model.download_bytes) if known else None
        return DownloadAnswer(model=model.name, bytes_done=bytes_done, bytes_total=total)


class ModelAnswer(Answer):
    name: str = Field(description="What tasks name.", examples=["schnell"])
    title: str = Field(description="In words.", examples=["FLUX.1 schnell, 12 B"])
    family: str = Field(description="mflux's name of the architecture.", examples=["flux"])
    classes: list[str] = Field(
        description="mflux's classes that draw with it.", examples=[["Flux1"]]
    )
    aliases: list[str] = Field(description="Other names.", examples=[["schnell"]])
    default_steps: int = Field(description="Steps when a task names none.", examples=[4])
    default_guidance: float | None = Field(
        None, description="Absent: it has none, or a schedule of its own.", examples=[3.5]
    )
    takes: list[Takes] = Field(
        description="Fields of /generate that not every model honours, and this one does."
    )
    needs: list[Takes] = Field(description="Those it cannot do without.")
    mask_of: list[Takes] = Field(
        description="Fields whose picture `mask` can belong to.", examples=[["init_image"]]
    )
    pictures_together: list[list[Takes]] = Field(
        description="Fields with pictures that a request may have together: one list for each of "
        "its classes, without those that are part of another.",
        examples=[[["init_image", "mask"]]],
    )
    schedulers: list[str] = Field(
        description="Names that `scheduler` may have; its own one first.",
        examples=[["linear", "flow_match_euler_discrete"]],
    )
    control_types: list[str] = Field(
        description="Values of `control_type` that can be used with it here.", examples=[["canny"]]
    )
    presets: list[str] = Field(
        description="Names that `preset` may have.", examples=[["V4_DEFAULT_20"]]
    )
    least_steps: int = Field(description="With its own scheduler.", examples=[1])
    most_images: int | None = Field(
        None, description="Pictures that `images` may hold. Absent: as many as a request may."
    )
    side_step: int = Field(
        description="width and height are rounded down to multiples of it.", examples=[16]
    )
    least_side: int = Field(description="Least width and height, in pixels.", examples=[16])
    most_side: int = Field(description="Most of them, in pixels.", examples=[8192])
    repositories: list[str] = Field(
        description="Hugging Face repositories of the weights. Empty: built by the server.",
        examples=[["black-forest-labs/FLUX.1-schnell"]],
    )
    options: list[str] = Field(
        description="Build options that its classes have (`--compute-precision` and others).",
        examples=[["compute_precision", "small_decoder"]],
    )
    options_in_use: list[str] = Field(
        description="Those that the operator has set.", examples=[["small_decoder"]]
    )
    gated: bool = Field(description="Whether the download needs a login and a licence.")
    weights_gb: float | None = Field(
        None, description="Download, about, in 10^9 bytes. Absent: unknown.", examples=[34]
    )
    allowed: bool = Field(description="Whether tasks may name it.")
    loaded: bool = Field(description="Whether it is in memory.")
    present: bool = Field(description="Whether its weights are on disk.")
    bytes_on_disk: int = Field(description="What there is of them.", examples=[33_900_000_000])


class HelperAnswer(Answer):
    """A helper model: does a part of a task before another model draws it."""

    name: str = Field(description="Its name.", examples=["fibo-vlm"])
    title: str = Field(description="What it does.")
    repositories: list[str] = Field(description="Hugging Face repositories of the weights.")
    gated: bool = Field(description="Whether the download needs a login and a licence.")
    weights_gb: float | None = Field(None, description="Download in 10^9 bytes.", examples=[8.9])
    allowed: bool = Field(description="Whether tasks may use it.")
    present: bool = Field(description="Whether its weights are on disk.")
    bytes_on_disk: int = Field(description="Bytes of them on disk.", examples=[8_900_000_000])


class LoraModelAnswer(Answer):
    """A model that a LoRA fits."""

    name: str = Field(description="The model.", examples=["dev"])
    keys: int = Field(description="So many of its keys match.", examples=[608])


class LoraAnswer(Answer):
    """What the header of a LoRA says."""

    name: str = Field(description="What tasks name.", examples=["watercolour"])
    rank: int | None = Field(None, description="The largest of its layers.", examples=[16])
    keys: int = Field(description="How many arrays it has; 0: unreadable.", examples=[608])
    models: list[LoraModelAnswer] = Field(description="The allowed models that it fits.")
    unusable: str | None = Field(
        None, description="Why it fits none of them.", examples=["it is a web page (HTML)"]
    )


class ModelsAnswer(Answer):
    default: str = Field(description="The model of tasks that name none.", examples=["schnell"])
    models: list[ModelAnswer] = Field(description="All of mflux's, the allowed ones first.")
    helpers: list[HelperAnswer] = Field(
        description="Helper models, for a part of a task: tasks do not name them."
    )
    loras: list[LoraAnswer] = Field(description="Adapters in the operator's folder.")
    schedulers: list[str] = Field(
        description="Names that `scheduler` takes.", examples=[["linear"]]
    )
    quantize: list[int] = Field(
        description="Bits of tasks that ask for none. Empty: as stored.", examples=[[8]]
    )
    quantize_choices: list[int] = Field(
        description="Bits that tasks may ask for instead.", examples=[[4, 8]]
    )


class LoadAnswer(Answer):
    model: str = Field(description="Its name.", examples=["schnell"])
    loaded: bool = Field(description="Whether it was in memory already.")


class WildcardsAnswer(Answer):
    wildcards: list[str] = Field(
        description="Names, without the underscores around them.", examples=[["animal", "colour"]]
    )
