"""python -m tests.support.walk SOCKET CLIENT ACT TAG EVENTFDS CONNECTIONS

Walks through one act of the protocol, from one pause point to the next, with the blocking client or
with trio's. The descriptors are inherited; the numbers say which."""

from __future__ import annotations

import sys

import cprd
from tests.support.goods import state_of

NAME = "web"


def blocking(path: str, act: str, state: cprd.State) -> None:
    with cprd.connect(path) as daemon:
        if act == "save":
            daemon.save(NAME, state, if_exists="replace")
        elif act == "prepare-commit":
            daemon.prepare(NAME, state, if_exists="replace").commit()
        else:
            claim = daemon.load(NAME, lease=600.0)
            if act == "begin-confirm":
                claim.begin()
            if act == "reject":
                claim.reject("not today")
            elif act == "confirm-next":
                claim.confirm(next=state)
            else:
                claim.confirm()
            claim.close()


async def on_trio(path: str, act: str, state: cprd.State) -> None:
    import cprd.trio

    async with cprd.trio.connect(path) as daemon:
        if act == "save":
            await daemon.save(NAME, state, if_exists="replace")
        elif act == "prepare-commit":
            await (await daemon.prepare(NAME, state, if_exists="replace")).commit()
        else:
            claim = await daemon.load(NAME, lease=600.0)
            if act == "begin-confirm":
                await claim.begin()
            if act == "reject":
                await claim.reject("not today")
            elif act == "confirm-next":
                await claim.confirm(next=state)
            else:
                await claim.confirm()
            await claim.close()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    path, client, act, tag, eventfds, connections = sys.argv[1:]
    state = state_of(tag, numbers(eventfds), numbers(connections))
    if client == "blocking":
        blocking(path, act, state)
    else:
        import trio

        trio.run(on_trio, path, act, state)


if __name__ == "__main__":
    main()
