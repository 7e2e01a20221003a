"""The program that renders adapters' chat templates, in a process of its own: see template_process.py.

Each line of its input is a conversation with its template, as JSON; each line of its output the prompt, or why not.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections import OrderedDict
from contextlib import suppress
from typing import Any

from loraplex.server.text.chat_template import ChatTemplate, ChatTemplateError

CPU_SECONDS = 0.5
"""Of one conversation. Templates of known models take 1 to 5 ms, and 20 to compile."""

MEMORY_BYTES = 256 << 20
"""Of addresses. The interpreter with Jinja takes 50 MB of them."""

MAX_PROMPT = 16 << 20
"""Characters."""

KEPT = 64
"""Compiled templates."""


class _Exhausted(BaseException):
    """The time is over. No Exception: a template's failures are caught."""


def main() -> None:
    """Answer until the input ends, which it does with the server."""
    _confine()
    templates: OrderedDict[str, ChatTemplate] = OrderedDict()
    for line in sys.stdin.buffer:
        answer = json.dumps(_answer(templates, json.loads(line)))
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _confine() -> None:
    """Give up what a template needs not: much memory, files, further processes, the foreground."""
    os.nice(5)
    limits = (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_CORE, 0),
    )
    for kind, bound in limits:
        with suppress(OSError, ValueError):  # not every system has every limit
            resource.setrlimit(kind, (bound, bound))

    def give_up(signum: int, frame: object) -> None:
        raise _Exhausted

    signal.signal(signal.SIGPROF, give_up)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; the server says when it is over


def _answer(templates: OrderedDict[str, ChatTemplate], asked: dict[str, Any]) -> dict[str, str]:
    """{"prompt": ...}, {"refused": why} by the template, or {"exhausted": what} of its limits."""
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        prompt = _template(templates, asked.pop("source"), asked.pop("special")).render(**asked)
        if len(prompt) > MAX_PROMPT:
            return {"exhausted": f"it makes more than {MAX_PROMPT} characters"}
        return {"prompt": prompt}
    except ChatTemplateError as error:
        if isinstance(error.__cause__, MemoryError):
            return {"exhausted": f"it takes more than {MEMORY_BYTES >> 20} MB"}
        return {"refused": str(error)[:1000]}
    except MemoryError:
        return {"exhausted": f"it takes more than {MEMORY_BYTES >> 20} MB"}
    except _Exhausted:
        return {"exhausted": f"it takes more than {CPU_SECONDS} s"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _template(templates: OrderedDict[str, ChatTemplate], source: str, special: dict[str, str]) -> ChatTemplate:
    """Raises ChatTemplateError."""
    key = json.dumps([source, special])
    found = templates.pop(key, None) or ChatTemplate(source, special)
    templates[key] = found
    if len(templates) > KEPT:
        templates.popitem(last=False)
    return found


if __name__ == "__main__":
    main()
