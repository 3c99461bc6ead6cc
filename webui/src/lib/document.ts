// A chat as one document: its branch is a row of pieces, the user's and the model's, that make one text.
import { textOfPart } from "./text";
import type { Place } from "./tree";

export interface Piece {
  place: Place;
  text: string;
  start: number; // where it begins in the text
  written: boolean; // by the model
}

const lineEnds = /\r\n?/g; // a text area knows one kind of them

export function piecesOf(places: Place[]): Piece[] {
  let start = 0;
  return places.map((place) => {
    const { message } = place;
    const text = message.parts.map(textOfPart).join("").replace(lineEnds, "\n");
    start += text.length;
    return { place, text, start: start - text.length, written: message.role === "assistant" };
  });
}

/** Where an edited text leaves the branch: the pieces that still stand as they were, and what comes after them. */
export function edited(pieces: Piece[], text: string): { kept: Piece[]; rest: string } {
  let count = 0;
  while (count < pieces.length && text.startsWith(pieces[count].text, pieces[count].start)) count += 1;
  const kept = pieces.slice(0, count);
  const last = kept.at(-1);
  return { kept, rest: text.slice(last ? last.start + last.text.length : 0) };
}
