"""Where holds outlive the daemon: slots, shelves, systemd's descriptor store."""
