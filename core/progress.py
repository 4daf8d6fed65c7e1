"""A progress bar that is not silent where there is no terminal, as under nohup or Slurm."""

import sys
import time
from typing import Any

from tqdm import tqdm


class ReplyBar(tqdm):
    """A bar that counts replies. Where stderr is no terminal, it is a line there, at most once a minute."""

    def __init__(self, total: int, desc: str, hidden: bool = False, **options: Any) -> None:
        """hidden: neither bar nor lines."""
        super().__init__(total=total, desc=desc, unit="reply", disable=True if hidden else None, **options)
        self.lines = self.disable and not hidden
        self.name, self.done, self.note, self.printed = desc, 0, "", time.time()

    def update(self, n: int = 1) -> None:
        super().update(n)
        self.done += n
        self.print_line()

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh)
        self.note = s
        self.print_line()

    def print_line(self) -> None:
        if self.lines and time.time() >= self.printed + 60:
            self.printed = time.time()
            note = f", {self.note}" if self.note else ""
            print(f"{self.name}: {self.done} of {self.total} replies{note}", file=sys.stderr, flush=True)
