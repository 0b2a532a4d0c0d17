"""gRPC calls of an unchanged client, which finds the proxy in its environment. Prints what came of them as JSON."""

import json
import sys

import grpc

target, count, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
said = {}
with grpc.insecure_channel(target) as channel:
    method = lambda kind, name: getattr(channel, kind)(f"/adit.Test/{name}")
    try:
        said["reversed"] = method("unary_unary", "Reverse")(b"abc", timeout=30).decode()
        sent = [bytes([n % 251]) * length for n in range(count)]
        back = list(method("stream_stream", "Echo")(iter(sent), timeout=60))
        said["echoed"] = len(back) if back == sent else "something else"
        method("unary_unary", "Fail")(b"", timeout=30)
    except grpc.RpcError as e:
        said["error"] = [e.code().name, e.details()]
print(json.dumps(said))
