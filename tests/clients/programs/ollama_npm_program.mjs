// ollama from npm: the programs of its README.
import { ANSWER, MODEL, QUESTION, REPORT, RESULT, SERVER, equal, load, show } from "./show.mjs";

const { Ollama } = await load("ollama");
const client = new Ollama({ host: SERVER });
const messages = [{ role: "user", content: "Hello" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const person = { type: "object", properties: { name: { type: "string" }, age: { type: "integer" } }, required: ["name", "age"] };

await show({
  async chat() {
    equal((await client.chat({ model: MODEL, messages })).message.content, ANSWER);
  },
  async stream() {
    let text = "";
    for await (const part of await client.chat({ model: MODEL, messages, stream: true })) text += part.message.content;
    equal(text, ANSWER);
  },
  async tools() {
    const tools = [{ type: "function", function: { name: "get_weather", description: "Get the weather.", parameters } }];
    const asking = [{ role: "user", content: QUESTION }];
    const { message } = await client.chat({ model: MODEL, messages: asking, tools });
    equal(message.tool_calls[0].function.arguments, { city: "Paris" });
    const conversation = [...asking, message, { role: "tool", tool_name: "get_weather", content: RESULT }];
    equal((await client.chat({ model: MODEL, messages: conversation, tools })).message.content, REPORT);
  },
  async structured_output() {
    const reply = await client.chat({ model: MODEL, messages, format: person });
    equal(JSON.parse(reply.message.content), { name: "Ada", age: 36 });
  },
  async embeddings() {
    const reply = await client.embed({ model: MODEL, input: ["one", "two words"] });
    equal(reply.embeddings.map((vector) => vector.length), [4, 4]);
  },
  async completions() {
    equal((await client.generate({ model: MODEL, prompt: "Hello" })).response, ANSWER);
  },
  async models() {
    equal((await client.list()).models.some((model) => model.name.startsWith(MODEL)), true);
  },
});
