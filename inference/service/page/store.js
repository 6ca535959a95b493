// What stays in the browser: conversations and settings; the key only until the tab closes.

export const DEFAULTS = { system: "", temperature: 0.8, top_p: 1, max_tokens: "", seed: "", language: "", theme: "" };
const CONVERSATIONS = "chat.conversations";
const SETTINGS = "chat.settings";
const KEY = "chat.key";

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // storage is switched off, or holds something else under our name
  }
}

// Whether it could be kept.
function write(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false; // full, or switched off; the caller says so
  }
}

export const loadSettings = () => ({ ...DEFAULTS, ...read(localStorage, SETTINGS, {}), key: read(sessionStorage, KEY, "") });
export const saveSettings = ({ key, ...settings }) => write(localStorage, SETTINGS, settings) && write(sessionStorage, KEY, key);
export const loadConversations = () => {
  const kept = read(localStorage, CONVERSATIONS, []);
  return Array.isArray(kept) ? kept.filter((each) => each?.id && Array.isArray(each.messages)) : [];
};
export const saveConversations = (all) => write(localStorage, CONVERSATIONS, all.filter(({ messages }) => messages.length));

// Another tab has changed the conversations.
export const onChangeElsewhere = (react) =>
  addEventListener("storage", ({ key }) => key === CONVERSATIONS && react(loadConversations()));

export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
