// The graph as it is now in a picture of its own, SVG or PNG, with its title, prompt, layers and tokens.

function pictureOf() {
  const { layout } = state, legend = legendMark(layout.width + AXIS_WIDTH - 12), top = 56 + legend.height, width = layout.width + AXIS_WIDTH + 12, height = layout.height + TOKENS_HEIGHT + top;
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  const rules = [...document.styleSheets[0].cssRules].filter((rule) => /^(svg|path|\.(node|band|skipped|columns|positive|negative|end|focused|token))/.test(rule.selectorText || ""));
  const css = rules.map((rule) => rule.cssText.replace(/var\((--[\w-]+)\)/g, (_, name) => value(name))).join("\n");
  const scene = svg("g", { transform: `translate(${AXIS_WIDTH} ${top})`, class: $("view").className });
  const rows = $("rows").cloneNode(true), columns = $("columns").cloneNode(true);
  rows.setAttribute("transform", `scale(${layout.width} 1)`);
  columns.setAttribute("transform", `scale(1 ${layout.height})`);
  const edges = svg("g", { class: "edges" }, ...state.paths.map(({ edge }) => edgeMark(edge, 1)));
  scene.append(rows, columns, edges, $("focus-edges").cloneNode(true), $("nodes").cloneNode(true));
  const axis = svg("g", { transform: `translate(0 ${top})` });
  for (const name of $("axis").children) { const copy = name.cloneNode(true); copy.setAttribute("y", name.place + 4); axis.append(copy); }
  const tokens = svg("g", { transform: `translate(${AXIS_WIDTH} ${top + layout.height})` });
  for (const word of $("tokens").children) {
    const copy = word.cloneNode(true);
    copy.setAttribute("transform", `translate(${word.place} 0)`);
    copy.firstChild.textContent = wordOf(word, 1);
    tokens.append(copy);
  }
  const fits = Math.floor((width - 24) / 6.6);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "font-family": "system-ui, 'DejaVu Sans', sans-serif" },
    svg("style", {}, css), svg("rect", { width, height, fill: value("--bg") }),
    svg("text", { x: 12, y: 20, style: "font-size: 15px; font-weight: 600" }, shorten(document.title, Math.floor(fits * 0.8))),
    svg("text", { x: 12, y: 40, class: "muted" }, shorten(clean(data.prompt), fits)),
    svg("g", { transform: "translate(12 48)" }, legend.made), scene, axis, tokens);
  for (const hit of root.querySelectorAll(".hit")) hit.remove();
  for (const mark of root.querySelectorAll("[tabindex]")) for (const name of ["tabindex", "role", "aria-pressed", "aria-label", "data-key"]) mark.removeAttribute(name);
  return { text: new XMLSerializer().serializeToString(root), width, height };
}

function save(blob, kind) {
  const link = element("a", { href: URL.createObjectURL(blob), download: document.title.replace(/[^\p{L}\p{N}]+/gu, "_").slice(0, 80) + "." + kind });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const saveSvg = () => save(new Blob([pictureOf().text], { type: "image/svg+xml" }), "svg");

function savePng() {
  const { text, width, height } = pictureOf(), image = new Image();
  image.onload = () => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * height });
    const pen = canvas.getContext("2d");
    pen.scale(2, 2);
    pen.drawImage(image, 0, 0, width, height);
    canvas.toBlob((blob) => save(blob, "png"), "image/png");
  };
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
}

// On paper there is the same picture, as large as the sheet.
function listenToPrinting() {
  addEventListener("beforeprint", () => {
    const { text } = pictureOf(), picture = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
    for (const name of ["width", "height"]) picture.removeAttribute(name);
    $("paper").replaceChildren(document.importNode(picture, true));
  });
  addEventListener("afterprint", () => $("paper").replaceChildren());
}
