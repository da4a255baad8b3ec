"""The pictures of a request: sent with it or drawn before, decoded and scaled to what is used."""

import hashlib
from typing import NamedTuple

import errors
from api.client_queue import ClientQueue
from api.generate_request import GenerateRequest
from api.request_values import ImageOf
from decoding.decoder import PictureReader
from decoding.protocol import Meaning
from models.model_catalog import Model
from task import GenerationParams, InputImage


class MaskReading(NamedTuple):
    meaning: Meaning = Meaning.MASK
    invert: bool = False


class InputPictures:
    """The pictures of one request, decoded.

    Raises:
        InvalidInput: one cannot be decoded.
        UnknownTask, NotReady, Gone: of a task whose picture is requested.
    """

    def __init__(
        self,
        reader: PictureReader,
        request: GenerateRequest,
        queue: ClientQueue,
        mask: MaskReading,
    ) -> None:
        self.inputs: dict[str, bytes] = {}
        """PNG bytes by InputImage.file."""
        self._reader = reader
        self._request = request
        self._queue = queue
        self._mask = mask

    def size_of_source(self, model: Model) -> tuple[int, int] | None:
        """Width and height of the picture that decides the size of the result; None: none does."""
        request = self._request
        if {"width", "height"} <= request.model_fields_set and not model.upscaler:
            return None
        if request.init_image is not None:
            return self._reader.size(self._bytes_of(request.init_image, "init_image"), "init_image")
        for first in request.images or ():
            return self._reader.size(self._bytes_of(first, "images"), "images")
        if request.control_image is not None:
            control = self._bytes_of(request.control_image, "control_image")
            return self._reader.size(control, "control_image")
        return None

    def decoded(self, params: GenerationParams, model: Model) -> dict[str, object]:
        """By the name of their field. They are scaled down to what the task can use; an upscaler
        uses all of its source."""
        cover = None if model.upscaler else (params.width, params.height)
        kept: dict[str, object] = {}
        for name in ("init_image", "mask", "control_image"):
            source = getattr(self._request, name)
            if source is not None:
                kept[name] = self._keep(source, name, cover, model.reference_pixels)
        if self._request.images:
            takes_alpha = any(pipeline.alpha_references for pipeline in model.pipelines)
            meaning = Meaning.PICTURE_ALPHA if takes_alpha else Meaning.PICTURE
            kept["images"] = tuple(
                self._keep(source, "images", cover, model.reference_pixels, meaning)
                for source in self._request.images
            )
        if self._request.control_images:
            kept["control_images"] = tuple(
                self._keep(source, "control_images", cover, model.reference_pixels)
                for source in self._request.control_images
            )
        return kept

    def _keep(
        self,
        source: bytes | ImageOf,
        name: str,
        cover: tuple[int, int] | None,
        min_pixels: int,
        meaning: Meaning = Meaning.PICTURE,
    ) -> InputImage:
        mask = self._mask if name == "mask" else MaskReading(meaning)
        png = self._reader.png(
            self._bytes_of(source, name),
            name,
            meaning=mask.meaning,
            invert=mask.invert,
            cover=cover,
            min_pixels=min_pixels,
        )
        file = hashlib.sha256(png.data).hexdigest()[:16]
        self.inputs[file] = png.data
        return InputImage(file, png.width, png.height)

    def _bytes_of(self, source: bytes | ImageOf, name: str) -> bytes:
        if isinstance(source, bytes):
            return source
        try:
            return self._queue.image(source.task_id, source.index)[0]
        except errors.ServerError as error:
            error.field = name
            raise
