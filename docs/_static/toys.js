// Three things to play with. Every control is a native one, so the keyboard works; every number is also text.
"use strict";

const $ = (tag, attributes = {}, ...children) => {
  const svg = ["svg", "path", "line", "text", "circle", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};

// A labelled slider that shows its value; `show` turns a position into text.
function slider(form, name, label, min, max, step, value, show = v => v) {
  const input = $("input", { type: "range", id: `toy-${name}`, min, max, step, value });
  const output = $("output", { for: input.id, id: `toy-${name}-value` });
  form.append($("div", { class: "toy-row" }, $("label", { for: input.id }, label), input, output));
  const update = () => { output.textContent = show(+input.value); input.setAttribute("aria-valuetext", output.textContent); };
  input.addEventListener("input", update);
  update();
  return input;
}

function choice(form, name, label, options) {
  const select = $("select", { id: `toy-${name}` }, ...options.map(o => $("option", {}, o)));
  form.append($("div", { class: "toy-row" }, $("label", { for: select.id }, label), select));
  return select;
}

// Curves over [x0, x1] × [y0, y1]; `lines` are [points, class, name] with points [[x, y], …].
function plot(title, [x0, x1], [y0, y1], lines, marks = [], ticks = v => +v.toPrecision(2)) {
  const W = 320, H = 190, L = 44, B = 22, T = 20, R = 8;
  const X = x => L + (x - x0) / (x1 - x0) * (W - L - R), Y = y => H - B - (Math.min(Math.max(y, y0), y1) - y0) / (y1 - y0) * (H - B - T);
  const svg = $("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  svg.append($("text", { x: L, y: 13, class: "toy-title" }, title));
  svg.append($("line", { x1: L, x2: W - R, y1: H - B, y2: H - B }), $("line", { x1: L, x2: L, y1: T, y2: H - B }));
  for (const x of [x0, (x0 + x1) / 2, x1]) svg.append($("text", { x: X(x), y: H - 7, "text-anchor": x === x1 ? "end" : "middle" }, `${+x.toPrecision(3)}`));
  for (const y of [y0, (y0 + y1) / 2, y1]) svg.append($("text", { x: L - 4, y: Y(y) + 4, "text-anchor": "end" }, `${ticks(y)}`));
  for (const [points, kind] of lines) svg.append($("path", { class: kind, d: "M" + points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join("L") }));
  for (const x of marks) svg.append($("line", { x1: X(x), x2: X(x), y1: T, y2: H - B, class: "toy-mark" }));
  return svg;
}

const legend = names => $("p", { class: "toy-legend" }, ...names.flatMap(([kind, name]) => [$("span", { class: kind }, name), " "]));

function toy_schedule(root, data) {
  const form = root.querySelector("form"), stage = root.querySelector(".toy-stage"), say = root.querySelector(".toy-say");
  const kind = choice(form, "kind", "schedule", ["linear", "cosine"]);
  const T = slider(form, "T", "T, number of steps", 20, 1000, 10, 1000);
  const power = v => (10 ** v).toPrecision(2);
  const first = slider(form, "beta_1", "β₁, first variance", -5, -1, 0.1, -4, power);
  const last = slider(form, "beta_T", "β_T, last variance", -3, -0.1, 0.1, -1.7, power);
  const at = slider(form, "t", "t, as a fraction of T", 0.01, 1, 0.01, 0.3, v => `${Math.round(v * 100)} %`);
  const canvas = $("canvas", { width: 8, height: 8, class: "toy-digit", role: "img" });

  function draw() {
    first.disabled = last.disabled = kind.value === "cosine";
    const s = diffusion.schedule(kind.value, +T.value, 10 ** first.value, 10 ** last.value);
    const t = Math.max(0, Math.round(at.value * s.T) - 1), ab = s.alpha_bar[t], snr = ab / (1 - ab);
    const curve = values => values.map((v, i) => [i + 1, v]);
    stage.replaceChildren(
      plot("β", [1, s.T], [0, Math.max(...s.beta)], [[curve(s.beta), "toy-a"]], [t + 1]),
      plot("signal ᾱ and noise 1 − ᾱ", [1, s.T], [0, 1], [[curve(s.alpha_bar), "toy-a"], [curve(s.alpha_bar.map(a => 1 - a)), "toy-b"]], [t + 1]),
      plot("signal-to-noise ratio, powers of ten", [1, s.T], [-6, 4], [[curve(s.alpha_bar.map(a => Math.log10(a / (1 - a)))), "toy-a"], [[[1, 0], [s.T, 0]], "toy-b"]], [t + 1]),
      $("figure", {}, canvas, $("figcaption", {}, `a digit at t = ${t + 1}`)));
    const pixels = diffusion.noised(s, data.digit, t, data.noise), context = canvas.getContext("2d"), image = context.createImageData(8, 8);
    pixels.forEach((v, i) => image.data.set([...Array(3).fill((v + 2) / 4 * 255), 255], 4 * i));
    context.putImageData(image, 0, 0);
    canvas.setAttribute("aria-label", `an eight by eight digit with a signal-to-noise ratio of ${snr.toPrecision(3)}`);
    say.textContent = `t = ${t + 1} of ${s.T}: β = ${s.beta[t].toPrecision(4)}, ᾱ = ${ab.toPrecision(6)}, SNR = ${snr.toPrecision(4)}; `
      + `at the end ᾱ = ${s.alpha_bar[s.T - 1].toPrecision(4)}` + (s.alpha_bar[s.T - 1] > 1e-2 ? ": too much of the image is left" : "");
    Object.assign(say.dataset, { t, alpha_bar: ab, beta: s.beta[t], snr, last: s.alpha_bar[s.T - 1] });
  }
  form.addEventListener("input", draw);
  draw();
}

function toy_mixture(root, data) {
  const form = root.querySelector("form"), stage = root.querySelector(".toy-stage"), say = root.querySelector(".toy-say");
  const s = diffusion.schedule("linear", 1000, 1e-4, 0.02), frames = data.deterministic.length, every = 1000 / (frames - 1);
  const at = slider(form, "t", "t", 0, 1000, every, 300);
  const play = $("button", { type: "button" }, "Play from noise");
  form.append($("div", { class: "toy-row" }, play));
  const N = 110, reach = 2.2, names = { "deterministic": "deterministic (DDIM)", "algorithm 2": "Algorithm 2 (DDPM)" };
  const panels = Object.entries(names).map(([key, name]) => {
    const canvas = $("canvas", { width: 440, height: 440, role: "img" });
    stage.append($("figure", {}, canvas, $("figcaption", {}, name)));
    return [key, canvas];
  });
  const place = ([x, y]) => [(x / reach + 1) * 220, (1 - y / reach) * 220];

  function draw() {
    const t = Math.max(1, +at.value) - 1, ab = +at.value === 0 ? 1 - 1e-9 : s.alpha_bar[t], parts = diffusion.parts(data, ab);
    const dark = document.documentElement.dataset.theme === "dark", ink = dark ? 255 : 0;
    const axis = [...Array(N).keys()].map(i => ((i + 0.5) / N * 2 - 1) * reach);
    const field = axis.flatMap(y => axis.map(x => diffusion.density_and_score(parts, [x, -y]).density)), top = Math.max(...field);
    for (const [key, canvas] of panels) {
      const c = canvas.getContext("2d"), small = new OffscreenCanvas(N, N), image = new ImageData(N, N);
      field.forEach((p, i) => image.data.set([ink, ink, ink, 120 * p / top], 4 * i));
      small.getContext("2d").putImageData(image, 0, 0);
      c.clearRect(0, 0, 440, 440);
      c.drawImage(small, 0, 0, 440, 440);
      c.strokeStyle = dark ? "#8ab" : "#579"; c.lineWidth = 1;
      for (let i = 0; i < 13; i++) for (let j = 0; j < 13; j++) {
        const p = [(i / 6 - 1) * 2, (j / 6 - 1) * 2], [u, v] = diffusion.density_and_score(parts, p).score, size = Math.hypot(u, v);
        const k = 26 * Math.sqrt(1 - ab) / (1 + Math.sqrt(1 - ab) * size), [x, y] = place(p);
        c.beginPath(); c.moveTo(x, y); c.lineTo(x + k * u, y - k * v); c.stroke();
        c.fillStyle = c.strokeStyle; c.fillRect(x + k * u - 1.5, y - k * v - 1.5, 3, 3);
      }
      const frame = Math.round((1000 - at.value) / every);
      c.strokeStyle = dark ? "rgba(255,122,144,.4)" : "rgba(220,20,60,.25)"; c.fillStyle = dark ? "#ff7a90" : "crimson";
      data[key][0].forEach((_, n) => {
        c.beginPath();
        for (let f = Math.max(0, frame - 8); f <= frame; f++) c.lineTo(...place(data[key][f][n]));
        c.stroke();
        const [x, y] = place(data[key][frame][n]);
        c.beginPath(); c.arc(x, y, 3.5, 0, 7); c.fill();
      });
      canvas.setAttribute("aria-label", `${names[key]}: forty points at t = ${at.value}, over the density and its score field`);
    }
    const origin = diffusion.density_and_score(parts, [0, 0]).score;
    say.textContent = `t = ${at.value}: ᾱ = ${ab.toPrecision(4)}, the score at the middle is (${origin.map(v => v.toFixed(3)).join(", ")})`;
    Object.assign(say.dataset, { t: at.value, alpha_bar: ab, score_x: origin[0], score_y: origin[1] });
  }
  let timer = 0;
  play.addEventListener("click", () => {
    clearInterval(timer);
    at.value = 1000;
    timer = setInterval(() => {
      at.value = +at.value - every;
      at.dispatchEvent(new Event("input", { bubbles: true }));
      if (+at.value <= 0) clearInterval(timer);
    }, 110);
  });
  form.addEventListener("input", draw);
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  draw();
}

function toy_guidance(root, data) {
  const form = root.querySelector("form"), stage = root.querySelector(".toy-stage"), say = root.querySelector(".toy-say");
  const scale = slider(form, "scale", "guidance scale γ", 0, 8, 0.1, 3);
  const every = data.every.flat();
  const mean = slider(form, "mean", "mean of the class", -2, 2, 0.1, data.given.flat()[0]);
  const width = slider(form, "variance", "variance of the class", 0.1, 3, 0.1, data.given.flat()[1]);
  const s = diffusion.schedule("linear", 1000, 1e-4, 0.02);
  const plans = ["DDIM", "Algorithm 2"].map(name => [name, diffusion.plan(s, name)]);
  const rows = $("tbody"), table = $("table", { class: "toy-table" }, $("thead", {}, $("tr", {}, ...["", "mean", "variance"].map(h => $("th", {}, h)))), rows);

  function draw() {
    const given = [+mean.value, +width.value], g = +scale.value;
    const drawn = Object.fromEntries(plans.map(([name, plan]) => [name, diffusion.chain(s, plan, g, given, every)]));
    const all = [["all images, p(x)", { mean: every[0], variance: every[1] }, "toy-b"], ["the class, p(x | y)", { mean: given[0], variance: given[1] }, "toy-a"],
                 ["tilted: what is promised", diffusion.tilted(g, given, every), "toy-c"], ["DDIM draws", drawn.DDIM, "toy-d"], ["Algorithm 2 draws", drawn["Algorithm 2"], "toy-e"]];
    const xs = [...Array(241).keys()].map(i => i / 20 - 6);
    const density = d => xs.map(x => [x, Math.exp(-((x - d.mean) ** 2) / (2 * d.variance)) / Math.sqrt(2 * Math.PI * d.variance)]);
    const lines = all.filter(([, d]) => d).map(([, d, kind]) => [density(d), kind]);
    const top = Math.max(...lines.flatMap(([points]) => points.map(p => p[1])));
    stage.replaceChildren(plot("densities", [-6, 6], [0, top], lines), legend(all.map(([name, , kind]) => [kind, name])), table);
    rows.replaceChildren(...all.map(([name, d]) => $("tr", {}, $("th", { scope: "row" }, name), ...(d ? [d.mean, d.variance] : ["none", "none"]).map(v => $("td", {}, typeof v === "number" ? v.toFixed(4) : v)))));
    say.textContent = `γ = ${g}: DDIM draws a variance of ${drawn.DDIM.variance.toFixed(4)}, Algorithm 2 one of ${drawn["Algorithm 2"].variance.toFixed(4)}`;
    Object.assign(say.dataset, { scale: g, ddim_mean: drawn.DDIM.mean, ddim_variance: drawn.DDIM.variance,
      ddpm_mean: drawn["Algorithm 2"].mean, ddpm_variance: drawn["Algorithm 2"].variance });
  }
  form.addEventListener("input", draw);
  draw();
}

// A page holds its toy in <div class="toy" data-toy="schedule">, with the numbers; without JavaScript a still picture stays.
document.addEventListener("DOMContentLoaded", () => {
  for (const root of document.querySelectorAll(".toy")) {
    const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    root.querySelector(".toy-stage").replaceChildren();
    root.querySelector("form").addEventListener("submit", event => event.preventDefault());
    ({ schedule: toy_schedule, mixture: toy_mixture, guidance: toy_guidance })[root.dataset.toy](root, data);
    root.dataset.ready = "yes";
  }
});
