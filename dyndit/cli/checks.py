"""Print the checks of --self-check."""

import json
import sys
from collections.abc import Iterable
from typing import Any


def print_checks(checks: Iterable[Any], json_: bool) -> None:
    """Print checks as they come. Exit with status 1 if one fails."""
    done: list[Any] = []
    for check in checks:
        print(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.found}; expected {check.expected}")
        done.append(check)
    if json_:
        print(json.dumps({"checks": [vars(check) for check in done]}))
    if not all(check.passed for check in done):
        sys.exit(1)
