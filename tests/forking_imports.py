"""Imported by the process from which servers are forked (forking.py), and by no other."""

import gc
import importlib
import importlib.util
import json
import os

from forking import clean_environment

os.environ.update(clean_environment())  # Hugging Face's libraries read it when they are imported

from api.api_docs import SCHEMAS, answer_schemas
from api.generate_request import Limits, request_schema
from api.web_page import read_files
from application import NATIVE_SCHEMAS
from compat.install import FOREIGN_SCHEMAS
from generation import machine_speed
from models.mflux_registry import read_catalog
from models.mlx_setup import prepare_mlx
from timing.speeds import Product


def measured_in_another_process() -> dict[Product, float]:
    """The speed of this machine, which takes half a second to measure. A process that has computed
    with MLX must not be forked: its threads would be missing."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        os.write(writer, json.dumps(machine_speed.measure()).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        speeds = json.load(file)
    os.waitpid(process, 0)
    return {Product(name): speed for name, speed in speeds.items()}


prepare_mlx()
if importlib.util.find_spec("celery"):
    importlib.import_module("remote_worker")
for name in (
    "encodings.idna",
    "server",
    "mflux.models.flux.variants.txt2img.flux",
    "numpy.random",
    "transformers.models.clip.tokenization_clip",
    "transformers.models.t5.tokenization_t5",
):
    importlib.import_module(name)
read_catalog()  # cached, as are the schemas and the files of the page
answer_schemas((*NATIVE_SCHEMAS, *FOREIGN_SCHEMAS))
for template in (SCHEMAS + "{model}", "#/$defs/{model}"):
    request_schema(Limits(), template)
read_files()
speeds = measured_in_another_process()
machine_speed.measure = speeds.copy
gc.freeze()  # a collection, at each unload, does not look at the modules again
