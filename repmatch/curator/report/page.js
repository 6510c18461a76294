"use strict";
// Texts from the data reach the page through textContent alone; where the plotting library takes text (axes, titles),
// it is escaped first, because the library reads a few tags.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const escape = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const COLOURS = ["#2457d6", "#e8710a", "#12915a", "#c62f4b", "#7b46c4", "#0b8fa8", "#b8860b", "#d1478f", "#5b7083",
    "#7aa116", "#8c4a2f", "#3aa6ff", "#a33ea1", "#00a37a", "#f2a900", "#6b5bd2", "#e4572e", "#4f8a10", "#a8576b",
    "#1f7a8c", "#946c00", "#d96ba0", "#355070", "#9a9a00", "#8a94a3"];
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const FONT = { family: 'system-ui, "Segoe UI", Roboto, Arial, sans-serif', size: 13, color: "#1d2433" };
  const layout = (more) => Object.assign(
    { font: FONT, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "#fff", margin: { l: 60, r: 20, t: 10, b: 50 } }, more);
  const digits = (value, count = 4) => value === null || value === undefined ? "–" : Number(value).toFixed(count);
  let section, shown = { hidden: new Set(), selected: -1, matches: [] };

  function el(tag, options = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "text") node.textContent = value;
      else if (name === "class") node.className = value;
      else if (name === "onclick") node.addEventListener("click", value);
      else if (name === "colour") node.style.backgroundColor = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  function fill(select, names, first = 0) {
    select.replaceChildren(...names.map((name, i) => el("option", { value: i, text: name })));
    select.value = String(first);
    select.parentElement.hidden = names.length === 0;
  }

  function table(header, rows, numbers = []) {
    const cls = (i) => numbers.includes(i) ? { class: "number" } : {};
    const cell = (value, i) => el("td", cls(i), value instanceof Node ? value : document.createTextNode(value ?? ""));
    return el("div", { class: "table" }, el("table", {},
      el("thead", {}, el("tr", {}, ...header.map((h, i) => el("th", { ...cls(i), text: h })))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell))))));
  }

  // --- the map -------------------------------------------------------------------------------------------------
  const column = () => section.map.columns[Number(at("colour").value)];
  const coresetsOf = (i) => section.coresets.filter((c) => c.dataset === section.map.datasets[i]);

  function standsFor(i) {
    const wanted = section.coresets[Number(at("coreset").value)], own = coresetsOf(i);
    const coreset = own.includes(wanted) ? wanted : own[0];
    return coreset ? section.map.picks[coreset.name].stands[i] : -1;
  }

  function colours() {
    const m = section.map, extra = section.coresets.map((c) => ({ name: `picked: ${c.name}`, coreset: c.name }));
    const names = m.columns.map((c) => c.name);
    for (const { name, coreset } of extra) {
      if (names.includes(name)) continue;
      const values = new Array(m.ids.length).fill(1);
      for (const i of m.picks[coreset].picked) values[i] = 0;
      m.columns.push({ name, kind: "category", names: ["picked", "left out"], values });
      names.push(name);
    }
    return names;
  }

  function traces() {
    const m = section.map, c = column(), size = m.ids.length > 8000 ? 4 : m.ids.length > 1500 ? 5 : 7;
    const trace = (points, marker, name) => ({
      type: "scattergl", mode: "markers", name: escape(name), hoverinfo: "none", showlegend: false, customdata: points,
      x: points.map((i) => m.x[i]), y: points.map((i) => m.y[i]), marker: { size, opacity: 0.75, ...marker },
    });
    if (c.kind === "number") {
      const known = [], unknown = [];
      c.values.forEach((v, i) => (v === null ? unknown : known).push(i));
      const values = known.map((i) => c.values[i]), sorted = [...values].sort((a, b) => a - b);
      const share = (q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
      return [
        trace(unknown, { color: "#c9d0da" }, "none"),
        trace(known, { color: values, colorscale: "Viridis", cmin: share(0.01), cmax: share(0.99), showscale: true,
          colorbar: { thickness: 12, len: 0.7, outlinewidth: 0, title: { text: escape(c.name) } } }, c.name),
      ];
    }
    const groups = c.names.map(() => []);
    c.values.forEach((v, i) => groups[v].push(i));
    const faded = c.name.startsWith("picked: ");
    const all = groups.map((points, g) => shown.hidden.has(g) ? trace([], {}, c.names[g])
      : trace(points, { color: faded ? ["#e8710a", "#c9d3e3"][g] : COLOURS[g % COLOURS.length],
        ...(faded && g === 0 ? { size: size + 4, opacity: 1 } : {}) }, c.names[g]));
    return faded ? all.reverse() : all;
  }

  function marks() {
    const m = section.map, ring = (points, color, size, width) => ({
      type: "scattergl", mode: "markers", hoverinfo: "none", showlegend: false, customdata: points,
      x: points.map((i) => m.x[i]), y: points.map((i) => m.y[i]),
      marker: { size, color: "rgba(0,0,0,0)", line: { color, width }, symbol: "circle" },
    });
    const s = shown.selected, near = s < 0 ? [] : m.near[s], stands = s < 0 ? -1 : standsFor(s);
    return [
      ring(shown.matches, "#1d2433", 10, 1.5),
      ring(near, "#2457d6", 13, 2),
      ring(stands < 0 ? [] : [stands], "#e8710a", 18, 3),
      ring(s < 0 ? [] : [s], "#d6004c", 15, 3),
    ];
  }

  function drawMap() {
    const axis = { visible: false, zeroline: false };
    const done = Plotly.react("map", [...traces(), ...marks()], layout({
      xaxis: axis, yaxis: { ...axis, scaleanchor: "x" }, hovermode: "closest", dragmode: "pan", hoverdistance: 12,
      margin: { l: 6, r: 6, t: 6, b: 6 }, uirevision: section.space.id,
    }), { ...CONFIG, scrollZoom: true });
    const c = column();
    at("legend").replaceChildren(...(c.kind === "number" ? [] : c.names.map((name, g) => {
      const count = c.values.reduce((sum, v) => sum + (v === g), 0);
      const colour = c.name.startsWith("picked: ") ? ["#e8710a", "#c9d3e3"][g] : COLOURS[g % COLOURS.length];
      return el("button", { type: "button", "aria-pressed": String(!shown.hidden.has(g)), title: "show or hide",
        onclick: () => { shown.hidden.has(g) ? shown.hidden.delete(g) : shown.hidden.add(g); drawMap(); } },
      el("span", { class: "dot", colour }), el("span", { text: `${name} (${count})` }));
    })));
    return done;
  }

  const label = (i) => { const c = section.map.columns.find((c) => c.name === "label"); return c ? c.names[c.values[i]] : ""; };

  function shownValue(c, i) {
    const v = c.values[i];
    return c.kind === "number" ? (v === null ? "–" : String(v)) : c.names[v];
  }

  function select(i) {
    shown.selected = i;
    const m = section.map, box = at("detail");
    const facts = el("dl", {});
    const fact = (name, value) => facts.append(el("dt", { text: name }), el("dd", { text: value }));
    fact("id", m.ids[i]);
    if (section.datasets.length > 1) fact("dataset", m.datasets[i]);
    for (const c of m.columns) if (!c.name.startsWith("picked: ") && c.name !== "dataset") fact(c.name, shownValue(c, i));
    const row = (j, note) => el("button", { type: "button", class: "row", onclick: () => select(j) },
      el("span", { class: "muted", text: note }), el("span", { text: `${label(j)} · ${m.texts[j]}` }));
    const parts = [el("div", { class: "text", id: "detail-text", text: m.texts[i] }), facts];
    const stands = el("div", { id: "stands" });
    for (const coreset of coresetsOf(i)) {
      const p = m.picks[coreset.name].stands[i];
      if (p === i) stands.append(el("div", { class: "muted small", text: `${coreset.name}: it was picked itself` }));
      else stands.append(p < 0 ? el("div", { class: "muted small", text: `${coreset.name}: no pick` }) : row(p, coreset.name));
    }
    if (stands.children.length) parts.push(el("h3", { text: "Stands for it in a coreset" }), stands);
    parts.push(el("h3", { text: "Nearest instances shown here" }),
      el("div", { id: "near" }, ...m.near[i].map((j, k) => row(j, digits(m.near_scores[i][k])))));
    box.replaceChildren(...parts);
    drawMap();
  }

  function search() {
    const words = at("search").value.trim().toLowerCase().split(/\s+/).filter(Boolean), m = section.map;
    at("tip").hidden = true;
    shown.matches = words.length === 0 ? [] : m.ids.map((_, i) => i).filter((i) => {
      const text = `${m.ids[i]}\n${m.texts[i]}\n${label(i)}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    at("found").textContent = words.length ? `${shown.matches.length} found` : "";
    if (words.length) {
      at("detail").replaceChildren(el("h3", { text: `${shown.matches.length} found` }), el("div", { id: "matches" },
        ...shown.matches.slice(0, 50).map((i) => el("button", { type: "button", class: "row", onclick: () => select(i) },
          el("span", { class: "muted", text: m.ids[i] }), el("span", { text: m.texts[i] })))));
    }
    drawMap();
  }

  function hover(event) {
    const point = event.points.find((p) => typeof p.customdata === "number");
    if (!point) return;
    const i = point.customdata, m = section.map, tip = at("tip"), text = m.texts[i];
    const c = column();
    tip.replaceChildren(el("div", { class: "text", text: text.length > 280 ? text.slice(0, 279) + "…" : text }),
      el("div", { class: "muted", text: `${m.ids[i]} · ${label(i)}` + (c.name === "label" ? "" : ` · ${c.name} ${shownValue(c, i)}`) }));
    tip.hidden = false;
    const box = tip.getBoundingClientRect(), x = event.event.clientX + 14, y = event.event.clientY + 14;
    tip.style.left = `${Math.min(x, innerWidth - box.width - 8)}px`;
    tip.style.top = `${y + box.height > innerHeight ? y - box.height - 28 : y}px`;
  }

  // --- the other charts ------------------------------------------------------------------------------------------
  function drawMatrix() {
    const kinds = [section.adapters && { name: "adapters trained on datasets and subsets", ...section.adapters,
      note: "RepMatch scores between the subset adapters in the store." },
    { name: "pairs of instances, by label", diagonal: true, ...section.groups, note: "Mean score of one instance of a group with one of " +
      `another, measured on ${section.groups.sampled} instances; no training is needed for it.` }].filter(Boolean);
    const select = at("matrix-kind");
    if (select.options.length !== kinds.length || select.dataset.space !== section.space.id) {
      fill(select, kinds.map((k) => k.name));
      fill(at("matrix-layer"), section.groups.layers.map((l) => l.name));
      select.dataset.space = section.space.id;
    }
    const kind = kinds[Number(select.value)], values = kind.layers[Number(at("matrix-layer").value)].values;
    at("matrix-note").textContent = `${kind.note} Chance is ${digits(section.chance)}.` + (section.adapters ? "" :
      " For scores between datasets or subsets: repmatch compare A B, then make the report again.");
    const names = kind.names.map(escape), wide = Math.max(...kind.names.map((n) => n.length));
    const off = values.flatMap((row, i) => row.filter((v, j) => i !== j && v !== null)), small = names.length <= 14;
    const text = values.map((row) => row.map((v) => v === null ? "" : digits(v, v < 0.1 ? 3 : 2)));
    const hoverText = values.map((row, i) => row.map((v, j) => v === null ? "" :
      `${names[i]}<br>${names[j]}<br><b>${digits(v)}</b>, ${digits(v / section.chance, 1)} × chance`));
    Plotly.react("matrix", [{
      type: "heatmap", z: values, x: names, y: names, text, hovertext: hoverText, hovertemplate: "%{hovertext}<extra></extra>",
      texttemplate: small ? "%{text}" : "", colorscale: [[0, "#f3f6fc"], [0.5, "#8fabec"], [1, "#173a9c"]], zmin: 0, xgap: 2, ygap: 2,
      zmax: kind.diagonal ? Math.max(...values.flat(), section.chance) : off.length ? Math.max(...off, section.chance) * 1.15 : 1,
      colorbar: { thickness: 12, len: 0.8, outlinewidth: 0, title: { text: "score", side: "right" } },
    }], layout({
      height: 60 + (names.length < 6 ? 56 : 36) * names.length + Math.min(200, 4.5 * wide), width: Math.min(at("matrix").clientWidth || 900,
        360 + Math.min(300, 7 * wide) + 90 * names.length), margin: { l: 20, r: 20, t: 10, b: 20 },
      xaxis: { automargin: true, tickangle: wide > 8 ? -35 : 0, type: "category" },
      yaxis: { autorange: "reversed", type: "category", automargin: true },
    }), CONFIG);
  }

  function drawProfile() {
    const matrices = section.matrices.map(escape), line = { dash: "dash", color: "#5f6b7e", width: 1.5 };
    const own = section.profile.map((p, i) => ({ type: "scatter", mode: "lines+markers", x: matrices, y: p.values,
      name: escape(p.dataset === p.against ? `${p.dataset} against its own adapter` : `${p.dataset} against ${p.against}`),
      line: { color: COLOURS[i % COLOURS.length] } }));
    const groups = section.groups, pairs = { type: "scatter", mode: "lines+markers", name: "pairs of one group", x: matrices,
      y: groups.layers.slice(1).map((l) => { const d = l.values.map((r, i) => r[i]).filter((v) => v !== null);
        return d.length ? d.reduce((a, b) => a + b, 0) / d.length : null; }), line: { color: "#8a94a3" } };
    Plotly.react("profile", [...own, pairs], layout({ height: 340, yaxis: { title: { text: "mean score" }, rangemode: "tozero" },
      xaxis: { automargin: true, type: "category" }, legend: { orientation: "h", y: 1.15 },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: section.chance, y1: section.chance, line }] }), CONFIG);
  }

  function drawScores() {
    const s = section.scores[Number(at("scores-dataset").value || 0)];
    if (!s) {
      at("scores-note").textContent = "No instance was scored yet. Run: repmatch score " + section.datasets[0].name;
      at("scores").replaceChildren();
      return;
    }
    at("scores-note").textContent = `Scores of the instances of ${s.dataset} against the adapter of ${s.against}. ` +
      "Many labels: the most frequent 16. The dashed line is chance.";
    const counts = new Map();
    for (const name of s.labels) counts.set(name, (counts.get(name) || 0) + 1);
    const names = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 16).map((entry) => entry[0]).sort();
    const all = section.map.columns.find((c) => c.name === "label"), colour = (name, i) => {
      const place = all ? all.names.indexOf(name) : -1;
      return COLOURS[(place < 0 ? i : place) % COLOURS.length];
    };
    Plotly.react("scores", names.map((name, i) => ({ type: "violin", orientation: "h", side: "positive", width: 1.7,
      x: s.values.filter((_, j) => s.labels[j] === name), y0: escape(`${name} (${counts.get(name)})`), name: escape(name),
      points: false, meanline: { visible: true }, showlegend: false, line: { color: colour(name, i), width: 1.5 }, hoveron: "violins" })),
    layout({ height: 110 + 46 * names.length, xaxis: { title: { text: "score" }, rangemode: "tozero" },
      yaxis: { automargin: true, type: "category" }, margin: { l: 120, r: 20, t: 10, b: 50 },
      shapes: [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: section.chance, x1: section.chance,
        line: { dash: "dash", color: "#5f6b7e", width: 1.5 } }] }), CONFIG);
  }

  function drawCoresets() {
    const box = at("coresets");
    if (!section.coresets.length) {
      box.replaceChildren(el("p", { class: "muted", text: "None yet. Run: repmatch select " + section.datasets[0].name + " -k 5% --name core" }));
      return;
    }
    const jump = (p) => p.point < 0 ? p.id : el("button", { type: "button", text: p.id, title: "show on the map",
      onclick: () => { select(p.point); at("map-section").scrollIntoView({ behavior: "smooth" }); } });
    box.replaceChildren(
      table(["coreset", "dataset", "strategy", "picks", "of", "mean similarity to its pick", "made by"],
        section.coresets.map((c) => [c.name, c.dataset, c.strategy, c.size, c.of, digits(c.mean_similarity), el("code", { text: c.command })]), [3, 4, 5]),
      ...section.coresets.map((c) => el("details", {}, el("summary", { text: `Picks of ${c.name}` }),
        table(["rank", "id", "label", "text", "gain", "stands for"],
          c.picks.map((p) => [p.rank, jump(p), p.label, p.text, digits(p.gain), p.represents]), [0, 4, 5]),
        el("p", { class: "muted small", text: c.size > c.picks.length ? `The first ${c.picks.length} of ${c.size}.` : "" }))));
  }

  function drawTraining() {
    const box = at("training"), curves = section.losses, again = data.retrainings;
    box.replaceChildren();
    if (!curves.length && !again.length) {
      box.append(el("p", { class: "muted", text: "No adapter has been trained and no retraining is stored yet." }));
      return;
    }
    if (again.length) {
      const plot = el("div", { class: "plot", id: "retraining" });
      box.append(el("h3", { text: "Models retrained on selections, on held-out rows" }), plot);
      const several = new Set(again.map((r) => r.dataset)).size > 1, sizes = [...new Set(again.flatMap((r) => r.curve.map((p) => p.size)))];
      const called = (r) => (several ? `${r.dataset}: ${r.selection}` : r.selection);
      Plotly.react(plot, again.map((r, i) => ({ type: "scatter", mode: "lines+markers", name: escape(called(r)),
        x: r.curve.map((p) => p.size), y: r.curve.map((p) => p.accuracy), line: { color: COLOURS[i % COLOURS.length], dash: r.selection === "random" ? "dash" : "solid" },
        error_y: { type: "data", array: r.curve.map((p) => (p.high === null ? 0 : p.high - p.accuracy)), thickness: 1, width: 3 } })),
      layout({ height: 340, xaxis: { title: { text: "rows trained on" }, type: "log", tickvals: sizes, ticktext: sizes.map(String) }, yaxis: { title: { text: "mean accuracy, 95 % over seeds" } },
        legend: { orientation: "h", y: 1.2 } }), CONFIG);
      box.append(table(["rows by", "dataset", "rows", "test rows", "mean accuracy", "seeds"], again.flatMap((r) => r.curve.map((p) => [r.selection, r.dataset,
        p.size, r.test_rows, digits(p.accuracy), p.accuracies.map((a) => digits(a, 3)).join(", ")])), [2, 3, 4]));
    }
    if (curves.length) {
      const plot = el("div", { class: "plot", id: "losses" });
      box.append(el("h3", { text: "Training losses of the subset adapters" }), plot);
      Plotly.react(plot, curves.map((c, i) => ({ type: "scatter", mode: "lines", name: escape(c.name), x: c.steps, y: c.losses,
        line: { color: COLOURS[i % COLOURS.length], width: 1.5 } })), layout({ height: 320, xaxis: { title: { text: "step" } },
        yaxis: { title: { text: "loss" } }, legend: { orientation: "h", y: 1.2 } }), CONFIG);
    }
  }

  function drawManifest() {
    const runs = data.runs.map((r) => [r.run, r.command, r.started, r.seconds ?? "", r.status, el("code", { text: JSON.stringify(r.arguments) })]);
    const about = { made: data.made, versions: data.versions, space: section.space, matrices: section.matrices,
      datasets: section.datasets.map(({ name, rows, encoding, digest }) => ({ name, rows, encoding, digest })) };
    at("manifest").replaceChildren(el("details", {}, el("summary", { text: "Space, datasets, versions" }),
      el("pre", { text: JSON.stringify(about, null, 2) })),
    el("details", {}, el("summary", { text: `Last runs (${runs.length})` }), table(["run", "command", "started", "seconds", "status", "arguments"], runs, [0, 3])));
  }

  function open(i) {
    section = data.sections[i];
    shown = { hidden: new Set(), selected: -1, matches: [] };
    const m = section.map, space = section.space, fact = (name, value) => el("div", {}, el("b", { text: value }), el("span", { class: "muted", text: name }));
    at("made").textContent = `Made ${data.made.replace("T", " ").slice(0, 16)} UTC by repmatch ${data.versions.repmatch}. One file, offline.`;
    at("facts").replaceChildren(fact("base model", space.model.split("/").pop()), fact("LoRA rank", space.rank),
      fact("matrices", section.matrices.length), ...section.datasets.map((d) => fact(`rows in ${d.name}, ${d.labels.length} labels`, d.rows.toLocaleString("en"))));
    for (const node of document.querySelectorAll(".chance")) node.textContent = digits(section.chance);
    const names = colours();
    fill(at("colour"), names, Math.max(0, names.indexOf("label")));
    fill(at("coreset"), section.coresets.map((c) => c.name));
    fill(at("scores-dataset"), section.scores.map((s) => s.dataset));
    at("search").value = "";
    at("found").textContent = "";
    at("map-note").textContent = (m.ids.length < m.total ? `A sample of ${m.ids.length.toLocaleString("en")} of ${m.total.toLocaleString("en")} instances, every pick among them. ` : "") +
      (m.layout === "tsne" ? "Near points teach alike (t-SNE of the RepMatch kernel's nearest neighbours); distances between far ones mean little."
        : "The two main directions of the RepMatch kernel (kernel PCA).");
    drawMap().then((plot) => {
      if (plot.dataset.wired) return;
      plot.dataset.wired = "yes";
      plot.on("plotly_hover", hover);
      plot.on("plotly_unhover", () => { at("tip").hidden = true; });
      plot.on("plotly_click", (event) => {
        const point = event.points.find((p) => typeof p.customdata === "number");
        if (point) select(point.customdata);
      });
    });
    drawMatrix();
    drawProfile();
    drawScores();
    drawCoresets();
    drawTraining();
    drawManifest();
  }

  at("colour").addEventListener("change", () => { shown.hidden = new Set(); drawMap(); });
  at("coreset").addEventListener("change", () => { shown.selected < 0 ? drawMap() : select(shown.selected); });
  at("matrix-kind").addEventListener("change", drawMatrix);
  at("matrix-layer").addEventListener("change", drawMatrix);
  at("scores-dataset").addEventListener("change", drawScores);
  let waiting = 0;
  at("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
  at("space").addEventListener("change", () => open(Number(at("space").value)));
  if (data.sections.length > 1) fill(at("space"), data.sections.map((s) => `${s.space.model}, ${s.datasets.map((d) => d.name).join(", ")}`));
  at("space-choice").hidden = data.sections.length < 2;
  open(0);
})();
