"""The service manager's protocols: notifications, the descriptor store."""
