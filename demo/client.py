"""Makes HTTP requests at the same time, each from a port of its own; prints what became of each as a JSON list.

python3 demo/client.py '[{"method": "GET", "host": "10.1.0.2", "port": 8080, "path": "/", "from": 20001}]'
"""

import http.client
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

TIMEOUT = 1.5


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"status", "you", "error"}``; status 0: no answer."""
    local = ("::" if ":" in request["host"] else "0.0.0.0", request["from"])
    connection = http.client.HTTPConnection(request["host"], request["port"], TIMEOUT, source_address=local)
    try:
        connection.request(request["method"], request["path"], headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        return {"status": 0, "you": "", "error": str(error) or type(error).__name__}
    finally:
        connection.close()
    try:
        you = json.loads(body)["you"]
    except (ValueError, KeyError, TypeError):
        you = ""
    return {"status": response.status, "you": you, "error": ""}


if __name__ == "__main__":
    requests = json.loads(sys.argv[1])
    with ThreadPoolExecutor(len(requests)) as pool:
        print(json.dumps(list(pool.map(ask, requests))))
