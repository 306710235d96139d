// ---- The page: settings, the chat as elements, and what the buttons do --------------------------------------------

const $ = (id) => document.getElementById(id);
const STORE = "nanoqwen-chat", ALTERNATIVES = 20; // of which the card shows the first, and the draw's shares are worked out from all
const EXAMPLES = ["What is 17 + 28?", "Which is larger, 9.11 or 9.9?", "How many letters e are in cheese?", "Which day is 10 days after Monday?"];

// name, label, least, most, step of the slider (none without), what it is. The names are SamplingParams'.
const KNOBS = [
  ["temperature", "Temperature", 0, 2, 0.05, "0 always takes the likeliest token"],
  ["top_p", "Top p", 0, 1, 0.01, "only the likeliest tokens that reach this probability together; 1 is off"],
  ["top_k", "Top k", 0, 100, 1, "only the k likeliest tokens; 0 is off"],
  ["min_p", "Min p", 0, 1, 0.01, "only tokens at least this likely, relative to the likeliest; 0 is off"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "makes tokens that appeared before less likely; 0 is off"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "the same for each time that a token appeared; 0 is off"],
  ["repetition_penalty", "Repetition penalty", 1, 2, 0.01, "divides the scores of tokens that appeared before; 1 is off"],
  ["max_new_tokens", "Max tokens", 1, 1e6, 0, "length limit of a reply, thinking included"],
  ["thinking_budget", "Thinking budget", 1, 1e6, 0, "ends the thinking after this many tokens"],
  ["seed", "Seed", 0, Number.MAX_SAFE_INTEGER, 0, "the same seed gives the same text"],
];
const OFF = { presence_penalty: 0, frequency_penalty: 0, repetition_penalty: 1, top_k: 0, top_p: 1, min_p: 0 };
const REQUEST_NAMES = { max_new_tokens: "max_tokens" };

let chat = new Chat(), model = null, settings = { thinking: true }, running = null; // running: {node, abort}
let unfolded = false; // whether thinking of new replies is shown open
const views = new Map(); // node id -> View

// ---- What is kept in the tab ----

function save() {
  for (const alternatives of [20, 4, 0]) { // what the tab has room for
    try {
      return sessionStorage.setItem(STORE, JSON.stringify({ chat: chat.toJSON(alternatives), settings, unfolded, shading: document.body.classList.contains("shaded") }));
    } catch {
      sessionStorage.removeItem(STORE);
    }
  }
}

function restore() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(STORE));
    if (!kept) return;
    [chat, settings, unfolded] = [Chat.from(kept.chat), { thinking: true, ...kept.settings }, Boolean(kept.unfolded)];
    for (const node of chat.nodes.values()) if (node.reply && !node.finish) node.finish = "interrupted";
    shade(kept.shading);
  } catch {
    sessionStorage.removeItem(STORE);
  }
}

// ---- Replies ----

function ask(text) {
  if (running) return;
  const path = chat.path, last = path[path.length - 1] ?? chat.nodes.get(0);
  answer(chat.add(last, "user", { text }));
}

// A reply to a message: a new one beside those that it has.
function answer(question, fields = {}) {
  const older = question.children.length;
  const given = Number.isInteger(settings.seed) ? settings.seed + older : Math.floor(Math.random() * 1e6);
  const node = chat.add(question, "assistant", { reply: new Reply(), seed: given, ...fields });
  return run(node);
}

function branch(node, index, alternative) {
  running?.abort.abort();
  const reply = node.reply.branch(index, alternative), over = ENDS.test(alternative[0]), part = reply.partOf(index);
  const fields = { reply, from: nameOf(alternative), ...(over && { finish: "stop" }) };
  const question = chat.parent(node), open = views.get(node.id)?.fold.open;
  if (over) {
    const ended = chat.add(question, "assistant", { seed: node.seed, ...fields });
    draw();
    save();
    views.get(ended.id).fold.open = open;
  } else {
    answer(question, fields);
    views.get(chat.path[chat.path.length - 1].id).fold.open = open || part === reply.reasoning;
  }
  const view = views.get(chat.path[chat.path.length - 1].id);
  (part === reply.reasoning ? view.thought : view.answer).focus({ preventScroll: true });
}

function switchTo(node) {
  chat.show(node);
  const top = $("chat").scrollTop;
  draw();
  $("chat").scrollTop = top;
  const what = views.get(node.id).tools;
  (what.querySelector("[data-act=back]:not(:disabled)") || what.querySelector("[data-act=forward]"))?.focus();
  save();
}

function bodyFor(node) {
  const body = { model: model?.id, stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: ALTERNATIVES, seed: node.seed };
  const messages = [...(settings.system ? [{ role: "system", content: settings.system }] : []), ...chat.before(node)], begun = node.reply.begun;
  if (begun) [body.messages, body.continue_final_message] = [[...messages, begun], true];
  else body.messages = messages;
  if (model?.thinking === "switch") body.chat_template_kwargs = { enable_thinking: settings.thinking };
  for (const [name] of KNOBS) if (settings[name] !== undefined && name !== "seed") body[REQUEST_NAMES[name] ?? name] = settings[name];
  if (!thinks()) delete body.thinking_budget;
  if (settings.stop?.length) body.stop = settings.stop;
  return body;
}

// Streams into a node's reply, behind what it says already.
async function run(node) {
  running?.abort.abort();
  if (!node.reply.begun) { // nothing to go on from
    node.reply = new Reply();
    views.delete(node.id);
  }
  const abort = new AbortController(), mine = (running = { node, abort }), { reply } = node, ours = chat;
  Object.assign(node, { error: null, finish: null, usage: null, clock: { start: performance.now(), count: 0 } });
  busy();
  draw();
  if (document.activeElement === document.body && matchMedia("(hover: hover)").matches) $("ask").focus(); // its button is gone
  scrollDown(true);
  say("The model replies.");
  const view = views.get(node.id), sampling = { ...advised(), ...JSON.parse(JSON.stringify(settings)) };
  let frame = 0, timer = 0, rest = 0; // a long reply takes long to paint: that is at most a third of the time
  const paint = () => {
    const begin = performance.now(), follows = atEnd();
    frame = 0;
    view.update(false);
    if (follows) scrollDown(true);
    rest = 2 * (performance.now() - begin);
  };
  const paintSoon = () => (timer ||= setTimeout(() => [timer, frame] = [0, requestAnimationFrame(paint)], rest > 32 ? rest : 0));
  try {
    for await (const event of events(bodyFor(node), abort.signal)) {
      if (abort.signal.aborted) break;
      const choice = event.choices?.[0];
      if (event.usage) node.usage = event.usage;
      if (!choice) continue;
      reply.take(choice, sampling);
      const count = choice.logprobs?.content?.length || (choice.delta?.content || choice.delta?.reasoning_content ? 1 : 0);
      if (count) {
        const now = performance.now();
        node.clock.first ??= now;
        node.clock.last = now;
        node.clock.count += count;
      }
      if (choice.finish_reason) node.finish = choice.finish_reason;
      paintSoon();
    }
    node.finish ??= "interrupted";
  } catch (error) {
    node.finish = "interrupted";
    if (error.name !== "AbortError") {
      node.error = error.message;
      if (error.status === 401) askForKey(() => run(node));
    }
  }
  clearTimeout(timer);
  cancelAnimationFrame(frame);
  const last = running === mine; // else another reply has begun, which ended this one
  if (last) running = null;
  if (chat !== ours) return busy();
  const follows = atEnd();
  busy();
  draw();
  if (follows) scrollDown(true);
  if (last) {
    say(node.error ? "" : `Reply: ${reply.answer.text.slice(0, 600)}`);
    noteSame(node);
  }
  save();
}

// Another reply that came out the same: why.
function noteSame(node) {
  const temperature = settings.temperature ?? advised().temperature;
  const same = chat.parent(node).children.some((id) => id !== node.id && chat.nodes.get(id).reply?.answer.text === node.reply.answer.text && chat.nodes.get(id).reply.reasoning.text === node.reply.reasoning.text);
  if (same && temperature === 0 && node.finish === "stop" && !node.from) alertLine("The same reply again: at temperature 0 the likeliest token is always taken. Settings has the temperature.");
}

function busy() {
  const now = running !== null;
  $("send").textContent = now ? "Stop" : "Send";
  $("send").classList.toggle("stop", now);
  document.body.classList.toggle("busy", now);
}
const say = (text) => ($("live").textContent = clean(text));

function alertLine(text, act) {
  $("alert").hidden = !text;
  $("alert").replaceChildren(clean(text ?? ""), ...(text ? [" ", act ?? closing()] : []));
}
function closing() {
  const button = h("button", { type: "button", "aria-label": "Close this line" }, "×");
  button.addEventListener("click", () => (alertLine(""), $("ask").focus()));
  return button;
}

const atEnd = () => $("chat").scrollHeight - $("chat").scrollTop - $("chat").clientHeight < 80;
function scrollDown(now) {
  $("chat").scrollTo({ top: $("chat").scrollHeight, behavior: now || matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth" });
}

// ---- Settings ----

const thinks = () => (model?.thinking === "switch" ? settings.thinking : model?.thinking === "always");
const advised = () => ({ ...OFF, ...(model?.sampling?.[thinks() ? "thinking" : "answer"] ?? {}), ...(model?.sampling?.max_tokens && { max_new_tokens: model.sampling.max_tokens }) });

function drawKnobs() {
  $("knobs").replaceChildren(...KNOBS.map(([name, label, least, most, step, what]) => {
    const id = `knob-${name}`, plain = advised()[name], given = settings[name], set = given !== undefined;
    const number = h("input", { type: "number", id, min: least, max: most, step: step || 1, inputmode: "decimal", placeholder: plain ?? (name === "seed" ? "random" : "none"), title: what });
    const reset = h("button", { type: "button", class: "reset", title: "back to the model's own", "aria-label": `${label}: back to the model's own`, hidden: !set }, "↺");
    const slider = step ? h("input", { type: "range", min: least, max: most, step, tabindex: -1, "aria-hidden": "true" }) : null;
    const show = () => {
      const value = settings[name];
      if (document.activeElement !== number) number.value = value ?? "";
      if (slider) slider.value = value ?? plain ?? least;
      reset.hidden = value === undefined;
    };
    const change = (text) => {
      const value = text === "" ? undefined : Number(text);
      const wrong = value !== undefined && (!(value >= least && value <= most) || (name.match(/top_k|tokens|budget|seed/) && !Number.isInteger(value)));
      number.setAttribute("aria-invalid", wrong);
      number.setCustomValidity(wrong ? `from ${least} to ${most}` : "");
      if (wrong) return;
      if (value === undefined) delete settings[name];
      else settings[name] = value;
      show();
      save();
    };
    number.addEventListener("input", () => (number.validity.badInput ? number.setAttribute("aria-invalid", true) : change(number.value)));
    slider?.addEventListener("input", () => change(slider.value));
    reset.addEventListener("click", () => (change(""), number.focus()));
    const row = h("div", { class: "knob", title: what }, h("label", { for: id }, label), slider ?? h("span", {}), number, reset);
    if (slider) slider.value = given ?? plain ?? least;
    number.value = given ?? "";
    return row;
  }));
}

function drawSwitches() {
  $("thinking").hidden = model && model.thinking !== "switch";
  $("thinking").setAttribute("aria-pressed", settings.thinking);
  $("system").value = settings.system ?? "";
  $("stop").value = (settings.stop ?? []).map((text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n")).join("\n");
}

function shade(on) {
  document.body.classList.toggle("shaded", on);
  $("shading").setAttribute("aria-pressed", Boolean(on));
  $("legend").hidden = !on;
}

function toggleSettings(open = $("settings").hidden) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", open);
  document.body.classList.toggle("with-settings", open);
  (open ? $("system") : $("open-settings")).focus();
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, 0.4 * innerHeight)}px`;
}

// Enter sends, Shift+Enter begins a line; Enter that ends an input method's word does neither.
function sends(area, act) {
  area.addEventListener("input", () => grow(area));
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    act();
  });
}

// ---- Files ----

function exportChat() {
  if (!chat.path.length) return alertLine("There is no message yet that could be exported.");
  const link = h("a", { href: URL.createObjectURL(new Blob([exported(chat, model?.id ?? "", settings)], { type: "application/json" })), download: "chat.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function importChat(file) {
  try {
    if (file.size > LARGEST) throw new Error(`${file.size.toLocaleString("en")} bytes; a saved chat has at most ${LARGEST.toLocaleString("en")}`);
    const { messages, settings: given } = imported(await file.text());
    const known = Object.fromEntries(KNOBS.filter(([name, , least, most]) => typeof given[name] === "number" && given[name] >= least && given[name] <= most).map(([name]) => [name, given[name]]));
    const plain = { ...advised(), thinking_budget: null, seed: null };
    for (const name of Object.keys(known)) if (known[name] === plain[name]) delete known[name];
    const wanted = { thinking: given.thinking !== false, ...known, ...(Array.isArray(given.stop) && given.stop.length && { stop: given.stop.map(String) }) };
    startAnew(new Chat(), wanted);
    let node = chat.nodes.get(0);
    for (const { role, content, reasoning_content: reasoning = "" } of messages) {
      if (role === "system") settings.system = content;
      else node = chat.add(node, role, role === "user" ? { text: content } : { reply: said(reasoning, content), finish: "stop" });
    }
    drawSwitches();
    drawKnobs();
    draw();
    save();
    scrollDown(true);
  } catch (error) {
    alertLine(`${file.name}: ${error.message}`);
  }
}

// Another chat in place of this one, which a click brings back until the next message is sent.
function startAnew(next = new Chat(), given = settings) {
  const before = [chat, settings];
  running?.abort.abort();
  [chat, settings] = [next, given];
  views.clear();
  const undo = h("button", { type: "button" }, "Undo");
  undo.addEventListener("click", () => (startAnew(...before), alertLine(""), drawSwitches(), drawKnobs(), draw(), save(), $("ask").focus()));
  alertLine(before[0].path.length ? "The chat was cleared." : "", undo);
}

// ---- The key, and the model ----

let afterKey = null;
function askForKey(then) {
  afterKey = then;
  $("key").value = "";
  const wrong = sessionStorage.getItem(KEY) !== null;
  $("key-note").hidden = !wrong;
  $("key-note").textContent = wrong ? "The server does not accept that key." : "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

async function loadModel() {
  try {
    model = (await (await request("v1/models")).json()).data[0];
    alertLine("");
    const size = model.parameters, many = !size ? "" : size < 1e9 ? `${(size / 1e6).toPrecision(size < 1e7 ? 2 : 3)} million parameters` : `${(size / 1e9).toPrecision(3)} billion parameters`;
    const name = String(model.id).split("/").pop();
    $("model").textContent = document.title = clean(name);
    $("facts").textContent = clean([many, model.precision, model.context_length && `context of ${model.context_length.toLocaleString("en")} tokens`].filter(Boolean).join(" · "));
    drawSwitches();
    drawKnobs();
  } catch (error) {
    if (error.status === 401) return askForKey(loadModel);
    const again = h("button", { type: "button" }, "Try again");
    again.addEventListener("click", loadModel);
    alertLine(error.message, again);
  }
}

// ---- Buttons and keys ----

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort.abort();
  const text = $("ask").value.trim();
  if (!text) return;
  $("ask").value = "";
  grow($("ask"));
  alertLine("");
  ask(text);
});
sends($("ask"), () => running || $("composer").requestSubmit());
$("thinking").addEventListener("click", () => {
  settings.thinking = !settings.thinking;
  drawSwitches();
  drawKnobs();
  save();
});
$("shading").addEventListener("click", () => (shade(!document.body.classList.contains("shaded")), closeCard(), save()));
$("open-settings").addEventListener("click", () => toggleSettings());
$("close-settings").addEventListener("click", () => toggleSettings(false));
$("system").addEventListener("input", () => ((settings.system = $("system").value || undefined), save()));
$("stop").addEventListener("input", () => {
  const lines = $("stop").value.split("\n").filter(Boolean);
  settings.stop = lines.map((line) => line.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter)));
  save();
});
$("new").addEventListener("click", () => (startAnew(), draw(), save(), $("ask").focus()));
$("export").addEventListener("click", exportChat);
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files[0]) importChat($("file").files[0]);
  $("file").value = "";
});
$("down").addEventListener("click", () => scrollDown(false));
$("chat").addEventListener("scroll", () => ($("down").hidden = atEnd()), { passive: true });
$("chat").addEventListener("scroll", () => shown && !pinned && closeCard(), { passive: true });
$("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  sessionStorage.setItem(KEY, /^[\x20-\x7e]+$/.test(key) ? key : "?"); // what a header can hold
  $("key-dialog").close();
  (model ? (afterKey ?? loadModel) : loadModel)();
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("key-dialog").open) {
    if (shown) closeCard();
    else if (running) running.abort.abort();
    else if (!$("settings").hidden) toggleSettings(false);
  } else if (event.altKey && event.code === "KeyP") {
    event.preventDefault();
    $("shading").click();
  }
});
addEventListener("pagehide", save);

restore();
drawSwitches();
drawKnobs();
draw();
loadModel();
