// The mathematics of the three toys: a few lines each, compared with the library by tests/test_book.py. No framework.
"use strict";

const diffusion = {
  // Noise variances beta_1 … beta_T: "linear" between its ends, "cosine" from alpha_bar = f(t) / f(0), clipped at 0.999.
  schedule(kind, T, beta_1, beta_T) {
    const f = t => Math.cos(((t / T + 0.008) / 1.008) * Math.PI / 2) ** 2;
    const beta = [...Array(T).keys()].map(t => kind === "linear"
      ? beta_1 + (beta_T - beta_1) * t / (T - 1) : Math.min(1 - f(t + 1) / f(t), 0.999));
    let product = 1;
    const alpha_bar = beta.map(b => product *= 1 - b);
    return { T, beta, alpha_bar, alpha_bar_prev: [1, ...alpha_bar.slice(0, -1)] };
  },

  // q(x_t | x_0): one draw, for a given noise.
  noised(s, x0, t, eps) {
    const a = Math.sqrt(s.alpha_bar[t]), b = Math.sqrt(1 - s.alpha_bar[t]);
    return x0.map((x, i) => a * x + b * eps[i]);
  },

  // The parts of a mixture in the plane after t steps of noise: weight, mean, inverse covariance, and the constant of the density.
  parts(mixture, ab) {
    return mixture.weights.map((weight, k) => {
      const [[a, b], [, d]] = mixture.covs[k].map((row, i) => row.map((v, j) => ab * v + (i === j ? 1 - ab : 0)));
      const det = a * d - b * b;
      return { mean: mixture.means[k].map(m => Math.sqrt(ab) * m), inverse: [d / det, -b / det, a / det],
               front: weight / (2 * Math.PI * Math.sqrt(det)) };
    });
  },

  // Density and score (the gradient of its logarithm) at a point.
  density_and_score(parts, [x, y]) {
    let density = 0, gx = 0, gy = 0;
    for (const { mean, inverse: [a, b, d], front } of parts) {
      const u = x - mean[0], v = y - mean[1], px = a * u + b * v, py = b * u + d * v;
      const p = front * Math.exp(-(u * px + v * py) / 2);
      density += p; gx -= p * px; gy -= p * py;
    }
    return { density, score: [gx / density, gy / density] };
  },

  // A sampler of all T steps as a table: x_s = x0_coef * x0_hat + x_t_coef * x_t + std * z.
  plan(s, sampler) {
    return s.alpha_bar.map((ab, t) => {
      const before = s.alpha_bar_prev[t], alpha = ab / before;
      if (sampler === "DDIM") {
        const ratio = Math.sqrt((1 - before) / (1 - ab));
        return { x0: Math.sqrt(before) - Math.sqrt(ab) * ratio, x_t: ratio, variance: 0 };
      }
      return { x0: Math.sqrt(before) * (1 - alpha) / (1 - ab), x_t: Math.sqrt(alpha) * (1 - before) / (1 - ab),
               variance: (1 - alpha) * (1 - before) / (1 - ab) };
    });
  },

  // Mean and variance of what guided sampling draws, for Gaussians p(x | y) and p(x), given as [mean, variance]: every step
  // multiplies x by a number, shifts it and adds noise.
  chain(s, plan, scale, given, every) {
    let mean = 0, variance = 1;
    for (let t = s.T - 1; t >= 0; t--) {
      const ab = s.alpha_bar[t], root = Math.sqrt(ab);
      let slope = 0, shift = 0; // the guided score is shift - slope * x
      for (const [coef, [m, v]] of [[scale, given], [1 - scale, every]]) {
        const width = ab * v + 1 - ab;
        slope += coef / width; shift += coef * root * m / width;
      }
      const factor = plan[t].x0 * (1 - (1 - ab) * slope) / root + plan[t].x_t;
      mean = factor * mean + plan[t].x0 * (1 - ab) * shift / root;
      variance = factor * factor * variance + plan[t].variance;
    }
    return { mean, variance };
  },

  // The density that the usual explanation promises: p(x | y)^scale * p(x)^(1 - scale), or null where it cannot be normalised.
  tilted(scale, [m_c, v_c], [m_u, v_u]) {
    const precision = scale / v_c + (1 - scale) / v_u;
    return precision > 0 ? { mean: (scale * m_c / v_c + (1 - scale) * m_u / v_u) / precision, variance: 1 / precision } : null;
  },
};
