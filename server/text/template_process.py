"""Adapters' chat templates, rendered in processes of their own, within bounds of time, memory and output.

A template is a program, and an adapter's comes from whoever made the adapter: `{% for i in range(99999) %}` four times
inside itself would hold an event loop for ever, and no thread can be stopped. A conversation takes 0.2 ms more so.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from loraplex.server.text.chat_template import ChatTemplateError

PROCESSES = 2
"""At most; the first is started by the first conversation, in 0.2 s."""

WALL_SECONDS = 5.0
"""For what the child cannot stop by itself (one long call inside Jinja), and on a machine that others keep busy."""

MAX_BANNED = 1024

_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "LANG", "TZ", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""Keys and tokens in the server's environment are not for it."""


class TemplateProcesses:
    """Render templates that are not to be trusted. Blocks; safe from any thread."""

    def __init__(self) -> None:
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        for _ in range(PROCESSES):
            self._idle.put(_Child())
        self._lock = threading.Lock()
        self._banned: OrderedDict[bytes, str] = OrderedDict()  # sha256 of a template that broke a limit -> which

    def render(self, source: str, special: Mapping[str, str], **asked: Any) -> str:
        """What ChatTemplate(source, special).render(**asked) gives. Raises ChatTemplateError.

        A template that has broken a limit once is refused from then on: it would go on costing as much.
        """
        key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            broken = self._banned.get(key)
        if broken is None:
            line = json.dumps({"source": source, "special": dict(special), **asked}).encode() + b"\n"
            child = self._idle.get()
            try:
                answer = child.ask(line)
            finally:
                self._idle.put(child)
            if "prompt" in answer:
                return answer["prompt"]
            if "refused" in answer:
                raise ChatTemplateError(answer["refused"])
            broken = answer["exhausted"]
            with self._lock:
                self._banned[key] = broken
                if len(self._banned) > MAX_BANNED:
                    self._banned.popitem(last=False)
        raise ChatTemplateError(f"the adapter's chat template is not rendered: {broken}; mend it and load it again")

    def close(self) -> None:
        """End the processes. Those that render now end by themselves."""
        while True:
            try:
                self._idle.get_nowait().stop()
            except queue.Empty:
                return


class AdapterTemplate:
    """One adapter's template."""

    def __init__(self, source: str, special: Mapping[str, str], processes: TemplateProcesses) -> None:
        self.source = source
        self._special = dict(special)
        self._processes = processes

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """See ChatTemplate.render. Blocks. Raises ChatTemplateError."""
        asked = {"messages": messages, "add_generation_prompt": add_generation_prompt, "extra": extra, "tools": tools}
        return self._processes.render(self.source, self._special, **asked)


class _Child:
    """One process, started when it is needed and again when it had to be killed. One thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes) -> dict[str, str]:
        """The answer to one line: see template_child."""
        process = self._started()
        try:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
            return dict(json.loads(self._read(process, time.monotonic() + WALL_SECONDS)))
        except TimeoutError:
            self.stop()
            return {"exhausted": f"it takes more than {WALL_SECONDS} s"}
        except (OSError, ValueError):
            self.stop()
            return {"exhausted": "its process died of it"}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "loraplex.server.text.template_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ},
            )
        return self._process

    def _read(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        """One line. Raises TimeoutError; OSError where there will be none."""
        assert process.stdout is not None
        waiting = select.poll()
        waiting.register(process.stdout, select.POLLIN)
        found = bytearray()
        while not found.endswith(b"\n"):
            if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), 1 << 20)
            if not piece:
                raise BrokenPipeError
            found += piece
        return bytes(found)
