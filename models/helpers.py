"""Helper models: each does a part of a task before another model draws it.

They are no models that a task can name. A task that needs one gets a stage of its own for it. The
operator allows them by name in --models.
"""

from collections.abc import Mapping

from models.model_catalog import Model, Pipeline

ANNOTATORS = "lllyasviel/Annotators"


def _helper(name: str, title: str, makes: str, **facts: object) -> Model:
    pipeline = Pipeline(name=name, module="generation.helpers", parameters={})
    return Model(
        name=name,
        family=name.replace("-", "_"),
        title=title,
        default_steps=1,
        default_guidance=None,
        pipelines=(pipeline,),
        makes=makes,
        **facts,  # type: ignore[arg-type]
    )


FIBO_VLM = _helper(
    "fibo-vlm",
    "writes the JSON prompt that FIBO needs from plain text",
    "prompt",
    parameters_b=4.4,
    repositories=("briaai/FIBO-vlm",),
    gated=True,
    weights_gb=8.9,
)
DEPTH_PRO = _helper(
    "depth-pro",
    "makes a depth map of a photo",
    "control_image",
    parameters_b=0.95,
    url="https://ml-site.cdn-apple.com/models/depth-pro/depth_pro.pt",
    weights_gb=1.9,
)
HED = _helper(
    "hed",
    "finds soft edges in a picture",
    "control_image",
    parameters_b=0.015,
    repositories=(ANNOTATORS,),
    files={ANNOTATORS: ("ControlNetHED.pth",)},
    weights_gb=0.03,
)
OPENPOSE = _helper(
    "openpose",
    "finds the poses of people in a picture",
    "control_image",
    parameters_b=0.05,
    repositories=(ANNOTATORS,),
    files={ANNOTATORS: ("body_pose_model.pth",)},
    weights_gb=0.21,
)
HELPERS: Mapping[str, Model] = {
    helper.name: helper for helper in (FIBO_VLM, DEPTH_PRO, HED, OPENPOSE)
}
OF_CONTROL: Mapping[str, Model] = {"depth": DEPTH_PRO, "hed": HED, "pose": OPENPOSE}
"""By control_type: the helper that makes the map from a picture."""
