// What is asked of the server: always this one, with the key of this tab where there is one.

const SLOT = "loraplex.key";

export const hasKey = () => sessionStorage.getItem(SLOT) !== null;
export const setKey = (key) => sessionStorage.setItem(SLOT, key);
export const forgetKey = () => sessionStorage.removeItem(SLOT);

/** An answer that is none. `status` is 0 where the server could not be reached. */
export class ApiError extends Error {
  constructor(status, message, requestId = null) {
    super(message);
    this.status = status;
    this.requestId = requestId;
  }
}

async function ask(path, options) {
  const key = sessionStorage.getItem(SLOT);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    // Relative to the page, so that it works behind proxies that put the server under a prefix.
    response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server cannot be reached");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    const body = await response.json();
    message = body.error?.message ?? body.error ?? message;
  } catch {
    // Not JSON: a proxy's page. The status says it.
  }
  return new ApiError(response.status, String(message), response.headers.get("x-request-id"));
}

export async function getJson(path, signal) {
  return (await ask(path, { signal })).json();
}

/** Chunks of a streamed chat completion, as objects. Throws ApiError, also for an error in mid-stream. */
export async function* streamChat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const requestId = response.headers.get("x-request-id");
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(response.status, String(chunk.error.message ?? chunk.error), requestId);
    yield chunk;
  }
  throw new ApiError(0, "the connection broke off", requestId);
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const found = (rest + value).split(/\r?\n\r?\n/);
      rest = found.pop();
      for (const event of found) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // where it broke off there is nothing left to cancel
  }
}
