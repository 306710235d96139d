// ---- Replies and the tree of a chat -------------------------------------------------------------------------------
// A reply is its tokens, each with its probability and its alternatives, and the two texts that the server made of
// them. A chat is a tree: another reply, an edited message and a branch at a token are siblings, and none is lost.

const THINK = "<think>", END_THINK = "</think>", ENDS = /^<\|(?:im_end|endoftext)\|>$/;
const isControl = (text) => text === THINK || text === END_THINK || /^<\|[^|\s]+\|>$/.test(text);
const encoder = new TextEncoder();
const tokenBytes = (token) => token.bytes || encoder.encode(token.text);

// The thinking or the answer: `text` as the server sent it, `raw` what its tokens say, line breaks around it included.
class Part {
  constructor() {
    [this.text, this.raw, this.owners, this.before, this.after] = ["", "", [], [], []];
    [this.held, this.holder, this.count] = [[], 0, 0]; // bytes of a character that is not complete yet, and its first token
  }
  push(index, bytes) {
    this.count++;
    const all = [...this.held, ...bytes], whole = completeBytes(all);
    const first = this.held.length ? this.holder : index;
    const text = new TextDecoder().decode(Uint8Array.from(all.slice(0, whole)));
    let owner = first;
    for (const character of text) {
      for (let unit = 0; unit < character.length; unit++) this.owners.push(owner);
      owner = index;
    }
    this.raw += text;
    if (whole || !this.held.length) this.holder = index;
    this.held = all.slice(whole);
  }
  // Where in `raw` the text begins, and for how many characters they are the same: only there a token can be told.
  get shared() {
    const lead = Math.max(0, /^\n*/.exec(this.raw)[0].length - /^\n*/.exec(this.text)[0].length);
    let count = 0;
    while (count < this.text.length && this.raw[lead + count] === this.text[count]) count++;
    return [lead, count];
  }
}

function completeBytes(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes[bytes.length - back];
    if (byte >= 0xc0) return back < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2) ? bytes.length - back : bytes.length;
    if (byte < 0x80) break;
  }
  return bytes.length;
}

class Reply {
  // `opened`: the prompt itself begins the thinking, as that of the Thinking models does.
  constructor(tokens = [], opened = false) {
    [this.tokens, this.reasoning, this.answer, this.part] = [[], new Part(), new Part(), opened ? "reasoning" : "answer"];
    this.opened = opened;
    for (const token of tokens) this.push(token);
  }
  get closed() { // thinking came to its end
    return this.reasoning.after.length > 0;
  }
  // token: {text, bytes (null: those of the text), logprob (null: put in, not drawn), top: [[text, logprob, bytes, its share in the draw]]}
  push(token, hint) {
    const index = this.tokens.push(token) - 1, fresh = this.part === "answer" && !this.answer.text && !this.closed;
    if (fresh && !this.answer.raw && token.text === THINK) this.part = "reasoning";
    else if (fresh && hint === "reasoning") { // what came before was thinking too
      [this.answer.text, this.reasoning, this.answer] = [this.reasoning.text, this.answer, new Part()];
      [this.part, this.opened] = ["reasoning", true];
    }
    if (token.text === END_THINK && this.part === "reasoning") {
      this.reasoning.after.push(index);
      this.reasoning.text = this.reasoning.text.replace(/\n+$/, "");
      this.part = "answer";
      return;
    }
    const part = this[this.part];
    if (!isControl(token.text)) part.push(index, tokenBytes(token));
    else (part.raw ? part.after : part.before).push(index);
  }
  take({ delta = {}, logprobs }, sampling) { // a choice of a chunk
    const thought = delta.reasoning_content ?? delta.reasoning ?? "", said = delta.content ?? "";
    const tokens = logprobs?.content ?? [];
    if (!tokens.length && thought && !this.answer.text) this.part = "reasoning";
    this.reasoning.text += thought; // before the tokens: an end of the thinking among them comes behind it
    for (const one of tokens) this.push(tokenOf(one, sampling), thought && !said ? "reasoning" : "");
    this.answer.text += said;
    if (said) this.part = "answer";
  }
  // Why an alternative can't stand at `index`, or "": only a text can be sent back for the server to go on from.
  refuses(index, [text, , bytes]) {
    const part = this.partOf(index), mark = "a mark of the chat, not a text to go on from";
    if (isControl(text)) return ENDS.test(text) || (text === END_THINK && part === this.reasoning) ? "" : mark;
    if (!text.replace(/\n/g, "") && !this.branch(index, [text, 0, bytes]).begun) return "a line break before the answer, which is not kept";
    let before = [];
    for (let at = index - 1; at >= 0 && before.length < 4 && this.partOf(at) === part && !isControl(this.tokens[at].text); at--) {
      before = [...tokenBytes(this.tokens[at]), ...before];
    }
    const begin = before.findIndex((byte) => byte < 0x80 || byte >= 0xc0); // behind the end of an older character
    try {
      new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from([...(begin < 0 ? [] : before.slice(begin)), ...tokenBytes({ text, bytes })]));
      return "";
    } catch {
      return "a part of a character, not a text to go on from";
    }
  }
  // A new reply that holds the tokens before `index` and then the alternative.
  branch(index, [text, logprob, bytes]) {
    const chosen = { text, bytes, logprob, top: this.tokens[index].top, branched: true };
    const reply = new Reply([...this.tokens.slice(0, index), chosen], this.opened);
    reply.reasoning.text = reply.reasoning.raw.replace(reply.closed ? /^\n+|\n+$/g : /^\n+/, "");
    reply.answer.text = reply.answer.raw.replace(/^\n+/, "");
    return reply;
  }
  partOf(index) {
    const closed = this.reasoning.after[0] ?? -1;
    if (!this.opened && !this.reasoning.before.length) return this.answer;
    return closed < 0 || index <= closed ? this.reasoning : this.answer;
  }
  get message() {
    const thought = this.reasoning.text;
    return { role: "assistant", content: this.answer.text, ...(thought && { reasoning_content: thought }) };
  }
  // The message that the server is to continue, or null where nothing has been said yet.
  get begun() {
    if (this.answer.text) return this.message;
    if (this.closed) return { role: "assistant", content: `${THINK}\n${this.reasoning.text}\n${END_THINK}\n\n` };
    if (this.reasoning.text) return this.message;
    return this.part === "reasoning" ? { role: "assistant", content: `${THINK}\n` } : null;
  }
}

const SHOWN = 10; // alternatives that the card of a token lists

function tokenOf({ token, logprob, bytes, top_logprobs: top }, sampling) {
  const own = (text, bytes) => (bytes && text.includes("\ufffd") ? bytes : null);
  const drawn = typeof logprob === "number" && logprob > -9999, all = top || [];
  const shares = drawnShares(all.map((one) => one.logprob), sampling);
  const rows = all.map((one, at) => [one.token, one.logprob, own(one.token, one.bytes), shares?.[at] ?? null]);
  return { text: token, bytes: own(token, bytes), logprob: drawn ? logprob : null, top: rows.filter((row, at) => at < SHOWN || all[at].token === token) };
}

// The shares with which the likeliest tokens could be drawn: temperature, top-k, top-p and min-p, in the server's order.
// Null where these tokens do not tell: with penalties, or where the filters leave more of them.
function drawnShares(logprobs, s) {
  if (!s || !logprobs.length || s.presence_penalty || s.frequency_penalty || s.repetition_penalty !== 1) return null;
  if (s.temperature === 0) return logprobs.map((_, at) => Number(at === 0));
  const left = s.top_k > 0 ? Math.min(s.top_k, logprobs.length) : logprobs.length, all = left === s.top_k;
  if (!all && (s.temperature !== 1 || s.top_k > 0)) return null; // the others' part of the sum is not known
  const weights = logprobs.slice(0, left).map((value) => Math.exp((value - logprobs[0]) / s.temperature));
  const sum = all ? weights.reduce((a, b) => a + b) : Math.exp(-logprobs[0]);
  let kept = 0, held = 0;
  while (kept < left && (s.top_p === 1 || held < s.top_p * sum) && weights[kept] >= s.min_p) held += weights[kept++];
  if (kept === left && !all && (s.top_p < 1 || s.min_p > 0)) return null;
  const whole = kept < left || all ? held : sum;
  return logprobs.map((_, at) => (at < kept ? weights[at] / whole : 0));
}

// The tree. A node is {id, parent, role, children, active, text | reply, ...}; `active` is the child that is shown.
class Chat {
  constructor() {
    this.nodes = new Map([[0, { id: 0, children: [], active: -1 }]]);
  }
  add(parent, role, fields) {
    const node = { id: this.nodes.size, parent: parent.id, role, children: [], active: -1, ...fields };
    this.nodes.set(node.id, node);
    parent.active = parent.children.push(node.id) - 1;
    return node;
  }
  parent(node) {
    return this.nodes.get(node.parent);
  }
  get path() {
    const path = [];
    for (let node = this.nodes.get(0); node.active >= 0; ) path.push((node = this.nodes.get(node.children[node.active])));
    return path;
  }
  show(node) {
    const parent = this.parent(node);
    parent.active = parent.children.indexOf(node.id);
  }
  // What was said before a node, for a request.
  before(node) {
    const said = [];
    for (let one = this.parent(node); one.id; one = this.parent(one)) if (spoken(one)) said.unshift(messageOf(one));
    return said;
  }
  // `alternatives`: how many to keep of each token
  toJSON(alternatives = 20) {
    return [...this.nodes.values()].map(({ reply, ...node }) => ({ ...node, ...(reply && {
      texts: [reply.reasoning.text, reply.answer.text, reply.opened],
      tokens: alternatives ? reply.tokens.map((token) => ({ ...token, top: token.top.slice(0, alternatives) })) : [] }) }));
  }
  static from(list) {
    const chat = new Chat();
    chat.nodes = new Map(list.map(({ texts, tokens, ...node }) => [node.id, { ...node, ...(texts && { reply: said(...texts, tokens) }) }]));
    return chat;
  }
}

function said(reasoning, answer, opened = false, tokens = []) {
  const reply = new Reply(tokens, opened);
  [reply.reasoning.text, reply.answer.text] = [reasoning, answer];
  if (!tokens.length && reasoning && !answer) reply.part = "reasoning";
  return reply;
}
const spoken = (node) => node.role !== "assistant" || Boolean(node.reply.answer.text || node.reply.reasoning.text); // no failed reply
const messageOf = (node) => (node.role === "assistant" ? node.reply.message : { role: node.role, content: node.text });

// ---- A saved chat: the file that generate.py's /save writes and /load reads ----

const SCHEMA = "nanoqwen/chat/1", LARGEST = 64 * 2 ** 20;

function exported(chat, model, settings) {
  const { system, ...rest } = settings;
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...chat.path.filter(spoken).map(messageOf)];
  return JSON.stringify({ schema: SCHEMA, model, messages, settings: rest }, null, 2) + "\n";
}

// -> {messages, settings}; throws an Error in one line for what is no chat.
function imported(text) {
  let record;
  try {
    record = JSON.parse(text);
  } catch {
    throw new Error("not JSON; give a file that /save of generate.py or Export wrote");
  }
  if (!record || typeof record !== "object" || !Array.isArray(record.messages) || !record.messages.length) throw new Error('not a saved chat, which is {"messages": [...]}');
  if (!String(record.schema ?? SCHEMA).startsWith("nanoqwen/chat/")) throw new Error(`its schema is ${JSON.stringify(record.schema)}, not ${SCHEMA}`);
  record.messages.forEach((message, at) => {
    const name = `message ${at + 1}`;
    if (!["system", "user", "assistant"].includes(message?.role)) throw new Error(`${name}: its role is none of system, user and assistant`);
    if (message.role === "system" && at) throw new Error(`${name}: a system message may only come first`);
    if (typeof message.content !== "string" || typeof (message.reasoning_content ?? "") !== "string") throw new Error(`${name}: its content is not a text`);
  });
  const settings = record.settings ?? {};
  if (typeof settings !== "object" || Array.isArray(settings)) throw new Error("settings: not an object {...}");
  return { messages: record.messages, settings };
}

// ---- The server ----

class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const KEY = "nanoqwen-key";
async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  let response;
  try {
    response = await fetch(path, { ...options, headers: { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server can't be reached; is it still running?", 0);
  }
  if (response.ok) return response;
  let message = "";
  try {
    message = (await response.json()).error?.message ?? "";
  } catch {} // not JSON: a proxy's page
  const wait = response.status === 429 && response.headers.get("Retry-After");
  throw new ServerError((message || `The server answered ${response.status}`) + (wait ? ` (try again in ${wait} s)` : ""), response.status);
}

// The events of a reply, one after the other. Throws ServerError, also for an error in mid-stream.
async function* events(body, signal) {
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", done = false;
  try {
    while (true) {
      const { value, done: over } = await reader.read();
      if (over) break;
      const lines = (held + value).split("\n");
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") {
          done = true;
          continue;
        }
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message ?? "The server gave up", event.error.code);
        yield event;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection broke off", 0);
  }
  if (!done) throw new ServerError("The connection ended before the reply did", 0);
}
