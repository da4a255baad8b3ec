"""The catalog against the installed mflux: nothing is missing, nothing is made up."""

import ast
import importlib
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from allowed import Allowed, not_supported
from api.generate_request import GenerateRequest
from declared import read_allowed
from errors import BadOption, InvalidInput, ModelNotAllowed, NotSupported
from fields import Takes, mflux_parameters
from models import left_out, mflux_registry
from models.mflux_registry import find_model, read_catalog
from models.model_catalog import FACTS, UNDECIDED, Catalog, LoadSpec, Model, Pipeline
from settings import Settings

REAL = [model for model in read_catalog().models if not model.tiny]
PIPELINES = [(model, pipeline) for model in read_catalog().models for pipeline in model.pipelines]


@cache
def class_of(pipeline_module: str, name: str) -> Any:
    return getattr(importlib.import_module(pipeline_module), name)


def test_every_model_of_mflux_is_in_the_catalog_with_its_aliases_and_steps() -> None:
    from mflux.cli.defaults.defaults import model_inference_steps
    from mflux.models.common.config.model_config import AVAILABLE_MODELS

    assert [model.name for model in REAL] == list(AVAILABLE_MODELS)
    for key, config in AVAILABLE_MODELS.items():
        model = find_model(key)
        assert model, key
        for alias in config.aliases:
            assert find_model(alias) is model, alias
        assert config.model_name in model.repositories
        assert model.pipelines, key
        if not model.upscaler:
            assert model.default_steps == model_inference_steps(key), key


def test_each_field_that_is_declared_to_go_to_mflux_is_taken_by_a_model() -> None:
    taken = {field for _, pipeline in PIPELINES for field in pipeline.takes}
    declared = dict(mflux_parameters())
    assert len(set(declared.values())) == len(declared) == 16
    assert set(declared.values()) <= taken <= set(GenerateRequest.model_fields)


def test_every_model_has_facts_and_no_other_one() -> None:
    assert not [model for model in REAL if model.title == UNDECIDED.title]
    assert set(FACTS) == {model.name for model in REAL}
    assert set(mflux_registry.CLASSES) <= {model.name for model in read_catalog().models}


def test_no_name_or_alias_stands_for_two_models_in_any_case_of_letters() -> None:
    owner: dict[str, Model] = {}
    for model in read_catalog().models:
        for name in (model.name, *model.aliases):
            assert owner.setdefault(name.lower(), model) is model, name
            assert find_model(name.upper()) is model
    assert len(owner) > len(read_catalog().models)


def test_an_unknown_model_of_a_new_mflux_release_is_served_with_what_its_source_says() -> None:
    class Config:
        model_name, aliases = "org/new", ["brand-new", "new"]
        controlnet_model = custom_transformer_model = None
        supports_guidance = True

    sources = mflux_registry._Sources()
    model = mflux_registry._model("brand-new", Config, 12, sources)
    assert (model.title, model.default_steps, model.pipelines) == ("not described yet", 12, ())
    assert (model.aliases, model.repositories) == (("new",), ("org/new",))


def test_the_titles_of_tiny_models_are_words_and_no_names_of_classes() -> None:
    classes = {pipeline.name for _, pipeline in PIPELINES} - {
        "SeedVR2",
        "Anima",
        "FIBO",
    }  # names of models
    titles = [model.title for model in read_catalog().models if model.name.startswith("noise-")]
    assert len(set(titles)) == len(titles)
    for title in titles:
        name, _, what = title.partition(": ")
        assert not set(name.split()) & classes
        assert len(name) <= 24  # so that a phone shows it whole
        assert "abstract noise" in what


def test_the_noise_models_are_found_by_the_names_that_they_had() -> None:
    found = {model.name for model in read_catalog().models if model.name.startswith("noise-")}
    assert "noise-flux2" in found
    for name in found - {"noise-flux1"}:
        former = find_model(name.replace("noise-", "tiny-"))
        assert former is not None
        assert former.name == name
    built_in = find_model("tiny")
    assert built_in is not None
    assert built_in.name == "tiny"


def test_what_is_read_from_the_source_is_what_the_imported_classes_say() -> None:
    """Of all classes that the catalog uses; imports every family of mflux, which takes a while."""
    sources = mflux_registry._Sources()
    assert PIPELINES
    for name in {pipeline.name for _, pipeline in PIPELINES}:
        node = sources._class(name)
        real = class_of(sources.module(name), name)
        for method in ("generate_image", "__init__"):
            required, optional = sources._parameters(node, method)
            known = {
                parameter.name: parameter.default is inspect.Parameter.empty
                for parameter in inspect.signature(getattr(real, method)).parameters.values()
                if parameter.name != "self"
                and parameter.kind
                in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            }
            assert set(required) == {n for n, needed in known.items() if needed}, (name, method)
            assert set(optional) == {n for n, needed in known.items() if not needed}, name


def test_every_class_of_mflux_that_draws_is_used_or_left_out_for_a_reason() -> None:
    root = mflux_registry._Sources()._root
    drawing = set()
    for path in root.glob("models/*/variants/**/*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "generate_image" in {
                part.name for part in node.body if isinstance(part, ast.FunctionDef)
            }:
                drawing.add(node.name)
    used = {pipeline.name for _, pipeline in PIPELINES}
    inherited = drawing - used - set(left_out.CLASSES)
    assert inherited == set()
    assert not used & set(left_out.CLASSES)
    assert set(left_out.CLASSES) <= drawing
    assert used <= drawing


def test_every_parameter_of_mflux_is_filled_or_left_out_for_a_reason() -> None:
    used, constructed = set(), set()
    for pipeline in {pipeline.name: pipeline for _, pipeline in PIPELINES}.values():
        real = class_of(pipeline.module, pipeline.name)
        filled = set().union(*(p.parameters for _, p in PIPELINES if p.name == pipeline.name))
        for name in set(inspect.signature(real.generate_image).parameters) - filled - {"self"}:
            reasons = {(pipeline.name, name), name} & {*left_out.OF_ONE_CLASS, *left_out.PARAMETERS}
            assert reasons or name in ("guidance", "negative_prompt", "num_inference_steps"), name
            used |= reasons
        constructed |= set(inspect.signature(real.__init__).parameters)
    assert used == {*left_out.OF_ONE_CLASS, *left_out.PARAMETERS}
    given = {"self", "quantize", "model_path", "model_config", "lora_paths", "lora_scales"}
    given |= {"controlnet_strength"}  # LoadSpec.control_strength
    assert constructed - given == set(left_out.CONSTRUCTORS)


def must_be_filled(pipeline: Pipeline) -> list[str]:
    """The parameters of its class that have no default."""
    real = class_of(pipeline.module, pipeline.name)
    return [
        parameter.name
        for parameter in inspect.signature(real.generate_image).parameters.values()
        if parameter.name != "self" and parameter.default is inspect.Parameter.empty
    ]


def test_every_parameter_that_must_be_filled_is_filled_by_what_the_pipeline_needs() -> None:
    filled_always = {"seed", "prompt", "steps", "width", "height"}
    assert PIPELINES
    for model, pipeline in PIPELINES:
        for parameter in must_be_filled(pipeline):
            field = pipeline.parameters[parameter]
            assert field in filled_always | pipeline.needs, (model.name, pipeline.name, parameter)
        assert pipeline.needs <= pipeline.takes, (model.name, pipeline.name)


def test_no_pipeline_hides_another_one_of_its_model() -> None:
    models = read_catalog().models
    assert max(len(model.pipelines) for model in models) > 1
    for model in models:
        for pipeline in model.pipelines:
            least = pipeline.needs | ({Takes.PROMPT} & pipeline.takes)
            assert model.pipeline_for(least) is pipeline, (model.name, pipeline.name)


# -- the operator's choice ---------------------------------------------------------------------


def offer_for(*arguments: str, fallback: str = "noise-flux1") -> Allowed:
    settings = Settings.read(list(arguments), {})
    return read_allowed(
        read_catalog(),
        default=settings.model,
        allowed=settings.models,
        path=settings.path,
        fallback=fallback,
        quantize=settings.quantize,
        quantize_choices=settings.quantize_choices,
        lora_dir=settings.lora_dir,
        allow_lora_repos=False,
    )


def names_of(allowed: Allowed) -> list[str]:
    return [model.name for model in allowed.models]


def test_the_default_model_is_the_one_named_else_the_first_allowed_else_the_fallback() -> None:
    assert names_of(offer_for()) == ["noise-flux1"]
    assert names_of(offer_for("--models", "noise-flux2,noise-flux1")) == [
        "noise-flux2",
        "noise-flux1",
    ]
    assert names_of(offer_for("--models", "noise-flux1,schnell", "--model", "SCHNELL")) == [
        "schnell",
        "noise-flux1",
    ]
    assert names_of(offer_for("--models", "noise-flux1,noise-flux1", "--model", "dev")) == [
        "dev",
        "noise-flux1",
    ]
    assert len(names_of(offer_for("--models", "all"))) == len(read_catalog().models)


def test_all_leaves_out_what_nothing_draws_with() -> None:
    bare = Model("bare", "x", "x", 4, None, 1.0, repositories=("a/b",))
    tiny = find_model("noise-flux1")
    assert tiny
    allowed = read_allowed(
        Catalog([bare, tiny]),
        default=None,
        allowed=("all",),
        path=None,
        fallback="noise-flux1",
        quantize=None,
        quantize_choices=(),
        lora_dir=None,
        allow_lora_repos=False,
    )
    assert names_of(allowed) == ["noise-flux1"]


def test_a_folder_of_weights_is_allowed_under_a_name_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for entry, name in ((f"{tmp_path}/mine@dev", "mine"), (f"x={tmp_path}/mine@dev", "x")):
        allowed = offer_for("--models", f"{entry},noise-flux1")
        model = allowed.default
        assert (model.name, model.key, model.path) == (name, "dev", f"{tmp_path}/mine")
        assert model.aliases == ()
        assert allowed.model(name.upper()) is model
        assert LoadSpec(model, model.pipelines[0], None).key == name
    assert names_of(
        offer_for("--models", f"noise-flux1,x={tmp_path}/mine@dev", "--model", "X")
    ) == [
        "x",
        "noise-flux1",
    ]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("x=/no/such/folder@dev", "there is no folder /no/such/folder"),
        ("x={folder}@devil", "there is no model 'devil'"),
        ("dev={folder}@dev", "NAME of its own"),
        ("klein-4b={folder}@dev", "NAME of its own"),
        ("a b={folder}@dev", "NAME of its own"),
        ("../x={folder}@dev", "NAME of its own"),
        ("x={folder}@noise-flux1", "a BASE with real weights"),
        ("x={folder}@dev,x={folder}@schnell", "NAME of its own"),
        ("devil", "there is no model 'devil'"),
    ],
)
def test_a_bad_entry_of_models_is_refused_with_a_sentence(
    entry: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(BadOption, match="argument --models: ") as caught:
        offer_for("--models", entry.format(folder=tmp_path))
    assert sentence in str(caught.value)


def test_a_path_for_a_tiny_model_and_a_missing_lora_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="builds its own weights"):
        offer_for("--path", str(tmp_path), "--model", "noise-flux1")
    with pytest.raises(BadOption, match="builds its own weights"):
        offer_for("--path", "org/repository")
    with pytest.raises(BadOption, match="there is no folder"):
        offer_for("--lora-dir", str(tmp_path / "none"))


# -- what is said to a client that asks for too much ----------------------------------------------


def test_each_field_that_a_model_lacks_is_named_with_the_model() -> None:
    models = read_catalog().models
    assert models
    for model in models:
        needs = frozenset().union(*(pipeline.needs for pipeline in model.pipelines[:1]))
        lacking = set(Takes) - model.takes - model.ignored
        assert lacking, model.name
        for name in lacking:
            given = frozenset({name, *needs})
            assert model.pipeline_for(given) is None, (model.name, name)
            error = not_supported(model, given)
            assert isinstance(error, NotSupported)
            assert (error.field, error.message) == (name, f"{model.name} has no {name}.")


def test_each_field_that_a_model_needs_is_named() -> None:
    assert PIPELINES
    for model, pipeline in PIPELINES:
        for name in pipeline.needs:
            given = pipeline.takes - {name}
            if model.pipeline_for(given) is None:
                error = not_supported(model, given)
                assert isinstance(error, InvalidInput), (model.name, pipeline.name)
                assert (error.field, error.message) == (name, f"{model.name} needs {name}.")


def test_fields_that_no_pipeline_takes_together_are_named_both() -> None:
    dev = find_model("dev")
    assert dev
    error = not_supported(dev, frozenset({Takes.PROMPT, Takes.INIT_IMAGE, Takes.IMAGES}))
    assert error.message == "dev takes init_image or images, not both."


def test_a_mask_without_its_picture_is_refused_with_the_missing_field() -> None:
    model = find_model("qwen-image-2.1")
    assert model
    error = not_supported(model, frozenset({Takes.PROMPT, Takes.MASK}))
    assert error.message == "qwen-image-2.1 needs images."


def test_a_model_that_is_not_allowed_is_answered_with_those_that_are() -> None:
    allowed = offer_for("--models", "noise-flux1,noise-flux2")
    with pytest.raises(ModelNotAllowed, match="Allowed: noise-flux1, noise-flux2") as caught:
        allowed.model("schnell")
    assert caught.value.field == "model"
    assert allowed.model("") is allowed.model(None) is allowed.default


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("nope", ""),
        ("schnell2", " Did you mean schnell?"),
        ("Kontext", " Did you mean dev-kontext or noise-kontext?"),
        ("FLUX.1-schnell", " Did you mean schnell?"),
        ("seedvr", " Did you mean seedvr2-3b, seedvr2-7b or noise-seedvr2?"),
        ("a" * 100_000, ""),
    ],
)
def test_a_name_that_is_no_model_is_answered_with_those_like_it_and_where_all_are(
    name: str, alike: str
) -> None:
    some = len(read_catalog().models)
    with pytest.raises(BadOption) as refused:
        offer_for("--model", name)
    assert str(refused.value).endswith(f"{name!r}.{alike} docs/models.md lists all {some}.")
    allowed = offer_for("--models", "all")
    with pytest.raises(ModelNotAllowed) as not_allowed:
        allowed.model(name)
    assert not_allowed.value.message == (
        f"This server does not draw with a model {name[:100]!r}.{alike} "
        f"GET /models lists the {len(allowed.models)} that are allowed."
    )
