// Verse on the page: poems set with their tones, and the forms to choose from.
import type { Domain } from "..";
import { prefs } from "../../lib/prefs.svelte";
import Forms from "./Forms.svelte";
import type { VersePart } from "./types";
import Verse from "./Verse.svelte";

/** The poem, a line a line; a chat may come from any file. */
function text(part: VersePart): string {
  if (typeof part.text === "string") return part.text;
  const lines = Array.isArray(part.lines) ? part.lines : [];
  return lines.map((line, number) => `${line?.text ?? ""}${line?.stop ?? "，。"[number % 2]}`).join("\n");
}

const verse: Domain = {
  Part: Verse,
  text,
  Options: Forms,
  options: (): Record<string, string> => (prefs.form ? { form: prefs.form } : {}),
  placeholder: () => (prefs.form ? "titlePlaceholder" : null),
  welcome: "welcomeVerse",
  welcomeNote: "welcomeVerseNote",
  suggestions: ["长城", "春夜", "秋思", "江上送别", "登高", "听雨"],
  plain: true,
};

export default verse;
