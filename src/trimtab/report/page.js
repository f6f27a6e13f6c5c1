"use strict";
// Everything is already on the page; this adds reading the charts by pointer and by arrow keys, sorting, and copying.
(() => {
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const tip = document.getElementById("tip"), voice = document.getElementById("voice");
  let byKeys = null;  // the chart being read with the keyboard
  const charts = [...document.querySelectorAll("figure[data-chart]")].map(setUp);
  const make = (name, text) => Object.assign(document.createElement(name), { textContent: text });
  const drawn = (name, attrs) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attrs)) node.setAttribute(key, value);
    return node;
  };

  function setUp(figure) {
    const chart = { ...data.charts[figure.dataset.chart], figure, svg: figure.querySelector("svg"), at: -1 };
    chart.order = chart.kind === "grid" ? [] : [...chart.x.keys()].sort((a, b) => chart.x[a] - chart.x[b] || a - b);
    chart.svg.classList.add("live");
    chart.svg.setAttribute("tabindex", "0");
    chart.svg.setAttribute("aria-describedby", "keys");
    chart.svg.addEventListener("pointermove", (event) => point(chart, event));
    chart.svg.addEventListener("pointerdown", (event) => point(chart, event));
    chart.svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    chart.svg.addEventListener("blur", hide);
    chart.svg.addEventListener("keydown", (event) => key(chart, event));
    return chart;
  }

  function place(chart, event) {
    return new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.svg.getScreenCTM().inverse());
  }

  function point(chart, event) {
    const p = place(chart, event);
    if (chart.kind === "grid") {
      const size = chart.labels.length, step = chart.cell;
      const column = Math.floor((p.x - chart.x) / step), row = Math.floor((p.y - chart.y) / step);
      return row >= 0 && column >= 0 && row < size && column < size ? show(chart, row * size + column, event) : hide();
    }
    const flat = chart.kind === "column";
    const reach = flat ? Math.max(12, Math.abs(chart.x[1] - chart.x[0]) || 0) : 26;
    let best = -1, least = reach * reach;
    for (let k = 0; k < chart.x.length; k++) {
      const d = (chart.x[k] - p.x) ** 2 + (flat ? 0 : (chart.y[k] - p.y) ** 2);
      if (d <= least) { least = d; best = k; }
    }
    best < 0 ? hide() : show(chart, best, event);
  }

  function key(chart, event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") return hide();
    const grid = chart.kind === "grid", size = grid ? chart.labels.length : 0;
    const count = grid ? size * size : chart.order.length;
    if (!count || !(step || event.key === "Home" || event.key === "End")) return;
    event.preventDefault();
    let at = chart.at;
    if (event.key === "Home") at = 0;
    else if (event.key === "End") at = count - 1;
    else if (at < 0) at = step > 0 ? 0 : count - 1;
    else at += step * (grid && /Up|Down/.test(event.key) ? size : 1);
    at = Math.max(0, Math.min(count - 1, at));
    show(chart, grid ? at : chart.order[at]);
    chart.at = at;
  }

  // What is known about mark `k`: a title and pairs of words.
  function facts(chart, k) {
    if (chart.kind !== "grid") return data.tips[chart.tips][chart.i ? chart.i[k] : k];
    const size = chart.labels.length, row = Math.floor(k / size), column = k % size;
    const seen = chart.matrix[row].reduce((a, b) => a + b, 0), value = chart.matrix[row][column];
    const share = seen ? ` (${(100 * value / seen).toFixed(1)}% of this class)` : "";
    return [row === column ? "Right" : "Mistaken", [["true", chart.labels[row]], ["predicted", chart.labels[column]], ["images", value + share]]];
  }

  function show(chart, k, event) {
    const [title, pairs] = facts(chart, k), list = make("dl", "");
    for (const [name, value] of pairs) list.append(make("dt", name), make("dd", value));
    tip.replaceChildren(make("b", title), list);
    clear();
    mark(chart, k);
    if (chart.i) {
      for (const other of charts) if (other !== chart && other.tips === chart.tips && other.i) {
        const twin = other.i.indexOf(chart.i[k]);
        if (twin >= 0) mark(other, twin);
      }
      document.querySelector(`#tried tr[data-i="${chart.i[k]}"]`)?.classList.add("lit");
    }
    tip.classList.add("on");
    byKeys = event ? null : chart;
    settle(chart, event);
    voice.textContent = event ? "" : `${title}. ${pairs.map((pair) => pair.join(" ")).join(", ")}`;
  }

  // Puts the tip beside the pointer, or beside the mark that the keys have reached, and inside the window.
  function settle(chart, event) {
    const own = chart.figure.querySelector(".hi").getBoundingClientRect(), box = tip.getBoundingClientRect();
    const x = event ? event.clientX : own.right, y = event ? event.clientY : own.top;
    const left = x + 16 + box.width > innerWidth - 8 ? x - 16 - box.width : x + 16;
    tip.style.left = Math.max(8, Math.min(left, innerWidth - box.width - 8)) + "px";
    tip.style.top = Math.max(8, Math.min(y - box.height - 12 < 8 ? y + 18 : y - box.height - 12, innerHeight - box.height - 8)) + "px";
  }

  function mark(chart, k) {
    if (chart.kind === "grid") {
      const size = chart.labels.length, row = Math.floor(k / size), column = k % size, step = chart.cell;
      chart.svg.append(drawn("rect", { class: "hi", x: chart.x + column * step, y: chart.y + row * step, width: step, height: step }));
    } else {
      if (chart.span) chart.svg.append(drawn("path", { class: "hi line", d: `M${chart.x[k]} ${chart.span[0]}V${chart.span[1]}` }));
      if (chart.y[k] !== null) chart.svg.append(drawn("circle", { class: "hi", cx: chart.x[k], cy: chart.y[k], r: chart.span ? 4 : 8 }));
    }
  }

  function clear() {
    for (const node of document.querySelectorAll(".hi")) node.remove();
    for (const node of document.querySelectorAll("tr.lit")) node.classList.remove("lit");
  }

  function hide() {
    byKeys = null;
    for (const chart of charts) chart.at = -1;
    tip.classList.remove("on");
    clear();
  }
  addEventListener("pointerdown", (event) => { if (!event.target.closest("svg.live")) hide(); });
  addEventListener("scroll", () => { byKeys ? settle(byKeys) : hide(); }, { passive: true, capture: true });

  for (const head of document.querySelectorAll("table.sortable thead th")) {
    const button = make("button", head.textContent.trim());
    button.type = "button";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const body = head.closest("table").tBodies[0], column = head.cellIndex;
      const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : head.classList.contains("n");
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
      const compare = (a, b) => {
        const x = value(a), y = value(b);
        if (!x || !y) return x ? -1 : y ? 1 : 0;  // what is missing comes last, both ways
        const by = x - y;
        return (down ? -1 : 1) * (Number.isNaN(by) ? x.localeCompare(y, "en", { numeric: true }) : by);
      };
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...[...body.rows].sort(compare));
    });
  }

  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const code = button.parentNode.querySelector("code");
      let done = true;
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code);
        done = document.execCommand("copy");
      }
      button.textContent = done ? "Copied" : "Press Ctrl+C";
      voice.textContent = button.textContent;
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  const closed = [];
  addEventListener("beforeprint", () => {
    for (const node of document.querySelectorAll("details:not([open])[data-print]")) { node.open = true; closed.push(node); }
  });
  addEventListener("afterprint", () => { while (closed.length) closed.pop().open = false; });
})();
