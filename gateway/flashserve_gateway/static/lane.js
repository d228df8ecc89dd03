// One conversation with one model: what it shows, and its requests. Two of them stand side by side in a comparison.

import { streamChat } from "./api.js";
import { Conversation, ROOT } from "./conversation.js";
import { element, renderBlock, splitBlocks } from "./markdown.js";

const RENDER_EVERY_MS = 100; // reading follows no faster, and long answers would make the page slow
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

export class Lane {
  /**
   * `settings` gives what the fields say now; `changed` is called when there is something to keep or a request begins
   * or ends; `say` tells a screen reader.
   */
  constructor(title, settings, { changed, say }) {
    this.settings = settings;
    this.changed = changed;
    this.say = say;
    this.running = null; // the AbortController of the answer that is being written
    this.list = element("ol");
    this.list.className = "messages";
    this.list.tabIndex = 0; // it scrolls, also by keyboard
    this.list.setAttribute("role", "list");
    this.list.setAttribute("aria-label", title);
    this.open(null);
  }

  open(stored) {
    this.stop();
    this.conversation = new Conversation(stored);
    this.showAll();
  }

  stop() {
    this.running?.abort();
  }

  send(content) {
    const parent = this.conversation.path.at(-1) ?? ROOT;
    return this.answer(this.conversation.add({ role: "user", content }, parent));
  }

  async answer(parent) {
    const { conversation } = this, { model } = this.settings();
    const body = this.request(parent);
    const message = conversation.nodes[conversation.add({ role: "assistant", content: "", reasoning: "", model }, parent)];
    const running = this.running = new AbortController();
    this.showAll();
    this.changed();
    const view = this.list.lastElementChild;
    const started = performance.now();
    let first = 0, last = 0, drawn = 0;
    const draw = () => { drawn = performance.now(); showText(view, message); this.follow(); };
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
      this.say("Answer complete.");
    } catch (error) {
      if (running.signal.aborted) message.finish = "stopped";
      else message.error = error.message;
      this.say(message.error ?? "Stopped.");
    }
    this.running = null;
    this.changed();
    draw();
    if (this.conversation === conversation) this.showAll();
  }

  request(parent) {
    const settings = this.settings(), system = settings.system.trim();
    const said = this.conversation.until(parent).filter((message) => !message.error || message.content);
    const body = {
      model: settings.model,
      messages: [...(system ? [{ role: "system", content: system }] : []),
        ...said.map(({ role, content }) => ({ role, content }))],
    };
    for (const name of NUMBERS) if (settings[name] !== "") body[name] = Number(settings[name]);
    return body;
  }

  // --- what is shown -------------------------------------------------------------------------------------------

  showAll() {
    const { conversation, list } = this;
    list.replaceChildren(...conversation.path.map((index) => {
      const message = conversation.nodes[index];
      const view = element("li", element("div"), element("div"));
      view.className = message.role === "user" ? "mine" : "theirs";
      view.children[0].className = "text";
      view.children[1].className = "below";
      showText(view, message);
      this.showBelow(view, message, index);
      return view;
    }));
    list.scrollTop = list.scrollHeight;
  }

  showBelow(view, message, index) {
    const below = view.querySelector(".below");
    below.append(...this.branches(index));
    if (message.role === "user") {
      below.append(this.action("Edit", () => this.edit(view, message)));
      return;
    }
    if (message.error) below.append(Object.assign(element("span", message.error), { className: "error" }));
    const facts = factsOf(message);
    if (facts.length && (message.tokens || message.finish)) below.append(element("span", facts.join(" · ")));
    if (!message.error && !message.finish) return;
    below.append(this.action("Regenerate", () => this.answer(message.parent)));
    if (message.content) below.append(this.action("Copy", () => navigator.clipboard.writeText(message.content)));
  }

  /** Which of the versions of a message this is, and ways to the others. */
  branches(index) {
    const all = this.conversation.siblings(index), at = all.indexOf(index);
    if (all.length < 2) return [];
    const go = (words, sign, to) => {
      const button = this.action(sign, () => {
        this.conversation.choose(all[to]);
        this.changed();
        this.showAll();
        this.say(`Version ${to + 1} of ${all.length}.`);
      });
      button.setAttribute("aria-label", words);
      button.disabled = all[to] === undefined;
      return button;
    };
    const group = element("span", go("Previous version", "‹", at - 1), `${at + 1}/${all.length}`, go("Next version", "›", at + 1));
    group.className = "branches";
    return [group];
  }

  edit(view, message) {
    const field = element("textarea");
    field.value = message.content;
    field.rows = Math.min(8, message.content.split("\n").length + 1);
    field.setAttribute("aria-label", "Edited message");
    const form = element("form", field, element("button", "Send as a new branch"), element("button", "Cancel"));
    form.className = "edit";
    form.children[1].className = "primary";
    form.children[2].type = "button";
    form.children[2].addEventListener("click", () => this.showAll());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const content = field.value.trim();
      if (content) this.answer(this.conversation.add({ role: "user", content }, message.parent));
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.showAll();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
    });
    view.replaceChildren(form);
    field.focus();
  }

  action(name, run) {
    const button = element("button", name);
    button.type = "button";
    button.addEventListener("click", () => { if (!this.running) run(); });
    return button;
  }

  follow() {
    const { list } = this;
    if (list.scrollHeight - list.scrollTop - list.clientHeight < 160) list.scrollTop = list.scrollHeight;
  }
}

function factsOf(message) {
  const facts = [];
  if (message.tokens) facts.push(`${message.tokens} tokens`);
  if (message.per_s) facts.push(`${message.per_s.toFixed(1)} tokens/s`);
  if (message.first_ms) facts.push(`first after ${message.first_ms} ms`);
  if (message.finish === "length") facts.push("cut off at the limit");
  if (message.finish === "stopped") facts.push("stopped");
  if (message.model) facts.push(message.model);
  return facts;
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
