"""The mask brush of the page: painted with the mouse, a pen and the keyboard."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from conftest import ServerProcess, needs_chromium
from pages import Visit, Visitor, picture_file
from PIL import Image
from playwright.sync_api import FilePayload, Locator, expect

pytestmark = needs_chromium

WIDTH, HEIGHT = 128, 96


def gradient() -> FilePayload:
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = np.stack([columns * 2, rows * 2, 255 - columns], axis=2).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return {"name": "gradient.png", "mimeType": "image/png", "buffer": data.getvalue()}


def open_brush(me: Visitor) -> Locator:
    me.open()
    me["#init_image"].set_input_files(gradient())
    me["#paint-mask"].click()
    canvas = me[".paint [role=application]"]
    expect(canvas).to_be_visible()
    return canvas


def mask_of(me: Visitor) -> np.ndarray:
    """The grey values of the mask in the form, once it has taken the place of an earlier one."""
    masks = me["[data-field=mask] .picks img"]
    masks.evaluate_all("(all) => all.forEach((one) => (one.dataset.earlier = ''))")
    me.page.get_by_role("button", name="Use the mask").click()
    picture = me["[data-field=mask] .picks img:not([data-earlier])"]
    expect(picture).to_have_js_property("naturalWidth", WIDTH)
    pixels = picture.evaluate(
        """async (image) => {
          const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
        }"""
    )
    values = np.array(pixels, dtype=np.uint8).reshape(HEIGHT, WIDTH, 4)
    assert (values[..., 3] == 255).all()
    grey: np.ndarray = values[..., 0]
    return grey


def paint(
    me: Visitor, canvas: Locator, start: tuple[float, float], end: tuple[float, float]
) -> None:
    """With the mouse, from and to shares of the width and the height."""
    box = canvas.bounding_box()
    assert box
    for action, (across, down) in ((me.page.mouse.down, start), (me.page.mouse.up, end)):
        me.page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
        action()


LIFT_SECOND = """(canvas, box) => {
  const at = (kind, pointerId, x, y) => canvas.dispatchEvent(new PointerEvent(kind, {
    bubbles: true, buttons: 1, pointerId, pointerType: "touch",
    clientX: box.x + x * box.width, clientY: box.y + y * box.height,
  }));
  canvas.setPointerCapture = () => {};
  at("pointerdown", 1, 0.2, 0.5);
  at("pointerdown", 2, 0.5, 0.1);
  at("pointermove", 2, 0.8, 0.1);
  at("pointerup", 2, 0.8, 0.1);
  at("pointermove", 1, 0.8, 0.5);
  at("pointerup", 1, 0.8, 0.5);
}"""
"""A second finger comes and goes while the first one paints."""


def test_a_second_finger_ends_no_stroke_and_an_error_of_the_brush_says_its_reason(
    visit: Visit,
) -> None:
    me = visit()
    canvas = open_brush(me)
    canvas.evaluate(LIFT_SECOND, canvas.bounding_box())
    mask = mask_of(me)
    assert mask[HEIGHT // 2, 100] == mask[HEIGHT // 2, 30] == 255
    assert mask[10].max() == 0
    me.page.evaluate("window.createImageBitmap = async () => { throw new Error('no memory') }; 0")
    me["#paint-mask"].click()
    expect(me["#toasts"]).to_have_text("That did not work: no memory")


def test_only_what_is_painted_over_changes_in_the_picture(
    visit: Visit, served: ServerProcess
) -> None:
    me = visit()
    canvas = open_brush(me)
    paint(me, canvas, (0.1, 0.2), (0.4, 0.2))
    expect(me[".mask-tools output"]).to_have_text("4 % painted")
    me.assert_accessible()
    me.picture("mask")
    me.page.get_by_role("button", name="Use the mask").click()
    expect(me["[data-field=mask] .picks img"]).to_be_visible()
    me["#mask_feather"].fill("0")
    me["#format"].select_option("PNG")
    me["#prompt"].fill("repainted")
    me["#generate"].click()
    expect(me.shown("repainted")).to_have_count(1)
    answer = served.get("/image", task_id=me.task_ids()[0], delete="false")
    drawn = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB")).astype(int)
    source = np.asarray(Image.open(io.BytesIO(gradient()["buffer"])).convert("RGB")).astype(int)
    assert drawn.shape == source.shape == (HEIGHT, WIDTH, 3)
    changed = np.abs(drawn - source).sum(axis=2) > 0
    rows, columns = np.nonzero(changed)
    assert changed[19, 13:51].mean() > 0.9
    radius = round(0.08 * WIDTH / 2) + 1
    assert rows.min() >= 0.2 * HEIGHT - radius
    assert rows.max() <= 0.2 * HEIGHT + radius
    assert columns.min() >= 0.1 * WIDTH - radius
    assert columns.max() <= 0.4 * WIDTH + radius


def test_strokes_are_erased_undone_and_inverted_and_painted_on_later(visit: Visit) -> None:
    me = visit()
    canvas = open_brush(me)
    paint(me, canvas, (0.2, 0.5), (0.8, 0.5))
    me["label"].filter(has_text="Eraser").click()
    paint(me, canvas, (0.5, 0.2), (0.5, 0.8))
    me.page.get_by_role("button", name="Invert").click()
    paint(me, canvas, (0.1, 0.1), (0.9, 0.1))
    me.page.get_by_role("button", name="Undo").click()
    share = me[".mask-tools output"].inner_text()
    mask = mask_of(me)
    middle = HEIGHT // 2
    assert mask[middle, 32] == mask[middle, 96] == 0
    assert mask[middle, 64] == mask[10, 64] == 255
    me["#paint-mask"].click()
    expect(me[".mask-tools output"]).to_have_text(share)
    me["label"].filter(has_text="Eraser").click()
    paint(me, canvas, (0.1, 0.1), (0.9, 0.1))
    again = mask_of(me)
    assert again[10, 64] == again[middle, 32] == 0
    assert again[middle, 64] == 255


def with_keyboard(me: Visitor, canvas: Locator) -> None:
    canvas.focus()
    me.page.keyboard.press("Space")
    for _ in range(4):
        me.page.keyboard.press("Shift+ArrowRight")
    me.page.keyboard.press("Space")
    me.page.keyboard.press("Shift+ArrowDown")


def with_pen(me: Visitor, canvas: Locator) -> None:
    box = canvas.bounding_box()
    assert box
    canvas.evaluate(
        """(canvas, [left, right, y]) => {
          const at = (kind, clientX, pressure) => canvas.dispatchEvent(new PointerEvent(kind, {
            bubbles: true, buttons: 1,
            pointerId: 1, pointerType: "pen", clientX, clientY: y, pressure,
          }));
          canvas.setPointerCapture = () => {};
          at("pointerdown", left, 1);
          at("pointermove", right, 0);
          at("pointerup", right, 0);
        }""",
        [box["x"] + box["width"] / 2, box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2],
    )


@pytest.mark.parametrize("way", [with_keyboard, with_pen])
def test_a_mask_is_painted_without_a_mouse(
    visit: Visit, way: Callable[[Visitor, Locator], None]
) -> None:
    me = visit()
    canvas = open_brush(me)
    way(me, canvas)
    mask = mask_of(me)
    painted = (mask > 127).sum(axis=0)
    assert painted[66] > 0
    assert painted[90] > 0
    assert painted[10] == painted[125] == 0
    assert mask[80].max() == 0
    if way is with_pen:  # it pressed less and less: each part of a stroke has a width of its own
        assert painted[90] < painted[62]


def test_a_finger_paints_and_the_brush_fits_a_phone(visit: Visit) -> None:
    me = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    canvas = open_brush(me)
    box = canvas.bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    me.page.touchscreen.tap(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    expect(me[".mask-tools output"]).not_to_have_text("0 % painted")
    me.picture("mask-phone")
    assert mask_of(me)[HEIGHT // 2, WIDTH // 4] == 255


def test_a_model_that_needs_a_mask_has_the_brush_and_others_without_a_picture_do_not(
    visit: Visit,
) -> None:
    me = visit().open()
    expect(me["#paint-mask"]).to_be_hidden()
    me["#model"].select_option("noise-fill")
    expect(me["#paint-mask"]).to_be_hidden()
    me["#init_image"].set_input_files(picture_file(64, 64, "teal"))
    expect(me["#paint-mask"]).to_be_visible()
    expect(me["#mask_feather"]).to_be_hidden()
