// Builds the page into the Python package. The build is a pure function of this folder: the test
// that compares the committed build with a fresh one relies on it.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { defineConfig } from "vite";
import { svelte } from "@sveltejs/vite-plugin-svelte";

/** Writes sw.js with the list of files of the shell, under a name of their contents. */
function serviceWorker() {
  return {
    name: "service-worker",
    apply: "build",
    generateBundle(_options, bundle) {
      const files = ["/", ...readdirSync("public").map((name) => `/${name}`)];
      for (const name of Object.keys(bundle)) if (name !== "index.html") files.push(`/${name}`);
      files.sort();
      const hash = createHash("sha256").update(readFileSync("index.html"));
      for (const name of readdirSync("public").sort()) hash.update(readFileSync(`public/${name}`));
      for (const name of Object.keys(bundle).sort()) hash.update(name);
      const source = readFileSync("src/sw.js", "utf8")
        .replace('"VERSION"', JSON.stringify(hash.digest("hex").slice(0, 12)))
        .replace('["FILES"]', JSON.stringify(files));
      this.emitFile({ type: "asset", fileName: "sw.js", source });
    },
  };
}

export default defineConfig({
  plugins: [svelte(), serviceWorker()],
  build: {
    outDir: process.env.SHENHONG_UI_OUT ?? "../src/shenhong/serve/ui",
    emptyOutDir: true,
    assetsInlineLimit: 0, // nothing inline: the policy of the server forbids it
    modulePreload: { polyfill: false },
    target: "es2022",
  },
  server: { proxy: { "/api": "http://127.0.0.1:8000" } },
});
