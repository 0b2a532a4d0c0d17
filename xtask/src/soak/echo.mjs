// Tunnels in streams of one HTTP/2 connection: prints how many of them echoed all that was sent, and its end.

import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import http2 from "node:http2";

const { proxy, ca, tunnels, bytes, echo } = JSON.parse(process.argv[2]);
const session = http2.connect(proxy, { ca: readFileSync(ca), maxSessionMemory: 100 });
session.on("error", e => {
  console.log(e.message);
  process.exit(1);
});

async function echoes() {
  const stream = session.request({ ":method": "CONNECT", ":authority": echo }, { endStream: false });
  const status = await new Promise((open, failed) => {
    stream.on("error", failed);
    stream.on("response", head => open(head[":status"]));
  });
  if (status !== 200) throw new Error(`status ${status}`);
  const sent = randomBytes(bytes);
  stream.end(sent);
  const pieces = [];
  for await (const piece of stream) pieces.push(piece);
  return Buffer.concat(pieces).equals(sent);
}

try {
  const came = await Promise.all(Array.from({ length: tunnels }, echoes));
  console.log(came.filter(Boolean).length);
  process.exit(0);
} catch (e) {
  console.log(e.message);
  process.exit(1);
}
