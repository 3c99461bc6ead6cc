// A chat is a tree of messages; what is read is the branch from the root to its `leaf`.
import type { Message } from "./types";

/** One place of the branch: the message shown, and all that could stand there. */
export interface Place {
  message: Message;
  versions: Message[]; // the siblings, oldest first; of answers made at once only the first
  together: Message[]; // the answers made at once with `message`, itself among them
}

/** Answers of one turn are created within microseconds; a second try comes later than that. */
const TOGETHER = 0.001; // seconds

function groups(siblings: Message[]): Message[][] {
  const found: Message[][] = [];
  for (const message of siblings) {
    const last = found.at(-1);
    if (last && message.role === "assistant" && message.created - last[0].created < TOGETHER) last.push(message);
    else found.push([message]);
  }
  return found;
}

export function children(messages: Message[]): Map<string | null, Message[]> {
  const byParent = new Map<string | null, Message[]>();
  for (const message of messages) {
    const siblings = byParent.get(message.parent);
    if (siblings) siblings.push(message);
    else byParent.set(message.parent, [message]);
  }
  for (const siblings of byParent.values()) siblings.sort((a, b) => a.created - b.created);
  return byParent;
}

/** The newest leaf below a message: where its branch was last left. */
export function leafOf(messages: Message[], from: string): string {
  const byParent = children(messages);
  let id = from;
  for (let below = byParent.get(id); below?.length; below = byParent.get(id)) id = below.at(-1)!.id;
  return id;
}

/** The branch that ends at `leaf` (or, without one, at the newest message). */
export function branch(messages: Message[], leaf: string | null): Place[] {
  const byId = new Map(messages.map((message) => [message.id, message]));
  const byParent = children(messages);
  let message = leaf ? byId.get(leaf) : messages.at(-1);
  const path: Place[] = [];
  const seen = new Set<string>();
  while (message && !seen.has(message.id)) {
    seen.add(message.id); // a damaged tree must not hang the page
    const grouped = groups(byParent.get(message.parent) ?? [message]);
    const together = grouped.find((group) => group.includes(message!)) ?? [message];
    path.push({ message, versions: grouped.map((group) => (group === together ? message! : group[0])), together });
    message = message.parent ? byId.get(message.parent) : undefined;
  }
  return path.reverse();
}
