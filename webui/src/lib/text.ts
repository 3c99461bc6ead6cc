import { domainOfPart } from "../domains";
import type { Part } from "./types";

/** What a part says, as plain text: thinking and faults are not part of what was said. */
export function textOfPart(part: Part): string {
  if (part.type === "text") return String(part.text ?? "");
  return domainOfPart(part)?.text(part as never) ?? "";
}
