// What a finished piece of Markdown gets beside its text: coloured code and set formulas. Both come
// with their libraries, loaded when the first is met, and both have bounds that keep phones alive.
// What has elements inside is done: its text is no longer the source.
import type { Action } from "svelte/action";
import { LONGEST_FORMULA, type Block } from "./markdown";

const LONGEST_CODE = 50_000; // characters

async function colour(node: HTMLElement): Promise<void> {
  const wanted = [...node.querySelectorAll<HTMLElement>("pre > code[data-language]")].filter(
    (code) => !code.childElementCount && code.dataset.language && code.textContent!.length <= LONGEST_CODE,
  );
  if (!wanted.length) return;
  const { highlight } = await import("./highlight");
  for (const code of wanted) {
    const html = !code.childElementCount && highlight(code.textContent!, code.dataset.language!);
    if (html) code.innerHTML = html; // escaped by the highlighter: nothing in it but spans and text
  }
}

async function set(node: HTMLElement): Promise<void> {
  const wanted = [...node.querySelectorAll<HTMLElement>("span.formula")].filter(
    (formula) => !formula.childElementCount && formula.textContent!.length <= LONGEST_FORMULA,
  );
  if (!wanted.length) return;
  const { formulaToMathML } = await import("./formula");
  for (const formula of wanted) {
    const math = !formula.childElementCount && formulaToMathML(formula.textContent!, formula.dataset.display === "1");
    if (math) formula.replaceChildren(math);
  }
}

export const adorn: Action<HTMLElement, Block> = (node, block) => {
  const update = (now: Block) => {
    if (now.code) void colour(node);
    if (now.formula) void set(node);
  };
  update(block);
  return { update };
};
