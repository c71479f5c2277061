// The panel beside the graph: a node's numbers, its edges, examples and logit effects; or the circuit as a whole.

const MOST_ROWS = 12;

function showPanel() {
  const node = state.selected ? view.byKey.get(state.selected) : null;
  $("panel").replaceChildren(...(node ? aboutNode(node) : aboutCircuit()));
  $("panel").scrollTop = 0;
  if (!node) foldRows();
}

// Of long lists as many rows as the panel has room for; a button brings the others.
function foldRows() {
  const panel = $("panel");
  for (const [name, least] of [["edges=strongest", 5], ["places", 3], ["edges=strongest", 3], ["places", 2], ["places", 1]]) {
    const list = panel.querySelector(`[data-${name}]`), rows = list ? [...list.children] : [];
    let over = panel.scrollHeight - panel.clientHeight, kept = rows.filter((one) => !one.hidden).length;
    if (over <= 0 || kept <= least) continue;
    const heights = rows.map((one) => one.offsetHeight);
    if (kept === rows.length) over += 26;
    while (kept > least && over > 0) over -= heights[--kept];
    rows.forEach((one, index) => { one.hidden = index >= kept; });
    const known = list.nextElementSibling, button = known && known.className === "more-rows" ? known : element("button", { type: "button", class: "more-rows" });
    button.textContent = `Show ${rows.length - kept} more`;
    button.onclick = () => { rows.forEach((one) => { one.hidden = false; }); button.remove(); };
    list.after(button);
  }
}

function aboutNode(node) {
  const parts = [element("h2", {}, nameOf(node)), element("p", { class: "where" }, `${[KINDS[node.kind] || node.kind, nameBefore(node)].filter(Boolean).join(" ")}${node.position < 0 || nameBefore(node) ? "," : ""} ${where(node)}`)];
  parts.push(...aboutTexts(node), numbers(node));
  const actions = element("div", { class: "actions" });
  const group = GROUPS.get(node.group);
  if (group) {
    const isCollapsed = view.collapsed.has(group.name);
    actions.append(element("button", { type: "button", onclick: () => toggleGroup(group.name) },
      (isCollapsed ? "Expand " : "Collapse ") + shorten(clean(group.name), 24)));
  }
  actions.append(element("button", { type: "button", onclick: () => select(null) }, "Clear"));
  parts.push(actions, ...aboutDetails(node));
  parts.push(...edgeList("Strongest incoming edges", node, node.incoming, "source"));
  parts.push(...edgeList("Strongest outgoing edges", node, node.outgoing, "target"));
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

// What a node is about in one line: what it promotes, or how many members it has.
function lineOf(node) {
  if (node.members) return `${node.members.length} members, ${where(node)}`;
  const details = detailsOf(node), tokens = words(node, 4);
  const described = details && details.texts.find(([heading]) => heading === "description");
  if (described && !hasLabel(node)) return clean(described[1]);
  return tokens.length ? "promotes " + tokens.join(", ") : "";
}

const besideName = (node) => (nameBefore(node).endsWith("@" + node.position) && node.token && node.token !== "…" ? `at “${showToken(node.token)}”` : (node.label.endsWith("@" + node.position) || (REST.has(node.kind) && node.position >= 0)) && node.token && node.token !== "…" ? `“${showToken(node.token)}”` : where(node));

function row(node, small, value, text, label, line) {
  const most = row.most || 1;
  const bar = element("span", { class: "bar " + (value < 0 ? "negative" : "positive"), style: `width: ${Math.max(1, (100 * Math.abs(value)) / most)}%` });
  const made = element("button", { type: "button", class: "row", "aria-label": label, "data-target": node.key, onclick: () => { select(node.key, true); } },
    element("span", { class: "name" }, element("span", { title: fullName(node) }, ...(nameBefore(node) ? [element("small", { class: "before" }, nameBefore(node)), " "] : []), nameOf(node), element("small", {}, small))), bar, element("span", { class: "number" }, text), line ? element("span", { class: "line" }, line) : "");
  made.onmouseenter = () => { if (state.shownKeys.has(node.key)) marks.get(node.key).classList.add("found"); };
  made.onmouseleave = () => paint();
  return element("li", {}, made);
}

function edgeList(title, node, edges, end) {
  const list = element("ol", { "data-edges": end });
  const strongest = [...edges].sort((a, b) => strengthOf(b, state.measure) - strengthOf(a, state.measure)).slice(0, MOST_ROWS);
  const valueOf = (edge) => (state.measure === "relative" ? edge.relative : edge.attribution);
  row.most = Math.max(1e-12, ...strongest.map((edge) => Math.abs(valueOf(edge))));
  for (const edge of strongest) {
    const text = state.measure === "relative" ? percent(edge.relative) : number(edge.attribution);
    const made = row(edge[end], besideName(edge[end]), valueOf(edge), text, `${fullName(edge[end])} ${where(edge[end])}, ${aboutEdge(edge)}`);
    made.firstChild.title = aboutEdge(edge);
    if (edge.heads) made.append(element("p", { class: "note heads" }, aboutHeads(edge)));
    list.append(made);
  }
  const more = edges.length - strongest.length, [cut, sum] = (node.cut || {})[end === "source" ? "incoming" : "outgoing"] || [0, 0];
  if (!edges.length && !cut) return [];
  const heading = state.measure === "relative" ? "share of the node they enter" : "attribution";
  const notes = [more > 0 ? `${count(more)} more` : "", cut ? `${count(cut)} not in this file, in all ${number(sum)}` : ""].filter(Boolean);
  return [element("h3", {}, `${title} (${heading})`), list, notes.length ? element("p", { class: "note" }, "and " + notes.join("; ")) : ""];
}

// By which heads an edge comes, and from where the last of them looks: [layer, head, position, share].
const aboutHeads = (edge) =>
  "via " + edge.heads.map(([layer, head, position, share]) =>
    (layer < 0 ? "the residual stream" : `L${layer}H${head} from ${at(position)}`) + ` (${percent(share)})`).join(", ");
const at = (position) => (data.tokens[position] === undefined ? `position ${position}` : `“${clean(data.tokens[position])}” @${position}`);

const aboutEdge = (edge) =>
  `attribution ${number(edge.attribution)}, weight ${number(edge.weight)}, ${percent(edge.relative)} of the node it enters${edge.heads ? `; ${aboutHeads(edge)}` : ""}`;

const aboutTexts = (node) => ((detailsOf(node) || { texts: [] }).texts).flatMap(([heading, text]) =>
  [element("h3", {}, clean(heading)), element("p", { "data-detail": heading, style: "white-space: pre-wrap" }, text)]);

function aboutDetails(node) {
  const found = detailsOf(node), parts = [];
  if (!found) return parts;
  if (found.direct_logit_effects.length) {
    const most = Math.max(1e-12, ...found.direct_logit_effects.map(([, value]) => Math.abs(value)));
    const grid = element("div", { class: "effects" });
    const here = node.activation < 0 ? -1 : 1;  // what it promotes on this prompt comes first
    for (const [token, value] of [...found.direct_logit_effects].sort((a, b) => here * (b[1] - a[1]))) {
      grid.append(element("code", {}, "“" + clean(token) + (isPiece(token) ? `(${data.word_ends[token]})` : "") + "”"),
        element("span", { class: "bar " + (value < 0 ? "negative" : "positive"), style: `width: ${(100 * Math.abs(value)) / most}%` }),
        element("span", { class: "number" }, number(value)));
    }
    parts.push(element("h3", {}, node.activation < 0 ? "Direct effect on logits by a positive activation; here it is negative" : "Direct effect on logits"), grid);
  }
  if (found.examples.length) {
    parts.push(element("h3", {}, "Examples"), ...found.examples.map(anExample));
  }
  return parts;
}

// Special tokens such as BOS, and the first token of a prompt, take no part in the scale of colors: activations there are
// often far above all others.
const isSpecial = (token) => /^(<\|.*\|>|<\/?[a-z_]+>|\[[A-Z]+\])$/.test(token.trim());

function anExample(example) {
  const isApart = (token, index) => isSpecial(token) || (example.first && index === 0);
  const sizes = example.values.map((value, index) => (isApart(example.tokens[index], index) ? 0 : Math.abs(value)));
  const most = example.peak ? Math.abs(example.peak) : Math.max(1e-12, ...sizes);
  const made = element("p", { class: "example" });
  example.tokens.forEach((token, index) => {
    const value = example.values[index], color = value < 0 ? "--negative" : "--positive", part = Math.min(1, sizes[index] / most);
    const style = part ? `background: color-mix(in srgb, var(${color}) ${(60 * part).toFixed(0)}%, transparent)` : "";
    made.append(element("span", value ? { ...(style ? { style } : {}), title: number(value) } : {}, clean(token)));
  });
  return example.note ? element("div", {}, made, element("p", { class: "note" }, clean(example.note))) : made;
}

// Where the target comes from in the end: tokens and biases, what was left out, or what is not linear.
function aboutEnds() {
  if (!data.ends) return [];
  const part = ([name, share]) => element("span", { class: "part-" + name, style: `width: ${Math.max(0, Math.min(100, 100 * share))}%` });
  const bar = data.ends.cancels ? [] : [element("div", { class: "ends", "aria-hidden": "true" }, ...data.ends.shares.map(part))];
  return [element("h3", {}, "Where the target comes from"), ...bar, element("p", { class: "note" }, data.ends.text)];
}
const aboutShares = () => (SIZED_BY !== "share" ? [] : [element("p", { class: "note", id: "shares" },
  "Shares of nodes and groups sum support (+) and opposition (−) along all paths, again in every layer: they do not add up to what is explained.")]);

// The main groups: those of the circuit, or else what stands at one token in the lower, middle or upper third of the layers.
function aboutGroups() {
  const depth = Math.max(data.n_layers, 1), places = new Map();
  for (const node of view.nodes) {
    if (!CHOSEN.has(node.kind) || node.kind === "group") continue;
    const third = Math.min(2, Math.floor((3 * Math.max(0, node.layer)) / depth)), key = columnOf(node) + "|" + third;
    if (!places.has(key)) places.set(key, { third, position: columnOf(node), nodes: [] });
    places.get(key).nodes.push(node);
  }
  const most = Math.max(1e-12, ...[...places.values()].map(({ nodes }) => sum(nodes.map(sizeOf))));
  return [...places.values()].sort((a, b) => sum(b.nodes.map(sizeOf)) - sum(a.nodes.map(sizeOf))).slice(0, MOST_PLACES).map((place) => placeRow(place, most));
}
const sum = (values) => values.reduce((all, value) => all + value, 0);
const MOST_PLACES = 6;

function placeRow({ position, nodes }, most) {
  const layers = nodes.map((node) => node.layer), [low, high] = spread(layers);
  const ranked = [...nodes].sort((a, b) => sizeOf(b) - sizeOf(a)), signs = [1, -1].map((sign) => nodes.filter((node) => signOf(node) === sign));
  const token = data.tokens[position] || ranked[0].token;
  const place = `${position < 0 ? "all positions" : token === "…" ? "position " + position : `“${showToken(token)}”`}, ${low === high ? "layer " + low : `layers ${low}–${high}`}`;
  const said = functionOf(ranked);
  const bar = (which, sign) => element("span", { class: "bar " + sign, style: `width: ${(100 * sum(signs[which].map(sizeOf))) / most}%` });
  const shares = signs.map((some, which) => (some.length ? (which ? "−" : "+") + percent(Number(sum(some.map(sizeOf)).toPrecision(2))) : "")).filter(Boolean).join(" ");
  const button = element("button", { type: "button", class: "row place", title: "Select its strongest node", "data-place": position, onclick: () => select(ranked[0].key, true) },
    element("span", { class: "name" }, place), element("span", { class: "number" }, shares),
    element("span", { class: "bars" }, bar(0, "positive"), bar(1, "negative")),
    element("span", { class: "line" }, `${count(nodes.length)} ${nodes.length === 1 ? "node" : "nodes"}${said ? "; " + said : ""}`));
  const keys = new Set(nodes.map((node) => node.key));
  button.onmouseenter = () => { for (const [key, mark] of marks) mark.classList.toggle("found", keys.has(key)); };
  button.onmouseleave = () => paint();
  return element("li", {}, button);
}

// What nodes do, in a line: the labels they have, each behind the strongest node with it, or else which of them is the strongest and what it promotes.
function functionOf(ranked) {
  const labels = new Map(ranked.filter(hasLabel).reverse().map((node) => [clean(node.label), fullName(node)]));
  if (labels.size) return [...labels.values()].reverse().slice(0, 3).join(" · ");
  const [first] = ranked, tokens = words(first, 3), name = CHOSEN.has(first.kind) && LETTERS[first.kind] ? `L${first.layer}/${LETTERS[first.kind]}${first.unit}` : clean(first.node);
  return `strongest ${name}${tokens.length ? ` promotes ${tokens.join(", ")}` : ""}`;
}

function aboutCircuit() {
  const list = element("ol", { "data-edges": "strongest" });
  const strongest = view.ranked.filter((node) => !node.members).slice(0, MOST_ROWS);  // collapsed groups have rows already
  row.most = Math.max(1e-12, ...strongest.map(sizeOf));
  for (const node of strongest) {
    list.append(row(node, besideName(node), signOf(node) * sizeOf(node), percent(sizeOf(node) * signOf(node)),
      `${fullName(node)} ${where(node)}, ${SIZED_BY} ${percent(node[SIZED_BY])}`, lineOf(node)));
  }
  const groups = aboutGroups(), made = [...aboutEnds(), element("h2", {}, "Main groups"), ...aboutShares()];
  if (GROUPS.size) made.push(element("ol", { "data-groups": "" }, ...groupRows()));
  if (groups.length) made.push(element("h3", {}, "By token and layers"), element("ol", { "data-places": "" }, ...groups));
  if (strongest.length) made.push(element("h3", {}, `Strongest nodes, by ${SIZED_BY}`), list);
  return [...made, howToRead(), aboutMaking()];
}

function aboutFile() {
  if (!data.cut.count) return [];
  return [element("p", { class: "note", id: "cut" }, `${count(data.cut.count)} of ${count(data.n_edges)} edges are not in this file: those below ${percent(data.cut.share)} of ${
    data.cut.measure === "attribution" ? "the target" : "the node they enter"}, except the strongest into and out of each node. In all they carry ${number(data.cut.sum)} (sizes: ${number(data.cut.size)}).`)];
}

function groupRows() {
  const all = [...GROUPS.values()].map((group) => ({ group, node: supernode(group), shares: sum(group.members.map((node) => node[SIZED_BY] || 0)) }));
  row.most = Math.max(1e-12, ...all.map(({ shares }) => Math.abs(shares)));
  return all.sort((a, b) => Math.abs(b.shares) - Math.abs(a.shares)).map(({ group, shares }) => {
    const shown = view.collapsed.has(group.name) ? "group:" + group.name : group.members[0].key;
    const ranked = [...group.members].sort((a, b) => sizeOf(b) - sizeOf(a));
    return row({ ...supernode(group), key: shown }, "", shares, percent(Number(shares.toPrecision(3))), group.name, `${group.members.length} members; ${functionOf(ranked)}`);
  });
}

function howToRead() {
  const picture = (...children) => svg("svg", { width: 42, height: 24, "aria-hidden": "true" }, ...children);
  const disc = (name, x, r) => svg("circle", { cx: x, cy: 12, r, style: `fill: color-mix(in srgb, var(${name}) 70%, var(--bg)); stroke: var(${name})` });
  const line = (name, y, width) => svg("path", { class: name, d: `M4 ${y}H38`, "stroke-width": width });
  const square = (x, dashes) => svg("rect", { x, y: 6, width: 12, height: 12, rx: 2, style: `fill: none; stroke: var(--muted); stroke-dasharray: ${dashes}` });
  const legend = element("div", { class: "legend" },
    picture(disc("--positive", 10, 5), disc("--positive", 29, 10)), element("span", {}, `supports the target; area by the size of its ${SIZED_BY}${SIZED_BY === "share" ? ", its score over the target" : ""}`),
    picture(disc("--negative", 10, 5), disc("--negative", 29, 10)), element("span", {}, "opposes it"),
    picture(line("positive", 8, 4), line("negative", 17, 1.2)), element("span", {}, "direct effect of a node below on one above: width by size, color by support for the target"),
    picture(square(3, "none"), square(25, "2.5 2")), element("span", {}, "embedding of a token; biases and what was left out"),
    element("span", { style: "text-align: center" }, "→"), element("span", {}, "promotes: tokens whose logits the neuron raises by what it writes here, directly"));
  const keys = element("dl", { class: "keys" });
  for (const [names, what] of [["Tab Enter", "enter the graph, select a node"], ["↑ ↓", "follow its strongest edge"], ["← →", "the next such edge, or node of the layer"],
    ["[ ]", "fewer, more nodes"], ["+ − 0", "zoom, fit"], ["/ t Esc", "search, target, clear"]]) {
    keys.append(element("dt", {}, ...names.split(" ").flatMap((name) => [element("kbd", {}, name), " "])), element("dd", {}, what));
  }
  return element("details", {}, element("summary", {}, "How to read it, and keys"), legend, keys, element("p", { class: "note" },
    "Drag to move, wheel or pinch to zoom. Sliders and zoom only hide: every number stays that of the whole circuit."));
}

function aboutMaking() {
  const list = element("dl", { class: "numbers" });
  for (const [name, text, title, kind] of data.facts) {
    if (kind === "more") list.append(element("dt", title ? { title } : {}, clean(name)), element("dd", { "data-fact": name }, clean(text)));
  }
  return element("details", { id: "making" }, element("summary", {}, "How it was made"), list, ...aboutFile());
}
