"""What the VM serves: a page with a WebSocket, files, and a gRPC service. Prints the two ports as JSON."""

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from aiohttp import WSMsgType, web

# The browser has loaded the page when it has the image, and it gets that when the script is done.
PAGE = """<!doctype html><title>web-1</title><p id="said">nothing</p><img src="/wait.png">
<script>
(async () => {
  const count = async () => (await fetch("/count", {method: "POST", body: "x".repeat(300000)})).text();
  const counted = await Promise.all(Array.from({length: 20}, count));
  const socket = new WebSocket(`ws://${location.host}/socket`);
  const heard = new Promise((done, failed) => {
    socket.onmessage = message => done(message.data);
    socket.onerror = () => failed("no WebSocket");
  });
  await new Promise(open => socket.onopen = open);
  socket.send("ping");
  // It has this from the proxy, too.
  await fetch("http://elsewhere.example/", {mode: "no-cors"}).catch(() => {});
  return `${new Set(counted).size} ${counted[0]} ${await heard}`;
})().catch(String).then(said => {
  document.getElementById("said").textContent = said;
  fetch("/done", {method: "POST"});
});
</script>"""

done = None


async def page(request):
    return web.Response(text=PAGE, content_type="text/html")


async def count(request):
    return web.Response(text=str(len(await request.read())))


async def over(request):
    done.set()
    return web.Response(text="")


async def wait(request):
    await done.wait()
    return web.Response(body=b"", content_type="image/png")


async def socket(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    async for message in ws:
        if message.type == WSMsgType.TEXT:
            await ws.send_str(message.data + " came back")
    return ws


def reverse(request, context):
    return request[::-1]


def echo(requests, context):
    yield from requests


def fail(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "as it was to be")


def serve_grpc():
    server = grpc.server(ThreadPoolExecutor())
    methods = {
        "Reverse": grpc.unary_unary_rpc_method_handler(reverse),
        "Echo": grpc.stream_stream_rpc_method_handler(echo),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
    }
    handler = grpc.method_handlers_generic_handler("adit.Test", methods)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


async def main(files):
    global done
    done = asyncio.Event()
    app = web.Application(client_max_size=1 << 30)
    app.add_routes([
        web.get("/", page),
        web.post("/count", count),
        web.post("/done", over),
        web.get("/wait.png", wait),
        web.get("/socket", socket),
        web.static("/files", files),
    ])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server, grpc_port = serve_grpc()
    page_port = runner.addresses[0][1]
    print(json.dumps([page_port, grpc_port]), flush=True)
    await asyncio.Event().wait()


asyncio.run(main(sys.argv[1]))
