"""Who may ask, as a configuration says it: keys files are opened here."""

from __future__ import annotations

from loraplex.server.config import AuthConfig
from loraplex.server.startup import StartError
from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.keys_file import KeysError, KeysFile
from loraplex.server.tenancy.tenants import owners_keyring


def open_access(auth: AuthConfig) -> Access | None:
    """Open the keys; None where none are asked for. Raises StartError."""
    if auth.keys_file is not None:
        try:
            return Access(KeysFile(auth.keys_file), open_metrics=auth.open_metrics)
        except KeysError as error:
            raise StartError(error) from error
    if auth.api_keys:
        return Access(owners_keyring(auth.api_keys), open_metrics=True)  # as vLLM has it: nobody's but the owner's
    return None
