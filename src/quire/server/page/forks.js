// The branches of a conversation as a tree: what branches have in common is computed and stored once.

import { h, short } from "./dom.js";

/** A nested list of all messages; a click shows that branch. */
export function forkTree(conversation, blockSize, choose) {
  const shown = new Set(conversation.path());
  const branch = (parent) => {
    const children = conversation.children(parent);
    if (!children.length) return null;
    return h(
      "ul",
      { class: children.length > 1 ? "fork" : null },
      children.map((node) => h("li", {}, entry(node, children), branch(node.id))),
    );
  };
  const entry = (node, siblings) => {
    const about = [node.content.trim().slice(0, 32) || "…"];
    const shares = siblings.length > 1 ? sharedText(conversation, node, siblings, blockSize) : "";
    if (shares) about.push(h("small", {}, ` ${shares}`));
    return h(
      "button",
      { class: `quiet ${node.role}`, "aria-current": shown.has(node) ? "true" : null, onclick: () => choose(node) },
      about,
    );
  };
  return (
    branch("") ??
    h(
      "p",
      { class: "hint" },
      "Edit a message, retry an answer or ask for several: each makes a branch that shares the blocks before it.",
    )
  );
}

/** How much a branch shares with its siblings: the history before them. */
export function sharedText(conversation, node, siblings, blockSize) {
  const usage = node.usage;
  if (!usage) return "";
  if (usage.answers > 1 && siblings.some((other) => other !== node && other.request === node.request)) {
    return `fork of ${short(usage.prompt)} tokens, stored once for ${usage.answers} answers`;
  }
  return blockSize
    ? `shares ${short(Math.floor(usage.cached / blockSize))} blocks`
    : `shares ${short(usage.cached)} tokens`;
}
