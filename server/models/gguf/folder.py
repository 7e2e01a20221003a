"""A folder for a GGUF file that is laid out as any base's is: its config and tokenizer written out, its weights a link.

    gguf/NAME-DIGEST/config.json, generation_config.json     what the metadata says
    gguf/NAME-DIGEST/tokenizer.json, ...                     of the file, or those that lie beside it
    gguf/NAME-DIGEST/model.gguf                              a link to the file, which is read in place

DIGEST is of the header, of where the file is and of what lies beside it: other content has another folder, and nothing
is written twice. Free of torch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from loraplex.server.models.gguf.config import write_config
from loraplex.server.models.gguf.header import GgufError, GgufHeader, read_header
from loraplex.server.models.gguf.tokenizer import check_vocabulary, write_tokenizer

WEIGHTS = "model.gguf"

LAYOUT = 1
"""Raised whenever the files would come out differently: older folders are then left alone."""

BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    "generation_config.json",
)
"""What lies beside the GGUF goes before what is in it; the first brings the others with it."""


def folder_for(file: Path, cache: Path) -> Path:
    """Return the folder of the base in the GGUF `file`, made below `cache` on the first call.

    Raises GgufError where the file holds no base that can be served, or the folder cannot be made.
    """
    file = file.absolute()
    header = read_header(file, vocabulary=False)
    beside = [file.with_name(name) for name in BESIDE if file.with_name(name).is_file()]
    if BESIDE[0] not in [path.name for path in beside]:
        beside = [path for path in beside if path.name == "chat_template.jinja"]
    target = cache / "gguf" / f"{file.stem}-{_digest(header, beside)}"
    if not target.is_dir():
        try:
            _make(read_header(file), beside, target)
        except OSError as error:
            raise GgufError(
                f"cannot write to {target.parent} ({error.strerror or error}); LORAPLEX_CACHE can name another folder"
            ) from error
    return target


def _digest(header: GgufHeader, beside: list[Path]) -> str:
    """Hash all that the folder is made of."""
    made_of = hashlib.sha256()
    made_of.update(json.dumps([LAYOUT, str(header.file)]).encode())
    with header.file.open("rb") as file:
        made_of.update(file.read(header.length))
    for path in beside:
        made_of.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return made_of.hexdigest()[:16]


def _make(header: GgufHeader, beside: list[Path], target: Path) -> None:
    """Write the folder under a name of its own and put it in place: whoever sees it sees all of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_config(header, partial)
        own = [path for path in beside if path.name == BESIDE[0]]
        if own:
            check_vocabulary(header, own[0])
        else:
            write_tokenizer(header, partial)
        for path in beside:
            shutil.copyfile(path, partial / path.name)
        (partial / WEIGHTS).symlink_to(header.file)
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # another process was first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
