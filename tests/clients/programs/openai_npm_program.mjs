// openai from npm: the programs of its README.
import { ANSWER, BASE_URL, KEY, MODEL, QUESTION, REPORT, RESULT, equal, load, show } from "./show.mjs";

const { default: OpenAI } = await load("openai");
const client = new OpenAI({ baseURL: BASE_URL, apiKey: KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "Hello" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const person = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};

await show({
  async chat() {
    const completion = await client.chat.completions.create({ model: MODEL, messages });
    equal(completion.choices[0].message.content, ANSWER);
  },
  async stream() {
    let text = "";
    for await (const chunk of await client.chat.completions.create({ model: MODEL, messages, stream: true })) {
      text += chunk.choices[0]?.delta?.content ?? "";
    }
    equal(text, ANSWER);
    equal(await client.chat.completions.stream({ model: MODEL, messages }).finalContent(), ANSWER);
  },
  async tools() {
    const runner = client.chat.completions.runTools({
      model: MODEL,
      messages: [{ role: "user", content: QUESTION }],
      tools: [{ type: "function", function: { name: "get_weather", parameters, parse: JSON.parse, function: ({ city }) => {
        equal(city, "Paris");
        return RESULT;
      } } }],
    });
    equal(await runner.finalContent(), REPORT);
  },
  async structured_output() {
    const response_format = { type: "json_schema", json_schema: { name: "person", schema: person, strict: true } };
    const completion = await client.chat.completions.parse({ model: MODEL, messages, response_format });
    equal(JSON.parse(completion.choices[0].message.content), { name: "Ada", age: 36 });
  },
  async embeddings() {
    const reply = await client.embeddings.create({ model: MODEL, input: ["one", "two words"] });
    equal(reply.data.map((item) => item.embedding.length), [4, 4]);
  },
  async completions() {
    const completion = await client.completions.create({ model: MODEL, prompt: "Hello", max_tokens: 100 });
    equal(completion.choices[0].text, ANSWER);
  },
  async responses() {
    const tools = [{ type: "function", name: "get_weather", parameters, strict: true }];
    const asked = await client.responses.create({ model: MODEL, input: QUESTION, tools });
    const call = asked.output.find((item) => item.type === "function_call");
    const input = [{ type: "function_call_output", call_id: call.call_id, output: RESULT }];
    const stream = client.responses.stream({ model: MODEL, input, tools, previous_response_id: asked.id });
    equal((await stream.finalResponse()).output_text, REPORT);
  },
});
