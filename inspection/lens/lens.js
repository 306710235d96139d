// Draws the numbers of a lens page. All text comes from a model or a user, so it only ever becomes text nodes.
const L = JSON.parse(document.getElementById("lens").text);
const $ = (id) => document.getElementById(id);
const begin = L.reply, count = L.tokens.length - begin, last = L.layers.length - 1;
const state = { token: 0, metric: "bits", measure: "bits", layer: last, head: 0 };

function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}
function s(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(child))));
  return element;
}
const put = (id, ...children) => $(id).replaceChildren(...children);
const visible = (text) => (text === "" ? "∅" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣"));
const hidden = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
const clean = (text) => text.replace(hidden, (c) => "\\u{" + c.codePointAt(0).toString(16) + "}");
const number = (value, places = 2) => (value === null || value === undefined ? "–" : value.toFixed(places).replace(/^-(0\.0*)$/, "$1"));
const percent = (value) => (value === null || value === undefined ? "–"
  : value > 0 && value < 5e-5 ? "< 0.01 %" : (100 * value).toFixed(value < 0.0995 ? 2 : 1) + " %");
const level = (share) => "h" + Math.min(9, Math.max(0, Math.round(share * 9)));
const token = (at) => L.tokens[at];

// A run of tokens as readable text; each token may carry a class, a title and a handler.
function flow(from, to, decorate) {
  const nodes = [];
  for (let at = from; at < to; at++) {
    const one = token(at), extra = decorate ? decorate(at, one) : {};
    const shown = clean(one.text), classes = ["tok", one.special ? "special" : "", extra.class || ""].join(" ");
    const properties = { class: classes, title: extra.title, onclick: extra.click };
    if (extra.click) Object.assign(properties, { tabindex: extra.tab ? 0 : -1, role: "button", "aria-pressed": !!extra.tab });
    nodes.push(h("span", properties, shown.replace(/\n$/, "⏎") || "∅"));
    if (one.text.endsWith("\n")) nodes.push(h("br"));
  }
  return nodes;
}
function choose(at) {
  state.token = Math.max(0, Math.min(count - 1, at));
  draw();
}
const picker = (at) => ({ click: () => choose(at - begin), tab: at - begin === state.token });

// --- text to ids
function drawIds() {
  const chips = L.tokens.map((one, at) =>
    h("span", { class: "chip " + one.role + (one.special ? " special" : ""), title: `bytes ${one.bytes || "none"}, ${one.role}` },
      h("b", {}, visible(clean(one.text))), h("i", {}, one.id), h("i", { class: "bytes" }, one.bytes.replace(/(..)/g, "$1 ").trim())));
  put("ids", ...chips);
}

// --- one token at a time
const METRICS = {
  bits: ["surprise, bits", (one) => one.bits, (one) => one.bits / 10],
  entropy_bits: ["entropy, bits", (one) => one.entropy_bits, (one) => one.entropy_bits / 8],
  rank: ["rank", (one) => one.rank, (one) => Math.log2(one.rank) / 10],
};
function about(one) {
  return `${number(one.bits, 3)} bits, entropy ${number(one.entropy_bits, 3)} bits, rank ${one.rank ?? "–"}`;
}
function alternatives(at) {
  return L.alternatives[at - begin].slice(0, 4).map((row) => `\n${percent(row.p)}  ${visible(clean(row.text))}`).join("");
}
function drawReply() {
  const [, , share] = METRICS[state.metric];
  const decorate = (at, one) => ({ class: "heat " + level(share(one) || 0) + (at - begin === state.token ? " chosen" : ""),
    title: about(one) + alternatives(at), ...picker(at) });
  put("reply", ...flow(begin, L.tokens.length, decorate));
  put("prompt-bits", ...flow(0, begin, (at, one) => ({ class: "heat " + level(share(one) || 0), title: about(one) })));
  const one = token(begin + state.token), rows = L.alternatives[state.token];
  put("token-facts", h("p", {}, h("b", { class: "tok" }, visible(clean(one.text))), ` (id ${one.id}): ${about(one)}`));
  const most = Math.max(...rows.map((row) => Math.max(row.p, row.sampled)));
  put("alternatives", h("table", {}, h("thead", {}, h("tr", {}, ...["token", "id", "model", "", "as sampled", ""].map((x) => h("th", {}, x)))),
    h("tbody", {}, ...rows.map((row) => h("tr", { class: row.id === one.id ? "chosen" : "" },
      h("td", {}, visible(clean(row.text))), h("td", { class: "number" }, row.id), h("td", { class: "number" }, percent(row.p)),
      h("td", {}, bar(row.p / most)), h("td", { class: "number" }, percent(row.sampled)), h("td", {}, bar(row.sampled / most)))))));
}
function bar(share, negative) {
  return s("svg", { viewBox: "0 0 100 12", width: 100, height: 12, class: "tiny" }, s("rect", { class: "rest", x: 0, y: 1, width: 100, height: 10 }),
    s("rect", { class: negative ? "bar minus" : "bar", x: 0, y: 1, width: Math.max(0, Math.min(1, share)) * 100, height: 10 }));
}

// --- where it came from
const MEASURES = { bits: "leave-one-out, bits", gradient_norm: "length of the gradient, bits", gradient_x_input: "gradient × input, bits" };
function drawOrigin() {
  const row = L.attribution[state.token], entries = row.spans, values = new Map(entries.map((e) => [e.span, e[state.measure]]));
  const most = Math.max(1e-9, ...[...values.values()].map(Math.abs));
  const owner = new Map();
  L.spans.forEach((span, index) => { for (let at = span.start; at < span.end; at++) owner.set(at, index); });
  const decorate = (at) => {
    const span = owner.get(at), value = values.get(span), here = at === begin + state.token;
    const shade = value === undefined ? "" : (value < 0 ? "minus " : "heat ") + level(Math.abs(value) / most);
    return { class: shade + (here ? " chosen" : ""), title: value === undefined ? undefined : `${number(value, 3)} bits`,
      ...(at >= begin ? picker(at) : {}) };
  };
  put("origin-text", ...flow(0, L.tokens.length, decorate));
  const total = entries.reduce((sum, e) => sum + e[state.measure], 0);
  const agree = (name) => number(row.agreement[name]);
  put("origin-facts", h("p", {}, h("b", { class: "tok" }, visible(clean(token(begin + state.token).text))),
    ` ${entries.length === 1 ? "one part stands" : entries.length + " parts stand"} before it; ${MEASURES[state.measure]}: the sum is ${number(total, 3)}. `,
    `Rank agreement with leave-one-out: gradient ${agree("gradient_norm")}, gradient × input ${agree("gradient_x_input")}.`));
  const sorted = [...entries].sort((a, b) => Math.abs(b[state.measure]) - Math.abs(a[state.measure])).slice(0, 24);
  put("origin-list", h("table", {}, h("thead", {}, h("tr", {}, ...["span", MEASURES[state.measure], ""].map((x) => h("th", {}, x)))), h("tbody", {},
    ...sorted.map((e) => h("tr", {}, h("td", {}, visible(clean(L.spans[e.span].text))), h("td", { class: "number" }, number(e[state.measure], 3)),
      h("td", {}, bar(Math.abs(e[state.measure]) / most, e[state.measure] < 0)))))));
  drawGraph(sorted, most);
  drawMatrix();
}
function drawGraph(entries, most) {
  const rows = entries.slice(0, 12).sort((a, b) => a.span - b.span), step = 30, height = Math.max(60, rows.length * step), middle = height / 2;
  const parts = [];
  rows.forEach((e, index) => {
    const y = index * step + step / 2, width = Math.max(0.6, (Math.abs(e[state.measure]) / most) * 18);
    parts.push(s("path", { class: e[state.measure] < 0 ? "flow minus" : "flow", d: `M300 ${y} C 420 ${y}, 420 ${middle}, 520 ${middle}`, "stroke-width": width },
      s("title", {}, `${number(e[state.measure], 3)} bits`)));
    const text = visible(clean(L.spans[e.span].text));
    parts.push(s("text", { x: 292, y: y + 4, "text-anchor": "end" }, (text.length > 36 ? text.slice(0, 35) + "…" : text)));
    parts.push(s("text", { class: "soft", x: 310, y: y - 4, "text-anchor": "start" }, number(e[state.measure])));
  });
  parts.push(s("text", { x: 530, y: middle + 5, "text-anchor": "start", class: "end" }, visible(clean(token(begin + state.token).text))));
  put("origin-graph", s("svg", { viewBox: `0 0 640 ${height}`, width: 640, role: "img", "aria-label": "spans and how many bits each was worth" }, ...parts));
}
function drawMatrix() {
  const cell = Math.max(6, Math.min(48, 520 / Math.max(1, L.spans.length))), tall = Math.max(7, Math.min(16, 700 / count)), left = 110;
  const most = Math.max(1e-9, ...L.attribution.flatMap((row) => row.spans.map((e) => Math.abs(e[state.measure]))));
  const parts = [];
  L.attribution.forEach((row, index) => row.spans.forEach((e) => {
    const value = e[state.measure];
    if (Math.abs(value) / most < 0.02) return;
    parts.push(s("rect", { class: value < 0 ? "cell minus" : "cell", x: left + e.span * cell, y: index * tall, width: cell - 1, height: tall - 1, opacity: Math.sqrt(Math.abs(value) / most) },
      s("title", {}, `${visible(clean(token(begin + index).text))} ← ${visible(clean(L.spans[e.span].text)).slice(0, 60)}: ${number(value, 3)} bits`)));
  }));
  L.attribution.forEach((row, index) => parts.push(s("text", { class: index === state.token ? "small end" : "small", x: left - 6, y: (index + 1) * tall - 2, "text-anchor": "end" },
    visible(clean(token(begin + index).text)).slice(0, 16))));
  parts.push(s("rect", { class: "frame", x: left - 1, y: state.token * tall - 0.5, width: L.spans.length * cell, height: tall }));
  const svg = s("svg", { viewBox: `0 0 ${left + L.spans.length * cell} ${count * tall}`, width: left + L.spans.length * cell, role: "img",
    "aria-label": "a row for each token of the reply, a column for each span" }, ...parts);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    choose(Math.floor(((event.clientY - box.top) / box.height) * count));
  });
  put("origin-matrix", svg);
}

// --- layer by layer
let attention = null;
async function unpack() {
  const raw = Uint8Array.from(atob(L.attention.data), (c) => c.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  const size = L.attention.shape.reduce((a, b) => a * b, 1);
  attention = { places: new Uint16Array(bytes, 0, size), weights: new Uint16Array(bytes, 2 * size, size) };
  drawAttention();
}
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return exponent ? sign * 2 ** (exponent - 15) * (1 + fraction / 1024) : sign * 2 ** -14 * (fraction / 1024);
}
function looks(layer, head, row) {
  const [, heads, rows, top] = L.attention.shape, start = ((layer * heads + head) * rows + row) * top, found = [];
  for (let i = start; i < start + top; i++) found.push([attention.places[i], half(attention.weights[i])]);
  return found;
}
function drawLayers() {
  const from = Math.max(0, Math.min(state.token - 5, count - 12)), to = Math.min(count, from + 12), columns = [];
  for (let at = from; at < to; at++) columns.push(at);
  const head = h("tr", {}, h("th", {}, "layer"), ...columns.map((at) => h("th", { class: at === state.token ? "chosen" : "" },
    h("span", { class: "tok", role: "button", tabindex: -1, onclick: () => choose(at) }, visible(clean(token(begin + at).text))))));
  const rows = L.layers.map((layer, index) => h("tr", {}, h("td", { class: "number" }, index === 0 ? "embedding" : index), ...columns.map((at) => {
    const best = layer.tokens[at], right = best.id === token(begin + at).id;
    return h("td", { class: "heat " + level(best.p) + (right ? " right" : "") + (at === state.token ? " chosen" : ""), title: percent(best.p) },
      visible(clean(L.names[best.id])));
  }))).reverse();
  put("lens-table", h("table", { class: "lens" }, h("thead", {}, head), h("tbody", {}, ...rows)));
  const norms = L.residual_norms.map((layer) => layer[begin + state.token - 1]), top = Math.max(...norms);
  const points = norms.map((value, index) => `${40 + (index / Math.max(1, last)) * 580},${130 - (value / top) * 115}`);
  put("norms", s("svg", { viewBox: "0 0 640 160", width: 640, role: "img", "aria-label": "length of the residual stream by layer" },
    s("line", { class: "axis", x1: 40, x2: 620, y1: 130, y2: 130 }), s("polyline", { class: "curve", points: points.join(" ") }),
    ...norms.map((value, index) => s("circle", { class: "dot", cx: points[index].split(",")[0], cy: points[index].split(",")[1], r: 3 },
      s("title", {}, `layer ${index}: ${value}`))),
    s("text", { class: "soft", x: 36, y: 20, "text-anchor": "end" }, top.toPrecision(3)), s("text", { class: "soft", x: 40, y: 148 }, "embedding"),
    s("text", { class: "soft", x: 620, y: 148, "text-anchor": "end" }, `layer ${last}`)));
  drawAttention();
}
function drawAttention() {
  if (!attention) return;
  const [layers, heads] = L.attention.shape, size = Math.max(8, Math.min(20, 600 / heads)), cells = [];
  for (let layer = 0; layer < layers; layer++)
    for (let head = 0; head < heads; head++) {
      const most = looks(layer, head, state.token)[0];
      const chosen = layer === state.layer - 1 && head === state.head;
      cells.push(s("rect", { class: "cell" + (chosen ? " picked" : ""), x: head * size, y: layer * size, width: size - 1, height: size - 1, opacity: Math.max(0.06, most[1]) },
        s("title", {}, `layer ${layer + 1}, head ${head}: ${percent(most[1])} on “${visible(clean(token(most[0]).text))}”`)));
    }
  const grid = s("svg", { viewBox: `0 0 ${heads * size} ${layers * size}`, width: heads * size, role: "img", "aria-label": "heads: the largest attention weight of each" }, ...cells);
  grid.addEventListener("click", (event) => {
    const box = grid.getBoundingClientRect();
    state.head = Math.min(heads - 1, Math.floor(((event.clientX - box.left) / box.width) * heads));
    state.layer = 1 + Math.min(layers - 1, Math.floor(((event.clientY - box.top) / box.height) * layers));
    draw();
  });
  put("heads", grid);
  const seen = new Map(looks(state.layer - 1, state.head, state.token)), kept = [...seen.values()].reduce((a, b) => a + b, 0);
  $("layer").value = state.layer;
  $("head").value = state.head;
  put("attention-facts", `Layer ${state.layer}, head ${state.head}, the position that predicts “${visible(clean(token(begin + state.token).text))}”: ` +
    `the marked tokens get ${percent(Math.min(1, kept))} of its attention, all others the rest.`);
  put("attention-text", ...flow(0, begin + state.token, (at) => (seen.has(at) ? { class: "heat " + level(seen.get(at)), title: percent(seen.get(at)) } : {})));
}

// --- all of it
function options(id, names, pick) {
  for (const [value, label] of names) $(id).append(h("option", { value }, label));
  $(id).addEventListener("change", (event) => { pick(event.target.value); draw(); });
}
function draw() {
  drawReply();
  drawOrigin();
  drawLayers();
}
options("metric", Object.entries(METRICS).map(([name, [label]]) => [name, label]), (value) => { state.metric = value; });
options("measure", Object.entries(MEASURES), (value) => { state.measure = value; });
options("layer", L.layers.slice(1).map((_, index) => [index + 1, `layer ${index + 1}`]), (value) => { state.layer = Number(value); });
options("head", Array.from({ length: L.attention.shape[1] }, (_, index) => [index, `head ${index}`]), (value) => { state.head = Number(value); });
document.addEventListener("keydown", (event) => {
  const step = { ",": -1, ".": 1 }[event.key];
  if (step && !event.target.closest("input, select, textarea")) choose(state.token + step);
  if ((event.key === "Enter" || event.key === " ") && event.target.classList.contains("tok")) { event.preventDefault(); event.target.click(); }
});
// Begin where there is something to see: the token that several parts were worth most to.
L.attribution.forEach((row, index) => {
  if (row.spans.length > 1 && row.total_bits > (state.most || 0)) Object.assign(state, { token: index, most: row.total_bits });
});
drawIds();
draw();
unpack();
