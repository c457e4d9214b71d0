// @anthropic-ai/sdk: the programs of its README.
import { ANSWER, KEY, MODEL, QUESTION, REPORT, RESULT, SERVER, equal, load, show } from "./show.mjs";

const { default: Anthropic } = await load("@anthropic-ai/sdk");
const client = new Anthropic({ baseURL: SERVER, apiKey: KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];
const input_schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };

await show({
  async chat() {
    const message = await client.messages.create({ model: MODEL, max_tokens: 1000, messages });
    equal(message.content.map((block) => block.text), [ANSWER]);
  },
  async stream() {
    const stream = client.messages.stream({ model: MODEL, max_tokens: 1000, messages });
    equal(await stream.finalText(), ANSWER);
  },
  async tools() {
    const tools = [{ name: "get_weather", description: "Get the weather of a city.", input_schema }];
    const asking = [{ role: "user", content: QUESTION }];
    const first = await client.messages.stream({ model: MODEL, max_tokens: 1000, messages: asking, tools }).finalMessage();
    const call = first.content.find((block) => block.type === "tool_use");
    equal(call.input, { city: "Paris" });
    const result = { type: "tool_result", tool_use_id: call.id, content: RESULT };
    const conversation = [...asking, { role: "assistant", content: first.content }, { role: "user", content: [result] }];
    const last = await client.messages.create({ model: MODEL, max_tokens: 1000, messages: conversation, tools });
    equal(last.content.map((block) => block.text), [REPORT]);
  },
  async token_counts() {
    const { input_tokens } = await client.messages.countTokens({ model: MODEL, messages });
    const { usage } = await client.messages.create({ model: MODEL, max_tokens: 5, messages });
    equal(input_tokens, usage.input_tokens + usage.cache_read_input_tokens);
  },
});
