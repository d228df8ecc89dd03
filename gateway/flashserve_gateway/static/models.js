// Which models are loaded, and the ways to load and unload them.

import { getJson, sendJson } from "./api.js";
import { element } from "./markdown.js";

const PERIOD_MS = 1000;
const $ = (id) => document.getElementById(id);
let timer = null, started = false, shown = "";
const statuses = new Map();

export function watchModels(isShown) {
  clearInterval(timer);
  timer = null;
  if (!isShown) return;
  if (!started) start();
  look();
  timer = setInterval(() => { if (!document.hidden) look(); }, PERIOD_MS);
}

function start() {
  started = true;
  $("load").addEventListener("submit", (event) => { event.preventDefault(); loadFromForm(); });
  $("search").addEventListener("submit", (event) => { event.preventDefault(); search(); });
  $("source").addEventListener("input", () => { $("name").placeholder = nameOf($("source").value) || "its name"; });
}

async function look() {
  try {
    show((await getJson("v1/admin/models")).data);
    if (statuses.size) note("");
    else note("The servers know no model yet.");
  } catch (error) {
    note(error.message);
  }
}

function show(models) {
  for (const model of models) {
    const before = statuses.get(model.id);
    if (before !== undefined && before !== model.status) say(`${model.id}: ${model.status}. ${model.reason}`);
    statuses.set(model.id, model.status);
  }
  const text = JSON.stringify(models);
  if (text === shown) return; // a button that has the focus keeps it
  shown = text;
  const focused = document.activeElement?.dataset?.act;
  $("model-list").replaceChildren(...models.map(card));
  if (focused) $("model-list").querySelector(`[data-act="${CSS.escape(focused)}"]`)?.focus();
}

function card(model) {
  const isBusy = model.status === "loading" || model.status === "unloading";
  const badge = element("span", model.status);
  badge.className = `badge ${model.status}`;
  const head = element("h3", element("span", model.id), badge);
  const buttons = element("div",
    ...(isBusy ? [] : [button(model.status === "ready" ? "Load again" : "Load", model.id, () => load({ name: model.id }))]),
    ...(model.status === "ready" ? [button("Unload", model.id, () => unload(model.id))] : []),
    ...(model.model && !isBusy && model.status !== "ready" ? [button("Forget", model.id, () => unload(model.id))] : []));
  buttons.className = "buttons";
  const node = element("li", element("div", head, element("p", factsOf(model).join(" · "))), buttons);
  if (model.reason) node.firstChild.append(Object.assign(element("p", model.reason), { className: "error" }));
  if (isBusy) {
    const bar = element("progress"); // without a value: Triton does not say how far it is
    bar.setAttribute("aria-label", `${model.id} is ${model.status}`);
    node.firstChild.append(bar);
  }
  return node;
}

function factsOf(model) {
  const facts = [];
  if (model.elapsed_s !== null) facts.push(`${model.status} for ${model.elapsed_s.toFixed(0)} s` + (model.load_s ? ` (${model.load_s.toFixed(0)} s last time)` : ""));
  else if (model.load_s) facts.push(`loaded in ${model.load_s.toFixed(1)} s`);
  if (model.memory) {
    facts.push(`${size(model.memory.model_bytes)} of memory and a KV cache of ${size(model.memory.kv_cache_bytes)}` +
      (model.status === "ready" ? "" : " when it was loaded"));
  } else facts.push(model.status === "ready" ? "memory not known here" : "memory is known once it has been loaded");
  if (model.servers.all > 1) facts.push(`on ${model.servers.ready} of ${model.servers.all} servers`);
  if (model.model) facts.push(`from ${model.model}`);
  return facts;
}

function button(words, name, run) {
  const node = element("button", words);
  node.type = "button";
  node.dataset.act = `${words} ${name}`;
  node.setAttribute("aria-label", `${words} ${name}`);
  node.addEventListener("click", run);
  return node;
}

async function load(body) {
  await act(() => sendJson("POST", "v1/admin/models", body));
}

async function unload(name) {
  await act(() => sendJson("DELETE", `v1/admin/models/${encodeURIComponent(name)}`));
}

async function act(ask) {
  try {
    const model = await ask();
    say(`${model.id}: ${model.status}.`);
    $("models-error").textContent = "";
  } catch (error) {
    $("models-error").textContent = error.message;
  }
  await look();
}

async function loadFromForm() {
  const model = $("source").value.trim(), settings = $("model-settings").value.trim();
  const body = { name: $("name").value.trim() || nameOf(model), model };
  if (settings) {
    try {
      body.settings = JSON.parse(settings);
    } catch {
      $("models-error").textContent = 'Settings are JSON, such as {"max_model_len": 4096}.';
      return;
    }
  }
  await load(body);
}

/** What a model is called if nobody says: the last word of where it is. */
function nameOf(source) {
  const last = source.trim().replace(/^package:/, "").replace(/\/+$/, "").split("/").at(-1);
  return last.replace(/\.gguf$/, "").replace(/[^A-Za-z0-9_.-]+/g, "-").replace(/^[-.]+/, "");
}

async function search() {
  const list = $("found");
  list.setAttribute("aria-busy", "true");
  $("search-note").textContent = "Asking the hub…";
  try {
    const models = (await getJson(`v1/admin/hub?search=${encodeURIComponent($("words").value)}`)).data;
    list.replaceChildren(...models.map(found));
    $("search-note").textContent = `${models.length} models, those with most downloads first.`;
  } catch (error) {
    list.replaceChildren();
    $("search-note").textContent = error.message;
  }
  list.removeAttribute("aria-busy");
}

function found(model) {
  const facts = [model.format];
  if (model.parameters) facts.push(`${count(model.parameters)} parameters`);
  facts.push(model.weight_bytes ? `${size(model.weight_bytes)} of weights` : "several sizes: add :Q4_K_M or another to the id");
  facts.push(`${count(model.downloads)} downloads`);
  if (model.gated) facts.push("its terms must be agreed to first");
  const buttons = element("div", button("Choose", model.id, () => {
    $("source").value = model.id;
    $("name").value = "";
    $("name").placeholder = nameOf(model.id);
    $("source").focus();
  }));
  buttons.className = "buttons";
  return element("li", element("div", element("h3", element("span", model.id)), element("p", facts.join(" · "))), buttons);
}

function count(number) {
  return new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(number);
}

function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(0)} MB`;
}

function note(words) {
  if ($("models-note").textContent !== words) $("models-note").textContent = words;
}

function say(words) {
  $("models-status").textContent = words;
}
