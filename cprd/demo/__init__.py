"""The demonstration behind `cprctl demo`: a real server, restarted under load again and again.

server.py    the service; what it takes to survive a restart is in `main` and `Tally`
load.py      its clients, which keep it busy and check every answer
stage.py     starts a private cprd, the service and the clients, and restarts the service
timeline.py  what happened as numbers, no I/O
picture.py   the timeline in the terminal and as SVG
"""
