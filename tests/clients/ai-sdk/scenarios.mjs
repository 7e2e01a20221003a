// What an application does with the AI SDK, each printed as JSON for test_ai_sdk.py: node scenarios.mjs NAME
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const where = { baseURL: `${process.env.LORAPLEX_URL}/v1`, apiKey: process.env.LORAPLEX_KEY };
const compatible = createOpenAICompatible({
  name: "loraplex",
  includeUsage: true,
  supportsStructuredOutputs: true,
  ...where,
});
const openai = createOpenAI(where);
const common = { temperature: 0, maxOutputTokens: 40, maxRetries: 0 };
const prompt = "Which city is the capital of Italy?";
const person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(120), member: z.boolean() });
const asked = { ...common, maxOutputTokens: 80, prompt: "Make up a person.", schema: person };

async function partsOf(result) {
  const parts = [];
  for await (const part of result.fullStream) {
    if (part.type === "error") throw part.error;
    parts.push(part);
  }
  return parts;
}

async function streamed(model) {
  const result = streamText({ model, prompt, ...common });
  const deltas = (await partsOf(result)).filter((part) => part.type === "text-delta").map((part) => part.text);
  return { deltas, finish: await result.finishReason, usage: await result.usage };
}

async function whole(model) {
  const { text, finishReason, usage, response } = await generateText({ model, prompt, ...common });
  return { text, finish: finishReason, usage, answered: response.modelId };
}

const weather = (calls) =>
  tool({
    description: "The weather in a city.",
    inputSchema: z.object({ city: z.string().max(30), unit: z.enum(["celsius", "fahrenheit"]) }),
    execute: async (input) => {
      calls.push(input);
      return { degrees: 18 };
    },
  });

function steps(calls, model) {
  return {
    model,
    ...common,
    maxOutputTokens: 80,
    prompt: "What is the weather in Paris, in celsius?",
    tools: { get_weather: weather(calls) },
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  };
}

const toldOf = (all) =>
  all.map((step) => ({ finish: step.finishReason, text: step.text, calls: step.toolCalls.map((call) => call.input) }));

async function failure(model) {
  try {
    await generateText({ model, prompt, ...common });
    return null;
  } catch (error) {
    return { known: APICallError.isInstance(error), status: error.statusCode, message: error.message };
  }
}

const scenarios = {
  text: async () => ({ whole: await whole(compatible("pirate")), streamed: await streamed(compatible("pirate")) }),
  openai: async () => {
    const models = { chat: openai.chat("pirate"), responses: openai.responses("pirate") };
    const told = {};
    for (const [name, model] of Object.entries(models))
      told[name] = { whole: await whole(model), streamed: await streamed(model) };
    return told;
  },
  object: async () => {
    const told = {};
    const models = { compatible: compatible("demo"), chat: openai.chat("demo"), responses: openai.responses("demo") };
    for (const [name, model] of Object.entries(models)) {
      const { object, finishReason } = await generateObject({ model, ...asked });
      const result = streamObject({ model, ...asked });
      let partials = 0;
      for await (const partial of result.partialObjectStream) partials += partial ? 1 : 0;
      told[name] = { object, finish: finishReason, streamed: await result.object, partials };
    }
    return told;
  },
  tools: async () => {
    const told = {};
    for (const [name, model] of Object.entries({ compatible: compatible("demo"), responses: openai.responses("demo") })) {
      const calls = [];
      const result = await generateText(steps(calls, model));
      const stream = streamText(steps(calls, model));
      await partsOf(stream);
      told[name] = { steps: toldOf(result.steps), streamed: toldOf(await stream.steps), calls };
    }
    return told;
  },
  embeddings: async () => {
    const model = compatible.textEmbeddingModel("demo");
    const { embeddings, usage } = await embedMany({ model, values: ["a cat", "a dog"], maxRetries: 0 });
    return { sizes: embeddings.map((each) => each.length), tokens: usage.tokens };
  },
  failures: async () => ({
    name: await failure(compatible("nobody")),
    key: await failure(createOpenAI({ ...where, apiKey: "wrong" }).chat("demo")),
  }),
  abort: async () => {
    const controller = new AbortController();
    const model = compatible("demo");
    const limits = { ...common, maxOutputTokens: 2000, abortSignal: controller.signal };
    const kinds = [];
    for await (const part of streamText({ model, prompt: "Count to a million.", ...limits }).fullStream) {
      kinds.push(part.type);
      if (part.type === "text-delta") controller.abort();
    }
    return { kinds };
  },
};

console.log(JSON.stringify(await scenarios[process.argv[2]]()));
