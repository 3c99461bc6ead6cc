// The shell opens without the server: its files are kept, its data never are. Each build has its
// own store, so that pages never mix two builds; the API is not touched.
const VERSION = "9b833316294d";
const FILES = ["/","/assets/RunsView-B-6Zvj6S.css","/assets/RunsView-DXOCHbfH.js","/assets/formula-CM2kMIiT.js","/assets/highlight-CKa98cGG.js","/assets/index-BYERZIF8.js","/assets/index-BZFgb3A-.css","/icon-180.png","/icon-192.png","/icon-512.png","/icon.svg","/manifest.webmanifest"];
const STORE = `shell-${VERSION}`;

self.addEventListener("install", (event) => {
  event.waitUntil(
    caches
      .open(STORE)
      .then((store) => store.addAll(FILES.map((file) => new Request(file, { cache: "reload" }))))
      .then(() => self.skipWaiting()),
  );
});

self.addEventListener("activate", (event) => {
  const old = (names) => names.filter((name) => name.startsWith("shell-") && name !== STORE);
  event.waitUntil(
    caches
      .keys()
      .then((names) => Promise.all(old(names).map((name) => caches.delete(name))))
      .then(() => self.clients.claim()),
  );
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== location.origin) return;
  if (url.pathname.startsWith("/api/") || url.pathname.startsWith("/v1/")) return;
  const kept = () => caches.match(request.mode === "navigate" ? "/" : request, { ignoreVary: true });
  if (request.mode === "navigate") {
    event.respondWith(fetch(request).catch(async () => (await kept()) ?? Response.error()));
  } else if (FILES.includes(url.pathname)) {
    event.respondWith(kept().then((response) => response ?? fetch(request)));
  }
});
