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

type Check = (value: unknown) => boolean;
const oneOf = (...values: unknown[]): Check => (value) => values.includes(value);
const kind = (name: string): Check => (value) => typeof value === name;
const pair = (each: Check): Check => (value) => Array.isArray(value) && value.length === 2 && value.every(each);
const setting = ([name, value]: [string, unknown]) =>
  name === "stop" ? Array.isArray(value) && value.every(kind("string")) : typeof value === "number";
const settings: Check = (value) =>
  typeof value === "object" && value !== null && !Array.isArray(value) && Object.entries(value).every(setting);

const sound: Record<keyof typeof first, Check> = {
  theme: oneOf("auto", "light", "dark"),
  language: oneOf("en", "zh"),
  marks: kind("boolean"),
  vertical: kind("boolean"),
  models: pair(kind("string")),
  settings: pair(settings),
  compare: kind("boolean"),
  form: oneOf("", "五绝", "七绝", "五律", "七律"),
};

/** What was kept, where it is what this page would keep: another version or a hand may have written it. */
function stored(): Partial<typeof first> {
  try {
    const found = Object.entries(JSON.parse(localStorage.getItem(KEY) ?? "{}") ?? {});
    return Object.fromEntries(found.filter(([name, value]) => Object.hasOwn(sound, name) && sound[name as keyof typeof first](value)));
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
