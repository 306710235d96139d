// ---- The page: settings, the chat as elements, and what the buttons do --------------------------------------------

const $ = (id) => document.getElementById(id);
const STORE = "nanoqwen-chat", ALTERNATIVES = 10;
const EXAMPLES = ["What is 17 + 28?", "Which is larger, 9.11 or 9.9?", "How many letters e are in cheese?", "Which day is 10 days after Monday?"];

// name, label, least, most, step of the slider (none without), what it is. The names are SamplingParams'.
const KNOBS = [
  ["temperature", "Temperature", 0, 2, 0.05, "0 always takes the likeliest token"],
  ["top_p", "Top p", 0, 1, 0.01, "only the likeliest tokens that hold this share together; 1 is off"],
  ["top_k", "Top k", 0, 100, 1, "only the k likeliest tokens; 0 is off"],
  ["min_p", "Min p", 0, 1, 0.01, "only tokens at least this likely beside the likeliest; 0 is off"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "off each token that was said before"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "off each token, for every time that it was said"],
  ["repetition_penalty", "Repetition penalty", 1, 2, 0.01, "a factor against what was said before; 1 is off"],
  ["max_new_tokens", "Max tokens", 1, 1e6, 0, "the longest reply, thinking included"],
  ["thinking_budget", "Thinking budget", 1, 1e6, 0, "ends the thinking after so many tokens"],
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
    [chat, settings, unfolded] = [Chat.from(kept.chat), kept.settings, kept.unfolded];
    for (const node of chat.nodes.values()) if (node.reply && !node.finish) node.finish = "interrupted";
    shade(kept.shading);
  } catch {
    sessionStorage.removeItem(STORE);
  }
}

// ---- A message on the page ----

class View {
  constructor(node) {
    this.node = node;
    this.tools = h("div", { class: "tools" });
    if (node.role === "user") {
      this.bubble = h("div", { class: "bubble" }, clean(node.text));
      this.element = h("article", { class: "user", "aria-label": "You" }, this.bubble, this.tools);
    } else this.assistant();
    this.update(true);
  }
  assistant() {
    this.thought = h("div", { class: "toks thought" });
    this.answer = h("div", { class: "toks answer" });
    [this.before, this.after, this.body] = [h("span", { class: "ends" }), h("span", { class: "ends" }), h("div", { class: "markdown" })];
    [this.thoughtBefore, this.thoughtAfter, this.thoughtText] = [h("span", { class: "ends" }), h("span", { class: "ends" }), h("span")];
    this.thought.append(this.thoughtBefore, this.thoughtText, this.thoughtAfter);
    this.answer.append(this.before, this.body, this.after);
    [this.label, this.preview] = [h("span", {}), h("span", { class: "preview soft", "aria-hidden": "true" })];
    this.fold = h("details", { class: "thinking" }, h("summary", {}, this.label, this.preview), this.thought);
    this.fold.open = unfolded;
    this.fold.querySelector("summary").addEventListener("click", () => (unfolded = !this.fold.open));
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.stats = h("p", { class: "stats soft" });
    this.element = h("article", { class: "assistant", "aria-label": "The model" }, this.fold, this.answer, this.error, this.tools, this.stats);
    this.done = []; // blocks of the answer that are on the page
    this.shownThought = 0;
    for (const area of [this.thought, this.answer]) watch(area, (index) => this.find(index), (element) => this.cardOf(element));
  }
  find(index) {
    const all = [...this.element.querySelectorAll(".tok")];
    return all.find((one) => Number(one.dataset.token) === index) || null;
  }
  cardOf(anchor) {
    return { reply: this.node.reply, index: Number(anchor.dataset.token), anchor, find: (index) => this.find(index), branch: (index, alternative) => branch(this.node, index, alternative) };
  }
  // The reply as it stands. `whole`: the buttons and figures too.
  update(whole) {
    if (this.node.role === "assistant") {
      this.updateThought();
      this.updateAnswer();
      this.updateStats();
    }
    if (whole) this.updateTools();
  }
  updateThought() {
    const { node, node: { reply } } = this, part = reply.reasoning, owner = ownerOf(part), live = running?.node === node && reply.part === "reasoning";
    this.fold.hidden = !part.text && !part.before.length && !part.after.length;
    if (this.fold.hidden) return;
    const writer = new Writer(part.text, owner, this.shownThought), last = this.thoughtText.lastChild;
    const made = document.createDocumentFragment();
    writer.text(made, this.shownThought, part.text.length);
    this.shownThought = part.text.length;
    for (const one of [...made.querySelectorAll(".tok")]) paint(one, reply.tokens[one.dataset.token]);
    const first = made.firstChild;
    if (last?.dataset && first?.dataset && last.dataset.token === first.dataset.token) { // one token that came in two pieces
      last.append(first.textContent);
      last.classList.toggle("break", last.classList.contains("break") || first.classList.contains("break"));
      first.remove();
    }
    this.thoughtText.append(made);
    this.ends(part, this.thoughtBefore, this.thoughtAfter);
    focusable(this.thought, reply.tokens.length, "Tokens of the thinking");
    const reported = node.from ? 0 : node.usage?.completion_tokens_details?.reasoning_tokens, count = reported || part.count;
    this.label.textContent = (live ? "Thinking" : "Thoughts") + (count ? ` · ${count.toLocaleString("en")} tokens` : "");
    this.preview.textContent = live ? clean(part.text.trimEnd().split("\n").pop().slice(-90)) : "";
    this.fold.classList.toggle("live", live);
  }
  updateAnswer() {
    const { reply } = this.node, part = reply.answer, owner = ownerOf(part), list = blocks(part.text);
    let same = 0; // what is on the page already and has not grown
    while (same < list.length - 1 && this.done[same]?.from === list[same].from && this.done[same]?.to === list[same].to && this.done[same].mapped === Boolean(owner(list[same].from) >= 0)) same++;
    for (const old of this.done.splice(same)) old.nodes.forEach((node) => node.remove());
    for (const block of list.slice(same)) {
      const made = document.createDocumentFragment(), writer = new Writer(part.text, owner, block.from);
      block.build(writer, made);
      writer.rest(block.to, made);
      for (const one of made.querySelectorAll(".tok")) paint(one, reply.tokens[one.dataset.token]);
      this.done.push({ from: block.from, to: block.to, mapped: Boolean(owner(block.from) >= 0), nodes: [...made.childNodes] });
      this.body.append(made);
    }
    this.ends(part, this.before, this.after);
    focusable(this.answer, reply.tokens.length, "Tokens of the answer");
    this.element.classList.toggle("live", running?.node === this.node);
  }
  // What a part says around its text: line breaks, tags of the thinking, the end of the turn. Shown with the shades.
  ends(part, before, after) {
    const { tokens } = this.node.reply, lead = part.lead;
    const chip = (index) => h("span", { class: "tok mark control", "data-token": index }, clean(tokens[index].text));
    const raw = (from, to) => {
      const made = document.createDocumentFragment();
      if (lead !== null && to > from) new Writer(part.raw, (at) => part.owners[at], from).pieces(made, from, to, true);
      return made;
    };
    before.replaceChildren(...part.before.map(chip), raw(0, lead ?? 0));
    after.replaceChildren(raw((lead ?? 0) + part.text.length, part.raw.length), ...part.after.map(chip));
    for (const one of [...before.querySelectorAll(".tok"), ...after.querySelectorAll(".tok")]) paint(one, tokens[one.dataset.token]);
  }
  updateStats() {
    const { node, node: { reply, error, finish, usage, clock = {} } } = this, live = running?.node === node;
    const said = [], count = (n, what) => `${n.toLocaleString("en")} ${what}`;
    const rate = clock.count > 1 && clock.last > clock.first ? (1000 * (clock.count - 1)) / (clock.last - clock.first) : 0;
    const total = usage?.completion_tokens ?? clock.count;
    const thought = usage?.completion_tokens_details?.reasoning_tokens;
    if (total) said.push(count(total, total === 1 ? "token" : "tokens") + (thought ? ` (${thought.toLocaleString("en")} thinking)` : ""));
    if (rate) said.push(count(Number(rate.toFixed(rate < 10 ? 1 : 0)), "tokens/s"));
    if (clock.first) said.push(`first after ${((clock.first - clock.start) / 1000).toFixed(2)} s`);
    if (usage) said.push(`prompt ${usage.prompt_tokens.toLocaleString("en")}` + (usage.prompt_tokens_details?.cached_tokens ? ` (${usage.prompt_tokens_details.cached_tokens.toLocaleString("en")} cached)` : ""));
    if (usage && model?.context_length) said.push(`${Math.round((100 * usage.total_tokens) / model.context_length)} % of the context`);
    if (clock.start) said.push(`seed ${node.seed}`);
    if (node.from) said.push(`branched at “${node.from}”`);
    const ends = { length: "stopped at its greatest length", interrupted: "stopped", loop: "stopped: it repeats itself" };
    if (!live && !error && finish && finish !== "stop") said.push(ends[finish] ?? finish);
    this.stats.textContent = said.join("\u00a0· ");
    this.error.hidden = !error;
    if (error && this.error.dataset.text !== error) {
      const again = h("button", { type: "button" }, "Try again");
      again.addEventListener("click", () => run(node));
      this.error.replaceChildren(clean(error), " ", again);
    }
    this.error.dataset.text = error ?? "";
  }
  updateTools() {
    const { node } = this, busy = running !== null, siblings = chat.parent(node).children, at = siblings.indexOf(node.id);
    const button = (name, title, act, more) => {
      const one = h("button", { type: "button", title, "data-act": name.toLowerCase(), disabled: busy, ...more }, name);
      one.addEventListener("click", () => act(one));
      return one;
    };
    const tools = [];
    if (siblings.length > 1) {
      const what = node.role === "user" ? "message" : "reply", turn = (to) => () => switchTo(chat.nodes.get(siblings[to]));
      tools.push(h("span", { class: "versions" },
        button("‹", `the ${what} before`, turn(at - 1), { "data-act": "back", "aria-label": `The ${what} before`, disabled: busy || at === 0 }),
        h("span", { "aria-label": `${what} ${at + 1} of ${siblings.length}` }, `${at + 1} / ${siblings.length}`),
        button("›", `the ${what} after`, turn(at + 1), { "data-act": "forward", "aria-label": `The ${what} after`, disabled: busy || at === siblings.length - 1 })));
    }
    if (node.role === "user") tools.push(button("Edit", "change this message; the chat so far is kept beside it", () => this.edit()));
    else if (node.finish && !(running?.node === node)) {
      tools.push(button("Regenerate", "another reply; this one is kept", () => answer(chat.parent(node))));
      if (["length", "interrupted"].includes(node.finish) && node.reply.begun) tools.push(button("Continue", "let the model go on from here", () => run(node)));
      if (node.reply.answer.text) tools.push(button("Copy", "the answer as Markdown", (one) => copyText(node.reply.answer.text, one)));
    }
    this.tools.replaceChildren(...tools);
  }
  edit() {
    const { node } = this, area = h("textarea", { "aria-label": "Edit the message", rows: 1 }), cancel = h("button", { type: "button" }, "Cancel");
    area.value = node.text;
    const form = h("form", { class: "edit" }, area, h("div", { class: "row" }, cancel, h("button", { type: "submit", class: "main" }, "Send")));
    const close = () => {
      form.replaceWith(this.bubble);
      this.tools.hidden = false;
      this.tools.querySelector("[data-act=edit]")?.focus();
    };
    cancel.addEventListener("click", close);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = area.value.trim();
      if (!text || running) return;
      close();
      if (text !== node.text.trim()) answer(chat.add(chat.parent(node), "user", { text }));
    });
    sends(area, () => form.requestSubmit());
    area.addEventListener("keydown", (event) => event.key === "Escape" && (event.stopPropagation(), close()));
    this.tools.hidden = true;
    this.bubble.replaceWith(form);
    grow(area);
    area.focus();
  }
}

function ownerOf(part) {
  const lead = part.lead;
  return (at) => (lead === null ? undefined : part.owners[lead + at]);
}

function focusable(area, tokens, label) {
  if (!tokens || area.hasAttribute("tabindex")) return;
  area.tabIndex = 0;
  area.setAttribute("role", "group");
  area.setAttribute("aria-label", `${label}: arrow keys move, Enter shows the alternatives`);
}

function draw() {
  closeCard();
  const path = chat.path, elements = path.map((node) => {
    if (!views.has(node.id)) views.set(node.id, new View(node));
    const view = views.get(node.id);
    view.update(true);
    return view.element;
  });
  const main = $("chat");
  if (!path.length) return main.replaceChildren(welcome());
  [...main.children].forEach((child) => elements.includes(child) || child.remove());
  elements.forEach((element, at) => main.children[at] === element || main.insertBefore(element, main.children[at] ?? null));
}

function welcome() {
  const examples = EXAMPLES.map((text) => {
    const button = h("button", { type: "button" }, text);
    button.addEventListener("click", () => ask(text));
    return button;
  });
  return h("div", { class: "welcome" }, h("h2", {}, "Ask, and see what else it could have said"), h("div", { class: "examples" }, ...examples),
    h("p", { class: "soft" }, "Every token of a reply shows its probability and what else could have stood there: point at it, or tap it. Choose another one, and the reply goes on from there."));
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
  const given = Number.isInteger(settings.seed) ? settings.seed + older : Math.floor(Math.random() * 2 ** 31);
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
  if (model?.thinking !== "never" && model?.thinking !== "always") body.chat_template_kwargs = { enable_thinking: settings.thinking };
  for (const [name] of KNOBS) if (settings[name] !== undefined && name !== "seed") body[REQUEST_NAMES[name] ?? name] = settings[name];
  if (!settings.thinking) delete body.thinking_budget;
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
  scrollDown(true);
  say("The model replies.");
  const view = views.get(node.id);
  let frame = 0;
  const paintSoon = () => (frame ||= requestAnimationFrame(() => {
    frame = 0;
    const follows = atEnd();
    view.update(false);
    if (follows) scrollDown(true);
  }));
  try {
    for await (const event of events(bodyFor(node), abort.signal)) {
      if (abort.signal.aborted) break;
      const choice = event.choices?.[0];
      if (event.usage) node.usage = event.usage;
      if (!choice) continue;
      reply.take(choice);
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
  cancelAnimationFrame(frame);
  if (running === mine) running = null;
  if (chat !== ours) return busy();
  const follows = atEnd();
  busy();
  draw();
  if (follows) scrollDown(true);
  say(node.error ? "" : `Reply: ${reply.answer.text.slice(0, 600)}`);
  noteSame(node);
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
  $("chat").scrollTo({ top: $("chat").scrollHeight, behavior: now ? "instant" : "smooth" });
}

// ---- Settings ----

const advised = () => ({ ...OFF, ...(model?.sampling?.[settings.thinking ? "thinking" : "answer"] ?? {}), ...(model?.sampling?.max_tokens && { max_new_tokens: model.sampling.max_tokens }) });

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
  const can = model?.thinking !== "never" && model?.thinking !== "always";
  $("thinking").hidden = !can;
  $("thinking").setAttribute("aria-pressed", settings.thinking);
  $("system").value = settings.system ?? "";
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
    settings = { thinking: given.thinking !== false, ...known, ...(Array.isArray(given.stop) && given.stop.length && { stop: given.stop.map(String) }) };
    startAnew();
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

function startAnew() {
  running?.abort.abort();
  chat = new Chat();
  views.clear();
  alertLine("");
}

// ---- The key, and the model ----

let afterKey = null;
function askForKey(then) {
  afterKey = then;
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

async function loadModel() {
  try {
    model = (await (await request("/v1/models")).json()).data[0];
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
  sessionStorage.setItem(KEY, $("key").value.trim());
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
