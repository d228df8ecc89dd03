// The conversation: it stays in this browser, and each answer is one request to the API.

import { getJson, streamChat } from "./api.js";
import { element, renderBlock, splitBlocks } from "./markdown.js";

const RENDER_EVERY_MS = 100; // reading follows no faster, and long answers would make the page slow
const STORED = "flashserve.chat", STORED_SETTINGS = "flashserve.settings";
const SETTINGS = ["model", "system", "temperature", "top_p", "max_tokens", "seed"];
const $ = (id) => document.getElementById(id);

let messages = JSON.parse(localStorage.getItem(STORED) || "[]");
let running = null; // the AbortController of the answer that is being written

export async function startChat() {
  restoreSettings();
  showAll();
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); running ? running.abort() : send(); });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!running) send(); }
    if (event.key === "Escape" && running) running.abort();
  });
  $("message").addEventListener("input", grow);
  $("new").addEventListener("click", () => { running?.abort(); messages = []; save(); showAll(); $("message").focus(); });
  $("export").addEventListener("click", exportConversation);
  $("key").addEventListener("change", listModels);
  for (const id of SETTINGS) $(id).addEventListener("change", saveSettings);
  if (matchMedia("(max-width: 800px)").matches) $("settings").open = false;
  await listModels();
}

async function listModels() {
  try {
    const names = (await getJson("v1/models")).data.map((model) => model.id);
    const wanted = JSON.parse(localStorage.getItem(STORED_SETTINGS) || "{}").model;
    $("model").replaceChildren(...names.map((name) => element("option", name)));
    if (names.includes(wanted)) $("model").value = wanted;
    if (!names.length) say("No model is ready yet.");
  } catch (error) {
    say(error.message);
    if (error.status === 401) { $("settings").open = true; $("key").focus(); }
  }
}

function send() {
  const content = $("message").value.trim();
  if (!content) return;
  $("message").value = "";
  grow();
  messages.push({ role: "user", content });
  answer();
}

async function answer() {
  if (!$("model").value) await listModels();
  const message = { role: "assistant", content: "", reasoning: "", model: $("model").value };
  const body = request(message.model);
  messages.push(message);
  showAll();
  const view = $("messages").lastElementChild;
  running = new AbortController();
  toggle();
  const started = performance.now();
  let first = 0, last = 0, drawn = 0;
  const draw = () => { drawn = performance.now(); showText(view, message); follow(); };
  try {
    for await (const chunk of streamChat(body, running.signal)) {
      const delta = chunk.choices[0]?.delta ?? {};
      if (chunk.choices[0]?.finish_reason) message.finish = chunk.choices[0].finish_reason;
      if (chunk.usage) message.tokens = chunk.usage.completion_tokens;
      if (delta.content || delta.reasoning) { last = performance.now(); first ||= last; }
      message.content += delta.content ?? "";
      message.reasoning += delta.reasoning ?? "";
      if (performance.now() - drawn > RENDER_EVERY_MS) draw();
    }
    message.first_ms = Math.round(first - started);
    if (message.tokens > 1 && last > first) message.per_s = (message.tokens - 1) / (last - first) * 1000;
    say("Answer complete.");
  } catch (error) {
    if (running.signal.aborted) message.finish = "stopped";
    else message.error = error.message;
    say(message.error ?? "Stopped.");
  }
  running = null;
  toggle();
  save();
  draw();
  showBelow(view, message, messages.indexOf(message));
  follow();
}

function request(model) {
  const system = $("system").value.trim();
  const said = messages.filter((message) => !message.error || message.content);
  const body = {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []),
      ...said.map(({ role, content }) => ({ role, content }))],
  };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  return body;
}

// --- what is shown ---------------------------------------------------------------------------------------------

function showAll() {
  $("messages").replaceChildren(...messages.map((message, index) => {
    const view = element("li", element("div"), element("div"));
    view.className = message.role === "user" ? "mine" : "theirs";
    view.children[0].className = "text";
    view.children[1].className = "below";
    showText(view, message);
    showBelow(view, message, index);
    return view;
  }));
  $("welcome").hidden = messages.length > 0;
  $("messages").scrollTop = $("messages").scrollHeight;
}

function showText(view, message) {
  const text = view.querySelector(".text");
  if (message.role === "user") { text.textContent = message.content; return; }
  text.classList.toggle("waiting", !message.content && !message.error && message.finish === undefined);
  showReasoning(view, message);
  const blocks = splitBlocks(message.content), known = text.blocks ?? [];
  for (let index = 0; index < blocks.length; index++) {
    if (blocks[index] === known[index]) continue;
    const node = renderBlock(blocks[index]);
    if (text.children[index]) text.children[index].replaceWith(node); else text.append(node);
  }
  while (text.children.length > blocks.length) text.lastElementChild.remove();
  text.blocks = blocks;
}

function showReasoning(view, message) {
  if (!message.reasoning) return;
  let box = view.querySelector(".reasoning");
  if (!box) {
    box = element("details", element("summary", "Reasoning"), element("div"));
    box.className = "reasoning";
    box.open = !message.content;
    view.prepend(box);
  }
  box.lastElementChild.textContent = message.reasoning;
}

function showBelow(view, message, index) {
  const below = view.querySelector(".below");
  below.replaceChildren();
  const action = (name, run) => {
    const button = element("button", name);
    button.type = "button";
    button.addEventListener("click", () => { if (!running) run(); });
    below.append(button);
  };
  if (message.role === "user") {
    action("Edit", () => {
      $("message").value = message.content;
      messages = messages.slice(0, index);
      save(); showAll(); grow(); $("message").focus();
    });
    return;
  }
  if (message.error) below.append(Object.assign(element("span", message.error), { className: "error" }));
  const facts = [];
  if (message.tokens) facts.push(`${message.tokens} tokens`);
  if (message.per_s) facts.push(`${message.per_s.toFixed(1)} tokens/s`);
  if (message.first_ms) facts.push(`first after ${message.first_ms} ms`);
  if (message.finish === "length") facts.push("cut off at the limit");
  if (message.finish === "stopped") facts.push("stopped");
  if (message.model) facts.push(message.model);
  if (facts.length && (message.tokens || message.finish)) below.append(element("span", facts.join(" · ")));
  if (message.error || message.finish) {
    action("Regenerate", () => { messages = messages.slice(0, index); answer(); });
    if (message.content) action("Copy", () => navigator.clipboard.writeText(message.content));
  }
}

function follow() {
  const list = $("messages");
  if (list.scrollHeight - list.scrollTop - list.clientHeight < 160) list.scrollTop = list.scrollHeight;
}

function grow() {
  const field = $("message");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function toggle() {
  $("send").textContent = running ? "Stop" : "Send";
}

function say(words) {
  $("status").textContent = words;
  if (!messages.length) $("welcome").textContent = words;
}

// --- what is kept ----------------------------------------------------------------------------------------------

function save() {
  localStorage.setItem(STORED, JSON.stringify(messages));
}

function saveSettings() {
  localStorage.setItem(STORED_SETTINGS, JSON.stringify(Object.fromEntries(SETTINGS.map((id) => [id, $(id).value]))));
}

function restoreSettings() {
  const stored = JSON.parse(localStorage.getItem(STORED_SETTINGS) || "{}");
  for (const id of SETTINGS) if (stored[id] !== undefined && id !== "model") $(id).value = stored[id];
}

function exportConversation() {
  const file = new Blob([JSON.stringify({ messages }, null, 2)], { type: "application/json" });
  const link = Object.assign(element("a"), { href: URL.createObjectURL(file), download: "conversation.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
