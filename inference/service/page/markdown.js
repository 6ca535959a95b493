// Markdown → DOM nodes. Text of the model only ever becomes text nodes: there is no HTML in between, so that nothing in
// an answer can run, load or style anything. Images are shown as links, as the page asks no other host for anything.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const MAX_DEPTH = 8;

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// Show `text` in `container`. While an answer grows, the blocks that have not changed keep their nodes (and a selection).
export function render(container, text, codeHeader) {
  const blocks = split(text.replace(/\r\n?/g, "\n").split("\n"));
  const shown = [...container.children];
  blocks.forEach((block, index) => {
    const source = JSON.stringify(block);
    if (shown[index]?.source === source) return;
    const node = build(block, codeHeader, 0);
    node.source = source;
    if (shown[index]) shown[index].replaceWith(node);
    else container.append(node);
  });
  for (const extra of shown.slice(blocks.length)) extra.remove();
}

function split(lines) {
  const blocks = [];
  let at = 0;
  const takeWhile = (wanted) => {
    const start = at;
    while (at < lines.length && wanted(lines[at])) at++;
    return lines.slice(start, at);
  };
  const startsBlock = (line) => [FENCE, HEADING, RULE, ITEM, QUOTE].some((pattern) => pattern.test(line));
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at++;
    } else if ((match = FENCE.exec(line))) {
      at++;
      const end = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}\\s*$`);
      blocks.push({ kind: "code", language: match[2].trim().split(/\s/)[0], text: takeWhile((l) => !end.test(l)).join("\n") });
      at++; // the closing fence, which is still to come while the answer grows
    } else if ((match = HEADING.exec(line))) {
      at++;
      blocks.push({ kind: "heading", level: match[1].length, text: match[2] });
    } else if (RULE.test(line)) {
      at++;
      blocks.push({ kind: "rule" });
    } else if (QUOTE.test(line)) {
      blocks.push({ kind: "quote", blocks: split(takeWhile((l) => QUOTE.test(l)).map((l) => l.replace(QUOTE, ""))) });
    } else if (ITEM.test(line)) {
      blocks.push(list(lines, at, (next) => (at = next)));
    } else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "")) {
      const rows = takeWhile((l) => l.includes("|")).map(cells);
      blocks.push({ kind: "table", head: rows[0], rows: rows.slice(2) });
    } else {
      at++;
      const rest = takeWhile((l) => l.trim() && !startsBlock(l));
      blocks.push({ kind: "paragraph", text: [line, ...rest].join("\n") });
    }
  }
  return blocks;
}

function list(lines, at, done) {
  const [, indent, marker] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(marker);
  const items = [];
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (match && match[1].length <= indent.length && /\d/.test(match[2]) === ordered && !RULE.test(lines[at])) {
      items.push([match[3]]);
    } else if (items.length && /^\s/.test(lines[at]) && lines[at].trim()) {
      items.at(-1).push(lines[at]);
    } else if (items.length && !lines[at].trim() && /^(\s{2,}\S|\s*([-*+]|\d+[.)])\s)/.test(lines[at + 1] ?? "")) {
      items.at(-1).push("");
    } else break;
    at++;
  }
  done(at);
  const dedent = ([first, ...rest]) => {
    const width = Math.min(...rest.filter((l) => l.trim()).map((l) => /^\s*/.exec(l)[0].length), 8);
    return [first, ...rest.map((l) => l.slice(width))];
  };
  return { kind: "list", ordered, start: parseInt(marker) || 1, items: items.map((item) => split(dedent(item))) };
}

const cells = (line) =>
  line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function build(block, codeHeader, depth) {
  if (depth > MAX_DEPTH) return element("p", {}, "…");
  const inside = (blocks) => blocks.map((each) => build(each, codeHeader, depth + 1));
  switch (block.kind) {
    case "code": {
      const code = element("code", {}, block.text);
      return element("div", { class: "code" }, codeHeader(block.language, code), element("pre", { tabindex: "0" }, code));
    }
    case "heading":
      return element(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...inside(block.blocks));
    case "table": {
      const row = (tag, texts) => element("tr", {}, ...texts.map((text) => element(tag, {}, ...inline(text))));
      const body = block.rows.map((texts) => row("td", texts));
      const table = element("table", {}, element("thead", {}, row("th", block.head)), element("tbody", {}, ...body));
      return element("div", { class: "table", tabindex: "0" }, table);
    }
    case "list": {
      const items = block.items.map((blocks) => {
        const tight = blocks[0]?.kind === "paragraph";
        const first = tight ? inline(blocks[0].text) : [];
        return element("li", {}, ...first, ...inside(tight ? blocks.slice(1) : blocks));
      });
      return block.ordered ? element("ol", { start: block.start }, ...items) : element("ul", {}, ...items);
    }
    default:
      return element("p", {}, ...inline(block.text));
  }
}

const INLINE = new RegExp(
  [
    /\\([!-/:-@[-`{-~])/, // 1 an escaped sign
    /(`+)(.+?)(?<!`)\2(?!`)/, // 2, 3 code
    /\*\*(?=\S)(.+?)(?<=\S)\*\*/, // 4 bold
    /(?<!\w)__(?=\S)(.+?)(?<=\S)__(?!\w)/, // 5 bold
    /\*(?=\S)([^*]+?)(?<=\S)\*/, // 6 italic
    /(?<!\w)_(?=\S)([^_]+?)(?<=\S)_(?!\w)/, // 7 italic
    /~~(?=\S)(.+?)(?<=\S)~~/, // 8 struck out
    /!?\[([^\]]*)\]\(\s*<?([^\s)>]+)>?[^)]*\)/, // 9, 10 link
    /(https?:\/\/[^\s<>"'`，。；！？、）】」]*[^\s<>"'`，。；！？、）】」.,:;!?)\]])/, // 11 bare address
  ]
    .map((pattern) => pattern.source)
    .join("|"),
  "gs",
);

function inline(text, depth = 0) {
  const nodes = [];
  let done = 0;
  const again = (inner) => (depth < MAX_DEPTH ? inline(inner, depth + 1) : [inner]);
  for (const match of text.matchAll(INLINE)) {
    const [whole, escaped, , code, bold, bold2, italic, italic2, struck, label, target, bare] = match;
    nodes.push(...broken(text.slice(done, match.index)));
    done = match.index + whole.length;
    if (escaped) nodes.push(escaped);
    else if (code) nodes.push(element("code", {}, code.replace(/^ (.*\S.*) $/s, "$1")));
    else if (bold ?? bold2) nodes.push(element("strong", {}, ...again(bold ?? bold2)));
    else if (italic ?? italic2) nodes.push(element("em", {}, ...again(italic ?? italic2)));
    else if (struck) nodes.push(element("del", {}, ...again(struck)));
    else if (bare) nodes.push(link(bare, [bare]));
    else if (SAFE_LINK.test(target)) nodes.push(link(target, label ? again(label) : [target]));
    else nodes.push(whole);
  }
  nodes.push(...broken(text.slice(done)));
  return nodes;
}

// A line break in the text is one on the page, as models of all kinds write them.
function broken(text) {
  return text.split("\n").flatMap((line, index) => (index ? [element("br"), line] : [line])).filter((part) => part !== "");
}

const link = (target, children) =>
  element("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
