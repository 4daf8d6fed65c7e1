"use strict";
// Texts from data go in by textContent only: a reply with <script> shows as such.
const $ = (selector, root = document) => root.querySelector(selector);
const make = (tag, words, name) => {
  const node = document.createElement(tag);
  if (words !== undefined) node.textContent = words;
  if (name) node.className = name;
  return node;
};
const data = (id) => { const node = document.getElementById(id); return node ? JSON.parse(node.textContent) : null; };

// Tables sort by a click on their head
for (const head of document.querySelectorAll("th.sort")) head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, down = head.dataset.down !== "1";
  head.dataset.down = down ? "1" : "0";
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? String(a).localeCompare(String(b)) : a - b;
  [...body.rows].sort((a, b) => compare(value(a), value(b)) * (down ? -1 : 1)).forEach((row) => body.append(row));
});

// Charts: the step under the pointer is read out for every run
for (const chart of document.querySelectorAll("svg.lines")) {
  const { x, box, series } = JSON.parse(chart.dataset.chart), tip = $(".tip", chart.parentNode), cursor = $(".cursor", chart);
  chart.addEventListener("pointermove", (event) => {
    const frame = chart.getBoundingClientRect(), px = (event.clientX - frame.left) * 470 / frame.width;
    const at = x[0] + (px - box[0]) / (box[1] - box[0]) * (x[1] - x[0]);
    let step = null;
    const parts = Object.entries(series).map(([name, points]) => {
      const near = points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      step ??= near[0];
      return `${name} ${near[1].toPrecision(4)}`;
    });
    tip.textContent = `step ${step}: ${parts.join(", ")}`;
    const inside = Math.min(Math.max(px, box[0]), box[1]);
    cursor.setAttribute("x1", inside); cursor.setAttribute("x2", inside); cursor.setAttribute("visibility", "visible");
  });
}

// A pager over items: show(item, node) draws one
function pager(root, items, show) {
  let at = 0;
  const node = $(".item", root), count = $(".count", root);
  const draw = () => {
    node.replaceChildren();
    count.textContent = items.length ? `${at + 1} of ${items.length}` : "none";
    if (items.length) show(items[at], node);
  };
  const move = (by) => { if (items.length) { at = (at + by + items.length) % items.length; draw(); } };
  $(".back", root).onclick = () => move(-1);
  $(".next", root).onclick = () => move(1);
  draw();
}

const pairs = data("pairs");
if (pairs) pager($("#pager"), pairs, (pair, node) => {
  node.append(make("div", pair.prompt, "said"));
  const two = make("div", undefined, "two");
  for (const side of ["desirable", "undesirable"]) {
    const box = make("div", undefined, `box ${side === "desirable" ? "right" : "wrong"}`);
    box.append(make("b", side), make("div", pair[side].reply, "said"), make("div", pair[side].about, "small"));
    two.append(box);
  }
  node.append(two, make("div", pair.about, "small"));
});

// Replies on which two arms differ
const replies = data("replies");
if (replies) {
  const root = $("#replies-view"), [first, second, task, who] = ["first", "second", "task", "who"].map((id) => document.getElementById(id));
  const marked = (reply, extracted) => {
    const node = make("div", undefined, "said"), at = extracted ? reply.lastIndexOf(extracted) : -1;
    if (at < 0) node.textContent = reply;
    else node.append(reply.slice(0, at), make("mark", extracted), reply.slice(at + extracted.length));
    return node;
  };
  const update = () => {
    const a = first.value, b = second.value;
    const items = replies.filter((q) => q.by[a] && q.by[b] && q.by[a][2] !== q.by[b][2] && (task.value === "all" || q.task === task.value)
      && (who.value === "either" || (who.value === "first" ? q.by[a][2] > q.by[b][2] : q.by[b][2] > q.by[a][2])));
    pager(root, items, (q, node) => {
      node.append(make("div", `${q.task} ${q.id}`, "small"), make("div", q.prompt, "said"));
      const two = make("div", undefined, "two");
      for (const name of [a, b]) {
        const [reply, extracted, score] = q.by[name], box = make("div", undefined, `box ${score >= 0.5 ? "right" : "wrong"}`);
        box.append(make("b", `${name}: ${score === 1 ? "right" : score === 0 ? "wrong" : score}`), marked(reply, extracted));
        if (extracted !== null) box.append(make("div", `read as: ${extracted}`, "small"));
        two.append(box);
      }
      node.append(two);
    });
  };
  for (const list of [first, second, task, who]) list.addEventListener("change", update);
  update();
}
