// Where things stand: a row a layer, a column a position. Nodes of one cell are set in lines, the largest first, so
// that none covers another; rows and columns are as large as their fullest cell.

const TEXT = 6.8, GAP = 3, AXIS_WIDTH = 86, LABELS_BELOW = 38;
const LETTERS = { neuron: "N", feature: "F", head: "H" };
const LARGEST = Math.max(1e-12, ...NODES.filter((node) => CHOSEN.has(node.kind)).map(sizeOf));
const DEEPEST = Math.max(data.n_layers - 1, ...NODES.filter((node) => CHOSEN.has(node.kind)).map((node) => node.layer));

// Area by size. Embeddings and what was left out are often far larger than any neuron: they stop at twice the largest.
const radiusOf = (node) => 3.5 + 7.5 * Math.sqrt(Math.min(sizeOf(node) / LARGEST, 2));

function captionOf(node, few, letters) {
  if (node.kind === "logit") {
    return shorten(clean(node.label), 22) + (node.probability === null ? "" : "  " + percent(Number(node.probability.toPrecision(3))));
  }
  if (node.kind === "group") return shorten(clean(node.label), 22) + (node.members ? " · " + node.members.length : "");
  if (node.kind === "bias" || node.kind === "linearization_error") return shorten(clean(node.node), 22);
  if (!CHOSEN.has(node.kind)) return node.position < 0 ? shorten(clean(node.label), letters + 1) : "";
  if (node.label !== node.node) return shorten(clean(node.label), letters + 5);
  return few && letters > 8 && node.unit >= 0 && LETTERS[node.kind] ? LETTERS[node.kind] + node.unit : "";
}

function boxOf(node, few, letters) {
  const caption = captionOf(node, few, letters), text = caption ? [...caption].length * TEXT : 0;
  const isPill = node.kind === "logit" || node.kind === "group";
  const r = radiusOf(node);
  if (isPill) return { node, caption, isPill, r: 11, w: text + 18, h: 24 };
  return { node, caption, isPill, r, w: 2 * r + 2 + (text ? text + 5 : 0), h: 2 * r + 2 };
}

function rowOf(node) {
  if (node.kind === "logit") return "logits";
  if (node.kind === "embedding") return "embeddings";
  if (REST.has(node.kind) && node.layer < 0) return "rest";
  return Math.max(node.layer, 0);
}
const columnOf = (node) => (node.drawnAt === undefined ? node.position : node.drawnAt);

function lines(boxes, width) {
  const made = [];
  let line = null;
  for (const box of boxes) {
    if (!line || line.w + box.w + GAP > width) { line = { boxes: [], w: -GAP, h: 0 }; made.push(line); }
    line.boxes.push(box);
    line.w += box.w + GAP;
    line.h = Math.max(line.h, box.h + GAP);
  }
  return { lines: made, h: made.reduce((sum, one) => sum + one.h, 0), w: Math.max(0, ...made.map((one) => one.w)) };
}

// From wide to narrow columns and captions: the first arrangement without scrolling, or the one with the least.
const TRIES = [[3.6, 13], [2.4, 13], [1.6, 13], [1.1, 13], [0.8, 10], [0.55, 8], [0.4, 6], [0.4, 4]];

function layout(nodes, room) {
  let best = null;
  for (const [aspect, letters] of TRIES) {
    const made = arrange(nodes, room, aspect, letters);
    made.overflow = Math.max(0, made.width - room.width - 1) + Math.max(0, made.height - room.height - 1);
    if (!best || made.overflow < best.overflow) best = made;
    if (!best.overflow) break;
  }
  return best;
}

function arrange(nodes, room, aspect, letters) {
  const few = nodes.filter((node) => CHOSEN.has(node.kind)).length <= 40;
  const rows = rowsOf(nodes), cells = new Map();
  const positions = new Set();
  for (const node of nodes) {
    positions.add(columnOf(node));
    const key = rowOf(node) + "|" + columnOf(node);
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(boxOf(node, few, letters));
  }
  if (Math.max(...positions) >= 0) data.tokens.forEach((_, position) => positions.add(position));
  for (const boxes of cells.values()) boxes.sort((a, b) => sizeOf(b.node) - sizeOf(a.node));
  const cell = (row, column) => cells.get(row.key + "|" + column.position) || [];
  const columns = [...positions].sort((a, b) => a - b).map((position) => columnAt(position, nodes, letters));
  for (const column of columns) {
    for (const row of rows) {
      const boxes = cell(row, column);
      const area = boxes.reduce((sum, box) => sum + (box.w + GAP) * (box.h + GAP), 0);
      const widest = Math.max(0, ...boxes.map((box) => box.w + 4));
      column.width = Math.max(column.width, widest, Math.sqrt(area * aspect) + 8);
    }
  }
  const needed = columns.reduce((sum, column) => sum + column.width, 0);
  const spare = Math.max(0, room.width - needed) / columns.length;
  let x = 0;
  for (const column of columns) {
    column.width += spare;
    column.x = x;
    column.caption = shorten(showToken(column.token), Math.max(letters, Math.floor((column.width - 6) / TEXT)));
    x += column.width;
  }
  for (const row of rows) {
    row.filled = columns.map((column) => lines(cell(row, column), column.width - 6));
    row.height = Math.max(row.least, ...row.filled.map((one) => one.h + 10));
  }
  const tall = rows.filter((row) => row.height > row.least || row.least > 20);
  const high = room.height - LABELS_BELOW - rows.reduce((sum, row) => sum + row.height, 0);
  for (const row of tall) row.height += Math.max(0, high) / tall.length;
  return { rows, columns, width: x, ...placed(rows, columns) };
}

function rowsOf(nodes) {
  const used = new Set(nodes.map(rowOf));
  const rows = [{ key: "logits", name: "logits", least: 36 }];
  for (let layer = DEEPEST; layer >= 0; layer--) {
    rows.push({ key: layer, name: (layer === DEEPEST ? "layer " : "") + layer, least: used.has(layer) ? 30 : 13 });
  }
  if (used.has("rest")) rows.push({ key: "rest", name: "left out", least: 30 });
  if (used.has("embeddings")) rows.push({ key: "embeddings", name: "embeddings", least: 30 });
  return rows;
}

function columnAt(position, nodes, letters) {
  const own = nodes.find((node) => node.position === position && node.token && node.kind !== "logit");
  const token = position < 0 ? "everywhere" : position < data.tokens.length ? data.tokens[position] : own ? own.token : "";
  const caption = shorten(showToken(token), letters);
  return { position, token, caption, width: Math.max(26, [...caption].length * TEXT + 10) };
}

function placed(rows, columns) {
  const places = new Map();
  let y = 0;
  for (const row of rows) {
    row.y = y;
    row.filled.forEach((filled, index) => {
      let top = y + (row.height - filled.h) / 2;
      for (const line of filled.lines) {
        let left = columns[index].x + (columns[index].width - line.w) / 2;
        for (const box of line.boxes) {
          const center = box.isPill ? left + box.w / 2 : left + 1 + box.r;
          places.set(box.node.key, { ...box, x: center, y: top + line.h / 2, left });
          left += box.w + GAP;
        }
        top += line.h;
      }
    });
    y += row.height;
  }
  return { places, height: y + LABELS_BELOW };
}
