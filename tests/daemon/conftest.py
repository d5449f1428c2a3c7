"""Fixtures of the daemon's tests."""

from daemon_support import setup

__all__ = ["setup"]
