// The gateway's API as the page uses it: the same that every other client has.

export function headers() {
  const key = document.getElementById("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

export function getJson(path) {
  return sendJson("GET", path);
}

export async function sendJson(method, path, body) {
  const response = await fetch(path, { method, headers: headers(), body: body && JSON.stringify(body) });
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

/** The chunks of a streamed chat, as they come. Ends the request when `signal` says so. */
export async function* streamChat(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), signal,
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw await errorOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer ended before it was complete");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function errorOf(response) {
  const text = await response.text();
  try {
    const error = new Error(JSON.parse(text).error.message);
    error.status = response.status;
    return error;
  } catch {
    return new Error(`the gateway answered ${response.status}`);
  }
}
