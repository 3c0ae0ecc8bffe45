"""What cprd asks of the kernel. Nothing here knows of holds, names or messages."""
