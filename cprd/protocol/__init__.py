"""The messages and the life cycle of holds. No I/O, no clock."""
