// The buttons of the form that open a dialog. What they need is loaded when they are used.

import { find } from "./dom.js";
import { withModule } from "./panel.js";

/** Dispatches "grid" of the form (detail: the requests of all cells). */
export function formTools(form) {
  const onClick = (id, load, run) => find(id).addEventListener("click", () => withModule(load, run));
  onClick("compare-models", () => import("./model_picker.js"), async ({ pickModel }) => {
    const model = await pickModel(form.models, form.state.model, form.sides());
    if (model) form.change({ model });
  });
  onClick("prompts", () => import("./prompt_library.js"), ({ openLibrary }) =>
    openLibrary(
      () => form.state.prompt,
      (prompt) => form.change({ prompt }),
    ),
  );
  onClick("xy-grid", () => import("./xy_grid.js"), async ({ askForGrid }) => {
    const request = form.checked();
    if (!request) return;
    const cells = await askForGrid(request, form.model, form.models);
    if (cells) form.dispatchEvent(new CustomEvent("grid", { detail: cells }));
  });
  find("another-choice").addEventListener("click", () => form.forecastSoon());
}
