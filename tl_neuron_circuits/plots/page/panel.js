// The panel beside the graph: a node's numbers, its edges, examples and logit effects; or the circuit as a whole.

const MOST_ROWS = 12;

function showPanel() {
  const node = state.selected ? view.byKey.get(state.selected) : null;
  $("panel").replaceChildren(...(node ? aboutNode(node) : aboutCircuit()));
  $("panel").scrollTop = 0;
}

function aboutNode(node) {
  const parts = [element("h2", {}, nameOf(node)), element("p", { class: "where" }, `${KINDS[node.kind] || node.kind}${node.position < 0 ? "," : ""} ${where(node)}`)];
  parts.push(numbers(node));
  const actions = element("div", { class: "actions" });
  const group = GROUPS.get(node.group);
  if (group) {
    const isCollapsed = view.collapsed.has(group.name);
    actions.append(element("button", { type: "button", onclick: () => toggleGroup(group.name) },
      (isCollapsed ? "Expand " : "Collapse ") + shorten(clean(group.name), 24)));
  }
  actions.append(element("button", { type: "button", onclick: () => select(null) }, "Clear"));
  parts.push(actions, ...aboutDetails(node));
  parts.push(...edgeList("Strongest incoming edges", node.incoming, "source"));
  parts.push(...edgeList("Strongest outgoing edges", node.outgoing, "target"));
  if (node.members) {
    parts.push(element("h3", {}, `Members (${node.members.length})`), element("p", { class: "note" }, node.members.map(clean).join(", ")));
  }
  return parts;
}

function numbers(node) {
  const list = element("dl", { class: "numbers" });
  const add = (name, text, title) => list.append(
    element("dt", title ? { title } : {}, name), element("dd", { "data-field": name }, text));
  if (node.label !== node.node) add("node", clean(node.node));
  if (node.layer >= 0 && node.kind !== "logit") add("layer", String(node.layer));
  if (node.unit >= 0) add(CHOSEN.has(node.kind) ? "unit" : "token number", String(node.unit));
  if (node.position >= 0) add("position", String(node.position));
  if (node.token && node.token !== "…" && node.kind !== "logit") add("token", "“" + clean(node.token) + "”");
  if (node.activation !== null) {
    add(node.kind === "logit" ? "logit" : "activation", `${number(node.activation)} (${signed(node.sign)})`);
    if (node.change !== null && node.change !== node.activation) {
      add("change", number(node.change), "activation minus the baseline's");
    }
  }
  add("score", number(node.score), "signed support for the target, along all paths");
  add("share", percent(node.share), "score over the target's value");
  if (node.gate_sign || node.up_sign) {
    add("gate sign", signed(node.gate_sign));
    add("up sign", signed(node.up_sign));
  }
  if (node.flow !== null) add("flow", number(node.flow), "part of the target that reaches the node along edges of this circuit");
  if (node.influence !== null) add("influence", number(node.influence), "circuit-tracer's: all paths to the logits, sizes of normalized edges");
  if (node.probability !== null) add("probability", number(node.probability));
  if (node.group && node.kind !== "group") add("group", clean(node.group));
  return list;
}

function row(node, small, value, text, label) {
  const most = row.most || 1;
  const bar = element("span", { class: "bar " + (value < 0 ? "negative" : "positive"), style: `width: ${Math.max(1, (100 * Math.abs(value)) / most)}%` });
  const made = element("button", { type: "button", class: "row", "aria-label": label, "data-target": node.key, onclick: () => { select(node.key, true); } },
    element("span", { class: "name" }, nameOf(node), element("small", {}, small)), bar, element("span", { class: "number" }, text));
  made.onmouseenter = () => { if (state.shownKeys.has(node.key)) nodeElement(node.key).classList.add("found"); };
  made.onmouseleave = () => paint();
  return element("li", {}, made);
}

function edgeList(title, edges, end) {
  const list = element("ol", { "data-edges": end });
  const strongest = [...edges].sort((a, b) => strengthOf(b, state.measure) - strengthOf(a, state.measure)).slice(0, MOST_ROWS);
  const valueOf = (edge) => (state.measure === "relative" ? edge.relative : edge.attribution);
  row.most = Math.max(1e-12, ...strongest.map((edge) => Math.abs(valueOf(edge))));
  for (const edge of strongest) {
    const text = state.measure === "relative" ? percent(edge.relative) : number(edge.attribution);
    const made = row(edge[end], where(edge[end]), valueOf(edge), text, `${nameOf(edge[end])} ${where(edge[end])}, ${aboutEdge(edge)}`);
    made.firstChild.title = aboutEdge(edge);
    if (edge.heads) made.append(element("p", { class: "note heads" }, aboutHeads(edge)));
    list.append(made);
  }
  if (!edges.length) return [];
  const rest = edges.length - strongest.length;
  const heading = state.measure === "relative" ? "share of the node they enter" : "attribution";
  return [element("h3", {}, `${title} (${heading})`), list, rest > 0 ? element("p", { class: "note" }, `and ${count(rest)} more`) : ""];
}

// By which heads an edge comes, and from where the last of them looks: [layer, head, position, share].
const aboutHeads = (edge) =>
  "via " + edge.heads.map(([layer, head, position, share]) =>
    (layer < 0 ? "the residual stream" : `L${layer}H${head} from ${at(position)}`) + ` (${percent(share)})`).join(", ");
const at = (position) => (data.tokens[position] === undefined ? `position ${position}` : `“${clean(data.tokens[position])}” @${position}`);

const aboutEdge = (edge) =>
  `attribution ${number(edge.attribution)}, weight ${number(edge.weight)}, ${percent(edge.relative)} of the node it enters${edge.heads ? `; ${aboutHeads(edge)}` : ""}`;

function aboutDetails(node) {
  const found = data.details[node.node], parts = [];
  if (!found) return parts;
  for (const [heading, text] of found.texts) {
    parts.push(element("h3", {}, clean(heading)), element("p", { "data-detail": heading, style: "white-space: pre-wrap" }, text));
  }
  if (found.direct_logit_effects.length) {
    const most = Math.max(1e-12, ...found.direct_logit_effects.map(([, value]) => Math.abs(value)));
    const grid = element("div", { class: "effects" });
    for (const [token, value] of found.direct_logit_effects) {
      grid.append(element("code", {}, "“" + clean(token) + "”"),
        element("span", { class: "bar " + (value < 0 ? "negative" : "positive"), style: `width: ${(100 * Math.abs(value)) / most}%` }),
        element("span", { class: "number" }, number(value)));
    }
    parts.push(element("h3", {}, "Effect on logits"), grid);
  }
  if (found.examples.length) {
    parts.push(element("h3", {}, "Examples"), ...found.examples.map(anExample));
  }
  return parts;
}

function anExample(example) {
  const most = Math.max(1e-12, ...example.values.map(Math.abs));
  const made = element("p", { class: "example" });
  example.tokens.forEach((token, index) => {
    const value = example.values[index], color = value < 0 ? "--negative" : "--positive";
    const style = value ? `background: color-mix(in srgb, var(${color}) ${((60 * Math.abs(value)) / most).toFixed(0)}%, transparent)` : "";
    made.append(element("span", value ? { style, title: number(value) } : {}, clean(token)));
  });
  return example.note ? element("div", {}, made, element("p", { class: "note" }, clean(example.note))) : made;
}

function aboutCircuit() {
  const chosen = view.nodes.filter((node) => CHOSEN.has(node.kind)).sort((a, b) => sizeOf(b) - sizeOf(a));
  const list = element("ol", { "data-edges": "strongest" });
  row.most = Math.max(1e-12, ...chosen.map(sizeOf));
  for (const node of chosen.slice(0, MOST_ROWS)) {
    list.append(row(node, where(node), signOf(node) * sizeOf(node), percent(sizeOf(node) * signOf(node)),
      `${nameOf(node)} ${where(node)}, ${SIZED_BY} ${percent(node[SIZED_BY])}`));
  }
  const picture = (...children) => svg("svg", { width: 42, height: 24, "aria-hidden": "true" }, ...children);
  const disc = (name, x, r) => svg("circle", { cx: x, cy: 12, r, style: `fill: color-mix(in srgb, var(${name}) 70%, var(--bg)); stroke: var(${name})` });
  const line = (name, y, width) => svg("path", { class: name, d: `M4 ${y}H38`, "stroke-width": width });
  const square = (x, dashes) => svg("rect", { x, y: 6, width: 12, height: 12, rx: 2, style: `fill: none; stroke: var(--muted); stroke-dasharray: ${dashes}` });
  const legend = element("div", { class: "legend" },
    picture(disc("--positive", 10, 5), disc("--positive", 29, 10)), element("span", {}, "supports the target; area by |" + SIZED_BY + "|"),
    picture(disc("--negative", 10, 5), disc("--negative", 29, 10)), element("span", {}, "works against it"),
    picture(line("positive", 8, 4), line("negative", 17, 1.2)), element("span", {}, "direct effect of a node below on one above: width by size, color by support for the target"),
    picture(square(3, "none"), square(25, "2.5 2")), element("span", {}, "embedding; biases and what was left out"));
  return [
    element("h2", {}, "Strongest nodes"), list, element("h3", {}, "How to read it"), legend,
    element("p", { class: "note" }, "Click a node for its numbers and edges. With the keyboard: Tab to a node, Enter selects it, ↑ and ↓ follow its "
      + "strongest edge, ← and → go through the others, Escape clears. The sliders only hide: every number stays that of the whole circuit."),
  ];
}
