"""What can run but cannot be right is warned of, once."""

import warnings

_PATIENCE = 3  # times in a row


class Watch:
    """Notices that the loss does not see the training as it is."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._fruitless = 0  # choices in a row that found nothing
        self._unseen = 0  # states of the weights since the last step that was seen
        self._last = (-1, -1)

    def warn(self, text: str) -> None:
        """One line, the first time that it is said."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"DSKD: {text}", stacklevel=3)

    def chose(self, pairs: int) -> None:
        """After a choice was due: how many pairs had both a gradient and an update."""
        self._fruitless = 0 if pairs else self._fruitless + 1
        if self._fruitless == _PATIENCE:
            self.warn(
                f"directions were due {_PATIENCE} times in a row and no pair had both a gradient and an update; is the "
                "student that was paired the one that this optimizer trains?"
            )

    def called(self, steps: int, version: int, grad_steps: int) -> None:
        """At a call of the loss: the steps that it has seen, and the version of the student's weights."""
        if (steps, version) == self._last:
            return
        self._unseen = self._unseen + 1 if steps == self._last[0] else 0
        self._last = (steps, version)
        if self._unseen == _PATIENCE * grad_steps:
            self.warn(
                "the student's weights keep changing and the loss sees no optimizer step, so that it never chooses "
                "directions; call `dskd.attach(optimizer, total_steps)` or take steps inside `dskd.observe(progress)`"
            )
