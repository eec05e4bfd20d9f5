// The dashboard's script: filters the heat map, and draws a cell's trend when the address asks for it (#cell=…).
"use strict";

(() => {
  const FOLDER = new URL(".", document.currentScript.src).href;
  const NONE = "—";
  const TONES = { regression: "fail", improvement: "pass", notice: "undecided" };
  const histories = new Map(); // a cell's name → what its file holds
  const byId = id => document.getElementById(id);

  // ---- Figures, written as in the report -------------------------------------------------------------------------

  const minus = text => text.replace("-", "−");
  const fixed = (value, decimals = 2) => minus(value.toFixed(decimals)).replace(/^−(0(\.0*)?)$/, "$1");
  function figures(value, count = 3) {
    if (!value) return "0";
    const exponent = Number(value.toExponential(count - 1).split("e")[1]);
    return fixed(value, Math.min(12, Math.max(0, count - 1 - exponent)));
  }
  const sizeUnit = value => [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]].find(([, factor]) => value >= factor) || ["B", 1];
  function size(value) {
    const [unit, factor] = sizeUnit(value);
    return `${figures(value / factor)} ${unit}`;
  }
  const milliseconds = value => value < 0.1 ? `${figures(value * 1000)} µs` : `${figures(value)} ms`;
  const percent = value => `${fixed(value)} %`;
  const points = value => `${fixed(value)} pp`;
  const times = value => `${figures(value)}×`;
  const known = value => value !== null && value !== undefined;
  const form = (write, value) => known(value) ? write(value) : NONE;
  const between = (write, value, low, high) =>
    known(value) ? `${write(value)}${known(low) && known(high) ? ` (${write(low)} to ${write(high)})` : ""}` : NONE;
  const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
  const dayOf = night => `${Number(night.slice(8, 10))} ${MONTHS[Number(night.slice(5, 7)) - 1]}`;

  // ---- Elements: text is only ever set as text, so nothing in it is markup ---------------------------------------

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) if (known(value)) element.setAttribute(name, value);
    element.append(...children.filter(child => known(child)));
    return element;
  }
  const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  // ---- The heat map's filters ------------------------------------------------------------------------------------

  function filter() {
    const wanted = byId("controls").elements;
    const text = wanted.text.value.trim().toLowerCase().split(/\s+/);
    const table = byId("heat"), columns = new Set();
    let shown = 0, all = 0;
    for (const row of table.tBodies[0].rows) {
      let any = false;
      for (const link of row.querySelectorAll("a")) {
        const name = link.hash.slice("#cell=".length), [, target, precision] = name.split("/");
        const on = text.every(word => name.toLowerCase().includes(word))
          && (!wanted.target.value || wanted.target.value === target)
          && (!wanted.precision.value || wanted.precision.value === precision)
          && (!wanted.outcome.value || wanted.outcome.value === link.dataset.verdict);
        link.classList.toggle("off", !on);
        all += 1;
        if (on) { any = true; shown += 1; columns.add(link.parentNode.cellIndex); }
      }
      row.hidden = !any;
    }
    hideColumns(table, columns);
    byId("shown").textContent = shown === all ? "" : `${shown} of ${all} cells`;
  }

  function hideColumns(table, columns) {
    for (const row of table.tBodies[0].rows) for (const cell of row.querySelectorAll("td")) cell.hidden = !columns.has(cell.cellIndex);
    const heads = table.tHead.rows[1].cells;
    for (const head of heads) head.hidden = !columns.has(head.cellIndex + 1);
    let column = 0;
    for (const group of [...table.tHead.rows[0].cells].slice(1)) {
      group.dataset.width ??= group.colSpan;
      const inside = [...heads].slice(column, column += Number(group.dataset.width));
      const width = inside.filter(head => !head.hidden).length;
      group.hidden = !width;
      group.colSpan = width || 1;
    }
  }

  // ---- Which cell is open: the address says it, so that links and the back button work ----------------------------

  function route() {
    const name = location.hash.startsWith("#cell=") ? location.hash.slice("#cell=".length) : null;
    for (const link of document.querySelectorAll("#heat a[aria-current]")) link.removeAttribute("aria-current");
    if (!name) { byId("trend").hidden = true; return; }
    const link = [...document.querySelectorAll("#heat a")].find(one => one.hash === location.hash);
    if (!link) { tell(`There is no cell ${name} in this matrix.`); return; }
    link.setAttribute("aria-current", "true");
    if (histories.has(name)) open(name); else load(name);
  }

  function load(name) {
    tell(`Reading the history of ${name} …`);
    const script = html("script", { src: `${FOLDER}${name.split("/").join("--")}.js` });
    script.onerror = () => tell("This cell's history is not there any more: a newer night was written. Load the page again.");
    document.head.append(script);
  }

  globalThis.bitferryNightly = {
    add(history) {
      histories.set(history.cell, history);
      if (location.hash === `#cell=${history.cell}`) open(history.cell);
    },
  };

  function tell(text) {
    byId("trend").replaceChildren(html("h2", { id: "trend-title" }, text));
    reveal();
  }

  function reveal() {
    byId("trend").hidden = false;
    byId("trend").focus({ preventScroll: true });
    byId("trend").scrollIntoView();
  }

  // ---- One cell's trend ------------------------------------------------------------------------------------------

  const CHARTS = [
    { title: "Accuracy", kinds: ["accuracy", "float accuracy", "verdict", "failure"], value: "percent", low: "percent_lower", high: "percent_upper", other: "float_percent", write: percent,
      legend: "with the bounds of the drop" },
    { title: "Ratio", kinds: ["latency"], value: "ratio", low: "ratio_lower", high: "ratio_upper", write: times, legend: "artifact’s time over the baseline’s, 95 % interval" },
    { title: "Size", kinds: ["size"], value: "file_bytes", write: size, bytes: true, legend: "of the artifact’s files" },
    { title: "Memory", kinds: ["memory"], value: "memory_bytes", write: size, bytes: true, legend: "peak, beyond what the runtime alone takes" },
  ];

  // The accuracy that each bound of the drop stands for; a metric that is better when lower drops upwards.
  function withBounds(history) {
    if (history.percent_lower) return history;
    const bound = name => history.nights.map((_, i) => {
      const before = history.float_percent[i], drop = history.drop_pp[i];
      if (!known(before) || !known(drop)) return null;
      const sign = (before - history.percent[i]) * drop < 0 ? -1 : 1;
      return before - sign * history[name][i];
    });
    history.percent_lower = bound("drop_upper_pp");
    history.percent_upper = bound("drop_lower_pp");
    return history;
  }

  function open(name) {
    const history = withBounds(histories.get(name)), last = history.nights.length - 1;
    const [recipe, target, precision] = name.split("/");
    const span = html("select", { "aria-label": "Nights shown" });
    for (const count of [30, 90].filter(count => count < history.nights.length)) span.append(html("option", { value: count }, `last ${count} nights`));
    span.append(html("option", { value: history.nights.length, selected: "" }, `all ${history.nights.length} nights`));
    const area = html("div", { class: "charts" });
    const draw = () => drawAll(area, history, history.nights.length - Number(span.value));
    span.onchange = draw;
    byId("trend").replaceChildren(
      html("div", { class: "bar-top" },
        html("h2", { id: "trend-title" }, `${recipe} `, html("span", {}, `${target} ${precision}`)),
        html("div", { class: "right-side" }, html("span", { class: `tag ${history.outcome[last]}` }, history.outcome[last]), span,
          history.report ? html("a", { href: history.report }, "Report") : null, html("a", { href: "#matrix" }, "Close"))),
      html("p", { class: "lead" }, `${history.headline}${history.kind[last] ? ` · measured on ${history.kind[last]}` : ""}`),
      findingList(history), area, chartKey(), diary(history), nightTable(history));
    reveal();
    draw();
    watch(area, draw);
  }

  let watcher = null;
  function watch(area, draw) {
    let width = area.clientWidth;
    watcher?.disconnect();
    watcher = new ResizeObserver(() => { if (area.clientWidth !== width) { width = area.clientWidth; draw(); } });
    watcher.observe(area);
  }

  function findingList(history) {
    if (!history.findings.length) return null;
    return html("ul", { class: "findings" }, ...history.findings.map(one => html("li", { class: TONES[one.severity] },
      html("div", { class: "said" }, html("p", { class: "where" }, html("span", { class: "tag" }, one.kind), html("span", {}, one.sentence)),
        html("p", { class: "note" }, `${one.since ? `Since ${one.since.slice(0, 10)}, compared` : "Compared"} with ${one.reference.slice(0, 10)}. `
          + (one.changed.length ? `Changed: ${one.changed.join(", ")}.` : "Nothing that is recorded changed."))))));
  }

  function drawAll(area, history, first) {
    const tip = html("div", { class: "tip", role: "status", hidden: "" });
    const charts = CHARTS.filter(spec => history[spec.value].some((value, i) => i >= first && known(value)))
      .map(spec => chart(spec, history, first));
    area.replaceChildren(...charts.map(one => one.figure), tip);
    if (!charts.length) area.replaceChildren(html("p", { class: "note" }, "None of these nights measured it."));
    for (const one of charts) one.draw(one.figure.clientWidth, index => show(area, tip, charts, one, history, index));
  }

  // ---- A chart: nights across, one figure up ---------------------------------------------------------------------

  function roundTicks(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find(digit => digit * power >= rough * 0.999) * power, found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
    return { step, found };
  }

  // Between nights: a gap where nothing was measured, or where another kind of node measured.
  function path(history, values, first, x, y) {
    let pen = "M", kind = null, drawn = "";
    for (let i = first; i < values.length; i += 1) {
      if (!known(values[i])) { pen = "M"; continue; }
      if (kind !== null && history.kind[i] !== kind) pen = "M";
      drawn += `${pen}${x(i).toFixed(1)} ${y(values[i]).toFixed(1)}`;
      pen = "L";
      kind = history.kind[i];
    }
    return drawn;
  }

  function limits(spec, history, first) {
    const all = [spec.value, spec.low, spec.high, spec.other].filter(Boolean).flatMap(name => history[name].slice(first)).filter(known);
    const low = Math.min(...all), high = Math.max(...all), margin = (high - low) * 0.08 || Math.abs(high) * 0.05 || 1;
    return [low - margin, high + margin];
  }

  function chart(spec, history, first) {
    const figure = html("figure", {}, html("figcaption", {}, spec.title,
      spec.other ? html("small", {}, html("span", { class: "key-line" }), "artifact") : null,
      spec.other ? html("small", {}, html("span", { class: "key-line float" }), "float model") : null, html("small", {}, spec.legend)));
    const one = { figure, spec, place: null, root: null };
    one.draw = (width, choose) => Object.assign(one, drawChart(figure, spec, history, first, width, choose));
    return one;
  }

  function drawChart(figure, spec, history, first, width, choose) {
    const marks = marksOf(spec, history, first), left = 58, right = width - 8;
    const stamps = history.nights.map(night => Date.parse(night)), last = stamps.length - 1;
    const x = i => last === first ? (left + right) / 2 : left + 6 + (right - left - 12) * (stamps[i] - stamps[first]) / (stamps[last] - stamps[first]);
    const rows = Math.max(2, placeLabels(marks, x, left, right)), top = 6 + 15 * rows, base = top + 142, [low, high] = limits(spec, history, first);
    const y = value => base - (base - top) * (value - low) / (high - low);
    const root = svg("svg", { viewBox: `0 0 ${width} ${base + 26}`, role: "img", tabindex: "0",
      "aria-label": `${spec.title} of ${history.cell}, ${last - first + 1} nights from ${history.nights[first].slice(0, 10)} to ${history.nights[last].slice(0, 10)}; arrow keys go through the nights, the table below has all of them` });
    axes(root, spec, { low, high, y, x, left, right, base, top }, history, first);
    const spacing = (right - left) / Math.max(1, last - first);
    if (spec.low) root.append(svg("path", { class: "bounds", "stroke-width": (spacing < 4 ? spacing + 0.3 : Math.min(5, spacing - 0.6)).toFixed(1), d: whiskers(spec, history, first, x, y) }));
    if (spec.other) root.append(svg("path", { class: "lines float", d: path(history, history[spec.other], first, x, y) }));
    root.append(svg("path", { class: "lines value", d: path(history, history[spec.value], first, x, y) }));
    if (spacing > 7) root.append(svg("path", { class: "beads", d: beads(spec, history, first, x, y) }));
    drawMarks(root, marks, x, top, base);
    const cursor = root.appendChild(svg("path", { class: "cursor" }));
    const place = i => ({ x: x(i), y: known(history[spec.value][i]) ? y(history[spec.value][i]) : null, top, base });
    listen(root, x, first, last, width, choose);
    figure.querySelector("svg")?.remove();
    figure.append(root);
    return { place, cursor, root };
  }

  function axes(root, spec, { low, high, y, x, left, right, base, top }, history, first) {
    const [unit, factor] = spec.bytes ? sizeUnit(high) : [spec.write === percent ? "%" : "×", 1];
    const { step, found } = roundTicks(low / factor, high / factor, 5);
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    for (const tick of found) {
      root.append(svg("path", { class: "grid", d: `M${left} ${y(tick * factor).toFixed(1)}H${right}` }),
        svg("text", { class: "end", x: left - 7, y: (y(tick * factor) + 4).toFixed(1) }, `${fixed(tick, decimals)}${unit === "×" ? unit : ` ${unit}`}`));
    }
    root.append(svg("path", { class: "axis", d: `M${left} ${base}H${right}` }));
    nightAxis(root, history, first, x, left, right, base + 21);
  }

  // Labels keep inside the plot and out of each other's way; the year is told where it changes.
  function nightAxis(root, history, first, x, left, right, baseline) {
    const last = history.nights.length - 1, count = Math.max(1, Math.min(last - first, Math.floor((right - left) / 90)));
    const year = i => history.nights[i].slice(0, 4), years = year(first) !== year(last);
    let end = -Infinity, told = null;
    for (let n = 0; n <= count; n += 1) {
      const i = Math.round(first + (last - first) * n / count);
      const text = dayOf(history.nights[i]) + (years && year(i) !== told ? ` ${year(i)}` : ""), half = text.length * 3.7;
      const middle = Math.min(Math.max(x(i), left + half), right - half);
      if (middle - half < end + 10) continue;
      root.append(svg("text", { class: "middle", x: middle.toFixed(1), y: baseline }, text));
      end = middle + half;
      told = year(i);
    }
  }

  function whiskers(spec, history, first, x, y) {
    let drawn = "";
    for (let i = first; i < history.nights.length; i += 1) {
      const low = history[spec.low][i], high = history[spec.high][i];
      if (known(low) && known(high)) drawn += `M${x(i).toFixed(1)} ${y(low).toFixed(1)}V${y(high).toFixed(1)}`;
    }
    return drawn;
  }

  // A bead is a night that measured; where a result was reused, the line alone goes on.
  function beads(spec, history, first, x, y) {
    return history[spec.value].map((value, i) => i >= first && known(value) && history.status[i] === "measured" ? `M${x(i).toFixed(1)} ${y(value).toFixed(1)}h0` : "").join("");
  }

  // ---- Marks: the accepted night, change points, and nights on which something it is made from changed ------------

  function marksOf(spec, history, first) {
    const at = night => history.nights.indexOf(night), found = [];
    if (at(history.reference) >= first) found.push({ index: at(history.reference), kind: "accepted", tone: "", text: "accepted" });
    for (const one of history.findings) {
      if (one.since && at(one.since) >= first && spec.kinds.includes(one.kind)) {
        found.push({ index: at(one.since), kind: "since", tone: TONES[one.severity], text: `${one.severity} since ${dayOf(one.since)}` });
      }
    }
    for (const night of Object.keys(history.changes)) if (at(night) >= first) found.push({ index: at(night), kind: "changed" });
    return found;
  }

  // Each label goes into the first row in which it overlaps none; gives the number of rows.
  function placeLabels(marks, x, left, right) {
    const ends = [];
    for (const mark of marks.filter(one => one.text).sort((a, b) => a.index - b.index)) {
      const width = mark.text.length * 7.2 + 8, at = x(mark.index);
      mark.end = at + width > right;
      const start = mark.end ? Math.max(left, at - width) : at;
      let row = ends.findIndex(end => start >= end);
      if (row < 0) row = ends.push(0) - 1;
      ends[row] = start + width;
      mark.row = row;
    }
    return ends.length;
  }

  function drawMarks(root, marks, x, top, base) {
    for (const mark of marks) {
      const at = x(mark.index);
      if (mark.kind === "changed") { root.append(svg("path", { class: "changed", d: `M${at.toFixed(1)} ${base - 1}l4 7h-8z` })); continue; }
      const label = 13 + 15 * mark.row;
      root.append(svg("path", { class: `${mark.kind} ${mark.tone}`, d: `M${at.toFixed(1)} ${label - 11}V${base}` }),
        svg("text", { class: `halo ${mark.kind} ${mark.tone}${mark.end ? " end" : ""}`, x: (at + (mark.end ? -5 : 5)).toFixed(1), y: label }, mark.text));
    }
  }

  function chartKey() {
    const sign = (...shapes) => svg("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" }, ...shapes);
    return html("ul", { class: "legend chart-key" },
      html("li", {}, sign(svg("path", { class: "accepted", d: "M13 0V12" })), "the accepted night"),
      html("li", {}, sign(svg("path", { class: "changed", d: "M13 2l4 7h-8z" })), "something it is made from changed"),
      html("li", {}, "a gap: not measured, or by another kind of node"));
  }

  // ---- The night under the pointer, or chosen with the arrow keys -------------------------------------------------

  function listen(root, x, first, last, width, choose) {
    let chosen = last;
    const to = index => choose(chosen = Math.min(last, Math.max(first, index)));
    root.onpointermove = event => {
      const box = root.getBoundingClientRect(), at = (event.clientX - box.left) * width / box.width;
      let nearest = first;
      for (let i = first; i <= last; i += 1) if (Math.abs(x(i) - at) < Math.abs(x(nearest) - at)) nearest = i;
      to(nearest);
    };
    root.onpointerleave = () => { if (document.activeElement !== root) choose(null); };
    root.onfocus = () => { if (root.matches(":focus-visible")) to(chosen); };
    root.onblur = () => choose(null);
    root.onkeydown = event => {
      const step = { ArrowLeft: chosen - 1, ArrowRight: chosen + 1, Home: first, End: last }[event.key];
      if (event.key === "Escape") { choose(null); return; }
      if (step === undefined) return;
      event.preventDefault();
      to(step);
    };
  }

  function show(area, tip, charts, own, history, index) {
    for (const one of charts) one.cursor.style.visibility = index === null ? "hidden" : "visible";
    tip.hidden = index === null;
    if (index === null) return;
    for (const one of charts) {
      const { x, y, top, base } = one.place(index);
      one.cursor.setAttribute("d", `M${x.toFixed(1)} ${top}V${base}${y === null ? "" : `M${(x - 4).toFixed(1)} ${y.toFixed(1)}h8`}`);
    }
    tip.replaceChildren(...told(history, index));
    const box = own.root.getBoundingClientRect(), frame = area.getBoundingClientRect(), at = box.left - frame.left + own.place(index).x;
    const side = at + 14 + tip.offsetWidth > frame.width ? at - 14 - tip.offsetWidth : at + 14;
    tip.style.left = `${Math.max(0, Math.min(side, frame.width - tip.offsetWidth))}px`;
    tip.style.top = `${box.top - frame.top + 18}px`;
  }

  function told(history, i) {
    const changed = history.changes[history.nights[i]];
    const rows = [["accuracy", form(percent, history.percent[i])], ["drop", between(points, history.drop_pp[i], history.drop_lower_pp[i], history.drop_upper_pp[i])],
      ["ratio", between(times, history.ratio[i], history.ratio_lower[i], history.ratio_upper[i])], ["latency", form(milliseconds, history.latency_ms[i])],
      ["size", form(size, history.file_bytes[i])], ["memory", form(size, history.memory_bytes[i])]];
    return [html("b", {}, `${history.nights[i].slice(0, 10)}: ${history.outcome[i]}${history.status[i] === "reused" ? ", reused" : ""}`),
      html("dl", {}, ...rows.filter(([, text]) => text !== NONE).flatMap(([name, text]) => [html("dt", {}, name), html("dd", {}, text)])),
      changed ? html("p", {}, `Changed: ${changed.slice(0, 3).join(", ")}${changed.length > 3 ? ` and ${changed.length - 3} more` : ""}`) : null].filter(Boolean);
  }

  // ---- Nights in words, and all of them as a table ----------------------------------------------------------------

  function diary(history) {
    const entries = history.nights.map((night, i) => {
      const before = history.outcome[i - 1], said = [];
      if (i && before !== history.outcome[i]) said.push(`${before} → ${history.outcome[i]}`);
      if (night === history.reference) said.push("the accepted reference");
      for (const one of history.findings) if (one.since === night) said.push(`${one.kind} ${one.severity} begins`);
      return [night, [...said, ...(history.changes[night] || [])].join("; ")];
    }).filter(([, text]) => text).reverse();
    if (!entries.length) return null;
    const line = ([night, text]) => html("li", {}, html("time", { datetime: night }, night.slice(0, 10)), html("div", {}, text));
    return html("div", {}, html("h3", {}, "Nights on which something changed"), html("ul", { class: "diary" }, ...entries.slice(0, 12).map(line)),
      entries.length > 12 ? html("p", { class: "note" }, `and ${entries.length - 12} before them, in the table`) : null);
  }

  function nightTable(history) {
    const details = html("details", { id: "nights" }, html("summary", {}, `All ${history.nights.length} nights as a table`));
    details.ontoggle = () => { if (details.open && !details.querySelector("table")) details.append(tableOf(history)); };
    return details;
  }

  function tableOf(history) {
    const heads = ["Night", "Outcome", "Accuracy", "Float", "Drop", "Latency", "Ratio", "Size", "Memory", "Changed"];
    const body = html("tbody");
    for (let i = history.nights.length - 1; i >= 0; i -= 1) {
      const cells = [form(percent, history.percent[i]), form(percent, history.float_percent[i]), between(points, history.drop_pp[i], history.drop_lower_pp[i], history.drop_upper_pp[i]),
        form(milliseconds, history.latency_ms[i]), between(times, history.ratio[i], history.ratio_lower[i], history.ratio_upper[i]), form(size, history.file_bytes[i]), form(size, history.memory_bytes[i])];
      body.append(html("tr", {}, html("th", { scope: "row" }, history.nights[i].slice(0, 16).replace("T", " ")),
        html("td", {}, `${history.outcome[i]}${history.status[i] === "reused" ? ", reused" : ""}`), ...cells.map(text => html("td", { class: "n" }, text)),
        html("td", { class: "text" }, (history.changes[history.nights[i]] || []).join("; "))));
    }
    const head = html("thead", {}, html("tr", {}, ...heads.map((name, i) => html("th", { scope: "col", class: i > 1 && i < 9 ? "n" : null }, name))));
    return html("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "All nights" }, html("table", {}, head, body));
  }

  // ---- Start: scripts with `defer` run when the page is there ------------------------------------------------------

  byId("filters").hidden = false;
  byId("controls").oninput = filter;
  byId("controls").onsubmit = event => event.preventDefault();
  addEventListener("hashchange", route);
  route();
})();
