// Greedy text from one image with a bundle's four graphs, in Node.js: npm install onnxruntime-node
//
//     node greedy.mjs BUNDLE PIXELS NEW_TOKENS ID...
//
// PIXELS: float32 [1, 3, I, I], little-endian, resized and normalised as manifest.json says (config.vision.image_size, config.pixel_mean,
// config.pixel_std). ID...: the prompt's token ids, one <image> among them. Prints the generated ids.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import ort from "onnxruntime-node";

const [bundle, pixelFile, newTokens, ...words] = process.argv.slice(2);
const { config, graphs } = JSON.parse(readFileSync(join(bundle, "manifest.json"), "utf8"));
const { language_model: lm, vision, resampler, tokens } = config;
const prompt = words.map(Number);

const int64 = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
const zeros = (dims) => new ort.Tensor("float32", new Float32Array(dims.reduce((a, b) => a * b)), dims);
const open = (name) => ort.InferenceSession.create(join(bundle, graphs.find((graph) => graph.name === name).file), { logSeverityLevel: 3 });

// The image, once: pixels -> features -> latents -> keys and values of every gated layer. They are row 0 of the media bank.
const raw = readFileSync(pixelFile);
const pixels = new Float32Array(raw.buffer, raw.byteOffset, raw.length / 4);
const encoder = await open("vision_encoder");
const { features } = await encoder.run({ pixels: new ort.Tensor("float32", pixels, [1, 3, vision.image_size, vision.image_size]) });
const feeds = { features: features.reshape([1, 1, ...features.dims.slice(1)]) }; // [N, T, P, E]: one medium of one frame
if (resampler.num_time_embeddings) {
  feeds.time_weights = zeros([1, resampler.num_time_embeddings]); // the first frame has the first time embedding
  feeds.time_weights.data[0] = 1;
}
const media = await (await open("media_kv")).run(await (await open("resampler")).run(feeds));

// The decoder. C slots hold the prompt and all that is generated; each call's present_* are the next call's past_*.
const decoder = await open("decoder");
const capacity = prompt.length + Number(newTokens);
const shape = [1, lm.num_kv_heads ?? lm.num_heads, capacity, lm.head_size];
const cache = Object.fromEntries(decoder.inputNames.filter((name) => name.startsWith("past_")).map((name) => [name, zeros(shape)]));
let seen = 0; // phi: which medium a token sees; an <image> and all that follows it see that image

async function step(ids, start) {
  const phi = ids.map((id) => (id === tokens.image ? ++seen : seen));
  const mask = new Uint8Array(ids.length * capacity);
  ids.forEach((_, s) => mask.fill(1, s * capacity, s * capacity + start + s + 1)); // a token sees itself and all before it
  const every = {
    token_ids: int64(ids, [1, ids.length]),
    positions: int64(ids.map((_, s) => start + s), [1, ids.length]),
    media_rows: int64([0], [1, 1]),
    phi: int64(phi, [1, ids.length]),
    write_index: int64([start], [1]),
    mask: new ort.Tensor("bool", mask, [1, 1, ids.length, capacity]),
    key_positions: int64([...Array(capacity).keys()], [1, capacity]),
    logit_positions: int64([ids.length - 1], [1, 1]),
    ...media,
    ...cache,
  };
  const wanted = Object.fromEntries(Object.entries(every).filter(([name]) => decoder.inputNames.includes(name)));
  const results = await decoder.run(wanted);
  for (const name of Object.keys(cache)) cache[name] = results[name.replace("past_", "present_")];
  const logits = results.logits.data;
  for (const banned of [tokens.image, ...(tokens.banned ?? [])]) logits[banned] = -Infinity;
  return logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
}

const ends = [tokens.eoc, ...(tokens.ends ?? [])];
const found = [];
let next = await step(prompt, 0);
while (!ends.includes(next) && found.length < Number(newTokens)) {
  found.push(next);
  if (found.length === Number(newTokens)) break;
  next = await step([next], prompt.length + found.length - 1);
}
console.log(found.join(" "));
