// The page: asks /v1/models what it talks to, and streams texts from /v1/completions.
"use strict";

const TEXTS = {
  en: {
    prompt: "Beginning of the text", text: "Text", settings: "Settings", generate: "Generate", stop: "Stop",
    copy: "Copy", copied: "Copied", keys: "Ctrl + Enter", reset: "Defaults", other: "中文",
    max_tokens: "New tokens", temperature: "Temperature", top_k: "Top-k", top_p: "Top-p",
    repetition_penalty: "Repetition penalty", seed: "Seed", random: "random", all: "all", off: "off",
    greedy: "0 (likeliest)", placeholder: "Leave it empty to let the model begin.",
    facts: (parameters, positions, step) =>
      `${parameters} parameters · ${positions} positions${step === null ? "" : ` · step ${step}`}`,
    waiting: "Waiting …", running: (n, seed) => `${n} characters · seed ${seed}`,
    done: (n, seconds, seed) => `${n} characters · ${seconds} s · seed ${seed}`,
    busy: "The server is busy. Try again in a moment.", gone: "The server cannot be reached.",
    long: "The text is too long for this model. Shorten it.", closing: "The server is shutting down.",
    ended: "The server ended before the text did.",
  },
  zh: {
    prompt: "文章的开头", text: "正文", settings: "设置", generate: "生成", stop: "停止",
    copy: "复制", copied: "已复制", keys: "Ctrl + Enter", reset: "恢复默认", other: "English",
    max_tokens: "新词元数", temperature: "温度", top_k: "Top-k", top_p: "Top-p",
    repetition_penalty: "重复惩罚", seed: "随机种子", random: "随机", all: "全部", off: "关",
    greedy: "0（最可能）", placeholder: "留空则由模型自己开头。",
    facts: (parameters, positions, step) =>
      `${parameters} 个参数 · 最长 ${positions} 个词元${step === null ? "" : ` · 第 ${step} 步`}`,
    waiting: "等待中……", running: (n, seed) => `${n} 个字符 · 种子 ${seed}`,
    done: (n, seconds, seed) => `${n} 个字符 · ${seconds} 秒 · 种子 ${seed}`,
    busy: "服务器正忙，请稍后再试。", gone: "无法连接服务器。",
    long: "文章超出了模型的长度，请缩短。", closing: "服务器正在关闭。",
    ended: "服务器在文章结束之前中断了。",
  },
};
const SLIDERS = {
  max_tokens: { min: 1, max: 512, step: 1, value: 100 },
  temperature: { min: 0, max: 2, step: 0.05, value: 1, shown: (v) => (v === 0 ? words().greedy : v.toFixed(2)) },
  top_k: { min: 0, max: 200, step: 1, value: 50, shown: (v) => (v === 0 ? words().all : String(v)) },
  top_p: { min: 0.05, max: 1, step: 0.05, value: 1, shown: (v) => (v === 1 ? words().all : v.toFixed(2)) },
  repetition_penalty: {
    min: 1, max: 2, step: 0.05, value: 1, shown: (v) => (v === 1 ? words().off : v.toFixed(2)),
  },
};

const at = (id) => document.getElementById(id);
const state = { language: chosenLanguage(), model: null, running: null, problem: null, report: null };

function chosenLanguage() {
  let kept = null;
  try { kept = localStorage.getItem("language"); } catch { /* storage is switched off */ }
  return kept in TEXTS ? kept : navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

function words() { return TEXTS[state.language]; }

// Shows everything that is text of ours, in the language chosen.
function translate() {
  const t = words();
  document.documentElement.lang = state.language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t[element.dataset.text];
  at("language").textContent = t.other;
  at("language").lang = state.language === "zh" ? "en" : "zh-CN";
  at("copy").textContent = t.copy;
  at("prompt").placeholder = t.placeholder;
  at("seed").placeholder = t.random;
  for (const name of Object.keys(SLIDERS)) showValue(name);
  if (state.model) {
    const { id, parameters, n_positions, step } = state.model;
    at("name").textContent = id;
    at("facts").textContent = t.facts(parameters.toLocaleString(), n_positions.toLocaleString(), step);
    document.title = id;
  }
  showRunning();
}

function showRunning() {
  const t = words(), running = state.running !== null;
  at("generate").textContent = running ? t.stop : t.generate;
  at("generate").classList.toggle("stop", running);
  at("output").classList.toggle("running", running);
  at("status").textContent = state.report ? state.report(t) : "";
  at("problem").textContent = state.problem ? state.problem(t) : "";
  at("problem").hidden = !state.problem;
}

function makeSliders() {
  for (const [name, { min, max, step, value }] of Object.entries(SLIDERS)) {
    const row = document.createElement("div"), label = document.createElement("label");
    const title = document.createElement("span"), shown = document.createElement("output");
    const input = Object.assign(document.createElement("input"), { type: "range", id: name, min, max, step, value });
    row.className = "slider";
    label.htmlFor = name;
    title.dataset.text = name;
    shown.id = `${name}-value`;
    label.append(title, shown);
    row.append(label, input);
    input.addEventListener("input", () => showValue(name));
    at("sliders").append(row);
  }
}

function showValue(name) {
  const shown = (SLIDERS[name].shown ?? String)(at(name).valueAsNumber);
  at(`${name}-value`).textContent = shown;
  at(name).setAttribute("aria-valuetext", shown);
}

function reset() {
  for (const [name, { value }] of Object.entries(SLIDERS)) {
    at(name).value = value;
    showValue(name);
  }
  at("seed").value = "";
}

function chosenSeed() {
  const seed = at("seed").valueAsNumber;
  return Number.isInteger(seed) && seed >= 0 && seed < 2 ** 32 ? seed : Math.floor(Math.random() * 2 ** 32);
}

async function generate() {
  if (state.running) return state.running.abort();
  const prompt = at("prompt").value, seed = chosenSeed(), began = performance.now();
  const values = Object.fromEntries(Object.keys(SLIDERS).map((name) => [name, at(name).valueAsNumber]));
  const made = showPrompt(prompt), running = new AbortController();
  const length = () => [...made.textContent].length;
  Object.assign(state, { running, problem: null, report: (t) => t.waiting });
  showRunning();
  try {
    for await (const text of completion({ prompt, seed, ...values, stream: true }, running.signal)) {
      const follow = at("output").scrollTop + at("output").clientHeight > at("output").scrollHeight - 40;
      made.textContent += text;
      if (follow) at("output").scrollTop = at("output").scrollHeight;
      state.report = (t) => t.running(length(), seed);
      at("status").textContent = state.report(words());
    }
  } catch (error) {
    if (!running.signal.aborted) state.problem = explained(error);
  }
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  state.report = length() ? (t) => t.done(length(), seconds, seed) : null;
  state.running = null;
  showRunning();
}

function showPrompt(prompt) {
  const typed = document.createElement("span"), made = document.createElement("span");
  typed.className = "typed";
  typed.textContent = prompt;
  made.className = "made";
  at("output").replaceChildren(typed, made);
  at("copy").disabled = false;
  return made;
}

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Yields the pieces of a text as they come.
async function* completion(asked, signal) {
  const body = JSON.stringify(asked), headers = { "Content-Type": "application/json" };
  const answer = await fetch("v1/completions", { method: "POST", headers, body, signal });
  if (!answer.ok) throw new Refused(answer.status, (await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused(0, "");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((one) => one.startsWith("data: "))) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(event.error.message.includes("shutting down") ? 503 : 500, event.error.message);
      yield event.choices[0].text;
    }
  }
}

// What went wrong, as a function of the language's words.
function explained(error) {
  if (!(error instanceof Refused)) return (t) => t.gone;
  const ours = { 0: "ended", 413: "long", 429: "busy", 503: "closing" }[error.status];
  return ours ? (t) => t[ours] : () => error.message;
}

async function copy() {
  const text = at("output").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no https, or not allowed: the old way
    const range = document.createRange();
    range.selectNodeContents(at("output"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy");
  }
  at("copy").textContent = words().copied;
  setTimeout(() => { at("copy").textContent = words().copy; }, 1500);
}

function switchLanguage() {
  state.language = state.language === "zh" ? "en" : "zh";
  try { localStorage.setItem("language", state.language); } catch { /* storage is switched off */ }
  translate();
}

async function start() {
  makeSliders();
  translate();
  at("language").addEventListener("click", switchLanguage);
  at("generate").addEventListener("click", generate);
  at("copy").addEventListener("click", copy);
  at("reset").addEventListener("click", reset);
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing && !state.running) generate();
  });
  try {
    state.model = (await (await fetch("v1/models")).json()).data[0];
    SLIDERS.max_tokens.max = Math.min(state.model.max_tokens, state.model.n_positions - 1);
    SLIDERS.max_tokens.value = Math.min(SLIDERS.max_tokens.value, SLIDERS.max_tokens.max);
    at("max_tokens").max = SLIDERS.max_tokens.max;
    at("max_tokens").value = SLIDERS.max_tokens.value;
  } catch (error) {
    state.problem = explained(error);
  }
  translate();
}

start();
