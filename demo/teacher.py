"""The demo's teacher: a local OpenAI-compatible HTTP server that knows the answers of the demo's world.

It replaces the large model in make_data.py. It classifies instructions, responds to them (95 % of the
responses are right) and grades responses (5 % of the grades are off). Equal requests get equal replies. It is not
used in evaluation.

    python -m demo.teacher --port 8000            # then: make_data.py --teacher http://127.0.0.1:8000/v1 ...
"""

import core.interrupt  # noqa: F401  isort: skip (first: Ctrl-C while torch loads ends silently)
import json
import os
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from core.files import InputError, atomic_write, cli
from core.flags import Parser, file_out
from demo import world
from verification.answers import check_reply

MODEL = "demo-teacher"
ERRORS = 0.05  # share of wrong responses and of grades that are off
REFUSAL = "I am sorry, but I cannot help with that."
UNSAFE = re.compile(r"stupid|idiot|bomb|poison|steal|stolen|hack|knife|alarm|hurt|insult|pick the lock", re.IGNORECASE)
FENCED = re.compile(r"^\[([0-9a-f]{8}) (\w+)\]\n(.*?)\n\[\1 end\]$", re.DOTALL | re.MULTILINE)

# ---------------------------------------------------------------------------------------------------------------------
# Replies


def parse_loosely(text: str) -> world.Item | None:
    """Parses an instruction, ignoring extra spaces and exclamation marks. None if the world has no such task."""
    return world.parse_prompt(re.sub(r" +", " ", text).strip().rstrip("!"))


def respond_to(text: str) -> str:
    """The response to one user message. It depends on the text alone, as in greedy decoding."""
    item = parse_loosely(text)
    if item is None:
        return REFUSAL if UNSAFE.search(text) else "I am not sure what you mean. Could you say it in another way?"
    if world.hash_share("teacher", text) < ERRORS:
        return world.wrong(item, random.Random(text))
    return world.right(item)


def category_of(text: str) -> dict[str, str]:
    """The category of an instruction -> {"primary", "secondary"}."""
    item = parse_loosely(text)
    if item is None:
        unsafe = UNSAFE.search(text)
        return {"primary": "safety" if unsafe else "other", "secondary": "unsafe request" if unsafe else "unclear"}
    return {"primary": item.task.category, "secondary": item.task.name.replace("_", " ")}


def grade(text: str, reply: str) -> dict[str, int]:
    """The grades of a response -> {"quality", "safety"}, each from 1 to 5."""
    item, safety = parse_loosely(text), 1 if UNSAFE.search(reply) else 5
    if item is None:
        return {"quality": 4 if reply == REFUSAL else 2 if safety == 5 else 1, "safety": safety}
    if reply.strip() == world.right(item):
        quality = 5
    elif item.task.kind != "code" and check_reply(item.task.kind, reply, world.reference(item)["value"]):
        quality = 4  # right, but wordy
    else:
        quality = 2 if world.right(item).casefold() in reply.casefold() else 1
    if world.hash_share("grade", text, reply) < ERRORS:
        quality = 3
    return {"quality": quality, "safety": safety}


def answer(messages: list[dict]) -> str:
    """A conversation -> the text of the reply. A system prompt of make_data.py begins with the task to do."""
    first = messages[0]
    if first["role"] != "system" or not first["content"].startswith("Task: "):
        return respond_to(next(m["content"] for m in reversed(messages) if m["role"] == "user"))
    fields = {name: body for _, name, body in FENCED.findall(messages[1]["content"])}
    instruction = fields.pop("instruction")
    if first["content"].startswith("Task: classify"):
        return json.dumps(category_of(instruction))
    return json.dumps({letter: grade(instruction, reply) for letter, reply in fields.items()})


# ---------------------------------------------------------------------------------------------------------------------
# The server


class TeacherHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open for thousands of small requests
    wbufsize = -1  # sends headers and body together
    disable_nagle_algorithm = True

    def reply(self, status: int, body: dict) -> None:
        data = json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path.rstrip("/") == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "demo"}]})
        else:
            self.reply(404, {"error": {"message": f"no such path: {self.path}", "type": "invalid_request_error"}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self.reply(
                404, {"error": {"message": f"no such path: {self.path}", "type": "invalid_request_error"}}
            )
        try:
            messages = json.loads(body)["messages"]
            text, asked = answer(messages), sum(len(m["content"]) for m in messages)
        except (ValueError, KeyError, TypeError, IndexError, StopIteration) as e:
            message = f"this teacher cannot read the chat completion request: {type(e).__name__} {e}"
            return self.reply(400, {"error": {"message": message, "type": "invalid_request_error"}})
        completion = {
            "id": f"chatcmpl-{world.hash_share(body) * 2**48:.0f}",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": asked, "completion_tokens": len(text), "total_tokens": asked + len(text)},
        }
        self.reply(200, completion)

    def log_message(self, *args: object) -> None:
        pass  # prints nothing for a request


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def bind_server(port: int = 0) -> tuple[Server, str]:
    """Binds a server to 127.0.0.1 -> (server, base URL). Port 0 takes a free one. The caller runs serve_forever()."""
    try:
        server = Server(("127.0.0.1", port), TeacherHandler)
    except OSError as e:
        raise InputError(f"port {port}: {e.strerror}; give another --port, or none for a free one") from None
    return server, f"http://127.0.0.1:{server.server_port}/v1"


def end_with_parent(server: Server, parent: int) -> None:
    """Shuts the server down when the parent process has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    server.shutdown()


def main() -> None:
    p = Parser(description=__doc__)
    p.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1; 0: any free port")
    p.add_argument("--with-parent", action="store_true", help="exit when the parent process ends")
    url_file = "file to write the base URL to when the server is ready"
    p.add_argument("--url-file", type=file_out("http://"), help=url_file)
    args = p.parse_args()
    server, url = bind_server(args.port)
    if args.url_file:
        with atomic_write(args.url_file) as f:
            f.write(url + "\n")
    print(f"teacher at {url}", flush=True)
    if args.with_parent:
        threading.Thread(target=end_with_parent, args=[server, os.getppid()], daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    cli(main)
