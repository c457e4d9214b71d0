// Calls of the server. URLs are relative to the page, so that it works behind a prefix.

const KEY = "quire.key";

/** An answer that is an error; `status` is 0 where there was no answer. */
export class ApiError extends Error {
  constructor(message, status, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The API key of this tab. */
export const getKey = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (getKey()) headers.authorization = `Bearer ${getKey()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.", 0);
  }
  return response;
}

async function failure(response) {
  let about = {};
  try {
    about = (await response.json()).error ?? {};
  } catch {
    // A proxy's page, perhaps: the status says enough.
  }
  if (response.status === 401) document.dispatchEvent(new Event("key-needed"));
  return new ApiError(about.message ?? `The server answers ${response.status}.`, response.status, about.code ?? "");
}

/** The JSON of an answer. Throws `ApiError`. */
export async function call(path, options) {
  const response = await request(path, options);
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** State of the engine: ready, restarting, …; "away" if the server does not answer. It needs no key. */
export async function engineState() {
  try {
    const response = await request("health");
    return (await response.json()).status;
  } catch {
    return "away";
  }
}

/** Lines of server-sent events → their data, parsed. A text may be cut anywhere. */
export class EventReader {
  #rest = "";

  *feed(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

/** The events of a streamed answer. Throws `ApiError`, also for an error within the stream. */
export async function* events(path, options) {
  const response = await request(path, options);
  if (!response.ok) throw await failure(response);
  const reader = new EventReader();
  const stream = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await stream.read();
      if (done) return;
      for (const event of reader.feed(value)) {
        if (event.error)
          throw new ApiError(event.error.message ?? "The answer failed.", response.status, event.error.code);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection broke before the answer ended.", 0);
  } finally {
    stream.cancel().catch(() => {});
  }
}
