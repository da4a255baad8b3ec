"""All options of the server: flag, environment variable, default, unit, help.

Options are declared only here. `Settings.read` merges, in rising order of precedence: the defaults,
the file of --config, the environment (`MFLUX_SERVER_<NAME>`), the command line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import platformdirs

import option_values as values
from option_parser import flag_of, is_switch, negative_flag_of, values_of, variable_of
from option_parser import option as _option
from option_parser import switch_option as _switch

__all__ = ["Settings", "flag_of", "is_switch", "negative_flag_of", "variable_of"]
DEFAULT_DATA_DIR = Path(platformdirs.user_data_dir("mflux-server", appauthor=False))


@dataclass(frozen=True)
class Settings:
    config: Path | None = _option(
        None, "file with options by name (TOML, like port = 4031)", parse=Path, metavar="FILE"
    )
    check: bool = _switch(
        False, "say whether a server with these options could start and draw, and end"
    )
    model: str | None = _option(
        None,
        "model that is loaded at the start and draws tasks that name none; docs/models.md lists "
        "all (default: on a Mac the first of schnell, flux2-klein-4b and z-image-turbo that is on "
        "disk, or schnell after a login at Hugging Face; else the built-in tiny model)",
        metavar="NAME",
    )
    quantize: int | None = _option(
        None,
        "quantize the weights to this many bits when loading (default: the precision they are "
        "stored in)",
        parse=int,
        choices=values.QUANTIZE,
    )
    quantize_choices: tuple[int, ...] = _option(
        (),
        "other bits that tasks may request, separated by commas (default: none)",
        parse=values.bits,
        metavar="BITS",
    )
    path: str | None = _option(
        None,
        "local folder or Hugging Face repository (org/name or org/name:COMMIT) to load the weights "
        "of --model from; the model of a folder is recognized if --model is absent (default: the "
        "model's own repository)",
        metavar="PATH",
    )
    models: tuple[str, ...] = _option(
        (),
        "models that tasks may name, separated by commas: names; all; or other weights, "
        "[NAME=]FOLDER[@BASE] or [NAME=]ORG/REPOSITORY[:COMMIT]@BASE, where BASE is the model "
        "they are of (default: --model alone). Missing weights are downloaded when a task first "
        "needs them, while other tasks are drawn",
        parse=values.names,
        metavar="NAMES",
    )
    models_in_memory: int = _option(
        1, "largest number of models kept in memory, if they fit", parse=values.whole_number(1, 100)
    )
    unload_after_s: int = _option(
        0,
        "seconds without a task after which the models are freed from memory; 0: never",
        parse=values.whole_number(0, 10**9),
    )
    affinity_s: int = _option(
        60,
        "seconds by which a task may be delayed in all by tasks of the same priority that reuse a "
        "loaded model; 0: strictly first come, first served",
        parse=values.whole_number(0, 10**9),
    )
    lora_dir: Path | None = _option(
        None,
        "folder with LoRAs (.safetensors) that tasks may name (default: none)",
        parse=values.directory,
        metavar="DIR",
    )
    allow_lora_repos: bool = _switch(
        False, "let tasks name LoRAs on Hugging Face (org/name), which are then downloaded"
    )
    wildcards_dir: Path | None = _option(
        None,
        "folder with the wildcards of prompts, a text file NAME.txt each, one value on each line "
        "(default: none)",
        parse=values.directory,
        metavar="DIR",
    )
    expand_url: str = _option(
        "",
        "base URL of an OpenAI-compatible API (like http://127.0.0.1:8080/v1) whose chat model "
        "writes prompts for tasks that ask for it (expand); its key, if it needs one, is read from "
        "the environment variable MFLUX_SERVER_EXPAND_KEY alone (default: none)",
        parse=values.url,
        metavar="URL",
    )
    expand_model: str = _option(
        "default", "name of the model that --expand-url is asked for", metavar="NAME"
    )
    download: str | None = _option(
        None, "download the weights of a model, with a progress bar, and end", metavar="NAME"
    )
    keys: Path | None = _option(
        None,
        "file with the keys of clients (TOML, docs/operations.md); it is read again when it "
        "changes. Without it, everyone is trusted on a loopback address; on any other address "
        "each client sees only its own tasks",
        parse=Path,
        metavar="FILE",
    )
    new_key: str | None = _option(
        None,
        "add a client of this name to the file of --keys, print its key once, and end",
        metavar="NAME",
    )
    backup: Path | None = _option(None, "copy tasks and images to a new file, and end", parse=Path)
    restore: Path | None = _option(None, "fill a new --data-dir from a backup, and end", parse=Path)
    operator_key: str = _option(
        "",
        "key that makes a client the operator, as Authorization: Bearer KEY (default: none; then "
        "the operators of --keys, or everyone where everyone is trusted)",
        metavar="KEY",
    )
    client_max_waiting: int = _option(
        0,
        "tasks that one client may have waiting, unless the file of --keys says otherwise; 0: no "
        "limit. Operators have none, and there is none where everyone is trusted",
        parse=values.whole_number(0, 1_000_000),
    )
    client_max_wait_s: int = _option(
        0, "the same in forecast seconds of work; 0: no limit", parse=values.whole_number(0, 10**9)
    )
    client_max_requests_per_s: int = _option(
        0,
        "requests per second that one client may send, those of ten seconds at once; 0: no limit",
        parse=values.whole_number(0, 1_000_000),
    )
    host: str = _option(
        "127.0.0.1", "address to listen on; 0.0.0.0 opens the server to the network"
    )
    lan: bool = _switch(
        False,
        "open the server to the local network, with keys (those of --keys, or keys.toml in the "
        "data dir), and show links and a QR code that sign browsers in",
    )
    pair: str | None = _option(
        None, "print such a link for this client of --keys, valid for an hour, and end"
    )
    bonjour: bool = _switch(False, "announce the server on the local network (Bonjour)")
    allowed_hosts: str = _option(
        "",
        "further names, separated by commas, under which clients may address the server; *: any "
        "(always allowed: localhost, and if it listens on other addresses too, IP addresses, "
        "names that end in .local and this machine's own names)",
        metavar="NAMES",
    )
    port: int = _option(
        4030, "port to listen on; 0 picks a free one", parse=values.whole_number(0, 65535)
    )
    data_dir: Path = _option(
        DEFAULT_DATA_DIR,
        "folder for everything the server keeps",
        parse=values.directory,
        metavar="DIR",
    )
    log_level: str = _option(
        "info",
        "lowest level that is logged",
        parse=str.lower,
        choices=("debug", "info", "warning", "error"),
    )
    log_format: str = _option(
        "text", "form of the log's lines", parse=str.lower, choices=("text", "json")
    )
    log_prompts: bool = _switch(False, "write the prompts of tasks into the log")
    traces: bool = _switch(
        False, "send a span of each task with OpenTelemetry (the variables OTEL_* say where)"
    )
    threads: int = _option(
        512,
        "threads that answer requests; all but 32 of them (half of fewer than 64) may wait: for a "
        "picture to be decoded, an event, the end of a task",
        parse=values.whole_number(2, 1024),
    )
    max_queue: int = _option(
        1000, "most tasks that may wait at a time", parse=values.whole_number(1, 1_000_000)
    )
    max_pixels: int = _option(
        2048 * 2048,
        "most pixels (width x height) of one image",
        parse=values.whole_number(256, 2**28),
    )
    max_steps: int = _option(100, "most steps of one task", parse=values.whole_number(1, 1000))
    max_prompt_chars: int = _option(
        10_000, "longest prompt, in characters", parse=values.whole_number(1, 1_000_000)
    )
    max_count: int = _option(10, "most images of one task", parse=values.whole_number(1, 100))
    max_input_pixels: int = _option(
        50_000_000,
        "most pixels (width x height) of a picture that a client sends",
        parse=values.whole_number(256, 178_000_000),
    )
    max_overtaken_s: int = _option(
        3600,
        "seconds for which urgent tasks may overtake a normal one; then it counts as urgent, too",
        parse=values.whole_number(0, 10**9),
    )
    preempt: bool = _switch(
        True,
        "pause a long picture between two steps while an urgent task, or one of a client that has "
        "had little, is drawn with the same weights",
    )
    max_wait_s: int = _option(
        0,
        "longest forecast wait with which a task is still accepted, in seconds; 0: no limit",
        parse=values.whole_number(0, 10**9),
    )
    sync_max_wait_s: int = _option(
        280,
        "longest forecast wait, in seconds, with which a call of the OpenAI and AUTOMATIC1111 APIs "
        "is accepted, because their callers disconnect after some minutes; above: 429; 0: no limit",
        parse=values.whole_number(0, 10**9),
    )
    clamp: bool = _switch(
        True,
        "limit the steps and the CFG that callers of these two APIs request to what suits the "
        "model: at most twice its default steps",
    )
    public_url: str = _option(
        "",
        "URL under which clients reach this server, for the image URLs of the OpenAI API (default: "
        "http:// and the Host of the request)",
        parse=values.url,
        metavar="URL",
    )
    trusted_proxies: tuple[values.Network, ...] = _option(
        (),
        "addresses or networks (10.0.0.0/8), separated by commas, of proxies whose headers "
        "X-Forwarded-For, -Proto, -Host and -Prefix count (docs/proxy.md; default: none)",
        parse=values.networks,
        metavar="ADDRESSES",
    )
    sdapi_model_switch: bool = _switch(
        False,
        "let clients of the AUTOMATIC1111 API switch the model of all its requests that name none",
    )
    cors_origins: tuple[str, ...] = _option(
        (),
        "origins (https://app.example), separated by commas, whose pages may use this server; *: "
        "any (default: none)",
        parse=values.origins,
        metavar="ORIGINS",
    )
    max_body_bytes: int = _option(
        50_000_000, "largest request body, in bytes", parse=values.whole_number(1_000, 2**30)
    )
    keep_s: int = _option(
        24 * 3600,
        "seconds for which finished images and the records of finished tasks are kept",
        parse=values.whole_number(1, 10**9),
    )
    keep_bytes: int = _option(
        5_000_000_000,
        "most bytes of finished images kept on disk; the oldest are removed first",
        parse=values.whole_number(0, 2**50),
    )
    max_kept_pictures: int = _option(
        200,
        "pictures that one client may pin with POST /keep, so that they do not expire (without a "
        "key: for 90 days); those of all clients take at most half of --keep-bytes",
        parse=values.whole_number(0, 10**6),
    )
    input_bytes: int = _option(
        2_000_000_000,
        "most bytes of pictures that clients have sent and that waiting or running tasks use, kept "
        "on disk",
        parse=values.whole_number(1_000, 2**50),
    )
    refetch_s: int = _option(
        300,
        "seconds for which an image can be fetched again after it was fetched and removed, in "
        "case the connection broke; 0: it is removed at once",
        parse=values.whole_number(0, 10**9),
    )
    metadata: bool = _switch(
        True, "write the parameters into image files, unless a task decides otherwise"
    )
    mark_generated: bool = _switch(
        True,
        "mark image files as made by a trained model: IPTC DigitalSourceType "
        "trainedAlgorithmicMedia, in XMP",
    )
    callback_hosts: tuple[str, ...] = _option(
        (),
        "names of hosts, separated by commas, that may be called when a task has ended "
        "(callback_url; default: none)",
        parse=values.hosts,
        metavar="NAMES",
    )
    callback_key: str = _option(
        "",
        "secret with which these calls are signed as Standard Webhooks: whsec_ and 24 to 64 bytes "
        "in base64 (default: they are not signed)",
        parse=values.webhook_secret,
        metavar="KEY",
    )
    previews: bool = _switch(True, "let clients see previews of running tasks, made on request")
    drain_s: int = _option(
        0,
        "seconds that the running task gets to finish when the server stops; if it needs more, it "
        "stops at its next step and runs again after the next start",
        parse=values.whole_number(0, 24 * 3600),
    )
    keep_awake: bool = _switch(True, "keep a Mac awake while tasks wait or run (macOS only)")
    cache_limit: int | None = _option(
        None,
        "most bytes of freed memory that MLX keeps for reuse (default: MLX's own limit)",
        parse=values.whole_number(0, 2**50),
        metavar="BYTES",
    )
    weights_cache: int = _option(
        30_000_000_000,
        "most bytes of quantized weights that are saved in the data dir, so that the next load "
        "does not quantize them again; or off. They are saved when the server is idle and while "
        "20 GB of the disk stay free; those used longest ago are removed first",
        parse=values.bytes_or_off,
        metavar="BYTES|off",
    )
    memory_check: bool = _switch(True, "refuse pictures that would not fit into memory")
    memory_limit: int | None = _option(
        None,
        "bytes that the server may use in all (default: nine tenths of the machine's; on a Mac "
        "what its GPU may use)",
        parse=values.whole_number(10**8, 2**50),
        metavar="BYTES",
    )
    vae_tiling: str | int = _option(
        "auto",
        "decode in tiles of SIZE pixels; auto: pictures that would not fit into memory otherwise",
        parse=values.tile_size,
        metavar="auto|SIZE|off",
    )
    compute_precision: str | None = _option(
        None,
        "compute layers in this precision (default: the model's)",
        choices=values.COMPUTE_PRECISIONS,
    )
    small_text_encoder: bool = _switch(False, "load a smaller text encoder")
    small_decoder: bool = _switch(False, "load a smaller decoder")
    low_ram: bool = _switch(False, "free Ming-Image's text encoder after use")
    broker: str = _option(
        "",
        "Redis or Valkey that carries tasks to workers on other machines (docs/cluster.md): "
        "redis://:PASSWORD@HOST:6379, or rediss:// for TLS. A worker names that of its head "
        "(default: none)",
        parse=values.broker_url,
        metavar="URL",
    )
    local_worker: bool = _switch(True, "draw on this machine, too; off: only other machines draw")
    worker_name: str = _option(
        "", "name of a worker in lists and forecasts (default: that of the machine)", metavar="NAME"
    )
    lease_s: int = _option(
        20,
        "seconds of silence after which a worker on another machine is given up, and what it ran "
        "is drawn elsewhere",
        parse=values.whole_number(2, 3600),
    )

    @staticmethod
    def read(
        argv: Sequence[str], environ: Mapping[str, str], program: str = "server.py"
    ) -> "Settings":
        """Reads the settings.

        Args:
            program: for messages.

        Raises:
            SystemExit: as in argparse: 0 for --help, 2 for a bad value (stderr names it).
        """
        return Settings(**values_of(fields(Settings), argv, environ, program))
