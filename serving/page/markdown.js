// ---- A small Markdown, from source text to DOM nodes --------------------------------------------------------------
// Paragraphs, headings, lists, quotes, rules, tables, fenced code; bold, italic, struck, code, links. LaTeX stays as it
// is written. Anything else is text. Nothing is ever parsed as HTML: elements are made by name here, and all that a model wrote is a text node.
// Every character of the source becomes part of some node, in order, so that each token of a reply can be found:
// what Markdown hides (asterisks, bars, fences) stands in `mark` nodes, which only show while tokens are shaded.

const DEEPEST = 8; // quotes and lists inside one another, and emphasis inside emphasis

// Control characters, those that reorder or hide text, byte order marks, half surrogates and tags are spelt out.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]|[\u{e0000}-\u{e007f}]|\p{Surrogate}/gu;
const clean = (text) => text.replace(HIDDEN, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Writes source[from, to) into nodes, in order; `owner(at)` is the token of a character, or undefined.
class Writer {
  constructor(source, owner, from) {
    [this.source, this.owner, this.at, this.last] = [source, owner, from, null];
  }
  text(parent, from, to) {
    if (from > this.at) this.pieces(parent, this.at, from, true);
    this.pieces(parent, from, to, false);
    [this.at, this.last] = [to, parent];
  }
  rest(to, parent) { // what is left of a block: its hidden end
    if (to > this.at) this.pieces(this.last || parent.appendChild(h("p", { class: "mark" })), this.at, to, true);
    this.at = to;
  }
  pieces(parent, from, to, mark) {
    while (from < to) {
      const token = this.owner(from);
      let end = from + 1;
      while (end < to && this.owner(end) === token) end++;
      parent.append(piece(this.source.slice(from, end), token, mark));
      from = end;
    }
  }
}

function piece(text, token, mark) {
  const shown = clean(mark ? text.replace(/\n/g, "⏎") : text);
  if (token === undefined) return mark ? h("span", { class: "mark" }, shown) : document.createTextNode(shown);
  const kinds = ["tok", mark ? "mark" : "", !mark && text.includes("\n") ? "break" : ""].filter(Boolean);
  return h("span", { class: kinds.join(" "), "data-token": token }, shown);
}

// The blocks of a text: [{from, to, build(writer, parent)}], together all of it. A line is [from, to) of the source.
function blocks(source) {
  const lines = [];
  for (let at = 0; at < source.length; ) {
    const found = source.indexOf("\n", at), to = found < 0 ? source.length : found;
    lines.push([at, to]);
    at = to + 1;
  }
  const list = parse(source, lines, 0);
  list.forEach((block, at) => {
    block.from = at ? block.from : 0;
    block.to = at + 1 < list.length ? list[at + 1].from : source.length;
  });
  return list;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/, HEADING = /^ {0,3}(#{1,6})[ \t]+/, QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/, ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const DIVIDER = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

function parse(source, lines, depth) {
  const text = (n) => source.slice(...lines[n]), found = [];
  const isTable = (n) => n + 1 < lines.length && text(n).includes("|") && text(n + 1).includes("|") && DIVIDER.test(text(n + 1));
  const begins = (n) => { // whether line n ends a paragraph above it
    const line = text(n), item = depth < DEEPEST && ITEM.exec(line);
    return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || (depth < DEEPEST && QUOTE.test(line)) || isTable(n)
      || (item && item[3] && !(/\d/.test(item[2]) && parseInt(item[2], 10) !== 1));
  };
  const open = {}; // a mark of LaTeX and the line up to which nothing closes it
  const formula = (n) => { // the last line of a formula that begins with line n, else n
    const mark = /^ {0,3}(\$\$|\\\[)/.exec(text(n));
    if (!mark || n < open[mark[1]]) return n;
    let from = mark[0].length, last = n;
    for (; last < lines.length && text(last).trim(); [last, from] = [last + 1, 0]) if (text(last).includes(CLOSES[mark[1]], from)) return last;
    open[mark[1]] = last;
    return n;
  };
  let n = 0;
  const add = (first, build) => found.push({ from: lines[first][0], to: 0, build });
  while (n < lines.length) {
    const first = n, line = text(n);
    let match;
    if (!line.trim()) n++;
    else if ((match = FENCE.exec(line))) {
      const closes = (end) => end && end[1][0] === match[1][0] && end[1].length >= match[1].length && !end[2];
      n++;
      while (n < lines.length && !closes(FENCE.exec(text(n)))) n++;
      const inside = lines.slice(first + 1, n), language = match[2].trim();
      n++;
      add(first, (writer, parent) => fenced(writer, parent, source, inside, language));
    } else if ((match = HEADING.exec(line))) {
      n++;
      const from = lines[first][0] + match[0].length, to = lines[first][0] + line.replace(/[ \t]+#*[ \t]*$/, "").length;
      const tag = `h${Math.min(6, match[1].length + 2)}`;
      add(first, (writer, parent) => inline(writer, parent.appendChild(h(tag)), source, [[from, Math.max(from, to)]]));
    } else if (RULE.test(line)) {
      n++;
      add(first, (writer, parent) => parent.append(h("hr")));
    } else if (depth < DEEPEST && QUOTE.test(line)) {
      while (n < lines.length && QUOTE.test(text(n))) n++;
      const inside = lines.slice(first, n).map(([from, to]) => [from + QUOTE.exec(source.slice(from, to))[0].length, to]);
      add(first, (writer, parent) => nested(writer, parent.appendChild(h("blockquote")), source, inside, depth));
    } else if (depth < DEEPEST && (match = ITEM.exec(line))) {
      const ordered = /\d/.test(match[2]), items = [];
      const same = (one) => one && /\d/.test(one[2]) === ordered && (ordered || one[2] === match[2]);
      while (n < lines.length) { // one item a round
        const item = ITEM.exec(text(n));
        if (!same(item) || RULE.test(text(n))) break;
        const width = item[0].length > item[1].length + item[2].length + 4 ? item[1].length + item[2].length + 1 : item[0].length;
        const inside = [[Math.min(lines[n][0] + width, lines[n][1]), lines[n][1]]];
        for (n++; n < lines.length; n++) {
          const next = text(n), indent = /^ */.exec(next)[0].length;
          if (!next.trim()) {
            const after = lines.slice(n).findIndex((_, more) => text(n + more).trim());
            if (after < 0 || /^ */.exec(text(n + after))[0].length < Math.min(width, 2)) break;
            inside.push(lines[n]);
          } else if (indent >= Math.min(width, 2)) inside.push([lines[n][0] + Math.min(indent, width), lines[n][1]]);
          else if (ITEM.test(next) || begins(n)) break;
          else inside.push(lines[n]);
        }
        items.push(inside);
        let blank = n;
        while (blank < lines.length && !text(blank).trim()) blank++;
        if (blank < lines.length && same(ITEM.exec(text(blank)))) n = blank; // items apart are one list
      }
      add(first, (writer, parent) => {
        const list = parent.appendChild(h(ordered ? "ol" : "ul", ordered ? { start: parseInt(match[2], 10) } : {}));
        for (const inside of items) nested(writer, list.appendChild(h("li")), source, inside, depth);
      });
    } else if (isTable(n)) {
      n += 2;
      while (n < lines.length && text(n).trim() && text(n).includes("|")) n++;
      const rows = [lines[first], ...lines.slice(first + 2, n)], sides = cells(source, lines[first + 1]).map(([from, to]) => side(source.slice(from, to)));
      add(first, (writer, parent) => table(writer, parent, source, rows, sides));
    } else {
      n = formula(n) + 1;
      while (n < lines.length && text(n).trim() && !begins(n)) n = formula(n) + 1;
      const inside = lines.slice(first, n);
      add(first, (writer, parent) => inline(writer, parent.appendChild(h("p")), source, inside));
    }
  }
  return found.length || !lines.length ? found : [{ from: lines[0][0], to: 0, build: () => {} }];
}

function nested(writer, parent, source, lines, depth) {
  for (const block of parse(source, lines, depth + 1)) block.build(writer, parent);
}

function fenced(writer, parent, source, lines, language) {
  const code = h("code"), copy = h("button", { type: "button", class: "copy" }, "Copy");
  copy.addEventListener("click", () => copyText(lines.map((line) => source.slice(...line)).join("\n"), copy));
  parent.append(h("div", { class: "code" }, h("div", { class: "bar" }, h("span", {}, clean(language)), copy), h("pre", { tabindex: 0 }, code)));
  lines.forEach(([from, to], at) => writer.text(code, from, at + 1 < lines.length && source[to] === "\n" ? to + 1 : to));
}

function cells(source, [from, to]) {
  const found = [], line = source.slice(from, to);
  let begin = line.search(/\S/) + (line.trim().startsWith("|") ? 1 : 0);
  for (let at = begin; at <= line.length; at++) {
    if (at < line.length && line[at] === "\\") at++;
    else if (at === line.length || line[at] === "|") {
      const cell = line.slice(begin, at);
      if (at < line.length || cell.trim()) found.push([from + begin + (cell.trim() ? cell.search(/\S/) : 0), from + begin + cell.trimEnd().length]);
      begin = at + 1;
    }
  }
  return found.map(([one, other]) => [one, Math.max(one, other)]);
}
const side = (rule) => (/^:.*:$/.test(rule) ? "center" : rule.endsWith(":") ? "right" : "");

function table(writer, parent, source, rows, sides) {
  const body = h("tbody"), head = h("thead");
  parent.append(h("div", { class: "scroll", tabindex: 0 }, h("table", {}, head, body)));
  rows.forEach((row, at) => {
    const line = (at ? body : head).appendChild(h("tr"));
    cells(source, row).slice(0, sides.length).forEach((cell, column) => inline(writer, line.appendChild(h(at ? "td" : "th", { class: sides[column] })), source, [cell]));
  });
}

// Text with emphasis, code and links. `lines` are pieces of the source that follow one another.
function inline(writer, parent, source, lines) {
  let text = "";
  const at = []; // where in the source each character of the text stands
  lines.forEach(([from, to], n) => {
    const end = n + 1 < lines.length ? to + 1 : to; // with its line break
    text += source.slice(from, end);
    for (let one = from; one < end; one++) at.push(one);
  });
  const put = (into, from, to) => {
    for (let begin = from; begin < to; ) { // runs that also follow one another in the source
      let end = begin + 1;
      while (end < to && at[end] === at[end - 1] + 1) end++;
      writer.text(into, at[begin], at[end - 1] + 1);
      begin = end;
    }
  };
  spans(text, 0, text.length, parent, put, 0);
}

const SPECIAL = /[\\`*_~[$]|https?:\/\//g, CLOSES = { "\\(": "\\)", "\\[": "\\]", $$: "$$", $: "$" };

function spans(text, from, to, parent, put, depth) {
  const missing = new Set(); // what has no end in this range: looked for once
  const closing = (mark, begin) => {
    if (missing.has(mark)) return -1;
    for (let at = text.indexOf(mark, begin); at >= 0 && at + mark.length <= to; at = text.indexOf(mark, at + 1)) {
      let end = at + mark.length;
      if (mark.length === 1 && ((end < to && text[end] === mark) || (at > begin && text[at - 1] === mark))) {
        while (end < to && text[end] === mark) end++; // a run of two or more is another mark
        at = end - 1;
      } else if (!/\s/.test(text[at - 1]) && !(mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[end] || ""))) {
        while (mark.length === 2 && end < to && text[end] === mark[0]) end++;
        return end - mark.length;
      }
    }
    missing.add(mark);
    return -1;
  };
  const formula = (mark) => { // where the LaTeX that begins at `at` ends, or -1
    const begin = at + mark.length, end = missing.has(mark) ? -1 : text.indexOf(CLOSES[mark], begin);
    const price = mark === "$" && (/\s/.test(text[begin]) || /\s/.test(text[end - 1]) || /\d/.test(text[end + 1] ?? ""));
    if (end >= 0 && end + mark.length <= to) return price || end === begin ? -1 : end + mark.length;
    missing.add(mark);
    return -1;
  };
  let plain = from, at = from;
  const wrap = (node, begin, end, after) => {
    put(parent, plain, at);
    parent.append(node);
    spans(text, begin, end, node, put, depth + 1);
    plain = at = after;
  };
  while (at < to) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found || found.index >= to) break;
    at = found.index;
    const one = found[0], pair = text.slice(at, Math.min(to, at + 2)), mark = pair in CLOSES ? pair : one === "$" ? one : null;
    const over = mark ? formula(mark) : -1;
    if (over > 0) {
      put(parent, plain, at);
      put(parent.appendChild(h("span", { class: "math" })), at, over);
      plain = at = over;
    } else if (one === "$") at += mark.length;
    else if (one === "\\") {
      if (/[!-/:-@[-`{-~]/.test(text[at + 1] || "") && at + 1 < to) {
        put(parent, plain, at);
        plain = at + 1;
        at++;
      }
      at++;
    } else if (one === "`") {
      let end = at;
      while (end < to && text[end] === "`") end++;
      const ticks = text.slice(at, end);
      let close = missing.has(ticks) ? -1 : end;
      while (close >= 0 && close < to) {
        close = text.indexOf(ticks, close);
        if (close < 0 || close + ticks.length > to) close = -1;
        else if (text[close + ticks.length] === "`" || text[close - 1] === "`") while (text[close] === "`") close++;
        else break;
      }
      if (close < end || close >= to) {
        missing.add(ticks);
        at = end;
        continue;
      }
      put(parent, plain, at);
      put(parent.appendChild(h("code")), end, close);
      plain = at = close + ticks.length;
    } else if (one === "[") {
      const link = depth < DEEPEST && /^\[([^[\]\n]{1,500})\]\(([^()\s]{1,2000})\)/.exec(text.slice(at, Math.min(to, at + 2600)));
      const address = link && safe(link[2]);
      if (address) {
        const same = link[1] === link[2] || address.host === link[1];
        wrap(anchor(address), at + 1, at + 1 + link[1].length, at + link[0].length);
        if (!same) parent.append(h("span", { class: "host" }, ` (${address.host || address.pathname})`));
      } else at++;
    } else if (one.startsWith("http")) {
      const found = /^https?:\/\/[^\s<>"'`*|\\]+/.exec(text.slice(at, Math.min(to, at + 2000)));
      const link = found && found[0].replace(/[.,;:!?)\]]+$/, ""), address = link && safe(link);
      if (address) {
        put(parent, plain, at);
        put(parent.appendChild(anchor(address)), at, at + link.length);
        plain = at = at + link.length;
      } else at += one.length;
    } else {
      const double = text[at + 1] === one && at + 1 < to, mark = double ? one + one : one;
      const begin = at + mark.length, inside = /[\p{L}\p{N}]/u.test(text[at - 1] || "");
      const opens = begin < to && !/\s/.test(text[begin]) && !(inside && !(one === "*" && double)) && !(one === "~" && !double) && depth < DEEPEST;
      const end = opens ? closing(mark, begin + 1) : -1;
      if (end > begin) wrap(h(one === "~" ? "s" : double ? "strong" : "em"), begin, end, end + mark.length);
      else at = begin;
    }
  }
  put(parent, plain, to);
}

// Links lead to web pages and mail alone; a script or a file of this machine stays text.
function safe(link) {
  try {
    const address = new URL(link);
    return ["http:", "https:", "mailto:"].includes(address.protocol) && !address.username && !HIDDEN.test(link) ? address : null;
  } catch {
    return null;
  } finally {
    HIDDEN.lastIndex = 0;
  }
}
const anchor = (address) => h("a", { href: address.href, rel: "noopener noreferrer nofollow", target: "_blank", title: address.href });

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not on https or localhost
    const area = document.body.appendChild(h("textarea", { class: "unseen" }));
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = before), 1500);
}
