"""What tests of inference share."""

import pytest

from gluprune_jax.inference import generation


@pytest.fixture(params=["host", "device"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test decodes as one CPU does, and as accelerators do."""
    monkeypatch.setattr(generation, "runs_by_layers", lambda: request.param == "host")
    return str(request.param)
