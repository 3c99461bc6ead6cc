// What the events of a run folder tell: one JSON object a line, followed as they are written.
import { api } from "./api";
import { follow } from "./sse";

export const STAGES = ["corpus", "tokenizer", "tokens", "train", "model", "evaluate", "report"];

export type Point = [x: number, y: number];

export interface Sample {
  step: number | null;
  prompt: string;
  text: string;
}

export interface Live {
  stages: Record<string, { state: "begin" | "end"; seconds: number | null; time: number }>;
  step: number;
  steps: number;
  seconds: number; // of training, until `step`
  loss: Point[];
  heldOut: Point[];
  speed: Point[];
  rate: Point[];
  norm: Point[];
  load: Point[][]; // a line a layer: the busiest expert against the mean
  loads: number[][] | null; // the newest share of every expert, where the run tells it
  samples: Sample[];
}

export const empty = (): Live => ({
  stages: {}, step: 0, steps: 0, seconds: 0, loss: [], heldOut: [], speed: [], rate: [], norm: [], load: [], loads: null, samples: [],
});

const isNumber = (value: unknown): value is number => typeof value === "number" && Number.isFinite(value);

/** Take one line into the picture; lines of a kind not known here are left alone. */
export function take(live: Live, line: Record<string, unknown>): void {
  const step = isNumber(line.step) ? line.step : null;
  const add = (series: Point[], value: unknown) => step !== null && isNumber(value) && series.push([step, value]);
  if (line.kind === "stage" && typeof line.stage === "string") {
    live.stages[line.stage] = {
      state: line.state === "end" ? "end" : "begin",
      seconds: isNumber(line.seconds) ? line.seconds : null,
      time: isNumber(line.time) ? line.time : 0,
    };
  } else if (line.kind === "train" && step !== null) {
    // A run that was stopped goes on at its last checkpoint: what it does again replaces what was.
    if (step <= live.step)
      for (const series of [live.loss, live.speed, live.rate, live.norm, ...live.load, live.heldOut])
        while (series.length && series.at(-1)![0] >= step) series.pop();
    live.step = step;
    if (isNumber(line.steps)) live.steps = line.steps;
    if (isNumber(line.seconds)) live.seconds = line.seconds;
    add(live.loss, line.loss);
    add(live.speed, line.tokens_per_second);
    add(live.rate, line.lr);
    add(live.norm, line.grad_norm);
    if (Array.isArray(line.load_max)) line.load_max.forEach((value, layer) => add((live.load[layer] ??= []), value));
    if (Array.isArray(line.load) && Array.isArray(line.load[0])) live.loads = line.load as number[][];
  } else if (line.kind === "valid") add(live.heldOut, line.nats_per_token);
  else if (line.kind === "sample" && typeof line.text === "string")
    live.samples = [{ step, prompt: String(line.prompt ?? line.title ?? ""), text: line.text }, ...live.samples].slice(0, 12);
}

/** At most `most` points: the mean of each stretch, so that a long run draws as fast as a short one. */
export function thin(points: Point[], most = 300): Point[] {
  if (points.length <= most) return points;
  const size = points.length / most;
  return Array.from({ length: most }, (_, number) => {
    const part = points.slice(Math.floor(number * size), Math.floor((number + 1) * size));
    const mean = part.reduce((sum, [, y]) => sum + y, 0) / part.length;
    return [part.at(-1)![0], mean];
  });
}

/** Follow a run; `changed` is called at most once a frame. Returns how to stop. */
export function watch(id: string, live: Live, changed: () => void): () => void {
  let frame = 0;
  let over = false;
  let close = () => {};
  let retry: ReturnType<typeof setTimeout> | undefined;
  const show = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      changed();
    });
  };
  // What was so far comes thinned in one piece; the stream goes on at the byte after it.
  const begin = () => void api.run(id).then(({ series, offset }) => {
    if (over) return;
    for (const lines of Object.values(series)) for (const line of lines) take(live, line);
    show();
    close = follow(`/api/runs/${encodeURIComponent(id)}/events`, {
      after: offset,
      onevent({ data }) {
        take(live, JSON.parse(data));
        show();
      },
    });
  }, () => (retry = setTimeout(begin, 2000))); // the server may be away
  begin();
  return () => {
    over = true;
    clearTimeout(retry);
    cancelAnimationFrame(frame);
    close();
  };
}
