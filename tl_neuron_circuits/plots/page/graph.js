// Drawing: bands, edges, nodes, what is selected or pointed at, and moving along edges with the keyboard. Edges are on a
// canvas, which is fast with ten thousand of them; nodes and the edges of one node are SVG, for pointer and keyboard.

const state = {
  count: 0, edgeCount: 0, measure: "attribution", rest: false, unfolded: false, search: "", selected: null, hovered: null,
  trail: null, edge: null, shown: [], shownKeys: new Set(), drawn: [], layout: null,
};
const marks = new Map();

// Tokens and what was left out are held to the weakest node shown, and to the strongest few of a long prompt; a token
// with nodes above it is always there.
const MOST_TOKENS = 6;
function setShown() {
  const shown = view.ranked.slice(0, state.count), all = shown.length === view.ranked.length;
  const tokens = view.nodes.filter((node) => node.kind === "embedding").map(sizeOf).sort((a, b) => b - a);
  const least = all || !shown.length ? 0 : Math.max(sizeOf(shown[shown.length - 1]), tokens[MOST_TOKENS - 1] || 0);
  const columns = new Set(shown.map(columnOf));
  state.shown = view.nodes.filter((node) => {
    if (CHOSEN.has(node.kind)) return node.rank < state.count;
    if (node.kind === "logit") return true;
    if (REST.has(node.kind)) return state.rest && sizeOf(node) >= least;
    return sizeOf(node) >= least || columns.has(node.position);
  });
  state.shownKeys = new Set(state.shown.map((node) => node.key));
  state.occupied = new Set(state.shown.filter((node) => CHOSEN.has(node.kind)).flatMap(positionsOf));
}

function render() {
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.key : null;
  setShown();
  if (state.selected && !state.shownKeys.has(state.selected)) select(null);
  state.hovered = state.edge = null;
  state.colors = readColors();
  drawLegend();
  state.layout = layout(state.shown, roomFor());
  drawFrame();
  drawNodes();
  chooseEdges();
  resetZoom();
  paint();
  if (focused && marks.has(focused)) marks.get(focused).focus({ preventScroll: true });
}

const foldedRange = ({ folded }) => [folded[0], folded[folded.length - 1]].map((column) => column.position).join("–");

function drawFrame() {
  const { rows, columns } = state.layout;
  const bands = [], names = [], words = [];
  rows.forEach((row, index) => {
    if (row.isSkipped) bands.push(svg("rect", { class: "skipped", x: 0, y: row.y, width: 1, height: row.height }));
    else if (index % 2 === 0) bands.push(svg("rect", { class: "band", x: 0, y: row.y, width: 1, height: row.height }));
    const name = svg("text", { class: row.isSkipped ? "muted skip" : "muted", x: AXIS_WIDTH - 8, "text-anchor": "end" }, row.isSkipped ? "⋮" : row.name);
    name.place = row.y + row.height / 2;
    names.push(name);
  });
  for (const column of columns) {
    const hasNodes = state.occupied.has(column.position), full = textWidth(showToken(column.token), 12.5), half = Math.min(full, column.width - 4) / 2;
    const middle = Math.max(column.x + half + 2, Math.min(column.x + column.width - half - 2, column.axis));
    bands.push(svg("line", { class: "columns", x1: column.x, x2: column.x, y1: 0, y2: 1 }));
    const word = svg("g", { class: column.folded ? "token folded" : hasNodes ? "token" : "token muted", "data-position": column.position },
      svg("text", { y: 16, "text-anchor": "middle" }), svg("text", { class: "muted", y: 31, "text-anchor": "middle" },
        column.folded ? foldedRange(column) : column.position >= 0 ? String(column.position) : ""),
      svg("title", {}, column.folded ? column.folded.map((one) => clean(one.token)).join("") + "\n(click to unfold)" : clean(column.token)));
    Object.assign(word, { place: middle, room: column.width, column, full, numberWidth: textWidth(word.children[1].textContent, 10.5) });
    words.push(word);
  }
  $("rows").replaceChildren(...bands.filter((one) => one.tagName === "rect"));
  $("columns").replaceChildren(...bands.filter((one) => one.tagName === "line"));
  $("axis").replaceChildren(...names);
  $("tokens").replaceChildren(...words);
}

// What colors, sizes and marks mean, in as many lines as the width needs.
const LEGEND_LINE = 19;
function legendMark(width) {
  const disc = (name, r) => (x) => svg("circle", { cx: x + 8, cy: 0, r, style: `fill: ${mix(name, 0.7)}; stroke: ${mix(name, 1)}` });
  const square = (x) => svg("rect", { x: x + 3, y: -5, width: 10, height: 10, rx: 2, style: `fill: none; stroke: ${mix("muted", 1)}` });
  const line = (x) => svg("path", { d: `M${x} 3L${x + 14} -3`, style: `fill: none; stroke: ${mix("muted", 1)}; stroke-width: 2.5` });
  const items = [
    [disc("positive", 5), "supports the target"], [disc("negative", 5), "opposes it"], [disc("muted", 3), `area: ${SIZED_BY}`],
    [square, "token"], [line, "direct effect"], [null, "→ tokens it promotes"],
    ...(GROUPS.size ? [[(x) => svg("circle", { cx: x + 8, cy: 0, r: 5, style: `fill: none; stroke: ${[...GROUPS.values()][0].color}; stroke-width: 2.5` }), "ring: group"]] : []),
    ...(data.tokens.length ? [[null, "underlined token: has neurons here"]] : []),
  ];
  const made = svg("g", {});
  let x = 0, y = LEGEND_LINE / 2;
  for (const [picture, text] of items) {
    const wide = (picture ? 20 : 0) + textWidth(text, 11);
    if (x && x + wide > width) { x = 0; y += LEGEND_LINE; }
    made.append(svg("g", { transform: `translate(0 ${y})` }, ...(picture ? [picture(x)] : []), svg("text", { class: "muted", x: x + (picture ? 20 : 0), y: 4 }, text)));
    x += wide + 15;
  }
  return { made, height: y + LEGEND_LINE / 2 };
}
function drawLegend() {
  const { made, height } = legendMark($("view").clientWidth - 12);
  $("legend").style.height = height + 2 + "px";
  $("legend").replaceChildren(made);
}

function drawNodes() {
  const order = [...state.shown].sort((a, b) => {
    const p = state.layout.places.get(a.key), q = state.layout.places.get(b.key);
    return p.y - q.y || p.x - q.x;
  });
  marks.clear();
  for (const node of order) marks.set(node.key, nodeMark(node));
  $("nodes").replaceChildren(...marks.values());
}

// Colors are mixed here: programs that read an exported SVG know neither variables nor color-mix.
function readColors() {
  const style = getComputedStyle(document.documentElement), colors = {};
  for (const name of ["bg", "fg", "muted", "positive", "negative"]) {
    const hex = style.getPropertyValue("--" + name).trim();
    colors[name] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  }
  return colors;
}
const mix = (name, part) =>
  "rgb(" + state.colors[name].map((value, index) => Math.round(part * value + (1 - part) * state.colors.bg[index])).join(",") + ")";

function nodeMark(node) {
  const place = state.layout.places.get(node.key), { x, y, r } = place;
  const sign = signOf(node), group = GROUPS.get(node.group);
  const classes = ["node", sign < 0 ? "minus" : sign > 0 ? "plus" : "none", REST.has(node.kind) ? "end" : place.isPill ? "pill" : ""];
  const described = promoted(node, 4);
  const made = svg("g", {
    class: classes.join(" ").trim(), tabindex: -1, role: "button", "data-key": node.key, "aria-pressed": "false",
    "aria-label": `${fullName(node)}, ${KINDS[node.kind] || node.kind} ${where(node)}, score ${number(node.score)}, share ${percent(node.share)}`
      + (described.length ? `, promotes ${described.join(", ")}` : ""),
  });
  const strength = Math.min(1, Math.sqrt(sizeOf(node) / LARGEST));
  const color = sign < 0 ? "negative" : sign > 0 ? "positive" : "muted";
  const fill = "fill: " + mix(color, place.isPill ? 0.1 + 0.14 * strength : 0.22 + 0.62 * strength);
  const box = (grow, name, style) => {
    const half = place.isPill ? place.w / 2 : r, high = place.isPill ? 11 : r, round = place.isPill ? 11 : 2;
    if (place.isPill || !CHOSEN.has(node.kind)) {
      const [w, h] = [2 * (half + grow), 2 * (high + grow)];
      return svg("rect", { class: name, style, x: x - w / 2, y: y - h / 2, width: w, height: h, rx: round + grow });
    }
    return svg("circle", { class: name, style, cx: x, cy: y, r: r + grow });
  };
  const wide = place.w + 4, left = place.isPill || !place.side ? x - (place.isPill ? wide / 2 : r + 2) : place.side < 0 ? x + r + 2 - wide : x - r - 2;
  const hit = svg("rect", { class: "hit", x: left, y: y - place.h / 2, width: wide, height: place.h });
  made.append(hit, box(3, "halo", ""), box(0, "shape", fill));
  if (group) made.append(box(-0.5, "group", `stroke: ${group.color}`));
  const [name, more] = place.caption;
  if (name || more) {
    const width = place.isPill ? 0 : textWidth([name, more].filter(Boolean).join(" "), LETTER_SIZE) + 4;
    if (width) made.append(svg("rect", { class: "back", x: place.side < 0 ? x - r - 6 - width + 4 : x + r + 2, y: y - 8, width, height: 16, rx: 3 }));
    const text = svg("text", place.isPill ? { x, y: y + 4, "text-anchor": "middle" }
      : place.side < 0 ? { x: x - r - 4, y: y + 4, "text-anchor": "end" } : { x: x + r + 4, y: y + 4 }, svg("tspan", { class: place.isPill ? "name" : "unit" }, name));
    if (more) text.append(" ", svg("tspan", { class: "more" }, more));
    made.append(text);
  }
  return made;
}

const isVisible = (edge) => state.shownKeys.has(edge.source.key) && state.shownKeys.has(edge.target.key);

// The strongest edges, as many as the slider says, and of every node the strongest way on, so that none hangs in the air.
function chooseEdges() {
  const visible = view.edges.filter(isVisible);
  if (state.measure !== "attribution") visible.sort((a, b) => strengthOf(b, state.measure) - strengthOf(a, state.measure));
  state.visible = visible.length;
  const strong = visible.slice(0, Math.min(state.edgeCount, visible.length)), drawn = new Set(strong);
  for (const node of state.shown) {
    const way = node.outgoing.find(isVisible);
    if (way) drawn.add(way);
  }
  state.edgeLimit = strong.length ? strengthOf(strong[strong.length - 1], state.measure) : null;
  state.drawn = [...drawn];
  state.strongest = Math.max(1e-12, ...view.edges.slice(0, 50).map((edge) => Math.min(1, strengthOf(edge, state.measure))));
  spreadArrivals();
  state.paths = state.drawn.map((edge) => {
    const look = lookOf(edge, 1);
    return { edge, look, path: new Path2D(look.d) };
  }).reverse();
}

// Edges arrive at a target or a group side by side, in the order in which none has to cross another on its way: from
// the left those of its highest neighbors first, from the right those of its lowest.
function spreadArrivals() {
  const into = new Map();
  state.arrivals = new Map();
  for (const edge of state.drawn) {
    if (!state.layout.places.get(edge.target.key).isPill) continue;
    if (!into.has(edge.target.key)) into.set(edge.target.key, []);
    into.get(edge.target.key).push(edge);
  }
  for (const [key, edges] of into) {
    const to = state.layout.places.get(key), step = Math.min(7, (0.84 * to.w) / edges.length);
    const rank = (edge) => {
      const from = state.layout.places.get(edge.source.key), side = Math.abs(from.x - to.x) < 3 ? 0 : Math.sign(from.x - to.x);
      return [side, side * -from.y];
    };
    const ranked = edges.map((edge) => [edge, rank(edge)]).sort(([, a], [, b]) => a[0] - b[0] || a[1] - b[1]);
    ranked.forEach(([edge], index) => state.arrivals.set(edge, (index - (edges.length - 1) / 2) * step));
  }
}
function arrivalOf(edge, from, to) {
  if (!to.isPill) return to.x;
  const kept = state.arrivals.get(edge);
  return to.x + (kept === undefined ? Math.max(-0.42 * to.w, Math.min(0.42 * to.w, (from.x - to.x) / 2)) : kept);
}

function lookOf(edge, emphasis) {
  const from = state.layout.places.get(edge.source.key), to = state.layout.places.get(edge.target.key);
  const x2 = arrivalOf(edge, from, to), isBeside = to.isPill && from.side !== 0 && from.isInner && !from.isPill && columnOf(edge.source) === columnOf(edge.target);
  const [x1, y1] = isBeside ? [from.x - from.side * from.r, from.y] : [from.x, from.y - (from.isPill ? 11 : from.r)], y2 = to.y + (to.isPill ? 11 : to.r), isEnd = REST.has(edge.source.kind);
  const high = Math.abs(y1 - y2), bend = Math.max(12, high * 0.45), strength = Math.sqrt(Math.min(1, strengthOf(edge, state.measure) / state.strongest));
  // Within a column edges keep to the corridor between the lanes; from column to column they leave and arrive upright.
  const same = !to.isPill && columnOf(edge.source) === columnOf(edge.target), lean = same ? (to.x - from.x) * 0.55 : 0;
  const bulge = same && Math.abs(to.x - from.x) < 3 ? -from.side * Math.min(34, 6 + 0.14 * high) : 0;
  const f = (value) => value.toFixed(1), [c1, c2] = [isBeside ? x2 : from.x + lean + bulge, x2 + bulge], b1 = isBeside ? 0 : bend;
  return {
    sign: edge.attribution < 0 ? "negative" : "positive", isEnd, ends: [x1, y1, c1, y1 - b1, c2, y2 + bend, x2, y2],
    d: `M${f(x1)} ${f(y1)}C${f(c1)} ${f(y1 - b1)} ${f(c2)} ${f(y2 + bend)} ${f(x2)} ${f(y2)}`,
    width: 0.7 + 3.6 * strength * emphasis, opacity: (emphasis > 1 ? 0.35 + 0.65 * strength : 0.14 + 0.6 * strength) * (isEnd ? 0.6 : 1),
  };
}

function edgeMark(edge, emphasis) {
  const look = lookOf(edge, emphasis);
  return svg("path", {
    class: look.sign + (look.isEnd ? " end" : ""), d: look.d, "stroke-width": look.width.toFixed(1), "stroke-opacity": look.opacity.toFixed(2),
  });
}

// The canvas has the edges for one transform; while a gesture goes on it is moved as it is, and drawn anew after it.
function drawEdges() {
  const canvas = $("edges"), ratio = devicePixelRatio || 1, { width, height } = roomFor();
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  Object.assign(canvas.style, { width: width + "px", height: height + "px", transform: "" });
  const pen = canvas.getContext("2d"), { x, y, k } = state.transform;
  pen.setTransform(k * ratio, 0, 0, k * ratio, x * ratio, y * ratio);
  for (const { look, path } of state.paths) {
    pen.strokeStyle = mix(look.sign, 1);
    pen.globalAlpha = look.opacity;
    pen.lineWidth = look.width;
    pen.setLineDash(look.isEnd ? [3, 3] : []);
    pen.stroke(path);
  }
  state.drawnAt = state.transform;
}

// The drawn edge next to a point of the view, within a few pixels.
function edgeAt(px, py) {
  const { x, y, k } = state.transform, [sx, sy] = [(px - x) / k, (py - y) / k];
  let best = null, least = (5 / k) ** 2;
  for (const { edge, look } of state.paths) {
    const [x1, y1, p1, c1, p2, c2, x2, y2] = look.ends, near = 5 / k;
    if (sx < Math.min(x1, x2, p1, p2) - near || sx > Math.max(x1, x2, p1, p2) + near || sy > Math.max(y1, y2) + near || sy < Math.min(y1, y2) - near) continue;
    for (let step = 0; step <= 40; step++) {
      const t = step / 40, u = 1 - t;
      const dx = u ** 3 * x1 + 3 * u * u * t * p1 + 3 * u * t * t * p2 + t ** 3 * x2 - sx;
      const dy = u ** 3 * y1 + 3 * u * u * t * c1 + 3 * u * t * t * c2 + t ** 3 * y2 - sy;
      const distance = dx * dx + dy * dy;
      if (distance <= least) { least = distance; best = edge; }
    }
  }
  return best;
}

// What is selected, pointed at or found: its edges, also weak ones, and its neighbors stand out.
function paint() {
  const key = state.hovered || state.selected, node = key ? view.byKey.get(key) : null;
  const edges = node ? [...node.incoming, ...node.outgoing].filter(isVisible) : state.edge ? [state.edge] : [];
  const near = new Set(edges.flatMap((edge) => [edge.source.key, edge.target.key]));
  const drawn = edges.length + "|" + (key || (state.edge ? state.edge.source.key + "|" + state.edge.target.key : ""));
  if (paint.drawn !== drawn || paint.paths !== state.paths) $("focus-edges").replaceChildren(...edges.reverse().map((edge) => edgeMark(edge, 1.15)));
  Object.assign(paint, { drawn, paths: state.paths });
  $("view").classList.toggle("focused", Boolean(node));
  $("view").classList.toggle("searched", state.search !== "");
  const stop = state.selected || (marks.has(paint.stop) ? paint.stop : firstStop());
  for (const [own, mark] of marks) {
    mark.classList.toggle("selected", own === state.selected);
    mark.classList.toggle("near", near.has(own) || own === key);
    mark.classList.toggle("found", state.search !== "" && matches(view.byKey.get(own)));
    setIfNew(mark, "aria-pressed", String(own === state.selected));
    setIfNew(mark, "tabindex", own === stop ? "0" : "-1");
  }
}
// Setting an attribute to what it is costs a look at every rule of the style.
const setIfNew = (mark, name, text) => { if (mark.getAttribute(name) !== text) mark.setAttribute(name, text); };
// Tab enters the graph at one node, the one it was left at, else the target; arrows go on from there.
const firstStop = () => (TARGETS.length ? TARGETS[0].key : state.shown.length ? state.shown[0].key : null);

function select(key, focus) {
  state.selected = key;
  if (key && !state.shownKeys.has(key)) return reveal(key);
  if (key) paint.stop = key;
  if (state.layout) paint();
  showPanel();
  if (key && focus) {
    marks.get(key).focus({ preventScroll: true });
    bringIntoView(key);
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
