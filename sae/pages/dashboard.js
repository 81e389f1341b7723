// The dashboard in the browser: a list with search, filters and a map; a page per feature. No server, no library.
// Data comes from classic scripts beside index.html, which call index(...) and chunk(...): a file may not fetch another.
// All that comes from data is put in as text, never as markup.
"use strict";
const $ = (id) => document.getElementById(id);
const state = {rows: [], shown: [], facts: {}, at: 0, sort: "", down: false, chunks: new Map(), waiting: new Map(), names: new Map()};
const ROW = () => (matchMedia("(max-width:46rem)").matches ? 84 : 44);

function el(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) {
    if (k in e && k !== "style" && k !== "list") e[k] = v; else e.setAttribute(k, v);
  }
  e.append(...children.filter((c) => c !== null && c !== undefined));
  return e;
}
const num = (v, digits = 3) => (v === null || v === undefined ? "" : v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3
  ? v.toExponential(digits - 1) : String(+v.toPrecision(digits)));
const percent = (v) => `${num(100 * v, v < 1e-4 ? 2 : 3)}%`;  // as a column holds

// ---------------------------------------------------------------------------------------------------------------------
// tokens

const NO_GLYPH = /[\p{C}\p{Z}\ufffd]/u;

function spelled(c) {
  const code = c.codePointAt(0);
  return code < 256 ? "\\x" + code.toString(16).padStart(2, "0")
    : code < 65536 ? "\\u" + code.toString(16).padStart(4, "0") : "\\U" + code.toString(16).padStart(8, "0");
}

// A text as nodes: spaces and line ends marked, what has no glyph of its own spelled out.
function shown(text) {
  const parts = [];
  let plain = "";
  const flush = () => { if (plain) parts.push(plain); plain = ""; };
  for (const c of text) {
    if (c !== " " && !NO_GLYPH.test(c)) { plain += c; continue; }
    flush();
    parts.push(c === " " ? el("u", {}, " ") : c === "\n" ? el("i", {className: "n"}, "\n")
      : c === "\t" ? el("i", {className: "g"}, "\t") : el("i", {}, spelled(c)));
  }
  flush();
  return parts;
}

function token(text, value, largest, peak) {
  const e = el("bdi", {}, ...shown(text));
  if (value > 0) { e.style.setProperty("--a", Math.min(1, value / largest).toFixed(2)); e.title = num(value, 4); }
  if (peak) e.className = "p";
  return e;
}

const clean = (text) => [...text].map((c) => (c !== " " && NO_GLYPH.test(c) ? spelled(c) : c)).join("");

// A label as nodes: what stands between backticks is a token.
function labelled(text) {
  return text.split(/(`[^`]*`)/).filter(Boolean).map((piece) => (piece.length > 1 && piece[0] === "`" && piece.endsWith("`")
    ? el("code", {}, ...shown(piece.slice(1, -1))) : clean(piece)));
}

// ---------------------------------------------------------------------------------------------------------------------
// data

// columns: {latent, density, max, mean, label, precision, recall, top, x, y, before, after}, one value a feature
function index(data) {
  state.facts = data.facts;
  const c = data.columns;
  state.rows = c.latent.map((latent, i) => ({latent, density: c.density[i], max: c.max[i], mean: c.mean[i],
    label: c.label[i], precision: c.precision[i], recall: c.recall[i], top: c.top[i], x: c.x[i], y: c.y[i],
    before: c.before[i], after: c.after[i], text: null}));
  state.names = new Map(state.rows.map((row) => [row.latent, row]));
  state.perChunk = data.per_chunk;
}

function chunk(n, records) {
  state.chunks.set(n, new Map(records.map((r) => [r.latent, r])));
  (state.waiting.get(n) || []).forEach((f) => f());
  state.waiting.delete(n);
}

function load(latent, then) {
  const n = Math.floor(latent / state.perChunk);
  if (state.chunks.has(n)) return then(state.chunks.get(n).get(latent));
  const call = () => then(state.chunks.get(n)?.get(latent));
  if (state.waiting.has(n)) return state.waiting.get(n).push(call);
  state.waiting.set(n, [call]);
  if (state.chunks.size > 40) state.chunks.clear();
  const failed = () => { state.waiting.delete(n); then(undefined); };
  document.head.append(el("script", {src: `data/${n}.js`, onerror: failed, onload: (e) => e.target.remove()}));
}

// ---------------------------------------------------------------------------------------------------------------------
// the list

const quality = (row) => (row.precision === null ? -1 : Math.min(row.precision, row.recall));
const grade = (q) => (q >= 0.8 ? "good" : q >= 0.5 ? "fair" : "weak");
const KEYS = {latent: (r) => r.latent, label: quality, density: (r) => r.density, max: (r) => r.max, mean: (r) => r.mean,
  top: (r) => r.top.toLowerCase(), text: (r) => (r.peak ??= r.after.map((t) => t[0]).join("").toLowerCase())};
const wanted = {
  any: () => true, good: (r) => quality(r) >= 0.8, fair: (r) => quality(r) >= 0.5, weak: (r) => quality(r) < 0.5 && r.max > 0,
};
const often = {any: () => true, rare: (r) => r.density < 1e-3, some: (r) => r.density >= 1e-3 && r.density < 0.01,
  common: (r) => r.density >= 0.01 && r.density < 0.1, dense: (r) => r.density >= 0.1};

function textOf(row) {
  return row.text ??= `#${row.latent} ${row.label} ${row.top} ${row.before.concat(row.after).map((t) => t[0]).join("")}`.toLowerCase();
}

function prepareSearch(from = 0) {  // a little at a time, so that the first search is as quick as the others
  state.rows.slice(from, from + 1000).forEach(textOf);
  if (from < state.rows.length) setTimeout(prepareSearch, 20, from + 1000);
}

function choose() {
  const words = $("search").value.toLowerCase().trim().split(/\s+/).filter(Boolean);
  const life = $("life").value, good = wanted[$("quality").value], density = often[$("often").value];
  state.shown = state.rows.filter((row) => {
    if (life !== "all" && (row.max > 0) !== (life === "live")) return false;
    if (!good(row) || !density(row)) return false;
    if (!words.length) return true;
    return words.every((w) => textOf(row).includes(w));
  });
  const key = KEYS[state.sort], sign = state.down ? -1 : 1;
  if (state.sort !== "latent" || state.down) {  // rows come in order of their latents, and sorting is stable
    const keyed = state.shown.map((row) => [key(row), row]);
    keyed.sort((a, b) => (a[0] < b[0] ? -sign : a[0] > b[0] ? sign : 0));
    state.shown = keyed.map((k) => k[1]);
  }
  state.at = Math.min(state.at, Math.max(0, state.shown.length - 1));
  $("count").textContent = `${state.shown.length.toLocaleString("en")} of ${state.rows.length.toLocaleString("en")}`;
  rows(true);
  mapSoon();
}

function sortBy(name) {
  state.down = state.sort === name ? !state.down : !["latent", "top", "text"].includes(name);
  state.sort = name;
  document.querySelectorAll("th").forEach((th) => {
    if (th.dataset.key === name) th.ariaSort = state.down ? "descending" : "ascending"; else th.ariaSort = null;
  });
  $("order").value = name;
  choose();
}

function tableRow(row, i) {
  const open = el("a", {href: `#${row.latent}`}, String(row.latent));
  const q = quality(row);
  const rate = row.precision === null ? "" : el("span", {className: `q ${grade(q)}`, title:
    `precision ${num(row.precision)}, recall ${num(row.recall)} on held-out text`}, `${Math.round(100 * q)}% `);
  const parts = (tokens) => tokens.map(([text, value]) => token(text, value, 1, false));
  const text = row.max > 0
    ? el("div", {className: "t row"}, el("span", {className: "l"}, ...parts(row.before)), el("span", {}, ...parts(row.after)))
    : el("span", {className: "dim"}, "never fired");
  const tr = el("tr", {className: i === state.at ? "at" : "", onclick: () => go(row.latent)}, el("td", {}, open),
    el("td", {title: row.label}, rate, " ", ...labelled(row.label)), el("td", {}, percent(row.density)), el("td", {}, num(row.max)),
    el("td", {}, num(row.mean)), el("td", {}, el("span", {className: "t row"}, row.top ? token(row.top, 0, 1, false) : "")),
    el("td", {}, text));
  return tr;
}

let painted = [-1, -1];
function rows(again = false) {
  const body = $("rows"), height = ROW(), n = state.shown.length;
  const top = body.getBoundingClientRect().top;
  const first = Math.max(0, Math.min(n, Math.floor(-top / height) - 8));
  const last = Math.min(n, first + Math.ceil(innerHeight / height) + 16);
  if (!again && painted[0] === first && painted[1] === last) return;
  painted = [first, last];
  const gap = (k) => el("tr", {className: "gap", style: `height:${k * height}px`});
  body.replaceChildren(gap(first), ...state.shown.slice(first, last).map((row, i) => tableRow(row, first + i)), gap(n - last));
}

function reveal() {
  const height = ROW(), top = $("rows").getBoundingClientRect().top + scrollY + state.at * height;
  if (top < scrollY + height) scrollTo(0, top - 2 * height);
  if (top + height > scrollY + innerHeight) scrollTo(0, top + 2 * height - innerHeight);
  rows(true);
}

// ---------------------------------------------------------------------------------------------------------------------
// the map: what lies near has decoder directions of like neighbours

const view = {x: 0.5, y: 0.5, zoom: 1, hover: null};
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const dark = matchMedia("(prefers-color-scheme:dark)");
function colour(t) {
  const s = Math.max(0, Math.min(1, t)) * (RAMP.length - 1.001), i = Math.floor(s);
  return RAMP[i].map((c, k) => Math.round(c + (s - i) * (RAMP[i + 1][k] - c)));
}
const SHADES = Array.from({length: 64}, (_, i) => `rgb(${colour(i / 63)})`);
const COLOURS = {
  density: [(r) => (Math.log10(Math.max(r.density, 1e-5)) + 5) / 4.5, "1e-5", "0.3"],
  quality: [(r) => quality(r), "0", "1"],
  max: [(r) => r.max / state.largest, "0", "largest"],
};

function place(row, size) {
  return [(row.x - view.x) * view.zoom * size + size / 2, (row.y - view.y) * view.zoom * size + size / 2];
}

let due = 0;
function mapSoon() {  // once the list is on the screen
  clearTimeout(due);
  due = setTimeout(map, 60);
}

function map() {
  const canvas = $("map");
  if (canvas.hidden || !canvas.clientWidth) return;
  const size = canvas.clientWidth, scale = devicePixelRatio || 1, c = canvas.getContext("2d");
  canvas.width = canvas.height = Math.round(size * scale);
  c.scale(scale, scale);
  c.clearRect(0, 0, size, size);
  state.largest ??= state.rows.reduce((m, r) => Math.max(m, r.max), 1e-9);
  const [value, low, high] = COLOURS[$("colour").value], all = state.shown.length === state.rows.length;
  const radius = Math.max(0.8, Math.min(3.2, 110 / Math.sqrt(state.rows.length))) * Math.sqrt(view.zoom);
  const dot = (row, fill) => {
    const [x, y] = place(row, size);
    if (x < -9 || y < -9 || x > size + 9 || y > size + 9) return;
    c.fillStyle = fill;
    if (radius < 1.6) c.fillRect(x - radius, y - radius, 2 * radius, 2 * radius);
    else { c.beginPath(); c.arc(x, y, radius, 0, 7); c.fill(); }
  };
  if (!all) for (const row of state.rows) dot(row, dark.matches ? "#2d3138" : "#e4e6ea");
  for (const row of state.shown) dot(row, row.max > 0 ? SHADES[Math.round(63 * Math.max(0, Math.min(1, value(row))))] : "#888");
  const hot = view.hover ?? (state.open !== undefined ? state.names.get(state.open) : null);
  if (hot) {
    const [x, y] = place(hot, size);
    c.strokeStyle = dark.matches ? "#fff" : "#000";
    c.lineWidth = 1.5;
    c.beginPath(); c.arc(x, y, radius + 4, 0, 7); c.stroke();
  }
  $("low").textContent = low; $("high").textContent = high;
  $("ramp").style.background = `linear-gradient(to right,${RAMP.map((r) => `rgb(${r})`)})`;
}

function nearest(event) {
  const box = $("map").getBoundingClientRect(), size = box.width;
  const [px, py] = [event.clientX - box.left, event.clientY - box.top];
  let best = null, least = 14 * 14;
  for (const row of state.shown) {
    const [x, y] = place(row, size), d = (x - px) ** 2 + (y - py) ** 2;
    if (d < least) { least = d; best = row; }
  }
  return best;
}

function mapEvents() {
  const canvas = $("map");
  let from = null, moved = false;
  canvas.onpointerdown = (e) => { from = [e.clientX, e.clientY, view.x, view.y]; moved = false; };
  canvas.onpointermove = (e) => {
    if (from && e.buttons && view.zoom > 1) {
      const k = canvas.clientWidth * view.zoom;
      [view.x, view.y] = [from[2] - (e.clientX - from[0]) / k, from[3] - (e.clientY - from[1]) / k];
      moved ||= Math.hypot(e.clientX - from[0], e.clientY - from[1]) > 3;
    } else view.hover = nearest(e);
    tip(view.hover);
    map();
  };
  canvas.onpointerup = (e) => { from = null; if (!moved) { const row = nearest(e); if (row) go(row.latent); } };
  canvas.onpointerleave = () => { from = null; view.hover = null; tip(null); map(); };
  canvas.onwheel = (e) => {
    e.preventDefault();
    const box = canvas.getBoundingClientRect(), old = view.zoom;
    view.zoom = Math.max(1, Math.min(40, old * Math.exp(-e.deltaY / 300)));
    const k = (1 / old - 1 / view.zoom) / box.width;
    view.x += (e.clientX - box.left - box.width / 2) * k;
    view.y += (e.clientY - box.top - box.height / 2) * k;
    if (view.zoom === 1) view.x = view.y = 0.5;
    map();
  };
}

function tip(row) {
  $("tip").replaceChildren(...(row ? [el("b", {}, String(row.latent)), " ", ...labelled(row.label || "no label")]
    : [el("span", {className: "dim"}, "Each dot is a feature; near ones write in like directions. Point at it, click to open, scroll to zoom.")]));
}

// ---------------------------------------------------------------------------------------------------------------------
// a feature

function svg(width, height, ...children) {
  const ns = (tag, attributes, text) => {
    const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (text !== undefined) e.append(text);
    return e;
  };
  const e = ns("svg", {viewBox: `0 0 ${width} ${height}`, role: "img"});
  for (const [tag, attributes, text, title] of children) {
    const child = ns(tag, attributes, text);
    if (title) child.append(ns("title", {}, title));
    e.append(child);
  }
  return e;
}

// Drawn as wide as they are shown, so that letters have their size.
const wide = () => Math.max(260, Math.min(640, (innerWidth > 736 ? innerWidth / 2 : innerWidth) - 60));

// Bars over bins of eighths of an octave: the axis is logarithmic.
function histogram({edges, counts}) {
  const n = counts.length, highest = Math.max(...counts), W = wide();
  const bars = counts.map((count, i) => {
    const h = count && Math.max(1, (180 * count) / highest);
    return ["rect", {x: (W * i) / n, y: 195 - h, width: (W / n) * 0.9, height: h}, undefined,
      `${num(edges[i])} to ${num(edges[i + 1])}: ${count.toLocaleString("en")} tokens`];
  });
  const label = (x, anchor, text, y = 209) => ["text", {x, y, "text-anchor": anchor}, text];
  return svg(W, 226, ["line", {x2: W, y1: 195.5, y2: 195.5}], ...bars, label(0, "start", `${highest.toLocaleString("en")} tokens`, 10),
    label(0, "start", num(edges[0])), label(W / 2, "middle", num(edges[Math.floor(n / 2)])), label(W, "end", num(edges[n])),
    label(W / 2, "middle", "activation, log scale", 223));
}

// How often it is active at each part of a sequence, against how often all tokens are there: 1 is evenly.
function positions(rates, starts) {
  const n = rates.length, W = wide(), highest = Math.max(2, ...rates), y = (v) => 92 - (80 * v) / highest;
  const name = (i) => (i + 1 < n && starts[i + 1] === starts[i] + 1 ? `${starts[i]}` : i + 1 < n ? `${starts[i]} to ${starts[i + 1] - 1}` : `${starts[i]} on`);
  const bars = rates.map((v, i) => ["rect", {x: (W * i) / n, y: y(v), width: (W / n) * 0.9, height: Math.max(0.5, 92 - y(v))},
    undefined, `position ${name(i)}: ${num(v)} times as often as evenly`]);
  const labels = rates.map((_, i) => ["text", {x: (W * (i + 0.45)) / n, y: 106, "text-anchor": "middle"}, String(starts[i])]);
  return svg(W, 110, ...bars, ["line", {x2: W, y1: y(1), y2: y(1)}], ["text", {x: W, y: y(1) - 3, "text-anchor": "end"}, "evenly"], ...labels);
}

function list(items, kind = "") {
  const largest = Math.max(1e-9, ...items.map(([, v]) => Math.abs(v)));
  return el("ol", {className: `list t ${kind}`}, ...items.map(([what, value, text]) =>
    el("li", {style: `--s:${(Math.abs(value) / largest).toFixed(3)}`}, el("span", {}, what), el("span", {className: "dim"}, text))));
}
const tokens = (pairs, text, kind) => list(pairs.map(([t, v]) => [el("bdi", {}, ...shown(t)), v, text(v)]), kind);
const links = (pairs) => list(pairs.map(([latent, v]) => {
  const row = state.names.get(latent);
  return [row ? el("a", {href: `#${latent}`, title: row.label}, `${latent} `, ...labelled(row.label)) : `${latent}`, v, num(v, 2)];
}));
const part = (width, title, content, note) => el("section", {className: width},
  el("h2", {}, title, " ", note ? el("small", {}, note) : null), content);

function contexts(record) {
  const groups = new Map();
  for (const c of record.contexts) {
    const name = c.low === null ? "Strongest contexts" : `${num(c.low, 2)} to ${num(c.high, 2)}, ${percent(c.share)} of its activations`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(c);
  }
  const out = [];
  for (const [name, group] of groups) {
    const note = group[0].low === null ? "one per sequence; point at a token for its activation" : "drawn at random";
    out.push(el("div", {className: "head"}, el("h2", {}, name), el("small", {}, note)));
    out.push(el("ol", {className: "ctx"}, ...group.map((c) => el("li", {},
      el("span", {title: `sequence ${c.sequence}, position ${c.position}`}, num(c.values[c.peak], 4)),
      el("div", {className: "t", title: "not active"}, ...c.tokens.map((t, i) => token(t, c.values[i], record.max_activation, i === c.peak)))))));
  }
  return out;
}

function page(record) {
  const q = record.label_precision === null ? -1 : Math.min(record.label_precision, record.label_recall);
  const facts = [["density", percent(record.density)], ["active on", `${Math.round(record.density * record.n_tokens).toLocaleString("en")} of ${record.n_tokens.toLocaleString("en")} tokens`],
    ["largest activation", num(record.max_activation, 4)], ["mean when active", num(record.mean_active, 4)]];
  if (q >= 0) facts.push(["label's precision", el("span", {className: grade(record.label_precision)}, percent(record.label_precision))],
    ["label's recall", el("span", {className: grade(record.label_recall)}, percent(record.label_recall))]);
  const fired = record.histogram.counts.length > 0;
  const effects = (title, pairs, kind) => part("w6", title, pairs.length
    ? tokens(pairs, (v) => (v > 0 ? "+" : "") + num(v, 2), kind) : el("small", {}, "no way to the logits"), "logits");
  const logits = [effects("Promotes", record.promoted, ""), effects("Suppresses", record.suppressed, "cool")];
  const left = fired ? el("div", {className: "w6"}, part("", "Activations", histogram(record.histogram)),
    part("pos", "Positions", positions(record.positions, state.facts.position_starts))) : null;
  const right = el("div", {className: "w6 cols in"}, ...logits, ...(fired ? [
    part("w6", "Typical tokens", tokens(record.typical, percent), "of its activations"),
    part("w6", "First tokens", tokens(record.first, percent), "where it begins")] : []));
  const parts = [left, right, part("w6", "Near directions", links(record.neighbours), "cosine of decoder rows"),
    fired ? part("w6", "Fires with", links(record.cofiring), "correlation of being active") : null].filter(Boolean);
  return [
    el("h1", {}, `Feature ${record.latent}`),
    el("p", {className: "what"}, ...labelled(record.label || (fired ? "no label" : `never fired on ${record.n_tokens.toLocaleString("en")} tokens`)),
      q >= 0 && q < 0.5 ? el("small", {className: "fair"}, " weak label: see its precision and recall") : null),
    record.explanation ? el("p", {}, clean(record.explanation), el("small", {}, ` by ${record.explainer}` +
      (record.detection === null ? "" : `, detection ${num(record.detection, 2)}`) + (record.fuzzing === null ? "" : `, fuzzing ${num(record.fuzzing, 2)}`))) : null,
    record.rule && record.rule !== record.label ? el("details", {}, el("summary", {}, "the whole rule"), el("p", {}, ...labelled(record.rule))) : null,
    el("dl", {}, ...facts.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v)))),
    el("div", {className: "cols"}, ...parts), ...contexts(record),
  ];
}

function beside(step) {
  const i = state.shown.findIndex((r) => r.latent === state.open);
  return state.shown[i + step]?.latent ?? (i < 0 ? state.shown[0]?.latent : undefined);
}

function feature(latent) {
  state.open = latent;
  const i = state.shown.findIndex((r) => r.latent === latent);
  if (i >= 0) state.at = i;
  load(latent, (record) => {
    if (state.open !== latent) return;
    const [back, on] = [beside(-1), beside(1)];
    $("nav").replaceChildren(el("a", {href: "#"}, "all features"),
      back !== undefined && i > 0 ? el("a", {href: `#${back}`, rel: "prev"}, `\u2190 ${back}`) : "",
      on !== undefined && i >= 0 ? el("a", {href: `#${on}`, rel: "next"}, `${on} \u2192`) : "",
      el("button", {type: "button", id: "code", ariaPressed: String(document.body.classList.contains("code")), onclick: lines}, "line breaks"),
      el("small", {}, `${state.facts.hookpoint} of ${state.facts.model}`));
    $("page").replaceChildren(...(record ? page(record).filter((e) => e !== null) : [el("h1", {}, `Feature ${latent}`), el("p", {}, "has no page here; run sae_viz with --feature or --all_features")]));
    document.title = `Feature ${latent}`;
    $("list").hidden = true; $("one").hidden = false;
    scrollTo(0, 0);
    performance.mark(`feature ${latent}`);
  });
}

function lines() {
  const on = document.body.classList.toggle("code");
  $("code").ariaPressed = String(on);
}

let scrolled = 0;
function go(latent) { location.hash = `#${latent}`; }
function route() {
  const asked = /^#(\d+)$/.exec(location.hash);
  if (asked) {
    if (!$("list").hidden) scrolled = scrollY;
    return feature(Number(asked[1]));
  }
  state.open = undefined;
  document.title = "Features";
  $("one").hidden = true; $("list").hidden = false;
  scrollTo(0, scrolled);
  rows(true); map();
}

function key(e) {
  const typing = ["INPUT", "SELECT"].includes(document.activeElement?.tagName);
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key === "Escape") { if (typing) document.activeElement.blur(); else if (state.open !== undefined) location.hash = "#"; return; }
  if (typing && !(e.key === "Enter" && document.activeElement.id === "search")) return;
  const step = {ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1}[e.key];
  if (state.open !== undefined) {
    if (step && beside(step) !== undefined) go(beside(step));
    if (e.key === "b") lines();
    return;
  }
  const down = {ArrowDown: 1, j: 1, ArrowUp: -1, k: -1}[e.key];
  if (down) { document.activeElement?.blur(); state.at = Math.max(0, Math.min(state.shown.length - 1, state.at + down)); e.preventDefault(); reveal(); }
  else if (e.key === "Enter" && state.shown[state.at] && !["A", "BUTTON"].includes(document.activeElement?.tagName)) go(state.shown[state.at].latent);
  else if (e.key === "/") { e.preventDefault(); $("search").focus(); }
}

function start(latent) {
  $("title").textContent = `Features of ${state.facts.hookpoint} in ${state.facts.model}`;
  const facts = Object.entries(state.facts.shown || {});
  $("facts").replaceChildren(...facts.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v))));
  document.querySelectorAll("th").forEach((th) => { th.firstChild.onclick = () => sortBy(th.dataset.key); });
  for (const id of ["life", "quality", "often"]) $(id).onchange = () => { scrollTo(0, 0); choose(); };
  $("search").oninput = choose;
  $("order").onchange = () => { state.sort = ""; sortBy($("order").value); };
  $("colour").onchange = map;
  $("maps").onclick = () => {
    const off = $("both").classList.toggle("nomap");
    $("side").hidden = off; $("maps").ariaPressed = String(!off);
    rows(true); map();
  };
  if (matchMedia("(max-width:64rem)").matches) $("maps").onclick();  // there it would stand before the list
  mapEvents(); tip(null);
  addEventListener("scroll", () => state.open === undefined && rows(), {passive: true});
  addEventListener("resize", () => { rows(true); map(); });
  addEventListener("hashchange", route);
  addEventListener("keydown", key);
  dark.onchange = map;
  document.addEventListener("click", (e) => {  // within a frame without an address of its own, links are not followed
    const a = e.target.closest?.("a[href^='#']");
    if (a && !e.ctrlKey && !e.metaKey && !e.shiftKey) { e.preventDefault(); e.stopPropagation(); location.hash = a.getAttribute("href"); }
  }, true);
  setTimeout(prepareSearch, 200);
  if (!state.rows.some((r) => r.precision !== null)) { $("quality").hidden = true; }
  sortBy("latent");
  if (latent !== null && !location.hash) location.hash = `#${latent}`;
  route();
}
