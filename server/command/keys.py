"""Who may ask, as a configuration says it: keys files are opened here."""

from __future__ import annotations

from dataclasses import replace

from loraplex.server.config_access import AuthConfig
from loraplex.server.startup import StartError
from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.keys_file import KeysError, KeysFile, read_owners_keys
from loraplex.server.tenancy.tenants import owners_keyring


def with_file_keys(auth: AuthConfig) -> AuthConfig:
    """Add the keys in `auth.api_key_file`. Raises StartError."""
    if auth.api_key_file is None:
        return auth
    try:
        return replace(auth, api_keys=(*auth.api_keys, *read_owners_keys(auth.api_key_file)))
    except KeysError as error:
        raise StartError(error) from error


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
