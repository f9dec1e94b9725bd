// The view of BlockExplorer: it draws what Python computed and says what was chosen.
//
// Read from Python: `picture` (the map of one head), `detail` (what one query reads) and
// `states` (colour, ink and label of every state). Written: query, topk, block_size, head.

const SELECTED = 2;
const CURRENT = 3;
// Rows of fewer pixels would leave no room for the marks.
const ROW_PIXELS = { few: 14, many: 8 };
const FEW_ROWS = 64;
// Rows of context that stay in sight above and below the query.
const ROWS_AROUND = 3;
const MAP_WIDTH = 360;
const CELL_PIXELS = { least: 6, most: 30 };
const NUMBER_PIXELS = { wide: 26, high: 14 };
const BORDER = "#8C8C8C";
const HATCH = "#4D4D4D";

const SLIDERS = [
  {
    name: "topk",
    label: "topk",
    values: (picture) => range(1, picture.most_topk),
    words: (value) => (value === 1 ? "1 block" : `${value} blocks`),
  },
  {
    name: "block_size",
    label: "block size",
    values: (picture) => picture.sizes,
    words: (value) => (value === 1 ? "1 token" : `${value} tokens`),
  },
  {
    name: "head",
    label: "head",
    values: (picture) => range(0, picture.heads - 1),
    words: (value) => `head ${value}`,
  },
];

const STEPS = {
  ArrowDown: (query) => query + 1,
  ArrowUp: (query) => query - 1,
  PageDown: (query, page) => query + page,
  PageUp: (query, page) => query - page,
  Home: () => 0,
  End: (query, page, last) => last,
};

// Without it JupyterLab takes the arrow keys to move between cells.
const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" };

const HINT =
  "Point at a row, or focus the map and press ↑ ↓, Page Up or Page Down for one block, " +
  "Home or End.";

function render({ model, el }) {
  const view = build(model.get("states"));
  el.append(view.root);
  const listeners = listen(model, view);
  drawPicture(model, view);
  drawDetail(model, view);
  // The size of the map is known only once it is on the page.
  const resized = new ResizeObserver(() => {
    drawRows(model, view);
    keepInSight(model, view);
  });
  resized.observe(view.map);
  return () => {
    resized.disconnect();
    for (const [event, callback] of listeners) model.off(event, callback);
  };
}

// Building the page

function element(tag, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function build(states) {
  const id = `moba-${Math.random().toString(36).slice(2)}`;
  const sliders = SLIDERS.map((slider) => buildSlider(slider, id));
  const map = buildMap(id);
  const said = element("p", { class: "said", role: "status", "aria-live": "polite" });
  const panel = element("div", {
    class: "panel",
    role: "region",
    tabindex: 0,
    ...OWN_KEYS,
    "aria-label": "blocks of the query",
  });
  const controls = element("div", { class: "controls" }, ...sliders.flatMap((s) => s.parts));
  const side = element("div", { class: "side" }, controls, said, panel);
  const root = element(
    "div",
    { class: "moba-explorer", role: "group", "aria-label": "Block explorer" },
    element("div", { class: "body" }, map.figure, side),
    buildLegend(states),
    element("p", { class: "hint", id: `${id}-hint`, text: HINT }),
  );
  for (const [number, state] of states.entries()) {
    root.style.setProperty(`--state-${number}`, state.color);
    root.style.setProperty(`--ink-${number}`, state.ink);
  }
  return { root, sliders, said, panel, states, ...map };
}

function buildSlider(slider, id) {
  const name = `${id}-${slider.name}`;
  const input = element("input", { type: "range", min: 0, step: 1, id: name, ...OWN_KEYS });
  const shown = element("span", { class: "value", "aria-hidden": "true" });
  const label = element("label", { for: name, text: slider.label });
  return { ...slider, input, shown, parts: [label, input, shown] };
}

function buildMap(id) {
  const canvas = element("canvas", { class: "cells", "aria-hidden": "true" });
  const columns = element("div", { class: "columns", "aria-hidden": "true" });
  const numbers = element("div", { class: "numbers", "aria-hidden": "true" });
  const cursor = element("div", {
    class: "cursor",
    id: `${id}-query`,
    role: "option",
    "aria-selected": "true",
  });
  const rows = element("div", { class: "rows", role: "none" }, canvas, numbers, cursor);
  const attributes = {
    class: "map",
    role: "listbox",
    tabindex: 0,
    ...OWN_KEYS,
    "aria-label": "queries",
    "aria-activedescendant": cursor.id,
    "aria-describedby": `${id}-hint`,
  };
  const map = element("div", attributes, columns, rows);
  const overview = buildOverview();
  const figure = element(
    "div",
    { class: "figure" },
    element("div", { class: "x-name", text: "key block" }),
    element("div", { class: "y-name", text: "query position" }),
    map,
    overview.strip,
  );
  return { map, figure, rows, canvas, columns, numbers, cursor, ...overview };
}

function buildOverview() {
  const whole = element("canvas");
  const frame = element("div", { class: "frame" });
  const strip = element("div", { class: "overview", "aria-hidden": "true" }, whole, frame);
  return { strip, whole, frame };
}

function buildLegend(states) {
  const legend = element("ul", { class: "legend", "aria-label": "states of blocks" });
  for (const [number, state] of states.slice(0, CURRENT + 1).entries()) {
    legend.append(element("li", {}, mark(number), state.label));
  }
  return legend;
}

function mark(state) {
  return element("span", { class: `mark state-${state}`, "aria-hidden": "true" });
}

// Listening to the model and to the reader

function listen(model, view) {
  const redraw = {
    "change:picture": () => drawPicture(model, view),
    "change:detail": () => drawDetail(model, view),
    "change:query": () => drawCursor(model, view),
  };
  for (const slider of view.sliders) {
    redraw[`change:${slider.name}`] = () => drawSlider(model, view, slider);
    slider.input.addEventListener("input", () => {
      const offered = slider.values(model.get("picture"));
      choose(model, slider.name, offered[slider.input.value]);
    });
  }
  for (const [event, callback] of Object.entries(redraw)) model.on(event, callback);
  view.map.addEventListener("keydown", (event) => onKey(event, model, view));
  view.map.addEventListener("scroll", () => drawRows(model, view));
  for (const name of ["pointerdown", "pointermove"]) {
    view.rows.addEventListener(name, (event) => onPointer(event, model, view));
    view.strip.addEventListener(name, (event) => onOverview(event, view));
  }
  return Object.entries(redraw);
}

function choose(model, name, value) {
  if (model.get(name) === value) return;
  model.set(name, value);
  model.save_changes();
}

function onKey(event, model, view) {
  const step = STEPS[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const { queries, block_size: page } = model.get("picture");
  const query = step(model.get("query"), page, queries - 1);
  choose(model, "query", clamp(query, 0, queries - 1));
  keepInSight(model, view);
}

function onPointer(event, model, view) {
  // Some browsers report a move of 0 pixels when rows scroll under a resting pointer.
  const rests = event.movementX === 0 && event.movementY === 0;
  if (event.type === "pointermove" && rests) return;
  const { queries } = model.get("picture");
  const y = event.clientY - view.rows.getBoundingClientRect().top;
  choose(model, "query", clamp(Math.floor(y / rowPixels(queries)), 0, queries - 1));
}

function onOverview(event, { map, strip }) {
  if (event.buttons === 0) return;
  const box = strip.getBoundingClientRect();
  const at = (event.clientY - box.top) / box.height;
  map.scrollTop = at * map.scrollHeight - map.clientHeight / 2;
}

function keepInSight(model, { map, columns }) {
  const high = rowPixels(model.get("picture").queries);
  const seen = map.clientHeight - columns.offsetHeight;
  const top = (model.get("query") - ROWS_AROUND) * high;
  const bottom = (model.get("query") + 1 + ROWS_AROUND) * high;
  if (top < map.scrollTop) map.scrollTop = top;
  if (bottom > map.scrollTop + seen) map.scrollTop = bottom - seen;
}

// Drawing the map

function drawPicture(model, view) {
  const picture = model.get("picture");
  const high = rowPixels(picture.queries);
  const wide = cellPixels(picture.blocks);
  for (const slider of view.sliders) drawSlider(model, view, slider);
  view.rows.style.height = `${picture.queries * high}px`;
  view.rows.style.width = `${picture.blocks * wide}px`;
  view.columns.style.width = view.rows.style.width;
  const every = Math.ceil(NUMBER_PIXELS.wide / wide);
  view.columns.replaceChildren(...numbered(picture.blocks, every, "left", wide));
  const least = Math.ceil(NUMBER_PIXELS.high / high);
  const step = clamp(picture.block_size, least, 16);
  view.numbers.replaceChildren(...numbered(picture.queries, step, "top", high));
  drawOverview(picture, view);
  drawCursor(model, view);
  drawRows(model, view);
  keepInSight(model, view);
}

function drawSlider(model, view, { name, values, words, input, shown }) {
  const offered = values(model.get("picture"));
  const value = model.get(name);
  input.max = offered.length - 1;
  input.value = offered.indexOf(value);
  input.disabled = offered.length === 1;
  input.setAttribute("aria-valuetext", words(value));
  shown.textContent = value;
  drawWaiting(model, view);
}

function drawCursor(model, view) {
  const query = model.get("query");
  const { queries } = model.get("picture");
  const high = rowPixels(queries);
  view.cursor.style.top = `${query * high}px`;
  view.cursor.style.height = `${high}px`;
  view.cursor.setAttribute("aria-label", `query ${query}`);
  view.cursor.setAttribute("aria-posinset", query + 1);
  view.cursor.setAttribute("aria-setsize", queries);
  view.cursor.dataset.query = query;
  drawWaiting(model, view);
}

// Only the rows in sight are drawn, so long texts cost no more than short ones.
function drawRows(model, view) {
  const picture = model.get("picture");
  const high = rowPixels(picture.queries);
  const wide = cellPixels(picture.blocks);
  const { scrollTop, clientHeight, scrollHeight } = view.map;
  const room = clientHeight - view.columns.offsetHeight;
  const seen = Math.min(room, picture.queries * high);
  if (seen <= 0) return;
  const pen = penOf(view.canvas, picture.blocks * wide, seen);
  pen.translate(0, -scrollTop);
  const paint = { pen, wide, high, states: view.states, hatch: hatch(pen) };
  const last = Math.min(picture.queries, Math.ceil((scrollTop + seen) / high));
  for (let query = Math.floor(scrollTop / high); query < last; query++) {
    drawRow(paint, picture, query);
  }
  view.strip.hidden = scrollHeight <= clientHeight;
  view.frame.style.top = `${(100 * scrollTop) / scrollHeight}%`;
  view.frame.style.height = `${(100 * clientHeight) / scrollHeight}%`;
}

function penOf(canvas, wide, high) {
  const dense = window.devicePixelRatio || 1;
  canvas.width = Math.round(wide * dense);
  canvas.height = Math.round(high * dense);
  canvas.style.width = `${wide}px`;
  canvas.style.height = `${high}px`;
  const pen = canvas.getContext("2d");
  pen.scale(dense, dense);
  return pen;
}

function drawRow(paint, picture, query) {
  const { pen, wide, high } = paint;
  const y = query * high;
  for (let block = 0; block < picture.blocks; block++) {
    drawCell(paint, picture.cells.getUint8(query * picture.blocks + block), block * wide, y);
  }
  if (picture.edges.includes(query)) {
    pen.fillStyle = "black";
    pen.fillRect(0, y - 1, picture.blocks * wide, 2);
  }
}

function drawCell({ pen, wide, high, states, hatch }, state, x, y) {
  pen.fillStyle = states[state].color;
  pen.fillRect(x, y, wide, high);
  if (state === CURRENT) {
    pen.fillStyle = hatch;
    pen.fillRect(x, y, wide, high);
  }
  if (state === SELECTED) {
    pen.fillStyle = states[state].ink;
    pen.beginPath();
    pen.arc(x + wide / 2, y + high / 2, Math.min(wide, high) / 4.5, 0, 2 * Math.PI);
    pen.fill();
  }
  pen.strokeStyle = BORDER;
  pen.lineWidth = 0.5;
  pen.strokeRect(x + 0.25, y + 0.25, wide - 0.5, high - 0.5);
}

function hatch(pen) {
  const tile = element("canvas", { width: 6, height: 6 });
  const own = tile.getContext("2d");
  own.strokeStyle = HATCH;
  own.beginPath();
  for (const x of [-6, 0, 6]) {
    own.moveTo(x, 6);
    own.lineTo(x + 6, 0);
  }
  own.stroke();
  return pen.createPattern(tile, "repeat");
}

// One pixel per cell, which the page scales to the size of the strip.
function drawOverview({ queries, blocks, cells }, { whole, states }) {
  whole.width = blocks;
  whole.height = queries;
  const pen = whole.getContext("2d");
  const image = pen.createImageData(blocks, queries);
  const pixels = new Uint32Array(image.data.buffer);
  const colors = states.map(({ color }) => littleEndian(color));
  for (let n = 0; n < pixels.length; n++) pixels[n] = colors[cells.getUint8(n)];
  pen.putImageData(image, 0, 0);
}

function littleEndian(color) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

// Saying what the query reads

function drawDetail(model, view) {
  const detail = model.get("detail");
  const title = `Query ${detail.query} of head ${detail.head}, in block ${detail.own}`;
  const names = ["block", "tokens", "score", "share of attention"];
  const head = element("tr", {}, ...names.map((text) => element("th", { scope: "col", text })));
  view.said.textContent = detail.sentence;
  view.panel.replaceChildren(
    element(
      "table",
      {},
      element("caption", { text: title }),
      element("thead", {}, head),
      ...detail.rows.map((row) => groupOf(row, detail, view.states)),
    ),
  );
  drawWaiting(model, view);
}

function groupOf(row, detail, states) {
  const label = element("span", { class: "unseen", text: `(${states[row.state].label})` });
  const score = row.state === CURRENT ? "own" : decimal(row.score);
  const numbers = element(
    "tr",
    {},
    element("th", { scope: "rowgroup" }, mark(row.state), `${row.block}`, label),
    element("td", { text: `${row.first} to ${row.last}` }),
    element("td", { text: score }),
    row.state < SELECTED ? leftOut(detail) : shareOf(row),
  );
  const group = element("tbody", { "data-block": row.block }, numbers);
  if (row.text !== null) group.append(element("tr", {}, textOf(row)));
  return group;
}

function leftOut({ left_out: count }) {
  const among = count === 1 ? "the one left out" : `the best of ${count} left out`;
  return element("td", { text: `not read, ${among}` });
}

function shareOf({ share, state }) {
  const bar = element("span", { class: `bar state-${state}` });
  bar.style.width = `${100 * share}%`;
  const track = element("span", { class: "track", "aria-hidden": "true" }, bar);
  return element("td", {}, element("span", { class: "number", text: percent(share) }), track);
}

function textOf({ text, state }) {
  const code = element("code");
  if (state === CURRENT) {
    const own = element("mark", { text: text.slice(-1), title: "the query's own byte" });
    code.append(text.slice(0, -1), own);
  } else {
    code.append(text);
  }
  return element("td", { class: "text", colspan: 4 }, code);
}

function drawWaiting(model, { panel }) {
  const detail = model.get("detail");
  const settings = ["query", "topk", "block_size", "head"];
  const waiting = settings.some((name) => detail[name] !== model.get(name));
  panel.setAttribute("aria-busy", waiting);
}

// Numbers

function rowPixels(queries) {
  return queries <= FEW_ROWS ? ROW_PIXELS.few : ROW_PIXELS.many;
}

function cellPixels(blocks) {
  return clamp(Math.floor(MAP_WIDTH / blocks), CELL_PIXELS.least, CELL_PIXELS.most);
}

function numbered(count, every, side, pixels) {
  return range(0, Math.floor((count - 1) / every)).map((n) =>
    element("span", { text: n * every, style: `${side}: ${(n * every + 0.5) * pixels}px` }),
  );
}

function range(first, last) {
  return Array.from({ length: last - first + 1 }, (_, n) => first + n);
}

function clamp(value, least, most) {
  return Math.min(Math.max(value, least), most);
}

function decimal(value) {
  return value === null ? "none" : value.toFixed(2);
}

function percent(share) {
  return share === null ? "none" : `${(100 * share).toFixed(1)}%`;
}

export default { render };
