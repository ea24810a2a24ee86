// Draws the charts of the page from the JSON in #data, and keeps what the reader has chosen.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const one = id => document.getElementById(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const COLORS = 7;
  const state = {hidden: new Set(), smooth: 0, from: null, to: null};
  const plots = new Map(); // figure -> {plot, series, show}

  function format(value) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-4) return value.toExponential(2).replace(/\.?0+e/, "e");
    return String(Number(value.toPrecision(4)));
  }

  const brief = step => step >= 1e6 ? `${format(step / 1e6)}M` : step >= 1e4 ? `${format(step / 1e3)}k` : format(step);

  // ---- the lines of a chart ---------------------------------------------------------------------
  function smoothed(x, y, share) {
    // the mean of the finite values within half a window on either side
    if (!share || x.length < 3) return y;
    const half = share * (x[x.length - 1] - x[0]) / 2;
    let first = 0, last = 0, sum = 0, count = 0;
    return y.map((value, i) => {
      while (last < x.length && x[last] <= x[i] + half) {
        if (y[last] !== null) { sum += y[last]; count++; }
        last++;
      }
      while (x[first] < x[i] - half) {
        if (y[first] !== null) { sum -= y[first]; count--; }
        first++;
      }
      return value === null || !count ? null : sum / count;
    });
  }

  function linesOf(chart) {
    const shown = chart.lines.filter(line => !state.hidden.has(line.run)).map((line, place) => {
      const x = data.steps[line.x];
      const paint = color(`--r${(chart.stacked ? place : line.run) % COLORS}`);
      const dash = line.run >= COLORS && !chart.stacked ? [8, 3] : undefined;
      return {...line, x, paint, dash, drawn: line.held ? line.y : smoothed(x, line.y, state.smooth)};
    });
    if (chart.stacked) {
      // phases share their steps only if none was ever absent: look each up by its step
      const heights = new Map();
      for (const line of shown) {
        line.drawn = line.x.map((step, i) => {
          const height = (heights.get(step) || 0) + (line.drawn[i] || 0);
          heights.set(step, height);
          return height;
        });
        delete line.lo;
      }
    }
    return shown;
  }

  function columns(chart, lines) {
    const tables = [], modes = [], series = [{}], bands = [];
    const add = (line, y, style) => {
      tables.push([line.x, y]);
      modes.push([0, 1]);
      series.push({scale: "y", ...style});
      return series.length - 1;
    };
    for (const line of lines) {
      const style = {stroke: line.paint, width: line.held ? 1 : 1.8, dash: line.dash};
      if (line.lo) {
        const edge = {stroke: line.paint + "60", width: 0.7, points: {show: false}};
        const low = add(line, line.lo, edge), high = add(line, line.hi, edge);
        bands.push({series: [high, low], fill: line.paint + "38"});
      } else if (state.smooth && !line.held && !chart.stacked) {
        add(line, line.y, {...style, stroke: line.paint + "55", width: 1, points: {show: false}});
      }
      if (line.held) {
        style.points = {show: true, size: line.x.length > 60 ? 4 : 7, fill: color("--card"), stroke: line.paint, width: 2};
        style.dash = [2, 3];
      }
      const place = add(line, line.drawn, style);
      if (chart.stacked) {
        series[place].width = 1;
        if (line === lines[0]) series[place].fill = line.paint + "66";
        else bands.push({series: [place, place - 1], fill: line.paint + "66"});
      }
    }
    return {values: tables.length ? uPlot.join(tables, modes) : [[], []], series, bands};
  }

  // ---- what is drawn over the lines -------------------------------------------------------------
  function dashed(context, from, to, stroke) {
    context.save();
    context.strokeStyle = stroke;
    context.lineWidth = devicePixelRatio * 1.3;
    context.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    context.restore();
  }

  function overlay(chart) {
    return plot => {
      const {ctx, bbox} = plot;
      const label = (text, x, y, paint) => {
        ctx.fillStyle = paint;
        ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
        ctx.textAlign = "left";
        ctx.lineWidth = 4 * devicePixelRatio; // a halo, so that it can be read over lines
        ctx.strokeStyle = color("--card");
        ctx.strokeText(text, x, y);
        ctx.fillText(text, x, y);
      };
      if (chart.calibration) {
        const end = v => [plot.valToPos(v, "x", true), plot.valToPos(v, "y", true)];
        dashed(ctx, end(0.5), end(1), color("--quiet"));
        return;
      }
      for (const target of chart.targets.filter(t => !state.hidden.has(t.run))) {
        const y = plot.valToPos(target.value, "y", true);
        const paint = data.runs.length > 1 ? color(`--r${target.run % COLORS}`) : color("--quiet");
        dashed(ctx, [bbox.left, y], [bbox.left + bbox.width, y], paint);
        label(`target ${format(target.value)}`, bbox.left + 4 * devicePixelRatio, y - 4 * devicePixelRatio, paint);
      }
      const here = new Set(chart.lines.map(line => line.run));
      data.runs.forEach((run, index) => {
        if (state.hidden.has(index) || !here.has(index)) return;
        for (const step of run.alarms) {
          const x = plot.valToPos(step, "x", true);
          if (x < bbox.left || x > bbox.left + bbox.width) continue;
          dashed(ctx, [x, bbox.top], [x, bbox.top + bbox.height], color("--alarm"));
          label("▲", x - 4 * devicePixelRatio, bbox.top + bbox.height, color("--alarm"));
        }
      });
    };
  }

  // ---- one chart --------------------------------------------------------------------------------
  function nearest(x, step) {
    let low = 0, high = x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x[middle] < step) low = middle; else high = middle;
    }
    return step - x[low] <= x[high] - step ? low : high;
  }

  function axes(chart) {
    const base = {
      stroke: () => color("--quiet"), font: "11px system-ui, sans-serif",
      grid: {stroke: () => color("--grid"), width: 1}, ticks: {show: false},
    };
    const whole = [1, 2, 5].flatMap(n => Array.from({length: 10}, (_, i) => n * 10 ** i)).sort((a, b) => a - b);
    return [
      {...base, size: 28, gap: 4, values: (_, splits) => splits.map(brief), ...(chart.calibration ? {} : {incrs: whole})},
      {...base, size: 56, gap: 6, values: (_, splits) => splits.map(format)},
    ];
  }

  function options(chart, figure, found, size) {
    const targets = chart.targets.filter(t => !state.hidden.has(t.run)).map(t => t.value);
    const x = chart.calibration ? {time: false, range: [0.5, 1]} : {time: false};
    return {
      ...size, series: found.series, bands: found.bands, legend: {show: false}, axes: axes(chart), padding: [8, 14, 0, 0],
      scales: {x, y: {range: (_, low, high) => {
        if (low === null) return [0, 1];
        const most = Math.max(high, ...targets), least = Math.min(low, ...targets, ...(chart.stacked ? [0] : []));
        if (chart.calibration) return [Math.min(0.5, low) - 0.02, Math.max(1, high) + 0.02];
        return uPlot.rangeNum(least, most, 0.08, true);
      }}},
      cursor: {
        y: false, points: {size: 7},
        sync: chart.calibration ? {} : {key: "steps", scales: ["x", null]},
        drag: {x: !chart.calibration, y: false, setScale: false},
        bind: {dblclick: () => () => { zoom(null, null); return null; }},
      },
      hooks: {
        draw: [overlay(chart)],
        setCursor: [plot => read(figure, plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : null)],
        setSelect: [plot => {
          if (plot.select.width < 3) return;
          const left = plot.posToVal(plot.select.left, "x");
          const right = plot.posToVal(plot.select.left + plot.select.width, "x");
          plot.setSelect({left: 0, width: 0, top: 0, height: 0}, false);
          zoom(Math.floor(left), Math.ceil(right));
        }],
      },
    };
  }

  function draw(figure) {
    const chart = data.charts[figure.dataset.chart], box = figure.querySelector(".plot");
    if (figure.closest("details:not([open])")) return;
    const lines = linesOf(chart), found = columns(chart, lines);
    plots.get(figure)?.plot.destroy();
    const size = {width: box.clientWidth, height: box.clientHeight};
    const plot = new uPlot(options(chart, figure, found, size), found.values, box);
    plots.set(figure, {plot, lines, chart});
    if (!chart.calibration && (state.from !== null || state.to !== null)) plot.setScale("x", range(plot));
    read(figure, null);
    if (figure.querySelector(".values")?.open) tabulate(figure);
  }

  function range(plot) {
    const x = plot.data[0];
    return {min: state.from ?? x[0], max: state.to ?? x[x.length - 1]};
  }

  function wording(chart, line) {
    if (chart.stacked) return line.name;
    if (data.runs.length > 1) return line.name + (line.held ? ", held-out" : "");
    return line.held ? "held-out" : chart.names[0];
  }

  function read(figure, step) {
    // the values at a step, or the last ones
    const {lines, chart, plot} = plots.get(figure) || {};
    if (!lines) return;
    const out = figure.querySelector(".readout"), words = [];
    out.replaceChildren();
    const end = Math.max(...lines.map(line => line.x[line.x.length - 1]));
    const at = step ?? Math.min(end, state.to ?? end);
    let shown = null;
    const parts = lines.map(line => {
      const i = nearest(line.x, at), spread = line.lo && line.lo[i] !== null ? ` (${format(line.lo[i])} to ${format(line.hi[i])})` : "";
      if (!line.held || shown === null) shown = line.x[i];
      words.push(`${wording(chart, line)} ${format(line.y[i])}${spread}`.trim());
      const part = document.createElement("span"), dot = document.createElement("span"), value = document.createElement("b");
      part.className = "one";
      dot.className = line.held ? "swatch ring" : "swatch";
      dot.style.color = line.paint;
      value.textContent = format(line.y[i]);
      part.append(dot, `${wording(chart, line)} `, value, spread);
      return part;
    });
    const place = chart.calibration ? `sure ${format(shown)}` : `step ${format(shown)}`;
    const when = document.createElement("span");
    when.className = "place";
    when.textContent = (step === null && !chart.calibration ? "last, " : "") + place;
    out.append(when, ...parts);
    const box = figure.querySelector(".plot");
    box.setAttribute("aria-valuetext", lines.length ? `${place}: ${words.join(", ")}` : "no run is shown");
    if (plot && lines.length) {
      box.setAttribute("aria-valuemin", plot.data[0][0]);
      box.setAttribute("aria-valuemax", plot.data[0][plot.data[0].length - 1]);
      box.setAttribute("aria-valuenow", shown);
    }
  }

  function tabulate(figure) {
    const {lines, chart} = plots.get(figure) || {};
    if (!lines) return;
    const steps = [...new Set(lines.flatMap(line => line.x))].sort((a, b) => a - b);
    const most = 200, count = Math.min(most, steps.length);
    const rows = Array.from({length: count}, (_, i) => steps[count < 2 ? 0 : Math.round(i * (steps.length - 1) / (count - 1))]);
    const table = document.createElement("table"), head = table.createTHead().insertRow(), body = table.createTBody();
    const cell = (row, text, header) => {
      const made = document.createElement(header ? "th" : "td");
      if (header) made.scope = header;
      made.textContent = text;
      row.append(made);
    };
    if (count < steps.length) table.createCaption().textContent = `${count} of ${steps.length} points`;
    cell(head, "step", "col");
    for (const line of lines) cell(head, wording(chart, line), "col");
    const places = lines.map(line => new Map(line.x.map((step, i) => [step, i])));
    for (const step of rows) {
      const row = body.insertRow();
      cell(row, format(step), "row");
      lines.forEach((line, n) => {
        const i = places[n].get(step);
        const spread = i !== undefined && line.lo && line.lo[i] !== null ? ` (${format(line.lo[i])} to ${format(line.hi[i])})` : "";
        cell(row, i === undefined ? "" : format(line.y[i]) + spread);
      });
    }
    figure.querySelector(".values .scroll").replaceChildren(table);
  }

  function steer(figure) {
    // a chart by the keyboard: a slider along its steps
    const box = figure.querySelector(".plot"), chart = data.charts[figure.dataset.chart];
    box.tabIndex = 0;
    box.setAttribute("role", "slider");
    box.setAttribute("aria-label", `${chart.title}${chart.unit ? `, ${chart.unit}` : ""}: values along the steps`);
    box.setAttribute("aria-valuenow", 0);
    box.addEventListener("keydown", event => {
      const {plot} = plots.get(figure) || {};
      if (!plot) return;
      const x = plot.data[0], first = plot.valToIdx(plot.scales.x.min), last = plot.valToIdx(plot.scales.x.max);
      const now = plot.cursor.left >= 0 && plot.cursor.idx !== null ? plot.cursor.idx : last;
      const page = Math.max(1, Math.round((last - first) / 10));
      const moves = {ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, PageDown: now - page, PageUp: now + page, Home: first, End: last};
      if (event.key === "Escape") { plot.setCursor({left: -10, top: -10}); return; }
      if (!(event.key in moves)) return;
      event.preventDefault();
      const next = Math.min(last, Math.max(first, moves[event.key]));
      plot.setCursor({left: plot.valToPos(x[next], "x"), top: 1});
    });
    box.addEventListener("blur", () => plots.get(figure)?.plot.setCursor({left: -10, top: -10}));
  }

  // ---- the bar ----------------------------------------------------------------------------------
  const figures = all(".chart");
  const redraw = () => figures.forEach(figure => { if (!figure.hidden) draw(figure); });

  function zoom(from, to) {
    state.from = from;
    state.to = to;
    one("from").value = from ?? "";
    one("to").value = to ?? "";
    for (const [figure, {plot, chart}] of plots) {
      if (chart.calibration) continue;
      plot.setScale("x", range(plot));
      read(figure, null);
    }
    remember();
  }

  function filter() {
    const words = one("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const group of all(".group")) {
      const inside = all(".chart", group);
      for (const figure of inside) {
        const chart = data.charts[figure.dataset.chart];
        const text = [chart.title, chart.about, ...chart.names].join(" ").toLowerCase();
        figure.hidden = !words.every(word => text.includes(word));
        count += !figure.hidden;
      }
      const found = inside.some(figure => !figure.hidden);
      group.hidden = !found;
      if (words.length) {
        group.dataset.before ??= group.open ? "open" : "";
        group.open = found;
      } else if (group.dataset.before !== undefined) {
        group.open = group.dataset.before === "open";
        delete group.dataset.before;
      }
    }
    one("found").textContent = words.length ? `${count} of ${all(".group .chart").length} charts` : "";
    for (const figure of figures) if (!figure.hidden && !plots.has(figure)) draw(figure);
  }

  const number = field => field.value === "" || !Number.isFinite(field.valueAsNumber) ? null : field.valueAsNumber;
  const toggles = all(".run-toggle");
  function choose() {
    state.hidden = new Set(toggles.filter(toggle => !toggle.checked).map(toggle => Number(toggle.value)));
    state.smooth = Number(one("smooth").value);
    let from = number(one("from")), to = number(one("to"));
    if (from !== null && to !== null && from >= to) to = null;
    state.from = from;
    state.to = to;
    redraw();
  }

  // ---- what outlives a reload -------------------------------------------------------------------
  const KEY = `fusedrl ${location.pathname}`;
  const named = () => all("details[id]");
  function remember() {
    const kept = {
      fields: Object.fromEntries(["filter", "smooth", "from", "to"].filter(one).map(id => [id, one(id).value])),
      off: toggles.filter(toggle => !toggle.checked).map(toggle => toggle.value),
      open: named().filter(d => (d.dataset.before ?? (d.open ? "open" : "")) === "open").map(d => d.id),
      ids: named().map(d => d.id), marks: one("marks")?.checked, live: one("live")?.checked, y: scrollY,
    };
    try { sessionStorage.setItem(KEY, JSON.stringify(kept)); } catch { /* a browser that keeps nothing for files */ }
  }
  function recall() {
    let kept = null;
    try { kept = JSON.parse(sessionStorage.getItem(KEY)); } catch { /* the same */ }
    if (!kept || performance.getEntriesByType("navigation")[0]?.type !== "reload") return null;
    for (const [id, value] of Object.entries(kept.fields)) if (one(id)) one(id).value = value;
    for (const toggle of toggles) toggle.checked = !kept.off.includes(toggle.value);
    for (const d of named()) if (kept.ids.includes(d.id)) d.open = kept.open.includes(d.id);
    if (one("marks")) one("marks").checked = kept.marks;
    if (one("live")) one("live").checked = kept.live;
    return kept;
  }

  // ---- a page that is written again -------------------------------------------------------------
  function age() {
    const seconds = Math.round(Date.now() / 1000 - data.made);
    one("age").textContent = seconds > 3 * data.live ? `, ${Math.round(seconds / 60) || 1} min ago: nothing writes it any more` : "";
  }
  let pressed = false;
  function reload() {
    const writing = document.activeElement?.matches("input:not([type=checkbox]), select");
    const idle = !pressed && !writing && getSelection().isCollapsed && document.visibilityState === "visible";
    if (one("live").checked && idle) { remember(); location.reload(); }
  }

  // ---- begin ------------------------------------------------------------------------------------
  const kept = recall();
  figures.forEach(steer);
  if (one("filter")) {
    choose();
    filter();
    one("filter").addEventListener("input", filter);
    one("filter").form.addEventListener("submit", event => event.preventDefault());
    one("filter").form.addEventListener("change", event => { if (event.target.id !== "filter") choose(); remember(); });
    one("filter").form.addEventListener("reset", () => setTimeout(() => { choose(); filter(); remember(); }));
  } else redraw();
  for (const details of all("details")) details.addEventListener("toggle", () => {
    if (!details.open) return;
    if (details.matches(".values")) tabulate(details.closest(".chart"));
    else all(".chart", details).forEach(figure => { if (!figure.hidden && !plots.has(figure)) draw(figure); });
  });
  const mark = () => one("completions")?.classList.toggle("unmarked", !one("marks").checked);
  one("marks")?.addEventListener("change", mark);
  mark();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 150); });
  addEventListener("beforeprint", redraw);
  if (kept) scrollTo(0, kept.y);
  if (data.live) {
    addEventListener("pointerdown", () => { pressed = true; });
    addEventListener("pointerup", () => { pressed = false; });
    setInterval(age, 1000);
    setInterval(reload, 1000 * data.live);
  }
  document.documentElement.dataset.drawn = String(Math.round(performance.now()));
})();
