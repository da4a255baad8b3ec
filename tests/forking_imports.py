"""Imported by the process from which servers are forked (forking.py), and by no other."""

import gc
import importlib
import importlib.util
import os

from forking import clean_environment

os.environ.update(clean_environment())  # Hugging Face's libraries read it when they are imported

from api.api_docs import answer_schemas
from application import NATIVE_SCHEMAS
from compat.install import FOREIGN_SCHEMAS
from models.mflux_registry import read_catalog
from models.mlx_setup import prepare_mlx

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
read_catalog()  # cached, as are the schemas
answer_schemas((*NATIVE_SCHEMAS, *FOREIGN_SCHEMAS))
gc.freeze()  # a collection, at each unload, does not look at the modules again
