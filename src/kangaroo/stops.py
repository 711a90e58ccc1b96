"""Finding stop strings in text as it arrives, in time linear in the text (Knuth, Morris and Pratt 1977)."""


class StopString:
    """How much of one stop string the text so far ends with."""

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0
        """The longest beginning of the stop string that the text ends with."""
        self._shorter = _next_shorter(stop)

    def read(self, text: str, *, past_ends: bool = False) -> int | None:
        """Read on; returns how many characters of `text` it took to complete the stop string, or None.

        With `past_ends` one that `text` completes is passed over.
        """
        stop, shorter, matched = self.stop, self._shorter, self.matched
        for place, character in enumerate(text, 1):
            while matched and stop[matched] != character:
                matched = shorter[matched]
            matched += stop[matched] == character
            if matched == len(stop):
                if not past_ends:
                    return place
                matched = shorter[matched]
        self.matched = matched
        return None


def _next_shorter(stop: str) -> list[int]:
    """For every beginning of the string, by its length: the longest shorter one that it ends with."""
    table, matched = [0, 0], 0
    for character in stop[1:]:
        while matched and stop[matched] != character:
            matched = table[matched]
        matched += stop[matched] == character
        table.append(matched)
    return table
