"""Pictures that are dropped on the page with settings inside: ours, mflux's, AUTOMATIC1111's."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

from conftest import ServerProcess, needs_chromium
from pages import Visit, Visitor
from PIL import Image, PngImagePlugin
from playwright.sync_api import expect

from images import encode_image

pytestmark = needs_chromium

MFLUX = {
    "prompt": "a fox \u72d0",
    "negative_prompt": "fog",
    "model": "black-forest-labs/FLUX.1-dev",
    "seed": 18446744073709551615,
    "steps": 7,
    "guidance": 2.5,
    "width": 512,
    "height": 384,
    "lora_paths": ["/loras/watercolour.safetensors"],
    "lora_scales": [0.125],
    "image_path": None,
}
OF_MFLUX = {
    "prompt": "a fox \u72d0",
    "negative_prompt": "fog",
    "model": "black-forest-labs/FLUX.1-dev",
    "seed": "18446744073709551615",
    "steps": 7,
    "guidance": 2.5,
    "width": 512,
    "height": 384,
    "loras": [{"name": "watercolour", "scale": 0.125}],
}
A1111 = (
    "a fox, <lora:watercolour:0.8> snow\n(second line)\nNegative prompt: fog, rain\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 6.5, Seed: 4294967296, Size: 512x768, "
    'Model hash: 12ab, Model: dev, Lora hashes: "watercolour: 12ab, other: 34cd", Version: v1.6.0'
)
OF_A1111 = {
    "prompt": "a fox,  snow\n(second line)",
    "negative_prompt": "fog, rain",
    "steps": 20,
    "guidance": 6.5,
    "seed": "4294967296",
    "width": 512,
    "height": 768,
    "model": "dev",
    "loras": [{"name": "watercolour", "scale": 0.8}],
}
PICTURE = Image.new("RGB", (48, 32), "teal")


def with_text(kind: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    if kind == "tEXt":
        info.add_text("parameters", A1111)
    else:
        info.add_itxt("parameters", A1111, zip=kind == "compressed")
    data = io.BytesIO()
    PICTURE.save(data, "PNG", pnginfo=info)
    return data.getvalue()


def with_comment(order: str) -> bytes:
    exif = Image.Exif()
    code = "utf-16-be" if order == ">" else "utf-16-le"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode(code)
    data = io.BytesIO()
    PICTURE.save(data, "JPEG", exif=exif)
    return data.getvalue()


READ = """async (data) => {
  const { settingsOf } = await import("./web/picture_settings.js");
  const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
  const file = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return settingsOf(await new Response(file).blob());
}"""


def settings_of(me: Visitor, data: bytes) -> Any:
    """What the page reads in a file. It is sent compressed: some are large."""
    return me.page.evaluate(READ, base64.b64encode(zlib.compress(data)).decode())


def test_the_settings_in_files_of_all_kinds_are_read(visit: Visit) -> None:
    me = visit().open()
    for format in ("PNG", "JPEG", "WEBP"):
        assert settings_of(me, encode_image(PICTURE, format, 90, MFLUX)) == OF_MFLUX, format
    for kind in ("tEXt", "iTXt", "compressed"):
        assert settings_of(me, with_text(kind)) == OF_A1111, kind
    for order in "<>":
        assert settings_of(me, with_comment(order)) == OF_A1111, order
    assert settings_of(me, encode_image(PICTURE, "PNG", 90)) is None


def chunk(name: bytes, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">I", size) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


START = b"\x89PNG\r\n\x1a\n"
LOOP = b"MM\0*\0\0\0\x08" + b"\xff\xff" + b"\0" * 12 * 3
SMALL_BOMB = b"parameters\0\0" + zlib.compress(b"a" * 1_000_000, 9)
HOSTILE: dict[str, Callable[[], bytes]] = {
    "a chunk longer than the file": lambda: START + chunk(b"tEXt", b"parameters\0x", 2**32 - 1),
    "a million empty chunks": lambda: START + chunk(b"tEXt", b"") * 1_000_000,
    "a text that grows a thousandfold": lambda: (
        START + chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(b"a" * 100_000_000, 9))
    ),
    "a text without an end": lambda: START + chunk(b"iTXt", b"parameters"),
    "a directory without an end": lambda: START + chunk(b"eXIf", LOOP),
    "a directory that leads to itself": lambda: (
        START + chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\x87\x69\0\4\0\0\0\1\0\0\0\x08")
    ),
    "deep JSON": lambda: START + chunk(b"tEXt", b"parameters\0" + b'{"prompt":' * 100_000),
    "many steps": lambda: START + chunk(b"tEXt", b"parameters\0" + b"\nSteps: 1, " * 90_000),
    "many loras": lambda: (
        START + chunk(b"tEXt", b"parameters\0" + b"<lora:" * 100_000 + b"\nSteps: 1, ")
    ),
    "many texts that grow": lambda: START + chunk(b"zTXt", SMALL_BOMB) * 1_000,
    "many texts of others that grow": lambda: START + chunk(b"zTXt", b"x" + SMALL_BOMB) * 1_000,
    "many loras of mflux": lambda: (
        START
        + chunk(
            b"tEXt", b"parameters\0" + json.dumps({**MFLUX, "lora_paths": ["a"] * 200_000}).encode()
        )
    ),
    "a JPEG of nothing but markers": lambda: b"\xff\xd8" + b"\xff\xe1\0\2" * 1_000_000,
    "an empty file": lambda: b"",
    "a WebP that ends early": lambda: b"RIFF\0\0\0\0WEBPEXIF\x40\0\0\0Exif",
}


def test_hostile_files_neither_stop_the_page_nor_set_anything(visit: Visit) -> None:
    me = visit().open()
    for name, made in HOSTILE.items():
        found = settings_of(me, made())
        if name == "many loras of mflux":
            assert len(found.pop("loras")) == 100
            assert found.items() <= OF_MFLUX.items()
        else:
            assert found is None or set(found) <= {"prompt", "steps"}, name
    me["#prompt"].fill("still here")


def test_hostile_settings_can_be_loaded_and_leave_the_page_usable(visit: Visit) -> None:
    me = visit().open()
    me.expected_statuses = {400}  # the prompt is too long for a forecast
    prompt = "{" + "|" * 900_000
    names = ["constructor", "__proto__", "toString", "<b onclick=x>"]
    settings = json.dumps({"prompt": prompt, "lora_paths": names, "steps": 3}).encode()
    data = START + chunk(b"tEXt", b"parameters\0" + settings)
    me.page.evaluate(DROP, base64.b64encode(data).decode())
    me.page.get_by_role("button", name="Load its settings").click()
    expect(me["#toasts"]).to_contain_text("constructor, __proto__, toString and <b onclick=x>.")
    expect(me["#steps"]).to_have_value("3")
    me.page.reload()
    expect(me["#steps"]).to_have_value("3")
    assert len(me["#prompt"].input_value()) == 100_000
    me["#prompt"].fill("still here")


DROP = """(data) => {
  const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
  const dropped = new DataTransfer();
  dropped.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
  document.body.dispatchEvent(
    new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: dropped }));
}"""


def test_a_dropped_picture_of_the_page_is_drawn_again_with_its_settings(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit().open()
    me["#model"].select_option("noise-z-image")
    me["#format"].select_option("PNG")
    me["#guidance"].fill("2")
    me.draw("once more")
    expect(me.shown("once more")).to_have_count(1)
    first = me.task_ids()[0]
    picture = served.get("/image", task_id=first, delete="false").content
    me["#model"].select_option("noise-flux1")
    me["#prompt"].fill("something else")
    me.page.evaluate(DROP, base64.b64encode(picture).decode())
    expect(me[".panel"]).to_contain_text("once more")
    me.assert_accessible()
    me.picture("dropped")
    me.page.get_by_role("button", name="Load its settings").click()
    expect(me["#prompt"]).to_have_value("once more")
    expect(me["#model"]).to_have_value("noise-z-image")
    me["#generate"].click()
    expect(me.shown("once more")).to_have_count(2)
    params = [served.get("/status", task_id=one).json()["params"] for one in me.task_ids()[:2]]
    assert params[0] == params[1]


def test_what_the_server_does_not_have_is_named_and_the_picture_can_be_input_instead(
    visit: Visit,
) -> None:
    me = visit().open()
    data = base64.b64encode(with_text("tEXt")).decode()
    me.page.evaluate(DROP, data)
    me.page.get_by_role("button", name="Load its settings").click()
    expect(me["#toasts"]).to_contain_text("without what this server does not have: watercolour.")
    expect(me["#model"]).to_have_value("dev")
    expect(me["#size-words"]).to_contain_text("512")
    me.page.get_by_role("button", name="Undo").click()
    expect(me["#model"]).to_have_value("noise-flux1")
    me.page.evaluate(DROP, data)
    me.page.get_by_role("button", name="Use it as input").click()
    expect(me["[data-field=init_image] .picks img"]).to_be_visible()
    expect(me["#prompt"]).to_have_value("")
