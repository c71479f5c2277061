// Zoom and pan, with d3-zoom's gestures; the layers and the token row stay in sight, and a small map says where one is.

const roomFor = () => ({ width: Math.max(50, $("view").clientWidth), height: Math.max(50, $("view").clientHeight) });
const gestures = d3.zoom().clickDistance(4).filter((event) => (!event.ctrlKey || event.type === "wheel") && !event.button)
  .on("zoom", (event) => showTransform(event.transform)).on("end", () => { if (state.drawnAt !== state.transform) drawEdges(); });
const MANY_EDGES = 1500;

function fitted() {
  const { width, height } = roomFor(), { layout } = state;
  return d3.zoomIdentity.translate((width - layout.width * layout.fit) / 2, (height - layout.height * layout.fit) / 2).scale(layout.fit);
}
const isFitted = () => !state.layout || !state.transform || state.transform.k <= state.layout.fit * 1.02;

// After a new arrangement: all of it, or, where one had zoomed in, as large as before and around what is selected.
function resetZoom() {
  const { layout, transform } = state, { width, height } = roomFor(), wasZoomed = transform && state.zoomedBy > 1.02;
  gestures.scaleExtent([layout.fit, Math.max(6, layout.fit * 4)]).extent([[0, 0], [width, height]]).translateExtent([[0, 0], [layout.width, layout.height]]);
  const graph = d3.select($("graph"));
  state.transform = state.drawnAt = null;
  graph.call(gestures.transform, fitted());
  if (wasZoomed) {
    const place = layout.places.get(state.selected || firstStop());
    graph.call(gestures.scaleTo, layout.fit * state.kept);
    if (place) graph.call(gestures.translateTo, place.x, place.y);
  }
  drawMap();
  drawEdges();
}

function showTransform(transform) {
  const { x, y, k } = transform, { width, height } = roomFor();
  state.transform = transform;
  state.zoomedBy = state.kept = k / state.layout.fit;
  $("scene").setAttribute("transform", `translate(${x} ${y}) scale(${k})`);
  $("rows").setAttribute("transform", `translate(0 ${y}) scale(${width} ${k})`);
  $("columns").setAttribute("transform", `translate(${x} 0) scale(${k} ${height})`);
  for (const name of $("axis").children) name.setAttribute("y", y + k * name.place + 4);
  for (const word of $("tokens").children) {
    word.setAttribute("transform", `translate(${x + k * word.place} 0)`);
    word.firstChild.textContent = wordOf(word, k);
  }
  hideColliding(k);
  if (state.drawnAt && state.drawn.length > MANY_EDGES) {
    const from = state.drawnAt, by = k / from.k;
    $("edges").style.transform = `translate(${x - from.x * by}px, ${y - from.y * by}px) scale(${by})`;
    clearTimeout(showTransform.later);
    showTransform.later = setTimeout(drawEdges, 120);
  } else if (state.paths && state.drawnAt) drawEdges();
  showMapFrame();
}

// A word of the token row, cut to its column.
function wordOf({ column, full, room }, k) {
  if (column.folded) return "⋯";
  const text = showToken(column.token), letters = [...text].length;
  return full <= k * room - 4 ? text : shorten(text, Math.max(2, Math.floor((letters * (k * room - 4)) / full)));
}
// Numbers of positions that would touch the one before are left out.
function hideColliding(k) {
  let end = -Infinity;
  for (const word of [...$("tokens").children]) {
    const half = word.numberWidth / 2, left = k * word.place - half;
    word.children[1].style.display = left < end + 4 ? "none" : "";
    if (left >= end + 4) end = left + 2 * half;
  }
}

const zoomBy = (factor) => d3.select($("graph")).call(gestures.scaleBy, factor);
const fit = () => d3.select($("graph")).call(gestures.transform, fitted());

function bringIntoView(key) {
  const place = state.layout.places.get(key), { x, y, k } = state.transform, { width, height } = roomFor();
  const [px, py] = [x + k * place.x, y + k * place.y];
  if (px < 20 || py < 20 || px > width - 20 || py > height - 20) d3.select($("graph")).call(gestures.translateTo, place.x, place.y);
}

function drawMap() {
  const { layout } = state, canvas = $("map-picture"), by = Math.min(170 / layout.width, 120 / layout.height), ratio = 2;
  Object.assign(canvas, { width: layout.width * by * ratio, height: layout.height * by * ratio });
  Object.assign(canvas.style, { width: layout.width * by + "px", height: layout.height * by + "px" });
  const pen = canvas.getContext("2d");
  pen.scale(by * ratio, by * ratio);
  for (const { node, x, y, r } of layout.places.values()) {
    pen.fillStyle = mix(signOf(node) < 0 ? "negative" : "positive", 0.8);
    pen.beginPath();
    pen.arc(x, y, Math.max(r, 1.4 / by), 0, 7);
    pen.fill();
  }
  drawMap.by = by;
  showMapFrame();
}

function showMapFrame() {
  $("map").hidden = state.zoomedBy < 1.15;
  if ($("map").hidden || !drawMap.by) return;
  const { x, y, k } = state.transform, { width, height } = roomFor(), by = drawMap.by / k, frame = $("map-frame").style;
  const clip = (value, most) => Math.max(0, Math.min(most, value));
  const [wide, high] = [$("map-picture").clientWidth, $("map-picture").clientHeight];
  const left = clip(-x * by, wide), top = clip(-y * by, high);
  Object.assign(frame, { left: left + "px", top: top + "px", width: clip((width - x) * by, wide) - left + "px", height: clip((height - y) * by, high) - top + "px" });
}

function listenToMap() {
  const go = (event) => {
    if (!(event.buttons & 1)) return;
    const box = $("map-picture").getBoundingClientRect();
    d3.select($("graph")).call(gestures.translateTo, (event.clientX - box.left) / drawMap.by, (event.clientY - box.top) / drawMap.by);
    event.preventDefault();
  };
  $("map").addEventListener("pointerdown", go);
  $("map").addEventListener("pointermove", go);
}
