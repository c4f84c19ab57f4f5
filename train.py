"""Train, evaluate and sample: python train.py --help"""

import os
import signal
import sys
from typing import Any

from bd_lightning.checks import UserError
from bd_lightning.cli import build, compare, plan
from bd_lightning.cli.help import help_text
from bd_lightning.cli.quiet import quiet


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 2 after a mistake or divergence, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(), end="")
        return 0
    quiet()
    try:
        if argv[:1] == ["compare"]:
            compare.run(argv[1:])
        else:
            carry_out(plan.resolve(argv))
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print("\nstopped", file=sys.stderr)  # by Lightning, too, which makes an exit of it
        return 128 + signal.SIGINT
    finally:
        build.trusted.set(())  # what one command line trusts, nothing after it does
    return 0


def carry_out(resolved: plan.Plan) -> None:
    """Do what was planned; torch is imported by now."""
    from bd_lightning.cli import average, export, fit, predict

    if resolved.command in ("fit", "validate", "test"):  # Lightning ends them where nothing is lost
        fit.run(resolved)
        return
    usual = signal.signal(signal.SIGTERM, _end)
    try:
        {"predict": predict.run, "export": export.run, "average": average.run}[resolved.command](resolved)
    finally:
        signal.signal(signal.SIGTERM, usual)


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
