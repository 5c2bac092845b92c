"use strict";
// The interactive plot. What is chosen above it decides what is drawn; what is drawn stands in words below it.
(() => {
  const box = document.getElementById("explore");
  if (!box) return;
  const data = JSON.parse(document.getElementById("explore-data").textContent);
  const at = (name) => box.querySelector(`[data-choose=${name}]`);
  const chosen = new Set(data.labels.flatMap((label, number) => (label.marker || label.full ? [number] : [])));
  const FIELD = { score: 4, kl: 5, top1: 6 };
  const MARKERS = { o: "circle", s: "square", "^": "triangle", D: "diamond", v: "inverted_triangle", P: "plus", h: "hex", "*": "star" };
  const INK = "#1b1f24";
  const LEAST = 1e-6; // on a log axis
  let shown = null;

  const options = (select, values, kept) => {
    select.replaceChildren(...values.map(([value, text]) => new Option(text, value, false, value === kept)));
    if (!values.some(([value]) => value === kept) && values.length) select.value = values[0][0];
    select.closest("label").hidden = values.length < 2;
  };
  const distinct = (values) => [...new Set(values)].map((value) => [value, value]);
  const plain = (text) => text.replaceAll("$$", "$ $").replaceAll("\\(", "\\ (").replaceAll("\\[", "\\ ["); // no formula: it would be fetched for

  const fill = () => {
    options(at("model"), distinct(data.views.map((view) => view.model)), at("model").value);
    let left = data.views.filter((view) => view.model === at("model").value);
    options(at("protocol"), distinct(left.map((view) => view.protocol)), at("protocol").value);
    left = left.filter((view) => view.protocol === at("protocol").value);
    options(at("task"), distinct(left.map((view) => view.task)), at("task").value);
    const view = left.find((one) => one.task === at("task").value);
    options(at("field"), view.fields, at("field").value);
    const shares = new Map();
    for (const point of view.points) if (point[1]) shares.set(point[1], point[2]);
    const budgets = [...shares].sort((a, b) => a[1] - b[1]).map(([budget, share]) => [budget, budget.endsWith("%") ? budget : `${budget} (${percent(share)})`]);
    options(at("budget"), [["", "all, against bytes"], ...budgets], at("budget").value);
    return view;
  };

  const percent = (share) => `${Number((100 * share).toPrecision(3))}%`;
  const number = (value) => Number(value.toPrecision(3)).toString();

  const chips = () => {
    const list = box.querySelector(".chips");
    list.replaceChildren(...data.labels.map((label, place) => {
      const chip = document.createElement("label");
      const tick = Object.assign(document.createElement("input"), { type: "checkbox", checked: chosen.has(place) });
      tick.addEventListener("change", () => { if (tick.checked) chosen.add(place); else chosen.delete(place); draw(); });
      const swatch = document.createElement("i");
      swatch.style.background = label.full ? INK : label.colour;
      const name = document.createElement("span");
      name.textContent = label.name;
      chip.append(tick, swatch, name);
      chip.dataset.name = label.name.toLowerCase();
      return chip;
    }));
  };
  const sift = () => {
    const wanted = box.querySelector("[data-filter=methods]").value.toLowerCase();
    for (const chip of box.querySelectorAll(".chips label")) chip.hidden = !chip.dataset.name.includes(wanted);
  };

  const rows = (view, field, budget) => view.points
    .filter((point) => chosen.has(point[0]) && point[FIELD[field]] && (field === "score" || !data.labels[point[0]].whole))
    .filter((point) => budget === "" || point[1] === budget || (point[1] === "" && data.labels[point[0]].full))
    .map((point) => {
      const label = data.labels[point[0]];
      const [mean, low, high] = point[FIELD[field]].map((value) => (field === "kl" ? Math.max(value, LEAST) : value));
      const against = point[7] ? `${number(point[7][0])} [${number(point[7][1])}, ${number(point[7][2])}]${point[8] ? " *" : ""}` : "-";
      return { label, name: label.name, budget: point[1] || "whole cache", share: point[2], bytes: percent(point[2]), n: point[3], mean, low, high,
        score: `${number(mean)} [${number(low)}, ${number(high)}]`, against };
    });

  const columns = (found) => Object.fromEntries(["name", "budget", "share", "bytes", "n", "mean", "low", "high", "score", "against"]
    .map((key) => [key, found.map((row) => row[key])]));

  const hover = (what, renderers) => new Bokeh.HoverTool({ renderers, point_policy: "snap_to_data", attachment: "vertical",
    tooltips: [["method", "@name"], ["budget", "@budget, @bytes of the bytes"], [what, "@score"], ["against full", "@against"], ["examples", "@n"]] });

  const figure = (settings) => Bokeh.Plotting.figure({ sizing_mode: "stretch_width", tools: "pan,box_zoom,wheel_zoom,reset,save",
    toolbar_location: "above", background_fill_color: "#ffffff", border_fill_color: "#ffffff", outline_line_color: null, ...settings });

  const curves = (found, what, field) => {
    const log = field === "kl";
    const evicted = found.filter((row) => !row.label.full); // the full cache is a line across, wherever it ends
    const shares = (evicted.length ? evicted : found).map((row) => row.share);
    const low = Math.min(...shares) / 1.18, high = Math.max(...shares) * 1.18;
    const plot = figure({ height: 430, x_axis_type: "log", y_axis_type: log ? "log" : "linear", x_range: [low, high] });
    const every = Math.max(1, Math.ceil(Math.log2(high / low) / (box.clientWidth < 600 ? 4 : 9)));
    const ticks = [];
    for (let octave = 0; octave < 40; octave += 1) if ((octave + 40 - 2) % every === 0 && 0.5 ** octave >= low && 0.5 ** octave <= high) ticks.push(0.5 ** octave);
    if (ticks.length < 2) ticks.splice(0, 2, ...new Set(shares));
    plot.xaxis.ticker = new Bokeh.FixedTicker({ ticks });
    plot.xaxis.major_label_overrides = new Map(ticks.map((tick) => [tick, percent(tick)]));
    plot.xgrid.ticker = new Bokeh.FixedTicker({ ticks });
    plot.xaxis.axis_label = "bytes kept, of the full cache's (measured)";
    plot.yaxis.axis_label = plain(what);
    const marks = [];
    const lines = new Map();
    for (const row of found) lines.set(row.label, [...(lines.get(row.label) ?? []), row]);
    const ordered = [...lines].sort((a, b) => (a[0].marker ? 1 : 0) - (b[0].marker ? 1 : 0));
    for (const [label, mine] of ordered) {
      mine.sort((a, b) => a.share - b.share);
      const source = new Bokeh.ColumnDataSource({ data: columns(mine) });
      const pointed = new Bokeh.ColumnDataSource({ data: columns(mine) }); // what is pointed at of a source leaves its lines undrawn
      const colour = label.full ? INK : label.colour;
      if (label.full) plot.line([low, high], [mine[0].mean, mine[0].mean], { line_color: INK, line_dash: "dashed" });
      else if (mine.length > 1) {
        if (label.marker) plot.varea({ x: { field: "share" }, y1: { field: "low" }, y2: { field: "high" }, source, fill_color: colour, fill_alpha: 0.08 });
        plot.line({ x: { field: "share" }, y: { field: "mean" }, source, line_color: colour, line_width: label.marker ? 2 : 1 });
      } else plot.segment({ x0: { field: "share" }, x1: { field: "share" }, y0: { field: "low" }, y1: { field: "high" }, source, line_color: colour, line_alpha: 0.4, line_width: 4 });
      marks.push(plot.scatter({ x: { field: "share" }, y: { field: "mean" }, source: pointed, marker: MARKERS[label.marker] ?? "circle", size: label.marker ? 8 : 5,
        fill_color: colour, line_color: colour }));
    }
    plot.add_tools(hover(plain(what), marks));
    return plot;
  };

  const dots = (found, what, field, lower) => {
    const turn = lower || field === "kl" ? -1 : 1;
    found.sort((a, b) => turn * (a.mean - b.mean));
    const names = found.map((row) => plain(row.name));
    const plot = figure({ height: 90 + 24 * found.length, y_range: new Bokeh.FactorRange({ factors: [...new Set(names)] }), x_axis_type: field === "kl" ? "log" : "linear" });
    const data = { ...columns(found), y: names, colour: found.map((row) => (row.label.full ? INK : row.label.colour)),
      marker: found.map((row) => MARKERS[row.label.marker] ?? "circle") };
    const source = new Bokeh.ColumnDataSource({ data }), pointed = new Bokeh.ColumnDataSource({ data });
    plot.segment({ x0: { field: "low" }, x1: { field: "high" }, y0: { field: "y" }, y1: { field: "y" }, source, line_color: { field: "colour" }, line_width: 4, line_alpha: 0.35 });
    const marks = plot.scatter({ x: { field: "mean" }, y: { field: "y" }, source: pointed, marker: { field: "marker" }, size: 9, fill_color: { field: "colour" }, line_color: { field: "colour" } });
    plot.xaxis.axis_label = plain(what);
    plot.add_tools(hover(plain(what), [marks]));
    return plot;
  };

  const draw = async () => {
    const view = fill();
    const field = at("field").value, budget = at("budget").value;
    const what = view.fields.find(([name]) => name === field)[1];
    const found = rows(view, field, budget);
    const methods = new Set(found.map((row) => row.name)).size;
    const place = box.querySelector(".drawn");
    const words = box.querySelector(".words");
    if (shown) shown.remove();
    shown = null;
    place.replaceChildren();
    words.textContent = found.length
      ? `${methods} of ${data.labels.length} methods, ${found.length} points: ${what} on ${view.task}${budget ? ` at ${budget}` : ", against the bytes kept"}. ${view.protocol}.`
      : "Nothing that is chosen was measured there.";
    if (!found.length) return;
    const plot = budget ? dots(found, what, field, view.lower) : curves(found, what, field);
    plot.toolbar.logo = null;
    plot.toolbar.active_drag = null; // a finger scrolls the page
    shown = await Bokeh.Plotting.show(plot, place);
  };

  const open = () => {
    if (!box.open || box.dataset.ready) return;
    box.dataset.ready = "yes";
    const code = document.createElement("script");
    code.textContent = document.getElementById("bokeh").textContent;
    document.head.append(code);
    Bokeh.set_log_level("error");
    chips();
    for (const select of box.querySelectorAll("[data-choose]")) select.addEventListener("change", draw);
    box.querySelector("[data-filter=methods]").addEventListener("input", sift);
    const choose = { coloured: (label) => label.marker || label.full, all: () => true, none: () => false };
    for (const button of box.querySelectorAll("[data-chips]")) button.addEventListener("click", () => {
      chosen.clear();
      data.labels.forEach((label, place) => { if (choose[button.dataset.chips](label)) chosen.add(place); });
      chips();
      sift();
      draw();
    });
    draw();
  };
  box.addEventListener("toggle", open);
  open();
})();
