// The service's chat API: one streamed answer.

export class ServiceError extends Error {
  constructor(message, { code, retryAfter } = {}) {
    super(message);
    Object.assign(this, { code, retryAfter });
  }
}

const headers = (key) => ({ "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) });

export async function models(key) {
  const reply = await fetch("v1/models", { headers: headers(key) });
  return reply.ok ? (await reply.json()).data : [];
}

// Ask for an answer; yields {text} for each piece, and {finish} and {tokens} when they are known.
export async function* answer(body, { key, signal }) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const reply = await fetch("v1/chat/completions", { method: "POST", headers: headers(key), body: JSON.stringify(request), signal });
  if (!reply.ok) {
    const { error } = await reply.json().catch(() => ({}));
    throw new ServiceError(error?.message ?? `${reply.status} ${reply.statusText}`, { code: error?.code, retryAfter: reply.headers.get("Retry-After") });
  }
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServiceError(chunk.error.message, chunk.error);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage) yield { tokens: chunk.usage.completion_tokens };
  }
  throw new ServiceError("", { code: "interrupted" }); // the stream ended without its mark
}

// The data of server-sent events.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trimStart();
    }
  } finally {
    reader.cancel().catch(() => {}); // a broken stream cannot be cancelled, and need not be
  }
}
