"""Processes that the tests start, stop and kill, and what they hand over."""
