"""FLUX.1 Depth draws from a depth map, without the model that makes depth maps (Depth Pro)."""

import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import allow, params_for
from PIL import Image

from generation.pipelines import arguments, build_class
from models import tiny_models
from models.mlx_setup import prepare_mlx
from models.model_catalog import LoadSpec
from models.tiny_recipes import _add_flux1_transformer, _write_flux1_encoders
from models.tiny_weights import LATENT_CHANNELS, PATCH, component
from task import InputImage, Stage

SIDE = 32


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that mflux downloads from."""
    from mflux.models.common.weights.loading import weight_loader

    asked: list[str] = []

    def refused(address: str, *_: Any) -> None:
        asked.append(address)
        raise OSError("there is no network")

    monkeypatch.setattr(weight_loader, "MFLUX_CACHE_DIR", tmp_path / "mflux")
    monkeypatch.setattr(urllib.request, "urlretrieve", refused)
    return asked


@pytest.fixture
def spec(tmp_path: Path) -> LoadSpec:
    """A small checkpoint of FLUX.1 Depth."""
    prepare_mlx()
    folder = tmp_path / "depth"
    _write_flux1_encoders(folder)
    with component(folder / "transformer", seed=21, biases=True) as weights:
        _add_flux1_transformer(weights, 2 * LATENT_CHANNELS * PATCH, is_guided=True)
    model = replace(allow("dev-depth").default, path=str(folder))
    return LoadSpec(model, model.pipelines[0], None)


def test_it_draws_from_a_depth_map_and_downloads_nothing(
    spec: LoadSpec, downloads: list[str], tmp_path: Path
) -> None:
    from mflux.models.flux.variants.depth.flux_depth import Flux1Depth

    pipeline = build_class(spec, tmp_path)
    assert type(pipeline) is Flux1Depth
    assert pipeline.depth_pro is None
    assert downloads == []
    tiny_models.slim(pipeline, "noise-fill")
    drawn = []
    for shade in ("black", "white"):
        Image.new("RGB", (SIDE, SIDE), shade).save(tmp_path / f"{shade}.png")
        asked = params_for(
            width=SIDE, height=SIDE, steps=1, control_image=InputImage(shade, SIDE, SIDE)
        )
        picture = pipeline.generate_image(**arguments(Stage(spec, asked), tmp_path)).image
        assert picture.size == (SIDE, SIDE)
        drawn.append(picture.tobytes())
    assert drawn[0] != drawn[1], "the depth map reaches the picture"
    assert downloads == []


def test_the_class_of_mflux_alone_would_download_the_model_of_depth_maps(
    spec: LoadSpec, downloads: list[str]
) -> None:
    """If it does not any more, generation/pipelines.py can build it like the others."""
    from mflux.models.common.config.model_config import AVAILABLE_MODELS
    from mflux.models.flux.variants.depth.flux_depth import Flux1Depth

    with pytest.raises(OSError, match="no network"):
        Flux1Depth(model_path=spec.model.path, model_config=AVAILABLE_MODELS["dev-depth"])
    assert downloads == ["https://ml-site.cdn-apple.com/models/depth-pro/depth_pro.pt"]


def test_it_has_all_that_the_constructor_of_mflux_makes(
    spec: LoadSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mflux.models.common.config.model_config import AVAILABLE_MODELS
    from mflux.models.flux import flux_initializer
    from mflux.models.flux.variants.depth.flux_depth import Flux1Depth

    monkeypatch.setattr(flux_initializer, "DepthPro", lambda: None)
    own = Flux1Depth(model_path=spec.model.path, model_config=AVAILABLE_MODELS["dev-depth"])
    ours = build_class(spec, tmp_path)
    assert set(vars(ours)) == set(vars(own))
    assert set(ours) == set(own)
    assert ours.depth_pro is own.depth_pro is None
