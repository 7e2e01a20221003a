"""For all tests that run in the project's own environment."""

from __future__ import annotations

import os

# Before torch is imported, here and in the processes that tests start: processes that run side by side share the cores,
# and threads that wait sleep, as a server's do. Spinning, beside other work, they took a test from 0.3 s to 14.
os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the environments of tests/clients have no Hypothesis
    pass
else:
    # How long an example takes is the machine's affair.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")
