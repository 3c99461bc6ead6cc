// The shapes the server sends; the one place that names them. Times are Unix seconds.

import type { VersePart } from "../domains/verse/types";

export type Part =
  | { type: "text"; text: string }
  | { type: "reasoning"; text: string }
  | VersePart
  | { type: "error"; message: string };

export interface Settings {
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  max_tokens?: number;
  seed?: number;
  stop?: string[];
  plain?: boolean; // the texts are one document, which the model goes on with
}

export interface Target {
  model: string;
  settings: Settings;
}

export interface Message {
  id: string;
  chat: string;
  parent: string | null;
  role: "user" | "assistant";
  parts: Part[];
  model?: string | null;
  settings?: Settings | null;
  job?: string | null;
  state: "done" | "running" | "stopped" | "error";
  created: number;
  usage?: { prompt_tokens: number; completion_tokens: number; cached_tokens?: number } | null;
  timing?: { first_token_ms?: number | null; tokens_per_second?: number | null } | null;
}

export interface ChatLine {
  id: string;
  title: string;
  created: number;
  updated: number;
  snippet?: string | null;
}

export interface Chat extends ChatLine {
  leaf: string | null;
  messages: Message[];
}

export interface Model {
  id: string;
  name: string;
  context: number;
  template_thinking: boolean;
  chat: boolean; // whether it learnt to answer
  domain: { name: string; options: { name: string; choices: string[] }[] };
  defaults: Settings;
  facts?: Record<string, unknown> | null;
}

export interface Bootstrap {
  version: string;
  models: Model[];
  auth: "none" | "key";
  runs: boolean;
}

export interface RunLine {
  id: string;
  name: string;
  state: string;
  stage: string | null;
  progress: number | null;
}

export interface RunSoFar {
  series: Record<string, Record<string, unknown>[]>; // events by kind, thinned
  offset: number; // the byte at which following goes on
}

export interface Change {
  kind: "chat" | "message" | "deleted";
  chat: string;
  message?: Message;
}
