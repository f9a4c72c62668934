// The openai JavaScript client against a server: node openai_client.mjs NODE_MODULES PORT IMAGE
import assert from "assert";
import fs from "fs";
import { createRequire } from "module";

const [, , modules, port, image] = process.argv;
const OpenAI = createRequire(`${modules}/`)("openai");
const client = new OpenAI({ baseURL: `http://127.0.0.1:${port}/v1`, apiKey: "none" });
const url = "data:image/png;base64," + fs.readFileSync(image).toString("base64");
const messages = [{ role: "user", content: [{ type: "image_url", image_url: { url } }, { type: "text", text: "What is it?" }] }];
const models = []; for await (const m of client.models.list()) models.push(m.id); assert.deepEqual(models, ["nano"]);
const whole = await client.chat.completions.create({ model: "nano", messages, logprobs: true, top_logprobs: 2 });
const text = whole.choices[0].message.content; assert(whole.usage.total_tokens > 0); assert(whole.choices[0].logprobs.content.length > 0);
const stream = await client.chat.completions.create({ model: "nano", messages, stream: true, stream_options: { include_usage: true } });
let got = "", usage = null; for await (const c of stream) { got += c.choices[0]?.delta?.content ?? ""; usage = c.usage ?? usage; }
assert.equal(got, text); assert(usage.total_tokens > 0);
const several = await client.chat.completions.create({ model: "nano", messages, n: 3, temperature: 1, seed: 5 }); assert.equal(several.choices.length, 3);
const raw = await client.completions.create({ model: "nano", prompt: "a red", max_tokens: 4 }); assert(typeof raw.choices[0].text === "string");
await assert.rejects(client.chat.completions.create({ model: "none", messages }), e => e instanceof OpenAI.NotFoundError && e.code === "model_not_found");
await assert.rejects(client.chat.completions.create({ model: "nano", messages, tools: [{ type: "function", function: { name: "f" } }] }), OpenAI.BadRequestError);
const gone = await client.chat.completions.create({ model: "nano", messages, stream: true }); gone.controller.abort();
console.log(text);
