// Comfort on the pages of datasette-secrets: everything works without it. It never reads
// what is typed into a value.
(() => {
  "use strict";

  // Filter as you type: the server's own page, without loading it anew.
  const filter = document.querySelector(".secrets-filter");
  const found = document.getElementById("secrets-found");
  if (filter && found) {
    const field = filter.elements.q;
    let timer, request;
    const show = async () => {
      const url = new URL(filter.action);
      if (field.value) url.searchParams.set("q", field.value);
      request?.abort();
      request = new AbortController();
      try {
        const response = await fetch(url, { signal: request.signal });
        if (!response.ok) return;
        const page = new DOMParser().parseFromString(await response.text(), "text/html");
        const fresh = page.getElementById("secrets-found");
        const count = document.getElementById("secrets-count");
        if (!fresh) return;
        // The announced line stays in place, so that its change is announced.
        count.textContent = fresh.querySelector("#secrets-count").textContent;
        fresh.querySelector("#secrets-count").remove();
        found.replaceChildren(count, ...fresh.childNodes);
        history.replaceState(history.state, "", url);
      } catch (error) {
        if (error.name !== "AbortError") filter.submit();
      }
    };
    field.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(show, 120);
    });
    filter.addEventListener("submit", (event) => {
      event.preventDefault();
      clearTimeout(timer);
      show();
    });
  }

  for (const counter of document.querySelectorAll("[data-secrets-count]")) {
    const field = document.getElementById(counter.dataset.secretsCount);
    const count = () => {
      const left = counter.dataset.secretsMax - [...field.value].length;
      counter.textContent = `, ${left} left`;
    };
    field.addEventListener("input", count);
    count();
  }

  for (const command of document.querySelectorAll(".secrets-command")) {
    if (!navigator.clipboard) break;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "secrets-copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(command.querySelector("code").textContent);
      button.textContent = "Copied";
    });
    command.append(button);
  }

  // One click, one change.
  for (const form of document.querySelectorAll(".secrets-form")) {
    form.addEventListener("submit", () => {
      for (const button of form.querySelectorAll("[type=submit]")) button.disabled = true;
    });
  }

  // A page that the browser keeps for its back button keeps no value.
  addEventListener("pagehide", () => {
    for (const form of document.querySelectorAll("form.secrets-form")) form.reset();
  });
  addEventListener("pageshow", () => {
    for (const button of document.querySelectorAll(".secrets-form [type=submit]")) {
      button.disabled = false;
    }
  });
})();
