// ---- Tokens: their shades, and the card with the alternatives of one ----------------------------------------------

const card = document.getElementById("card");
const probability = (logprob) => Math.exp(logprob);
function percent(p) {
  if (p >= 0.9995) return p === 1 ? "100 %" : "> 99.9 %";
  return p < 0.0005 ? (p < 0.00001 ? "< 0.001 %" : `${(100 * p).toPrecision(1)} %`) : `${(100 * p).toFixed(1)} %`;
}
// 0 (nearly certain) to 9, by the bits of surprise.
const level = (logprob) => (logprob > Math.log(0.99) ? 0 : Math.min(9, 1 + Math.floor((-logprob / Math.LN2) * 1.25)));
const visible = (text) => (text === "" ? "∅" : clean(text).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length)));
function nameOf(token) {
  const [text, bytes] = Array.isArray(token) ? [token[0], token[2]] : [token.text, token.bytes];
  return bytes ? bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("") : visible(text);
}

// Classes of a token's element: its shade, and whether a person chose it.
function paint(element, token) {
  if (token.logprob !== null) element.classList.add(`h${level(token.logprob)}`);
  if (token.logprob === null) element.classList.add("forced");
  if (token.branched) element.classList.add("branched");
}

// The card of one token. `shown` is {reply, index, anchor, branch(index, alternative)}; null: closed.
let shown = null, pinned = false, returning = false, timer = 0;

function openCard(next, pin) {
  clearTimeout(timer);
  if (shown) shown.anchor.classList.remove("picked");
  [shown, pinned] = [next, pin];
  const { reply, index, anchor, branch } = next, token = reply.tokens[index];
  anchor.classList.add("picked");
  const step = (to, name, label) => {
    const button = h("button", { type: "button", class: "step", "aria-label": label, disabled: to < 0 || to >= reply.tokens.length }, name);
    button.addEventListener("click", () => stepTo(to, ".step[aria-label='" + label + "']"));
    return button;
  };
  const title = h("div", { class: "head" }, h("b", {}, nameOf(token)), h("span", { class: "soft" }, token.logprob === null ? "forced, not sampled" : percent(probability(token.logprob))),
    h("span", { class: "soft at" }, `${index + 1} of ${reply.tokens.length}`), step(index - 1, "‹", "The token before"), step(index + 1, "›", "The token after"));
  const rows = [...token.top];
  const own = rows.findIndex(([text, , bytes]) => text === token.text && String(bytes || "") === String(token.bytes || ""));
  if (own < 0 && token.logprob !== null) rows.push([token.text, token.logprob, token.bytes]);
  const listed = rows.reduce((sum, [, logprob]) => sum + probability(logprob), 0);
  const two = rows.some(([, logprob, , drawn]) => drawn != null && Math.abs(drawn - probability(logprob)) > 0.0005); // the sampling changes them
  const list = h("ol", { class: two ? "two" : "" }, ...rows.map((row, at) => {
    const [text, logprob, , drawn] = row, p = probability(logprob), odds = two && drawn != null && (drawn ? percent(drawn) : "never"), chosen = at === (own < 0 ? rows.length - 1 : own);
    const bar = h("i", {});
    bar.style.width = `${Math.max(1, 100 * p)}%`;
    const refused = chosen ? "what the reply says" : reply.refuses(index, row), possible = !refused;
    const why = refused || (ENDS.test(text) ? "end the reply here" : "branch the reply here");
    const button = h("button", { type: "button", class: chosen ? "chosen" : "", "aria-disabled": !possible && "true", title: why,
      "aria-label": `${nameOf(row)}, ${percent(p)}${odds ? `, sampled ${odds}` : ""}: ${why}` }, h("span", { class: "name" }, nameOf(row)), h("span", { class: "track" }, bar),
      h("span", { class: "share" }, percent(p)), two ? h("span", { class: "share odds" }, odds || "") : null);
    if (possible) button.addEventListener("click", () => (closeCard(), branch(index, row)));
    return h("li", {}, button);
  }));
  if (rows.length && 1 - listed > 0.0005) list.append(h("li", { class: "others" }, h("span", { class: "name soft" }, "all others"), h("span", { class: "track" }), h("span", { class: "share" }, percent(1 - listed))));
  if (two) list.prepend(h("li", { class: "others", "aria-hidden": "true" }, h("span"), h("span"), h("span", { class: "share" }, "model"), h("span", { class: "share" }, "sampling")));
  const note = !rows.length ? "No alternatives: the thinking budget forced this token." : "Choose one to continue the reply from there. " + (two ? "Left: the model's own probabilities. Right: after temperature and filters." : "These are the model's own probabilities, before temperature and filters.");
  card.replaceChildren(title, list, h("p", { class: "soft" }, note));
  card.setAttribute("aria-label", `Token ${nameOf(token)} and its alternatives`);
  card.hidden = false;
  place(anchor);
}

function place(anchor) {
  card.style.left = card.style.top = "";
  if (matchMedia("(max-width: 40rem)").matches) { // a sheet at the bottom, by the style, which must not cover the token
    const chat = document.getElementById("chat"), box = anchor.getBoundingClientRect(), hidden = box.bottom + 8 - (innerHeight - card.offsetHeight);
    chat.style.paddingBottom = `${card.offsetHeight}px`;
    if (hidden > 0 && pinned) chat.scrollTop += hidden; // a card that is not pinned closes when the chat scrolls
    return;
  }
  const box = anchor.getClientRects()[0] || anchor.getBoundingClientRect(), room = document.documentElement.clientWidth;
  const below = box.bottom + 6 + card.offsetHeight < document.getElementById("bottom").getBoundingClientRect().top || box.top - 6 - card.offsetHeight < 0;
  card.style.left = `${Math.max(8, Math.min(box.left, room - card.offsetWidth - 8))}px`;
  card.style.top = `${below ? Math.min(box.bottom + 6, innerHeight - card.offsetHeight - 8) : box.top - 6 - card.offsetHeight}px`;
}

function closeCard(focus = false) {
  clearTimeout(timer);
  if (!shown) return;
  const { anchor } = shown;
  anchor.classList.remove("picked");
  shown = null;
  pinned = false;
  card.hidden = true;
  document.getElementById("chat").style.paddingBottom = "";
  returning = true; // a token in focus shows its card, but not for this
  if (focus) anchor.focus();
  returning = false;
}

// After a reply has been drawn anew: its card points to the new element of the token.
function reanchor() {
  if (!shown || shown.anchor.isConnected) return;
  const anchor = shown.find(shown.index);
  if (!anchor) return closeCard();
  anchor.classList.add("picked");
  shown.anchor = anchor;
}

// From token to token inside the card. A token that is not on the screen is shown where the one before was.
function stepTo(index, focus) {
  if (!shown || index < 0 || index >= shown.reply.tokens.length) return;
  const found = shown.find(index), fold = found?.closest("details");
  if (fold) fold.open = true;
  const anchor = found?.getClientRects().length ? found : shown.anchor;
  openCard({ ...shown, index, anchor }, true);
  anchor.scrollIntoView({ block: "nearest" });
  place(anchor);
  (card.querySelector(focus + ":not(:disabled)") || card.querySelector("li button"))?.focus();
}

card.addEventListener("pointerenter", () => clearTimeout(timer));
card.addEventListener("pointerleave", () => leave());
card.addEventListener("keydown", (event) => {
  const buttons = [...card.querySelectorAll("li button")], at = buttons.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (to !== undefined) buttons[Math.max(0, Math.min(buttons.length - 1, to))]?.focus();
  else if (event.key === "ArrowLeft") stepTo(shown.index - 1, "li button");
  else if (event.key === "ArrowRight") stepTo(shown.index + 1, "li button");
  else if (event.key === "Escape") {
    closeCard(true);
    event.stopPropagation();
  } else return;
  event.preventDefault();
});
document.addEventListener("pointerdown", (event) => {
  if (shown && !card.contains(event.target) && !event.target.closest?.(".tok")) closeCard();
});
addEventListener("scroll", () => shown && !pinned && closeCard(), { passive: true });
addEventListener("resize", () => shown && place(shown.anchor));

function leave() {
  clearTimeout(timer);
  if (!pinned) timer = setTimeout(() => pinned || closeCard(), 250);
}

// The tokens inside `area` (elements with data-token) show their cards: under the pointer, in focus, on a click.
function watch(area, find, cardOf) {
  const tokenAt = (target) => target.closest?.(".tok");
  area.addEventListener("pointerover", (event) => {
    const element = tokenAt(event.target);
    if (!element || event.pointerType === "touch" || event.buttons || pinned) return;
    clearTimeout(timer);
    const shading = document.body.classList.contains("shaded");
    timer = setTimeout(() => element.isConnected && getSelection().isCollapsed && openCard(cardOf(element), false), shown ? 60 : shading ? 150 : 600);
  });
  area.addEventListener("pointerout", (event) => tokenAt(event.target) && leave());
  area.addEventListener("click", (event) => {
    const element = tokenAt(event.target), link = event.target.closest?.("a");
    if (!element || !getSelection().isCollapsed || (link && !document.body.classList.contains("shaded"))) return;
    event.preventDefault();
    openCard(cardOf(element), true);
  });
  area.addEventListener("focusin", (event) => {
    const element = tokenAt(event.target);
    if (!element || returning || shown?.anchor === element) return;
    openCard(cardOf(element), false);
    say(card.querySelector(".head").innerText.split("\n").slice(0, 2).join(", ")); // the card itself is not read out
  });
  area.addEventListener("focusout", (event) => tokenAt(event.target) && !card.contains(event.relatedTarget) && leave());
  area.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const here = tokenAt(event.target), elements = [...area.querySelectorAll(".tok")], index = elements.indexOf(here);
    const seek = (at, step) => { // the next that is on the screen; with Shift, that is unsure
      while (elements[at] && !(elements[at].getClientRects().length && (!event.shiftKey || /\bh[2-9]\b/.test(elements[at].className)))) at += step;
      return elements[at];
    };
    let next;
    if (event.key === "ArrowRight") next = seek(index + 1, 1);
    else if (event.key === "ArrowLeft") next = seek(index - 1, -1);
    else if (event.key === "Home" && here) next = seek(0, 1);
    else if (event.key === "End" && here) next = seek(elements.length - 1, -1);
    else if ((event.key === "Enter" || event.key === " ") && here) {
      openCard(cardOf(here), true);
      card.querySelector("li button:not([aria-disabled])")?.focus();
      event.preventDefault();
      return;
    } else return;
    event.preventDefault();
    if (!next) return;
    if (here) here.removeAttribute("tabindex");
    next.tabIndex = -1;
    next.focus();
  });
}
