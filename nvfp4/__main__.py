"""``nvfp4 COMMAND`` and ``python -m nvfp4 COMMAND``: the command line, or the extra it lacks.

The options of a command are made from its config, so even ``--help`` needs the packages of the
extra ``train``. Without them ``nvfp4 info`` still answers, and every other command says what to
install and ends with code 1.
"""

from __future__ import annotations

import sys

from nvfp4.extras import what_to_install


def main() -> int:
    """Run the command of ``sys.argv`` and return its exit code; see ``nvfp4.cli.main``."""
    try:
        from nvfp4 import cli

        return cli.main()
    except ModuleNotFoundError as error:
        command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
        line = what_to_install(error, f"nvfp4 {command}".strip())
        if line is None:
            raise
        if command == "info" and len(sys.argv) == 2:
            from nvfp4.backends.machine import info

            print(info())
            return 0
        print(f"nvfp4: error: {line}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
