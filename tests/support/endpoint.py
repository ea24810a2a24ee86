"""An endpoint that speaks as much of OpenAI's protocol as a judge needs, as a process of its own:

    python -m tests.support.endpoint PORT_FILE

The model's name says how it behaves; see `Handler.do_POST`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CALLS: dict[str, int] = {}  # by model


class Handler(BaseHTTPRequestHandler):
    now = most = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model, message = asked["model"], asked["messages"][-1]["content"]
        with self.lock:
            count = CALLS[model] = CALLS.get(model, 0) + 1
            Handler.now += 1
            Handler.most = max(Handler.most, Handler.now)
        try:
            self._answer(model, message, count)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client did not wait
        finally:
            with self.lock:
                Handler.now -= 1

    def _answer(self, model: str, message: str, count: int) -> None:
        if model == "stars":  # rates by the stars in the message
            self._say(f"I count them. Rating: [[{min(10, 1 + message.count('*'))}]]")
        elif model == "echo":
            self._say(json.dumps(message) + " [[1]]")
        elif model == "crowd":
            time.sleep(0.2)
            self._say(f"[[{min(10, Handler.most)}]]")
        elif model == "flaky":  # every first request of two fails
            self._say("[[10]]") if count % 2 == 0 else self._send(503, b'{"error": "busy"}')
        elif model == "busy":
            self._send(429, b'{"error": {"message": "too many"}}')
        elif model == "slow":
            time.sleep(3)
            self._say("[[5]]")
        elif model == "trickle":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(50):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        elif model == "page":
            self._send(200, b"<html>It works!</html>", "text/html")
        elif model == "cut":
            self._send(200, b'{"choices": [{"mess')
        elif model == "empty":
            self._send(200, b'{"choices": []}')
        elif model == "null":
            self._send(200, b'{"choices": [{"message": {"role": "assistant", "content": null}}]}')
        elif model == "object":
            self._send(200, b'{"choices": [{"message": {"content": {"a": 1}}}]}')
        elif model == "nested":
            self._send(200, b"[" * 1_000_000)
        elif model == "moved":  # to an address that would rate it
            self.send_response(307)
            self.send_header("Location", self.path.replace("/v1", "/v1/there"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            self.close_connection = True
        elif model == "eleven":
            self._say("Rating: [[11]]")
        elif model == "locked":
            self._send(401, b'{"error": {"message": "no such key"}}')
        else:
            self._send(404, b'{"error": {"message": "no such model"}}')

    def _say(self, text: str) -> None:
        choice = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        self._send(200, json.dumps(reply | {"choices": [choice]}).encode())

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port = Path(sys.argv[1])
    port.with_suffix(".new").write_text(str(server.server_address[1]))
    port.with_suffix(".new").rename(port)
    server.serve_forever()
