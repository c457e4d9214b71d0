// Codex, the command: a provider of its own in config.toml, as its page on configuration says.
import { execFileSync } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { ANSWER, BASE_URL, MODEL, equal, show } from "./show.mjs";

const folder = `${process.env.HOME}/.codex`;
mkdirSync(folder);
writeFileSync(
  `${folder}/config.toml`,
  `model = "${MODEL}"
model_provider = "quire"
[model_providers.quire]
name = "Quire"
base_url = "${BASE_URL}"
wire_api = "responses"
`,
);

await show({
  async responses() {
    const options = ["exec", "--skip-git-repo-check", "--sandbox", "read-only", "Hello"];
    const command = `${process.env.CLIENT_FOLDER}/node_modules/.bin/codex`;
    const said = execFileSync(command, options, { input: "", encoding: "utf8", timeout: 300_000 });
    equal(said.trim().split("\n").at(-1), ANSWER);
  },
});
