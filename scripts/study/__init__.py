"""Investigations that were run once; each says at its top what was asked and how to run it again."""

from scripts import _paths  # noqa: F401
