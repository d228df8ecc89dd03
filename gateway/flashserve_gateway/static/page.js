// The frame: views, and light or dark.

import { listModels, startChat } from "./chat.js";
import { watchModels } from "./models.js";
import { watchOperations } from "./operations.js";

const THEME = "flashserve.theme";
const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");

function showTheme() {
  const theme = localStorage.getItem(THEME) ?? (dark.matches ? "dark" : "light");
  root.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function showView(name) {
  for (const view of document.querySelectorAll("main")) view.hidden = view.id !== name;
  for (const button of document.querySelectorAll("nav button")) {
    if (button.dataset.view === name) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  watchOperations(name === "operations");
  watchModels(name === "models");
  if (name === "chat" && hasStarted) listModels();
}

function viewOfHash() {
  const name = location.hash.slice(1);
  return document.querySelector(`nav button[data-view="${CSS.escape(name)}"]`) ? name : "chat";
}

let hasStarted = false;
showTheme();
dark.addEventListener("change", showTheme);
document.getElementById("theme").addEventListener("click", () => {
  localStorage.setItem(THEME, root.dataset.theme === "dark" ? "light" : "dark");
  showTheme();
});
for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => { location.hash = button.dataset.view; });
}
addEventListener("hashchange", () => showView(viewOfHash()));
showView(viewOfHash());
await startChat();
hasStarted = true;
