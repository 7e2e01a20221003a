"""What was read against what was registered: it settles a version's digest, or gives its name a new one. No torch."""

from __future__ import annotations

import logging
from dataclasses import replace

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.registry import Registry
from loraplex.adapters.tiers.load_queue import LoadedContent
from loraplex.adapters.version import AdapterVersion

logger = logging.getLogger(__name__)


def settle(registry: Registry, version: AdapterVersion, found: LoadedContent) -> bool:
    """Return whether `found` is what `version` stands for; if that is open, it is from now on.

    Not where its rank, targets, pages or tokenizer differ from what was registered: the files were exchanged before
    anybody read them, and requests were admitted by the old numbers and written by the old tokenizer.
    """
    registered = version.info
    alike = replace(
        found.info,
        num_pages=registered.num_pages,
        nbytes=registered.nbytes,
        num_tiles=registered.num_tiles,
        digest=registered.digest,
    )
    unlike = alike != registered or found.info.num_pages > registered.num_pages
    if version.digest is None and unlike:
        return False
    return registry.identify(version, found.digest)


def renew(registry: Registry, version: AdapterVersion, found: LoadedContent) -> bool:
    """Point the version's name at what its source holds now. False when the name is not its own any more."""
    renewed = registry.renew(version, found.info)
    if renewed is not None:
        logger.info("adapter %r has new files: version %s from now on", version.name, found.digest[:12])
    return renewed is not None


def changed(version: AdapterVersion, found: LoadedContent) -> AdapterRefused:
    """Make the error for requests that wanted `version` and can have it no more."""
    expected = f"expected {version.digest[:12]}" if version.digest else "expected another rank or other targets"
    return AdapterRefused(
        "changed",
        f"the files of adapter {version.name!r} have changed since the request came in (found digest "
        f"{found.digest[:12]}, {expected}); send it again to be answered by the new ones",
    )
