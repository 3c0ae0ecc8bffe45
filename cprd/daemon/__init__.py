"""The daemon: connections, requests, steps of the life cycle."""
