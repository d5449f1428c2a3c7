"""Fixtures of the command line's tests."""

from cli_support import cli

__all__ = ["cli"]
