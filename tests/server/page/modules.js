// What the modules of the page do by themselves, as functions that return a value. test_modules.py knows the right ones.

export default {
  "events are read whole however they are cut": async () => {
    const { EventReader } = await import("./page/api.js");
    const text = 'data: {"a":1}\n\n: ping\n\nevent: x\ndata:{"b":"é"}\n\ndata: [DONE]\n\n';
    const cuts = [...Array(text.length).keys()].map((at) => {
      const reader = new EventReader();
      return JSON.stringify([...reader.feed(text.slice(0, at)), ...reader.feed(text.slice(at))]);
    });
    return [...new Set(cuts)];
  },
  "a branch keeps its own history": async () => {
    const { Conversation } = await import("./page/conversation.js");
    const talk = new Conversation({ system: "s" });
    const first = talk.add("", "user", "one");
    const answer = talk.add(first.id, "assistant", "1", { request: "x" });
    const second = talk.add(first.id, "assistant", "2", { request: "x" });
    const edited = talk.add("", "user", "other");
    talk.show(answer);
    return [
      talk.path().map((node) => node.content),
      talk.messages(second).map((each) => each.content),
      talk.answers(answer).length,
      talk.siblings(edited).length,
      talk.title,
    ];
  },
  "results answer the calls in their order": async () => {
    const { Conversation } = await import("./page/conversation.js");
    const talk = new Conversation();
    const ask = talk.add("", "user", "weather?");
    const toolCalls = ["a", "b"].map((id) => ({ id, type: "function", function: { name: id, arguments: "{}" } }));
    const answer = talk.add(ask.id, "assistant", "", { toolCalls });
    const first = talk.add(answer.id, "tool", "sun", { toolCallId: "a" });
    const second = talk.add(first.id, "tool", "rain", { toolCallId: "b" });
    const open = [ask, answer, first, second].map((node) => talk.openCalls(node).map(({ id }) => id));
    const sent = talk.messages(second).map(({ tool_calls, tool_call_id }) => tool_call_id ?? tool_calls?.length ?? 0);
    return [open, sent];
  },
  "a foreign conversation is checked": async () => {
    const { checked } = await import("./page/conversation.js");
    const node = { id: "m1", parent: "", role: "user", content: "x" };
    const bad = [
      null,
      {},
      { nodes: [{}] },
      { nodes: [{ ...node, role: "evil" }] },
      { nodes: [{ ...node, parent: "m9" }] },
      { nodes: [node, node] },
      { nodes: [{ ...node, image: "http://evil/x.png" }] },
      { nodes: Array(2001).fill(node) },
    ];
    const errors = bad.map((data) => {
      try {
        checked(data);
        return "";
      } catch (error) {
        return error.message;
      }
    });
    const good = checked({ nodes: [node], shown: { "": "m1", m1: "m7" } });
    return [
      errors.every((text) => text.startsWith("this is no conversation")),
      good.path().length,
      good.add("m1", "user", "y").id,
    ];
  },
  "storage is bounded, the oldest goes first": async () => {
    const { saveConversations, loadConversations, MAX_CONVERSATIONS } = await import("./page/store.js");
    const { Conversation } = await import("./page/conversation.js");
    const many = Array.from({ length: MAX_CONVERSATIONS + 5 }, (_, at) => {
      const talk = new Conversation();
      talk.add("", "user", `${at}`);
      talk.changed = at;
      return talk;
    });
    const dropped = saveConversations(many);
    const kept = loadConversations().map((each) => each.title);
    const large = new Conversation();
    large.add("", "user", "x".repeat(4_000_000));
    return [dropped, kept.length, kept[0], saveConversations([large, ...many.slice(0, 3)]), loadConversations().length];
  },
  "frames add up to the pool": async () => {
    const { Pool } = await import("./page/pool.js");
    const pool = new Pool();
    pool.apply(
      {
        state: "ready",
        shape: { num_blocks: 8, block_size: 4, windows: [0] },
        blocks: [
          [0, 3, 1, 2, 4, 1, 0],
          [3, 1, 1, 1, 2, 0, 0],
          [4, 1, 0, 0, 4, 1, 0],
        ],
        requests: [{ slot: 1, request_id: "r1" }],
        copies: [[2, 3]],
      },
      0,
    );
    const before = [[...Array(8).keys()].map((block) => pool.kind(block)), pool.counts(), pool.copiedAt.size];
    pool.apply({ state: "ready", blocks: [[0, 4, 0, 0, 4, 1, 0]], ended: [1] }, 5000);
    return [...before, pool.counts().cached, pool.requests.size, pool.copiedAt.size];
  },
  "rates come from differences, and start again with an engine": async () => {
    const { Pool } = await import("./page/pool.js");
    const pool = new Pool();
    const stats = (values) => ({
      total_steps: 0,
      total_prompt_tokens: 0,
      total_generated_tokens: 0,
      total_preemptions: 0,
      total_prefix_queries: 0,
      total_prefix_hits: 0,
      num_running: 1,
      num_waiting: 0,
      num_used_blocks: 1,
      num_blocks: 4,
      num_filled_slots: 3,
      num_allocated_slots: 4,
      ...values,
    });
    const latencies = (count) => ({ first_token: [count / 10, count], next_token: [0, 0] });
    pool.apply({ state: "ready", stats: stats({ total_steps: 10 }), latencies: latencies(0) }, 0);
    pool.apply(
      {
        state: "ready",
        stats: stats({ total_steps: 20, total_generated_tokens: 40, total_prefix_queries: 8, total_prefix_hits: 2 }),
        latencies: latencies(2),
      },
      2000,
    );
    const point = pool.points.at(-1);
    pool.apply(
      { state: "ready", stats: stats({ total_steps: 1, total_generated_tokens: 1 }), latencies: latencies(2) },
      3000,
    );
    return [
      point.tokens,
      point.decode,
      point.hits,
      point.waste,
      point.firstToken,
      point.nextToken,
      "tokens" in pool.points.at(-1),
    ];
  },
  "every reason of a miss is a sentence": async () => {
    const { missText } = await import("./page/pool.js");
    return ["new", "differs", "evicted", "salt", "state"]
      .map((reason) => missText([2, reason, 7]))
      .every((text) => /^From block 2 on it was computed\. [A-Z].*\.?$/.test(text) && !text.includes("undefined"));
  },
  "lines stay inside their chart": async () => {
    const { pathOf } = await import("./page/charts.js");
    return pathOf(
      [
        { at: 0, x: 0 },
        { at: 30000, x: null },
        { at: 60000, x: 9 },
      ],
      "x",
      3,
      60000,
      60000,
    );
  },
  "wrong parameters are named": async () => {
    const { requestFields } = await import("./page/parameters.js");
    const bad = [
      { n: "0" },
      { temperature: "hot" },
      { top_p: "2" },
      { schema: "[1]" },
      { schema: "null" },
      { tools: "{}" },
      { max_tokens: "-1" },
    ];
    const errors = bad.map((values) => {
      try {
        return requestFields(values, ["tools"]);
      } catch (error) {
        return error.message.split(" ")[0];
      }
    });
    const given = { n: "2", stop: "a\n\nb", tools: "[]", seed: "" };
    return [errors, requestFields(given, ["tools"]), requestFields(given, [])];
  },
};
