"""For all tests that run in the project's own environment."""

from __future__ import annotations

import os

# Before torch is imported, here and in the processes that tests start. Processes that run side by side share the cores,
# and threads that have nothing to do sleep: where there are more of them than cores, those that spin keep others waiting.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
