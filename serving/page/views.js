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
      reanchor();
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
    const { tokens } = this.node.reply, [lead, count] = part.shared;
    const chip = (index) => h("span", { class: "tok mark control", "data-token": index }, clean(tokens[index].text));
    const raw = (from, to) => {
      const made = document.createDocumentFragment();
      if (to > from) new Writer(part.raw, (at) => part.owners[at], from).pieces(made, from, to, true);
      return made;
    };
    before.replaceChildren(...part.before.map(chip), raw(0, lead));
    after.replaceChildren(raw(count === part.text.length ? lead + count : part.raw.length, part.raw.length), ...part.after.map(chip));
    for (const one of [...before.querySelectorAll(".tok"), ...after.querySelectorAll(".tok")]) paint(one, tokens[one.dataset.token]);
  }
  updateStats() {
    const { node, node: { reply, error, finish, usage, clock = {} } } = this, live = running?.node === node;
    const said = [], count = (n, what) => `${n.toLocaleString("en")} ${what}`;
    const rate = clock.last - clock.first > 50 ? // tokens that all come in one piece tell no speed
      (1000 * (clock.count - 1)) / (clock.last - clock.first) : 0;
    const total = usage?.completion_tokens ?? clock.count;
    const thought = usage?.completion_tokens_details?.reasoning_tokens;
    if (live && !clock.count) said.push("waiting for the first token");
    if (total) said.push(count(total, total === 1 ? "token" : "tokens") + (thought ? ` (${thought.toLocaleString("en")} thinking)` : ""));
    if (rate) said.push(count(Number(rate.toFixed(rate < 10 ? 1 : 0)), "tokens/s"));
    if (clock.first) said.push(`first after ${((clock.first - clock.start) / 1000).toFixed(2)} s`);
    if (usage) said.push(`prompt ${usage.prompt_tokens.toLocaleString("en")}` + (usage.prompt_tokens_details?.cached_tokens ? ` (${usage.prompt_tokens_details.cached_tokens.toLocaleString("en")} cached)` : ""));
    if (usage && model?.context_length) said.push(`${Math.round((100 * usage.total_tokens) / model.context_length)} % of the context`);
    if (total) said.push(`seed ${node.seed}`);
    if (node.from) said.push(`branched at “${node.from}”`);
    const ends = { length: "cut off: no tokens left", interrupted: "stopped", loop: "stopped: it repeats itself" };
    if (!live && !error && finish === "stop" && !reply.answer.text) said.unshift("no answer");
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
      if (!node.error || node.reply.begun) tools.push(button("Regenerate", "another reply; this one is kept", () => answer(chat.parent(node))));
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
  const [lead, count] = part.shared;
  return (at) => (at < count ? part.owners[lead + at] : undefined);
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
