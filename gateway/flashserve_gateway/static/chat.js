// The chat: one conversation, or two side by side. They stay in this browser; each answer is one request to the API.

import { getJson } from "./api.js";
import { Lane } from "./lane.js";
import { element } from "./markdown.js";

const STORED = "flashserve.chat", STORED_SETTINGS = "flashserve.settings";
const $ = (id) => document.getElementById(id);
const lanes = [];

export async function startChat() {
  addLane();
  const stored = read(STORED);
  const conversations = Array.isArray(stored?.lanes) ? stored.lanes : [];
  for (let number = 1; number < Math.min(conversations.length, 2); number++) addLane();
  lanes.forEach((lane, number) => lane.open(conversations[number]));
  changed();
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); isRunning() ? stop() : send(); });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!isRunning()) send(); }
    if (event.key === "Escape") stop();
  });
  $("message").addEventListener("input", grow);
  $("new").addEventListener("click", () => { for (const lane of lanes) lane.open(null); changed(); $("message").focus(); });
  $("export").addEventListener("click", exportConversation);
  $("compare").addEventListener("change", () => { $("compare").checked ? compare() : lanes.pop().stop(); changed(); });
  $("key").addEventListener("change", listModels);
  if (matchMedia("(max-width: 800px)").matches) $("settings").open = false;
  await listModels();
}

/** Fills the choices of models; to be called again when they may be others. */
export async function listModels() {
  try {
    const names = (await getJson("v1/models")).data.map((model) => model.id);
    for (const [number, lane] of lanes.entries()) {
      const field = lane.fields.model, wanted = field.value || (read(STORED_SETTINGS) ?? [])[number]?.model;
      field.replaceChildren(...names.map((name) => element("option", name)));
      if (names.includes(wanted)) field.value = wanted;
    }
    if (!names.length) say("No model is ready yet. The view Models loads one.");
  } catch (error) {
    say(error.message);
    if (error.status === 401) { $("settings").open = true; $("key").focus(); }
  }
}

// --- lanes -----------------------------------------------------------------------------------------------------

function addLane() {
  const number = lanes.length, title = number ? "Conversation B" : "Conversation A";
  const panel = $("lane-settings").content.firstElementChild.cloneNode(true);
  panel.querySelector("legend").textContent = number ? "B" : "A";
  $("panels").append(panel);
  const fields = Object.fromEntries([...panel.querySelectorAll("[name]")].map((field) => [field.name, field]));
  const kept = (read(STORED_SETTINGS) ?? [])[number] ?? {};
  for (const [name, field] of Object.entries(fields)) {
    if (name !== "model" && kept[name] !== undefined) field.value = kept[name];
    field.addEventListener("change", saveSettings);
  }
  const settings = () => Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value]));
  const lane = new Lane(title, settings, { changed, say });
  Object.assign(lane, { fields, panel });
  lanes.push(lane);
  return lane;
}

/** A second conversation that begins as the first one is, with the same settings. */
function compare() {
  const [first] = lanes, second = addLane();
  second.fields.model.replaceChildren(...[...first.fields.model.options].map((option) => element("option", option.value)));
  for (const [name, field] of Object.entries(second.fields)) field.value = first.fields[name].value;
  const other = [...second.fields.model.options].find((option) => option.value !== first.fields.model.value);
  if (other) second.fields.model.value = other.value;
  second.open(JSON.parse(JSON.stringify(first.conversation)));
  $("settings").open = true;
  saveSettings();
}

function isRunning() {
  return lanes.some((lane) => lane.running);
}

function stop() {
  for (const lane of lanes) lane.stop();
}

async function send() {
  const content = $("message").value.trim();
  if (!content) return;
  if (!lanes[0].fields.model.value) await listModels();
  $("message").value = "";
  grow();
  for (const lane of lanes) lane.send(content);
}

/** Shows and keeps what has changed. */
function changed() {
  const two = lanes.length > 1;
  for (const panel of [...$("panels").children]) if (!lanes.some((lane) => lane.panel === panel)) panel.remove();
  const lists = lanes.map((lane) => lane.list);
  if (lists.length !== $("lanes").children.length) $("lanes").replaceChildren(...lists);
  $("lanes").classList.toggle("two", two);
  $("panels").classList.toggle("two", two);
  $("compare").checked = two;
  $("send").textContent = isRunning() ? "Stop" : "Send";
  const isEmpty = lanes.every((lane) => !lane.conversation.nodes.length);
  $("welcome").hidden = !isEmpty;
  $("lanes").hidden = isEmpty;
  try {
    localStorage.setItem(STORED, JSON.stringify({ lanes: lanes.map((lane) => lane.conversation) }));
  } catch {
    say("This conversation is too long for the browser to keep it.");
  }
}

function grow() {
  const field = $("message");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function say(words) {
  $("status").textContent = words;
  if (lanes.every((lane) => !lane.conversation.nodes.length)) $("welcome").textContent = words;
}

// --- what is kept ----------------------------------------------------------------------------------------------

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch { // not ours
    return null;
  }
}

function saveSettings() {
  localStorage.setItem(STORED_SETTINGS, JSON.stringify(lanes.map((lane) => lane.settings())));
}

function exportConversation() {
  const conversations = lanes.map((lane) => ({
    settings: lane.settings(),
    messages: lane.conversation.path.map((index) => lane.conversation.nodes[index]),
    branches: lane.conversation, // with what is not shown
  }));
  const file = new Blob([JSON.stringify({ conversations }, null, 2)], { type: "application/json" });
  const link = Object.assign(element("a"), { href: URL.createObjectURL(file), download: "conversation.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
