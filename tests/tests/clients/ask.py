"""Python's `requests` with a proxy at https://, as its documentation has it. Prints the answer as JSON."""

import json
import sys

import requests

proxy, ca, url = sys.argv[1:]
session = requests.Session()
session.proxies = {"http": proxy, "https": proxy}
session.verify = ca
try:
    answer = session.get(url, timeout=30)
    print(json.dumps({"status": answer.status_code, "text": answer.text}))
except requests.RequestException as e:
    print(json.dumps({"error": type(e).__name__, "text": str(e)}))
