"""Ctrl-C during training: finish the step, save, then stop."""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupted(KeyboardInterrupt):
    """The user asked for a stop, and the state was saved. The message says how to go on."""

    def __init__(self, folder: Path, step: int):
        super().__init__(f"stopped after step {step}; the state is saved in {folder}, resume with --resume")
        self.folder, self.step = folder, step


class Interruption:
    """While entered, the first Ctrl-C sets `requested`; the second stops at once, back to the last checkpoint."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None
        # Python delivers signals to the main thread only; elsewhere the caller's own handling stays as it is.
        self._installable = threading.current_thread() is threading.main_thread()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Self:
        if self._installable:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installable:
            signal.signal(signal.SIGINT, self._previous)
