// The page of a report: draws the data in the element "data". Text of a run only ever becomes a text node.
"use strict";

const TEXTS = {
  en: {
    other: "中文", title: (names) => `Training report: ${names}`, results: "Results", curves: "Loss",
    quantity: "Show", against: "against", x_log: "log x", y_log: "log y", smooth: "moving mean", course: "Course of the training",
    samples: "Samples over time", config: "Configuration", data: "Data", checkpoints: "Checkpoints",
    written: (program, date) => `Written by ${program}, ${date}`, run: "Run", step: "Step", steps: "steps", tokens: "tokens",
    flops: "FLOPs", hours: "hours", duration: "Training time", train: "train", validation: "validation", kept: "checkpoint", deleted: "deleted checkpoint",
    loss: "Loss (nats a token)", bits_per_character: "Bits per character", perplexity: "Perplexity", accuracy: "Accuracy",
    loss_of: (folder) => `Validation loss, ${folder}`, learning_rate: "Learning rate", grad_norm: "Gradient norm",
    tokens_per_second: "Tokens a second", mfu: "MFU", data_wait_s: "Data wait (seconds a step)",
    device_memory_peak_bytes: "Peak device memory", skipped_steps: "Skipped steps", epoch: "Epochs",
    target_share: "Share of targets", best: (value, step) => `${value} at step ${step}`,
    best_loss: "Best validation loss", last_loss: "Last validation loss", train_loss: "Last training loss",
    best_bits: "Best bits per character", last_bits: "Last bits per character", parameters: "Parameters", speed: "Tokens a second, median",
    wait: "Data wait, median", median_mfu: "MFU, median", memory: "Peak device memory", hardware: "Hardware", ended: "Last record",
    folder: "Folder", start: "Starts from", of: (a, b) => `${a} of ${b}`, unknown: "not known", seconds: (v) => `${v} s`,
    absent: (names) => `Not recorded: ${names}.`,
    hours_note: "Hours count training steps only: no evaluations, compilations or pauses.",
    thinned: (points) => `Of up to ${points} points of a curve, the drawn curve keeps both ends, and the lowest and the highest point of each of 500 equal slices of the axis of steps.`,
    mean_note: "The strong line is a moving mean over 2% of the points; the pale line is not smoothed.",
    keys_note: "Arrow keys move along a chart in focus.", not_finite: (n, name) => `${n} values of ${name} are not finite and are left out.`,
    differ: "Keys in which the runs differ", changed: "Keys that differ from their defaults", all: "All keys", key: "Key",
    default: "Default", none: "none", same: "The runs have the same configuration.", no_config: "The run folder has no valid config.toml.",
    dataset: "Dataset", weight: "Weight", split: "Split", documents: "Documents", token_count: "Tokens", characters: "Characters",
    vocabulary: "Vocabulary", unseen: "Unknown tokens", saved: "Saved", column_train: "Training loss", column_validation: "Validation loss", size: "Size", state: "State",
    states: { committed: "kept", "no checksums": "kept, without checksums", damaged: "damaged", "set aside": "set aside" },
    no_checkpoints: "There is no checkpoint in the run folder.", at: (step) => `step ${step}`, fewer: "At most 100 evaluations are shown.",
    last: (value) => `last ${value}`,
  },
  zh: {
    other: "English", title: (names) => `训练报告：${names}`, results: "结果", curves: "损失",
    quantity: "显示", against: "横轴", x_log: "横轴对数", y_log: "纵轴对数", smooth: "滑动平均", course: "训练过程",
    samples: "各阶段的生成样本", config: "配置", data: "数据", checkpoints: "检查点",
    written: (program, date) => `由 ${program} 生成，${date}`, run: "运行", step: "步", steps: "步数", tokens: "词元数",
    flops: "浮点运算量", hours: "小时", duration: "训练时长", train: "训练", validation: "验证", kept: "检查点", deleted: "已删除的检查点",
    loss: "损失（奈特/词元）", bits_per_character: "每字符比特数", perplexity: "困惑度", accuracy: "准确率",
    loss_of: (folder) => `验证损失，${folder}`, learning_rate: "学习率", grad_norm: "梯度范数",
    tokens_per_second: "每秒词元数", mfu: "MFU（算力利用率）", data_wait_s: "等待数据（秒/步）",
    device_memory_peak_bytes: "设备内存峰值", skipped_steps: "跳过的步数", epoch: "轮数",
    target_share: "目标词元占比", best: (value, step) => `${value}（第 ${step} 步）`,
    best_loss: "最佳验证损失", last_loss: "最终验证损失", train_loss: "最终训练损失",
    best_bits: "最佳每字符比特数", last_bits: "最终每字符比特数", parameters: "参数量", speed: "每秒词元数（中位数）",
    wait: "等待数据（中位数）", median_mfu: "MFU（中位数）", memory: "设备内存峰值", hardware: "硬件", ended: "最后一条记录",
    folder: "文件夹", start: "初始权重", of: (a, b) => `${a} / ${b}`, unknown: "未知", seconds: (v) => `${v} 秒`,
    absent: (names) => `没有记录：${names}。`,
    hours_note: "小时数只计训练步，不含评估、编译和暂停。",
    thinned: (points) => `曲线最多有 ${points} 个点；图中保留首尾两点，以及步数轴上 500 个等长区间各自的最低点和最高点。`,
    mean_note: "粗线是 2% 数据点的滑动平均，浅色细线未经平滑。",
    keys_note: "选中图表后，可用方向键移动。", not_finite: (n, name) => `${name} 有 ${n} 个值不是有限数，未画出。`,
    differ: "各运行之间不同的配置项", changed: "与默认值不同的配置项", all: "全部配置项", key: "配置项",
    default: "默认值", none: "无", same: "各运行的配置相同。", no_config: "运行文件夹中没有有效的 config.toml。",
    dataset: "数据集", weight: "权重", split: "划分", documents: "文档数", token_count: "词元数", characters: "字符数",
    vocabulary: "词表大小", unseen: "未知词元", saved: "保存时间", column_train: "训练损失", column_validation: "验证损失", size: "大小", state: "状态",
    states: { committed: "保留", "no checksums": "保留，无校验和", damaged: "损坏", "set aside": "已移开" },
    no_checkpoints: "运行文件夹中没有检查点。", at: (step) => `第 ${step} 步`, fewer: "最多显示 100 次评估。",
    last: (value) => `最终 ${value}`,
  },
};
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

// Numbers.

function si(value, digits = 3) {
  const found = [[1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]
    .find(([limit]) => Math.abs(value) >= limit);
  return found ? `${trimmed(value / found[0], digits)}${found[1]}` : trimmed(value, digits);
}

function trimmed(value, digits = 3) {
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(digits - 1).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(digits)));
}

const whole = (value) => (value === null ? words().unknown : Math.round(value).toLocaleString(state.language));
const fixed = (value) => value.toFixed(4);
const percent = (value) => `${(100 * value).toFixed(1)}%`;
const bytes = (value, digits = 3) => si(value, digits).replace(/([A-Za-z]?)$/, " $1B");
const date = (seconds) => new Date(seconds * 1000).toLocaleString(state.language === "zh" ? "zh-CN" : "en-GB", { dateStyle: "medium", timeStyle: "short" });
const FORMATS = { accuracy: percent, mfu: percent, device_memory_peak_bytes: bytes, skipped_steps: whole, loss: fixed, bits_per_character: fixed };
const formatOf = (quantity) => FORMATS[quantity] ?? (quantity.startsWith("loss/") ? fixed : si);
// A duration in hours, for people.
function duration(hours) {
  const seconds = Math.round(hours * 3600), pair = (size, large, small) =>
    `${Math.floor(seconds / size)} ${large} ${Math.floor((seconds % size) / (size === 60 ? 1 : size / (size === 86400 ? 24 : 60)))} ${small}`;
  return seconds < 60 ? `${seconds} s` : seconds < 3600 ? pair(60, "min", "s") : seconds < 86400 ? pair(3600, "h", "min") : pair(86400, "d", "h");
}

const AXES = { steps: whole, tokens: si, flops: si, hours: trimmed };

const last = (list) => list[list.length - 1];

function bestOf(curve) {
  const place = curve.values.reduce((best, value, i) => (value < curve.values[best] ? i : best), 0);
  return { value: curve.values[place], step: curve.steps[place] };
}

// Curves.

function curveOf(run, name) {
  const curve = Object.hasOwn(RUNS[run].curves, name) ? RUNS[run].curves[name] : null;
  return curve && curve.steps.length ? curve : null;
}

function along(run, curve, axis) {
  if (axis === "flops") return curve.tokens.map((value) => value * RUNS[run].flops_per_token);
  return curve[axis];
}

// The lines of a quantity: the curve of training, faint under its mean, and the curve of validation.
function linesOf(quantity, axis, smooth) {
  const lines = [];
  RUNS.forEach((_, run) => {
    if (state.hidden.has(run)) return;
    for (const part of ["train", "validation"]) {
      const curve = curveOf(run, `${part}/${quantity}`);
      if (!curve) continue;
      const x = along(run, curve, axis), y = curve.values, mean = smooth && part === "train" ? curve.means : undefined;
      if (mean) lines.push({ run, part, x, y, kind: "raw", silent: true });
      lines.push({ run, part, x, y: mean ?? y, kind: part === "train" ? "main" : "dashed", dots: part !== "train" && x.length <= 40 });
    }
  });
  return lines;
}

function ticks(low, high, log, count) {
  if (log) {
    const decades = Math.log10(high / low), found = [];
    const factors = decades > 6 ? [1] : decades > 2.5 ? [1, 3] : [1, 2, 5];
    const every = Math.max(1, Math.ceil(decades / count));
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      if (power % every) continue;
      for (const factor of factors) {
        const tick = factor * 10 ** power;
        if (tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) found.push(tick);
      }
    }
    if (found.length >= 3) return found;
  }
  const rough = (high - low) / count, size = 10 ** Math.floor(Math.log10(rough));
  const step = size * ([1, 2, 2.5, 5, 10].find((factor) => factor * size >= rough) ?? 10), found = [];
  for (let tick = Math.ceil(low / step - 1e-9); tick <= high / step + 1e-9; tick += 1) found.push(Number((tick * step).toPrecision(12)) + 0);
  return found;
}

function extent(values, log, padded) {
  let low = Infinity, high = -Infinity;
  for (const list of values) for (const value of list) {
    if (log && value <= 0) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return [log ? 0.1 : 0, 1];
  if (low === high) return log ? [low / 2, high * 2] : low === 0 ? [0, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
  if (!padded) return [low, high];
  const room = log ? (high / low) ** 0.04 : (high - low) * 0.05;
  return log ? [low / room, high * room] : [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

// A chart in `place` that draws what `content()` returns: lines, formats, marks, log axes.
function chart(place, label, content, tall) {
  const svg = document.createElementNS(SVG, "svg"), readout = make("div", { class: "readout", hidden: "" });
  const spoken = make("output", { class: "unseen", "aria-live": "polite" });
  let layout = null, cursor = null;
  svg.setAttribute("tabindex", "0");
  svg.setAttribute("role", "group");
  const box = make("div", { class: "chart" });
  box.append(svg, readout, spoken);
  place.append(box);

  function render() {
    const width = Math.max(240, box.clientWidth), height = tall ? (width < 600 ? 280 : 420) : 170;
    const { lines, axis, format, marks = [], xLog, yLog } = content();
    const rows = [...new Set(marks.map((mark) => mark.run))];
    const [x0, x1] = extent(lines.map((line) => line.x), xLog, false), [y0, y1] = extent(lines.map((line) => line.y), yLog, true);
    const yTicks = ticks(y0, y1, yLog, tall ? 7 : 4).filter((tick) => format !== whole || Number.isInteger(tick));
    const yLabels = labels(yTicks, format), left = 16 + 6.9 * Math.max(3, ...yLabels.map((text) => text.length));
    const edge = { left, right: 14, top: 10, bottom: 26 + 11 * rows.length };
    const scale = (value, low, high, log) => (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
    const X = (value) => edge.left + scale(value, x0, x1, xLog) * (width - edge.left - edge.right);
    const Y = (value) => height - edge.bottom - scale(value, y0, y1, yLog) * (height - edge.top - edge.bottom);
    const drawn = (x, y) => (!xLog || x > 0) && (!yLog || y > 0);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    svg.setAttribute("aria-label", label());
    const xTicks = ticks(x0, x1, xLog, Math.max(2, Math.floor(width / 70)));
    const xLabels = labels(xTicks, AXES[axis]);
    yTicks.forEach((tick, i) => {
      draw(svg, "line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: Y(tick), y2: Y(tick) });
      draw(svg, "text", { x: edge.left - 7, y: Y(tick) + 4, "text-anchor": "end" }, yLabels[i]);
    });
    const base = height - edge.bottom;
    let free = -Infinity;
    xTicks.forEach((tick, i) => {
      const text = xLabels[i], half = text.length * 3.6;
      const middle = Math.min(Math.max(X(tick), edge.left - 40 + half), width - half - 1);
      draw(svg, "line", { class: "base", x1: X(tick), x2: X(tick), y1: base, y2: base + 4 });
      if (middle - half < free) return;
      draw(svg, "text", { x: middle, y: height - 6, "text-anchor": "middle" }, text);
      free = middle + half + 8;
    });
    draw(svg, "line", { class: "base", x1: edge.left, x2: width - edge.right, y1: base, y2: base });
    for (const { run, x, y, kind, dots } of lines) {
      let path = "";
      x.forEach((value, i) => { if (drawn(value, y[i])) path += `${path ? "L" : "M"}${X(value).toFixed(1)} ${Y(y[i]).toFixed(1)}`; });
      colored(draw(svg, "path", { class: kind, d: path }), run);
      if (dots || x.length === 1) x.forEach((value, i) => {
        if (drawn(value, y[i])) colored(draw(svg, "circle", { class: "dot", cx: X(value), cy: Y(y[i]), r: 3 }), run);
      });
    }
    for (const { run, x, kept } of marks) {
      if (x < x0 || x > x1 || (xLog && x <= 0)) continue;
      colored(draw(svg, "path", { class: kept ? "saved kept" : "saved", d: `M${X(x)} ${base + 5 + 11 * rows.indexOf(run)}l4 7h-8z` }), run);
    }
    layout = { lines: lines.filter((line) => !line.silent), axis, format, X, Y, width, height, edge, drawn };
    layout.places = [...new Set(layout.lines.flatMap((line) => line.x.filter((value, i) => drawn(value, line.y[i]))))].sort((a, b) => a - b);
    show(null);
  }

  function show(value, speak = false) {
    svg.querySelectorAll(".cursor, .here").forEach((element) => element.remove());
    cursor = value;
    readout.hidden = value === null;
    if (value === null) return;
    const { lines, axis, format, X, Y, width, height, edge, drawn } = layout, t = words();
    readout.replaceChildren(make("div", {}, make("span", {}, t[axis]), make("strong", {}, AXES[axis](value))));
    draw(svg, "line", { class: "cursor", x1: X(value), x2: X(value), y1: edge.top, y2: height - edge.bottom });
    for (const line of lines) {
      const place = nearest(line.x, value);
      if (!drawn(line.x[place], line.y[place])) continue;
      const both = lines.some((other) => other.part !== line.part), name = [RUNS.length > 1 ? RUNS[line.run].name : null, both || RUNS.length === 1 ? t[line.part] : null];
      const text = make("span", {}, swatch(line.run), name.filter(Boolean).join(" · "));
      readout.append(make("div", {}, text, make("strong", {}, format(line.y[place]))));
      colored(draw(svg, "circle", { class: "here", cx: X(line.x[place]), cy: Y(line.y[place]), r: 3.5 }), line.run);
    }
    const right = X(value) < width / 2;
    readout.style.left = right ? `${X(value) + 12}px` : "auto";
    readout.style.right = right ? "auto" : `${width - X(value) + 12}px`;
    readout.style.maxWidth = `${Math.max(150, (right ? width - X(value) : X(value)) - 16)}px`;
    if (speak) spoken.textContent = [...readout.children].map((row) => [...row.children].map((one) => one.textContent).join(" ")).join(", ");
  }

  function pointed(event) {
    if (!layout.places.length) return;
    const left = (event.clientX - svg.getBoundingClientRect().left) * (layout.width / svg.getBoundingClientRect().width);
    const distances = layout.places.map((value) => Math.abs(layout.X(value) - left));
    show(layout.places[distances.indexOf(Math.min(...distances))]);
  }

  svg.addEventListener("pointermove", pointed);
  svg.addEventListener("pointerdown", pointed);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(null); });
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const { places } = layout, step = Math.max(1, Math.round(places.length / 50));
    const here = cursor === null ? -step : places.indexOf(cursor);
    const next = { ArrowRight: here + step, ArrowLeft: (cursor === null ? places.length - 1 + step : here) - step, Home: 0, End: places.length - 1 }[event.key];
    if (event.key === "Escape") show(null);
    if (next === undefined || !places.length) return;
    event.preventDefault();
    show(places[Math.min(Math.max(next, 0), places.length - 1)], true);
  });
  let seen = 0;
  new ResizeObserver(() => { if (box.clientWidth !== seen) { seen = box.clientWidth; render(); } }).observe(box);
  state.charts.push(render);
}

// The labels of ticks, with as many digits as tell neighbours apart.
function labels(all, format) {
  const short = new Map([[fixed, trimmed], [percent, (value, digits) => `${trimmed(100 * value, digits)}%`], [whole, si]]).get(format) ?? format;
  for (let digits = 3; ; digits += 1) {
    const texts = all.map((tick) => short(tick, digits));
    if (digits === 9 || new Set(texts).size === texts.length) return texts;
  }
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
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
    ["flops", (run) => { const each = RUNS[run].flops_per_token; return each && total(run, "tokens", (value) => si(value * each)); }],
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
