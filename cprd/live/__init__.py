"""Live holds: a state kept at every change, in queues of the owner, read after the owner's end."""
