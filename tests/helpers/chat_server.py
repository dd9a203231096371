"""A chat model on loopback that behaves as a test says."""

import collections
import http.server
import json
import re
import threading
import time


class ChatServer:
    """Prefers an answer with "good" in it, which is worth 8 of 10 to it, others 2; edits by a "not" in front.

    `plan(question, times asked before)` says how a request is treated; "ok" is well.
    """

    def __init__(self, plan=lambda question, before: "ok"):
        self.plan, self.requests, self.headers, self.lock = plan, [], [], threading.Lock()
        self.asked = collections.Counter()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.answer(self, body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, handler, body):
        text = body["messages"][0]["content"][-1]["text"]
        question = re.search(r"Question: (.*)", text)[1]
        with self.lock:
            before = self.asked[text]
            self.asked[text] += 1
            self.requests.append((handler.path, body))
            self.headers.append(dict(handler.headers))
        action = self.plan(question, before)
        if action == "close":
            handler.close_connection = True
            handler.connection.close()
            return
        if action == "slow":
            time.sleep(4.0)
        status = int(action) if action.isdecimal() else 200
        said = {"mute": "I cannot decide.", "always A": "[[B]], no, [[A]]"}.get(action) or self.say(text)
        content = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        if action == "no JSON":
            content = b"<html>busy</html>"
        if action == "odd JSON":
            content = b'{"choices": []}'
        if action == "endless":
            content = b" " * (2 << 20)
        handler.send_response(status)
        if status == 429:
            handler.send_header("Retry-After", "7")
        handler.send_header("Content-Length", str(len(content) + (50 if action == "cut" else 0)))
        handler.end_headers()
        if action == "drip":
            for byte in content:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(0.2)
            return
        handler.wfile.write(content)
        if action == "cut":
            handler.close_connection = True

    @staticmethod
    def say(text):
        if second := re.search(r"Answer B: (.*)", text):
            return f"It is better. [[{'B' if 'good' in second[1] else 'A'}]]"
        answer = re.search(r"Answer: (.*)", text)[1]
        return f"<answer>\nnot {answer}</answer>" if "<answer>" in text else f"[[{8 if 'good' in answer else 2}]]"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
