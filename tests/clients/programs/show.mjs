// What the programs for node share: as show.py.
import assert from "node:assert/strict";
import { appendFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

export const SERVER = process.env.QUIRE_URL;
export const BASE_URL = `${SERVER}/v1`;
export const MODEL = "scripted";
export const KEY = "none";
export const QUESTION = "What is the weather in Paris?";
export const RESULT = "21 degrees";
export const REPORT = "It is 21 degrees in Paris.";
export const ANSWER = "To be, or not to be: that is the question.";

/** A package of the client's environment, which is not beside this file. */
export async function load(name) {
  const require = createRequire(`${process.env.CLIENT_FOLDER}/package.json`);
  return import(pathToFileURL(require.resolve(name)).href);
}

export const equal = assert.deepEqual;

export async function show(features) {
  for (const [name, run] of Object.entries(features)) {
    let error = null;
    try {
      await run();
    } catch (thrown) {
      error = thrown.stack ?? String(thrown);
    }
    appendFileSync(process.env.RESULTS, `${JSON.stringify({ feature: name.replaceAll("_", " "), error })}\n`);
  }
}
