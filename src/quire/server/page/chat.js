// The chat: streams answers, keeps a tree of messages, and shows what each answer cost and shared.

import { call, engineState, events } from "./api.js";
import { Conversation, newId } from "./conversation.js";
import { h, prose, say, short, showBanner } from "./dom.js";
import { forkTree } from "./forks.js";
import { parameterForm, requestFields } from "./parameters.js";
import {
  exportText,
  importText,
  loadConversations,
  loadParameters,
  saveConversations,
  saveParameters,
} from "./store.js";

/** The name of the model that comes with the package. */
const BUNDLED = "quire-bundled";
const SILENCE_MS = 1200;
const MAX_IMAGE_BYTES = 4_000_000;

export class Chat {
  /** `model` returns the name of the chosen model, `abilities` what it can do. */
  constructor(root, model, abilities) {
    this.root = root;
    this.model = model;
    this.abilities = abilities;
    this.conversations = loadConversations();
    this.current = this.conversations[0] ?? new Conversation();
    this.parameters = loadParameters();
    this.running = null;
    this.editing = null;
    this.blockSize = 0;
    this.image = "";
    this.build();
    this.showAbilities();
  }

  /** Show the controls for images and tools only if the model takes them. */
  showAbilities() {
    const abilities = this.abilities();
    this.attachLabel.hidden = !abilities.includes("vision");
    if (this.attachLabel.hidden) this.image = this.file.value = "";
    this.parameterForm.querySelector("[name=tools]").closest("label").hidden = !abilities.includes("tools");
    this.render();
  }

  /** Called when the view is opened. */
  async open() {
    this.input.focus();
    try {
      this.blockSize ||= (await call("kv")).stats?.block_size ?? 0;
      this.render();
    } catch {
      // Without it the page counts tokens and not blocks.
    }
  }

  build() {
    const save = (values) => saveParameters((this.parameters = values));
    this.parameterForm = parameterForm(this.parameters, save);
    this.list = h("ul", { class: "conversations" });
    this.system = h("textarea", {
      rows: 2,
      "aria-label": "System prompt",
      placeholder: "System prompt",
      oninput: () => this.setSystem(),
    });
    this.log = h("ol", { class: "log", "aria-label": "Messages" });
    this.forks = h("div", { class: "forks" });
    this.problem = h("p", { class: "problem", role: "alert" });
    this.input = h("textarea", {
      id: "prompt",
      rows: 2,
      "aria-label": "Message",
      placeholder: "Message",
      onkeydown: (event) => this.key(event),
    });
    this.sendButton = h("button", { id: "send" }, "Send");
    this.editNote = h(
      "p",
      { class: "hint editing", hidden: true },
      "Editing an earlier message. Sending makes a new branch. ",
      h("button", { class: "quiet", type: "button", onclick: () => this.edit(null) }, "Cancel"),
    );
    this.stopButton = h(
      "button",
      { id: "stop", type: "button", hidden: true, onclick: () => this.running?.abort() },
      "Stop",
    );
    this.file = h("input", {
      type: "file",
      accept: "image/png,image/jpeg,image/webp,image/gif",
      onchange: () => this.attach(),
    });
    this.attachLabel = h("label", { class: "attach" }, "Image ", this.file);
    const form = h(
      "form",
      { class: "compose", onsubmit: (event) => (event.preventDefault(), this.send()) },
      this.editNote,
      this.input,
      h("div", { class: "row" }, this.attachLabel, this.stopButton, this.sendButton),
    );
    const open = h("input", {
      type: "file",
      accept: "application/json",
      onchange: (event) => this.import(event.target),
    });
    this.root.append(
      h(
        "aside",
        { role: "region", "aria-label": "Conversations" },
        h("button", { id: "new", type: "button", onclick: () => this.select(new Conversation()) }, "New conversation"),
        this.list,
        h("details", { open: true }, h("summary", {}, "Forks of this conversation"), this.forks),
        h("details", {}, h("summary", {}, "Parameters"), this.parameterForm),
        h(
          "div",
          { class: "row" },
          h("button", { onclick: () => this.export() }, "Export"),
          h("label", { class: "button" }, "Import", h("span", { class: "unseen" }, open)),
        ),
      ),
      h("div", { class: "talk" }, this.system, this.log, this.problem, form),
    );
  }

  key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.send();
    }
    if (event.key === "Escape") this.editing ? this.edit(null) : this.running?.abort();
  }

  setSystem() {
    this.current.system = this.system.value;
    this.save();
  }

  select(conversation) {
    this.running?.abort();
    this.current = conversation;
    this.editing = null;
    this.render();
    this.input.focus();
  }

  save() {
    if (!this.conversations.includes(this.current)) this.conversations.unshift(this.current);
    const dropped = saveConversations(this.conversations);
    if (dropped) this.problem.textContent = `The browser's space is full: ${dropped} old conversations are not kept.`;
  }

  // -- requests ----------------------------------------------------------------------------------------------------

  async send() {
    const text = this.input.value;
    if (this.running || !text.trim()) return;
    let fields;
    try {
      fields = requestFields(this.parameters, this.abilities());
      const message = this.addMessage(text);
      this.input.value = this.image = this.file.value = "";
      this.editing = null;
      if (message.role === "user" || !this.current.openCalls(message).length) await this.answer(message, fields);
      else this.render();
    } catch (error) {
      this.problem.textContent = error.message;
    }
  }

  /** The text as a message of the user, or as the result of a tool that the model has called. */
  addMessage(text) {
    const { editing } = this;
    const parent = editing ? this.current.nodes.get(editing.parent) : this.current.path().at(-1);
    const [call] = parent ? this.current.openCalls(parent) : [];
    if (call) return this.current.add(parent.id, "tool", text, { toolCallId: call.id });
    return this.current.add(parent?.id ?? "", "user", text, this.image ? { image: this.image } : {});
  }

  async retry(node) {
    if (this.running) return;
    try {
      await this.answer(this.current.nodes.get(node.parent), requestFields(this.parameters, this.abilities()));
    } catch (error) {
      this.problem.textContent = error.message;
    }
  }

  /** Ask for n answers to a message and stream them side by side. */
  async answer(user, fields) {
    const conversation = this.current;
    const request = newId();
    const nodes = Array.from({ length: fields.n ?? 1 }, () => conversation.add(user.id, "assistant", "", { request }));
    conversation.show(nodes[0]);
    const body = {
      ...fields,
      model: this.model() || undefined,
      messages: conversation.messages(user),
      stream: true,
      stream_options: { include_usage: true },
    };
    this.running = new AbortController();
    const started = performance.now();
    const watch = watchSilence();
    this.problem.textContent = "";
    this.render();
    try {
      for await (const event of events("v1/chat/completions", { body, signal: this.running.signal })) {
        watch.heard();
        for (const choice of event.choices ?? []) this.extend(nodes[choice.index], choice, started);
        if (event.usage) for (const node of nodes) node.usage = { ...usageOf(event.usage), answers: nodes.length };
      }
      say("The answer is complete.");
    } catch (error) {
      if (error.name === "AbortError") for (const node of nodes) node.end ??= "stopped";
      else this.fail(nodes, error);
    } finally {
      watch.end();
      this.running = null;
      for (const node of nodes) if (!node.content && !node.toolCalls && !node.end) node.end = "no text";
      conversation.changed = Date.now();
      this.save();
      if (this.current === conversation) this.render();
    }
  }

  extend(node, choice, started) {
    const { delta = {}, finish_reason } = choice;
    const now = performance.now();
    if (delta.content || delta.reasoning_content || delta.reasoning || delta.tool_calls) {
      node.firstAt ??= now - started;
      node.lastAt = now - started;
      node.events = (node.events ?? 0) + 1;
    }
    node.content += delta.content ?? "";
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (thought) node.reasoning = (node.reasoning ?? "") + thought;
    for (const call of delta.tool_calls ?? []) addCall((node.toolCalls ??= []), call);
    if (finish_reason) node.end = finish_reason;
    this.renderNode(node);
  }

  fail(nodes, error) {
    for (const node of nodes) node.end = "failed";
    this.problem.textContent = error.message;
  }

  attach() {
    const [file] = this.file.files;
    this.image = "";
    if (!file) return;
    if (file.size > MAX_IMAGE_BYTES) {
      this.problem.textContent = `The image has ${short(file.size)} bytes; at most ${short(MAX_IMAGE_BYTES)} are sent.`;
      this.file.value = "";
      return;
    }
    const reader = new FileReader();
    reader.onload = () => (this.image = reader.result);
    reader.readAsDataURL(file);
  }

  // -- files -------------------------------------------------------------------------------------------------------

  export() {
    const address = URL.createObjectURL(new Blob([exportText(this.conversations)], { type: "application/json" }));
    h("a", { href: address, download: "quire-conversations.json" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  async import(input) {
    try {
      const read = importText(await input.files[0].text());
      this.conversations.unshift(...read);
      saveConversations(this.conversations);
      if (read.length) this.select(read[0]);
    } catch (error) {
      this.problem.textContent = error.message;
    }
    input.value = "";
  }

  // -- what is shown -----------------------------------------------------------------------------------------------

  render() {
    const running = Boolean(this.running);
    this.system.value = this.current.system;
    this.stopButton.hidden = !running;
    this.editNote.hidden = !this.editing;
    this.sendButton.disabled = running;
    const last = this.current.path().at(-1);
    const [call] = last && !running ? this.current.openCalls(last) : [];
    this.input.placeholder = call ? `Result of ${call.function.name}` : "Message";
    this.list.replaceChildren(
      ...this.conversations.map((each) =>
        h(
          "li",
          { class: each === this.current ? "current" : null },
          h(
            "button",
            { onclick: () => this.select(each), "aria-current": each === this.current ? "true" : null },
            each.title || "Untitled",
          ),
          h(
            "button",
            { class: "quiet", "aria-label": `Delete ${each.title || "Untitled"}`, onclick: () => this.remove(each) },
            "×",
          ),
        ),
      ),
    );
    this.views = new Map();
    const rows = this.current.path().map((node) => this.row(node));
    this.log.replaceChildren(...(rows.length ? rows : [this.welcome()]));
    this.forks.replaceChildren(
      forkTree(this.current, this.blockSize, (node) => (this.current.show(node), this.render())),
    );
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** What an empty conversation says. */
  welcome() {
    const lines = ["Write a message below: Enter sends it, Shift and Enter begin a new line, Escape stops the answer."];
    if (this.model() === BUNDLED)
      lines.push(
        "This small bundled model writes in the manner of Shakespeare and knows nothing else. " +
          "For an assistant, start the server with: quire serve smollm2",
      );
    lines.push("Memory shows what your words occupy; Learn plays the idea behind it.");
    return h(
      "li",
      { class: "welcome" },
      lines.map((line) => h("p", {}, line)),
    );
  }

  remove(conversation) {
    if (!confirm(`Delete “${conversation.title || "Untitled"}”?`)) return;
    this.conversations = this.conversations.filter((each) => each !== conversation);
    saveConversations(this.conversations);
    if (conversation === this.current) this.select(this.conversations[0] ?? new Conversation());
    else this.render();
  }

  row(node) {
    const answers = this.current.answers(node);
    const side = answers.length > 1 ? "side-by-side" : "";
    return h(
      "li",
      { class: `${node.role} ${side}` },
      answers.map((each) => this.message(each, each === node && answers.length > 1)),
    );
  }

  message(node, chosen) {
    const body = h("div", { class: "text" });
    const facts = h("p", { class: "facts" });
    this.views.set(node.id, { body, facts });
    this.fill(node, body, facts);
    const siblings = this.current.siblings(node);
    const buttons = [];
    if (node.role !== "assistant")
      buttons.push(h("button", { class: "quiet", onclick: () => this.edit(node) }, "Edit"));
    else buttons.push(h("button", { class: "quiet", onclick: () => this.retry(node) }, "Retry"));
    if (this.current.answers(node).length > 1) {
      const choose = () => (this.current.show(node), this.save(), this.render());
      buttons.push(
        h(
          "button",
          { class: "quiet", "aria-pressed": String(chosen), onclick: choose },
          chosen ? "Continues here" : "Continue from this",
        ),
      );
    } else if (siblings.length > 1) {
      buttons.push(this.branches(node, siblings));
    }
    return h(
      "article",
      { class: chosen ? "chosen" : null, "aria-label": node.role },
      h("h2", {}, node.role),
      node.image && h("img", { src: node.image, alt: "attached image" }),
      body,
      facts,
      h("div", { class: "row" }, buttons),
    );
  }

  /** Which of several branches is shown, and the way to the others. */
  branches(node, siblings) {
    const at = siblings.indexOf(node);
    const go = (step) => () => (
      this.current.show(siblings[(at + step + siblings.length) % siblings.length]),
      this.render()
    );
    return h(
      "span",
      { class: "branches" },
      h("button", { class: "quiet", "aria-label": "Branch before", onclick: go(-1) }, "‹"),
      ` ${at + 1}/${siblings.length} `,
      h("button", { class: "quiet", "aria-label": "Branch after", onclick: go(1) }, "›"),
    );
  }

  renderNode(node) {
    const view = this.views.get(node.id);
    if (!view) return;
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
    this.fill(node, view.body, view.facts);
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  fill(node, body, facts) {
    const parts = [];
    if (node.reasoning) parts.push(h("details", { class: "reasoning" }, h("summary", {}, "Reasoning"), node.reasoning));
    parts.push(...prose(node.content));
    for (const { function: called } of node.toolCalls ?? []) {
      parts.push(h("p", { class: "tool" }, `calls ${called.name}(${called.arguments})`));
    }
    body.replaceChildren(...parts);
    facts.textContent = describe(node, this.blockSize).join(" · ");
  }

  /** Edit a message; null ends editing. */
  edit(node) {
    this.editing = node;
    this.editNote.hidden = !node;
    this.input.value = node?.content ?? "";
    this.input.focus();
    if (node) say("Editing. Sending makes a new branch.");
  }
}

/** What an answer cost, as short sentences. */
export function describe(node, blockSize) {
  const facts = [];
  const { usage } = node;
  if (node.firstAt !== undefined) facts.push(`first token ${short(node.firstAt)} ms`);
  const tokens = usage?.answers === 1 ? usage.output : (node.events ?? 0);
  if (node.lastAt > node.firstAt && tokens > 1) {
    facts.push(`${short((1000 * (tokens - 1)) / (node.lastAt - node.firstAt))} tokens/s`);
  }
  if (usage) {
    const blocks = blockSize ? ` (${short(Math.floor(usage.cached / blockSize))} shared blocks)` : "";
    facts.push(`${usage.cached} of ${usage.prompt} prompt tokens from the cache${blocks}`);
  }
  if (node.end && node.end !== "stop") facts.push(node.end === "length" ? "ended by max tokens" : node.end);
  return facts;
}

const usageOf = (usage) => ({
  prompt: usage.prompt_tokens,
  output: usage.completion_tokens,
  cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
});

function addCall(calls, delta) {
  const call = (calls[delta.index] ??= { id: delta.id, type: "function", function: { name: "", arguments: "" } });
  call.function.name += delta.function?.name ?? "";
  call.function.arguments += delta.function?.arguments ?? "";
}

/** While an answer is silent, ask for the engine's state and show a pause. */
function watchSilence() {
  let last = performance.now();
  let ended = false;
  let paused = false;
  const timer = setInterval(async () => {
    if (performance.now() - last < SILENCE_MS) return;
    const state = await engineState();
    if (ended || state === "ready") return;
    paused = true;
    showBanner(
      state === "away" ? "The server does not answer." : `The engine is ${state}; the answer goes on after the pause.`,
    );
  }, 300);
  return {
    heard() {
      last = performance.now();
      if (paused) showBanner("");
      paused = false;
    },
    end() {
      ended = true;
      clearInterval(timer);
      if (paused) showBanner("");
    },
  };
}
