// The view of BlockExplorer: it draws what Python computed and says what was chosen.
//
// Read from Python: `picture` (the map of one head), `detail` (what one query reads) and
// `states` (colour, ink and label of every state). Written: query, topk, block_size, head.

const SELECTED = 2;
const CURRENT = 3;
// Rows of fewer pixels would leave no room for the marks; see MARK_PIXELS in viz.
const ROW_PIXELS = { few: 14, many: 8 };
const FEW_ROWS = 64;
const MAP_WIDTH = 360;
const CELL_PIXELS = { least: 6, most: 22 };

const SLIDERS = [
  {
    name: "topk",
    label: "topk",
    values: (picture) => range(1, picture.most_topk),
    text: (value) => `${value}`,
  },
  {
    name: "block_size",
    label: "block size",
    values: (picture) => picture.sizes,
    text: (value) => `${value}`,
  },
  {
    name: "head",
    label: "head",
    values: (picture) => range(0, picture.heads - 1),
    text: (value) => `${value}`,
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

function render({ model, el }) {
  const view = build(model.get("states"));
  el.append(view.root);
  const listeners = listen(model, view);
  drawPicture(model, view);
  drawDetail(model, view);
  // The size of the map is known only once it is on the page.
  const resized = new ResizeObserver(() => {
    showRows(model, view);
    keepInSight(model, view);
  });
  resized.observe(view.map);
  return () => {
    resized.disconnect();
    for (const [event, callback] of listeners) model.off(event, callback);
  };
}

// ---- elements

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
  const panel = buildPanel(id);
  const said = element("p", { class: "said", role: "status", "aria-live": "polite" });
  const side = element("div", { class: "side" });
  const controls = element("div", { class: "controls" });
  controls.append(...sliders.map((slider) => slider.box));
  side.append(controls, said, panel.box);
  const body = element("div", { class: "body" }, map.figure, side);
  const root = element(
    "div",
    { class: "moba-explorer", role: "group", "aria-label": "Block explorer" },
    body,
    buildLegend(states),
    element("p", {
      class: "hint",
      id: `${id}-hint`,
      text:
        "Point at a row, or focus the map and press ↑ ↓, Page Up or Page Down for one " +
        "block, Home or End.",
    }),
  );
  for (const [number, state] of states.entries()) {
    root.style.setProperty(`--state-${number}`, state.color);
    root.style.setProperty(`--ink-${number}`, state.ink);
  }
  return { root, sliders, said, states, ...map, ...panel };
}

function buildSlider(slider, id) {
  const name = `${id}-${slider.name}`;
  const input = element("input", { type: "range", min: 0, step: 1, id: name });
  const output = element("output", { for: name });
  const label = element("label", { for: name, text: slider.label });
  return { ...slider, input, output, box: element("div", {}, label, input, output) };
}

function buildMap(id) {
  const canvas = element("canvas", { "aria-hidden": "true" });
  const columns = element("div", { class: "columns", "aria-hidden": "true" });
  const numbers = element("div", { class: "numbers", "aria-hidden": "true" });
  const cursor = element("div", {
    class: "cursor",
    id: `${id}-query`,
    role: "option",
    "aria-selected": "true",
  });
  const rows = element("div", { class: "rows", role: "none" }, canvas, numbers, cursor);
  const map = element(
    "div",
    {
      class: "map",
      role: "listbox",
      tabindex: 0,
      "aria-label": "queries",
      "aria-activedescendant": cursor.id,
      "aria-describedby": `${id}-hint`,
    },
    columns,
    rows,
  );
  const figure = element(
    "div",
    { class: "figure" },
    element("div", { class: "x-name", text: "key block" }),
    element("div", { class: "y-name", text: "query position" }),
    map,
  );
  return { map, figure, rows, canvas, columns, numbers, cursor };
}

function buildPanel(id) {
  const title = element("h4", { id: `${id}-title` });
  const table = element("table", { "aria-labelledby": title.id });
  const box = element(
    "div",
    { class: "panel", role: "region", tabindex: 0, "aria-labelledby": title.id },
    title,
    table,
  );
  return { box, title, table };
}

function buildLegend(states) {
  const legend = element("ul", { class: "legend", "aria-label": "states of blocks" });
  for (const [number, state] of states.slice(0, CURRENT + 1).entries()) {
    const mark = element("span", { class: `mark state-${number}`, "aria-hidden": "true" });
    legend.append(element("li", {}, mark, state.label));
  }
  return legend;
}

// ---- events

function listen(model, view) {
  const redraw = {
    "change:picture": () => drawPicture(model, view),
    "change:detail": () => drawDetail(model, view),
    "change:query": () => drawCursor(model, view),
  };
  for (const slider of view.sliders) {
    redraw[`change:${slider.name}`] = () => setSlider(model, slider);
    slider.input.addEventListener("input", () => {
      choose(model, slider.name, slider.values(model.get("picture"))[slider.input.value]);
      setSlider(model, slider);
    });
  }
  for (const [event, callback] of Object.entries(redraw)) model.on(event, callback);
  view.map.addEventListener("keydown", (event) => onKey(event, model, view));
  view.rows.addEventListener("pointermove", (event) => onPointer(event, model, view));
  view.rows.addEventListener("pointerdown", (event) => onPointer(event, model, view));
  view.map.addEventListener("scroll", () => showRows(model, view));
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
  // Lab would move on to the next cell.
  event.preventDefault();
  event.stopPropagation();
  const { queries, block_size: page } = model.get("picture");
  const query = step(model.get("query"), page, queries - 1);
  choose(model, "query", clamp(query, 0, queries - 1));
  keepInSight(model, view);
}

function onPointer(event, model, view) {
  const { queries } = model.get("picture");
  const y = event.clientY - view.rows.getBoundingClientRect().top;
  choose(model, "query", clamp(Math.floor(y / rowPixels(queries)), 0, queries - 1));
}

function keepInSight(model, view) {
  const high = rowPixels(model.get("picture").queries);
  const top = model.get("query") * high;
  const seen = view.map.clientHeight - view.columns.offsetHeight;
  const { scrollTop } = view.map;
  if (top < scrollTop) view.map.scrollTop = top;
  if (top + high > scrollTop + seen) view.map.scrollTop = top + high - seen;
}

// ---- drawing

function drawPicture(model, view) {
  const picture = model.get("picture");
  for (const slider of view.sliders) setSlider(model, slider);
  const high = rowPixels(picture.queries);
  const wide = cellPixels(picture.blocks);
  view.rows.style.height = `${picture.queries * high}px`;
  view.rows.style.width = `${picture.blocks * wide}px`;
  view.columns.style.width = `${picture.blocks * wide}px`;
  view.columns.replaceChildren(
    ...ticks(picture.blocks, Math.ceil(24 / wide)).map((block) =>
      element("span", { text: block, style: `left: ${(block + 0.5) * wide}px` }),
    ),
  );
  const every = Math.max(Math.min(picture.block_size, 16), Math.ceil(14 / high));
  view.numbers.replaceChildren(
    ...ticks(picture.queries, every).map((query) =>
      element("span", { text: query, style: `top: ${(query + 0.5) * high}px` }),
    ),
  );
  drawCursor(model, view);
  showRows(model, view);
  keepInSight(model, view);
}

function setSlider(model, { name, values, text, input, output }) {
  const offered = values(model.get("picture"));
  const value = model.get(name);
  input.max = offered.length - 1;
  input.value = offered.indexOf(value);
  input.disabled = offered.length === 1;
  input.setAttribute("aria-valuetext", text(value));
  output.textContent = text(value);
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
  showWaiting(model, view);
}

function showRows(model, view) {
  const picture = model.get("picture");
  const high = rowPixels(picture.queries);
  const wide = cellPixels(picture.blocks);
  const seen = Math.min(
    view.map.clientHeight - view.columns.offsetHeight,
    picture.queries * high,
  );
  if (seen <= 0) return;
  const pen = prepare(view.canvas, picture.blocks * wide, seen);
  const first = Math.floor(view.map.scrollTop / high);
  const last = Math.min(picture.queries, Math.ceil((view.map.scrollTop + seen) / high));
  pen.translate(0, -view.map.scrollTop);
  const paint = { pen, wide, high, states: view.states, hatch: hatch(pen) };
  for (let query = first; query < last; query++) drawRow(paint, picture, query);
}

function prepare(canvas, wide, high) {
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
  for (let block = 0; block < picture.blocks; block++) {
    const state = picture.cells.getUint8(query * picture.blocks + block);
    drawCell(paint, state, block * wide, query * high);
  }
  if (picture.edges.includes(query)) {
    pen.fillStyle = "#000000";
    pen.fillRect(0, query * high - 1, picture.blocks * wide, 2);
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
  pen.strokeStyle = "#8C8C8C";
  pen.lineWidth = 0.5;
  pen.strokeRect(x + 0.25, y + 0.25, wide - 0.5, high - 0.5);
}

function hatch(pen) {
  const tile = element("canvas", { width: 6, height: 6 });
  const own = tile.getContext("2d");
  own.strokeStyle = "#4D4D4D";
  own.beginPath();
  for (const x of [-6, 0, 6]) {
    own.moveTo(x, 6);
    own.lineTo(x + 6, 0);
  }
  own.stroke();
  return pen.createPattern(tile, "repeat");
}

function drawDetail(model, view) {
  const detail = model.get("detail");
  view.said.textContent = detail.sentence;
  view.title.textContent =
    `Query ${detail.query}, in block ${detail.own} of head ${detail.head}`;
  const withText = detail.rows.some((row) => row.text !== null);
  const names = ["block", "score", "share of attention", ...(withText ? ["text"] : [])];
  const head = element("tr", {}, ...names.map((text) => element("th", { scope: "col", text })));
  view.table.replaceChildren(
    element("thead", {}, head),
    element("tbody", {}, ...detail.rows.map((row) => detailRow(row, view.states))),
  );
  showWaiting(model, view);
}

function detailRow(row, states) {
  const own = row.state === CURRENT;
  const mark = element("span", { class: `mark state-${row.state}`, "aria-hidden": "true" });
  const label = element("span", { class: "label", text: states[row.state].label });
  const cells = [
    element("th", { scope: "row" }, mark, `${row.block} `, label),
    element("td", { text: own ? "own" : decimal(row.score) }),
    shareCell(row),
  ];
  if (row.text !== null) cells.push(element("td", {}, textOf(row)));
  return element("tr", { "data-block": row.block }, ...cells);
}

function shareCell({ share, state }) {
  if (state < SELECTED) return element("td", { text: "not read" });
  const bar = element("span", { class: `bar state-${state}`, "aria-hidden": "true" });
  bar.style.width = `${4 * share}em`;
  return element("td", {}, bar, percent(share));
}

function textOf({ text, state }) {
  if (state !== CURRENT) return element("code", { text });
  const mine = element("mark", { text: text.slice(-1), title: "the query's own byte" });
  return element("code", {}, text.slice(0, -1), mine);
}

function showWaiting(model, view) {
  const detail = model.get("detail");
  const chosen = ["query", "topk", "block_size", "head"];
  const waiting = chosen.some((name) => detail[name] !== model.get(name));
  view.box.setAttribute("aria-busy", waiting);
}

// ---- numbers

function rowPixels(queries) {
  return queries <= FEW_ROWS ? ROW_PIXELS.few : ROW_PIXELS.many;
}

function cellPixels(blocks) {
  return clamp(Math.floor(MAP_WIDTH / blocks), CELL_PIXELS.least, CELL_PIXELS.most);
}

function ticks(count, every) {
  return range(0, Math.floor((count - 1) / every)).map((n) => n * every);
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
