// The page: its views, the model, the API key.

import { call, getKey, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { showBanner } from "./dom.js";
import { Learn } from "./learn.js";
import { Memory } from "./memory.js";

const byId = (id) => document.getElementById(id);
const VIEWS = {
  chat: (root) => new Chat(root, () => byId("model").value, () => abilities.get(byId("model").value) ?? []),
  memory: (root) => new Memory(root),
  learn: (root) => new Learn(root),
};
const views = {};
/** Model → what it can do. */
const abilities = new Map();
let shown = "";

function show() {
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "chat";
  if (name === shown) return;
  views[shown]?.close?.();
  shown = name;
  for (const each of Object.keys(VIEWS)) byId(each).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  views[name] ??= VIEWS[name](byId(name));
  views[name].open?.();
}

async function listModels() {
  try {
    const { data } = await call("v1/models");
    byId("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
    for (const { id, capabilities } of data) abilities.set(id, capabilities);
    views.chat?.showAbilities();
    if (!data[0]?.capabilities.length) setTimeout(listModels, 1000); // it is still loading
    byId("key-form").hidden = !getKey();
    showBanner("");
  } catch (error) {
    if (error.status === 401) return;
    showBanner(error.message);
    setTimeout(listModels, 1000);
  }
}

document.addEventListener("key-needed", () => {
  byId("key-form").hidden = false;
  showBanner(getKey() ? "The server does not know this API key." : "This server needs an API key.");
});
byId("key").value = getKey();
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  listModels().then(() => views[shown]?.open?.());
});
byId("model").addEventListener("change", () => views.chat?.showAbilities());
addEventListener("hashchange", show);
show();
listModels();
