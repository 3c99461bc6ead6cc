// What the page knows of kinds of text: one folder each, found here by the name of its domain, which is the type of its part.
// A model of any other kind is talked to in plain prose.
import type { Component } from "svelte";
import type { Model, Part } from "../lib/types";
import type { Word } from "../lib/words";
import verse from "./verse";

export interface Domain {
  Part: Component<any>; // draws a part of its type: { part }
  text: (part: never) => string; // the same as plain text
  Options: Component<{ model: Model; onpick: () => void }>; // choices above the composer
  options: () => Record<string, string>; // what is chosen now, sent with a text
  placeholder: () => Word | null; // of the composer, where what is chosen asks for another
  welcome: Word;
  welcomeNote: Word;
  suggestions: string[]; // to begin with
  plain: boolean; // an answer's lines are shown as they are while they come
}

const DOMAINS: Record<string, Domain> = { verse };

export const domainOf = (model?: Model): Domain | undefined => (model ? DOMAINS[model.domain.name] : undefined);
export const domainOfPart = (part: Part): Domain | undefined => (Object.hasOwn(DOMAINS, part.type) ? DOMAINS[part.type] : undefined);
