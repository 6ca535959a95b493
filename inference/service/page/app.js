// The page: conversations on the left, messages and the message box in the middle.
import { ServiceError, answer, models } from "./answers.js";
import { element, render } from "./markdown.js";
import * as store from "./store.js";
import { translate, words } from "./words.js";

const $ = (id) => document.getElementById(id);
const input = $("input");
const scroller = $("scroller");
const SAVE_MS = 1000; // how often a growing answer is kept
const MAX_TITLE = 60;

let settings = store.loadSettings();
let conversations = store.loadConversations();
let current = null; // the conversation that is shown
let model = null;
const running = new Map(); // conversation's id → what stops its answer
const views = new WeakMap(); // message → what shows it as it is now

// ------------------------------------------------------------------------------------------------------- conversations

function open(conversation, { focus = true } = {}) {
  current = conversation;
  location.replace(`#${conversation.id}`);
  showConversations();
  showMessages();
  closeSidebar();
  if (focus && matchMedia("(hover: hover)").matches) input.focus();
}

const create = () => ({ id: crypto.randomUUID?.() ?? String(Date.now()), title: "", messages: [] });

function keep() {
  if (!store.saveConversations(conversations)) toast(words().notKept);
}

function showConversations() {
  const items = conversations.map((conversation) => {
    const title = conversation.title || words().newChat;
    const item = element("li", conversation === current ? { class: "current" } : {});
    const link = element("a", { href: `#${conversation.id}`, title }, title);
    if (conversation === current) link.setAttribute("aria-current", "page");
    link.addEventListener("click", (event) => {
      event.preventDefault();
      open(conversation);
    });
    const rename = button("pencil", words().rename, () => renameIn(item, conversation));
    const remove = button("bin", words().remove, () => removeConversation(conversation));
    item.append(link, rename, remove);
    return item;
  });
  $("conversations").replaceChildren(...items);
  $("title").textContent = current.title;
  document.title = current.title || "Chat";
  $("export").hidden = !current.messages.length;
}

function renameIn(item, conversation) {
  const field = element("input", { "aria-label": words().rename, maxlength: String(MAX_TITLE) });
  field.value = conversation.title;
  const finish = (save) => {
    field.removeEventListener("blur", onBlur);
    if (save && field.value.trim()) conversation.title = field.value.trim();
    keep();
    showConversations();
  };
  const onBlur = () => finish(true);
  field.addEventListener("blur", onBlur);
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
  });
  item.replaceChildren(field);
  field.select();
}

function removeConversation(conversation) {
  running.get(conversation.id)?.abort();
  const place = conversations.indexOf(conversation);
  conversations.splice(place, 1);
  keep();
  if (conversation === current) open(create());
  else showConversations();
  toast(words().removed, words().undo, () => {
    conversations.splice(place, 0, conversation);
    keep();
    open(conversation);
  });
}

// ------------------------------------------------------------------------------------------------------------ messages

function showMessages() {
  $("messages").replaceChildren(...current.messages.map(messageElement));
  $("welcome").hidden = current.messages.length > 0;
  $("suggestions").replaceChildren(
    ...words().suggestions.map((text) => {
      const suggestion = element("button", { type: "button" }, text);
      suggestion.addEventListener("click", () => ask(text));
      return suggestion;
    }),
  );
  showState();
  toEnd();
}

function messageElement(message) {
  const mine = message.role === "user";
  const body = element("div", { class: mine ? "body" : "body markdown", dir: "auto" });
  const note = element("p", { class: "note" });
  const actions = element("div", { class: "actions" });
  const node = element("article", { class: message.role, "aria-label": mine ? words().you : words().assistant }, body, note, actions);
  const show = () => {
    const busy = message === pending();
    if (mine) body.textContent = message.content;
    else render(body, message.content, codeHeader);
    node.classList.toggle("busy", busy);
    node.toggleAttribute("aria-busy", busy);
    note.classList.toggle("error", Boolean(message.error));
    note.replaceChildren(...notesOf(message));
    actions.replaceChildren(...(busy ? [] : actionsOf(message, node)));
  };
  views.set(message, show);
  show();
  return node;
}

const pending = () => (running.has(current.id) ? current.messages.at(-1) : null);

function notesOf(message) {
  const said = words();
  const notes = [
    message.forgotten && said.forgotten(message.forgotten),
    { length: said.cut, content_filter: said.filtered, stopped: said.stopped }[message.finish],
    message.error && (said[message.error] ?? message.error),
  ].filter(Boolean);
  return [notes.join(" ")];
}

function actionsOf(message, node) {
  const said = words();
  const copy = button("copy", said.copy, () => copyText(message.content, copy));
  if (message.role === "user") return [copy, button("pencil", said.edit, () => edit(message, node))];
  const again = button("again", message.error ? said.retry : said.again, () => regenerate(message));
  const { tokens, rate, first } = message.figures ?? {};
  const figures = first ? [element("span", { class: "quiet" }, said.figures(tokens, rate, first))] : [];
  return [...(message.content ? [copy] : []), again, ...figures];
}

function edit(message, node) {
  const field = element("textarea", { "aria-label": words().edit, maxlength: "100000" });
  field.value = message.content;
  const send = element("button", { type: "button", class: "primary" }, words().save);
  const cancel = element("button", { type: "button", class: "plain" }, words().cancel);
  const finish = (save) => {
    const text = field.value.trim();
    if (!save || !text) return void node.replaceWith(messageElement(message));
    truncate(message);
    ask(text);
  };
  send.addEventListener("click", () => finish(true));
  cancel.addEventListener("click", () => finish(false));
  field.addEventListener("keydown", (event) => {
    if (isSend(event)) {
      event.preventDefault();
      finish(true);
    } else if (event.key === "Escape" && !event.isComposing) finish(false);
  });
  field.addEventListener("input", () => fit(field));
  node.classList.add("editing");
  node.replaceChildren(field, element("div", { class: "bar end" }, cancel, send));
  fit(field);
  field.focus();
}

// Take away a message and all that follow.
function truncate(message) {
  running.get(current.id)?.abort();
  running.delete(current.id);
  current.messages.splice(current.messages.indexOf(message));
  showMessages();
}

function regenerate(message) {
  truncate(message);
  reply();
}

function codeHeader(language, code) {
  const copy = button("copy", words().copy, () => copyText(code.textContent, copy));
  return element("div", { class: "bar" }, element("span", {}, language || "text"), copy);
}

// ------------------------------------------------------------------------------------------------------------- answers

function ask(text) {
  if (running.has(current.id)) return;
  current.messages.push({ role: "user", content: text });
  current.title ||= text.replace(/\s+/g, " ").slice(0, MAX_TITLE);
  reply();
}

async function reply() {
  const conversation = current;
  const message = { role: "assistant", content: "" };
  const sent = conversation.messages.map(({ role, content }) => ({ role, content }));
  conversation.messages.push(message);
  const stopper = new AbortController();
  running.set(conversation.id, stopper);
  conversations = [conversation, ...conversations.filter((each) => each !== conversation)];
  keep();
  showConversations();
  showMessages();
  announce(words().writing);
  const timer = setInterval(() => store.saveConversations(conversations), SAVE_MS);
  try {
    await write(message, sent, stopper.signal);
  } catch (error) {
    if (stopper.signal.aborted) message.finish = "stopped";
    else if (error instanceof ServiceError) message.error = error.message || error.code;
    else message.error = message.content ? "interrupted" : "unreachable";
  }
  clearInterval(timer);
  if (running.get(conversation.id) === stopper) running.delete(conversation.id);
  if (conversations.includes(conversation)) keep();
  if (current === conversation) {
    views.get(message)?.();
    showState();
    follow();
    announce(message.error ? notesOf(message)[0] : words().finished);
  }
}

async function write(message, sent, signal) {
  const began = performance.now();
  let first = 0;
  let last = 0;
  let pieces = 0;
  let frame = 0;
  const show = () => {
    frame = 0;
    const following = nearEnd();
    views.get(message)?.();
    if (following) toEnd();
  };
  try {
    for await (const event of answerThatFits(message, sent, signal)) {
      if (event.text) {
        message.content += event.text;
        last = performance.now();
        first ||= last;
        pieces++;
        frame ||= requestAnimationFrame(show);
      }
      if (event.finish) message.finish = event.finish;
      if (event.tokens) pieces = event.tokens;
    }
  } finally {
    cancelAnimationFrame(frame);
    if (first) message.figures = figures(pieces, first - began, last - first);
  }
}

// Where a conversation is longer than the model's context, its oldest turns are left out, and the answer says how many.
async function* answerThatFits(message, sent, signal) {
  for (;;) {
    try {
      return yield* answer(requestBody(sent), { key: settings.key, signal });
    } catch (error) {
      const next = sent.findIndex(({ role }, index) => index > 0 && role === "user");
      if (error.code !== "context_length_exceeded" || next < 0) throw error;
      sent = sent.slice(next);
      message.forgotten = (message.forgotten ?? 0) + next;
    }
  }
}

function requestBody(messages) {
  const { system, temperature, top_p, max_tokens, seed } = settings;
  const optional = Object.entries({ max_tokens, seed }).filter(([, value]) => value !== "");
  return {
    ...(model && { model }),
    messages: [...(system.trim() ? [{ role: "system", content: system }] : []), ...messages],
    temperature,
    top_p,
    ...Object.fromEntries(optional),
  };
}

function figures(tokens, firstMs, restMs) {
  const rate = tokens > 1 && restMs > 0 ? ((tokens - 1) / restMs) * 1000 : 0;
  const first = firstMs < 1000 ? `${Math.round(firstMs)}\u00a0ms` : `${(firstMs / 1000).toFixed(1)}\u00a0s`;
  return { tokens, rate: rate && Number(rate.toPrecision(rate < 10 ? 2 : 3)), first };
}

function showState() {
  const busy = running.has(current.id);
  const send = $("send");
  send.querySelector("use").setAttribute("href", busy ? "#stop" : "#up");
  send.dataset.label = busy ? "stop" : "send";
  send.disabled = !busy && !input.value.trim();
  translate(send.parentElement);
}

// -------------------------------------------------------------------------------------------------------- small things

function button(icon, label, action) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#${icon}`);
  svg.append(use);
  const made = element("button", { type: "button", class: "icon", "aria-label": label, title: label }, svg);
  made.addEventListener("click", action);
  return made;
}

async function copyText(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    if (!copyTheOldWay(text)) return toast(words().notCopied);
  }
  const use = from.querySelector("use");
  use.setAttribute("href", "#check");
  setTimeout(() => use.setAttribute("href", "#copy"), 1500);
  announce(words().copied);
}

// Over plain HTTP from another machine, browsers have no navigator.clipboard.
function copyTheOldWay(text) {
  const field = element("textarea", { class: "unseen" });
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  return copied;
}

let toastTimer;
function toast(text, label, action) {
  clearTimeout(toastTimer);
  const parts = [element("span", {}, text)];
  if (label) {
    const act = element("button", { type: "button", class: "plain" }, label);
    act.addEventListener("click", () => {
      hideToast();
      action();
    });
    parts.push(act);
  }
  $("toast").replaceChildren(...parts);
  $("toast").classList.add("shown");
  toastTimer = setTimeout(hideToast, 6000);
}
const hideToast = () => $("toast").classList.remove("shown");

// For screen readers; nothing is to be seen.
function announce(text) {
  if ($("toast").classList.contains("shown")) return;
  $("toast").replaceChildren(element("span", {}, text));
}

const nearEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
const toEnd = () => (scroller.scrollTop = scroller.scrollHeight);
const follow = () => nearEnd() && toEnd();

function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

// Enter sends; with Shift it begins a line; while a Chinese word is composed it belongs to the input method.
const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

function openSidebar() {
  document.body.classList.add("sidebar-open");
  $("new").focus();
}
const closeSidebar = () => document.body.classList.remove("sidebar-open");

function exportCurrent() {
  const said = { user: words().you, assistant: words().assistant };
  const turns = current.messages.map(({ role, content }) => `## ${said[role]}\n\n${content}\n`);
  const name = current.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "chat";
  store.download(`${name}.md`, `# ${current.title}\n\n${turns.join("\n")}`, "text/markdown");
}

// ------------------------------------------------------------------------------------------------------------ settings

const form = document.querySelector("#settings form");

function showSettings() {
  for (const [name, value] of Object.entries(settings)) if (form.elements[name]) form.elements[name].value = value;
  for (const range of form.querySelectorAll("input[type=range]")) {
    range.parentElement.querySelector("output").textContent = Number(range.value).toFixed(2);
  }
}

function takeSettings() {
  for (const field of form.elements) {
    if (!field.name || !field.checkValidity()) continue;
    const number = field.type === "range" || (field.type === "number" && field.value !== "");
    settings[field.name] = number ? Number(field.value) : field.value;
  }
  if (!store.saveSettings(settings)) toast(words().notKept);
  showSettings();
}

function appear() {
  applyAppearance(settings);
  translate();
  showConversations();
  showMessages();
}

// -------------------------------------------------------------------------------------------------------------- events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running.has(current.id)) return void running.get(current.id).abort();
  const text = input.value.trim();
  if (!text) return;
  input.value = "";
  fit(input);
  ask(text);
});
input.addEventListener("input", () => {
  fit(input);
  showState();
});
input.addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  if (!running.has(current.id)) $("composer").requestSubmit();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !$("settings").open) {
    if (document.body.classList.contains("sidebar-open")) closeSidebar();
    else running.get(current.id)?.abort();
  }
  if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    open(create());
  }
});
addEventListener("hashchange", () => {
  const wanted = conversations.find(({ id }) => `#${id}` === location.hash);
  if (wanted && wanted !== current) open(wanted);
});
addEventListener("pagehide", () => store.saveConversations(conversations));
scroller.addEventListener("scroll", () => ($("to-end").hidden = nearEnd()), { passive: true });
$("to-end").addEventListener("click", toEnd);
$("new").addEventListener("click", () => open(create()));
$("show").addEventListener("click", openSidebar);
$("hide").addEventListener("click", closeSidebar);
$("shade").addEventListener("click", closeSidebar);
$("export").addEventListener("click", exportCurrent);
$("export-all").addEventListener("click", () => store.download("chats.json", JSON.stringify(conversations, null, 2), "application/json"));
$("open-settings").addEventListener("click", () => {
  showSettings();
  $("settings").showModal();
});
$("settings").addEventListener("click", ({ target }) => target === $("settings") && $("settings").close());
$("settings").addEventListener("close", () => void findModel());
form.addEventListener("input", takeSettings);
form.addEventListener("change", ({ target }) => ["theme", "language"].includes(target.name) && appear());
$("defaults").addEventListener("click", () => {
  settings = { ...store.DEFAULTS, key: settings.key };
  showSettings();
  takeSettings();
  appear();
});
store.onChangeElsewhere((changed) => {
  if (running.size) return; // this tab's answer is newer, and is kept when it ends
  conversations = changed;
  current = changed.find(({ id }) => id === current.id) ?? current;
  showConversations();
  showMessages();
});

async function findModel() {
  try {
    const [served] = await models(settings.key);
    model = served?.id ?? null;
    // What the model's makers recommend, where the user has not chosen
    for (const [name, value] of Object.entries(served?.sampling ?? {})) {
      if (name in store.DEFAULTS && settings[name] === store.DEFAULTS[name]) settings[name] = value;
    }
    showSettings();
  } catch {
    model = null; // the first question will say that the service cannot be reached
  }
  $("model").textContent = model ?? "";
}

translate();
open(conversations.find(({ id }) => `#${id}` === location.hash) ?? create());
void findModel();
