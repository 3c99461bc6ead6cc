import type { Part } from "./types";

/** What a part says, as plain text: thinking and faults are not part of what was said. */
export function textOfPart(part: Part): string {
  if (part.type === "text") return part.text;
  if (part.type !== "verse") return "";
  const lines = part.lines.map(({ text, stop }, number) => text + (stop ?? "，。"[number % 2]));
  return part.text ?? lines.join("\n");
}
