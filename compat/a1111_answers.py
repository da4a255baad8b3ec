"""Answers of AUTOMATIC1111's API: images with their infotexts, and progress."""

import json
import time
from typing import Any

from compat.a1111_controlnet import ignored_scripts
from compat.a1111_fields import Hires
from compat.a1111_shapes import A1111Images, A1111Progress, A1111State, TextToImage
from compat.sync_calls import Finished
from images import png_of_size, to_base64, with_png_text
from task import GenerationParams, Task

AT_LEAST_SHOWN = 0.01
"""Progress of a waiting task: clients read 0 as idle."""


def images_answer(asked: TextToImage, finished: Finished, hires: Hires) -> A1111Images:
    """The images with their infotexts, and how they were made."""
    params = finished.params
    size = hires.size or params.final_size
    images = finished.images  # fewer than params.count if the task was interrupted
    texts = [_infotext(params, size, index, asked) for index in range(len(images))]
    if size != params.final_size:
        images = [png_of_size(image, *size) for image in images]
    if params.metadata:
        images = [
            with_png_text(image, "parameters", text)
            for image, text in zip(images, texts, strict=True)
        ]
    return A1111Images(
        images=[to_base64(image) for image in images] if asked.send_images else [],
        parameters=asked.echoed("init_images", "mask"),
        info=json.dumps(_info(params, size, asked, texts)),
    )


def _info(
    params: GenerationParams, size: tuple[int, int], asked: TextToImage, texts: list[str]
) -> dict[str, Any]:
    width, height = size
    negative = params.negative_prompt or ""
    return {
        "prompt": params.prompt,
        "all_prompts": [params.prompt] * params.count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * params.count,
        "seed": params.seed,
        "all_seeds": [params.seed_of(index) for index in range(params.count)],
        "subseed": params.seed,
        "all_subseeds": [params.seed_of(index) for index in range(params.count)],
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": _sampler(asked),
        "cfg_scale": 1.0 if params.guidance is None else params.guidance,
        "steps": params.steps,
        "batch_size": asked.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": params.model,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": _denoising(params),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": params.mask is not None,
        "warnings": ignored_scripts(asked),
    }


def _sampler(asked: TextToImage) -> str:
    return asked.sampler_name if isinstance(asked.sampler_name, str) else "Euler"


def _denoising(params: GenerationParams) -> float | None:
    if params.init_image is None or params.image_strength is None:
        return None
    return round(1 - params.image_strength, 6)


def _infotext(
    params: GenerationParams, size: tuple[int, int], index: int, asked: TextToImage
) -> str:
    width, height = size
    cfg = 1.0 if params.guidance is None else params.guidance
    lines = [params.prompt]
    if params.negative_prompt:
        lines.append(f"Negative prompt: {params.negative_prompt}")
    lines.append(
        f"Steps: {params.steps}, Sampler: {_sampler(asked)}, CFG scale: {cfg:g}, "
        f"Seed: {params.seed_of(index)}, Size: {width}x{height}, Model: {params.model}"
    )
    return "\n".join(lines)


def progress_answer(view: Task) -> A1111Progress:
    wait_s = view.forecast.end_s if view.forecast else 0.0
    running = view.started_at is not None
    return A1111Progress(
        progress=min(max(view.share_done, AT_LEAST_SHOWN), 0.99) if running else AT_LEAST_SHOWN,
        eta_relative=round(wait_s, 3),
        state=A1111State(
            job=view.task_id,
            job_count=view.params.count,
            job_timestamp=time.strftime("%Y%m%d%H%M%S", time.localtime(view.created_at)),
            job_no=view.images_done,
            sampling_step=view.steps_done,
            sampling_steps=view.steps_total,
        ),
        textinfo=None if running else f"{view.pos} tasks wait before this one",
    )
