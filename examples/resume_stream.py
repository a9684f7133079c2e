"""A completion's stream that goes on when its connection is cut, wherever that happens: its replica, a proxy, the network.

The server keeps nothing for it: the id of the last event says how far the client is, and the same request with that id goes on
behind it, through any replica. Imports httpx.

    python examples/resume_stream.py http://127.0.0.1:8000 "def add(a, b):"
"""

import json
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx

CUT_SHORT = (httpx.TransportError, EOFError)
COME_AGAIN = (429, 502, 503)
MOST_TRIES = 60
"""In a row without an event."""


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The contents of the events, each once. Errors: RuntimeError with what the server said; the last error of the connection
    if it is cut too often."""
    headers = {"Accept": "text/event-stream", "X-Request-Id": uuid.uuid4().hex}  # the same each time
    tries = 0
    while True:
        try:
            for last_id, content in events(client, path, body, headers):
                yield content
                headers["Last-Event-ID"], tries = last_id, 0
            return
        except CUT_SHORT:
            if (tries := tries + 1) > MOST_TRIES:
                raise
            time.sleep(min(5.0, 0.1 * 2 ** min(tries, 6)))


def events(
    client: httpx.Client, path: str, body: dict[str, Any], headers: dict[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, content) of the events of one connection. Errors: `CUT_SHORT` if it ends too early, or cannot be served now."""
    with client.stream("POST", path, json=body | {"stream": True}, headers=headers) as response:
        if response.status_code in COME_AGAIN:
            time.sleep(float(response.headers.get("retry-after", "1")))
            raise EOFError(f"status {response.status_code}")
        if response.status_code != httpx.codes.OK:
            raise RuntimeError(response.read().decode())
        last_id = ""
        for line in response.iter_lines():
            field, _, value = line.partition(": ")
            if field == "id":
                last_id = value
            elif field == "data" and value == "[DONE]":
                return
            elif field == "data":
                content = json.loads(value)
                if "error" in content:
                    raise RuntimeError(content["error"]["message"])
                yield last_id, content
    raise EOFError("the stream was cut")


def main() -> None:
    """Prints the text as it comes."""
    address, prompt = sys.argv[1:]
    with httpx.Client(base_url=address, timeout=None) as client:
        for content in stream(client, "/v1/completions", {"prompt": prompt, "max_tokens": 500}):
            print(content["choices"][0]["text"], end="", flush=True)
    print()


if __name__ == "__main__":
    main()
