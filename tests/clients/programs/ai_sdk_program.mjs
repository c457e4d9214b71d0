// Vercel's AI SDK: the programs of its pages on OpenAI-compatible providers.
import { ANSWER, BASE_URL, KEY, MODEL, QUESTION, REPORT, RESULT, equal, load, show } from "./show.mjs";

const { embedMany, generateText, Output, stepCountIs, streamText, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createOpenAI } = await load("@ai-sdk/openai");
const { z } = await load("zod");

const provider = createOpenAICompatible({
  name: "quire",
  baseURL: BASE_URL,
  apiKey: KEY,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL: BASE_URL, apiKey: KEY }); // responses by default
const models = [provider(MODEL), openai.chat(MODEL), openai(MODEL)];
const person = z.object({ name: z.string(), age: z.int() });
const tools = {
  get_weather: tool({
    description: "Get the weather of a city.",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      equal(city, "Paris");
      return RESULT;
    },
  }),
};

await show({
  async chat() {
    for (const model of models) equal((await generateText({ model, prompt: "Hello", maxRetries: 0 })).text, ANSWER);
  },
  async stream() {
    for (const model of models) {
      let text = "";
      for await (const part of streamText({ model, prompt: "Hello", maxRetries: 0 }).textStream) text += part;
      equal(text, ANSWER);
    }
  },
  async tools() {
    for (const model of models) {
      const asked = { model, tools, prompt: QUESTION, stopWhen: stepCountIs(3), maxRetries: 0 };
      equal((await generateText(asked)).text, REPORT);
      equal(await streamText(asked).text, REPORT);
    }
  },
  async structured_output() {
    for (const model of models) {
      const asked = { model, prompt: "Hello", output: Output.object({ schema: person }), maxRetries: 0 };
      equal((await generateText(asked)).output, { name: "Ada", age: 36 });
    }
  },
  async embeddings() {
    const model = (provider.embeddingModel ?? provider.textEmbeddingModel).call(provider, MODEL);
    equal((await embedMany({ model, values: ["one", "two words"] })).embeddings.length, 2);
  },
  async completions() {
    equal((await generateText({ model: provider.completionModel(MODEL), prompt: "Hello" })).text, ANSWER);
  },
  async responses() {
    equal((await generateText({ model: openai.responses(MODEL), prompt: "Hello" })).text, ANSWER);
  },
});
