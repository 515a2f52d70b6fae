// Calls OpenAI's client: each line of standard input is a call, and its outcome becomes a line of standard output.
import { createInterface } from "node:readline";
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(-2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

async function outcome({ method, given }) {
  const steps = method.split(".");
  const name = steps.pop();
  try {
    const resource = steps.reduce((found, step) => found[step], client);
    const reply = await resource[name](...given);
    // The events of a response, put together by the client.
    if (reply.finalResponse !== undefined) return { reply: await reply.finalResponse() };
    if (reply[Symbol.asyncIterator] === undefined) return { reply };
    const parts = [];
    for await (const part of reply) parts.push(part);
    return { parts };
  } catch (error) {
    const { status, code, param, type, message } = error;
    return { error: { name: error.constructor.name, status, code, param, type, message } };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await outcome(JSON.parse(line))));
}
