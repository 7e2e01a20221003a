"""Exit 0 if the server answers that it is well, else 1 with the reason: the image's health check."""

from __future__ import annotations

import os
import sys
import urllib.request

URL = os.environ.get("LORAPLEX_HEALTH_URL", "http://127.0.0.1:8000/health")

try:
    # No proxy from the environment: the server is right here.
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(URL, timeout=3).close()
except OSError as error:  # refused, timed out, or a status that is not 200: all are OSErrors
    sys.exit(f"{URL}: {error}")
