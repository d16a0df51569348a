// The page of a report: draws the data in the element "data". Text of a run only ever becomes a text node.

const COLORS = 8;
const COURSE = [
  "learning_rate", "grad_norm", "tokens_per_second", "mfu", "data_wait_s", "device_memory_peak_bytes", "skipped_steps",
];
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const SVG = "http://www.w3.org/2000/svg";

const at = (id) => document.getElementById(id);
const state = { language: chosenLanguage(), hidden: new Set(), charts: [] };

function chosenLanguage() {
  let kept = null;
  try { kept = localStorage.getItem("language"); } catch { /* storage is switched off */ }
  return Object.hasOwn(TEXTS, kept ?? "") ? kept : navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

function words() { return TEXTS[state.language]; }

// Elements.

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function draw(parent, name, attributes, text = null) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

function table(heads, rows, { numbers = [], kind = "" } = {}) {
  const numeric = (i) => (numbers.includes(i) ? { class: "number" } : {});
  const cell = (value, i) =>
    i === 0 ? make("th", { scope: "row" }, value) : make("td", numeric(i), value);
  const head = make("tr", {}, ...heads.map((one, i) => make("th", { scope: "col", ...numeric(i) }, one)));
  const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map(cell))));
  return make("div", { class: "scroll" }, make("table", kind ? { class: kind } : {}, make("thead", {}, head), body));
}

function colored(element, run) {
  element.style.color = `var(--run-${run % COLORS})`;
  return element;
}

function swatch(run) { return colored(make("span", { class: "swatch", "aria-hidden": "true" }), run); }

function named(run) {
  return RUNS.length === 1 ? RUNS[run].name : make("span", {}, swatch(run), RUNS[run].name);
}

// The parts of the page.

function quantities() {
  const names = new Set(RUNS.flatMap((run) => Object.keys(run.curves)));
  const datasets = [...names].filter((name) => name.startsWith("validation/loss/")).map((name) => name.slice("validation/".length));
  const usual = ["loss", "bits_per_character", "perplexity", "accuracy"];
  return [...usual.filter((one) => names.has(`train/${one}`) || names.has(`validation/${one}`)), ...datasets.sort()];
}

function axes() {
  const known = (key) => RUNS.every((run) => Object.values(run.curves).every((curve) => curve[key]));
  return ["steps", ...(known("tokens") ? ["tokens"] : []), ...(known("tokens") && RUNS.every((run) => run.flops_per_token) ? ["flops"] : []), ...(known("hours") ? ["hours"] : [])];
}

function nameOf(quantity) {
  return quantity.startsWith("loss/") ? words().loss_of(quantity.slice(5)) : words()[quantity];
}

function marksOf(axis) {
  return RUNS.flatMap((run, number) => {
    if (state.hidden.has(number)) return [];
    const kept = new Set(run.checkpoints.filter((one) => one.state !== "set aside").map((one) => one.step));
    const curve = curveOf(number, "train/loss");
    return [...new Set([...run.saved, ...kept])].map((step) => ({ run: number, kept: kept.has(step), x: curve && placeOf(step, curve.steps, along(number, curve, axis)) }))
      .filter((mark) => mark.x !== null);
  });
}

// The place on an axis of a step between two points.
function placeOf(step, steps, x) {
  const next = steps.findIndex((one) => one >= step);
  if (next < 0) return null;
  const before = next ? steps[next - 1] : 0, from = next ? x[next - 1] : 0;
  return from + (x[next] - from) * (step - before) / (steps[next] - before || 1);
}

function makeCharts() {
  const choices = () => ({ axis: at("axis").value, xLog: at("x-log").checked });
  chart(at("main-chart"), () => nameOf(at("quantity").value), () => {
    const quantity = at("quantity").value, { axis, xLog } = choices();
    return { lines: linesOf(quantity, axis, at("smooth").checked), axis, xLog, yLog: at("y-log").checked, format: formatOf(quantity), marks: marksOf(axis) };
  }, true);
  for (const quantity of COURSE.filter((one) => RUNS.some((_, run) => curveOf(run, `train/${one}`)))) {
    const values = make("span", { class: "faint" });
    const head = make("div", { class: "heading" }, make("h3", { "data-text": quantity }), values);
    const card = make("div", { class: "card" }, head);
    if (RUNS.length === 1) values.dataset.last = quantity;
    at("charts").append(card);
    chart(card, () => words()[quantity], () => ({ ...choices(), lines: linesOf(quantity, choices().axis, true), format: formatOf(quantity) }), false);
  }
}

function showOptions(id, values, text) {
  const chosen = at(id).value;
  at(id).replaceChildren(...values.map((value) => make("option", { value }, text(value))));
  if (values.includes(chosen)) at(id).value = chosen;
}

function showLegend() {
  const t = words(), key = (kind, text, shape) => {
    const svg = document.createElementNS(SVG, "svg");
    for (const [name, value] of [["width", 26], ["height", 12], ["aria-hidden", "true"]]) svg.setAttribute(name, value);
    draw(svg, "path", { class: kind, d: shape });
    return make("span", { class: "key" }, svg, text);
  };
  const boxes = RUNS.length < 2 ? [] : RUNS.map((run, number) => {
    const box = make("input", { type: "checkbox" });
    box.checked = !state.hidden.has(number);
    box.addEventListener("change", () => { state.hidden[box.checked ? "delete" : "add"](number); redraw(); });
    return make("label", {}, box, swatch(number), run.name);
  });
  at("legend").setAttribute("aria-label", t.run);
  const marks = marksOf("steps");
  at("legend").replaceChildren(...boxes, key("main", t.train, "M1 6h24"), key("dashed", t.validation, "M1 6h24"),
    ...(marks.some((one) => one.kept) ? [key("saved kept", t.kept, "M13 2l4 7h-8z")] : []),
    ...(marks.some((one) => !one.kept) ? [key("saved", t.deleted, "M13 2l4 7h-8z")] : []));
}

function showResults() {
  const t = words(), now = (run, name, format) => { const curve = curveOf(run, name); return curve && format(last(curve.values)); };
  const best = (run, name) => {
    const curve = curveOf(run, name), found = curve && bestOf(curve);
    return found && t.best(fixed(found.value), whole(found.step));
  };
  const highest = (run, name, format) => { const curve = curveOf(run, name); return curve && format(Math.max(...curve.values)); };
  const total = (run, key, format) => { const curve = curveOf(run, "train/loss") ?? curveOf(run, "validation/loss"); return curve?.[key] ? format(last(curve[key])) : null; };
  const median = (run, name, format) => (name in RUNS[run].medians && RUNS[run].medians[name] !== null ? format(RUNS[run].medians[name]) : null);
  const rows = [
    ["best_loss", (run) => best(run, "validation/loss")],
    ["last_loss", (run) => now(run, "validation/loss", fixed)],
    ["train_loss", (run) => now(run, "train/loss", fixed)],
    ["best_bits", (run) => best(run, "validation/bits_per_character")],
    ["last_bits", (run) => now(run, "validation/bits_per_character", fixed)],
    ["steps", (run) => (RUNS[run].total_steps ? t.of(whole(RUNS[run].last_step), whole(RUNS[run].total_steps)) : whole(RUNS[run].last_step))],
    ["tokens", (run) => total(run, "tokens", si)],
    ["flops", (run) => RUNS[run].flops_per_token && total(run, "tokens", (value) => si(flopsOf(run, value)))],
    ["epoch", (run) => now(run, "train/epoch", trimmed)],
    ["duration", (run) => total(run, "hours", duration)],
    ["parameters", (run) => RUNS[run].parameters && si(RUNS[run].parameters)],
    ["speed", (run) => median(run, "train/tokens_per_second", si)],
    ["median_mfu", (run) => median(run, "train/mfu", percent)],
    ["wait", (run) => median(run, "train/data_wait_s", (value) => t.seconds(trimmed(value)))],
    ["memory", (run) => highest(run, "train/device_memory_peak_bytes", bytes)],
    ["skipped_steps", (run) => now(run, "train/skipped_steps", whole)],
    ["hardware", (run) => RUNS[run].hardware],
    ["ended", (run) => RUNS[run].ended && date(RUNS[run].ended)],
    ["start", (run) => RUNS[run].config?.init_from],
    ["folder", (run) => RUNS[run].path],
  ].map(([name, value]) => [name, RUNS.map((_, run) => value(run) ?? null)]).filter(([, values]) => values.some((value) => value !== null));
  if (RUNS.length === 1) {
    const wide = (name) => (["start", "folder"].includes(name) ? { class: "wide" } : {});
    at("results").replaceChildren(make("dl", { class: "tiles" }, ...rows.map(([name, [value]]) => make("div", wide(name), make("dt", {}, t[name]), make("dd", {}, value)))));
    return;
  }
  const shown = table(["", ...RUNS.map((_, run) => named(run))], rows.map(([name, values]) => [t[name], ...values.map((value) => value ?? "–")]), { kind: "runs" });
  shown.classList.add("card");
  at("results").replaceChildren(shown);
}

function showNotes() {
  const t = words(), curves = RUNS.flatMap((run) => Object.entries(run.curves));
  const points = Math.max(...curves.map(([, curve]) => curve.points)), drawn = Math.max(...curves.map(([, curve]) => curve.steps.length));
  const smooth = curves.some(([name, curve]) => name.startsWith("train/") && curve.means);
  const bad = curves.filter(([, curve]) => curve.not_finite).map(([name, curve]) => t.not_finite(whole(curve.not_finite), name));
  at("smooth-label").hidden = !smooth;
  at("chart-notes").textContent = [smooth && t.mean_note, at("axis").value === "hours" && t.hours_note, points > drawn && t.thinned(whole(points)), ...bad, t.keys_note]
    .filter(Boolean).join(state.language === "zh" ? "" : " ");
  const absent = COURSE.filter((one) => !RUNS.some((_, run) => curveOf(run, `train/${one}`)));
  at("absent").textContent = absent.length ? t.absent(absent.map((one) => t[one]).join(state.language === "zh" ? "、" : ", ")) : "";
  for (const element of document.querySelectorAll("[data-last]")) {
    element.textContent = t.last(formatOf(element.dataset.last)(last(curveOf(0, `train/${element.dataset.last}`).values)));
  }
}

function showSamples() {
  const t = words(), parts = [];
  RUNS.forEach((run, number) => {
    if (!run.samples.length) return;
    const slider = make("input", { type: "range", min: 0, max: run.samples.length - 1, step: 1, "aria-label": `${t.samples}, ${run.name}` });
    const shown = make("output"), texts = make("div", { class: "texts" });
    const show = () => {
      const { step, texts: lines } = run.samples[slider.valueAsNumber];
      shown.textContent = t.at(whole(step));
      slider.setAttribute("aria-valuetext", shown.textContent);
      state.sample[number] = slider.valueAsNumber;
      texts.replaceChildren(...lines.map((line, i) => {
        const prompt = run.prompts[i] ?? "", begins = prompt && line.startsWith(prompt);
        return make("p", {}, begins ? make("span", { class: "typed" }, prompt) : null, begins ? line.slice(prompt.length) : line);
      }));
    };
    slider.value = state.sample[number] ?? run.samples.length - 1;
    slider.addEventListener("input", show);
    show();
    parts.push(...(RUNS.length > 1 ? [make("h3", {}, named(number))] : []), make("div", { class: "at" }, slider, shown), texts);
  });
  at("samples-section").hidden = !parts.length;
  if (RUNS.some((run) => run.samples.length === 100)) parts.push(make("p", { class: "faint" }, t.fewer));
  at("samples").replaceChildren(...parts);
}

function showConfig() {
  const t = words(), known = RUNS.filter((run) => run.config), text = (value) => (value === null || value === undefined ? t.none : typeof value === "string" ? value : JSON.stringify(value));
  if (!known.length) return at("config").replaceChildren(t.no_config);
  const keys = Object.keys(DATA.defaults), several = RUNS.length > 1;
  const differs = (key) => several
    ? new Set(RUNS.map((run) => JSON.stringify(run.config?.[key]))).size > 1
    : JSON.stringify(known[0].config[key]) !== JSON.stringify(DATA.defaults[key]);
  const breakable = (key) => make("span", {}, ...key.split(/(?<=\.)/).flatMap((part) => [part, make("wbr")]));
  const row = (key) => [breakable(key), ...RUNS.map((run) => (run.config ? text(run.config[key]) : "–")), ...(several ? [] : [text(DATA.defaults[key])])];
  const heads = [t.key, ...RUNS.map((_, run) => named(run)), ...(several ? [] : [t.default])];
  const rows = keys.filter(differs).map(row);
  at("config").replaceChildren(
    make("p", { class: "faint" }, several ? (rows.length ? t.differ : t.same) : t.changed),
    rows.length ? table(heads, rows, { kind: "keys" }) : "",
    make("details", {}, make("summary", {}, t.all), table([t.key, ...RUNS.map((_, run) => named(run)), ...(several ? [] : [t.default])], keys.map(row), { kind: "keys" })),
  );
}

function showDatasets() {
  const t = words(), seen = new Map();
  RUNS.forEach((run) => run.datasets.forEach((one) => seen.set(JSON.stringify(one), one)));
  const sets = [...seen.values()], weighted = sets.some((one) => one.weight !== 1);
  if (!sets.length) return at("datasets").replaceChildren(t.unknown);
  const rows = sets.filter((one) => one.splits).flatMap((one) => Object.entries(one.splits).map(([split, counts]) => [
    one.folder, ...(weighted ? [String(one.weight)] : []), t[split], whole(counts.documents), whole(counts.tokens), whole(counts.characters),
    whole(one.vocab_size), one.unknown_share === null ? "–" : `${trimmed(100 * one.unknown_share)}%`,
  ]));
  const heads = [t.dataset, ...(weighted ? [t.weight] : []), t.split, t.documents, t.token_count, t.characters, t.vocabulary, t.unseen];
  const numbers = heads.map((_, i) => i).slice(weighted ? 3 : 2);
  at("datasets").replaceChildren(rows.length ? table(heads, rows, { numbers }) : "", ...sets.filter((one) => one.problem).map((one) => make("p", { class: "faint" }, one.problem)));
}

function showCheckpoints() {
  const t = words(), several = RUNS.length > 1;
  const rows = RUNS.flatMap((run, number) => run.checkpoints.map((one) => [
    ...(several ? [named(number)] : []), whole(one.step), one.time === null ? "–" : date(one.time), one.train_loss === null ? "–" : fixed(one.train_loss),
    one.validation_loss === null ? "–" : fixed(one.validation_loss), bytes(one.bytes), t.states[one.state] ?? one.state,
  ]));
  const heads = [...(several ? [t.run] : []), t.step, t.saved, t.column_train, t.column_validation, t.size, t.state];
  at("checkpoints").replaceChildren(rows.length ? table(heads, rows) : t.no_checkpoints);
}

function redraw() {
  at("loss-title").textContent = nameOf(at("quantity").value);
  showLegend();
  showNotes();
  for (const render of state.charts) render();
}

// Shows everything, in the language chosen.
function translate() {
  const t = words();
  document.documentElement.lang = state.language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t[element.dataset.text];
  at("language").textContent = t.other;
  at("language").lang = state.language === "zh" ? "en" : "zh-CN";
  document.title = at("title").textContent = t.title(RUNS.map((run) => run.name).join(state.language === "zh" ? "、" : ", "));
  at("written").textContent = t.written(DATA.program, date(DATA.written));
  showOptions("quantity", quantities(), nameOf);
  showOptions("axis", axes(), (axis) => t[axis]);
  showResults();
  showSamples();
  showConfig();
  showDatasets();
  showCheckpoints();
  redraw();
}

state.sample = {};
makeCharts();
for (const id of ["quantity", "axis", "x-log", "y-log", "smooth"]) at(id).addEventListener("change", redraw);
at("language").addEventListener("click", () => {
  state.language = state.language === "zh" ? "en" : "zh";
  try { localStorage.setItem("language", state.language); } catch { /* storage is switched off */ }
  translate();
});
translate();
