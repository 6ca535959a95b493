// Light or dark, and the language, before anything is painted.
"use strict";
const LANGUAGES = ["en", "zh"];

function readSettings() {
  try {
    return JSON.parse(localStorage.getItem("chat.settings")) ?? {};
  } catch {
    return {}; // a browser that keeps nothing, or something else under our name
  }
}

function applyAppearance({ theme, language }) {
  const preferred = (navigator.languages ?? [navigator.language]).map((name) => name.slice(0, 2).toLowerCase());
  const chosen = [language, ...preferred].find((name) => LANGUAGES.includes(name)) ?? "en";
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

applyAppearance(readSettings());
