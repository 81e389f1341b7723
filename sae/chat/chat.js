"use strict";
// The chat page. What the model or people write is inserted as text, never as html.

const $ = (id) => document.getElementById(id);
const KEY = "nanosae-chat";
const SIGNS = { add: "+", set: "=", scale: "*" };
let about = null; // the model and its SAEs, from the server
let state = { turns: [], edits: [], settings: null };
let opened = null; // {sae, latent}: the feature that is shown, and shaded by
let running = null; // AbortController of the answers being written
const most = new Map(); // "sae/latent" -> largest activation seen here
const most_of = new Map(); // sae -> the same, of any of its latents

function el(tag, props = {}, ...inside) {
  const e = Object.assign(document.createElement(tag), props);
  e.append(...inside);
  return e;
}
const EXAMPLES = { pygpt: ["What does os.path.join do?", "What does re.sub do?", "What does json.dumps do?"] };
const key = (sae, latent) => `${sae}/${latent}`;
const several = () => about.saes.length > 1;
const saeOf = (f) => f.hookpoint ?? about.saes[0].name;
const nameOf = (sae, latent) => (several() ? `${sae}/${latent}` : `${latent}`);
const visible = (text) => text.replaceAll("\n", "\u21b5").replace(/[\u0000-\u001f\u007f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`);
const short = (x) => (Math.abs(x) >= 100 ? x.toFixed(0) : Math.abs(x) >= 10 ? x.toFixed(1) : x.toFixed(2));

function keep() {
  try { localStorage.setItem(KEY, JSON.stringify({ model: about.model, saes: about.saes.map((s) => s.name), ...state })); }
  catch { tell("this conversation is too long to survive a reload of the page", true); }
}

function recall() {
  try {
    const old = JSON.parse(localStorage.getItem(KEY));
    if (old && old.model === about.model && String(old.saes) === String(about.saes.map((s) => s.name)))
      state = { turns: old.turns, edits: old.edits, settings: old.settings };
  } catch { /* nothing was kept */ }
  for (const answer of state.turns.flatMap((t) => t.answers)) {
    if (answer.state === "writing") answer.state = "stopped";
    for (const token of answer.tokens) learn(token);
  }
}

function tell(text, bad = false) { $("status").textContent = text; $("status").classList.toggle("bad", bad); }

function learn(token) { // the largest activations seen so far
  for (const f of token.features) {
    const k = key(saeOf(f), f.latent);
    if (!(most.get(k) >= f.activation)) most.set(k, f.activation);
    if (!(most_of.get(saeOf(f)) >= f.activation)) most_of.set(saeOf(f), f.activation);
  }
}

const known = (sae, latent) => about.saes.find((s) => s.name === sae)?.largest?.[latent] || 0; // from the text that sae_viz read
const largest = (sae, latent) => known(sae, latent) || most.get(key(sae, latent)) || 10;

// ---------------------------------------------------------------------------------------------------------------------
// the server: json objects, a line each

async function* lines(url, body, signal) {
  const how = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try { response = await fetch(url, { ...how, signal }); }
  catch (e) { if (e.name === "AbortError") throw e; throw new Error("the server does not answer; is it still running?"); }
  if (!response.ok) {
    const why = await response.json().catch(() => ({}));
    throw new Error(why.error || `the server refused (${response.status})`);
  }
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const whole = rest.split("\n");
    rest = whole.pop();
    for (const line of whole) {
      const event = JSON.parse(line);
      if (event.error) throw new Error(event.error);
      yield event;
    }
    if (done) { if (rest) throw new Error("the answer was cut off"); return; }
  }
}

async function only(url, body) { for await (const event of lines(url, body)) return event; throw new Error("no response from the server"); }

// ---------------------------------------------------------------------------------------------------------------------
// tokens

function shareOf(token) {
  if ($("shade").value === "none") return 0;
  if ($("shade").value === "strongest")
    return Math.min(1, Math.max(0, ...token.features.map((f) => f.activation / (known(saeOf(f), f.latent) || most_of.get(saeOf(f)))))) ** 2;
  const f = token.features.find((g) => opened && g.latent === opened.latent && saeOf(g) === opened.sae);
  return f ? Math.min(1, f.activation / largest(opened.sae, opened.latent)) : 0;
}

function shade() {
  for (const span of document.querySelectorAll("#talk .tokens span")) span.style.setProperty("--a", shareOf(span.token).toFixed(3));
}

function shades() { // what tokens can be shaded by
  const options = [["strongest", "the strongest feature"], ["none", "nothing"]];
  if (opened) options.push(["feature", `feature ${nameOf(opened.sae, opened.latent)}`]);
  const was = $("shade").value;
  $("shade").replaceChildren(...options.map(([value, text]) => el("option", { value, textContent: text })));
  $("shade").value = options.some(([v]) => v === was) ? was : "strongest";
}

function tokenSpan(token, answer, i) {
  const span = el("span", { textContent: token.text, tabIndex: i ? -1 : 0, token, answer, at: i });
  span.setAttribute("role", "button");
  if (token.text.includes("\n")) span.classList.add("end");
  if (!token.text.trim()) span.setAttribute("aria-label", JSON.stringify(token.text));
  const best = token.features[0];
  span.title = best ? `${nameOf(saeOf(best), best.latent)} ${best.label} ${short(best.activation)}` : "";
  span.style.setProperty("--a", shareOf(token).toFixed(3));
  return span;
}

function rows(items, n) { // the first n, and a button for the others
  const list = el("ol", { className: "rows" }, ...items.slice(0, n));
  if (items.length > n) {
    const more = el("button", { type: "button", className: "more", textContent: `${items.length - n} more` });
    more.onclick = () => more.parentElement.replaceWith(...items.slice(n));
    list.append(el("li", {}, more));
  }
  return list;
}

function showToken(span) {
  for (const other of document.querySelectorAll("span.at")) other.classList.remove("at");
  span.classList.add("at");
  $("hint").hidden = true;
  const { token, answer, at } = span;
  const active = token.features.map((f) => {
    const b = featureButton(saeOf(f), f.latent, f.label, short(f.activation));
    b.style.setProperty("--s", (f.activation / token.features[0].activation).toFixed(3));
    return el("li", {}, b);
  });
  const why = el("button", { type: "button", textContent: "why this token?", hidden: !answer.steered && !about.saes.length });
  const reasons = el("ol", { className: "rows" });
  why.onclick = async () => {
    why.disabled = true;
    try {
      const found = await only("api/explain", { ask: answer.ask, token: token.id, ids: answer.tokens.slice(0, at + 1).map((t) => t.id) });
      reasons.replaceChildren(...found.features.slice(0, 8).map((f) => {
        const b = featureButton(saeOf(f), f.latent, f.label, `${f.effect >= 0 ? "+" : ""}${f.effect.toFixed(2)}`);
        b.style.setProperty("--s", Math.min(1, Math.abs(f.effect / found.features[0].effect)).toFixed(3));
        return el("li", {}, b);
      }), el("li", { className: "dim", textContent: `added to its logit, ${found.logit.toFixed(2)} above the mean; probability ${found.probability.toFixed(3)}` }));
    } catch (e) { tell(e.message, true); }
    why.disabled = false;
  };
  $("token").replaceChildren(
    el("h2", { textContent: `token \u201c${visible(token.text)}\u201d` }),
    rows(active.length ? active : [el("li", { className: "dim", textContent: "no feature is active on it" })], 8),
    el("p", {}, why), reasons);
  $("token").scrollIntoView({ block: "nearest" });
}

document.addEventListener("click", (e) => { if (e.target.token) { e.target.focus(); showToken(e.target); } });
document.addEventListener("keydown", (e) => {
  const span = e.target.token ? e.target : null;
  if (span && (e.key === "ArrowRight" || e.key === "ArrowLeft")) {
    const next = e.key === "ArrowRight" ? span.nextElementSibling : span.previousElementSibling;
    if (next) { span.tabIndex = -1; next.tabIndex = 0; next.focus(); }
    e.preventDefault();
  } else if (span && (e.key === "Enter" || e.key === " ")) { showToken(span); $("token").querySelector(".rows button")?.focus(); e.preventDefault(); }
  else if (e.key === "Escape" && running) running.abort();
  else if (e.key === "Escape" && $("side").contains(e.target)) document.querySelector("span.at")?.focus();
  else if (e.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName)) { $("message").focus(); e.preventDefault(); }
});

// ---------------------------------------------------------------------------------------------------------------------
// features

function featureButton(sae, latent, label, value = "") {
  const b = el("button", { type: "button" }, el("b", { textContent: nameOf(sae, latent) }), el("span", { textContent: label, title: label }), el("span", { textContent: value }));
  b.onclick = () => openFeature(sae, latent);
  return b;
}

async function openFeature(sae, latent) {
  opened = { sae, latent };
  $("hint").hidden = true;
  shades();
  $("shade").value = "feature";
  let f;
  try { f = await only(`api/feature?sae=${encodeURIComponent(sae)}&latent=${latent}`); }
  catch (e) { tell(e.message, true); return; }
  shade();
  const list = (title, tokens) => el("div", {}, el("h3", { textContent: title }),
    el("ol", {}, ...tokens.slice(0, 8).map((t) => el("li", { textContent: visible(Array.isArray(t) ? t[0] : t) }))));
  const facts = [];
  if (f.density !== undefined) facts.push(`active on ${(100 * f.density).toPrecision(2)}% of tokens`);
  if (f.max_activation !== undefined) facts.push(`at most ${short(f.max_activation)}`);
  if (f.label_precision != null && f.label_recall != null) facts.push(`label: precision ${f.label_precision.toFixed(2)}, recall ${f.label_recall.toFixed(2)}`);
  const pages = about.saes.find((s) => s.name === sae).pages;
  const steer = el("button", { type: "button", className: "main", textContent: "steer it" });
  steer.onclick = () => addEdit(sae, latent, f.label || "");
  const parts = [
    el("h2", { textContent: `feature ${nameOf(sae, latent)}${f.label ? `: ${f.label}` : ""}` }),
    el("p", { textContent: f.explanation || "", hidden: !f.explanation }),
    el("div", { className: "facts dim" }, ...facts.map((text) => el("span", { textContent: text }))),
    el("div", { className: "bar" }, steer),
  ];
  if (pages) parts.at(-1).append(el("a", { href: `${pages}#${latent}`, target: "_blank", rel: "noopener", textContent: "open feature page" }));
  const h = f.histogram;
  if (h && h.counts && h.counts.length) {
    const top = Math.max(...h.counts);
    const bars = h.counts.map((n, i) => {
      const bar = el("i", { title: `${short(h.edges[i])} to ${short(h.edges[i + 1])}: ${n} tokens` });
      bar.style.setProperty("--h", (n / top).toFixed(3));
      return bar;
    });
    parts.push(el("h3", { textContent: "activations" }), el("div", { className: "histogram" }, ...bars));
  }
  if (f.promoted.length) parts.push(el("div", { className: "lists" }, list("promotes", f.promoted), list("suppresses", f.suppressed)));
  const contexts = (f.contexts || []).filter((c) => c.low == null).slice(0, 6);
  if (contexts.length) parts.push(el("h3", { textContent: "strongest contexts" }), el("ol", { className: "contexts" }, ...contexts.map((c) => {
    const from = Math.max(0, c.peak - 14);
    return el("li", { className: "tokens" }, ...c.tokens.slice(from, c.peak + 10).map((text, i) => {
      const span = el("span", { textContent: visible(text) });
      span.style.setProperty("--a", Math.max(0, c.values[from + i] / f.max_activation).toFixed(3));
      return span;
    }));
  })));
  $("feature").replaceChildren(...parts);
  $("feature").scrollIntoView({ block: "nearest" });
  steer.focus({ preventScroll: true });
}

$("find").addEventListener("submit", (e) => e.preventDefault());
let asked = 0;
$("words").addEventListener("input", async () => {
  const words = $("words").value.trim(), mine = ++asked;
  if (!words || !about.saes.length) { $("found").replaceChildren(); return; }
  try {
    const found = (await Promise.all(about.saes.map(async (s) => {
      const r = await fetch(`api/search?sae=${encodeURIComponent(s.name)}&words=${encodeURIComponent(words)}`);
      return (await r.json()).map((f) => ({ ...f, sae: s.name }));
    }))).flat();
    if (mine !== asked) return; // a newer search has been answered already
    const rows = found.map((f) => el("li", {}, featureButton(f.sae, f.latent, f.label)));
    const none = about.saes.some((s) => s.labels) ? "no matches" : "features have no labels yet: run sae_viz --all_features, or search by number";
    $("found").replaceChildren(...(rows.length ? rows : [el("li", { className: "dim", textContent: none })]));
  } catch { tell("the server does not answer; is it still running?", true); }
});

// ---------------------------------------------------------------------------------------------------------------------
// steering

const editText = (e) => e.text ?? `${several() ? `${e.sae}/` : ""}${e.latent}:${e.op === "add" && e.value < 0 ? "-" : SIGNS[e.op]}${e.op === "add" ? Math.abs(e.value) : e.value}`;

function addEdit(sae, latent, label) {
  if (!state.edits.some((e) => e.sae === sae && e.latent === latent)) {
    state.edits.push({ sae, latent, label, op: "add", value: Number(largest(sae, latent).toPrecision(2)) });
  }
  showEdits();
  keep();
  $("edits").lastChild.querySelector("input[type=range]")?.focus();
  tell(state.turns.length ? "\u201canswer again\u201d shows what it changes" : "it takes effect at the next message");
}

function fixedEdit(edit) { // an edit of the command line that no slider can show
  const drop = el("button", { type: "button", textContent: "\u00d7", title: `stop ${edit.text}` });
  drop.setAttribute("aria-label", `stop ${edit.text}`);
  drop.onclick = () => { state.edits = state.edits.filter((e) => e !== edit); showEdits(); keep(); };
  return el("div", { className: "edit fixed" }, el("code", { textContent: edit.text }), drop);
}

function showEdits() {
  $("edits").replaceChildren(...state.edits.map((edit) => {
    if (edit.text) return fixedEdit(edit);
    const high = largest(edit.sae, edit.latent);
    const [low, top] = { add: [-2 * high, 2 * high], set: [0, 2 * high], scale: [0, 4] }[edit.op];
    const title = `${nameOf(edit.sae, edit.latent)} ${edit.label}`;
    const name = el("button", { type: "button", className: "name", textContent: title, title });
    name.onclick = () => openFeature(edit.sae, edit.latent);
    const op = el("select", {}, ...Object.keys(SIGNS).map((o) => el("option", { value: o, textContent: { add: "add", set: "set to", scale: "times" }[o], selected: o === edit.op })));
    const slider = el("input", { type: "range", min: low, max: top, step: (top - low) / 200, value: edit.value });
    const number = el("input", { type: "number", step: "any", value: edit.value });
    const drop = el("button", { type: "button", textContent: "\u00d7", title: `stop steering ${title}` });
    op.setAttribute("aria-label", `how feature ${title} is steered`);
    slider.setAttribute("aria-label", `strength of feature ${title}`);
    number.setAttribute("aria-label", `strength of feature ${title}, as a number`);
    drop.setAttribute("aria-label", `stop steering ${title}`);
    const change = (value) => {
      if (!Number.isFinite(value)) return;
      edit.value = Number(value.toPrecision(3));
      slider.value = number.value = edit.value;
      keep();
    };
    slider.oninput = () => change(slider.valueAsNumber);
    number.onchange = () => change(number.valueAsNumber);
    op.onchange = () => { edit.op = op.value; edit.value = op.value === "scale" ? 0 : Number(high.toPrecision(2)); showEdits(); keep(); };
    drop.onclick = () => { state.edits = state.edits.filter((e) => e !== edit); showEdits(); keep(); };
    return el("div", { className: "edit" }, name, op, slider, number, drop);
  }));
  $("compare").parentElement.hidden = !state.edits.length;
}

// ---------------------------------------------------------------------------------------------------------------------
// the conversation

function showTurn(turn) {
  const answers = turn.answers.map((answer) => {
    const tokens = el("div", { className: "tokens" }, ...answer.tokens.map((t, i) => tokenSpan(t, answer, i)));
    const head = el("div", { className: "dim" }, el("span", { textContent: answer.steered ? `steered: ${answer.ask.steer.join(" ")}` : "plain" }), el("span", { className: "note" }));
    const box = el("div", { className: `answer${answer.steered ? " steered" : ""}` }, head, tokens);
    answer.show = () => {
      tokens.classList.toggle("writing", answer.state === "writing");
      const note = { stopped: "stopped", length: "hit length limit", error: answer.error, done: "", writing: "" }[answer.state];
      head.lastChild.textContent = note;
      head.lastChild.classList.toggle("bad", answer.state === "error");
      return tokens;
    };
    answer.show();
    return box;
  });
  const li = el("li", {}, el("div", { className: "said", textContent: turn.text }), el("div", { className: `answers${answers.length > 1 ? " two" : ""}` }, ...answers));
  $("talk").append(li);
  li.scrollIntoView({ block: "nearest" });
}

function showAll() {
  $("talk").replaceChildren();
  state.turns.forEach(showTurn);
  $("empty").hidden = state.turns.length > 0;
  showEdits();
  $("again").disabled = !state.turns.length;
}

async function write(answer, signal) {
  try {
    for await (const event of lines("api/talk", answer.ask, signal)) {
      if (event.prompt) event.prompt.forEach(learn);
      if (event.token) {
        learn(event.token);
        const at = answer.tokens.push(event.token) - 1, box = answer.show();
        const below = $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 60;
        box.append(tokenSpan(event.token, answer, at));
        if (below) $("talk").scrollTop = $("talk").scrollHeight;
      }
      if (event.end) Object.assign(answer, { state: event.end, text: event.text });
    }
  } catch (e) {
    if (e.name === "AbortError") answer.state = "stopped";
    else Object.assign(answer, { state: "error", error: e.message });
  }
  answer.show();
}

async function say(text, before) {
  const spoken = before.flatMap((turn) => {
    const answer = turn.answers.at(-1);
    return [{ role: "user", content: turn.text }, { role: "assistant", content: answer.text || answer.tokens.map((t) => t.text).join("") }];
  });
  const { seed, temperature, length, raw } = state.settings;
  const ask = (steer) => ({
    messages: [...spoken, { role: "user", content: text }], seed, temperature, max_new_tokens: length, raw, steer,
    top_k: about.settings.top_k, stop: about.settings.stop, top_features: 32, sae: about.saes.length > 0,
  });
  const steer = state.edits.map(editText);
  const ways = steer.length ? ($("compare").checked ? [[], steer] : [steer]) : [[]];
  const turn = { text, answers: ways.map((way) => ({ ask: ask(way), steered: way.length > 0, tokens: [], text: "", state: "writing" })) };
  state.turns = [...before, turn];
  showAll();
  running = new AbortController();
  $("send").textContent = "stop";
  $("again").disabled = true;
  tell("writing");
  await Promise.all(turn.answers.map((answer) => write(answer, running.signal)));
  running = null;
  $("send").textContent = "send";
  $("again").disabled = false;
  const wrong = turn.answers.find((a) => a.state === "error");
  tell(wrong ? wrong.error : "", Boolean(wrong));
  shade();
  keep();
}

$("composer").addEventListener("submit", (e) => {
  e.preventDefault();
  if (running) { running.abort(); return; }
  const text = $("message").value;
  if (!text.trim()) { tell("write something first"); return; }
  $("message").value = "";
  say(text, state.turns);
});
$("message").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); if (!running) $("composer").requestSubmit(); }
});
$("again").onclick = () => { const last = state.turns.at(-1); if (last && !running) say(last.text, state.turns.slice(0, -1)); };
$("new").onclick = () => {
  if (running) running.abort();
  state.turns = [];
  $("token").replaceChildren();
  showAll();
  keep();
  $("message").focus();
};
$("shade").onchange = shade;
addEventListener("pagehide", () => { if (about) keep(); });

function settings() {
  state.settings ??= { seed: about.settings.seed, temperature: about.settings.temperature, length: about.settings.max_new_tokens, raw: about.settings.raw };
  for (const name of ["seed", "temperature", "length"]) {
    $(name).value = state.settings[name];
    $(name).onchange = () => {
      const value = $(name).valueAsNumber;
      if (Number.isFinite(value) && $(name).checkValidity()) state.settings[name] = value;
      $(name).value = state.settings[name];
      keep();
    };
  }
  $("length").max = about.max_new_tokens;
  $("raw").checked = state.settings.raw;
  $("raw").onchange = () => { state.settings.raw = $("raw").checked; keep(); };
}

async function begin() {
  try { about = await (await fetch("api/about")).json(); }
  catch { tell("the server does not answer; is it still running?", true); return; }
  $("model").textContent = `${about.model}${about.saes.length ? ` \u00b7 ${about.saes.map((s) => `${s.name}, ${s.n_latents.toLocaleString("en")} features`).join(" \u00b7 ")}` : ""}`;
  $("side").hidden = $("shading").hidden = $("how").hidden = !about.saes.length;
  $("welcome").textContent = `Talk to ${about.model}`;
  $("examples").replaceChildren(...(EXAMPLES[about.model] || []).map((text) => {
    const b = el("button", { type: "button", textContent: text });
    b.onclick = () => { if (!running) say(text, state.turns); };
    return b;
  }));
  recall();
  for (const text of state.turns.length ? [] : about.settings.steer) {
    const m = /^(?:(.*)\/)?(\d+):([+\-=*])(-?[\d.]+(?:e[+-]?\d+)?)$/.exec(text);
    const op = m && { "+": "add", "-": "add", "=": "set", "*": "scale" }[m[3]];
    state.edits.push(m ? { sae: m[1] ?? about.saes[0].name, latent: Number(m[2]), label: "", op, value: Number(m[4]) * (m[3] === "-" ? -1 : 1) } : { text });
  }
  settings();
  shades();
  showAll();
  $("message").disabled = $("send").disabled = false; // until now it was not known which model answers
  $("message").focus();
}
begin();
