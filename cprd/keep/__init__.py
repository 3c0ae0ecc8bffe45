"""`cprd --keep`: a parent process that does for cprd what systemd's descriptor store does.

The parent starts cprd, keeps what cprd sends to $NOTIFY_SOCKET (sd_notify(3)), and passes the kept
descriptors to the next cprd as $LISTEN_FDS. The parent dies last, so the parent does little: no
thread, the standard library only, no read from a kept descriptor. The parent closes a descriptor
when cprd removes the entry. Closing the last reference to a foreign file can block for ever, so
cprd drains a shelf before cprd removes the shelf.
"""
