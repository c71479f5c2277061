// The circuit as objects, the view with some groups collapsed, and how texts and numbers are written.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const CHOSEN = new Set(["neuron", "feature", "component", "head", "skip", "group"]);
const REST = new Set(["bias", "unselected", "linearization_error", "error"]);
const KINDS = {
  neuron: "neuron", feature: "feature", group: "group", embedding: "embedding", logit: "logit", bias: "bias",
  unselected: "what was left out", linearization_error: "what is not linear", error: "error", head: "attention head",
  skip: "skip path", component: "component",
};

const NODES = data.nodes.node.map((name, index) => {
  const node = { key: name, index };
  for (const column in data.nodes) node[column] = data.nodes[column][index];
  if (data.members[name]) node.members = data.members[name];
  node.cut = { incoming: data.cut.incoming[index] || [0, 0], outgoing: data.cut.outgoing[index] || [0, 0] };
  return node;
});
const detailsOf = (node) => data.details[data.detail_of[node.node]] || null;
const TARGETS = NODES.filter((node) => node.kind === "logit");
const EDGES = data.edges.source.map((source, index) => ({
  source: NODES[source], target: NODES[data.edges.target[index]],
  weight: data.edges.weight[index], relative: data.edges.relative[index], attribution: data.edges.attribution[index],
  heads: data.heads[index] || null,
}));
const BY_NAME = new Map(NODES.map((node) => [node.node, node]));
const GROUPS = new Map();
for (const node of NODES) {
  if (node.group && CHOSEN.has(node.kind) && node.kind !== "group") {
    if (!GROUPS.has(node.group)) GROUPS.set(node.group, { name: node.group, members: [] });
    GROUPS.get(node.group).members.push(node);
  }
}
[...GROUPS.values()].forEach((group, index) => { group.color = data.group_colors[index % data.group_colors.length]; });
// Graphs of other programs have no scores; there influence says how large a node is.
const SIZED_BY = NODES.some((node) => CHOSEN.has(node.kind) && node.share !== null) ? "share" : "influence";

// `nodes` and `edges` with chosen groups collapsed; every node knows its edges, strongest first.
const view = { nodes: [], edges: [], collapsed: new Set(GROUPS.keys()), byKey: new Map(), ranked: [] };

function rebuildView() {
  const supers = new Map();
  for (const name of view.collapsed) supers.set(name, supernode(GROUPS.get(name)));
  const standsFor = (node) => supers.get(CHOSEN.has(node.kind) && node.kind !== "group" ? node.group : "") || node;
  view.nodes = [...supers.values(), ...NODES.filter((node) => standsFor(node) === node)];
  view.byKey = new Map(view.nodes.map((node) => [node.key, node]));
  for (const node of view.nodes) { node.incoming = []; node.outgoing = []; }
  const joined = new Map();
  view.edges = [];
  const add = (source, target, weight, attribution) => {
    if (source === target) {  // inside a supernode: gone, and so is its part of the supernode's score
      target.score -= attribution;
      target.change -= weight;
      return;
    }
    const key = source.key + "\u0000" + target.key;
    let sum = joined.get(key);
    if (!sum) { sum = { source, target, weight: 0, attribution: 0 }; joined.set(key, sum); view.edges.push(sum); }
    sum.weight += weight;
    sum.attribution += attribution;
  };
  for (const edge of EDGES) {
    const source = standsFor(edge.source), target = standsFor(edge.target);
    if (source === edge.source && target === edge.target) view.edges.push(edge);
    else add(source, target, edge.weight, edge.attribution);
  }
  // Edges that are too weak for the file are there as sums between groups and nodes: none is lost in a supernode.
  const groups = [...GROUPS.keys()];
  const end = (place) => (place >= 0 ? (standsFor(NODES[place]) === NODES[place] ? NODES[place] : null) : supers.get(groups[-1 - place]));
  for (const [from, to, weight, attribution] of data.cut.groups) {
    const source = end(from), target = end(to);
    if (source && target) add(source, target, weight, attribution);
  }
  for (const node of supers.values()) node.share = data.target_value ? node.score / data.target_value : null;
  for (const edge of joined.values()) edge.relative = edge.target.score ? edge.attribution / edge.target.score : 0;
  view.edges.sort((a, b) => Math.abs(b.attribution) - Math.abs(a.attribution));
  for (const edge of view.edges) { edge.source.outgoing.push(edge); edge.target.incoming.push(edge); }
  view.ranked = view.nodes.filter((node) => CHOSEN.has(node.kind)).sort((a, b) => sizeOf(b) - sizeOf(a));
  view.ranked.forEach((node, rank) => { node.rank = rank; });
}

function supernode(group) {
  const sum = (column) => group.members.reduce((total, node) => total + (node[column] || 0), 0);
  const size = (node) => Math.abs(node.score) || 1e-12;
  const total = group.members.reduce((all, node) => all + size(node), 0);
  const largest = group.members.reduce((a, b) => (size(a) >= size(b) ? a : b));
  const one = (column, other) => (new Set(group.members.map((node) => node[column])).size === 1 ? largest[column] : other);
  return {
    key: "group:" + group.name, node: group.name, label: group.name, kind: "group", group: group.name, unit: -1,
    layer: Math.round(group.members.reduce((all, node) => all + node.layer * size(node), 0) / total),
    position: one("position", -1), drawnAt: largest.position, token: one("token", "…"), gate_sign: 0, up_sign: 0,
    activation: sum("activation"), sign: Math.sign(sum("activation")), change: sum("change"), score: sum("score"),
    influence: SIZED_BY === "influence" ? sum("influence") : null, flow: null, probability: null, cut: null,
    members: group.members.map((node) => node.node),
  };
}

const sizeOf = (node) => Math.abs(node[SIZED_BY] || 0);
const signOf = (node) => Math.sign(node.score === null ? node.influence || 0 : node.score);
const strengthOf = (edge, measure) =>
  measure === "relative" ? Math.abs(edge.relative || 0) : Math.abs(edge.attribution / (data.target_value || 1));

// Characters that would not show, or would disturb what stands beside them, in a form that does.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
function clean(text) {
  return String(text).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(HIDDEN, (character) => {
    const code = character.charCodeAt(0);
    return code < 256 ? "\\x" + code.toString(16).padStart(2, "0") : "\\u" + code.toString(16).padStart(4, "0");
  });
}
const showToken = (token) => (token.trim() === "" ? clean(token.replace(/ /g, "␣")) : clean(token).trim());
function shorten(text, length) {
  const characters = [...text];
  return characters.length > length ? characters.slice(0, length - 1).join("") + "…" : text;
}
function number(value) {
  if (value === null || value === undefined) return "—";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e6) ? size.toExponential(2) : String(Number(size.toPrecision(4)));
  return value < 0 ? "−" + text : text;
}
const percent = (value) => (value === null || value === undefined ? "—" : number(Number((100 * value).toPrecision(3))) + "%");
const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "0");
const count = (value) => value.toLocaleString("en");
const where = (node) => {
  if (node.kind === "logit" || (node.kind === "embedding" && node.position >= 0)) return "at " + node.position;
  if (REST.has(node.kind) && node.position < 0) return "everywhere";
  const token = node.token && node.token !== "…" ? "“" + showToken(node.token) + "”" : "";
  if (node.position < 0) return token || "several positions";
  return "at " + node.position + (token ? " " + token : "");
};
const nameOf = (node) => {
  const label = showToken(node.label);
  if (node.kind === "logit") return node.label === node.node ? label : "logit “" + label + "”";
  return node.kind === "embedding" ? "embedding “" + label + "”" : label;
};
// A label says what a node is about; its name says which one it is, and stands before it.
const nameBefore = (node) => (hasLabel(node) && CHOSEN.has(node.kind) ? clean(node.node) : "");
const fullName = (node) => [nameBefore(node), nameOf(node)].filter(Boolean).join(" ");
// Tokens without a letter or digit need quotes: a minus would be one of the number beside it.
const quoteSymbols = (text) => (/[\p{L}\p{N}]/u.test(text) ? text : "“" + text + "”");
// Where the neurons are that a node stands for: those of a group at all their positions.
const positionsOf = (node) => (!node.members ? [columnOf(node)] : node.members.map((name) =>
  (BY_NAME.has(name) ? BY_NAME.get(name).position : Number((/@(\d+)$/.exec(name) || [0, -1])[1]))));

// The tokens that a neuron raises most by what it writes here: with a negative activation those at the other end.
function promoted(node, most, form = /^/, shown = wholeWord) {
  const details = detailsOf(node), sign = node.activation === null ? 1 : Math.sign(node.activation) || 1;
  if (!details) return [];
  const effects = details.direct_logit_effects.filter(([token, value]) => value * sign > 0 && form.test(token));
  return effects.sort((a, b) => (b[1] - a[1]) * sign).slice(0, most).map(([token]) => shown(token));
}
// A token that is the beginning of a word alone, with how it goes on most often: strugg(le); or only that it goes on.
const isPiece = (token) => Object.hasOwn(data.word_ends, token);
const wholeWord = (token) => showToken(token) + (isPiece(token) ? `(${data.word_ends[token]})` : "");
const pieceOfWord = (token) => showToken(token) + (isPiece(token) ? "…" : "");
// For captions: whole words, and only in the upper half of the layers; below, the direct effect is little of what a neuron does.
const HAS_SPACES = data.details.some((details) => details.direct_logit_effects.some(([token]) => token.startsWith(" ")));
function words(node, most, shown) {
  if (node.kind === "neuron" && 2 * node.layer < data.n_layers) return [];
  return promoted(node, 12, HAS_SPACES ? /^ \p{L}{2,}$/u : /\p{L}{2,}/u, shown).slice(0, most);
}
const hasLabel = (node) => node.label !== node.node;

// Pixels that a text takes, as it will be drawn.
const PEN = document.createElement("canvas").getContext("2d"), FAMILY = getComputedStyle(document.body).fontFamily;
function textWidth(text, size) {
  PEN.font = `${size}px ${FAMILY}`;
  return PEN.measureText(text).width;
}

function element(tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}
function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  made.append(...children);
  return made;
}
