"""Parses the command lines of servers with SGLang's own parser.

    server_flags.py COMMANDS.json        one list of words per server; prints a JSON list of what SGLang reads in each
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sglang.srt.server_args import ServerArgs


def main(commands: Path) -> None:
    read = []
    for words in json.loads(commands.read_text()):
        parser = argparse.ArgumentParser(allow_abbrev=False)  # a flag that is an abbreviation of another is a mistake
        ServerArgs.add_cli_args(parser)
        read.append({name: value for name, value in vars(parser.parse_args(words)).items() if _plain(value)})
    print("\n" + json.dumps(read))


def _plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
