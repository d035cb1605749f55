// The mirror of runtime.py: its Scheduler and Student, rounded to float32 wherever numpy rounds, so that page and
// Python draw the same picture. Knows no engine: whoever makes a Student hands it `run` and a tokenizer.
//
// A tensor is { data: Float32Array or Int32Array, dims: [..] }; a picture RGBA bytes; a hole one byte a pixel, 1 = fill.

import { noise } from "./noise.js";

const { fround, sqrt } = Math;

/** numpy's round: a half goes to the even neighbour. */
function round(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}

/** DDIM without noise of its own (2010.02502), number for number as diffusers' DDIMScheduler with eta 0. */
export class Scheduler {
  /** config: alphas_cumprod, final_alpha_cumprod, prediction_type, timestep_spacing, steps_offset, clip_sample_range. */
  constructor(config) {
    this.config = config;
    this.abar = config.alphas_cumprod;
  }

  /** `steps` whole numbers, falling. */
  timesteps(steps) {
    const total = this.abar.length;
    if (!(steps >= 1 && steps <= total)) throw new RangeError(`${steps} steps are not between 1 and ${total}`);
    const numbers = [...Array(steps).keys()];
    if (this.config.timestep_spacing === "trailing") {
      const stride = total - total / steps - total; // numpy's arange adds the stride as it came out of one addition
      return numbers.map((i) => round(total + i * stride) - 1);
    }
    if (this.config.timestep_spacing === "linspace") {
      const stride = (total - 1) / (steps - 1);
      return numbers.map((i) => (i && i === steps - 1 ? total - 1 : round(i && i * stride))).reverse();
    }
    return numbers.map((i) => Math.min(i * Math.floor(total / steps) + this.config.steps_offset, total - 1)).reverse();
  }

  /** The clean latents and the noise that a prediction stands for; x_t = alpha x_0 + sigma eps. */
  toX0Eps(prediction, t, x_t) {
    const { x0, eps } = this.#toX0Eps(prediction, t, x_t);
    const bound = this.config.clip_sample_range;
    return { x0: bound === null ? x0 : x0.map((x) => Math.min(Math.max(x, -bound), bound)), eps };
  }

  #toX0Eps(prediction, t, x_t) {
    const alpha = fround(sqrt(this.abar[t]));
    const sigma = fround(sqrt(1 - this.abar[t]));
    const kind = this.config.prediction_type;
    if (kind === "epsilon") {
      return { x0: x_t.map((x, i) => fround(x - fround(sigma * prediction[i])) / alpha), eps: prediction };
    }
    if (kind === "sample") {
      return { x0: prediction, eps: x_t.map((x, i) => fround(x - fround(alpha * prediction[i])) / sigma) };
    }
    return {
      x0: x_t.map((x, i) => fround(alpha * x) - fround(sigma * prediction[i])),
      eps: x_t.map((x, i) => fround(alpha * prediction[i]) + fround(sigma * x)),
    };
  }

  /** The latents one step further on. */
  step(x0, eps, t, steps) {
    const previous = t - Math.floor(this.abar.length / steps);
    const abar = previous >= 0 ? this.abar[previous] : this.config.final_alpha_cumprod;
    const alpha = fround(sqrt(abar));
    const sigma = fround(sqrt(1 - abar));
    return x0.map((x, i) => fround(alpha * x) + fround(sigma * eps[i]));
  }
}

/** A caption's ids, its end mark last, cut or padded to `length`. */
export function fitTokens(ids, length, pad) {
  if (ids.length > length) return [...ids.slice(0, length - 1), ids.at(-1)];
  return [...ids, ...Array(length - ids.length).fill(pad)];
}

/** Control: (1, 3, S, S), known pixels in [0, 1], pixels to fill -1, as diffusers' inpainting ControlNets take it. */
export function toControl(picture, hole, side) {
  const area = side * side;
  const data = new Float32Array(3 * area);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) data[c * area + i] = hole[i] === 1 ? -1 : picture[4 * i + c] / 255;
  }
  return { data, dims: [1, 3, side, side] };
}

/** What was drawn, (1, 3, S, S) in [-1, 1], inside the hole; the picture around it, untouched. RGBA bytes. */
export function paste(drawn, picture, hole) {
  const area = hole.length;
  const pixels = new Uint8ClampedArray(picture); // clamps, and rounds a half to even as numpy does
  for (let i = 0; i < area; i++) {
    if (hole[i] !== 1) continue;
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = fround(fround(drawn[c * area + i] + 1) * 127.5);
    pixels[4 * i + 3] = 255;
  }
  return pixels;
}

/** The tensor `rows` times, one under the other. */
function repeat({ data, dims }, rows) {
  const repeated = new data.constructor(data.length * rows);
  for (let row = 0; row < rows; row++) repeated.set(data, row * data.length);
  return { data: repeated, dims: [rows * dims[0], ...dims.slice(1)] };
}

/** The graphs of an exported folder and what binds them: prompt and masked picture -> picture. */
export class Student {
  /**
   * @param manifest refine-control.json
   * @param encode caption -> ids with their start and end marks
   * @param run async (graph, { input: tensor }) -> [tensor]
   */
  constructor(manifest, encode, run) {
    this.manifest = manifest;
    this.scheduler = new Scheduler(manifest.scheduler);
    this.encode = encode;
    this.run = run;
  }

  /** What the denoiser reads of the prompts: tokens (B, L, D), and pooled (B, P) where the graph gives it. */
  async embed(prompts) {
    const { max_length: length, pad_ids: pads, empty_is_zeros: zeros } = this.manifest.text;
    const ids = prompts.flatMap((prompt) => fitTokens(this.encode(prompt), length, pads[0]));
    const outputs = await this.run("text_encoder", {
      input_ids: { data: Int32Array.from(ids), dims: [prompts.length, length] },
    });
    if (zeros) {
      for (const { data } of outputs) {
        const size = data.length / prompts.length;
        prompts.forEach((prompt, row) => prompt === "" && data.fill(0, row * size, (row + 1) * size));
      }
    }
    const [tokens, pooled] = outputs;
    return pooled ? { tokens, pooled } : { tokens };
  }

  /**
   * Denoises latents of pure noise, Float32Array (c * h * w).
   *
   * @param control toControl's, or null for a model without a module
   * @param onStep async (number, x0): told each step's number and the clean latents that it foresees
   */
  async sample(control, prompt, steps, guidance, latents, onStep) {
    const guided = guidance > 1;
    const inputs = await this.embed(guided ? ["", prompt] : [prompt]);
    const rows = guided ? 2 : 1;
    const dims = [1, ...this.manifest.latent_shape];
    const scale = fround(guidance);
    if (control) inputs.condition = repeat((await this.run("condition", { control }))[0], rows);
    for (const [number, t] of this.scheduler.timesteps(steps).entries()) {
      const x_t = repeat({ data: latents, dims }, rows);
      const asked = { x_t, t: { data: new Float32Array(rows).fill(t), dims: [rows] }, ...inputs };
      let prediction = (await this.run("denoiser", asked))[0].data;
      if (guided) {
        const [empty, captioned] = [prediction.subarray(0, latents.length), prediction.subarray(latents.length)];
        prediction = empty.map((e, i) => e + fround(scale * fround(captioned[i] - e)));
      }
      const { x0, eps } = this.scheduler.toX0Eps(prediction, t, latents);
      latents = this.scheduler.step(x0, eps, t, steps);
      await onStep(number, x0);
    }
    return latents;
  }

  /** Latents (c * h * w) -> (3 * S * S) in [-1, 1]. */
  async decode(latents) {
    const dims = [1, ...this.manifest.latent_shape];
    return (await this.run("vae_decoder", { latents: { data: latents, dims } }))[0].data;
  }

  /** The picture with its hole filled: RGBA bytes. onStep as of `sample`. */
  async fill({ picture, hole, prompt, steps, guidance, seed }, onStep = async () => {}) {
    const { graphs, resolution, latent_shape: shape } = this.manifest;
    const control = graphs.condition ? toControl(picture, hole, resolution) : null;
    const start = noise(seed, shape.reduce((product, n) => product * n, 1));
    const latents = await this.sample(control, prompt, steps, guidance, start, onStep);
    return paste(await this.decode(latents), picture, hole);
  }
}
