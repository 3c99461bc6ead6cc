import type { Part } from "./types";

/** What a part says, as plain text: thinking and faults are not part of what was said. */
export function textOfPart(part: Part): string {
  if (part.type !== "text" && part.type !== "verse") return "";
  if (typeof part.text === "string" || part.type === "text") return String(part.text ?? "");
  const lines = Array.isArray(part.lines) ? part.lines : []; // a chat may come from any file
  return lines.map((line, number) => `${line?.text ?? ""}${line?.stop ?? "，。"[number % 2]}`).join("\n");
}
