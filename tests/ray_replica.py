"""One replica on Ray: what a client and its log see of an answer, and of a client that hangs up.

``python tests/ray_replica.py ARTIFACT`` prints it as JSON; Ray does not leave the process it was in as it was.
"""

from __future__ import annotations

import http.client
import json
import re
import sys
from pathlib import Path

from intaglio.bench.evidence_ray import PATH, SECONDS, free_port, until
from intaglio.profiles.registry import need
from intaglio.runtimes.ray_batch import Pool, prepare
from intaglio.runtimes.ray_serve import app


def measure(artifact):
    """Ask once, hang up once."""
    prepare(Pool())
    ray, serve = need("ray", extra="ray"), need("ray.serve", extra="ray")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    logs, port = Path(ray._private.worker.global_worker.node.get_logs_dir_path()), free_port()

    def ask(method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        return connection

    def metrics():
        return ask("GET", "/metrics").getresponse().read().decode()

    def replica_log():
        return "".join(path.read_text(errors="replace") for path in sorted(logs.glob("worker-*.err")))

    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        given = {"artifact": f"emoji={artifact}", "backend": "openvino", "threads": 1, "no_key": True}
        serve.run(app({**given, "num_cpus": 1, "concurrency": 1, "queue": 2}))
        answer = ask("POST", PATH, {"prompt": "a secret heart", "size": "1x1"}).getresponse()
        said = json.loads(answer.read())
        ids = answer.headers.get_all("X-Request-ID")
        long = ask("POST", PATH, {"prompt": "a secret heart", "num_inference_steps": 150, "n": 3})
        until(lambda: 'intaglio_running{model="emoji"} 1' in metrics())
        long.close()
        until(lambda: 'intaglio_running{model="emoji"} 0' in metrics())
        until(lambda: re.search(r"POST /v1/images/generations 499", replica_log()) is not None)
        after = ask("POST", PATH, {"prompt": "a secret heart", "num_inference_steps": 1}).getresponse()
        after.read()
        found, asked = metrics(), r'^intaglio_http_requests_total\{[^}]*status="(\d+)"\} ([\d.]+)'
        return {
            "ids": ids,
            "said": said,
            "after": after.status,
            "statuses": re.findall(asked, found, re.MULTILINE),
            "waiting": re.findall(r"^intaglio_queue_depth\S* ([\d.]+)", found, re.MULTILINE),
            "log": [line for line in replica_log().splitlines() if PATH in line],
        }
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
