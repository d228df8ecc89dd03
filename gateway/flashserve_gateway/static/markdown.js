// Markdown as DOM nodes: nothing that a model writes is ever parsed as HTML.

const BLOCK_START = /^(?:```|~~~|#{1,6} |[-*+] |\d+[.)] |> )/;

/** Splits a text into blocks, so that while it grows only the last of them changes. */
export function splitBlocks(text) {
  const blocks = [];
  let lines = [], fence = null;
  const close = () => { if (lines.length) blocks.push(lines.join("\n")); lines = []; };
  for (const line of text.split("\n")) {
    const mark = line.match(/^\s*(```|~~~)/);
    if (fence) {
      lines.push(line);
      if (mark && mark[1] === fence) { fence = null; close(); }
    } else if (mark) {
      close();
      fence = mark[1];
      lines.push(line);
    } else if (!line.trim()) {
      close();
    } else {
      if (/^#{1,6} /.test(line) || (lines.length && BLOCK_START.test(line) !== BLOCK_START.test(lines[0]))) close();
      lines.push(line);
      if (/^#{1,6} /.test(line)) close();
    }
  }
  close();
  return blocks;
}

export function renderBlock(block) {
  const lines = block.split("\n");
  if (/^\s*(```|~~~)/.test(lines[0])) {
    const last = lines.length > 1 && /^\s*(```|~~~)\s*$/.test(lines.at(-1));
    const code = element("code", lines.slice(1, last ? -1 : undefined).join("\n"));
    return element("pre", code);
  }
  const heading = lines[0].match(/^(#{1,6}) (.*)/);
  if (heading) return element(`h${Math.min(heading[1].length + 1, 4)}`, ...inline(heading[2]));
  if (/^[-*+] /.test(lines[0])) return list("ul", lines, /^\s*[-*+] /);
  if (/^\d+[.)] /.test(lines[0])) return list("ol", lines, /^\s*\d+[.)] /);
  if (lines[0].startsWith("> ")) return element("blockquote", ...inline(lines.map((l) => l.replace(/^> ?/, "")).join("\n")));
  return element("p", ...inline(block));
}

function list(kind, lines, mark) {
  const items = [];
  for (const line of lines) {
    if (mark.test(line)) items.push(line.replace(mark, ""));
    else items[items.length - 1] += "\n" + line.trim();
  }
  const node = element(kind, ...items.map((item) => element("li", ...inline(item))));
  if (kind === "ol") node.start = parseInt(lines[0], 10);
  return node;
}

const INLINE = /(`+)([^]+?)\1|\*\*([^*\n]+)\*\*|(?<![\w*])\*([^*\n]+)\*(?![\w*])|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/g;

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (match[2] !== undefined) nodes.push(element("code", match[2]));
    else if (match[3] !== undefined) nodes.push(element("strong", match[3]));
    else if (match[4] !== undefined) nodes.push(element("em", match[4]));
    else {
      const link = element("a", match[5]);
      Object.assign(link, { href: match[6], rel: "noopener noreferrer", target: "_blank" });
      nodes.push(link);
    }
  }
  nodes.push(text.slice(end));
  return nodes;
}

export function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children.filter((child) => child !== ""));
  return node;
}
