"""The model that AUTOMATIC1111's clients have chosen for all of their requests."""

import re

import errors
from compat.sync_calls import SyncCalls
from models.model_catalog import Model

HASH = re.compile(r"\[[^\[\]]*\]$")
"""The hash after the name of a model. It begins with no white space: each blank of a long row of
them would be a beginning, and a search of a megabyte of them takes minutes."""
ENDING = re.compile(r"\.(safetensors|sft|ckpt|gguf)$", re.IGNORECASE)


class Checkpoint:
    """The model of requests of this API that name none.

    Args:
        switch: whether clients may choose another one for all of them.
    """

    def __init__(self, calls: SyncCalls, switch: bool) -> None:
        self._calls = calls
        self._switch = switch
        self._chosen = calls.allowed.default

    @property
    def model(self) -> Model:
        return self._chosen

    def named(self, title: object) -> str | None:
        """The model of this title; None where the present one is meant."""
        name = str(title or "").strip()
        plain = ENDING.sub("", HASH.sub("", name).rstrip())
        candidates = (name, plain, re.split(r"[/\\]", plain)[-1])
        return next(filter(None, map(self._calls.known_name, candidates)), None)

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
        model = self._calls.allowed.model(name)
        if model is self._chosen:
            return
        if not self._switch:
            raise errors.OperatorOnly(
                "This server does not let its clients switch the model for all; name it in "
                "override_settings.sd_model_checkpoint, or start the server with "
                "--sdapi-model-switch on."
            )
        self._chosen = model
