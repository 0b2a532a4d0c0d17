"""A WebSocket through a proxy without TLS: by CONNECT, as websocket-client does, and in absolute form, as aiohttp does. Prints both answers as JSON."""

import asyncio
import json
import sys

import aiohttp
import websocket

host, port, url = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def tunnelled():
    ws = websocket.create_connection(url, timeout=30, http_proxy_host=host, http_proxy_port=port, proxy_type="http")
    ws.send("ping")
    said = ws.recv()
    ws.close()
    return said


async def absolute():
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.ws_connect(url, proxy=f"http://{host}:{port}") as ws:
            await ws.send_str("ping")
            return await ws.receive_str()


print(json.dumps({"tunnelled": tunnelled(), "absolute": asyncio.run(absolute())}))
