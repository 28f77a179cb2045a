// The playground: asks the server that it came from, and draws what was kept over frames that the browser decodes.

const $ = (id) => document.getElementById(id);
const MOST_BYTES = 256 * 2 ** 20; // of a clip: base64 of more is longer than a browser's strings may be
const SHEET = 8;
const DRAWN_WIDTH = 640;
const page = { clip: null, settings: null, models: [], answers: [], cell: 0, running: null };

// ---------------------------------------------------------------- the server

const headers = () => ($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {});

/** A response of the server; anything else becomes an Error with one sentence. */
async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is it still running?");
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = text;
  try {
    const body = JSON.parse(text);
    message = body.error?.message ?? body.error ?? body.detail ?? text;
  } catch { /* no JSON: shown as it is */ }
  const error = new Error(response.status === 401 ? "This server asks for its API key." : String(message).slice(0, 600));
  error.status = response.status;
  throw error;
}

async function connect() {
  try {
    page.settings = await (await call("v1/playground")).json();
    page.models = (await (await call("v1/models")).json()).data.map((model) => model.id);
  } catch (error) {
    $("key-field").hidden = error.status !== 401 && $("key-field").hidden;
    $("server").textContent = error.status === 401 ? "waiting for the API key" : "not connected";
    return complain(error);
  }
  const { method, methods, retention_ratio: ratio } = page.settings;
  setRatio(ratio);
  choices("method", methods, method);
  choices("model", page.models, page.models[0]);
  $("server").textContent = `${page.models[0]} · ${method} keeps ${percent(ratio)} by default`;
  complain(null);
}

function choices(id, names, chosen) {
  $(id).replaceChildren(...names.map((name) => new Option(name, name, name === chosen, name === chosen)));
  $(`${id}-field`).hidden = names.length < 2;
}

/** What is sent; url stands for the clip. */
function requestBody(url, ratio) {
  const body = {
    model: $("model").value || page.models[0],
    messages: [{ role: "user", content: [{ type: "video_url", video_url: { url } }, { type: "text", text: $("question").value }] }],
    retention_ratio: ratio,
    max_tokens: Number($("most").value),
    temperature: 0,
  };
  if (page.settings?.methods.length > 1) body.retention_method = $("method").value;
  return body;
}

/** The events of a streamed chat completion. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let done = false; !done; ) {
    let value;
    try {
      ({ value = "", done } = await reader.read());
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The connection broke off in the middle of the answer.");
    }
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
  throw new Error("The connection broke off in the middle of the answer.");
}

// ---------------------------------------------------------------- the clip

/** Pictures of a clip at given seconds, one seek after the other. */
class Frames {
  constructor(video) {
    this.video = video;
    this.cache = new Map();
    this.decodes = new Promise((resolve) => {
      video.addEventListener("loadeddata", () => resolve(true), { once: true });
      video.addEventListener("error", () => resolve(false), { once: true });
    });
    this.turn = this.decodes;
  }

  /** An ImageBitmap; null where this browser cannot decode the clip. */
  at(second) {
    if (!this.cache.has(second)) {
      const picture = this.turn.then(() => this.picture(second)).catch(() => null);
      this.turn = picture;
      this.cache.set(second, picture);
    }
    return this.cache.get(second);
  }

  async picture(second) {
    if (!(await this.decodes)) return null;
    await this.seek(second);
    const scale = Math.min(1, DRAWN_WIDTH / this.video.videoWidth);
    const [resizeWidth, resizeHeight] = [this.video.videoWidth, this.video.videoHeight].map((side) => Math.max(1, Math.round(side * scale)));
    return createImageBitmap(this.video, { resizeWidth, resizeHeight, resizeQuality: "high" });
  }

  seek(second) {
    return new Promise((resolve, reject) => {
      this.video.addEventListener("seeked", resolve, { once: true });
      this.video.addEventListener("error", reject, { once: true });
      // A little later than the frame's stamp, which is rounded.
      this.video.currentTime = Math.min(second + 0.002, Math.max(0, this.video.duration - 0.001));
    });
  }
}

function take(blob, name) {
  if (blob.size > MOST_BYTES) return complain(new Error(`${name} is larger than the 256 MiB that this page can send.`));
  const url = URL.createObjectURL(blob);
  const hidden = document.createElement("video");
  Object.assign(hidden, { muted: true, playsInline: true, preload: "auto", src: url });
  page.clip = { blob, name, frames: new Frames(hidden), data: null };
  Object.assign($("preview"), { src: url, hidden: false });
  $("clip").textContent = `${name} · ${(blob.size / 1e6).toFixed(2)} MB`;
  complain(null);
  writeCode();
}

function dataUrl({ blob }) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(`data:video/mp4;base64,${String(reader.result).split(",")[1] ?? ""}`);
    reader.onerror = () => reject(new Error("This browser cannot read the file."));
    reader.readAsDataURL(blob);
  });
}

// ---------------------------------------------------------------- asking

const percent = (ratio) => `${+(100 * ratio).toPrecision(3)} %`;
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

function complain(error) {
  $("error").hidden = !error;
  $("error").textContent = error?.message ?? "";
}

/** Ask once, into a card of its own; fresh: past every cache. */
async function ask(ratio, signal, fresh) {
  const card = new Answer(ratio, page.clip);
  page.answers.push(card);
  $("answers").append(card.root);
  const body = { ...requestBody(await (page.clip.data ??= dataUrl(page.clip)), ratio), stream: true, stream_options: { include_usage: true }, score_explain: true };
  if (fresh) body.messages[0].content[0].uuid = crypto.getRandomValues(new Uint32Array(4)).join("-");
  const begun = performance.now();
  let first, last, usage, score;
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
    for await (const chunk of events(await call("v1/chat/completions", options))) {
      if (chunk.error) throw new Error(chunk.error.message ?? "The server broke off.");
      const text = chunk.choices?.[0]?.delta?.content;
      if (text) {
        last = performance.now();
        first ??= last;
        card.say(text, first - begun);
      }
      usage = chunk.usage ?? usage;
      score = chunk.score ?? score;
    }
    // Chunks that came all at once say nothing about the pace.
    const pace = last - first > 20 ? (usage?.completion_tokens - 1) / ((last - first) / 1000) : NaN;
    const result = { first: first - begun, total: performance.now() - begun, pace, usage, score, video: score?.videos?.[0] };
    card.finish(result);
    return result;
  } finally {
    card.rest();
  }
}

/** Have the vision tower encode the clip: the second of two answers would find its cells there, and be the only one. */
async function encode(signal) {
  const body = { ...requestBody(await (page.clip.data ??= dataUrl(page.clip)), Number($("number").value)), max_tokens: 1 };
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  await (await call("v1/chat/completions", options)).json();
}

async function run(compare) {
  if (!page.clip) return complain(new Error("Choose a clip first, or take the sample."));
  complain(null);
  writeCode();
  page.running = new AbortController();
  for (const id of ["ask", "compare"]) $(id).disabled = true;
  $("stop").hidden = false;
  $("results").hidden = false;
  $("difference").hidden = true;
  $("answers").replaceChildren();
  page.answers = [];
  page.cell = 0;
  const ratio = Number($("number").value);
  try {
    const { signal } = page.running;
    if (!compare) await ask(ratio, signal, false);
    else {
      await encode(signal);
      const whole = await ask(1, signal, true);
      showDifference(ratio, whole, await ask(ratio, signal, true));
    }
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
    page.answers = page.answers.filter((card) => card.done || card.spoke || !card.root.remove());
    $("results").hidden = !page.answers.length;
    if (error.status === 401) $("key-field").hidden = false;
  } finally {
    // Drawn when all is measured: both take this browser's time.
    for (const card of page.answers) card.build();
    for (const id of ["ask", "compare"]) $(id).disabled = false;
    $("stop").hidden = true;
    page.running = null;
  }
}

function showDifference(ratio, whole, kept) {
  const times = (a, b, less, more) => {
    const factor = a / b;
    return factor >= 1 ? `${factor.toFixed(1)}× ${less}` : `${(1 / factor).toFixed(1)}× ${more}`;
  };
  const rows = [
    ["Visual tokens", (r) => r.video?.retained_tokens, String, "fewer", "more"],
    ["Prompt tokens", (r) => r.usage?.prompt_tokens, String, "fewer", "more"],
    ["Time to first token", (r) => r.first, seconds, "sooner", "later"],
    ["Whole answer", (r) => r.total, seconds, "sooner", "later"],
  ];
  $("kept-head").textContent = percent(ratio);
  $("difference").querySelector("tbody").replaceChildren(
    ...rows.map(([name, of, show, less, more]) => {
      const row = document.createElement("tr");
      const head = Object.assign(document.createElement("th"), { textContent: name, scope: "row" });
      const cells = [show(of(whole)), show(of(kept)), times(of(whole), of(kept), less, more)];
      row.append(head, ...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
      return row;
    }),
  );
  $("encoded").hidden = [whole, kept].some((r) => r.video?.encoded_cells !== 0);
  $("difference").hidden = false;
}

// ---------------------------------------------------------------- an answer, and what was kept for it

class Answer {
  constructor(ratio, clip) {
    this.clip = clip;
    this.ratio = ratio;
    this.root = $("answer").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.root.querySelector(selector);
    this.part("h2").textContent = ratio === 1 ? "All tokens" : `${percent(ratio)} kept`;
    this.part(".text").ariaBusy = "true";
  }

  number(name, text) {
    this.part(`[data-number=${name}]`).textContent = text;
  }

  say(text, first) {
    this.spoke = true;
    this.part(".text").textContent += text;
    this.number("first", seconds(first));
  }

  rest() {
    this.part(".text").ariaBusy = "false";
  }

  finish({ usage, pace, score, video }) {
    this.done = true;
    this.number("prompt", usage?.prompt_tokens ?? "–");
    this.number("speed", Number.isFinite(pace) ? pace.toFixed(1) : "–");
    if (score && this.ratio !== 1) this.part("h2").textContent += ` by ${score.method}`;
    if (!video) return;
    this.number("visual", `${video.original_tokens} → ${video.retained_tokens}`);
    for (const warning of video.warnings ?? []) this.note(warning);
    if (!video.kept_mask) return this.note(video.kept_missing);
    this.video = video;
    this.bits = Uint8Array.from(atob(video.kept_mask), (char) => char.charCodeAt(0));
  }

  note(text) {
    this.part(".note").hidden = false;
    this.part(".note").textContent = [this.part(".note").textContent, text].filter(Boolean).join(" ");
  }

  kept(cell, row, column) {
    const [, rows, columns] = this.video.grid;
    if (row < 0 || column < 0 || row >= rows || column >= columns) return true;
    const index = (cell * rows + row) * columns + column;
    return Boolean((this.bits[index >> 3] >> (7 - (index & 7))) & 1);
  }

  /** The strip and the frames; the first to be shown is of the cell of which most was kept. */
  build() {
    if (!this.video) return;
    const { grid: [cells], kept_per_cell: counts } = this.video;
    const strip = this.part(".strip");
    const top = Math.max(...counts);
    strip.ariaValueMax = String(cells);
    strip.replaceChildren(
      ...counts.map((count) => {
        const bar = document.createElement("i");
        bar.style.setProperty("--share", `${count ? Math.max(3, (100 * count) / top) : 0}%`);
        return bar;
      }),
    );
    strip.addEventListener("click", (event) => {
      const cell = [...strip.children].indexOf(event.target.closest("i"));
      if (cell >= 0) select(cell);
    });
    strip.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -cells, End: cells };
      if (!(event.key in steps)) return;
      event.preventDefault();
      select(Math.min(cells - 1, Math.max(0, this.cell() + steps[event.key])));
    });
    const number = Math.min(SHEET, cells);
    const shown = Array.from({ length: number }, (_, i) => Math.round((i * (cells - 1)) / Math.max(1, number - 1)));
    this.part(".sheet").replaceChildren(
      ...shown.map((cell) => {
        const canvas = document.createElement("canvas");
        canvas.dataset.cell = cell;
        canvas.ariaHidden = "true";
        canvas.addEventListener("click", () => select(cell));
        return canvas;
      }),
    );
    this.part("figure").hidden = false;
    select(counts.indexOf(top));
  }

  cell() {
    return Math.min(page.cell, this.video.grid[0] - 1);
  }

  /** Draw: another cell, or other colours. */
  async show() {
    if (!this.video) return;
    const cell = this.cell();
    const { grid: [cells, rows, columns], kept_per_cell: counts, cell_seconds: times } = this.video;
    const words = `cell ${cell + 1} of ${cells}${times ? ` · ${times[cell].toFixed(2)} s` : ""} · ${counts[cell]} of ${rows * columns} tokens kept`;
    const strip = this.part(".strip");
    strip.ariaValueNow = String(cell + 1);
    strip.ariaValueText = words;
    [...strip.children].forEach((bar, i) => bar.classList.toggle("here", i === cell));
    this.part("figcaption").textContent = words;
    this.part(".stage").ariaLabel = `Frame of ${words}; kept patches are bright, the others dimmed`;
    await this.draw(this.part(".stage"), cell, DRAWN_WIDTH);
    for (const canvas of this.part(".sheet").children) {
      canvas.classList.toggle("here", Number(canvas.dataset.cell) === cell);
      await this.draw(canvas, Number(canvas.dataset.cell), 200);
    }
    this.root.dataset.drawn = cell;
  }

  async draw(canvas, cell, width) {
    const [, rows, columns] = this.video.grid;
    const bitmap = this.video.cell_seconds ? await this.clip.frames.at(this.video.cell_seconds[cell]) : null;
    if (canvas.className === "stage" && cell !== this.cell()) return; // another one was chosen meanwhile
    const [w, h] = bitmap ? [bitmap.width, bitmap.height] : [columns * 40, rows * 40];
    const scale = width / w;
    canvas.width = width;
    canvas.height = Math.max(8, Math.round(h * scale));
    const context = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    if (bitmap) context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    else {
      context.fillStyle = colour("--kept");
      context.fillRect(0, 0, canvas.width, canvas.height);
      if (!this.undecoded) this.note("This browser cannot decode the clip; kept patches are drawn without it.");
      this.undecoded = true;
    }
    const x = (column) => Math.round((column * canvas.width) / columns);
    const y = (row) => Math.round((row * canvas.height) / rows);
    const line = Math.max(1, Math.round(width / 320));
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const box = [x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row)];
        if (!this.kept(cell, row, column)) {
          context.fillStyle = colour("--dim");
          context.fillRect(...box);
          continue;
        }
        context.fillStyle = colour("--kept");
        const [left, up, wide, high] = box;
        if (!this.kept(cell, row - 1, column)) context.fillRect(left, up, wide, line);
        if (!this.kept(cell, row + 1, column)) context.fillRect(left, up + high - line, wide, line);
        if (!this.kept(cell, row, column - 1)) context.fillRect(left, up, line, high);
        if (!this.kept(cell, row, column + 1)) context.fillRect(left + wide - line, up, line, high);
      }
    }
  }
}

function select(cell) {
  page.cell = cell;
  for (const card of page.answers) card.show();
}

// ---------------------------------------------------------------- the request as code

function writeCode() {
  const name = page.clip?.name ?? "clip.mp4";
  const base = new URL("v1", document.baseURI).href;
  const body = requestBody("URL", Number($("number").value));
  const quoted = `'${name.replaceAll("'", "'\\''")}'`;
  // Inside an unquoted here-document the shell reads these.
  const json = JSON.stringify(body, null, 2).replace(/[\\$`]/g, "\\$&");
  const key = $("key").value ? ` \\\n  -H "Authorization: Bearer $OPENAI_API_KEY"` : "";
  const url = `data:video/mp4;base64,$(base64 < ${quoted} | tr -d '\\n')`;
  $("curl").textContent = `curl -s ${base}/chat/completions -H 'Content-Type: application/json'${key} -d @- <<JSON\n${json.replace('"URL"', () => `"${url}"`)}\nJSON\n`;
  const { retention_ratio, retention_method } = body;
  const extra = JSON.stringify({ retention_ratio, ...(retention_method && { retention_method }) }).replaceAll(",", ", ").replaceAll(":", ": ");
  $("python").textContent = `import base64
${$("key").value ? "import os\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${$("key").value ? 'os.environ["OPENAI_API_KEY"]' : '"none"'})
clip = base64.b64encode(open(${JSON.stringify(name)}, "rb").read()).decode()
answer = client.chat.completions.create(
    model=${JSON.stringify(body.model ?? "demo")},
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}},
                {"type": "text", "text": ${JSON.stringify($("question").value)}},
            ],
        }
    ],
    max_tokens=${body.max_tokens},
    temperature=0,
    extra_body=${extra},
)
print(answer.choices[0].message.content)
print(answer.score["videos"][0])
`;
}

async function copy(id) {
  writeCode();
  try {
    await navigator.clipboard.writeText($(id).textContent);
    $("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren($(id));
    $("copied").textContent = "Selected: copy it with the keyboard.";
  }
}

// ---------------------------------------------------------------- what a user does

function setRatio(value) {
  $("ratio").value = $("number").value = value;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!page.running) run(false);
});
$("form").addEventListener("input", () => page.settings && writeCode());
$("compare").addEventListener("click", () => run(true));
$("stop").addEventListener("click", () => page.running?.abort());
$("ratio").addEventListener("input", () => ($("number").value = $("ratio").value));
$("number").addEventListener("input", () => ($("ratio").value = $("number").value));
$("key").addEventListener("change", connect);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("file").addEventListener("change", () => $("file").files[0] && take($("file").files[0], $("file").files[0].name));
$("sample").addEventListener("click", async () => {
  try {
    take(await (await call("playground/sample.mp4")).blob(), "clip.mp4");
  } catch (error) {
    complain(error);
  }
});
for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button.dataset.copy));
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragenter" || type === "dragover");
    const file = type === "drop" && event.dataTransfer.files[0];
    if (file) take(file, file.name);
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => select(page.cell));
connect().then(writeCode);
