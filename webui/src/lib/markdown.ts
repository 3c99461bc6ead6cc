// Markdown to safe HTML. Output of a model is hostile until shown otherwise: raw HTML is text,
// images are never loaded, links lead only to web and mail; the result of the parser is sanitised,
// and the policy of the server stands behind both.
import DOMPurify from "dompurify";
import { Lexer, Marked, type Token, type Tokens } from "marked";

const escape = (text: string) =>
  text.replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[c]!);

// What bounds the work on hostile text: the parser, too, looks from many signs to the end of what it is given.
export const LONGEST_FORMULA = 4000; // characters
const LONGEST_PARAGRAPH = 5000; // a longer one is plain text
const DEEPEST = 20; // quotes and lists within one another
const FAR = 2000; // a formula is looked for so far ahead, to the end of the line there

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
  start(source: string): number | undefined {
    const end = source.indexOf("\n", FAR) + 1;
    const at = (end ? source.slice(0, end) : source).search(/\$\$|\\\[/);
    return at < 0 ? end || undefined : at; // the parser joins what it cut between two lines
  },
  tokenizer(source: string): Formula | undefined {
    const match = /^(?:\$\$([^]{1,4000}?)\$\$|\\\[([^]{1,4000}?)\\\])[ \t]*(?:\n|$)/.exec(source);
    if (match) return { type: "formula", raw: match[0], text: (match[1] ?? match[2]).trim(), display: true };
  },
};
const inlineFormula = {
  name: "formula",
  level: "inline" as const,
  start: (source: string) => source.match(/\$|\\\(/)?.index,
  tokenizer(source: string): Formula | undefined {
    // No space inside the signs and no digit after them: prices stay prices.
    const match = /^(?:\$(?![\s$])((?:\\.|[^\\$\n])+?)(?<!\s)\$(?!\d)|\\\((.{1,1000}?)\\\)|\$\$([^\n]{1,1000}?)\$\$)/.exec(source);
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

/** The lexer, within the bounds above. */
class BoundedLexer extends Lexer {
  private depth = 0;

  inlineTokens(source: string, tokens: Token[] = []): Token[] {
    if (source.length <= LONGEST_PARAGRAPH) return super.inlineTokens(source, tokens);
    tokens.push({ type: "text", raw: source, text: source, escaped: false });
    return tokens;
  }

  blockTokens(source: string, tokens: Token[] = [], clipped?: boolean): any {
    this.depth += 1;
    if (this.depth <= DEEPEST) super.blockTokens(source, tokens as any, clipped);
    else tokens.push({ type: "text", raw: source, text: source, escaped: false });
    this.depth -= 1;
    return tokens;
  }
}

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

// Beyond these a text is shown plain, for no answer is worth a hang.
const TOO_LONG = 200_000; // characters
const TOO_MANY = 1000; // signs of formulas that stand alone

export function blocks(text: string): Block[] {
  if (text.length > TOO_LONG || (text.match(/\$\$|\\\[/g)?.length ?? 0) > TOO_MANY)
    return [{ html: `<pre tabindex="0">${escape(text)}</pre>`, code: false, formula: false }];
  return new BoundedLexer(marked.defaults)
    .lex(text)
    .filter((token) => token.type !== "space" && token.type !== "def")
    .map(render);
}
