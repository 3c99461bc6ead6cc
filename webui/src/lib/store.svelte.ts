// The state of the page. The server is the source of truth: this is its picture, kept fresh by two
// kinds of streams, /api/events for what changes anywhere and one stream a running answer.
import { api, ApiError, PAGE } from "./api";
import { messageOf } from "./faults";
import { prefs } from "./prefs.svelte";
import { follow } from "./sse";
import { branch, leafOf } from "./tree";
import type { Bootstrap, Change, Chat, ChatLine, Message, Model, Part, Target } from "./types";
import { t } from "./words";

export const store = $state({
  boot: null as Bootstrap | null,
  link: "connecting" as "connecting" | "online" | "offline" | "locked",
  chats: [] as ChatLine[],
  search: "",
  found: null as ChatLine[] | null, // the answer to `search`
  more: false, // whether there are chats older than these
  moreFound: false,
  chat: null as Chat | null,
  missing: false, // the chat asked for is not there
  wanted: null as string | null, // the chat asked for
  draft: "", // what is being written, wherever the page goes meanwhile
  edits: {} as Record<string, string>, // documents that were changed and not kept yet, by chat
  turns: 0, // how many were asked for on this page
  announcement: "", // the one polite announcement
  fault: "", // the last thing that went wrong, for the user to read
});

const streams = new Map<string, () => void>(); // by job
let changes: (() => void) | null = null;

export const path = () => (store.chat ? branch(store.chat.messages, store.chat.leaf) : []);
export const running = () => (store.chat?.messages ?? []).filter((message) => message.state === "running");
export const model = (side: 0 | 1 = 0): Model | undefined =>
  store.boot?.models.find((each) => each.id === prefs.models[side]) ?? store.boot?.models[0];

/** Whether the page is a document to go on with: what was written so, or what a model that learnt no answers begins. */
export function writing(): boolean {
  const answers = store.chat?.messages.filter(({ role }) => role === "assistant") ?? [];
  return answers.length ? answers.some(({ settings }) => settings?.plain) : model()?.chat === false;
}

/** Say something once, to those who listen instead of look. */
function announce(text: string): void {
  store.announcement = "";
  setTimeout(() => (store.announcement = text), 50);
}

let ofUser = false; // whether what is shown as wrong came of something the user did

function fail(message: string, user: boolean): void {
  store.fault = message;
  ofUser = user;
}

/** Run a request; what goes wrong is shown, and the state of the link kept. A user's fault stays until
 * the user's next request: what the page reads by itself would take it away unread. */
async function attempt<T>(work: () => Promise<T>, user = true): Promise<T | undefined> {
  try {
    const result = await work();
    if (user || !ofUser) store.fault = "";
    return result;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 0) lost();
    else if (error.status === 401) lock();
    else fail(messageOf(error), user);
  }
}

// ---- the link --------------------------------------------------------------------------------

let retry: ReturnType<typeof setTimeout> | undefined;

function lost(): void {
  store.link = "offline";
  clearTimeout(retry);
  retry = setTimeout(connect, 2000);
}

/** The key no longer opens: nothing of what it opened stays on the screen. The chat comes back with a key. */
function lock(): void {
  changes?.();
  changes = null;
  leave();
  [store.boot, store.chats, store.found] = [null, [], null];
  store.link = "locked";
}

export async function connect(): Promise<void> {
  clearTimeout(retry);
  const boot = await attempt(api.bootstrap, false);
  if (!boot) {
    if (store.link !== "locked") lost(); // also when the server answers, but not well
    return;
  }
  store.boot = boot;
  store.link = "online";
  changes ??= follow("/api/events", { onevent: changed, onopen: caughtUp, onlost: (status) => {
    if (status === 401) lock();
    else if (store.link === "online") lost();
  } });
  await caughtUp();
}

/** Enter with a key. What stands in the way, for the user to read; nothing when the page is in. */
export async function login(key: string): Promise<string> {
  try {
    await api.login(key);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 0) return t("noServer");
    return error.status === 401 ? t("wrongKey") : error.status === 429 ? t("tooManyTries") : messageOf(error);
  }
  store.link = "connecting";
  await connect();
  return "";
}

/** After a break: what happened meanwhile is read again from the server. */
async function caughtUp(): Promise<void> {
  store.link = "online";
  await refreshList();
  if (store.wanted && store.wanted !== "runs") await open(store.wanted, true);
}

/** Read the newest chats again. The older ones that were read stay, if `touched`, the chats that changed, are none
 * of them; else they are read again when they come into sight. */
async function refreshList(touched?: Set<string>): Promise<void> {
  const reply = await attempt(() => api.chats(), false);
  if (!reply) return;
  const newest = new Set(reply.chats.map(({ id }) => id));
  const end = reply.chats.at(-1)?.updated ?? 0;
  const older = store.chats.filter(({ id, updated }) => updated < end && !newest.has(id));
  const keep = touched && older.length > 0 && !older.some(({ id }) => touched.has(id));
  store.chats = keep ? [...reply.chats, ...older] : reply.chats;
  if (!keep) store.more = reply.chats.length === PAGE;
}

/** Read on in the list of chats, or in what was found. */
export async function older(): Promise<void> {
  const { search: text, found } = store;
  const lines = found ?? store.chats;
  const reply = await attempt(() => api.chats(found ? text.trim() : "", lines.at(-1)?.updated), false);
  if (!reply || lines !== (found ? store.found : store.chats)) return; // what it continues is no longer there
  const more = reply.chats.length === PAGE;
  if (found) [store.found, store.moreFound] = [[...found, ...reply.chats], more];
  else [store.chats, store.more] = [[...lines, ...reply.chats], more];
}

export async function search(text: string): Promise<void> {
  store.search = text;
  if (!text.trim()) {
    store.found = null;
    return;
  }
  const reply = await attempt(() => api.chats(text.trim()));
  if (!reply || store.search !== text) return; // an older question may answer later
  store.found = reply.chats;
  store.moreFound = reply.chats.length === PAGE;
}

let soon: ReturnType<typeof setTimeout> | undefined;
const touched = new Set<string>();

function changed({ data }: { data: string }): void {
  const { kind, chat: id, message } = JSON.parse(data) as Change;
  const here = store.chat?.id === id;
  if (kind === "deleted") {
    store.chats = store.chats.filter((chat) => chat.id !== id);
    if (here) {
      leave();
      store.missing = true;
    }
  } else if (kind === "message" && message) {
    if (here) put(message);
  } else {
    clearTimeout(soon); // changes come in bursts; the list is read once after them
    touched.add(id);
    soon = setTimeout(() => {
      void refreshList(new Set(touched));
      touched.clear();
      if (store.chat?.id === id) void open(id, true); // another tab may have renamed it or changed its branch
    }, 120);
  }
}

/** Put a chat at its place in the list. */
function list({ id, title, created, updated }: ChatLine): void {
  const line = { id, title, created, updated };
  store.chats = [line, ...store.chats.filter((chat) => chat.id !== id)].sort((a, b) => b.updated - a.updated);
}

// ---- one chat --------------------------------------------------------------------------------

export async function open(id: string, quietly = false): Promise<void> {
  store.wanted = id;
  if (!quietly) {
    store.missing = false;
    if (store.chat?.id !== id) leave();
  }
  let chat: Chat;
  try {
    chat = await api.chat(id);
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) store.missing = store.wanted === id;
    else if (error instanceof ApiError && error.status === 401) lock();
    else lost();
    return;
  }
  if (store.wanted !== id) return;
  store.missing = false;
  // An answer that streams here, or has ended, is further than what the server just sent.
  const before = new Map(store.chat?.messages.map((message) => [message.id, message]));
  chat.messages = chat.messages.map((message) => (message.state === "running" && before.get(message.id)) || message);
  store.chat = chat;
  for (const message of store.chat.messages) listen(message);
}

/** Close the chat on the screen; its answers go on at the server. */
export function leave(): void {
  for (const close of streams.values()) close();
  streams.clear();
  store.chat = null;
  store.missing = false;
}

/** Take a message into the chat, new or in a newer state. */
function put(message: Message): void {
  const chat = store.chat;
  if (!chat || chat.id !== message.chat) return;
  const at = chat.messages.findIndex((each) => each.id === message.id);
  if (at < 0) {
    const before = chat.leaf;
    chat.messages.push(message);
    // A new end of the branch on the screen is followed; a branch elsewhere in the tree is not.
    if (message.parent === before || message.parent === null) chat.leaf = message.id;
    listen(chat.messages.at(-1)!);
  } else if (message.state !== "running") {
    chat.messages[at] = message;
  }
}

/** Follow a running answer: all of it from its first event, so nothing is lost or doubled. */
function listen(message: Message): void {
  const job = message.job;
  if (message.state !== "running" || !job || streams.has(job)) return;
  const { id } = message;
  // Deltas are gathered and shown once a frame, however fast they come.
  const parts: Part[] = [];
  let frame = 0;
  const show = () => {
    frame = 0;
    const shown = store.chat?.messages.find((each) => each.id === id);
    if (shown?.state === "running") shown.parts = parts.map((part) => ({ ...part }));
  };
  const end = (state: Message["state"]) => {
    cancelAnimationFrame(frame);
    streams.delete(job);
    announce(state === "error" ? t("failed") : state === "stopped" ? t("stopped") : t(message.settings?.plain ? "continued" : "done"));
  };
  const close = follow(`/api/jobs/${encodeURIComponent(job)}/events`, {
    after: 0,
    onevent({ event, data }) {
      const body = JSON.parse(data);
      if (event === "delta") {
        const last = parts.at(-1);
        if (last && last.type === body.part) (last as { text: string }).text += body.text;
        else parts.push({ type: body.part, text: body.text } as Part);
        frame ||= requestAnimationFrame(show);
        return false;
      }
      if (event === "done") {
        end(body.message.state);
        put(body.message);
        return true;
      }
      if (event === "failed") {
        end("error");
        const shown = store.chat?.messages.find((each) => each.id === id);
        const text = typeof body.message === "string" ? body.message : t("failed");
        if (typeof body.message === "object" && body.message) put(body.message);
        else if (shown) put({ ...shown, state: "error", parts: [...parts, { type: "error", message: text }] });
        return true;
      }
    },
    onlost(status) {
      if (status !== 404) return;
      end("error"); // the server no longer knows the job; the message in the chat is what is left
      void open(message.chat, true);
    },
  });
  streams.set(job, close);
}

export function currentTargets(): Target[] {
  const sides: (0 | 1)[] = prefs.compare ? [0, 1] : [0];
  return sides.map((side) => ({
    model: model(side)?.id ?? "",
    settings: { ...model(side)?.defaults, ...$state.snapshot(prefs.settings[side]) },
  }));
}

/** Send a text below `parent`, or (text null) answer the user message `parent` again. */
export async function turn(parent: string | null, text: string | null, options: Record<string, string> = {}, targets = currentTargets()): Promise<boolean> {
  const begun = !store.chat;
  const { wanted } = store;
  const chat = store.chat ?? (await attempt(api.newChat));
  if (!chat) return false;
  const reply = await attempt(() => api.turn(chat.id, parent, text, options, targets));
  if (!reply && begun && store.link === "online") {
    void attempt(() => api.remove(chat.id), false); // what is refused leaves no empty chat behind
    return false;
  }
  if (begun && store.wanted === wanted) { // and the user has not gone elsewhere meanwhile
    store.chat = { ...chat, messages: chat.messages ?? [] };
    store.wanted = chat.id;
    list(chat);
    history.pushState(null, "", `#/c/${chat.id}`);
  }
  if (!reply) return false;
  if (store.chat?.id !== chat.id) return true;
  if (reply.user) put(reply.user);
  for (const answer of reply.answers) put(answer);
  store.chat.leaf = reply.answers[0]?.id ?? reply.user?.id ?? store.chat.leaf;
  store.turns += 1;
  return true;
}

/** Keep a text below `parent` that nothing answers yet. */
export async function keep(parent: string | null, text: string): Promise<boolean> {
  const { chat } = store;
  const message = chat && (await attempt(() => api.keep(chat.id, parent, text)));
  if (!message) return false;
  put(message);
  if (store.chat?.id === message.chat) store.chat.leaf = message.id;
  return true;
}

/** Answer again where `message`, an answer, stands. */
export function regenerate(message: Message): void {
  if (message.parent) void turn(message.parent, null);
}

export async function stop(): Promise<void> {
  await Promise.all(running().map((message) => message.job && attempt(() => api.stop(message.job!))));
}

/** Show the branch through `message`, to where it was last left or to `leaf`. */
export async function choose(message: Message, leaf = leafOf(store.chat?.messages ?? [], message.id)): Promise<void> {
  if (!store.chat) return;
  store.chat.leaf = leaf;
  const { id } = store.chat;
  await attempt(() => api.change(id, { leaf }));
}

export async function rename(id: string, title: string): Promise<void> {
  const chat = await attempt(() => api.change(id, { title }));
  if (!chat) return;
  for (const line of [...store.chats, ...(store.found ?? [])]) if (line.id === id) line.title = title;
  if (store.chat?.id === id) store.chat.title = title;
}

export async function remove(id: string): Promise<void> {
  if ((await attempt(() => api.remove(id).then(() => true))) === undefined) return;
  store.chats = store.chats.filter((chat) => chat.id !== id);
  if (store.found) store.found = store.found.filter((chat) => chat.id !== id);
  if (store.chat?.id === id) location.hash = "#/";
}

export async function importChat(file: File): Promise<void> {
  let parsed: { messages?: unknown } | null;
  try {
    parsed = JSON.parse(await file.text());
  } catch {
    parsed = null;
  }
  if (!Array.isArray(parsed?.messages)) {
    fail(`${file.name}: ${t("notAChat")}`, true);
    return;
  }
  const chat = await attempt(() => api.importChat(parsed));
  if (!chat) {
    if (store.fault) fail(`${file.name}: ${store.fault}`, true);
    return;
  }
  list(chat);
  location.hash = `#/c/${chat.id}`;
}
