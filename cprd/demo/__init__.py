"""The demonstration behind `cprctl demo`: a real server, restarted under load again and again.

server.py    the service; all that a restart takes is in `Tally`, `Service` and `_live`
load.py      the clients, which keep the service busy and check every answer
stage.py     starts a private cprd, the service and the clients, and restarts the service
timeline.py  the numbers, no I/O
picture.py   the timeline in the terminal and as SVG
"""
