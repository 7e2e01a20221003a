"""Runs the clients' tests, each in its own environment, against servers that this starts:

    .venv/bin/python -m tests.clients.run ENVIRONMENTS [CLIENT ...]

ENVIRONMENTS has a virtual environment a client. `make test-clients` makes them and calls this.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex.server.tenancy.keys_file import new_key
from tests.clients.reference import write_tiny_world
from tests.support.command import LORAPLEX, address
from tests.support.fake_hub import fake_hub

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

START_SECONDS = 120.0
"""The first start of the demo converts its weights."""

CLIENT_SECONDS = 400.0
"""For the tests of one client; they take 10 to 60 where nothing else runs."""

WORLDS = {
    "lorax-client": "demo",
    "langchain-openai": "demo",
    "litellm": "demo",
    "ai-sdk": "demo",
    "lm-eval": "tiny",
    "schemathesis": "tiny",
    "trl": "tiny",
}
"""Client -> which server its tests need: the demo base and the example adapters, or a tiny random model."""


OFFLINE = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}
"""Nothing is fetched while tests run: no data sets, no prices."""


@dataclass(frozen=True)
class World:
    """A server that runs, and what its tests are told."""

    process: subprocess.Popen[str]
    log: Path
    environ: Mapping[str, str]


def main(environments: Path, clients: list[str]) -> int:
    """Returns the exit status: 0 when the tests of all clients have passed."""
    failed = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-clients-")))
        for kind in dict.fromkeys(WORLDS[client] for client in clients):
            with (demo_world if kind == "demo" else tiny_world)(folder / kind) as world:
                here = [client for client in clients if WORLDS[client] == kind]
                failed += [client for client in here if not run(client, environments / client, world)]
    print(f"{len(clients) - len(failed)} of {len(clients)} clients passed" + (f"; not {failed}" if failed else ""))
    return 1 if failed else 0


def run(client: str, environment: Path, world: World) -> bool:
    """The tests of one client. Also fails where there are none, or the server has not survived them."""
    print(f"\n{client}", flush=True)
    command = [environment / "bin" / "python", "-m", "pytest", "-c", HERE / "pytest.ini", "--rootdir", ROOT, "-q"]
    environ = {**os.environ, **world.environ, **OFFLINE, "PYTHONDONTWRITEBYTECODE": "1"}
    tests = subprocess.Popen([*command, HERE / client], cwd=ROOT, env=environ, start_new_session=True)
    try:
        status = tests.wait(CLIENT_SECONDS)
    except BaseException as error:  # nothing that the tests have started goes on alone
        os.killpg(tests.pid, signal.SIGKILL)
        tests.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        print(f"{client}: not done after {CLIENT_SECONDS:.0f} s", flush=True)
        return False
    if world.process.poll() is not None:
        print(f"{client}: the server has ended with {world.process.returncode}:\n{world.log.read_text()[-4000:]}")
        return False
    return status == 0


@contextmanager
def demo_world(folder: Path) -> Iterator[World]:
    """What `make serve` serves, with keys."""
    folder.mkdir()
    key, entry = new_key("all", "operator", admin=True, metrics=True)
    slow_key, slow_entry = new_key("slow", "slow", adapters=["*"], requests_per_minute=1)
    keys = folder / "keys.yaml"
    keys.write_text(f"keys:\n{entry}{slow_entry}", encoding="utf-8")
    # Clients ask in one piece, as streams and in batches, and compare: the same request has to have the same answer.
    arguments = ["demo", "--adapter-dir", str(ROOT / "examples" / "adapters"), "--batch-invariant"]
    with serving(folder, *arguments, "--api-keys", str(keys)) as (process, log, url):
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        with urllib.request.urlopen(request, timeout=30) as response:
            names = {card["id"] for card in json.load(response)["data"]}
        assert names == {"demo", "extract", "pirate", "sentiment", "sentiment-dora", "sentiment-prompt", "sql"}, names
        yield World(process, log, {"LORAPLEX_URL": url, "LORAPLEX_KEY": key, "LORAPLEX_SLOW_KEY": slow_key})


@contextmanager
def tiny_world(folder: Path) -> Iterator[World]:
    """A random model whose log-probabilities transformers tells. What is asked of the Hub, a local one answers."""
    folder.mkdir()
    base, adapters, reference = write_tiny_world(folder)
    arguments = [str(base), "--served-model-name", "tiny", "--adapter-dir", str(adapters), "--dtype", "float32"]
    arguments += ["--max-model-len", "128", "--max-n", "4"]  # bodies are drawn: none shall keep it busy for long
    with fake_hub() as hub, serving(folder, *arguments, hub=hub.endpoint) as (process, log, url):
        yield World(process, log, {"LORAPLEX_URL": url, "LORAPLEX_REFERENCE": str(reference)})


@contextmanager
def serving(folder: Path, *arguments: str, hub: str = "") -> Iterator[tuple[subprocess.Popen[str], Path, str]]:
    """`loraplex serve`, ready: (process, its log, URL). Its output goes to a file: nobody reads a pipe meanwhile."""
    log, out = folder / "log", folder / "out"
    with log.open("w") as errors, out.open("w") as output:
        process = subprocess.Popen(
            [*LORAPLEX, "serve", *arguments, "--port", "0", "--memory", "2G", "--device", "cpu"],
            cwd=ROOT,
            stdout=output,
            stderr=errors,
            text=True,
            env={**os.environ, "HF_ENDPOINT": hub or "http://127.0.0.1:9", "LORAPLEX_CACHE": cache(folder, hub)},
        )
    try:
        yield process, log, wait_ready(process, out, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cache(folder: Path, hub: str) -> str:
    """Where downloads are kept: a place of its own for a Hub of its own. The demo's conversion is used again."""
    return str(folder / "cache") if hub else os.environ.get("LORAPLEX_CACHE", "")


def wait_ready(process: subprocess.Popen[str], out: Path, log: Path) -> str:
    """The URL, once /ready answers there. Raises SystemExit."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        lines = out.read_text().splitlines()
        if any(line.startswith("loraplex ") for line in lines):
            url = address(lines)
            try:
                with urllib.request.urlopen(f"{url}/ready", timeout=5):
                    return url
            except urllib.error.URLError:
                pass
        time.sleep(0.2)
    raise SystemExit(f"the server did not start:\n{out.read_text()}{log.read_text()[-4000:]}")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2:] or list(WORLDS)))
