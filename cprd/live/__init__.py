"""A state that is kept at every change: its queues, who writes them, who reads them afterwards."""
