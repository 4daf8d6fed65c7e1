"""A stand-in for the teacher: a local OpenAI-compatible endpoint, for studies with program-checked labels.

It sorts every instruction into one category, gives every response the same grades, and answers no instruction. So
verification and perplexity alone decide which response is best.
"""

import contextlib
import http.server
import json
import re
import threading
from collections.abc import Iterator


def reply_to(messages: list[dict]) -> tuple[str, str]:
    """-> (reply, finish_reason) to a request of make_data.py."""
    system, last = messages[0]["content"], messages[-1]["content"]
    if system.startswith("Task: classify"):
        return json.dumps({"primary": "writing", "secondary": "story"}), "stop"
    if system.startswith("Task: judge"):
        letters = re.findall(r"\b[A-Z]\b", last.rsplit("Grades of ", 1)[1].partition(" as one")[0])
        return json.dumps({letter: {"quality": 3, "safety": 5} for letter in letters}), "stop"
    return ("Hello.", "stop") if last == "Hello." else ("", "length")


class StandInHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, finish = reply_to(request["messages"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        body = json.dumps({"model": "stand-in", "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@contextlib.contextmanager
def stand_in() -> Iterator[str]:
    """A context in which the endpoint runs. -> its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandInHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
