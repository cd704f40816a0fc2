"""A server process for lifecycle tests: all of `run_server`, with a tiny HTTP server in place of Ray and vLLM.

It behaves as its profile's name says: `ready`, `crash` (while starting), `stubborn` (never stops by itself),
`slow` (never ready), `gradual-N` (ready after N s, in which it says what it does); and redeployed, `refused…`, `fatal`.
Like the real one it has a child process, which ignores SIGTERM, in its temporary folder.
"""

import http.server
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from serving.deploy.daemon import ServerOptions, run_server

CHILD = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"/dev/shm/sem.test-{os.getpid()}-x", "w").close()
open(sys.argv[1], "w").close()
signal.pause()
"""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"running": {}}' if self.path == "/readyz" else b'{"memories": [], "next_cursor": null}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Running:
    def __init__(self, options: ServerOptions, temporary: Path) -> None:
        marker = temporary / "child-is-up"
        # Found again by its environment alone: TMPDIR lies in the temporary folder.
        self.child = subprocess.Popen([sys.executable, "-c", CHILD, "child-is-up"], cwd=temporary)
        while not marker.exists():
            threading.Event().wait(0.01)
        print(f"child {self.child.pid}", flush=True)
        self.stubborn = options.profile == "stubborn"
        if options.profile == "crash":
            raise RuntimeError("the engine would not start")
        if options.profile == "slow":
            threading.Event().wait()
        if options.profile.startswith("gradual-"):
            for step in range(int(options.profile.removeprefix("gradual-"))):
                print(f"step {step}", flush=True)
                threading.Event().wait(1)
        self.server = http.server.ThreadingHTTPServer((options.host, options.port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://{options.host}:{self.server.server_port}"

    def redeploy(self, options: ServerOptions) -> None:
        if options.profile.startswith("refused"):
            raise ValueError(f"{options.profile} is no profile")
        if options.profile == "fatal":
            os.kill(os.getpid(), signal.SIGKILL)
        if options.profile == "slow":
            threading.Event().wait()
        print(f"redeployed {options.profile}", flush=True)

    def stop(self) -> None:
        if self.stubborn:
            threading.Event().wait()
        self.server.shutdown()
        self.child.kill()
        self.child.wait()
        print("stopped in order", flush=True)


if __name__ == "__main__":
    profile, storage, host, port = sys.argv[1:]
    os.environ["MEMORAG_STAND_IN"] = "1"
    run_server(ServerOptions(profile, storage, host, int(port)), deploy=Running, starter=0)
