// Every request of the page. All go to the server that sent it, under /api.
import type { Bootstrap, Chat, ChatLine, Message, RunLine, RunSoFar, Target } from "./types";

/** A request that failed; status 0: the server was not reached. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string | null = null,
  ) {
    super(message);
  }
}

async function request<T>(method: string, path: string, body?: unknown): Promise<T> {
  let response: Response;
  try {
    response = await fetch(`/api/${path}`, {
      method,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
    });
  } catch {
    throw new ApiError(0, "the server is not reachable");
  }
  if (!response.ok) {
    const reply = await response.json().catch(() => null);
    const { message, code } = reply?.error ?? {};
    throw new ApiError(response.status, message ?? `${response.status} ${response.statusText}`, code);
  }
  return (response.status === 204 ? undefined : await response.json()) as T;
}

const at = encodeURIComponent;

export const PAGE = 100; // chats listed at once

export const api = {
  bootstrap: () => request<Bootstrap>("GET", "bootstrap"),
  login: (key: string) => request<void>("POST", "login", { key }),
  chats: (search = "", before?: number) =>
    request<{ chats: ChatLine[] }>(
      "GET",
      `chats?limit=${PAGE}${search ? `&search=${at(search)}` : ""}${before ? `&before=${before}` : ""}`,
    ),
  newChat: () => request<Chat>("POST", "chats", {}),
  chat: (id: string) => request<Chat>("GET", `chats/${at(id)}`),
  change: (id: string, what: { title?: string; leaf?: string }) =>
    request<ChatLine>("PATCH", `chats/${at(id)}`, what),
  remove: (id: string) => request<void>("DELETE", `chats/${at(id)}`),
  importChat: (file: unknown) => request<Chat>("POST", "chats/import", file),
  exportUrl: (id: string, format: "json" | "markdown") => `/api/chats/${at(id)}/export?format=${format}`,
  turn: (id: string, parent: string | null, text: string | null, options: Record<string, string>, targets: Target[]) =>
    request<{ user: Message | null; answers: Message[] }>("POST", `chats/${at(id)}/turns`, {
      parent,
      text,
      options,
      targets,
    }),
  keep: (id: string, parent: string | null, text: string) =>
    request<Message>("POST", `chats/${at(id)}/texts`, { parent, text }),
  stop: (job: string) => request<void>("POST", `jobs/${at(job)}/stop`),
  runs: () => request<{ runs: RunLine[] }>("GET", "runs"),
  run: (id: string) => request<RunSoFar>("GET", `runs/${at(id)}`),
};
