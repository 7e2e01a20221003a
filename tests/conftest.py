"""For all tests that run in the project's own environment."""

from __future__ import annotations

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the environments of tests/clients have no Hypothesis
    pass
else:
    # How long an example takes is the machine's affair.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")
