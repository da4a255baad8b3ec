"""Stages whose memory is computed."""

from typing import Any

from conftest import params_for

from models.mflux_registry import find_model
from models.model_catalog import LoadSpec
from task import Stage

GB = 1e9


def stage_of(name: str, side: int = 1024, **params: Any) -> Stage:
    model = find_model(name)
    assert model
    pipeline = next(pipeline for pipeline in model.pipelines if not pipeline.inpaints)
    asked = params_for(model=name, width=side, height=side, **params)
    return Stage(LoadSpec(model, pipeline, None), asked)
