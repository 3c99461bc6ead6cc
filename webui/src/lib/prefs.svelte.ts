// What this browser remembers for its user: looks and settings, never chats.
import type { Settings } from "./types";

export type Theme = "auto" | "light" | "dark";
export type Language = "en" | "zh";

const KEY = "shenhong";

const first = {
  theme: "auto" as Theme,
  language: (navigator.language.startsWith("zh") ? "zh" : "en") as Language,
  marks: true, // tones under verse
  vertical: false, // verse set in columns, right to left
  models: ["", ""] as [string, string],
  settings: [{}, {}] as [Settings, Settings],
  compare: false,
  form: "七绝",
};

function stored(): Partial<typeof first> {
  try {
    return JSON.parse(localStorage.getItem(KEY) ?? "{}");
  } catch {
    return {}; // damaged or forbidden: begin anew
  }
}

export const prefs = $state({ ...first, ...stored() });

/** Keep them, and let the document show them; call inside an effect. */
export function applyPrefs(): void {
  const root = document.documentElement;
  root.lang = prefs.language === "zh" ? "zh-Hans" : "en";
  if (prefs.theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = prefs.theme;
  const paper = getComputedStyle(root).getPropertyValue("--paper").trim();
  document.querySelector('meta[name="theme-color"]')?.setAttribute("content", paper);
  try {
    localStorage.setItem(KEY, JSON.stringify(prefs));
  } catch {
    /* private windows may forbid it; the page works without */
  }
}
