// What the engines do, from one answer per second that all pages share.

import { getJson } from "./api.js";
import { batchPicture } from "./batch.js";
import { element } from "./markdown.js";

const PERIOD_MS = 1000, KEPT = 120;
const $ = (id) => document.getElementById(id);
let batches = {};
const history = new Map(); // by model: what was read, with its time
let timer = null;

export function watchOperations(isShown) {
  clearInterval(timer);
  timer = null;
  if (isShown) {
    look();
    timer = setInterval(() => { if (!document.hidden) look(); }, PERIOD_MS);
  }
}

async function look() {
  try {
    const answer = await getJson("operations"), { models, note } = answer;
    batches = answer.batches;
    $("operations-note").textContent = note;
    const now = performance.now() / 1000;
    for (const name of history.keys()) if (!(name in models)) history.delete(name);
    for (const [name, values] of Object.entries(models)) {
      const rows = history.get(name) ?? [];
      rows.push({ now, ...values });
      if (rows.length > KEPT) rows.shift();
      history.set(name, rows);
    }
    show();
  } catch (error) {
    $("operations-note").textContent = error.message;
  }
}

function show() {
  const names = [...new Set([...history.keys(), ...Object.keys(batches)])].sort();
  $("figures").replaceChildren(...names.map((name) => {
    const card = history.has(name) ? modelCard(name, history.get(name)) : element("section", element("h2", name));
    card.className = "model";
    if (batches[name]) card.append(batchPicture(batches[name]));
    return card;
  }));
}

function modelCard(name, rows) {
  const last = rows.at(-1), then = rows[Math.max(0, rows.length - 6)];
  const rates = rows.map((row, index) => index ? rate(rows[index - 1], row, "generated") : 0);
  const running = rows.map((row) => row.running);
  const first = percentiles(rows[0], last, "ttft"), between = percentiles(rows[0], last, "itl");
  const card = element("section",
    element("h2", name),
    tiles([
      ["Running", last.running], ["Waiting", last.waiting],
      ["KV blocks in use", percent(last.kv_usage)],
      ["Prefix cache hits", last.queries ? percent(last.hits / last.queries) : "–"],
      ["Tokens", rate(then, last, "generated").toFixed(0), "/s"],
      ["First token, median", first[0], " ms"], ["First token, p95", first[1], " ms"],
      ["Between tokens, median", between[0], " ms"],
    ]),
    chart("Tokens per second", rates), chart("Running requests", running));
  const charts = element("div", ...card.querySelectorAll("figure"));
  charts.className = "charts";
  card.append(charts);
  return card;
}

function tiles(rows) {
  const list = element("dl", ...rows.map(([name, value, unit]) =>
    element("div", element("dt", name), element("dd", String(value), ...(unit && value !== "–" ? [element("small", unit)] : [])))));
  list.className = "tiles";
  return list;
}

function percent(share) {
  return `${(share * 100).toFixed(0)}%`;
}

function rate(before, after, name) {
  return after.now > before.now ? Math.max(0, after[name] - before[name]) / (after.now - before.now) : 0;
}

/** Median and 95th percentile, in milliseconds, of a histogram's values since `before`; of all if there are none. */
function percentiles(before, after, name) {
  const end = after[name];
  if (!end.length) return ["–", "–"];
  const start = before[name] ?? [];
  let counts = end.map(([edge, count], index) => [edge, count - (start[index]?.[1] ?? 0)]);
  if (!counts.at(-1)[1]) counts = end;
  const total = counts.at(-1)[1];
  return total ? [0.5, 0.95].map((share) => quantile(counts, share * total)) : ["–", "–"];
}

function quantile(counts, target) {
  let low = 0, below = 0;
  for (const [edge, count] of counts) {
    if (count >= target) {
      const high = edge ?? low;
      const value = (low + (high - low) * (target - below) / Math.max(count - below, 1)) * 1000;
      return value < 10 ? value.toFixed(1) : value.toFixed(0);
    }
    low = edge;
    below = count;
  }
  return "–";
}

function chart(title, values) {
  const top = Math.max(1, ...values), width = KEPT - 1, height = 60;
  const points = values.map((value, index) => [index + KEPT - values.length, height - value / top * (height - 4)]);
  const line = points.map(([x, y], index) => `${index ? "L" : "M"}${x},${y.toFixed(1)}`).join("");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "chart");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title}: ${values.at(-1).toFixed(0)} now, ${top.toFixed(0)} at most in two minutes`);
  for (const [kind, path] of [["area", `${line}L${width},${height}L${points[0][0]},${height}Z`], ["line", line]]) {
    const node = document.createElementNS(svg.namespaceURI, "path");
    node.setAttribute("class", kind);
    node.setAttribute("d", path);
    svg.append(node);
  }
  return element("figure", element("figcaption", element("span", title), element("span", `max ${top.toFixed(0)}`)), svg);
}
