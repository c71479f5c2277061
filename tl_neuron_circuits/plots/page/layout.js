// Where things stand: a row a layer, a column a position; layers and positions without nodes take no room. A column has two
// lanes, on the left what supports the target, on the right what works against it, each with the largest first, and
// between them a corridor for the edges. The strongest nodes have captions, away from the corridor, as many and as long
// as the room allows. No node covers another.

const LETTER_SIZE = 12, GAP = 4, AXIS_WIDTH = 54, TOKENS_HEIGHT = 40, FOLD_WIDTH = 24, SKIPPED = 7, SHORT_LABEL = 4;
const LETTERS = { neuron: "N", feature: "F", head: "H" };
const LARGEST = Math.max(1e-12, ...NODES.filter((node) => CHOSEN.has(node.kind)).map(sizeOf));

// Area by size. Embeddings and what was left out are often far larger than any neuron: they stop at twice the largest.
const radiusOf = (node) => 3.5 + 7.5 * Math.sqrt(Math.min(sizeOf(node) / LARGEST, 2));

// A caption has a name, muted, and behind it the label, or its beginning, and what the neuron promotes.
function captionOf(node, letters) {
  if (node.kind === "logit") {
    const chance = node.probability === null ? "" : percent(Number(node.probability.toPrecision(3)));
    return [shorten(quoteSymbols(clean(node.label).trim() || showToken(node.label)), 22), chance];
  }
  if (node.kind === "group") return [shorten(clean(node.label), Math.max(letters, 22)), node.members ? "· " + node.members.length : ""];
  if (node.kind === "bias" || node.kind === "linearization_error") return [shorten(clean(node.node), letters), ""];
  if (!CHOSEN.has(node.kind)) return [node.position < 0 ? shorten(clean(node.label), letters) : "", ""];
  const name = node.unit >= 0 && LETTERS[node.kind] ? LETTERS[node.kind] + node.unit : shorten(clean(node.node), hasLabel(node) ? SHORT_LABEL + 8 : letters);
  const label = hasLabel(node) ? shorten(clean(node.label), Math.max(SHORT_LABEL, letters - [...name].length - 1)) : "";
  let tokens = "";
  for (const token of words(node, 3, letters > GOOD_CAPTION ? wholeWord : pieceOfWord)) {
    const longer = tokens ? tokens + ", " + token : "→ " + token;
    if ([name, label, longer].filter(Boolean).join(" ").length > letters) break;
    tokens = longer;
  }
  return [name, [label, tokens].filter(Boolean).join(" ")];
}

function boxOf(node, isCaptioned, letters) {
  const isPill = node.kind === "logit" || node.kind === "group";
  const caption = isCaptioned || !CHOSEN.has(node.kind) || isPill ? captionOf(node, letters) : ["", ""];
  const text = textWidth(caption.filter(Boolean).join(" "), LETTER_SIZE), r = radiusOf(node);
  if (isPill) return { node, caption, isPill, r: 11, w: text + 22, h: 24 };
  return { node, caption, isPill, r, text: text ? text + 9 : 0, center: r + 1, w: 2 * r + 2 + (text ? text + 9 : 0), h: Math.max(2 * r + 2, text ? 18 : 0) };
}

function rowOf(node) {
  if (node.kind === "logit") return "logits";
  if (node.kind === "embedding") return "embeddings";
  if (REST.has(node.kind) && node.layer < 0) return "rest";
  return Math.max(node.layer, 0);
}
const columnOf = (node) => (node.drawnAt === undefined ? node.position : node.drawnAt);

// Boxes of one cell in lines of equal columns.
function lines(boxes, width) {
  if (!boxes.length) return { lines: [], h: 0, w: 0, step: 0 };
  const widest = boxes.reduce((most, box) => Math.max(most, box.w), 0), each = Math.max(1, Math.floor((width + GAP) / (widest + GAP)));
  const made = [];
  boxes.forEach((box, index) => {
    if (index % each === 0) made.push({ boxes: [], h: 0 });
    const line = made[made.length - 1];
    line.boxes.push(box);
    line.h = Math.max(line.h, box.h + GAP);
  });
  const step = widest + GAP;
  return { lines: made, step, h: made.reduce((sum, one) => sum + one.h, 0), w: Math.min(each, boxes.length) * step - GAP };
}

// The first arrangement that fits the room as it is, from many long captions to none; or the one that shrinks least.
const CAPTIONS = [[1, 30], [1, 24], [1, 18], [1, 12], [1, 7], [0.5, 18], [0.5, 12], [0.25, 18], [0.1, 12], [0, 12]];
const ASPECTS = [14, 8, 4.5, 2.6, 1.6, 1, 0.6];
const MOST_CAPTIONS = 60, GOOD_CAPTION = 18;

function layout(nodes, room) {
  const chosen = nodes.filter((node) => CHOSEN.has(node.kind)).sort((a, b) => sizeOf(b) - sizeOf(a));
  let best = null;
  for (const [part, letters] of CAPTIONS) {
    const captioned = new Set(chosen.slice(0, Math.ceil(Math.min(chosen.length, MOST_CAPTIONS) * part)));
    const grid = { ...gridOf(nodes, captioned, letters, room), letters: part === 1 ? letters : 0 };
    for (const aspect of ASPECTS) {
      const made = arrange(grid, room, aspect);
      made.fit = Math.min(1, room.width / made.width, room.height / made.height);
      if (!best || made.fit > best.fit + 0.001) best = made;
    }
    // Captions are worth a little shrinking, but must stay readable.
    if (best.fit > (part < 1 ? 0.88 : letters < GOOD_CAPTION ? 0.84 : 0.93)) break;
  }
  if (best.fit < 1) {  // what one side of the room has to spare; at its best for the tokens' words too, which do not shrink
    const wider = { ...best.grid, columns: best.grid.columns.map((column) => ({ ...column, least: column.least / best.fit })) };
    for (const grid of [wider, best.grid]) {
      const made = arrange(grid, { width: room.width / best.fit, height: room.height / best.fit }, best.aspect);
      made.fit = Math.min(1, room.width / made.width, room.height / made.height);
      if (made.fit > 0.98 * best.fit) return made;
    }
  }
  return best;
}

function gridOf(nodes, captioned, letters, room) {
  const rows = rowsOf(nodes), cells = new Map(), used = new Set();
  for (const node of nodes) {
    used.add(columnOf(node));
    const lane = !CHOSEN.has(node.kind) ? 2 : signOf(node) < 0 ? 1 : 0, key = [rowOf(node), columnOf(node), lane].join("|");
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(boxOf(node, captioned.has(node), letters));
  }
  const group = (box) => box.node.group || "\uffff";
  for (const boxes of cells.values()) boxes.sort((a, b) => (group(a) < group(b) ? -1 : group(a) > group(b) ? 1 : 0) || sizeOf(b.node) - sizeOf(a.node));
  const columns = columnsOf(used, nodes, room);
  for (const column of columns) {
    column.lanes = [0, 1, 2].map((lane) => rows.map((row) => cells.get([row.key, column.position, lane].join("|")) || []));
    const edges = column.lanes.slice(0, 2).flat(2).length, targets = column.lanes[2].flat().filter((box) => box.node.kind === "logit");
    column.corridor = targets.length ? Math.min(MOST_CORRIDOR, CORRIDOR + 3 * edges) : CORRIDOR;
    column.isTarget = targets.length > 0;
    if (targets.length === 1) targets[0].w = Math.max(targets[0].w, column.corridor);  // its edges arrive side by side
    for (const boxes of column.lanes.slice(0, 2)) {  // the middles of a lane's discs are on one line
      const largest = boxes.flat().reduce((most, box) => (box.isPill ? most : Math.max(most, box.r)), 0);
      for (const box of boxes.flat()) if (!box.isPill) Object.assign(box, { center: largest + 1, w: largest + box.r + 2 + box.text });
    }
  }
  return { rows, columns };
}

// Positions without nodes stay as words if they are few; runs of them become one narrow column.
function columnsOf(used, nodes, room) {
  const positions = new Set(used);
  if ([...used].some((position) => position >= 0)) data.tokens.forEach((_, position) => positions.add(position));
  const all = [...positions].sort((a, b) => a - b).map((position) => columnAt(position, nodes));
  const empty = all.filter((column) => !used.has(column.position));
  const words = empty.reduce((sum, column) => sum + column.least, 0);
  if (state.unfolded || words <= 0.3 * room.width) return all;
  const columns = [];
  for (const column of all) {
    const last = columns[columns.length - 1];
    if (used.has(column.position)) columns.push(column);
    else if (last && last.folded) last.folded.push(column);
    else columns.push({ position: column.position, folded: [column], least: FOLD_WIDTH, token: "" });
  }
  for (const column of columns) if (column.folded) column.least = Math.max(FOLD_WIDTH, textWidth(foldedRange(column), 10.5) + 12);
  return columns.map((column) => (column.folded && column.folded.length === 1 ? column.folded[0] : column));
}

function columnAt(position, nodes) {
  const own = nodes.find((node) => node.position === position && node.token && node.kind !== "logit");
  const token = position < 0 ? "everywhere" : position < data.tokens.length ? data.tokens[position] : own ? own.token : "";
  return { position, token, least: Math.max(22, Math.min(130, textWidth(showToken(token), 12.5) + 12)) };
}

const EDGE = 8, CORRIDOR = 44, MOST_CORRIDOR = 124;

function arrange(grid, room, aspect) {
  const rows = grid.rows.map((row) => ({ ...row })), columns = grid.columns.map((column) => ({ ...column }));
  for (const column of columns) {
    column.widths = column.lanes.map((lane) => {
      let width = 0;
      for (const boxes of lane) {
        if (!boxes.length) continue;
        let widest = 0, high = 0;
        for (const box of boxes) { widest = Math.max(widest, box.w + GAP); high = Math.max(high, box.h + GAP); }
        const each = Math.max(1, Math.min(boxes.length, Math.round(Math.sqrt((boxes.length * high * aspect) / widest))));
        width = Math.max(width, each * widest);
      }
      return width;
    });
    const [left, right, middle] = column.widths;
    column.width = Math.max(column.least, left + right + 2 * EDGE + (left && right || column.isTarget ? column.corridor : 0), middle + EDGE);
  }
  const needed = columns.reduce((sum, column) => sum + column.width, 0);
  const open = columns.filter((column) => !column.folded), spare = Math.max(0, room.width - needed);
  let x = 0;
  for (const column of columns) {
    if (!column.folded) column.width += spare / open.length;
    column.x = x;
    const [left, right] = column.widths || [0, 0];
    column.between = left && right || column.isTarget && (left || right) ? column.corridor / 2 : 0;
    column.axis = left || right ? x + column.width / 2 + (left - right) / 2 : x + column.width / 2;
    x += column.width;
  }
  rows.forEach((row, index) => {
    row.filled = columns.map((column) => column.lanes.map((lane, which) => lines(lane[index], which === 2 ? column.width - EDGE : column.widths[which])));
    row.height = row.isSkipped ? row.least : Math.max(row.least, ...row.filled.flat().map((one) => one.h + 5));
  });
  const tall = rows.filter((row) => !row.isSkipped);
  const high = Math.max(0, room.height - rows.reduce((sum, row) => sum + row.height, 0));
  for (const row of tall) row.height += high / tall.length;
  return { grid, aspect, rows, columns, width: x, ...placed(rows, columns) };
}

// A row for every layer with nodes, from the last to the first; what lies between two of them that has none is a thin line.
function rowsOf(nodes) {
  const used = new Set(nodes.map(rowOf)), rows = [];
  const layers = [...used].filter((row) => typeof row === "number").sort((a, b) => b - a);
  if (used.has("logits")) rows.push({ key: "logits", name: "target", least: 32 });
  layers.forEach((layer, index) => {
    if (index && layers[index - 1] - layer > 1) rows.push({ key: "skip" + layer, name: "", least: SKIPPED, isSkipped: true });
    rows.push({ key: layer, name: "L" + layer, least: 24 });
  });
  if (used.has("rest")) rows.push({ key: "rest", name: "left out", least: 26 });
  if (used.has("embeddings")) rows.push({ key: "embeddings", name: "tokens", least: 26 });
  return rows;
}

function placed(rows, columns) {
  const places = new Map();
  let y = 0;
  for (const row of rows) {
    row.y = y;
    row.filled.forEach((lanes, index) => {
      const column = columns[index], clamp = (w) => Math.max(column.x + w / 2 + 4, Math.min(column.x + column.width - w / 2 - 4, column.axis));
      lanes.forEach((filled, which) => {
        let top = y + (row.height - filled.h) / 2;
        const [side, from] = [[-1, column.axis - column.between], [1, column.axis + column.between], [1, clamp(filled.w) - filled.w / 2]][which];
        for (const line of filled.lines) {
          line.boxes.forEach((box, at) => {
            const x = from + side * (at * filled.step + (box.isPill ? box.w / 2 : box.center));
            places.set(box.node.key, { ...box, x, y: top + line.h / 2, side: which === 2 ? 0 : side, isInner: at === 0 });
          });
          top += line.h;
        }
      });
    });
    y += row.height;
  }
  return { places, height: y };
}
