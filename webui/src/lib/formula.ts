// TeX to MathML, which browsers set by themselves: no fonts and no styles of our own.
import DOMPurify from "dompurify";
import temml from "temml";

const purifier = DOMPurify(window);

/** A <math> element, or null for what cannot be set. */
export function formulaToMathML(tex: string, display: boolean): Node | null {
  let markup: string;
  try {
    markup = temml.renderToString(tex, { displayMode: display, trust: false, maxExpand: 200, maxSize: [10, 10], throwOnError: true });
  } catch {
    return null;
  }
  // Inline styles would offend the policy of the server even inside a parser, so they go before it.
  const bare = markup.replace(/\sstyle="[^"]*"/g, "");
  const safe = purifier.sanitize(bare, { USE_PROFILES: { mathMl: true }, FORBID_ATTR: ["style", "href"], RETURN_DOM_FRAGMENT: true });
  return safe.querySelector("math");
}
