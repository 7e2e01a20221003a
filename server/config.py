"""What a server is told when it starts: frozen, composed, read once. Dataclasses refuse keys they do not know."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from loraplex.adapters.sources.downloads import DownloadConfig

DEMO = "demo"
"""The base that comes with the project."""

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%|(0?\.\d+|1\.0+)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class ConfigError(ValueError):
    """A value that cannot be; the message is one line and names it."""


DTYPES = ("float32", "bfloat16", "float16")
"""What the base may be computed in."""


@dataclass(frozen=True)
class EngineConfig:
    """Everything that is chosen about the engine; checked on construction (ValueError names the field)."""

    device: str = "auto"  # "auto" | "cpu" | "cuda"
    dtype: str = "auto"  # "auto": the checkpoint's, but bfloat16 for float16 on the CPU; or a key of DTYPES
    backend: str = "auto"  # see load_backend
    batch_invariant: bool = False  # see load_backend
    max_model_len: int | None = None  # tokens of a sequence; None: the model's own limit, less where memory is short
    memory_bytes: int | None = None  # in all (see MemoryPlan); None: what could be used, up to half of what is free
    memory_fraction: float | None = None  # the same, as a share of what is free
    count_process: bool = False  # the memory given is also for this process without the engine (CPU)
    max_num_seqs: int = 32  # running at once
    token_budget: int | None = None  # tokens of a step; None: as many as take 100 ms (budget.py)
    decode_steps: int = 4  # that may follow one another before the scheduler is asked again (CPU)
    num_slots: int = 256  # adapters on the device at once
    host_store_bytes: int | None = None  # None: a little on the CPU, which has one memory; 2 GiB beside a GPU
    max_waiting: int = 1024  # requests queued beyond those running
    max_waiting_tokens: int = 1 << 19  # of their prompts together
    loader_threads: int = 2
    downloads: DownloadConfig = field(default_factory=DownloadConfig)

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; expected auto, cpu or cuda")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected auto, {', '.join(DTYPES)}")
        for name in (
            *("max_model_len", "memory_bytes", "max_num_seqs", "token_budget", "num_slots", "host_store_bytes"),
            *("max_waiting", "max_waiting_tokens", "loader_threads", "decode_steps"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if self.memory_fraction is not None and not 0.0 < self.memory_fraction <= 1.0:
            raise ValueError(f"memory_fraction is {self.memory_fraction}; expected more than 0 and at most 1")
        if self.memory_fraction is not None and self.memory_bytes is not None:
            raise ValueError("memory_bytes and memory_fraction are both given; expected one of them")


@dataclass(frozen=True)
class HttpConfig:
    """Where to listen and how long to go on."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    grace_seconds: float = 30.0  # that answers in flight get to end once the server is told to stop
    state_dir: Path | None = None  # where it is kept what was loaded over the API; None: nowhere
    keep_alive: float = 620.0  # seconds that an idle connection stays open
    sse_keep_alive: float = 15.0  # seconds of silence in a stream after which it says that it is alive; 0: never
    head_bytes: int = 64 << 10  # of a request's head
    header_count: int = 256  # fields of it
    max_connections: int | None = None  # at once; None: see door.max_connections


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for; more is refused with a 4xx that names the field."""

    max_body_bytes: int = 4 << 20  # a prompt of 131,072 tokens is 0.5 MB of English; escaped, six times that at most
    max_values: int = 262_144  # numbers, strings and so on; of keys, objects and lists a 16th
    max_prompts: int = 1024  # times the answers to each: sequences
    max_n: int = 128  # n, and best_of
    max_stops: int = 16  # strings
    max_logit_bias: int = 1024  # tokens
    max_tools: int = 128
    max_schema_bytes: int = 65_536  # of a schema, grammar or expression; a dense one takes ms per 1,000 to compile
    max_schema_depth: int = 64  # objects and lists in each other; two make a level of what the schema describes
    max_scores: int = 1 << 20  # log-probabilities of prompts' tokens, those of the likeliest ones included


@dataclass(frozen=True)
class TelemetryConfig:
    """What is told of requests, beside the log's lines."""

    max_series: int = 100  # adapters, and tenants, with metrics of their own
    otlp_endpoint: str | None = None  # a collector for traces; None: there are none


@dataclass(frozen=True)
class AuthConfig:
    """Who may ask."""

    keys_file: Path | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # each may do everything
    no_auth: bool = False  # whoever reaches the address may do everything
    open_metrics: bool = False  # /metrics needs no key
    cors_origins: tuple[str, ...] = ()  # of web pages that may ask; "*": all
    allowed_paths: tuple[Path, ...] = ()  # with a keys file: where requests may load adapters from

    @property
    def asks_for_keys(self) -> bool:
        return self.keys_file is not None or bool(self.api_keys)

    def check(self, address: str) -> None:
        """`address` is the one bound. Raises ConfigError for settings that contradict, and for a server open to all."""
        if self.keys_file is not None and self.api_keys:
            raise ConfigError(
                "--api-key (or its file, LORAPLEX_API_KEY, VLLM_API_KEY) and --api-keys: give one of them; a key that "
                "may do everything is an admin's"
            )
        if self.no_auth and self.asks_for_keys:
            raise ConfigError("--no-auth: there are keys; leave it or them out")
        if any(not key.strip() for key in self.api_keys):
            raise ConfigError("--api-key: it is empty")
        if self.asks_for_keys or self.no_auth or ip_address(address).is_loopback:
            return
        raise ConfigError(
            f"--host {address}: other machines could use this server without a key; give --api-keys FILE or "
            "--api-key-file FILE, or --no-auth where everybody may do everything"
        )


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter to load at the start; if it is a folder and cannot be loaded, the server does not start."""

    name: str
    source: str  # see adapters/sources/sources.py

    @classmethod
    def parse(cls, text: str) -> NamedAdapter:
        """Of "NAME=PATH". Raises ConfigError."""
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"--adapter {text!r}: expected NAME=PATH, as in pirate=adapters/pirate")
        return cls(name, source)

    @classmethod
    def parse_module(cls, text: str) -> NamedAdapter:
        """Of vLLM's --lora-modules: "NAME=PATH", or JSON with name and path. Raises ConfigError."""
        found: dict[str, object] = {}
        if text.lstrip().startswith("{"):
            try:
                found = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"--lora-modules {text!r}: not valid JSON: {error}") from None
        else:
            found["name"], _, found["path"] = text.partition("=")
        name, path = found.get("name"), found.get("path")
        if not (isinstance(name, str) and name and isinstance(path, str) and path):
            raise ConfigError(
                f'--lora-modules {text!r}: expected NAME=PATH or {{"name": NAME, "path": PATH}}, as in '
                "pirate=adapters/pirate"
            )
        return cls(name, path)


@dataclass(frozen=True)
class AdaptersConfig:
    """Which adapters there shall be."""

    named: tuple[NamedAdapter, ...] = ()
    directory: Path | None = None  # each folder in it that is an adapter; those that cannot be served are left out
    list_file: Path | None = None  # see adapter_list.py

    def check(self, taken: tuple[str, ...]) -> None:
        """Raises ConfigError where names collide, with each other or the base's, or the directory is none."""
        seen = set(taken)
        for adapter in self.named:
            if adapter.name in seen:
                owner = "the base's" if adapter.name in taken else "given twice"
                raise ConfigError(f"--adapter {adapter.name}={adapter.source}: the name is {owner}; choose another")
            seen.add(adapter.name)
        if self.directory is not None and not self.directory.is_dir():
            raise ConfigError(f"--adapter-dir {self.directory}: there is no such folder")
        if self.list_file is not None and not self.list_file.is_file():
            raise ConfigError(f"--adapters-file {self.list_file}: there is no such file")


@dataclass(frozen=True)
class ServeConfig:
    """Everything about one server."""

    base: str  # "demo", a folder, or a Hub id
    base_names: tuple[str, ...]  # what the field `model` calls it, at least one
    engine: EngineConfig
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    auth: AuthConfig = field(default_factory=AuthConfig)
    limits: RequestLimits = field(default_factory=RequestLimits)
    chat_template: Path | None = None  # a file instead of the base's own


def base_names(base: str, served: Iterable[str]) -> tuple[str, ...]:
    """What requests call the base: `served`, or else a folder by its last part and a Hub id by itself."""
    path = Path(base).expanduser()
    return tuple(served) or (path.resolve().name if path.is_dir() and base != DEMO else base,)


def parse_size(text: str) -> int:
    """Bytes of "512M", "4G", "1.5GiB", "1000000". Raises ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * 1024 ** _UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise ConfigError(f"{text!r} is no size: expected bytes, or a number with K, M, G or T, as in 4G")
    return size


def parse_memory(text: str) -> int | float:
    """Bytes (int) as parse_size, or the share (float, at most 1.0) of "0.5" or "50%". Raises ConfigError."""
    found = _SHARE.fullmatch(text.strip())
    if found is None:
        return parse_size(text)
    share = float(found[1]) / 100 if found[1] else float(found[2])
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"{text!r} is no share of the memory: expected more than 0% and at most 100%")
    return share
