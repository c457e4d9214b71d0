// Learn: scenes that the real scheduler played, step by step. scripts/write_page_scenes.py records them.

import { call } from "./api.js";
import { h, say } from "./dom.js";
import { hueOf } from "./pool.js";

export class Learn {
  constructor(root) {
    this.root = root;
    this.scene = 0;
    this.step = 0;
    root.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") this.go(this.step + 1);
      if (event.key === "ArrowLeft") this.go(this.step - 1);
    });
  }

  async open() {
    try {
      this.data ??= await call("page/scenes.json");
      this.render();
    } catch (error) {
      this.root.replaceChildren(h("p", {}, error.message));
    }
  }

  go(step, scene = this.scene) {
    const { frames } = this.data.scenes[scene];
    if (step < 0 || step >= frames.length) return;
    this.scene = scene;
    this.step = step;
    const focused = document.activeElement?.id;
    this.render();
    document.getElementById(focused)?.focus();
    say(frames[step].words.join(" "));
  }

  render() {
    const { scenes, block_size: size } = this.data;
    const { frames } = scenes[this.scene];
    const frame = frames[this.step];
    const before = frames[this.step - 1];
    const last = this.step === frames.length - 1;
    this.root.replaceChildren(
      h(
        "div",
        { class: "scene", role: "group", "aria-label": "Scenes" },
        scenes.map(({ title }, index) =>
          h(
            "button",
            { id: `scene${index}`, "aria-pressed": String(index === this.scene), onclick: () => this.go(0, index) },
            `${index + 1}. ${title}`,
          ),
        ),
      ),
      h("p", { class: "words", id: "words" }, frame.words.join(" ")),
      h(
        "div",
        { class: "row" },
        h("button", { id: "back", disabled: this.step === 0, onclick: () => this.go(this.step - 1) }, "Back"),
        h("button", { id: "step", disabled: last, onclick: () => this.go(this.step + 1) }, "Next step"),
        h("span", { class: "hint" }, `Step ${this.step + 1} of ${frames.length}; the arrow keys work, too.`),
      ),
      h("h2", {}, `The pool: blocks of ${size} tokens`),
      h(
        "ol",
        { class: "slots" },
        frame.blocks.map((block, index) => slot(block, index, size, frame, before)),
      ),
      h("h2", {}, "Block tables"),
      h(
        "ul",
        { class: "sequences" },
        frame.sequences.map((sequence) =>
          h(
            "li",
            {},
            `${sequence.name} (${sequence.state}): blocks ${sequence.table.join(", ") || "none"} — “${sequence.text}”`,
          ),
        ),
        frame.sequences.length ? null : h("li", {}, "No request is left."),
      ),
    );
  }
}

/** One block with its tokens. Its colour is that of the first request that holds it. */
function slot(block, index, size, frame, before) {
  const [first] = block.holders;
  const classes = [block.kind];
  if (block.holders.length > 1) classes.push("shared");
  if (before && JSON.stringify(before.blocks[index]) !== JSON.stringify(block)) classes.push("changed");
  if (frame.copies.some((pair) => pair.includes(index))) classes.push("copied");
  const about = { free: "free", cached: "free, cached", used: block.holders.join(" and ") }[block.kind];
  const cells = Array.from({ length: size }, (_, at) =>
    h("li", { class: at < block.tokens.length ? "full" : null }, (block.tokens[at] ?? "").replaceAll("\n", "⏎")),
  );
  const element = h("li", { class: classes.join(" ") }, `${index}: ${about}`, h("ol", {}, cells));
  element.style.setProperty(
    "--hue",
    first ? `hsl(${hueOf(first.charCodeAt(0) * 7 + (Number(first.slice(2)) || 0))} 55% 45%)` : "var(--line)",
  );
  return element;
}
