// The pool as the stream of /kv/stream describes it. Frames are differences; a frame with a shape begins anew.

export const CACHED = 1;
export const PINNED = 2;
export const OTHERS = 65535;
const MAX_POINTS = 300;
/** Frames that a busy browser reads together say nothing about a rate. */
const LEAST_MS = 100;

/** Blocks, requests and the numbers over time. Knows nothing of the page. */
export class Pool {
  constructor() {
    this.state = "";
    this.stats = null;
    this.points = [];
    this.reset({ num_blocks: 0, block_size: 0, windows: [0], max_step_tokens: 0 });
  }

  reset(shape) {
    this.shape = shape;
    const { num_blocks: size } = shape;
    this.owner = new Uint16Array(size);
    this.refs = new Uint8Array(size);
    this.fill = new Uint16Array(size);
    this.flags = new Uint8Array(size);
    this.group = new Uint8Array(size);
    this.requests = new Map();
    this.copiedAt = new Map();
  }

  /** Take over a frame that came at `now` milliseconds. */
  apply(frame, now) {
    this.state = frame.state;
    if (frame.shape) this.reset(frame.shape);
    for (const [first, count, owner, refs, fill, flags, group] of frame.blocks ?? []) {
      this.owner.fill(owner, first, first + count);
      this.refs.fill(refs, first, first + count);
      this.fill.fill(fill, first, first + count);
      this.flags.fill(flags, first, first + count);
      this.group.fill(group, first, first + count);
    }
    for (const slot of frame.ended ?? []) this.requests.delete(slot);
    for (const row of frame.requests ?? []) this.requests.set(row.slot, row);
    for (const [source, copy] of frame.copies ?? []) {
      this.copiedAt.set(source, now);
      this.copiedAt.set(copy, now);
    }
    for (const [block, at] of this.copiedAt) if (now - at > 1500) this.copiedAt.delete(block);
    if (frame.stats) this.#addPoint(frame, now);
  }

  #addPoint(frame, now) {
    const before = this.stats?.total_steps <= frame.stats.total_steps ? this.last : null;
    this.stats = frame.stats;
    if (before && now - before.at < LEAST_MS) return;
    const point = before ? between(before, frame, now) : { at: now };
    this.last = { stats: frame.stats, latencies: frame.latencies, at: now };
    this.points.push(point);
    if (this.points.length > MAX_POINTS) this.points.shift();
  }

  /** What kind of block it is: free, cached, used or shared. */
  kind(block) {
    if (this.refs[block] > 1) return "shared";
    if (this.refs[block]) return "used";
    return this.flags[block] & CACHED ? "cached" : "free";
  }

  /** Blocks by kind. */
  counts() {
    const counts = { free: 0, cached: 0, used: 0, shared: 0, pinned: 0 };
    for (let block = 0; block < this.shape.num_blocks; block++) {
      counts[this.kind(block)]++;
      if (this.flags[block] & PINNED) counts.pinned++;
    }
    return counts;
  }
}

/** Rates and levels between two frames. */
function between(before, frame, now) {
  const { stats } = frame;
  const seconds = (now - before.at) / 1000;
  const gained = (name) => stats[name] - before.stats[name];
  const steps = gained("total_steps");
  const mean = (name) => {
    const [sum, count] = frame.latencies?.[name] ?? [0, 0];
    const [oldSum, oldCount] = before.latencies?.[name] ?? [0, 0];
    return count > oldCount ? (1000 * (sum - oldSum)) / (count - oldCount) : null;
  };
  const queries = gained("total_prefix_queries");
  return {
    at: now,
    running: stats.num_running,
    waiting: stats.num_waiting,
    used: stats.num_used_blocks / Math.max(1, stats.num_blocks),
    waste: stats.num_allocated_slots ? 1 - stats.num_filled_slots / stats.num_allocated_slots : 0,
    prefill: steps ? gained("total_prompt_tokens") / steps : 0,
    decode: steps ? gained("total_generated_tokens") / steps : 0,
    tokens: gained("total_generated_tokens") / seconds,
    preemptions: gained("total_preemptions"),
    hits: queries ? gained("total_prefix_hits") / queries : null,
    firstToken: mean("first_token"),
    nextToken: mean("next_token"),
  };
}

const REASONS = {
  new: "No earlier prompt begins like this one.",
  differs: "Earlier prompts begin like this one and then continue differently.",
  evicted: "The block was in the cache and had to make room.",
  salt: "The same beginning is there, but belongs to another API key or salt.",
  state: "Its KV is there, but no snapshot of the recurrent state at that place.",
};

/** Why a prompt was not found in the cache, as a sentence. */
export function missText(miss) {
  if (!miss) return "All of the prompt that could be found was found.";
  const [block, reason, ago] = miss;
  const since = ago ? ` ${Math.round(ago)} s ago` : "";
  return `From block ${block} on it was computed. ${REASONS[reason] ?? reason}${reason === "evicted" ? since : ""}`;
}

/** A hue for each slot; neighbours differ. */
export const hueOf = (slot) => (slot * 137.508) % 360;
