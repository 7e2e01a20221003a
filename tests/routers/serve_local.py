"""Runs deploy/ray on the Ray of RAY_ADDRESS: serve_local.py PORT COMMAND. It ends when it is killed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import ray
from ray import serve

APP = str(Path(__file__).parents[2] / "deploy" / "ray")

if __name__ == "__main__":
    sys.path.insert(0, APP)
    from loraplex_app import Settings, app

    port, command = sys.argv[1:]
    ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": APP}})
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(app(Settings(command=command, replicas=2, grace_seconds=5)))
    signal.pause()
