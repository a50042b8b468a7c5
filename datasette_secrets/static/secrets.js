// Conveniences on the pages of datasette-secrets. Everything works without them. A typed
// value is checked for hints, and leaves the page only in its form.
(() => {
  "use strict";

  // Filter as you type: fetch the server's page and show its list in this one.
  const filter = document.querySelector(".secrets-filter");
  const found = document.getElementById("secrets-found");
  if (filter && found) {
    const field = filter.elements.q;
    const state = filter.elements.state;
    let timer, request;
    const show = async () => {
      const url = new URL(filter.action);
      if (field.value) url.searchParams.set("q", field.value);
      if (state.value) url.searchParams.set("state", state.value);
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
    state.addEventListener("change", show);
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

  // A hint, never a refusal, about what was typed or pasted into a value.
  for (const value of document.querySelectorAll(".secrets-value")) {
    const field = value.querySelector("textarea");
    const hint = value.querySelector(".secrets-hint");
    let pattern = null;
    try {
      if (value.dataset.looksLike) pattern = new RegExp(value.dataset.looksLike, "u");
    } catch {
      // Python accepts some regular expressions that JavaScript does not.
    }
    const about = (text) => {
      if (!text) return "";
      if (/^(["'`]).*\1$/su.test(text)) return "The value is in quotes. Quotes are stored too.";
      if (/^(export\s+)?[A-Z_][A-Z0-9_]*=\S/u.test(text)) {
        return "This looks like NAME=value. Enter only the value.";
      }
      if (/^[A-Z][A-Z0-9]*(_[A-Z0-9]+)+$/u.test(text)) {
        return "This looks like the name of a secret. Enter its value.";
      }
      if (pattern && !pattern.test(text)) return "This does not look like a typical value.";
      return "";
    };
    const say = () => {
      hint.textContent = about(field.value.trim());
      hint.hidden = !hint.textContent;
    };
    field.addEventListener("input", say);
    addEventListener("pageshow", say);
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

  // The button that destroys says how many versions are selected.
  for (const button of document.querySelectorAll("[data-secrets-counts]")) {
    const boxes = [...button.form.querySelectorAll("[name=version]")];
    const none = button.value;
    const count = () => {
      const ticked = boxes.filter((box) => box.checked).length;
      button.disabled = !ticked;
      button.value = ticked
        ? `${button.dataset.secretsCounts} ${ticked} version${ticked > 1 ? "s" : ""}`
        : none;
    };
    button.form.addEventListener("change", count);
    button.form.querySelector("[data-secrets-select]")?.addEventListener("click", (event) => {
      event.preventDefault();
      for (const box of boxes) box.checked = !("newest" in box.dataset);
      count();
    });
    addEventListener("pageshow", count);
    count();
  }

  // Two clicks send one form. The clicked button is part of the form, so it is disabled
  // after the form was sent.
  for (const form of document.querySelectorAll(".secrets-form")) {
    form.addEventListener("submit", () => {
      setTimeout(() => {
        for (const button of form.querySelectorAll("[type=submit]")) button.disabled = true;
      });
    });
  }

  // The browser may keep a page for its back button. The value is cleared first.
  addEventListener("pagehide", () => {
    for (const form of document.querySelectorAll("form.secrets-form")) form.reset();
  });
  addEventListener("pageshow", () => {
    for (const button of document.querySelectorAll(
      ".secrets-form [type=submit]:not([data-secrets-counts])",
    )) {
      button.disabled = false;
    }
  });
})();
