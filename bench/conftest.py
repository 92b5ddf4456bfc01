"""Fixtures for the tests of this folder: two of test_electra.py's, and short waits."""

import time

import pytest

import data
from test_electra import corpus, toy_glue

__all__ = ["corpus", "quick", "toy_glue"]


@pytest.fixture
def quick(monkeypatch):
    """Short waits."""
    sleep = time.sleep
    monkeypatch.setattr(data, "BACKOFF", 0.001)
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: sleep(min(seconds, 0.05)))
