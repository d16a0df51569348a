// Numbers for people, and the charts: SVG with a readout for mouse, touch and keyboard.

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

// The operations of the first tokens of a run, which cost less if the model grows.
function flopsOf(run, tokens) {
  const [before, after] = RUNS[run].flops_per_token;
  const small = Math.min(tokens, RUNS[run].growth_tokens);
  return before * small + after * (tokens - small);
}

function along(run, curve, axis) {
  if (axis === "flops") return curve.tokens.map((value) => flopsOf(run, value));
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
