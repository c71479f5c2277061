// Drawing: bands, nodes, edges, what is selected or pointed at, and moving along edges with the keyboard.

const state = {
  nodeLimit: 0, edgeLimit: 0, measure: "attribution", rest: true, search: "", selected: null, hovered: null, trail: null,
  shown: [], shownKeys: new Set(), drawn: [], layout: null,
};
const MOST_EDGES = 6000;

function isShown(node) {
  if (CHOSEN.has(node.kind)) return sizeOf(node) >= state.nodeLimit;
  return state.rest || !REST.has(node.kind);
}

function render() {
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.key : null;
  state.shown = view.nodes.filter(isShown);
  state.shownKeys = new Set(state.shown.map((node) => node.key));
  if (state.selected && !state.shownKeys.has(state.selected)) select(null);
  state.hovered = null;
  const scroller = $("scroller");
  state.layout = layout(state.shown, { width: scroller.clientWidth - AXIS_WIDTH - 2, height: scroller.clientHeight - 4 });
  for (const [id, width] of [["graph", state.layout.width], ["axis", AXIS_WIDTH]]) {
    $(id).setAttribute("width", width);
    $(id).setAttribute("height", state.layout.height);
  }
  drawFrame();
  drawNodes();
  drawEdges();
  paint();
  if (focused && state.shownKeys.has(focused)) nodeElement(focused).focus();
}

function drawFrame() {
  const { rows, columns, width, height } = state.layout;
  const bands = [], names = [], labels = [];
  rows.forEach((row, index) => {
    if (index % 2 === 0) {
      for (const [into, w] of [[bands, width], [names, AXIS_WIDTH]]) {
        into.push(svg("rect", { class: "band", x: 0, y: row.y, width: w, height: row.height }));
      }
    }
    if (row.height > 9) {
      names.push(svg("text", { class: "muted", x: AXIS_WIDTH - 8, y: row.y + row.height / 2 + 4, "text-anchor": "end" }, row.name));
    }
  });
  for (const column of columns) {
    const x = column.x + column.width / 2, y = height - LABELS_BELOW;
    bands.push(svg("line", { class: "columns", x1: column.x, x2: column.x, y1: 0, y2: y }));
    const caption = svg("text", { x, y: y + 16, "text-anchor": "middle" }, column.caption);
    caption.append(svg("title", {}, clean(column.token)));
    labels.push(caption);
    if (column.position >= 0) labels.push(svg("text", { class: "muted", x, y: y + 31, "text-anchor": "middle" }, String(column.position)));
  }
  $("bands").replaceChildren(...bands);
  $("axis").replaceChildren(...names);
  $("labels").replaceChildren(...labels);
}

function drawNodes() {
  const order = [...state.shown].sort((a, b) => {
    const p = state.layout.places.get(a.key), q = state.layout.places.get(b.key);
    return p.y - q.y || p.x - q.x;
  });
  $("nodes").replaceChildren(...order.map(nodeMark));
}

function nodeMark(node) {
  const place = state.layout.places.get(node.key), { x, y, r } = place;
  const sign = signOf(node), group = GROUPS.get(node.group);
  const classes = ["node", sign < 0 ? "minus" : sign > 0 ? "plus" : "none", REST.has(node.kind) ? "end" : place.isPill ? "pill" : ""];
  const made = svg("g", {
    class: classes.join(" ").trim(), tabindex: 0, role: "button", "data-key": node.key, "aria-pressed": "false",
    "aria-label": `${nameOf(node)}, ${KINDS[node.kind] || node.kind} ${where(node)}, score ${number(node.score)}, share ${percent(node.share)}`,
  });
  const strength = Math.min(1, Math.sqrt(sizeOf(node) / LARGEST));
  const color = sign < 0 ? "--negative" : sign > 0 ? "--positive" : "--muted";
  const mix = place.isPill ? 10 + 14 * strength : 22 + 62 * strength;
  const fill = `fill: color-mix(in srgb, var(${color}) ${mix.toFixed(0)}%, var(--bg))`;
  const box = (grow, name, style) => {
    const half = place.isPill ? place.w / 2 : r, high = place.isPill ? 11 : r, round = place.isPill ? 11 : 2;
    if (place.isPill || !CHOSEN.has(node.kind)) {
      const [w, h] = [2 * (half + grow), 2 * (high + grow)];
      return svg("rect", { class: name, style, x: x - w / 2, y: y - h / 2, width: w, height: h, rx: round + grow });
    }
    return svg("circle", { class: name, style, cx: x, cy: y, r: r + grow });
  };
  made.append(box(3, "halo", ""), box(0, "shape", fill));
  if (group) made.append(box(-0.5, "group", `stroke: ${group.color}`));
  if (place.caption) {
    made.append(place.isPill ? svg("text", { x, y: y + 4, "text-anchor": "middle" }, place.caption)
      : svg("text", { x: x + r + 4, y: y + 4 }, place.caption));
  }
  return made;
}

const isVisible = (edge) => state.shownKeys.has(edge.source.key) && state.shownKeys.has(edge.target.key);

function drawEdges() {
  let strong = view.edges.filter((edge) => strengthOf(edge, state.measure) >= state.edgeLimit && isVisible(edge));
  if (state.measure !== "attribution") strong.sort((a, b) => strengthOf(b, state.measure) - strengthOf(a, state.measure));
  state.drawn = strong.slice(0, MOST_EDGES);
  state.strongest = Math.max(1e-12, ...view.edges.slice(0, 50).map((edge) => Math.min(1, strengthOf(edge, state.measure))));
  $("edges").replaceChildren(...[...state.drawn].reverse().map((edge) => edgeMark(edge, 1)));
}

function edgeMark(edge, emphasis) {
  const from = state.layout.places.get(edge.source.key), to = state.layout.places.get(edge.target.key);
  const y1 = from.y - (from.isPill ? 11 : from.r), y2 = to.y + (to.isPill ? 11 : to.r);
  const bend = Math.max(12, Math.abs(y1 - y2) * 0.45), strength = Math.sqrt(Math.min(1, strengthOf(edge, state.measure) / state.strongest));
  const f = (value) => value.toFixed(1);
  const mark = svg("path", {
    class: (edge.attribution < 0 ? "negative" : "positive") + (REST.has(edge.source.kind) ? " end" : ""),
    d: `M${f(from.x)} ${f(y1)}C${f(from.x)} ${f(y1 - bend)} ${f(to.x)} ${f(y2 + bend)} ${f(to.x)} ${f(y2)}`,
    "stroke-width": f(0.7 + 4 * strength * emphasis), "stroke-opacity": ((emphasis > 1 ? 0.35 + 0.65 * strength : 0.12 + 0.75 * strength) * (REST.has(edge.source.kind) ? 0.6 : 1)).toFixed(2),
  });
  mark.edge = edge;
  return mark;
}

// What is selected, pointed at or found: its edges, also weak ones, and its neighbors stand out.
function paint() {
  const key = state.hovered || state.selected, node = key ? view.byKey.get(key) : null;
  const edges = node ? [...node.incoming, ...node.outgoing].filter(isVisible) : [];
  const near = new Set(edges.flatMap((edge) => [edge.source.key, edge.target.key]));
  $("focus-edges").replaceChildren(...edges.reverse().map((edge) => edgeMark(edge, 1.15)));
  $("graph").classList.toggle("focused", Boolean(node));
  $("graph").classList.toggle("searched", state.search !== "");
  for (const mark of $("nodes").children) {
    const own = mark.dataset.key;
    mark.classList.toggle("selected", own === state.selected);
    mark.classList.toggle("near", near.has(own) || own === key);
    mark.classList.toggle("found", state.search !== "" && matches(view.byKey.get(own)));
    mark.setAttribute("aria-pressed", String(own === state.selected));
  }
}

const nodeElement = (key) => [...$("nodes").children].find((mark) => mark.dataset.key === key);

function select(key, focus) {
  state.selected = key;
  if (key && !state.shownKeys.has(key)) return reveal(key);
  if (state.layout) paint();
  showPanel();
  if (key && focus) {
    nodeElement(key).focus({ preventScroll: true });
    nodeElement(key).scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}

// Up follows the strongest edge to a target, down the strongest from a source; left and right go through the others.
function move(direction) {
  const node = view.byKey.get(state.selected);
  const along = direction === "ArrowUp" || direction === "ArrowDown";
  let options, index;
  if (along) {
    const edges = (direction === "ArrowUp" ? node.outgoing : node.incoming).filter(isVisible);
    options = edges.map((edge) => (direction === "ArrowUp" ? edge.target : edge.source).key);
    index = 0;
  } else {
    const row = rowOf(node), places = state.layout.places;
    const trail = state.trail && state.trail[state.trail.step] === node.key ? state.trail : null;
    options = trail || state.shown.filter((other) => rowOf(other) === row).map((other) => other.key)
      .sort((a, b) => places.get(a).x - places.get(b).x || places.get(a).y - places.get(b).y);
    index = options.indexOf(node.key) + (direction === "ArrowRight" ? 1 : -1);
  }
  if (!options.length) return;
  index = (index + options.length) % options.length;
  state.trail = along || options === state.trail ? Object.assign(options, { step: index }) : null;
  state.hovered = null;
  select(options[index], true);
}
