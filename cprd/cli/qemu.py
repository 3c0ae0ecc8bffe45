"""cprctl qemu: hand a running guest from one QEMU to the next."""

from __future__ import annotations

from cprd.linux.stdio import note, say

TYPE_CHECKING = False  # as typing's, which takes 4 ms to import
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from cprd.qemu.monitor import Monitor

# No argparse, and nothing that imports argparse, on the way to a start: see quick.py.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cprd.cli.arguments import add_name

    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)

    check = actions.add_parser("check", help="can this VM be handed over, and if not, why")
    check.add_argument("--qmp", required=True, metavar="PATH", help="a monitor of the QEMU")
    check.add_argument("--owner", metavar="USER", help="as root: whose QEMU that is (or a uid)")

    save = actions.add_parser(
        "save",
        help="running QEMU -> hold; the QEMU quits",
        epilog="Exit status 4, and not 1 as of cprctl save, when something else is held under NAME:"
        " load it, drop it, or --replace it.",
    )
    add_name(save)
    save.add_argument("--qmp", required=True, metavar="PATH", help="a monitor of the QEMU")
    save.add_argument("--replace", action="store_true", help="end what is held under NAME")
    save.add_argument("--timeout", type=float, default=30.0, metavar="S", help="for each step")

    start = actions.add_parser(
        "start",
        help="hold -> new QEMU, or a cold boot; becomes that QEMU",
        usage="cprctl qemu start NAME [--owner USER] [--cold | --force] [--other-images]"
        " [--force-machine] [--set-time PATH] [--timeout S] -- QEMU COMMAND",
    )
    add_name(start)
    how = start.add_mutually_exclusive_group()
    how.add_argument("--cold", action="store_true", help="boot anew, whatever is held or unknown")
    how.add_argument(
        "--force", action="store_true", help="take a state in doubt: nothing may run from it"
    )
    _add_overrides(start)
    start.add_argument(
        "--set-time",
        default="",
        metavar="PATH",
        help="set the guest's clock, by the guest agent behind this socket of COMMAND",
    )
    start.add_argument("--timeout", type=float, default=60.0, metavar="S", help="to load a state")
    start.set_defaults(takes_command=True)

    upgrade = actions.add_parser(
        "upgrade",
        help="old and new QEMU overlap: the shortest pause",
        usage="cprctl qemu upgrade NAME [--owner USER] --qmp PATH [--other-images]"
        " [--force-machine] [--timeout S] -- QEMU COMMAND",
    )
    add_name(upgrade)
    upgrade.add_argument("--qmp", required=True, metavar="PATH", help="a monitor of the old QEMU")
    _add_overrides(upgrade)
    upgrade.add_argument("--timeout", type=float, default=30.0, metavar="S", help="for each step")
    upgrade.set_defaults(takes_command=True)

    stop = actions.add_parser("stop", help="for ExecStop=: save, or else shut the guest down")
    add_name(stop)
    _add_stop(stop)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--other-images",
        action="store_true",
        help="the guest goes on though COMMAND has other disk images, or an image was written",
    )
    parser.add_argument(
        "--force-machine",
        action="store_true",
        help="the guest goes on though COMMAND makes another machine",
    )


def _add_stop(stop: argparse.ArgumentParser) -> None:
    stop.add_argument("--qmp", required=True, metavar="PATH", help="a monitor of the QEMU")
    stop.add_argument("--timeout", type=float, default=30.0, metavar="S", help="for each step")
    stop.add_argument(
        "--powerdown-timeout",
        type=float,
        default=90.0,
        metavar="S",
        help="how long the guest may take to shut down",
    )
    stop.add_argument(
        "--down-marker",
        default="/run/cprd-going-down",
        metavar="PATH",
        help="when this exists the machine goes down for good: shut the guest down, do not save",
    )


def run(args: argparse.Namespace) -> int:
    """Run a verb; the exit status. Who listens at a monitor may answer in any form."""
    from cprd.errors import CprdError

    try:
        return _run(args)
    except CprdError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_name}:{place.tb_lineno}" if place is not None else ""
        raise CprdError(
            f"{getattr(args, 'qmp', '') or args.name}: an answer has another form than QEMU's"
            f" ({error!r}, {where}); no step was taken after that. If it is a"
            " QEMU that listens there, cprctl is at fault: please report this line"
        ) from None


def _run(args: argparse.Namespace) -> int:
    """As root, act as the uid that the command line names, before anything is done by path."""
    from cprd.errors import CprdError
    from cprd.qemu.errors import OtherOwner, one_line

    if args.action == "check":
        return run_check(args)
    if args.action != "start":
        from cprd.qemu.acting import act_as, owner_of
        from cprd.qemu.monitor import socket_path
        from cprd.qemu.sockets import mend

        act_as(owner_of(args.name))
        mend(socket_path(args.qmp))
    try:
        return _RUN[args.action](args)
    except OtherOwner as error:
        import shlex

        words = shlex.join(_for_owner(args, error.uid))
        note(f"cprctl: {one_line(error)}: say whose it is: {words}")
        return 1
    except CprdError as error:
        from cprd.qemu import signals

        status = signals.exit_status()
        if not status:
            raise
        note(f"cprctl: {one_line(error)}")
        return status


def _for_owner(args: argparse.Namespace, uid: int) -> list[str]:
    """The words of the command for a QEMU of that uid."""
    bare = args.name.rpartition("/")[2]
    words = ["cprctl", "qemu", args.action, f"{uid}/{bare}" if uid else bare, "--qmp", args.qmp]
    return [*words, "--", *args.command] if args.command else words


def run_check(args: argparse.Namespace) -> int:
    from cprd.qemu import servers, signals
    from cprd.qemu.errors import ChangedUser
    from cprd.qemu.examine import about_command_line, drift_of, examine
    from cprd.qemu.process import command_line

    with signals.watched():
        try:
            monitor = _monitor(args)
        except ChangedUser as error:
            say(f"no: {error}")
            return 1
        try:
            report = examine(monitor)
            pid = monitor.process.pid if monitor.process is not None else 0
            words = command_line(pid) if pid else []
            upgrade, notes = about_command_line(words, pid) if words else ([], [])
            upgrade += servers.single(monitor)
            drifted = drift_of(monitor)
            signals.check()
        finally:
            monitor.close()
    say(*(f"no: {problem}" for problem in [*report.problems, *drifted]))
    say(*(f"not by upgrade: {problem}" for problem in upgrade))
    say(*(f"note: {each}" for each in [*report.notes, *notes]))
    if drifted and not report.problems:
        say(f"this VM ({report.status}) can be handed over to a COMMAND that is changed so")
    elif not report.problems:
        say(f"this VM ({report.status}) can be handed over")
    return 1 if report.problems or drifted else 0


def _monitor(args: argparse.Namespace) -> Monitor:
    """A look changes nothing that stays: root may look without an --owner, as whoever it is."""
    from cprd.linux.identity import uid_of
    from cprd.qemu.acting import act_as
    from cprd.qemu.errors import NoListener, OtherOwner
    from cprd.qemu.monitor import Monitor, socket_path
    from cprd.qemu.sockets import mend

    if args.owner is not None:
        act_as(uid_of(args.owner))
    try:
        return Monitor.connect(args.qmp)
    except NoListener:
        mend(socket_path(args.qmp))
    except OtherOwner as error:
        if args.owner is not None:
            raise
        act_as(error.uid)
    return Monitor.connect(args.qmp)


def run_save(args: argparse.Namespace) -> int:
    from cprd.cli.arguments import connect
    from cprd.qemu import signals
    from cprd.qemu.save import save

    with connect(args) as daemon, signals.watched():
        kept = save(daemon, args.name, args.qmp, replace=args.replace, timeout=args.timeout)
    where = f", kept: {kept.kept}" if kept.kept else ""
    say(f"{kept.name} is held ({kept.status}, generation {kept.generation}{where})")
    say(*(f"note: the next start refuses the COMMAND of this QEMU: {each}" for each in kept.drift))
    return 0


def run_start(args: argparse.Namespace) -> int:
    from cprd.linux.paths import default_socket
    from cprd.qemu.acting import owner_of
    from cprd.qemu.start import Order, Overrides, start

    order = Order(
        args.socket or default_socket(user=args.user),
        args.name,
        owner_of(args.name),
        args.command or [],
        cold=args.cold,
        force=args.force,
        overrides=Overrides(args.other_images, args.force_machine),
        agent=args.set_time,
        timeout=args.timeout,
    )
    start(order)


def run_upgrade(args: argparse.Namespace) -> int:
    from cprd.cli.arguments import connect
    from cprd.qemu import signals
    from cprd.qemu.command import Command
    from cprd.qemu.start import Overrides
    from cprd.qemu.upgrade import upgrade

    command = Command(args.command or [])
    with connect(args) as daemon, signals.watched():
        overrides = Overrides(args.other_images, args.force_machine)
        done = upgrade(
            daemon, args.name, args.qmp, command, overrides=overrides, timeout=args.timeout
        )
    say(f"{args.name} runs in pid {done.pid} ({done.status}); it stood still for {done.pause}")
    return 0


def run_stop(args: argparse.Namespace) -> int:
    from cprd.cli.arguments import socket_of
    from cprd.qemu import signals
    from cprd.qemu.save import save
    from cprd.qemu.stop import connect, stop

    def save_it() -> str:
        with connect(socket_of(args)) as daemon:
            kept = save(daemon, args.name, args.qmp, timeout=args.timeout)
        return f"held ({kept.status}, generation {kept.generation})"

    with signals.watched():
        said = stop(
            args.qmp, save_it, powerdown=args.powerdown_timeout, down_marker=args.down_marker
        )
    note(f"{args.name}: {said}")
    return 0


_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "save": run_save,
    "start": run_start,
    "upgrade": run_upgrade,
    "stop": run_stop,
}
