// The frame: views, and light or dark.

import { startChat } from "./chat.js";
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
}

showTheme();
dark.addEventListener("change", showTheme);
document.getElementById("theme").addEventListener("click", () => {
  localStorage.setItem(THEME, root.dataset.theme === "dark" ? "light" : "dark");
  showTheme();
});
for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => { location.hash = button.dataset.view; });
}
addEventListener("hashchange", () => showView(location.hash.slice(1) || "chat"));
showView(location.hash === "#operations" ? "operations" : "chat");
startChat();
