"""Which images and channels of files that hold several are labelled: --page and --channel."""

from dataclasses import dataclass
from typing import Annotated

from ..errors import MisuseError
from ..options import option

ALL = "all"


@dataclass(frozen=True)
class Planes:
    """What is labelled of stacks.

    Attributes:
        page: a number, or `all`; None: the first.
        channel: numbers with commas between; None: all of them.
    """

    page: Annotated[
        str | None,
        option(
            metavar="N|all",
            help="Image of a stack to label, from 0 on, or all, with a result for each [default: 0].",
        ),
    ] = None
    channel: Annotated[
        str | None,
        option(metavar="N,…", help="Channels of the files that the network is shown, in this order, from 0 on."),
    ] = None

    @property
    def number(self) -> int | None:
        """The page that is asked for; None: the first, or all. Raises MisuseError."""
        if self.page is None or self.page == ALL:
            return None
        if not self.page.isdecimal():
            raise MisuseError(f"--page {self.page}; write a number, counted from 0, or {ALL}")
        return int(self.page)

    @property
    def channels(self) -> tuple[int, ...] | None:
        """The channels that are asked for. Raises MisuseError."""
        if self.channel is None:
            return None
        parts = [part.strip() for part in self.channel.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise MisuseError(f"--channel {self.channel}; write numbers, counted from 0, such as 2 or 3,2,1")
        return tuple(map(int, parts))
