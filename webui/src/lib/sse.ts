// Server-sent events that survive a lost socket: after any break the stream is asked for again with
// Last-Event-ID, and events at or below that number are dropped, so none is lost and none doubled.
// Written on fetch, for EventSource gives up for good when a server that starts again refuses once.
// A browser gives a host six sockets for all tabs together: a hidden tab holds none, and catches up.

export interface SseEvent {
  id: number | null;
  event: string;
  data: string;
}

/** Parse the text of a stream, however it is cut into chunks. */
export function parser(emit: (event: SseEvent) => void): (chunk: string) => void {
  let rest = "";
  let id: number | null = null;
  let event = "message";
  let data: string[] = [];
  return (chunk) => {
    const lines = (rest + chunk).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop()!;
    for (const line of lines) {
      if (line === "") {
        if (data.length) emit({ id, event, data: data.join("\n") });
        [id, event, data] = [null, "message", []];
        continue;
      }
      const colon = line.indexOf(":");
      const field = colon < 0 ? line : line.slice(0, colon);
      const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "data") data.push(value);
      else if (field === "event") event = value;
      else if (field === "id" && /^\d+$/.test(value)) id = Number(value);
    }
  };
}

export interface Follow {
  after?: number; // the last event already seen
  onevent: (event: SseEvent) => boolean | void; // true: the last one, close
  onopen?: () => void;
  onlost?: (status: number) => void; // 0: no connection
}

/** Follow a stream until it says it is over, or until the returned function is called. */
export function follow(url: string, { after, onevent, onopen, onlost }: Follow): () => void {
  let closed = false;
  let seen = after;
  let delay = 250;
  let abort = new AbortController();
  let wake: (() => void) | null = null;

  async function once(): Promise<void> {
    abort = new AbortController();
    const headers: Record<string, string> = { Accept: "text/event-stream" };
    if (seen !== undefined) headers["Last-Event-ID"] = String(seen);
    const response = await fetch(url, { headers, signal: abort.signal, cache: "no-store" });
    if (!response.ok || !response.body) {
      onlost?.(response.status);
      if ([401, 403, 404, 410].includes(response.status)) closed = true; // asking again cannot help
      return;
    }
    onopen?.();
    const feed = parser((event) => {
      if (closed || (event.id !== null && seen !== undefined && event.id <= seen)) return;
      if (event.id !== null) seen = event.id;
      delay = 250;
      if (onevent(event)) {
        closed = true;
        abort.abort();
      }
    });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      feed(value);
    }
  }

  async function loop(): Promise<void> {
    while (!closed) {
      if (document.hidden) {
        await new Promise<void>((resolve) => (wake = resolve));
        continue;
      }
      try {
        await once();
      } catch {
        if (!closed && !document.hidden) onlost?.(0);
      }
      if (closed || document.hidden) continue;
      await new Promise<void>((resolve) => {
        wake = resolve;
        setTimeout(resolve, delay * (0.75 + Math.random() / 2));
      });
      delay = Math.min(delay * 2, 4000);
    }
    document.removeEventListener("visibilitychange", visibility);
    removeEventListener("online", again);
  }

  const again = () => wake?.();
  const visibility = () => (document.hidden ? abort.abort() : again());
  document.addEventListener("visibilitychange", visibility);
  addEventListener("online", again);
  void loop();
  return () => {
    closed = true;
    abort.abort();
    wake?.();
  };
}
