// The Vercel AI SDK and openai-js against a running server, as clients.py asks the Python libraries:
//     npm install ai @ai-sdk/openai @ai-sdk/openai-compatible openai zod
//     node benchmarks/clients.mjs http://127.0.0.1:8080
import { generateObject, generateText, streamText, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import OpenAI from "openai";
import { z } from "zod";

const base = `${process.argv[2] ?? "http://127.0.0.1:8080"}/v1`;
const name = (await (await fetch(`${base}/models`)).json()).data[0].id;
const place = z.object({ city: z.enum(["Ulm", "Bonn"]) });
let failures = 0;

async function check(what, ask) {
  try {
    if (!(await ask())) throw new Error("an empty answer");
    console.log(`${what}: works`);
  } catch (error) {
    failures += 1;
    console.log(`${what}: FAILS: ${String(error.message).slice(0, 300)}`);
  }
}

const own = createOpenAI({ baseURL: base, apiKey: "none" });
const other = createOpenAICompatible({ name: "m", baseURL: base, apiKey: "none", supportsStructuredOutputs: true });
for (const [label, model] of [
  ["ai, responses", own(name)],
  ["ai, chat", own.chat(name)],
  ["ai, openai-compatible", other(name)],
]) {
  const asked = { model, prompt: "What is the weather in Ulm?", maxRetries: 0 };
  await check(`${label}: text`, async () => (await generateText({ ...asked, maxOutputTokens: 16 })).text);
  await check(`${label}: stream`, async () => {
    let text = "";
    for await (const piece of streamText({ ...asked, maxOutputTokens: 16 }).textStream) text += piece;
    return text;
  });
  await check(`${label}: object`, async () => {
    return (await generateObject({ ...asked, schema: place, maxOutputTokens: 40 })).object.city;
  });
  await check(`${label}: tools`, async () => {
    const tools = { weather: tool({ description: "The weather.", inputSchema: place }) };
    return (await generateText({ ...asked, tools, toolChoice: "required", maxOutputTokens: 200 })).toolCalls.length;
  });
}

const client = new OpenAI({ baseURL: base, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather?" }];
await check("openai: stream", async () => {
  let text = "";
  const stream = await client.chat.completions.create({ model: name, messages, stream: true, max_tokens: 8 });
  for await (const piece of stream) text += piece.choices[0]?.delta?.content ?? "";
  return text;
});
await check("openai: runTools", async () => {
  const weather = { name: "weather", description: "The weather.", parameters: { type: "object", properties: {} } };
  const tools = [{ type: "function", function: { ...weather, function: async () => "rain", parse: JSON.parse } }];
  const asked = { model: name, messages, tools, max_tokens: 200, temperature: 0, stop: ["."] }; // it takes no cut text
  return client.chat.completions.runTools(asked).finalChatCompletion();
});
await check("openai: responses", async () => {
  return (await client.responses.create({ model: name, input: "Hello", max_output_tokens: 16 })).output_text;
});
process.exit(failures ? 1 : 0);
