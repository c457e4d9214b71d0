// The memory view: the map, the requests, the charts and the details of what was chosen, fed by /kv/stream.

import { call, events } from "./api.js";
import { BlockMap } from "./blockmap.js";
import { Charts } from "./charts.js";
import { h, short, showBanner } from "./dom.js";
import { OTHERS, Pool, hueOf, missText } from "./pool.js";

const RETRY_MS = 1000;

export class Memory {
  constructor(root) {
    this.pool = new Pool();
    this.map = new BlockMap(
      this.pool,
      (block) => this.showBlock(block),
      (block) => this.blockText(block),
    );
    this.charts = new Charts();
    this.summary = h("p", { class: "summary", id: "summary" });
    this.tiers = h("p", { class: "tiers" });
    this.rows = h("tbody");
    this.detail = h(
      "div",
      { class: "detail", "aria-live": "polite" },
      h("p", { class: "hint" }, "Choose a block or a request."),
    );
    const heads = ["Request", "State", "Samples", "Tokens", "Blocks", "Shared", "From cache", "Copied", "Preempted"];
    root.append(
      h("div", { class: "pool" }, this.summary, this.map.canvas, legend(), this.tiers),
      this.charts.element,
      h(
        "div",
        { class: "requests" },
        h(
          "table",
          { tabindex: 0 },
          h("caption", {}, "Requests"),
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              heads.map((text) => h("th", { scope: "col" }, text)),
            ),
          ),
          this.rows,
        ),
        this.detail,
      ),
    );
  }

  /** Called when the view is opened: look until it is closed. */
  async open() {
    this.close();
    const looking = (this.looking = new AbortController());
    while (!looking.signal.aborted) {
      try {
        for await (const frame of events("kv/stream", { signal: looking.signal })) {
          this.pool.apply(frame, performance.now());
          showBanner(frame.state === "ready" ? "" : `The engine is ${frame.state}; requests go on after the pause.`);
          this.later();
        }
      } catch (error) {
        if (error.name === "AbortError") return;
        showBanner(error.message);
        if (error.status === 401) return;
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  close() {
    this.looking?.abort();
    cancelAnimationFrame(this.drawing);
    clearTimeout(this.fading);
    this.drawing = 0;
  }

  /** Draw with the next frame of the screen, and once more when flashes have faded. */
  later() {
    this.drawing ||= requestAnimationFrame((now) => {
      this.drawing = 0;
      this.draw(now);
    });
  }

  draw(now) {
    const { pool } = this;
    if (!pool.requests.has(this.map.highlight)) this.map.highlight = 0; // it has ended
    this.map.draw(now);
    this.charts.draw(pool, now);
    this.drawSummary();
    const rows = [...pool.requests.values()].sort((one, other) => one.slot - other.slot);
    this.rows.replaceChildren(...rows.slice(0, 200).map((row) => this.row(row)));
    clearTimeout(this.fading);
    if (pool.copiedAt.size) this.fading = setTimeout(() => this.later(), 1300);
  }

  drawSummary() {
    const { shape, stats } = this.pool;
    const counts = this.pool.counts();
    const parts = [
      `${short(shape.num_blocks)} blocks of ${shape.block_size} tokens`,
      `${short(counts.used + counts.shared)} in use`,
      `${short(counts.shared)} shared`,
      `${short(counts.cached)} free and cached`,
      `${short(counts.free)} free`,
    ];
    if (counts.pinned) parts.push(`${short(counts.pinned)} pinned`);
    if (stats) {
      const waste = stats.num_allocated_slots ? 1 - stats.num_filled_slots / stats.num_allocated_slots : 0;
      parts.push(`${short(100 * waste)} % waste`, `${short(stats.num_shared_slots)} slots saved by sharing`);
      parts.push(`${short(stats.total_block_copies)} copies on write`, `${short(stats.total_preemptions)} preemptions`);
    }
    this.summary.textContent = parts.join(", ");
    this.summary.dataset.shared = counts.shared;
    const tiers = Object.entries(stats?.tiers ?? {});
    this.tiers.textContent = tiers.length
      ? tiers
          .map(
            ([name, tier]) =>
              `${name} tier: ${short(tier.num_blocks)} blocks, ${short(tier.num_bytes / 2 ** 20)} MiB, ${short(tier.total_hits)} tokens loaded`,
          )
          .join("; ")
      : "";
  }

  row(row) {
    const swatch = h("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.setProperty("background", `hsl(${hueOf(row.slot)} 60% 50%)`);
    const cached = Object.values(row.cached_tokens).reduce((sum, tokens) => sum + tokens, 0);
    const cells = [
      row.state,
      row.num_samples,
      row.num_tokens,
      row.num_blocks,
      row.num_references - row.num_blocks,
      cached,
      row.num_copied_blocks,
      row.num_preemptions,
    ];
    const open = () => this.showRequest(row.request_id);
    return h(
      "tr",
      { class: row.slot === this.map.highlight ? "current" : null },
      h("th", { scope: "row" }, swatch, h("button", { class: "quiet", onclick: open }, row.request_id)),
      cells.map((cell) => h("td", {}, String(cell))),
    );
  }

  blockText(block) {
    const { pool } = this;
    const owner =
      pool.requests.get(pool.owner[block])?.request_id ?? (pool.owner[block] === OTHERS ? "another request" : "");
    const kinds = {
      free: "free",
      cached: "free, cached",
      used: `used by ${owner}`,
      shared: `shared by ${pool.refs[block]}, first ${owner}`,
    };
    return `Block ${block}: ${kinds[pool.kind(block)]}, ${pool.fill[block]} of ${pool.shape.block_size} slots filled`;
  }

  async showBlock(block) {
    await this.show(`kv/blocks/${block}`, ({ block: detail, texts }) => {
      const holders = detail.holders.map((holder) =>
        h(
          "li",
          {},
          h("button", { class: "quiet", onclick: () => this.showRequest(holder.request_id) }, holder.request_id),
          ` sample ${holder.sample}, logical block ${holder.position}`,
        ),
      );
      return [
        h("h2", {}, `Block ${detail.block}`),
        h(
          "p",
          {},
          `${this.blockText(block)}. Taken ${short(detail.seconds_since_taken)} s ago. ${detail.hash ? `Hash ${detail.hash}….` : "No hash yet."}${detail.pinned ? " Pinned." : ""}`,
        ),
        holders.length ? h("ul", {}, holders) : null,
        tokenList(texts, detail.token_ids),
      ];
    });
  }

  async showRequest(id) {
    await this.show(`kv/requests/${encodeURIComponent(id)}`, ({ request: detail, texts }) => {
      const { request, samples } = detail;
      this.map.highlight = request.slot;
      this.later();
      const shared = Object.entries(detail.shared_with).map(([other, blocks]) => `${other} (${blocks} blocks)`);
      return [
        h("h2", {}, `Request ${request.request_id}`),
        h("p", {}, `${request.state}, ${short(request.num_prompt_tokens)} prompt tokens. ${missText(request.miss)}`),
        shared.length ? h("p", {}, `Shares blocks with ${shared.join(", ")}.`) : null,
        samples.map((sample) =>
          h(
            "div",
            {},
            h("h3", {}, `Block table of sample ${sample.sample}`),
            sample.tables.map((table) => this.table(table)),
          ),
        ),
        h("h3", {}, detail.truncated ? "Its first tokens" : "Its tokens"),
        tokenList(texts, detail.token_ids),
        h("button", { onclick: () => ((this.map.highlight = 0), this.later()) }, "Show all requests again"),
      ];
    });
  }

  table(blocks) {
    return h(
      "p",
      { class: "table" },
      blocks
        .slice(0, 512)
        .map((block) =>
          block < 0
            ? h("span", { class: "hole" }, "–")
            : h(
                "button",
                { class: this.pool.refs[block] > 1 ? "quiet shared" : "quiet", onclick: () => this.map.pick(block) },
                String(block),
              ),
        ),
    );
  }

  async show(path, render) {
    try {
      this.detail.replaceChildren(
        ...render(await call(path))
          .flat()
          .filter(Boolean),
      );
    } catch (error) {
      this.detail.replaceChildren(h("p", {}, error.message));
    }
  }
}

function tokenList(texts, ids) {
  return h(
    "p",
    { class: "tokens" },
    ids.map((id, index) => h("span", { title: `token ${id}` }, texts[index] || `${id} `)),
  );
}

function legend() {
  const entries = [
    ["free", "free"],
    ["cached", "free, but the prefix cache finds it"],
    ["used", "in use, coloured by request, filled from below"],
    ["shared", "shared, with the number of holders"],
    ["copied", "copied on write just now"],
    ["pinned", "pinned by a registered prefix"],
  ];
  return h(
    "ul",
    { class: "legend", "aria-label": "Legend" },
    entries.map(([kind, text]) =>
      h("li", {}, h("span", { class: `cell ${kind}`, "aria-hidden": "true" }, kind === "shared" ? "2" : ""), text),
    ),
  );
}
