// Markdown to safe HTML. Output of a model is hostile until shown otherwise: raw HTML is text,
// images are never loaded, links lead only to web and mail; the result of the parser is sanitised,
// and the policy of the server stands behind both.
import DOMPurify from "dompurify";
import { Marked, type Token, type Tokens } from "marked";

const escape = (text: string) =>
  text.replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[c]!);

const SAFE_LINK = /^(https?:|mailto:)/i;

interface Formula extends Tokens.Generic {
  type: "formula";
  text: string;
  display: boolean;
}

/** $$…$$ and \[…\] stand alone; $…$ and \(…\) run in the text. */
const blockFormula = {
  name: "blockFormula",
  level: "block" as const,
  start: (source: string) => source.match(/\$\$|\\\[/)?.index,
  tokenizer(source: string): Formula | undefined {
    const match = /^(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])[ \t]*(?:\n|$)/.exec(source);
    if (match) return { type: "formula", raw: match[0], text: (match[1] ?? match[2]).trim(), display: true };
  },
};
const inlineFormula = {
  name: "formula",
  level: "inline" as const,
  start: (source: string) => source.match(/\$|\\\(/)?.index,
  tokenizer(source: string): Formula | undefined {
    // No space inside the signs and no digit after them: prices stay prices.
    const match = /^(?:\$(?![\s$])((?:\\.|[^\\$\n])+?)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\$\$([^\n]+?)\$\$)/.exec(source);
    if (match) return { type: "formula", raw: match[0], text: match[1] ?? match[2] ?? match[3], display: false };
  },
  renderer: (token: Tokens.Generic) =>
    `<span class="formula" data-display="${token.display ? 1 : 0}">${escape(token.text)}</span>`,
};

const marked = new Marked({
  gfm: true,
  breaks: true,
  extensions: [blockFormula, inlineFormula],
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<span class="image">${escape(text || href)}</span>`,
    link({ href, tokens }) {
      const inside = this.parser.parseInline(tokens);
      return SAFE_LINK.test(href)
        ? `<a href="${escape(href)}" target="_blank" rel="noopener noreferrer nofollow">${inside}</a>`
        : inside;
    },
    code: ({ text, lang }) =>
      `<pre><code data-language="${escape((lang ?? "").match(/^\S*/)![0])}">${escape(text)}\n</code></pre>`,
  },
});

const purifier = DOMPurify(window);
// What is wider than the screen is scrolled on its own, from the keyboard too.
purifier.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "PRE" || node.tagName === "TABLE") node.setAttribute("tabindex", "0");
});
const ALLOWED = {
  ALLOWED_TAGS:
    "a b blockquote br code del div em h1 h2 h3 h4 h5 h6 hr i input li ol p pre s span strong sub sup table tbody td th thead tr ul".split(" "),
  ALLOWED_ATTR: ["href", "target", "rel", "class", "start", "type", "checked", "disabled", "align", "data-language", "data-display"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
};

/** One top-level piece of a text: keyed by its source, so that a growing text redoes only its end. */
export interface Block {
  html: string;
  code: boolean; // wants highlighting
  formula: boolean; // wants setting
}

const cache = new Map<string, Block>();

function render(token: Token): Block {
  const known = cache.get(token.raw);
  if (known) return known;
  const html = purifier.sanitize(marked.parser([token]), ALLOWED) as string;
  const block = { html, code: html.includes("<pre"), formula: html.includes('class="formula"') };
  if (cache.size > 2000) cache.clear();
  // Reference links depend on definitions elsewhere, so such a text must not be shared.
  if (!token.raw.includes("][") && !/\]\s*(?!\()/.test(token.raw)) cache.set(token.raw, block);
  return block;
}

const TOO_LONG = 200_000; // characters; beyond it a text is shown plain, for no answer is worth a hang

export function blocks(text: string): Block[] {
  if (text.length > TOO_LONG) return [{ html: `<pre tabindex="0">${escape(text)}</pre>`, code: false, formula: false }];
  return marked
    .lexer(text)
    .filter((token) => token.type !== "space" && token.type !== "def")
    .map(render);
}
