"""Errors that a user's input or settings caused; the command line prints their text without a traceback."""


class LitPruneError(Exception):
    """What a user did or gave wrong. The text says what, where, and how to put it right."""


class BadSample(LitPruneError):
    """A sample that cannot be used, with `file`, `sample` (its id or index) and `reason`.

    Code that knows neither the file nor the sample leaves them as "" and None; whoever knows them raises again.
    """

    def __init__(self, file: object, sample: object, reason: str):
        super().__init__(file, sample, reason)  # kept as args, so that it pickles
        self.file, self.sample, self.reason = str(file), sample, reason

    def __str__(self) -> str:
        file = f"{self.file}: " if self.file else ""
        sample = f"sample {self.sample}: " if self.sample is not None else ""
        return f"{file}{sample}{self.reason}"
