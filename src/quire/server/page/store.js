// Conversations and parameters, kept in this browser only, within a limit.

import { Conversation, checked } from "./conversation.js";

const CONVERSATIONS = "quire.conversations";
const PARAMETERS = "quire.parameters";
export const MAX_CONVERSATIONS = 50;
const MAX_CHARS = 3_000_000;

/** All conversations, the latest first. What cannot be read is left out. */
export function loadConversations() {
  try {
    return JSON.parse(localStorage.getItem(CONVERSATIONS) ?? "[]").map((data) => new Conversation(data));
  } catch {
    return [];
  }
}

/** Keep as many conversations as fit, the latest first. Returns how many were dropped. */
export function saveConversations(conversations) {
  const sorted = conversations.filter((each) => each.nodes.size).sort((one, other) => other.changed - one.changed);
  let kept = sorted.slice(0, MAX_CONVERSATIONS);
  for (;;) {
    const text = JSON.stringify(kept);
    try {
      if (text.length <= MAX_CHARS || !kept.length) {
        localStorage.setItem(CONVERSATIONS, text);
        return sorted.length - kept.length;
      }
    } catch {
      if (!kept.length) return sorted.length; // no storage at all, as in some private windows
    }
    kept = kept.slice(0, -1);
  }
}

export function loadParameters() {
  try {
    return JSON.parse(localStorage.getItem(PARAMETERS) ?? "{}");
  } catch {
    return {};
  }
}

export function saveParameters(parameters) {
  try {
    localStorage.setItem(PARAMETERS, JSON.stringify(parameters));
  } catch {
    // They last as long as the page.
  }
}

/** Conversations as a file to keep. */
export function exportText(conversations) {
  return JSON.stringify({ quire: 1, conversations }, null, 1);
}

/** Conversations of such a file. Throws an `Error` that names what is wrong. */
export function importText(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("this file is not JSON");
  }
  if (!Array.isArray(data?.conversations)) throw new Error("this file holds no list of conversations");
  if (data.conversations.length > MAX_CONVERSATIONS) {
    throw new Error(
      `this file holds ${data.conversations.length} conversations; at most ${MAX_CONVERSATIONS} are kept`,
    );
  }
  return data.conversations.map(checked);
}
