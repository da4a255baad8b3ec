// Builds elements without parsing HTML.

export const find = (id) => document.getElementById(id);

/** el("p", {class: "hint", hidden: true, on: {click}}, "text", node) */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "on") {
      for (const [kind, listener] of Object.entries(value)) node.addEventListener(kind, listener);
    } else if (name === "class") {
      node.className = value;
    } else if (name in node && !name.startsWith("aria")) {
      node[name] = value;
    } else {
      node.setAttribute(name, value);
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "i");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A round button with an icon and a label for screen readers. */
export function iconButton(name, words, onClick) {
  return el(
    "button",
    { type: "button", class: "quiet icon", title: words, "aria-label": words, on: { click: onClick } },
    icon(name),
  );
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Makes the children of `parent` match `items`. Elements that remain are reused and keep focus and animations. */
export function follow(parent, items, keyOf, create, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const keys = new Set(items.map(keyOf));
  for (const [key, node] of old) if (!keys.has(key)) node.remove(); // first, so that the others need not move
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let node = old.get(key);
    if (!node) {
      node = create(item);
      node.dataset.key = key;
    }
    update?.(node, item);
    if (node === place) {
      place = place.nextElementSibling;
    } else {
      parent.insertBefore(node, place);
    }
  }
}
