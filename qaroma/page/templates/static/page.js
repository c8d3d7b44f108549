"use strict";
const root = document.body.dataset.root;
const each = (selector, act) => document.querySelectorAll(selector).forEach(act);

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(button.dataset.copy);
  button.textContent = "Copied";
});

// A file is chosen or dropped.
each(".drop", (drop) => {
  const input = drop.querySelector("input");
  const bar = drop.querySelector("progress");
  const error = document.querySelector(".error");
  const say = (text) => { error.textContent = text; error.hidden = false; bar.hidden = true; };
  const send = (file) => {
    if (file.size > drop.dataset.limit * 2 ** 20) return say(`${file.name} has more than ${drop.dataset.limit} MiB.`);
    const request = new XMLHttpRequest();
    request.open("PUT", `${root}upload?name=${encodeURIComponent(file.name)}`);
    request.responseType = "json";
    request.upload.onprogress = (event) => { bar.hidden = false; bar.value = event.loaded / event.total; };
    request.onerror = () => say("The page does not answer: is qaroma page still running?");
    request.onload = () => {
      if (request.status !== 200) return say(request.response?.error ?? request.statusText);
      location.href = `${root}data?data=${encodeURIComponent(request.response.data)}`;
    };
    request.send(file);
  };
  input.addEventListener("change", () => input.files[0] && send(input.files[0]));
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]);
  });
});

// What a command has to be asked for.
each("[data-load]", async (place) => {
  try {
    const answer = await fetch(place.dataset.load);
    place.innerHTML = await answer.text();
    if (answer.ok) each("[data-after-load]", (button) => { button.disabled = false; });
  } catch {
    place.textContent = "The page does not answer: is qaroma page still running?";
  }
});

// A run, or an export, as it goes on.
each("[data-events]", (section) => {
  const frame = document.querySelector("iframe");
  new EventSource(section.dataset.events).onmessage = (event) => {
    const now = JSON.parse(event.data);
    if (now.state !== section.dataset.state || (now.report && !frame)) return location.reload();
    each("[data-live]", (place) => {
      const value = now[place.dataset.live];
      if (place.tagName !== "PROGRESS") place.textContent = value;
      else if (value) place.value = value;
    });
    if (frame && String(now.report) !== frame.dataset.report) {
      frame.dataset.report = now.report;
      frame.src = frame.src;  // a frame without rights cannot be told to load itself again
    }
  };
});

// The conversation.
each("#talk", (talk) => {
  const form = document.querySelector("#say");
  const button = form.querySelector("button");
  const ask = async (message, take) => {
    button.disabled = true;
    try {
      const answer = await fetch(talk.dataset.talk, { method: "POST", body: message });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
        const lines = (rest + part.value).split("\n");
        rest = lines.pop();
        lines.forEach((line) => take(JSON.parse(line)));
      }
    } catch {
      take({ error: "The page does not answer: is qaroma page still running?" });
    }
    button.disabled = false;
  };
  const add = (parent, name, text = "") => {
    const made = parent.appendChild(document.createElement("div"));
    made.className = name;
    made.textContent = text;
    return made;
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const message = form.message.value.trim();
    if (!message) return;
    form.reset();
    add(talk, "asked", message);
    const pair = add(talk, "pair");
    const answers = { tuned: add(pair, "answer tuned"), base: add(pair, "answer base") };
    await ask(message, (line) => {
      if (line.error) add(talk, "error", line.error);
      if (line.piece) answers[line.from].textContent += line.piece;
      if (line.end) answers[line.from].classList.add(line.full ? "cut" : "whole");
      if (line.forgotten) add(talk, "muted", `The ${line.forgotten} oldest turns are forgotten: the talk has grown too long.`);
      form.scrollIntoView({ block: "end" });
    });
  });
  form.message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    if (!button.disabled) form.requestSubmit();
  });
  ask("", (line) => {
    document.querySelector("#loading").hidden = true;
    if (line.error) add(talk, "error", line.error);
  });
});
