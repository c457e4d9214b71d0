// The form of sampling parameters, and the fields of a request that it stands for.

import { h } from "./dom.js";

const NUMBERS = [
  ["temperature", "Temperature", 0, 2, 0.1],
  ["top_p", "Top-p", 0.01, 1, 0.01],
  ["max_tokens", "Max tokens", 1, 131072, 1],
  ["n", "Answers (n)", 1, 16, 1],
  ["seed", "Seed", 0, 2 ** 31, 1],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1],
];

/** The fields of a chat request for the values of the form, for a model with `abilities`. Throws an `Error` that names the
    field at fault. */
export function requestFields(values, abilities) {
  const fields = {};
  for (const [name, label, low, high] of NUMBERS) {
    if (values[name] === undefined || values[name] === "") continue;
    const number = Number(values[name]);
    if (!(number >= low && number <= high)) throw new Error(`${label} is ${values[name]}; give ${low} to ${high}`);
    fields[name] = number;
  }
  const stop = (values.stop ?? "").split("\n").filter((line) => line);
  if (stop.length) fields.stop = stop;
  const schema = parsed(values.schema, "JSON schema", (value) => typeof value === "object" && !Array.isArray(value));
  if (schema) fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = abilities.includes("tools") ? parsed(values.tools, "Tools", Array.isArray) : null;
  if (tools) fields.tools = tools;
  return fields;
}

function parsed(text, label, accepts) {
  if (!text?.trim()) return null;
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`${label} is not JSON: ${error.message}`);
  }
  if (value === null || !accepts(value))
    throw new Error(`${label} must be a JSON ${accepts === Array.isArray ? "list" : "object"}`);
  return value;
}

/** The form. `changed` is called with all values after each change. */
export function parameterForm(values, changed) {
  const set = (name) => (event) => changed({ ...values, [name]: (values[name] = event.target.value) });
  const numbers = NUMBERS.map(([name, label, min, max, step]) =>
    h(
      "label",
      {},
      label,
      h("input", { type: "number", name, min, max, step, value: values[name] ?? "", oninput: set(name) }),
    ),
  );
  const texts = [
    ["stop", "Stop strings, one a line"],
    ["schema", "JSON schema of the answer"],
    ["tools", "Tools, as a JSON list"],
  ].map(([name, label]) =>
    h(
      "label",
      { class: "wide" },
      label,
      h("textarea", { name, rows: 3, spellcheck: "false", value: values[name] ?? "", oninput: set(name) }),
    ),
  );
  return h("div", { class: "parameters" }, numbers, texts);
}
