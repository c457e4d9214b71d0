// The map of blocks: a canvas with a cell for each block. Arrow keys move, Enter asks for the details of a block.

import { h } from "./dom.js";
import { OTHERS, PINNED, hueOf } from "./pool.js";

const MAX_CELLS = 65_536;
const FLASH_MS = 1200;

export class BlockMap {
  /** `choose` is called with a block; `describe` gives the sentence for a block. */
  constructor(pool, choose, describe) {
    this.pool = pool;
    this.choose = choose;
    this.selected = -1;
    this.highlight = 0;
    this.describe = describe;
    this.canvas = h("canvas", { class: "map", tabindex: 0, role: "application", "aria-label": "Map of blocks" });
    this.canvas.addEventListener("click", (event) => this.pick(this.blockAt(event.offsetX, event.offsetY)));
    this.canvas.addEventListener("mousemove", (event) => {
      const block = this.blockAt(event.offsetX, event.offsetY);
      this.canvas.title = block < 0 ? "" : this.describe(block);
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw(performance.now())).observe(this.canvas);
  }

  layout() {
    const { num_blocks: size } = this.pool.shape;
    this.perCell = Math.max(1, Math.ceil(size / MAX_CELLS));
    this.cells = Math.ceil(size / this.perCell);
    const width = this.canvas.clientWidth || 600;
    this.side = Math.max(3, Math.min(22, Math.floor(Math.sqrt((width * 420) / Math.max(1, this.cells)))));
    this.columns = Math.max(1, Math.floor(width / this.side));
    const height = Math.max(1, Math.ceil(this.cells / this.columns)) * this.side;
    const scale = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
      this.canvas.style.setProperty("height", `${height}px`);
    }
    return scale;
  }

  blockAt(x, y) {
    const column = Math.floor(x / this.side);
    const cell = Math.floor(y / this.side) * this.columns + column;
    return column < this.columns && cell < this.cells ? cell * this.perCell : -1;
  }

  pick(block) {
    if (block < 0 || block >= this.pool.shape.num_blocks) return;
    this.selected = block;
    this.canvas.setAttribute("aria-label", this.describe(block));
    this.draw(performance.now());
    this.choose(block);
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    if (event.key === "Enter") return this.pick(Math.max(0, this.selected));
    if (!(event.key in steps)) return;
    event.preventDefault();
    const block = Math.max(0, this.selected) + (this.selected < 0 ? 0 : steps[event.key] * this.perCell);
    if (block < 0 || block >= this.pool.shape.num_blocks) return;
    this.selected = block;
    this.canvas.setAttribute("aria-label", this.describe(block));
    this.draw(performance.now());
  }

  draw(now) {
    const scale = this.layout();
    const context = this.canvas.getContext("2d");
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (let cell = 0; cell < this.cells; cell++) this.drawCell(context, cell, dark, now);
  }

  drawCell(context, cell, dark, now) {
    const { pool, side } = this;
    const block = this.shownBlock(cell);
    const x = (cell % this.columns) * side;
    const y = Math.floor(cell / this.columns) * side;
    const size = side - (side > 4 ? 1 : 0);
    const kind = pool.kind(block);
    const owner = pool.owner[block];
    context.globalAlpha = this.highlight && owner !== this.highlight ? 0.25 : 1;
    context.fillStyle = dark ? "#2b2b2b" : "#e9e9e6";
    context.fillRect(x, y, size, size);
    if (kind === "cached") {
      context.fillStyle = dark ? "#55585c" : "#b9bcc0";
      context.fillRect(x, y, size, size);
    } else if (kind !== "free") {
      context.fillStyle = owner === OTHERS || !owner ? "#888" : `hsl(${hueOf(owner)} 60% ${dark ? 55 : 48}%)`;
      const filled = pool.shape.block_size ? Math.min(1, pool.fill[block] / pool.shape.block_size) : 1;
      const height = Math.max(1, Math.round(size * filled));
      context.fillRect(x, y + size - height, size, height);
    }
    if (kind === "shared") this.drawShared(context, x, y, size, pool.refs[block], dark);
    if (pool.flags[block] & PINNED) frame(context, x, y, size, dark ? "#fff" : "#000", 1);
    const copied = pool.copiedAt.get(block);
    if (copied !== undefined && now - copied < FLASH_MS) frame(context, x, y, size, "#e0218a", 2);
    if (block === this.selected) frame(context, x, y, size, dark ? "#fff" : "#000", 2);
  }

  /** Shared blocks carry their number of references, or a dot where there is no room. */
  drawShared(context, x, y, size, refs, dark) {
    context.fillStyle = dark ? "#111" : "#fff";
    if (size >= 12) {
      context.font = `bold ${Math.floor(size * 0.7)}px sans-serif`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.fillText(refs > 99 ? "+" : String(refs), x + size / 2, y + size / 2 + 1);
    } else {
      const dot = Math.max(1, Math.min(size - 2, 1 + Math.floor(Math.log2(refs))));
      context.fillRect(x + (size - dot) / 2, y + (size - dot) / 2, dot, dot);
    }
  }

  /** In a cell for several blocks, the one with the most references. */
  shownBlock(cell) {
    let best = cell * this.perCell;
    const end = Math.min(best + this.perCell, this.pool.shape.num_blocks);
    for (let block = best + 1; block < end; block++) if (this.pool.refs[block] > this.pool.refs[best]) best = block;
    return best;
  }
}

function frame(context, x, y, size, color, width) {
  context.strokeStyle = color;
  context.lineWidth = width;
  context.strokeRect(x + width / 2, y + width / 2, size - width, size - width);
}
