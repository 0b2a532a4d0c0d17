// Two tunnels in streams of one connection, each with a token of its own, held open. Prints `open` when both echo, how the first
// ends, and whether the second still echoes then.

import { readFileSync } from "node:fs";
import http2 from "node:http2";

const { proxy, ca, tokens, echo } = JSON.parse(process.argv[2]);
const session = http2.connect(proxy, { ca: readFileSync(ca) });

async function connect(token) {
  const head = { ":method": "CONNECT", ":authority": echo, "proxy-authorization": `Bearer ${token}` };
  const stream = session.request(head, { endStream: false });
  stream.on("error", () => {});
  const status = await new Promise(open => stream.on("response", head => open(head[":status"])));
  if (status !== 200) throw new Error(`status ${status}`);
  await echoes(stream);
  return stream;
}

function echoes(stream) {
  stream.write("ping");
  return new Promise(heard => stream.once("data", data => heard(data.toString() === "ping")));
}

const [first, second] = await Promise.all(tokens.map(connect));
console.log("open");
const code = await new Promise(over => first.on("close", () => over(first.rstCode)));
console.log(JSON.stringify({ code, goesOn: await echoes(second) }));
process.exit(0);
