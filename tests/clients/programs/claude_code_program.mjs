// Claude Code, the command, at another base URL, as its page on gateways says.
import { execFileSync } from "node:child_process";
import { ANSWER, KEY, MODEL, SERVER, equal, show } from "./show.mjs";

await show({
  async chat() {
    const env = {
      ...process.env,
      ANTHROPIC_BASE_URL: SERVER,
      ANTHROPIC_API_KEY: KEY,
      ANTHROPIC_MODEL: MODEL,
      ANTHROPIC_SMALL_FAST_MODEL: MODEL,
      CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
    };
    const command = `${process.env.CLIENT_FOLDER}/node_modules/.bin/claude`;
    const said = execFileSync(command, ["-p", "Hello"], { input: "", encoding: "utf8", env, timeout: 300_000 });
    equal(said.trim(), ANSWER);
  },
});
