// A grid of pictures as a table: its tasks, in their places.

import { thumbnailUrl } from "./api.js";
import { el } from "./dom.js";
import { t } from "./language.js";
import { openPanel, sheet } from "./panel.js";
import { stored } from "./tasks.js";

/** Without a picture; other states wait for one. */
const STATES = { failed: "xy.failed", cancelled: "gallery.cancelled", gone: "gallery.gone" };

const gridTitle = ({ across, down }) => t("xy.of", { across: t(`xy.${across.name}`), down: t(`xy.${down.name}`) });

/** Shows the grid with this id while its pictures are drawn. tasks: Tasks; open(item): the large view. */
export async function openGrid(id, tasks, open) {
  const members = () => tasks.list().filter((task) => task.grid?.id === id);
  const [{ grid }] = members();
  await sheet("./xy_grid.css");
  const head = (words) => el("th", { scope: "col" }, words);
  const cells = new Map();
  const rows = grid.down.values.map((value, row) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, value),
      ...grid.across.values.map((_, column) => {
        const node = el("td", {}, el("span", {}, t("xy.not_sent")));
        cells.set(`${column} ${row}`, node);
        return node;
      }),
    ),
  );
  const table = el(
    "table",
    {},
    el("thead", {}, el("tr", {}, el("td"), ...grid.across.values.map(head))),
    el("tbody", {}, ...rows),
  );
  const show = () => {
    for (const task of members()) {
      const node = cells.get(`${task.grid.column} ${task.grid.row}`);
      const state = `${task.id} ${task.status}`;
      if (node.dataset.state === state) continue;
      node.dataset.state = state;
      node.replaceChildren(content(task, open));
    }
  };
  show();
  tasks.addEventListener("change", show);
  const scroll = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": gridTitle(grid) }, table);
  await openPanel("grid-table", gridTitle(grid), [scroll]);
  tasks.removeEventListener("change", show);
}

function content(task, open) {
  if (!stored(task)) return el("span", {}, t(STATES[task.status] ?? "xy.waiting"));
  const image = el("img", { src: thumbnailUrl(task.id, 0, 256), alt: task.params.prompt });
  const item = { key: `${task.id} 0`, task, index: 0 };
  return el("button", { type: "button", on: { click: () => open(item) } }, image);
}
