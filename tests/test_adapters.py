"""LoRAs that are broken, or of another model: refused before anything is loaded."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from conftest import ServerProcess, allow, params_for
from safetensors.numpy import load_file, save_file
from test_generator import OnItsThread

from errors import ModelLoadError, UnusableAdapter
from generation import adapters
from generation.adapters import AdapterChecks, Sizes, unusable
from models import tiny_models
from models.hub_cache import weight_files
from models.mflux_registry import read_catalog
from models.model_catalog import LoadSpec, Lora
from models.weight_files import read_header

HALF = "diffusion_model.double_blocks.{}.img_attn.qkv.lora_down.weight"


# -- whether an adapter fits a model ---------------------------------------------------------------


def weights_of(model: str, *loras: str) -> LoadSpec:
    (found,) = allow(model).models
    return LoadSpec(found, found.pipelines[0], None, tuple(map(Lora, loras)))


def check_adapters(
    weights: LoadSpec,
    lora_path: Callable[[str], str],
    sizes: Sizes | None = None,
) -> tuple[str, ...]:
    checks = AdapterChecks(lora_path)
    if sizes:
        checks.learn(weights.model, sizes)
    return checks.check(weights)


def write_matrices(path: Path, prefix: str, down: tuple[int, ...], up: tuple[int, ...]) -> str:
    arrays = {
        f"{prefix}.lora_A.weight": np.ones(down, np.float32),
        f"{prefix}.lora_B.weight": np.ones(up, np.float32),
    }
    save_file(arrays, path)
    return str(path)


def test_each_family_that_takes_loras_has_keys_that_mflux_knows(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"of.no.model.lora_A.weight": np.ones((1, 1), np.float32)}, path)
    checked = set()
    for model in read_catalog().models:
        for pipeline in model.pipelines:
            if pipeline.loras:
                with pytest.raises(UnusableAdapter, match="none of its 1 keys"):
                    check_adapters(LoadSpec(model, pipeline, None, (Lora(str(path)),)), str)
                checked.add(model.family)
    assert {"flux", "flux2", "qwen", "z_image"} <= checked


def test_a_lora_of_another_family_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    tiny_models.write_lora(Path(path), "noise-flux1")
    assert check_adapters(weights_of("noise-flux1", path), str) == ()
    with pytest.raises(UnusableAdapter, match="none of its 2 keys matches the model"):
        check_adapters(weights_of("noise-flux2", path), str)


def test_keys_with_block_numbers_match_as_mflux_matches_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    layer = "transformer.transformer_blocks.{}.attn.to_q"
    write_matrices(path, layer.format(7), (4, 3072), (3072, 4))
    assert check_adapters(weights_of("dev", str(path)), str) == ()
    write_matrices(path, layer.format("07"), (4, 3072), (3072, 4))
    with pytest.raises(UnusableAdapter, match="none of its 2 keys"):
        check_adapters(weights_of("dev", str(path)), str)


@pytest.mark.parametrize(
    ("down", "up", "reason"),
    [
        ((4, 16), (16, 5), "different ranks"),
        ((4, 17), (16, 4), "lora_A of x_embedder has the shape"),
        ((4, 16), (17, 4), "lora_B of x_embedder has the shape"),
    ],
)
def test_matrices_that_do_not_fit_the_layers_of_a_model_are_refused(
    tmp_path: Path, down: tuple[int, ...], up: tuple[int, ...], reason: str
) -> None:
    path = write_matrices(tmp_path / "x.safetensors", "x_embedder", down, up)
    with pytest.raises(UnusableAdapter, match=reason):
        check_adapters(weights_of("noise-flux2", path), str, {"x_embedder": (16, 16)})


@pytest.mark.parametrize("layer_in_file", ["x_embedder", "transformer_blocks.0.attn.to_q"])
@pytest.mark.parametrize("bits", [None, 4])
def test_the_sizes_are_those_of_the_files_before_the_model_was_loaded_once(
    tmp_path: Path, layer_in_file: str, bits: int | None
) -> None:
    """Of a checkpoint as its authors publish it, and of one that mflux has saved."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    arrays: dict[str, Any] = {f"{layer_in_file}.weight": np.zeros((128, 192), np.float32)}
    if bits:
        arrays = {
            f"{layer_in_file}.weight": np.zeros((128, 192 * bits // 32), np.uint32),
            f"{layer_in_file}.scales": np.zeros((128, 3), np.float32),
        }
    save_file(arrays, folder / "0.safetensors")
    (klein,) = allow("flux2-klein-4b").models
    model = replace(klein, path=str(tmp_path))
    lora = str(tmp_path / "x.safetensors")
    weights = LoadSpec(model, model.pipelines[0], None, (Lora(lora),))
    key = f"transformer.{layer_in_file}"
    write_matrices(Path(lora), key, (4, 192), (128, 4))
    assert check_adapters(weights, str) == ()
    write_matrices(Path(lora), key, (4, 256), (128, 4))
    with pytest.raises(UnusableAdapter, match="the model's layer needs 192 in place of 256"):
        check_adapters(weights, str)


def test_half_of_a_pair_and_matrices_of_integers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x_embedder.lora_A.weight": np.ones((4, 16), np.float32)}, path)
    with pytest.raises(UnusableAdapter, match="one of its two matrices"):
        check_adapters(weights_of("noise-flux2", str(path)), str)
    arrays = {f"x_embedder.lora_{one}.weight": np.ones((4, 4), np.int32) for one in "AB"}
    save_file(arrays, path)
    with pytest.raises(UnusableAdapter, match="I32 and I32, not floats"):
        check_adapters(weights_of("noise-flux2", str(path)), str)


def test_a_file_that_is_replaced_is_checked_again(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"<html>")
    with pytest.raises(UnusableAdapter, match="web page"):
        check_adapters(weights_of("noise-flux1", str(path)), str)
    tiny_models.write_lora(path, "noise-flux1")
    assert check_adapters(weights_of("noise-flux1", str(path)), str) == ()


def test_each_of_many_files_is_read_once_until_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(20)]
    for path in paths:
        tiny_models.write_lora(path, "noise-flux1")
    read: list[Path] = []

    def noted(path: Path) -> Any:
        read.append(path)
        return read_header(path)

    monkeypatch.setattr(adapters, "read_header", noted)
    checks = AdapterChecks(str)
    model = weights_of("noise-flux1").model
    specs = [LoadSpec(model, pipeline, None) for pipeline in model.pipelines]

    def look() -> set[bool]:
        return {bool(checks.fit(path, spec).reason) for spec in specs for path in paths}

    assert look() == {False}
    checks.learn(model, {"of.another.layer": (4, 4)})
    assert look() == {False}
    read.clear()
    assert look() == {False}
    assert read == []
    paths[7].write_bytes(b"<html>")
    assert look() == {False, True}
    assert set(read) == {paths[7]}


# -- the generator ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generating(data_dir: Path) -> OnItsThread:
    return OnItsThread("noise-flux2", data_dir)


def load(generating: OnItsThread, weights: LoadSpec) -> None:
    generating._thread.submit(generating.generator.load, weights).result()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(b"<html>"), "web page"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: tiny_models.write_lora(path, "noise-flux1"), "none of its 2 keys"),
        (
            lambda path: save_file({k: v * np.nan for k, v in load_file(path).items()}, path),
            "not numbers",
        ),
        (
            lambda path: save_file({k: v[:, :1] for k, v in load_file(path).items()}, path),
            "ranks|shape",
        ),
    ],
)
def test_an_adapter_that_cannot_be_used_leaves_the_loaded_model_in_memory(
    generating: OnItsThread,
    tmp_path: Path,
    change: Callable[[Path], None],
    reason: str,
) -> None:
    path = tmp_path / "x.safetensors"
    tiny_models.write_lora(path, "noise-flux2")
    change(path)
    before = generating.generate(params_for()).tobytes()
    with pytest.raises(UnusableAdapter, match=reason):
        load(generating, weights_of("noise-flux2", str(path)))
    assert generating.generator.resident == ("noise-flux2",)
    assert generating.generate(params_for()).tobytes() == before


def test_what_mflux_finds_wrong_while_it_applies_an_adapter_blames_the_adapter(
    data_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    layer = "transformer.single_transformer_blocks.99.proj_mlp"  # it has one such block
    write_matrices(path, layer, (4, 16), (16, 4))
    generating = OnItsThread("noise-flux1", data_dir)
    wrong = weights_of("noise-flux1", str(path))
    with pytest.raises(UnusableAdapter, match="'x' cannot be used: 1 of its 1 layers"):
        generating._thread.submit(generating.generator.apply_adapters, wrong).result()
    generating._thread.submit(generating.generator.load, generating.weights).result()
    assert generating.generate(params_for()).size == (64, 64)


def test_a_reason_that_is_a_sentence_gets_no_second_full_stop() -> None:
    assert "cannot be used: it is broken. Leave" in unusable("x", "it is broken.").message


def test_a_broken_file_of_a_models_folder_is_named_and_evicts_nothing(
    generating: OnItsThread, tmp_path: Path
) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "0.safetensors").write_bytes(b"<html>")
    (tmp_path / "._hidden.safetensors").write_bytes(b"not one")
    (dev,) = allow("dev").models
    model = replace(dev, path=str(tmp_path))
    assert [path.name for path in weight_files(model)] == ["0.safetensors"]
    with pytest.raises(ModelLoadError, match=r"0.safetensors is broken \(it is a web page"):
        load(generating, LoadSpec(model, model.pipelines[0], None))
    assert generating.generator.resident == ("noise-flux2",)


# -- over HTTP -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("loras")
    good = folder / "good.safetensors"
    tiny_models.write_lora(good, "noise-flux1")
    tiny_models.write_lora(folder / "klein.safetensors", "noise-flux2")
    arrays = load_file(good)
    (folder / "corrupt.safetensors").write_bytes(b"<!DOCTYPE html>")
    (folder / "gone.safetensors").symlink_to(folder / "nothing")
    (folder / "folder.safetensors").mkdir()
    unused = {HALF.format(number): np.zeros((4, 16), np.float32) for number in range(40)}
    save_file(arrays | unused, folder / "partial.safetensors")
    save_file({k: v * np.nan for k, v in arrays.items()}, folder / "nan.safetensors")
    server = ServerProcess(
        tmp_path_factory.mktemp("server"), "--model", "noise-flux1", "--lora-dir", str(folder)
    )
    yield server
    server.stop()


def post(server: ServerProcess, route: str, **fields: Any) -> requests.Response:
    body = {"prompt": "x", "width": 64, "height": 64, "steps": 2, **fields}
    return requests.post(server.url + route, json=body, timeout=60)


@pytest.mark.parametrize("route", ["/generate", "/estimate"])
def test_a_broken_adapter_is_refused_with_its_name_and_the_reason(
    studio: ServerProcess, route: str
) -> None:
    refused = post(studio, route, loras=["good", "corrupt"])
    assert refused.status_code == 422
    assert refused.json()["error"] == {
        "code": "unusable_adapter",
        "message": "The LoRA 'corrupt' cannot be used: it is a web page (HTML). Leave it out, "
        "choose another one (GET /models says which fit), or replace its file (--lora-dir).",
        "field": "loras",
    }
    for name in ("gone", "folder"):
        assert post(studio, route, loras=[name]).json()["error"]["code"] == "not_supported"


def test_a_lora_that_fits_in_part_is_used_with_a_warning(studio: ServerProcess) -> None:
    answer = (
        "The LoRA 'partial' fits noise-flux1 in part: 2 of its 42 keys match, the other 40 are "
        "ignored."
    )
    assert post(studio, "/estimate", loras=["partial"]).json()["warnings"] == [answer]
    submitted = post(studio, "/generate", loras=["partial"]).json()
    assert submitted["warnings"] == [answer]
    ended = studio.wait_until_ended(submitted["task_id"])
    assert (ended["status"], ended["warnings"]) == ("done", [answer])
    whole = post(studio, "/generate", loras=["good"]).json()
    assert "warnings" not in whole
    assert "warnings" not in studio.wait_until_ended(whole["task_id"])


def test_the_list_of_models_says_which_ones_each_adapter_fits(studio: ServerProcess) -> None:
    listed = {lora.pop("name"): lora for lora in studio.get("/models").json()["loras"]}
    assert listed["good"] == {"keys": 2, "models": [{"name": "noise-flux1", "keys": 2}]}
    assert listed["partial"] == {
        "rank": 4,
        "keys": 42,
        "models": [{"name": "noise-flux1", "keys": 2}],
    }
    assert listed["corrupt"] == {"keys": 0, "models": [], "unusable": "it is a web page (HTML)"}
    assert listed["klein"] == {
        "rank": 4,
        "keys": 2,
        "models": [],
        "unusable": "none of its 2 keys matches the model, so it is for another one",
    }


def test_an_adapter_of_nan_fails_its_task_and_the_loaded_model_stays(studio: ServerProcess) -> None:
    studio.wait_until_ended(post(studio, "/generate").json()["task_id"])
    before = studio.get("/health").json()["loaded_models"]
    failed = studio.wait_until_ended(post(studio, "/generate", loras=["nan"]).json()["task_id"])
    assert (failed["status"], failed["error"]["code"]) == ("failed", "unusable_adapter")
    assert "'nan'" in failed["error"]["message"]
    health = studio.get("/health").json()
    assert (health["loaded_models"], health["status"]) == (before, "ready")
    assert studio.wait_until_ended(post(studio, "/generate").json()["task_id"])["status"] == "done"


def test_the_automatic1111_api_refuses_a_broken_adapter_too(studio: ServerProcess) -> None:
    refused = post(studio, "/sdapi/v1/txt2img", prompt="x <lora:corrupt:1>")
    assert refused.status_code == 422
    assert "The LoRA 'corrupt' cannot be used: it is a web page (HTML)." in refused.text
