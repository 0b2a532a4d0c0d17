// An application that speaks HTTP/2 with the proxy: tunnels in streams of one connection. Prints what came of it as JSON. Without `page` it only
// counts the tunnels that echo.

import { createHash, randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import http from "node:http";
import http2 from "node:http2";

const { proxy, ca, cert, key, token, echo, page, tunnels, bytes } = JSON.parse(process.argv[2]);
const read = path => path && readFileSync(path);
const fields = token ? { "proxy-authorization": `Bearer ${token}` } : {};

function say(what) {
  console.log(JSON.stringify(what));
  process.exit(0);
}

// Node resets streams of its own once more than 10 MB wait to be sent, unless it is told that it may be more.
const room = { maxSessionMemory: 100 };
const session = http2.connect(proxy, { ca: read(ca), cert: read(cert), key: read(key), ...room });
session.on("error", e => say({ error: `${e.code} ${e.message}` }));

/** A tunnel, or why there is none. */
function connect(to) {
  const stream = session.request({ ":method": "CONNECT", ":authority": to, ...fields }, { endStream: false });
  return new Promise((open, failed) => {
    stream.on("error", failed);
    stream.on("response", head => open({ stream, status: head[":status"], proxyStatus: head["proxy-status"] }));
  });
}

async function all(stream) {
  const pieces = [];
  for await (const piece of stream) pieces.push(piece);
  return Buffer.concat(pieces);
}

/** Whether all comes back, and the end with it. */
async function echoes() {
  const { stream, status } = await connect(echo);
  if (status !== 200) return false;
  const sent = randomBytes(bytes);
  stream.end(sent);
  const sum = data => createHash("sha256").update(data).digest("hex");
  return sum(await all(stream)) === sum(sent);
}

/** A page, by Node's own client of HTTP/1.1 in a tunnel. */
async function get() {
  const { stream } = await connect(page);
  const request = http.get({ host: "web-1", path: "/files/hello", createConnection: () => stream });
  const answer = await new Promise((got, failed) => request.on("response", got).on("error", failed));
  return (await all(answer)).toString();
}

async function refused(to) {
  const { stream, status, proxyStatus } = await connect(to);
  const text = (await all(stream)).toString();
  return { status, proxyStatus, text };
}

const step = (name, promise) => promise.catch(e => say({ failed: name, error: `${e.code} ${e.message}` }));
const first = await step("first", connect(echo));
if (first.status !== 200) {
  const text = (await all(first.stream)).toString();
  say({ status: first.status, proxyStatus: first.proxyStatus, text });
}
first.stream.close();
const came = await step("echo", Promise.all(Array.from({ length: tunnels }, echoes)));
const echoed = { alpn: session.alpnProtocol, echoed: came.filter(Boolean).length };
if (!page) say(echoed);
say({
  ...echoed,
  page: await step("page", get()),
  nobody: await step("nobody", refused("nobody:80")),
  closed: await step("closed", refused("web-1:1")),
});
