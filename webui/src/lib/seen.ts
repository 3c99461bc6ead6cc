// Lists of any length: what is next is fetched when their end comes near.
import type { Action } from "svelte/action";

/** Call `then` when the node comes near what is seen of the scrolled element that `inside` selects. */
export const whenSeen: Action<HTMLElement, { inside: string; then: () => unknown }> = (node, { inside, then }) => {
  const root = node.closest(inside);
  const eye = new IntersectionObserver((seen) => seen.at(-1)!.isIntersecting && void then(), { root, rootMargin: "600px" });
  eye.observe(node);
  return { destroy: () => eye.disconnect() };
};
