// Sliders, search, groups, themes, pointer and keyboard.

// A slider's 0 is no limit; 1 to 100 go from the smallest to the largest value, evenly on a logarithmic scale.
function scale(values) {
  const positive = values.filter((value) => value > 0);
  const low = positive.length ? Math.min(...spread(positive)) : 1, high = positive.length ? Math.max(...spread(positive)) : 1;
  return {
    at: (place) => (place <= 0 ? 0 : low * (high / low) ** (place / 100) * (1 - 1e-9)),
    place: (value) => (value <= low || high === low ? 0 : Math.min(100, (100 * Math.log(value / low)) / Math.log(high / low))),
  };
}
// Arguments of Math.min are limited in number.
const spread = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
const scales = {};

function setScales() {
  scales.node = scale(view.nodes.filter((node) => CHOSEN.has(node.kind)).map(sizeOf));
  scales.edge = scale(view.edges.map((edge) => Math.min(1, strengthOf(edge, state.measure))));
}

function setEdgeDefault() {
  const sizes = view.edges.filter(isShownEdge).map((edge) => strengthOf(edge, state.measure)).sort((a, b) => b - a);
  $("edge-slider").value = sizes.length > 200 ? Math.ceil(scales.edge.place(sizes[200])) : 0;
}
const isShownEdge = (edge) => isShown(edge.source) && isShown(edge.target);

function readControls() {
  state.nodeLimit = scales.node.at(Number($("node-slider").value));
  state.edgeLimit = scales.edge.at(Number($("edge-slider").value));
  state.rest = $("rest").checked;
}

function sayCounts() {
  const chosen = state.shown.filter((node) => CHOSEN.has(node.kind)).length;
  const all = view.nodes.filter((node) => CHOSEN.has(node.kind)).length;
  const found = state.search ? `${count(state.shown.filter(matches).length)} found · ` : "";
  const hint = state.drawn.length === MOST_EDGES ? " (the strongest)" : "";
  const limits = [["node", state.nodeLimit], ["edge", state.edgeLimit]];
  for (const [name, limit] of limits) {
    const text = limit ? percent(limit) : "0 %";
    $(name + "-limit").textContent = text;
    $(name + "-slider").setAttribute("aria-valuetext", text);
  }
  $("counts").textContent = `${found}${count(chosen)} of ${count(all)} nodes, ${count(state.drawn.length)} of ${count(view.edges.length)} edges${hint}`;
  Object.assign($("counts").dataset, { nodes: chosen, edges: state.drawn.length });
}

function update() {
  readControls();
  render();
  sayCounts();
}

// A node that the sliders hide is brought back by moving them.
function reveal(key) {
  const node = view.byKey.get(key);
  if (CHOSEN.has(node.kind)) $("node-slider").value = Math.floor(scales.node.place(sizeOf(node)));
  else $("rest").checked = true;
  state.selected = null;
  update();
  if (!state.shownKeys.has(key)) { $("node-slider").value = 0; update(); }
  select(key, true);
}

function matches(node) {
  const wanted = state.search.toLowerCase();
  return [node.label, node.node, node.token, node.group, KINDS[node.kind], ...(node.members || [])]
    .some((text) => text && (text.toLowerCase().includes(wanted) || clean(text).toLowerCase().includes(wanted)));
}

function showGroups() {
  const all = [...GROUPS.values()];
  const chips = all.map((group) => element("button", {
    type: "button", "aria-pressed": String(view.collapsed.has(group.name)), "data-group": group.name,
    title: "Collapse or expand", onclick: () => toggleGroup(group.name),
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
  view.collapsed = new Set(names);
  state.selected = state.hovered = state.trail = null;
  rebuildView();
  setScales();
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

function tipText(event) {
  const key = keyOf(event), edge = event.target.edge;
  if (edge) return `${nameOf(edge.source)} ${where(edge.source)}\n→ ${nameOf(edge.target)} ${where(edge.target)}\n${aboutEdge(edge)}`;
  if (!key) return "";
  const node = view.byKey.get(key);
  const active = node.activation === null ? "" : `activation ${number(node.activation)}\n`;
  const influence = node.influence === null ? "" : `\ninfluence ${number(node.influence)}`;
  return `${nameOf(node)}\n${KINDS[node.kind] || node.kind} ${where(node)}\n${active}score ${number(node.score)}, share ${percent(node.share)}${influence}`;
}

function listen() {
  let waiting = 0;
  const soon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(update); };
  for (const id of ["node-slider", "edge-slider", "rest"]) $(id).addEventListener("input", soon);
  $("edge-measure").addEventListener("input", () => {
    state.measure = $("edge-measure").value;
    setScales();
    setEdgeDefault();
    update();
    showPanel();
  });
  $("search").addEventListener("input", () => { state.search = $("search").value.trim(); paint(); sayCounts(); });
  $("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !state.search) return;
    const found = view.nodes.filter(matches).sort((a, b) => sizeOf(b) - sizeOf(a)).map((node) => node.key);
    if (found.length) { select(found[(found.indexOf(state.selected) + 1) % found.length]); }
  });
  $("theme").addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  const graph = $("graph");
  graph.addEventListener("click", (event) => {
    const key = keyOf(event);
    state.trail = null;
    select(key && key === state.selected ? null : key);
  });
  graph.addEventListener("pointermove", (event) => tip(event, tipText(event)));
  graph.addEventListener("pointerover", (event) => hover(keyOf(event)));
  graph.addEventListener("pointerleave", () => { tip(null, ""); hover(null); });
  graph.addEventListener("keydown", (event) => {
    const key = keyOf(event);
    if (!key) return;
    if (event.key === "Enter" || event.key === " ") { state.trail = null; select(key); }
    else if (event.key.startsWith("Arrow")) { if (state.selected !== key) { state.trail = null; state.selected = key; } move(event.key); }
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    tip(null, "");
    if ($("search").value && document.activeElement === $("search")) { $("search").value = state.search = ""; sayCounts(); }
    state.hovered = state.trail = null;
    select(null);
  });
  new ResizeObserver(soon).observe($("scroller"));
}

function hover(key) {
  if (key === state.hovered) return;
  state.hovered = key;
  paint();
}

$("prompt").textContent = [...data.prompt].map((character) => (character === "\n" ? character : clean(character))).join("");
for (const [name, text, title] of data.facts) {
  $("facts").append(element("div", title ? { title } : {}, element("dt", {}, clean(name)), element("dd", { "data-fact": name }, clean(text))));
}
if (SIZED_BY === "influence") { $("node-measure").textContent = "influence"; $("edge-measure").value = state.measure = "relative"; }
nameTheme();
rebuildView();
setScales();
readControls();
setEdgeDefault();
showGroups();
update();
showPanel();
listen();
