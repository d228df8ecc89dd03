// The batch over time: each request a bar, as it ran and as static batches would have run the same ones.

import { element } from "./markdown.js";

const WIDTH = 1000, MOST_HEIGHT = 220;
const PARTS = [["wait", 0, 1], ["prefill", 1, 2], ["decode", 2, 3], ["idle", 3, 4]]; // from and to, in a row
const LEGEND = [["wait", "waits"], ["prefill", "prompt is read (prefill)"], ["decode", "answer is written (decode)"],
  ["idle", "place held, nothing done"]];

/** `picture`: an entry of /operations' `batches`. */
export function batchPicture({ size, continuous, static: batched }) {
  const all = [...continuous, ...batched];
  const from = Math.min(...all.map((row) => row[0])), to = Math.max(...all.map((row) => row[4]));
  const scale = { from, span: Math.max(to - from, 0.001) };
  const node = element("div",
    figure("Continuous batching, as it ran", continuous, scale),
    figure(`Static batches of ${size}, the same requests`, batched, scale));
  node.className = "batches";
  const legend = element("p", ...LEGEND.map(([kind, words]) => {
    const mark = element("span", "");
    mark.className = `mark ${kind}`;
    return element("span", mark, words);
  }));
  legend.className = "legend";
  return element("div", node, legend);
}

function figure(title, rows, { from, span }) {
  const took = Math.max(...rows.map((row) => row[4])) - Math.min(...rows.map((row) => row[0]));
  const first = rows.reduce((sum, row) => sum + row[2] - row[0], 0) / rows.length;
  const words = `${seconds(took)} in all, first token after ${seconds(first)} on average`;
  const height = Math.max(3, Math.min(14, MOST_HEIGHT / rows.length));
  const svg = svgNode("svg", { class: "batch", viewBox: `0 0 ${WIDTH} ${height * rows.length}`, preserveAspectRatio: "none", role: "img" });
  svg.style.height = `${height * rows.length}px`;
  svg.setAttribute("aria-label", `${title}: ${rows.length} requests, ${words}`);
  rows.forEach((row, number) => {
    for (const [kind, begin, end] of PARTS) {
      const x = (row[begin] - from) / span * WIDTH, width = (row[end] - row[begin]) / span * WIDTH;
      if (width > 0) {
        svg.append(svgNode("rect", { class: kind, x: x.toFixed(2), y: number * height + height * 0.1,
          width: width.toFixed(2), height: height * 0.8 }));
      }
    }
  });
  return element("figure", element("figcaption", element("span", title), element("span", words)), svg);
}

function seconds(value) {
  return value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(1)} s`;
}

function svgNode(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}
