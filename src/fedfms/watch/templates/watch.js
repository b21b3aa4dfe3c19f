"use strict";
// Lays the page's newer parts over the older ones: what did not change is not touched, so that
// nothing flickers, and places that were scrolled to, opened or marked stay.
(() => {
  const EVERY = 2000, HIDDEN = 10000;
  const before = new Map();
  let failed = 0;
  const parts = root => [...root.querySelectorAll("[data-part]")];
  const clock = root => {
    for (const one of root.querySelectorAll("time[datetime]")) {
      const at = new Date(one.dateTime), today = new Date().toDateString() === at.toDateString();
      const day = today ? {} : {day: "numeric", month: "short"};
      one.textContent = at.toLocaleString([], {hour: "2-digit", minute: "2-digit", ...day});
    }
  };
  const lay = (fresh, old) => {
    const open = [...old.querySelectorAll("details")].map(one => one.open);
    const left = [...old.querySelectorAll(".scroll")].map(one => one.scrollLeft);
    old.replaceWith(fresh);
    fresh.querySelectorAll("details").forEach((one, i) => { if (open[i]) one.open = true; });
    fresh.querySelectorAll(".scroll").forEach((one, i) => { one.scrollLeft = left[i] || 0; });
    clock(fresh);
  };
  const take = text => {
    const page = new DOMParser().parseFromString(text, "text/html");
    const main = page.querySelector("main"), here = document.querySelector("main");
    const names = root => parts(root).map(one => one.dataset.part).join();
    if (names(main) !== names(here)) {
      parts(main).forEach(one => before.set(one.dataset.part, one.outerHTML));
      lay(main, here);
    } else {
      for (const part of parts(main)) {
        const name = part.dataset.part, html = part.outerHTML;
        if (before.get(name) === html) continue;
        before.set(name, html);
        lay(part, here.querySelector(`[data-part="${name}"]`));
      }
    }
    document.title = page.title || document.title;
  };
  const lost = is => { document.getElementById("lost").hidden = !is; };
  const look = async () => {
    try {
      const answer = await fetch("now", {cache: "no-store"});
      if (!answer.ok) throw new Error(answer.status);
      take(await answer.text());
      failed = 0;
      lost(false);
    } catch {
      failed += 1;
      lost(failed > 1);
    }
    setTimeout(look, document.hidden ? HIDDEN : EVERY);
  };
  parts(document).forEach(one => before.set(one.dataset.part, one.outerHTML));
  clock(document);
  setTimeout(look, EVERY);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) clock(document); });
})();
