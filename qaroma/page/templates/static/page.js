"use strict";
const each = (selector, act) => document.querySelectorAll(selector).forEach(act);
const say = (text) => {
  const place = document.querySelector("[role=alert]");
  place.textContent = text;
  place.hidden = !text;
};
const asking = (act) => (...given) =>
  act(...given).catch(() => say("The page does not answer: is qaroma page still running?"));

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(button.dataset.copy);
  button.textContent = "Copied";
});

// A file is chosen, or dropped on its field.
each("input[type=file]", (input) => input.addEventListener("change", asking(async () => {
  const file = input.files[0];
  if (!file) return;
  if (file.size > input.dataset.limit) return say(`${file.name} has more than ${input.dataset.limit / 2 ** 20} MiB.`);
  const answer = await fetch(`upload?name=${encodeURIComponent(file.name)}`, { method: "PUT", body: file });
  const text = await answer.text();
  if (answer.ok) location.href = text;
  else say(text);
})));

// While something is at work this very screen is asked for again, and what has changed is put in its place.
const follow = asking(async () => {
  const began = Date.now();
  const text = await (await fetch(location.href)).text();
  const now = new DOMParser().parseFromString(text, "text/html");
  each("[data-live]", (place) => {
    const fresh = now.getElementById(place.id);  // none where the answer is an error
    if (fresh && place.innerHTML !== fresh.innerHTML) place.innerHTML = fresh.innerHTML;
  });
  if (document.querySelector("[data-at-work]")) setTimeout(follow, 1500 + 20 * (Date.now() - began));
});
if (document.querySelector("[data-at-work]")) setTimeout(follow, 1500);

// The conversation.
each("#talk", (talk) => {
  const form = document.querySelector("#say");
  const button = form.querySelector("button");
  const add = (parent, name, text = "") => {
    const made = parent.appendChild(document.createElement("div"));
    made.className = name;
    made.textContent = text;
    return made;
  };
  const send = asking(async (message, take) => {
    button.disabled = true;
    const answer = await fetch(talk.dataset.talk, { method: "POST", body: message });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      lines.map(JSON.parse).forEach(take);
    }
    button.disabled = false;
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const message = form.message.value.trim();
    form.reset();
    say("");
    add(talk, "asked", message);
    const pair = add(talk, "pair");
    const answers = { tuned: add(pair, "answer tuned"), base: add(pair, "answer base") };
    send(message, (line) => {
      if (line.error) say(line.error);
      if (line.piece) answers[line.from].textContent += line.piece;
      if (line.end) answers[line.from].classList.add(line.full ? "cut" : "whole");
      if (line.forgotten) add(talk, "muted", `The ${line.forgotten} oldest turns are forgotten: the talk has grown too long.`);
      form.scrollIntoView({ block: "end" });
    });
  });
  form.message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    if (!button.disabled && form.message.value.trim()) form.requestSubmit();
  });
  send("", (line) => {
    document.querySelector("#loading").hidden = true;
    if (line.error) say(line.error);
  });
});
