// The buttons of the form that open a dialog. What they need is loaded when they are used.

import { find } from "./dom.js";
import { withFiles } from "./panel.js";

/** Dispatches "grid" of the form (detail: the requests of all cells). */
export function formTools(form) {
  const onClick = (id, run) => find(id).addEventListener("click", () => withFiles(run));
  onClick("compare-models", async () => {
    const { pickModel } = await import("./model_picker.js");
    const model = await pickModel(form.models, form.state.model, form.sides());
    if (model) form.change({ model });
  });
  onClick("prompts", async () => {
    const { openLibrary } = await import("./prompt_library.js");
    await openLibrary(
      () => form.state.prompt,
      (prompt) => form.change({ prompt }),
    );
  });
  onClick("xy-grid", async () => {
    const request = form.checked();
    if (!request) return;
    const { askForGrid } = await import("./xy_grid.js");
    const cells = await askForGrid(request, form.model, form.models);
    if (cells) form.dispatchEvent(new CustomEvent("grid", { detail: cells }));
  });
  find("another-choice").addEventListener("click", () => form.forecastSoon());
}
