import { mount } from "svelte";
import App from "./App.svelte";
import "./app.css";
import "./prose.css";

mount(App, { target: document.getElementById("app")! });

// Without a secure context (plain HTTP in a home network) there is none: all but the offline shell works.
if (import.meta.env.PROD && "serviceWorker" in navigator) void navigator.serviceWorker.register("/sw.js").catch(() => {});
