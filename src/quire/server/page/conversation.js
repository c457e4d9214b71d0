// A conversation as a tree of messages. Edits, retries and several answers are siblings: forks of one history, whose
// KV blocks the server shares. This file knows neither the page nor the server.

const MAX_NODES = 2000;

/** A new id. crypto.randomUUID exists only on localhost and behind TLS, and servers are also visited by their address. */
export const newId = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Messages by id, and for each message the child that is shown. */
export class Conversation {
  constructor(data = {}) {
    this.id = data.id ?? newId();
    this.title = data.title ?? "";
    this.system = data.system ?? "";
    this.changed = data.changed ?? Date.now();
    this.nodes = new Map((data.nodes ?? []).map((node) => [node.id, node]));
    this.shown = new Map(Object.entries(data.shown ?? {}));
    this.next = data.next ?? 1;
  }

  /** Add a message after `parent` ("" for the first ones) and show it. */
  add(parent, role, content, more = {}) {
    if (this.nodes.size >= MAX_NODES)
      throw new Error(`a conversation has at most ${MAX_NODES} messages; begin another`);
    const node = { id: `m${this.next++}`, parent, role, content, ...more };
    this.nodes.set(node.id, node);
    this.shown.set(parent, node.id);
    this.changed = Date.now();
    if (!this.title && role === "user") this.title = content.trim().slice(0, 60);
    return node;
  }

  children(parent) {
    return [...this.nodes.values()].filter((node) => node.parent === parent);
  }

  /** The messages with the same history, itself included. */
  siblings(node) {
    return this.children(node.parent);
  }

  /** Answers of the same request, which are shown side by side. */
  answers(node) {
    if (!node.request) return [node];
    return this.siblings(node).filter((other) => other.request === node.request);
  }

  show(node) {
    this.shown.set(node.parent, node.id);
    if (node.parent) this.show(this.nodes.get(node.parent));
  }

  /** The messages from the first to the last one shown. */
  path() {
    const path = [];
    for (let id = this.shown.get(""); id; id = this.shown.get(id)) path.push(this.nodes.get(id));
    return path;
  }

  /** The messages that lead to `node`, itself included. */
  history(node) {
    const history = [];
    for (let at = node; at; at = this.nodes.get(at.parent)) history.unshift(at);
    return history;
  }

  /** The same as messages of OpenAI's API. */
  messages(node) {
    const messages = this.system ? [{ role: "system", content: this.system }] : [];
    for (const { role, content, image, toolCalls, toolCallId } of this.history(node)) {
      const parts = image && [
        { type: "text", text: content },
        { type: "image_url", image_url: { url: image } },
      ];
      const message = { role, content: parts || content };
      if (toolCalls?.length) message.tool_calls = toolCalls;
      if (toolCallId) message.tool_call_id = toolCallId;
      messages.push(message);
    }
    return messages;
  }

  /** The calls of the latest answer before or at `node` that have no result yet. */
  openCalls(node) {
    const history = this.history(node);
    const last = history.findLastIndex(({ role }) => role === "assistant");
    const results = new Set(history.slice(last + 1).map(({ toolCallId }) => toolCallId));
    return (history[last]?.toolCalls ?? []).filter(({ id }) => !results.has(id));
  }

  toJSON() {
    const { id, title, system, changed, next } = this;
    return { id, title, system, changed, next, nodes: [...this.nodes.values()], shown: Object.fromEntries(this.shown) };
  }
}

/** A conversation from foreign JSON. Throws an `Error` that names what is wrong. */
export function checked(data) {
  const fail = (what) => {
    throw new Error(`this is no conversation of Quire: ${what}`);
  };
  if (typeof data !== "object" || data === null || !Array.isArray(data.nodes)) fail("it has no list of nodes");
  if (data.nodes.length > MAX_NODES) fail(`it has ${data.nodes.length} messages; at most ${MAX_NODES} are read`);
  const seen = new Set([""]);
  const nodes = data.nodes.map((node, index) => {
    const texts = [node?.id, node?.parent, node?.role, node?.content];
    if (!texts.every((text) => typeof text === "string")) fail(`message ${index} lacks an id, parent, role or content`);
    if (!["user", "assistant", "tool"].includes(node.role))
      fail(`message ${index} has the role ${node.role.slice(0, 40)}`);
    if (!seen.has(node.parent))
      fail(`message ${index} follows ${node.parent.slice(0, 40)}, which does not come before it`);
    if (seen.has(node.id)) fail(`the id of message ${index} is used twice`);
    if (node.image && !/^data:image\/(png|jpeg|webp|gif);base64,/.test(node.image))
      fail(`message ${index} has a bad image`);
    seen.add(node.id);
    return node;
  });
  const shown = Object.entries(data.shown ?? {}).filter(
    ([parent, child]) => nodes.find((node) => node.id === child)?.parent === parent,
  );
  const next = 1 + Math.max(0, ...nodes.map((node) => Number(node.id.slice(1)) || 0));
  const texts = { title: String(data.title ?? "").slice(0, 60), system: String(data.system ?? "") };
  return new Conversation({ ...texts, nodes, shown: Object.fromEntries(shown), next });
}
