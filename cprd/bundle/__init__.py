"""Bundles: a whole state in one descriptor, packed, unpacked, and seen from outside."""
