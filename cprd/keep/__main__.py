"""The program that `become` executes: python -I -S cprd/keep/__main__.py [check] FD COMMAND..."""

import os
import sys
import types

if __name__ == "__main__":
    if not __package__:
        # The package cprd imports the client and msgpack, which this process has no use for.
        package = types.ModuleType("cprd")
        package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
        sys.modules["cprd"] = package
    from cprd.keep.parent import main

    os._exit(main(sys.argv[1:]))  # nothing may come after the last line
