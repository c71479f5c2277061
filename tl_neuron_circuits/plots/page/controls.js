// Sliders, search, groups, themes, pointer and keyboard; then everything is drawn for the first time.

// Sliders count, evenly on a logarithmic scale: outward from the strongest to all of them.
const countAt = (place, least, most) => (place >= 100 ? most : Math.round(least * (Math.max(most, least) / least) ** (place / 100)));
const placeOf = (value, least, most) => (value >= most ? 100 : Math.max(0, Math.min(99, Math.ceil((100 * Math.log(value / least)) / Math.log(most / least)))));
const spread = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
const LEAST = 5, FIRST_NODES = [15, 40], FIRST_EDGES = 2.5;

// At first the strongest nodes that make up half of all sizes, 15 to 40 of them, fewer where the window is low.
function setFirstNodes() {
  const most = Math.max(FIRST_NODES[0], Math.min(FIRST_NODES[1], Math.floor(roomFor().height / 17)));
  const sizes = view.ranked.map(sizeOf), total = sizes.reduce((a, b) => a + b, 0);
  let sum = 0, first = 0;
  while (first < sizes.length && sum < 0.5 * total) sum += sizes[first++];
  first = Math.min(sizes.length, Math.max(FIRST_NODES[0], Math.min(most, first)));
  // Fewer where their captions would have to shrink, or be cut.
  while (first > FIRST_NODES[0]) {
    state.count = first;
    setShown();
    const made = layout(state.shown, roomFor());
    if (made.fit > 0.9 && made.grid.letters >= GOOD_CAPTION) break;
    first = Math.max(FIRST_NODES[0], Math.floor(0.85 * first));
  }
  setNodes(first);
}
const least = () => Math.min(LEAST, view.ranked.length);
// The slider has a hundred places: at the one that was set for a number it means this number.
function setNodes(number) {
  $("node-slider").value = placeOf(number, least() || 1, view.ranked.length);
  state.exact = { place: $("node-slider").value, number };
}

function readControls() {
  const { exact } = state, place = $("node-slider").value, all = view.ranked.length;
  state.count = exact && exact.place === place ? Math.min(exact.number, all) : all ? countAt(Number(place), least(), all) : 0;
  state.rest = $("rest").checked;
  state.unfolded = $("unfold").checked;
  setShown();
  const visible = view.edges.filter(isVisible).length;
  if (!state.edgesTouched) $("edge-slider").value = visible ? placeOf(FIRST_EDGES * (state.count + 1), 1, visible) : 0;
  const edges = Number($("edge-slider").value);
  state.edgeCount = edges === 0 ? 0 : countAt(edges, 1, Math.max(1, visible));
}

function sayCounts() {
  const all = view.ranked.length, found = state.search ? `${count(state.shown.filter(matches).length)} found · ` : "";
  const weakest = state.count ? percent(sizeOf(view.ranked[state.count - 1])) : "0%";
  const nodes = `${count(state.count)} of ${count(all)}`, edges = state.edgeLimit === null ? "each node's strongest, by share" : state.drawn.length === state.visible ? "any share" : `at least ${percent(state.edgeLimit)}`;
  for (const [name, text] of [["node", nodes], ["edge", edges]]) {
    $(name + "-limit").textContent = text;
    $(name + "-slider").setAttribute("aria-valuetext", text);
  }
  $("node-limit").title = `each at least ${weakest} of ${SIZED_BY === "share" ? "the target" : SIZED_BY}`;
  $("counts").textContent = `${found}${nodes} nodes, ${count(state.drawn.length)} of ${count(view.collapsed.size ? view.edges.length : data.n_edges)} edges`;
  Object.assign($("counts").dataset, { nodes: state.count, edges: state.drawn.length, visible: state.visible });
}

function update() {
  readControls();
  render();
  sayCounts();
  markPrompt();
}

// A node that the sliders hide is brought back by moving them.
function reveal(key) {
  const node = view.byKey.get(key);
  if (CHOSEN.has(node.kind)) setNodes(node.rank + 1);
  else if (REST.has(node.kind)) $("rest").checked = true;
  state.selected = null;
  update();
  if (!state.shownKeys.has(key)) { setNodes(view.ranked.length); update(); }
  select(key, true);
}

function matches(node) {
  const wanted = state.search.toLowerCase();
  return [node.label, node.node, node.token, node.group, KINDS[node.kind], ...(node.members || []), ...promoted(node, 5)]
    .some((text) => text && (text.toLowerCase().includes(wanted) || clean(text).toLowerCase().includes(wanted)));
}

function showGroups() {
  const all = [...GROUPS.values()];
  const chips = all.map((group) => element("button", {
    type: "button", "aria-pressed": String(view.collapsed.has(group.name)), "data-group": group.name,
    title: clean(group.name) + "\n(collapse or expand)", onclick: () => toggleGroup(group.name),
  }, element("span", { class: "swatch", style: `border-color: ${group.color}` }), `${shorten(clean(group.name), 24)} (${group.members.length})`));
  if (all.length > 1) {
    const collapse = view.collapsed.size < all.length;
    chips.push(element("button", {
      type: "button", id: "all-groups", onclick: () => setCollapsed(collapse ? all.map((group) => group.name) : [], null),
    }, collapse ? "Collapse all" : "Expand all"));
  }
  $("groups").replaceChildren(...chips);
}

function toggleGroup(name) {
  const isCollapsed = view.collapsed.has(name);
  const next = new Set(view.collapsed);
  if (isCollapsed) next.delete(name);
  else next.add(name);
  const selected = view.byKey.get(state.selected);
  const inside = selected && selected.group === name;
  setCollapsed(next, inside && !isCollapsed ? "group:" + name : inside ? null : state.selected);
}

function setCollapsed(names, selected) {
  const active = document.activeElement, chip = active && active.dataset ? active.dataset.group : null;
  const shown = state.count, wasAll = shown === view.ranked.length;
  view.collapsed = new Set(names);
  state.selected = state.hovered = state.trail = null;
  rebuildView();
  if (wasAll) setNodes(view.ranked.length);
  else setFirstNodes();
  showGroups();
  update();
  select(selected && view.byKey.has(selected) ? selected : null);
  if (chip) [...$("groups").children].find((one) => one.dataset.group === chip).focus();
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
function nameTheme() { $("theme").textContent = isDark() ? "Light" : "Dark"; $("theme").ariaLabel = isDark() ? "Light colors" : "Dark colors"; }

function keyOf(event) {
  const mark = event.target.closest ? event.target.closest(".node") : null;
  return mark ? mark.dataset.key : null;
}

function tip(event, text) {
  const box = $("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8)) + "px";
  box.style.top = (event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18) + "px";
}

function tipText(key, edge) {
  if (edge) return `${fullName(edge.source)} ${where(edge.source)}\n→ ${fullName(edge.target)} ${where(edge.target)}\n${aboutEdge(edge)}`;
  if (!key) return "";
  const node = view.byKey.get(key);
  const active = node.activation === null ? "" : `activation ${number(node.activation)}\n`;
  const influence = node.influence === null ? "" : `\ninfluence ${number(node.influence)}`;
  const tokens = promoted(node, 5);
  return `${fullName(node)}\n${KINDS[node.kind] || node.kind} ${where(node)}\n${active}score ${number(node.score)}, share ${percent(node.share)}${influence}`
    + (tokens.length ? `\npromotes ${tokens.join(", ")}` : "");
}

// The prompt with the tokens that have nodes, of collapsed groups too, standing out, also those that the graph folds.
function markPrompt() {
  for (const word of $("prompt").children) word.classList.toggle("has", state.occupied.has(Number(word.dataset.position)));
}

function showPrompt() {
  const show = (text) => [...text].map((character) => (character === "\n" ? character : clean(character))).join("");
  const pieces = promptPieces();
  if (!pieces) { $("prompt").textContent = show(data.prompt); return; }
  $("prompt").replaceChildren(...pieces.map(([text, position]) => (position === null ? show(text) : element("span", { "data-position": position }, show(text)))));
}

// The prompt cut at its tokens, which may lack spaces or carry marks; tokens in front of it, such as BOS, are left out.
function promptPieces() {
  const pieces = [];
  let from = 0;
  for (const [position, token] of data.tokens.entries()) {
    const found = [token, token.replace(/^##/, ""), token.trim()].map((form) => [form, form ? data.prompt.indexOf(form, from) : -1])
      .find(([, at]) => at >= 0 && data.prompt.slice(from, at).trim() === "");
    if (!found) { if (from === 0) continue; return null; }
    if (found[1] > from) pieces.push([data.prompt.slice(from, found[1]), null]);
    pieces.push([found[0], position]);
    from = found[1] + found[0].length;
  }
  return from === data.prompt.length && from ? pieces : null;
}

function listen() {
  let waiting = 0;
  const soon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(update); };
  for (const id of ["node-slider", "rest", "unfold"]) $(id).addEventListener("input", soon);
  $("edge-slider").addEventListener("input", () => { state.edgesTouched = true; soon(); });
  $("edge-measure").addEventListener("input", () => { state.measure = $("edge-measure").value; update(); showPanel(); });
  $("search").addEventListener("input", () => { state.search = $("search").value.trim(); paint(); sayCounts(); });
  $("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !state.search) return;
    const found = view.nodes.filter(matches).sort((a, b) => sizeOf(b) - sizeOf(a)).map((node) => node.key);
    if (found.length) { select(found[(found.indexOf(state.selected) + 1) % found.length]); }
  });
  $("theme").addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); update(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { nameTheme(); update(); });
  $("save-svg").addEventListener("click", saveSvg);
  $("save-png").addEventListener("click", savePng);
  $("zoom-in").addEventListener("click", () => zoomBy(1.5));
  $("zoom-out").addEventListener("click", () => zoomBy(1 / 1.5));
  $("zoom-fit").addEventListener("click", fit);
  listenToMap();
  listenToGraph();
  listenToKeys();
  listenToPrinting();
  // At once, not with the next frame: a picture taken between them would show the old arrangement in the new room.
  new ResizeObserver(() => { if (state.layout && JSON.stringify(roomFor()) !== listen.room) { listen.room = JSON.stringify(roomFor()); update(); } }).observe($("view"));
}

function listenToGraph() {
  const graph = $("graph");
  d3.select(graph).call(gestures).on("dblclick.zoom", (event) => { if (!keyOf(event)) fit(); });
  graph.addEventListener("click", (event) => {
    const key = keyOf(event);
    state.trail = null;
    select(key && key === state.selected ? null : key);
  });
  graph.addEventListener("pointermove", (event) => {
    const key = keyOf(event), box = graph.getBoundingClientRect();
    const edge = key || event.buttons ? null : edgeAt(event.clientX - box.left, event.clientY - box.top);
    if (key !== state.hovered || edge !== state.edge) { Object.assign(state, { hovered: key, edge }); paint(); }
    tip(event, event.buttons ? "" : tipText(key, edge));
  });
  graph.addEventListener("pointerleave", () => { tip(null, ""); Object.assign(state, { hovered: null, edge: null }); paint(); });
  $("tokens").addEventListener("click", (event) => { if (event.target.closest(".folded")) { $("unfold").checked = true; update(); } });
}

function listenToKeys() {
  $("graph").addEventListener("keydown", (event) => {
    const key = keyOf(event);
    if (!key) return;
    if (event.key === "Enter" || event.key === " ") { state.trail = null; select(key); }
    else if (event.key.startsWith("Arrow")) { if (state.selected !== key) { state.trail = null; state.selected = key; } move(event.key); }
    else return;
    event.preventDefault();
  });
  const more = (factor) => {
    setNodes(Math.max(1, Math.min(view.ranked.length, factor > 1 ? Math.ceil(state.count * factor) : Math.floor(state.count * factor))));
    update();
  };
  const shortcuts = {
    "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), 0: fit, "]": () => more(1.5), "[": () => more(1 / 1.5),
    "/": () => $("search").focus(), t: () => { const first = firstStop(); if (first) select(first, true); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      tip(null, "");
      if ($("search").value && document.activeElement === $("search")) { $("search").value = state.search = ""; sayCounts(); }
      state.hovered = state.edge = state.trail = null;
      select(null);
    } else if (!event.ctrlKey && !event.metaKey && !event.altKey && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName) && Object.hasOwn(shortcuts, event.key)) {
      shortcuts[event.key]();
      event.preventDefault();
    }
  });
}

showPrompt();
for (const [name, text, title, kind] of data.facts) {
  if (kind !== "more") $("facts").append(element("div", { ...(title ? { title } : {}), class: kind }, element("dt", {}, clean(name)), element("dd", { "data-fact": name }, clean(text))));
}
if (SIZED_BY === "influence") $("edge-measure").value = state.measure = "relative";
nameTheme();
rebuildView();
showGroups();
state.colors = readColors();
drawLegend();
setFirstNodes();
update();
showPanel();
$("prompt").scrollTop = $("prompt").scrollHeight;  // what is asked is at the end of a long prompt
listen();
