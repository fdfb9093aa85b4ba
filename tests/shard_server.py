"""A web server over a folder that can be told to misbehave, file by file."""

import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Server:
    """faults: file name -> what its next requests meet, one after another: a status such as 503, ("cut", bytes sent
    before the line goes dead), ("flip", byte), ("long", bytes too many), "no ranges". ``always``: after those.
    """

    folder: Path
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(file name, Range header) of each request, in order of arrival."""
    faults: dict[str, list[object]] = field(default_factory=lambda: defaultdict(list))
    always: dict[str, object] = field(default_factory=dict)

    def times(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.requests)


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    state = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0].rpartition("/")[2]
            ranged = self.headers.get("Range", "")
            state.requests.append((name, ranged))
            fault = state.faults[name].pop(0) if state.faults[name] else state.always.get(name)
            if isinstance(fault, int):
                self.send_error(fault)
                return
            try:
                data = (state.folder / name).read_bytes()
            except OSError:
                self.send_error(404)
                return
            if isinstance(fault, tuple) and fault[0] == "flip":
                data = data[: fault[1]] + bytes([data[fault[1]] ^ 1]) + data[fault[1] + 1 :]
            if isinstance(fault, tuple) and fault[0] == "long":
                data += bytes(fault[1])
            # as RFC 9110 asks: a range that begins at the end of the file, or behind it, cannot be answered
            first = int(re.findall(r"bytes=(\d+)-", ranged)[0]) if ranged and fault != "no ranges" else 0
            if first >= len(data) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            end = first + fault[1] if isinstance(fault, tuple) and fault[0] == "cut" else len(data)
            self.wfile.write(data[first:end])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/shards"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
