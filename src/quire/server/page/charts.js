// Small charts over the last minutes, as SVG with a sentence for screen readers.

import { h, short, svg } from "./dom.js";

const WIDTH = 220;
const HEIGHT = 44;
const SPAN_MS = 60_000;
const SHORTEST_SPAN_MS = 5_000;

const percent = (value) => `${short(100 * value)} %`;
const CHARTS = [
  {
    title: "Requests",
    lines: [
      ["running", "running"],
      ["waiting", "waiting"],
    ],
    show: short,
  },
  {
    title: "Tokens a step",
    lines: [
      ["prefill", "prefill"],
      ["decode", "decode"],
    ],
    show: short,
    most: "max_step_tokens",
  },
  { title: "Generated tokens/s", lines: [["tokens", ""]], show: short },
  { title: "Blocks in use", lines: [["used", ""]], show: percent, top: 1 },
  { title: "Waste", lines: [["waste", ""]], show: percent },
  { title: "Prefix hits", lines: [["hits", ""]], show: percent, top: 1 },
  { title: "First token, ms", lines: [["firstToken", ""]], show: short },
  { title: "Between tokens, ms", lines: [["nextToken", ""]], show: short },
  { title: "Preemptions", lines: [["preemptions", ""]], show: short },
];

export class Charts {
  constructor() {
    this.charts = CHARTS.map((chart) => {
      const drawing = svg("svg", {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        role: "img",
        preserveAspectRatio: "none",
        "aria-label": chart.title,
      });
      const number = h("strong");
      return {
        ...chart,
        drawing,
        number,
        element: h("figure", {}, h("figcaption", {}, `${chart.title} `, number), drawing),
      };
    });
    this.span = h("p", { class: "hint" });
    this.element = h(
      "div",
      {},
      h(
        "div",
        { class: "charts" },
        this.charts.map(({ element }) => element),
      ),
      this.span,
    );
  }

  draw(pool, now) {
    const points = pool.points.filter(({ at }) => now - at < SPAN_MS);
    const span = Math.min(SPAN_MS, Math.max(SHORTEST_SPAN_MS, now - (points[0]?.at ?? now)));
    this.span.textContent = `The charts show the last ${short(span / 1000)} seconds.`;
    for (const chart of this.charts) {
      const values = points.flatMap((point) => chart.lines.map(([name]) => point[name] ?? 0));
      const top = chart.top ?? Math.max(1e-9, ...values);
      const paths = chart.lines.map(([name], index) =>
        svg("path", { class: `line${index}`, d: pathOf(points, name, top, now, span) }),
      );
      chart.number.textContent = chart.lines
        .map(([name, label]) => `${label} ${latest(points, name, chart.show)}`.trim())
        .join(", ");
      if (chart.most) chart.number.textContent += ` of ${short(pool.shape[chart.most])}`;
      chart.drawing.setAttribute("aria-label", `${chart.title}: ${chart.number.textContent}`);
      chart.drawing.replaceChildren(...paths);
    }
  }
}

function latest(points, name, show) {
  const point = points.findLast((each) => each[name] !== null && each[name] !== undefined);
  return point ? show(point[name]) : "–";
}

/** The line of one number over the last `span` milliseconds. It is a staircase: a value holds until the next one. */
export function pathOf(points, name, top, now, span) {
  let path = "";
  for (const point of points) {
    if (point[name] === null || point[name] === undefined) continue;
    const x = WIDTH * (1 - (now - point.at) / span);
    const y = HEIGHT - 2 - (HEIGHT - 4) * Math.min(1, point[name] / top);
    path += path ? `H${x.toFixed(1)}V${y.toFixed(1)}` : `M${x.toFixed(1)} ${y.toFixed(1)}`;
  }
  return path && `${path}H${WIDTH}`;
}
