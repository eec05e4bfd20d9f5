"""The command line of `peer_nncf.py` and `peer_olive.py`, whose last line of output `peers.py` reads."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[[argparse.Namespace], dict[str, Any]]


def main(about: str | None, *, quantize: Command, job: Command) -> None:
    """Run `quantize` or `job` as the command line says, and print what it gives as one line of JSON."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("quantize")
    one.add_argument("model", type=Path)
    one.add_argument("calibration", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--transformer", action="store_true", help="the model has attention; for a peer that asks")
    one.set_defaults(run=quantize)
    whole = commands.add_parser("job")
    whole.add_argument("recipe", type=Path)
    whole.add_argument("state", type=Path)
    whole.add_argument("out", type=Path)
    whole.set_defaults(run=job)
    options = parser.parse_args()
    print(json.dumps(options.run(options)))
