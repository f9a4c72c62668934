"""A text given out while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from flamingo_export.runtime.loop import Outcome
from flamingo_export.runtime.steering import HoldBack
from flamingo_export.runtime.texts import Generation
from flamingo_export.runtime.ticket import Ticket
from flamingo_export.runtime.timings import Timings
from flamingo_export.runtime.tokenizer import TextStream


class Stream(Iterator[str]):
    """Pieces of text, which together are the text of the generation; after the last one, `result` is all of it.

    Used in a `with` block it lets go of the model however the block ends. Close it, or drop it, to stop early.
    """

    def __init__(
        self,
        ticket: Ticket[Outcome],
        text: TextStream,
        finish: Callable[[Outcome, Timings], Generation],
        *,
        one_text: bool,
        stops: Sequence[str] = (),
    ) -> None:
        """one_text: whether the tokens that become certain are those of the result; of several samples the best is not known before.

        stops: texts before which the answer ends.
        """
        self.result: Generation | None = None
        self._ticket, self._text, self._finish, self._one_text = ticket, text, finish, one_text
        self._hold = HoldBack(stops, strip=True)
        self._given = 0
        self._open = True

    def __next__(self) -> str:
        while self._open:
            try:
                event = self._ticket.next_event()
                if event is not None:
                    tokens = event.token_ids if self._one_text else ()
                    piece = self._hold.push(self._text.push(tokens))
                    self._given += len(tokens)
                else:
                    self._open = False
                    self.result = self._finish(self._ticket.result(), self._ticket.timings)
                    piece = self._hold.push(self._text.push(self.result.token_ids[self._given :]) + self._text.finish())
                    piece += self._hold.finish()
            except BaseException:
                self.close()
                raise
            if piece:
                return piece
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "open" if self._open else "finished" if self.result is not None else "closed"
        return f"Stream({state}, {self._given} tokens given out)"

    def close(self) -> None:
        """Stops generating and lets go of media and cache."""
        self._open = False
        self._ticket.cancel()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()
