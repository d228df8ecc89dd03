// A conversation as a tree: who edits a message or has an answer written again begins a branch, and loses nothing.

export const ROOT = -1;

export class Conversation {
  /** `stored`: what toJSON gave once. */
  constructor(stored) {
    this.nodes = Array.isArray(stored?.nodes) ? stored.nodes : [];
    this.chosen = stored?.chosen ?? {}; // by node: which of those that follow it is shown
  }

  /** The numbers of the messages that are shown, in order. */
  get path() {
    const path = [];
    for (let at = this.chosen[ROOT]; this.nodes[at] !== undefined; at = this.chosen[at]) path.push(at);
    return path;
  }

  /** Adds a message after another one (ROOT: as the first), and shows it. Returns its number. */
  add(message, parent) {
    const index = this.nodes.push({ ...message, parent }) - 1;
    this.chosen[parent] = index;
    return index;
  }

  /** The messages that stand in one place, of which one is shown. */
  siblings(index) {
    const { parent } = this.nodes[index];
    return this.nodes.flatMap((node, other) => (node.parent === parent ? [other] : []));
  }

  /** Shows this message and what followed it. */
  choose(index) {
    this.chosen[this.nodes[index].parent] = index;
  }

  /** From the first message to this one. */
  until(index) {
    const found = [];
    for (let at = index; at !== ROOT; at = this.nodes[at].parent) found.unshift(this.nodes[at]);
    return found;
  }

  toJSON() {
    return { nodes: this.nodes, chosen: this.chosen };
  }
}
