// The grids of this browser as buttons above the gallery.

import { el, find, follow } from "./dom.js";
import { t } from "./language.js";
import { withModule } from "./panel.js";

const MOST = 8;

export class Grids {
  #list = find("grids");

  /** open(item): the large view of a picture. */
  constructor(tasks, open) {
    this.tasks = tasks;
    this.open = open;
    tasks.addEventListener("change", () => this.show());
    this.show();
  }

  show() {
    const grids = new Map();
    for (const { grid } of this.tasks.list()) if (grid) grids.set(grid.id, grid);
    const latest = [...grids.values()].slice(0, MOST);
    follow(this.#list, latest, ({ id }) => id, (grid) => this.#button(grid));
    this.#list.hidden = latest.length === 0;
  }

  view(id) {
    return withModule(() => import("./grid_view.js"), ({ openGrid }) => openGrid(id, this.tasks, this.open));
  }

  #button({ id, across, down }) {
    const names = { across: t(`xy.${across.name}`), down: t(`xy.${down.name}`) };
    const words = `${t("xy.open")}: ${t("xy.of", names)}`;
    return el("li", {}, el("button", { type: "button", class: "quiet", on: { click: () => this.view(id) } }, words));
  }
}
